"""Forward and backward of PEFT's layers under `patch_peft`, beside the same without it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pylora

peft = pytest.importorskip("peft")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float64: 1e-12}


def outputs(model, x):
    """The output and the gradients of x and the trained parameters."""
    x = x.clone().requires_grad_()
    y = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    return y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *trained])


def assert_same(found, expected, tolerance):
    assert len(found) == len(expected)
    for each, other in zip(found, expected, strict=True):
        assert each.dtype == other.dtype
        scale = other.abs().max().item()
        torch.testing.assert_close(each, other, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}, {"bias": "all"}])
def test_results_and_gradients_are_those_of_peft(patch, make, ops, dtype, settings):
    model, x = make(dtype, **settings), torch.randn(5, 24, dtype=dtype)
    expected = outputs(model, x)
    patch()
    assert_same(outputs(model, x), expected, TOLERANCE[dtype])
    assert ops["dense"] == 2


def test_several_active_adapters(patch, make, ops):
    model, x = make(adapters=3), torch.randn(5, 24)
    model.base_model.set_adapter(["default", "a2"])
    expected = outputs(model, x)
    patch()
    assert_same(outputs(model, x), expected, 1e-5)
    assert ops["dense"] == 2


def test_conv1d(patch, ops):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=16, vocab_size=30))
    config = peft.LoraConfig(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, init_lora_weights=False)
    model, ids = peft.get_peft_model(base, config).eval(), torch.randint(0, 30, (2, 7))
    expected = model(ids).logits
    patch()
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert ops["dense"] == 3


def test_autocast(patch, make, ops):
    model, x = make(torch.bfloat16), torch.randn(5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        expected = outputs(model, x)
        patch()
        assert_same(outputs(model, x), expected, 3e-2)
    assert ops["dense"] == 2


def test_dropout(patch, make, ops):
    """Elements are dropped at the rate that was asked for, anew in each call, and not in evaluation."""
    model, x = make(lora_dropout=0.25), torch.ones(400, 24)
    layer = model.base_model.model.first
    with torch.no_grad():
        layer.lora_A["default"].weight.fill_(1)
        layer.lora_B["default"].weight.zero_()[:, 0] = 1
    expected = layer(x)
    patch()
    torch.testing.assert_close(layer(x), expected)
    model.train()
    kept = (layer(x) - layer.base_layer(x))[:, 0] / layer.scaling["default"] * 0.75 / 24
    assert kept.mean().item() == pytest.approx(0.75, abs=0.02)
    torch.manual_seed(1)
    first = layer(x)
    assert not torch.equal(layer(x), first)
    torch.manual_seed(1)
    torch.testing.assert_close(layer(x), first, rtol=0, atol=0)
    assert ops["dense"] == 5


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}])
def test_compiled_models(patch, make, settings):
    model, x = make(**settings), torch.randn(5, 24)
    expected = outputs(model, x)
    patch()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(outputs(compiled, x), expected, 1e-5)
    torch._dynamo.reset()


def test_gradient_checkpointing_with_dropout(patch, ops):
    from pylora.testing.llama import tiny_llama

    base = tiny_llama(layers=1, width=64)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "up_proj"], lora_dropout=0.5)).train()
    patch()
    ids, grads = torch.randint(0, 100, (2, 6)), []
    for _ in range(2):
        torch.manual_seed(3)
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert ops["dense"] == 2 + 2 * 2
    assert all(map(torch.equal, *grads))


def test_hooked_modules_go_the_way_of_peft(patch, make, ops):
    model, x, seen = make(), torch.randn(5, 24), []
    patch()
    expected = model(x)
    handle = model.base_model.model.first.lora_A["default"].register_forward_hook(lambda *args: seen.append(args))
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert (len(seen), ops["dense"]) == (1, 3)
    handle.remove()
    model(x)
    assert (len(seen), ops["dense"]) == (1, 5)


@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported for CAUSAL_LM")
@pytest.mark.parametrize(
    "settings", [{"lora_bias": True}, {"kasa_config": "KasaConfig"}, {"alora_invocation_tokens": [1]}]
)
def test_what_is_not_served_falls_through(patch, make, ops, settings):
    if "kasa_config" in settings:
        if not hasattr(peft, "KasaConfig"):
            pytest.skip(f"PEFT {peft.__version__} has no KaSA")
        settings = {"kasa_config": peft.KasaConfig()}
    model, x = make(target_modules=["first"], **settings), torch.randn(5, 24)
    expected = outputs(model, x)
    patch()
    assert_same(outputs(model, x), expected, 0)
    assert not any(ops.values())


def test_subclasses_of_peft_layers_keep_their_own_forward(patch, ops):
    class Own(peft.tuners.lora.Linear):
        pass

    layer = Own(nn.Linear(4, 4), "default", peft.LoraConfig(init_lora_weights=False), r=2)
    x = torch.randn(3, 4)
    expected = layer(x)
    patch()
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
    assert not any(ops.values())


def test_disabled_adapters_and_another_width(patch, make, ops):
    model, x = make(), torch.randn(5, 24)
    base = model.base_model.model.first.base_layer(x)
    patch()
    with model.disable_adapter():
        torch.testing.assert_close(model.base_model.model.first(x), base, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(5, 23))
    assert not any(ops.values())


def test_multihead_attention_trains_as_without(patch):
    torch.manual_seed(0)
    base = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2)}).requires_grad_(False)
    config = peft.LoraConfig(r=2, target_modules=["attention"], init_lora_weights=False)
    attention = peft.inject_adapter_in_model(config, base)["attention"]
    x = torch.randn(5, 2, 16)
    factors = [p for p in attention.parameters() if p.requires_grad]

    def step():
        return torch.autograd.grad(attention(x, x, x)[0].square().sum(), factors, allow_unused=True)

    step()
    expected = step()
    assert expected[0] is not None
    patch()
    for found, other in zip(step(), expected, strict=True):
        assert (found is None) == (other is None)
        if other is not None:
            torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-5)


class TestMixedBatches:
    NAMES = ("default", "a1", "__base__", "a2", "a1", "default")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_rows_are_those_of_their_adapters(self, patch, make, ops, dtype):
        model, x = make(dtype, adapters=3), torch.randn(6, 24, dtype=dtype)
        expected = model(x, adapter_names=list(self.NAMES))
        patch()
        found = model(x, adapter_names=list(self.NAMES))
        torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        assert ops["mixed"] == 2

    def test_modules_and_layers_of_other_kinds(self, patch, ops):
        class Words(nn.Module):
            def __init__(self):
                super().__init__()
                self.words = nn.Embedding(10, 24)
                self.out = nn.Linear(24, 5)

            def forward(self, x):
                return self.out(self.words(x))

        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["words", "out"], init_lora_weights=False)
        model = peft.get_peft_model(Words(), config)
        model.add_adapter("a1", config)
        model.eval()
        ids, names = torch.randint(0, 10, (3, 4)), ["a1", "__base__", "default"]
        expected = model(ids, adapter_names=names)
        patch()
        torch.testing.assert_close(model(ids, adapter_names=names), expected, rtol=1e-5, atol=1e-5)
        assert ops["mixed"] == 1

    def test_errors_are_those_of_peft(self, patch, make):
        model, dora, x = make(), make(use_dora=True), torch.randn(2, 24)
        patch()
        with pytest.raises(ValueError, match="non-existing adapter"):
            model(x, adapter_names=["default", "nobody"])
        with pytest.raises(ValueError, match="should be the same as the number of inputs"):
            model(x, adapter_names=["default"])
        with pytest.raises(ValueError, match="when DoRA is enabled"):
            dora(x, adapter_names=["default", "default"])
        with pytest.raises(ValueError, match="training mode"):
            model.train()(x, adapter_names=["default", "default"])
        model.eval().merge_adapter()
        with pytest.raises(ValueError, match="merged adapters"):
            model(x, adapter_names=["default", "default"])


def test_dora_norms_follow_the_weights(patch, make):
    """Norms are kept between calls; an optimizer's step, a load and an edit of the base weight are noticed."""
    model, x = make(use_dora=True, target_modules=["first"]), torch.randn(5, 24)
    layer = model.base_model.model.first
    patch()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def edit():
        with torch.no_grad():
            layer.base_layer.weight[0] *= 3

    state = {k: torch.randn_like(v) for k, v in peft.get_peft_model_state_dict(model).items()}
    for change in (
        lambda: (model(x).sum().backward(), optimizer.step()),
        lambda: peft.set_peft_model_state_dict(model, state),
        edit,
    ):
        model(x)
        change()
        found = model(x)
        pylora.unpatch_peft()
        torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-4)
        patch()


def test_invalidate_reaches_the_kept_norms(patch, make):
    """Writes through `.data` are not counted by torch, here as in pylora's own layers."""
    model, x = make(use_dora=True, target_modules=["first"]), torch.randn(5, 24)
    patch()
    model(x)
    model.base_model.model.first.base_layer.weight.data[0] *= 3
    pylora.invalidate(model)
    found = model(x)
    pylora.unpatch_peft()
    torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-4)

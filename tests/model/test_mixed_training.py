"""Mixed batches, in inference and in training: each row against its adapter alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pylora
from pylora import LoraConfig, get_peft_model
from pylora.ops import dense_mixed_forward

MODELS = {
    "llama": (["q_proj", "v_proj"], ["up_proj", "down_proj"], "all-linear"),
    "t5": (["q", "v"], ["wi", "wo"], ["k", "o"]),
    "gpt2": (["c_attn"], ["c_fc", "c_proj"], ["c_attn", "c_fc"]),
    "bert": (["query"], ["value", "dense"], "all-linear"),
}


def tiny_bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=32,
        )
    )


def three_adapters(make_transformer, kind: str, **settings):
    """A model with adapters "default", "b" and "c": different targets, ranks and scalings."""
    targets = MODELS[kind]
    configs = [
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=each, init_lora_weights=False, **settings)
        for rank, alpha, each in zip((4, 16, 3), (8, 5, 6), targets, strict=True)
    ]
    torch.manual_seed(0)
    model = get_peft_model(tiny_bert() if kind == "bert" else make_transformer(kind), configs[0])
    model.add_adapter("b", configs[1])
    model.add_adapter("c", configs[2])
    return model


def inputs_of(kind: str, rows: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(3, 3 + 5 * rows).view(rows, 5) % 20
    return {"input_ids": ids, "decoder_input_ids": ids} if kind == "t5" else {"input_ids": ids}


def first_output(output) -> torch.Tensor:
    return output.logits if "logits" in output else output.last_hidden_state


def loss_of(output) -> torch.Tensor:
    """A sum over rows. Not of squares alone: those of a normalised output are constant."""
    y = first_output(output)
    return (y - torch.linspace(-1, 1, y.shape[-1])).square().sum()


@pytest.mark.parametrize("kind", MODELS)
def test_each_row_is_what_its_adapter_gives(make_transformer, kind) -> None:
    model = three_adapters(make_transformer, kind).eval()
    names = ["c", "default", "__base__", "b", "c", "default"]
    inputs = inputs_of(kind, len(names))
    with torch.no_grad():
        mixed = first_output(model(**inputs, adapter_names=names))
        for name in ("default", "b", "c"):
            model.set_adapter(name)
            rows = [i for i, each in enumerate(names) if each == name]
            torch.testing.assert_close(mixed[rows], first_output(model(**inputs))[rows], rtol=1e-4, atol=1e-4)
        with model.disable_adapter():
            torch.testing.assert_close(mixed[2], first_output(model(**inputs))[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_those_of_an_adapter_s_own_rows(make_transformer, kind) -> None:
    model = three_adapters(make_transformer, kind)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train(kind in ("llama", "gpt2"))  # the others have dropout that is no module
    names = ["c", "default", "__base__", "b", "c", "default"]
    inputs = inputs_of(kind, len(names))
    model.base_model.set_adapter(["default", "b", "c"])
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with pylora.mixed_training(model, names):
        loss_of(model(**inputs)).backward()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    mixed = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    compared = 0
    for adapter in ("default", "b", "c"):
        model.set_adapter(adapter)
        rows = [i for i, each in enumerate(names) if each == adapter]
        own = {key: value[rows] for key, value in inputs.items()}
        loss_of(model(**own)).backward()
        for name, p in model.named_parameters():
            if f".{adapter}." in name and p.grad is not None:
                error = (mixed[name] - p.grad).norm() / p.grad.norm().clamp_min(1e-12)
                assert error < 1e-4, (name, error)
                compared += 1
        model.zero_grad(set_to_none=True)
    assert compared == len(mixed) > 0


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("kind", ["llama", "t5", "gpt2"])
def test_each_row_generates_what_its_adapter_does(make_transformer, kind, num_beams) -> None:
    model = three_adapters(make_transformer, kind).eval()
    names = ["c", "default", "__base__", "b", "c", "default"]
    ids = inputs_of(kind, len(names))["input_ids"]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "num_beams": num_beams}

    def generate(rows, **kwargs):
        own = ids[rows]
        return model.generate(input_ids=own, attention_mask=torch.ones_like(own), **options, **kwargs)

    mixed = generate(list(range(len(names))), adapter_names=names)
    differing = set()
    for name in ("default", "b", "c"):
        model.set_adapter(name)
        rows = [i for i, each in enumerate(names) if each == name]
        assert torch.equal(mixed[rows], generate(rows))
        differing.add(tuple(generate([0])[0].tolist()))
    with model.disable_adapter():
        assert torch.equal(mixed[[2]], generate([2]))
    assert len(differing) > 1, "the adapters give different texts, or the test would pass without them"


def linear_layer(**settings):
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(20, 12)), LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, **settings)
    )
    model.add_adapter("b", LoraConfig(r=7, target_modules=["0"], init_lora_weights=False, **settings))
    return model


def expected_rows(layer, x, names):
    """By the definition, from the parameters as they are now."""
    rows = []
    for i, name in enumerate(names):
        y = layer.base_layer(x[i])
        if name != "__base__":
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            y = y + (x[i].to(a.dtype) @ a.T @ b.T * layer.scaling[name]).to(y.dtype)
        rows.append(y)
    return torch.stack(rows)


NAMES = ["b", "default", "__base__", "b"]


def optimizer_step(model, layer):
    params = [p for p in model.parameters() if "b" in layer.lora_A]
    for p in params:
        p.grad = torch.ones_like(p)
    torch.optim.SGD(params, lr=0.1).step()


CHANGES = {
    "optimizer": optimizer_step,
    "in place": lambda model, layer: layer.lora_B["b"].weight.data.mul_(2),
    "set_scale": lambda model, layer: layer.set_scale("b", 3.0),
    "scaling": lambda model, layer: layer.scaling.update(b=0.3),
    "new parameter": lambda model, layer: setattr(layer.lora_A["b"], "weight", nn.Parameter(torch.randn(7, 20))),
    "new data": lambda model, layer: setattr(layer.lora_A["b"].weight, "data", torch.randn(7, 20)),
    "load": lambda model, layer: model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}),
    "dtype": lambda model, layer: model.to(torch.bfloat16),
    "replaced": lambda model, layer: (
        model.delete_adapter("b"),
        model.add_adapter("b", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_an_adapter_is_seen_at_the_next_call(change) -> None:
    model = linear_layer().eval()
    layer = model.base_model.model[0]
    x = torch.randn(4, 3, 20)
    with torch.no_grad():
        before = layer(x, adapter_names=NAMES)
        torch.testing.assert_close(before, expected_rows(layer, x, NAMES))
    CHANGES[change](model, layer)
    with torch.no_grad():
        x = x.to(layer.weight.dtype)
        after = layer(x, adapter_names=NAMES)
        rtol, atol = (2e-2, 0.1) if change == "dtype" else (1e-4, 1e-5)
        torch.testing.assert_close(after, expected_rows(layer, x, NAMES), rtol=rtol, atol=atol)
    assert change == "dtype" or not torch.equal(after, before)


def test_hooks_on_a_factor_run() -> None:
    model = linear_layer().eval()
    layer = model.base_model.model[0]
    x = torch.randn(4, 20)
    before = layer(x, adapter_names=NAMES)
    calls = []
    handle = layer.lora_A["b"].register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(layer(x, adapter_names=NAMES), before)
    handle.remove()
    assert calls == [1]


def test_a_deleted_adapter_s_rows_are_the_base_layer_s() -> None:
    model = linear_layer().eval()
    layer = model.base_model.model[0]
    x = torch.randn(4, 20)
    layer(x, adapter_names=NAMES)
    model.delete_adapter("b")
    torch.testing.assert_close(layer(x, adapter_names=NAMES)[0], layer.base_layer(x)[0])


def test_dora_in_a_mixed_batch() -> None:
    """PEFT refuses it."""
    model = linear_layer().eval()
    model.add_adapter("dora", LoraConfig(r=3, target_modules=["0"], init_lora_weights=False, use_dora=True))
    layer = model.base_model.model[0]
    x = torch.randn(5, 20)
    mixed = layer(x, adapter_names=["dora", "b", "__base__", "dora", "default"])
    for name, rows in (("dora", [0, 3]), ("b", [1]), ("default", [4])):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[rows], layer(x)[rows], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[2], layer.base_layer(x)[2])


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Embedding(30, 12), torch.arange(12).view(4, 3)),
        (nn.Conv1d(6, 8, 3), torch.randn(4, 6, 9)),
        (nn.Conv2d(6, 8, 3), torch.randn(4, 6, 9, 7)),
        (nn.Conv3d(4, 5, 2), torch.randn(4, 4, 5, 4, 3)),
    ],
)
def test_other_layers(module, x, use_dora) -> None:
    def config(rank, **settings):
        return LoraConfig(r=rank, target_modules=["0"], init_lora_weights=False, **settings)

    torch.manual_seed(1)
    model = get_peft_model(nn.Sequential(module), config(4)).train()
    model.add_adapter("b", config(2, use_dora=use_dora))
    layer = model.base_model.model[0]
    model.base_model.set_adapter(["default", "b"])
    with pylora.mixed_training(model, NAMES):
        mixed = model(x)
    mixed.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for name in ("default", "b"):
        model.zero_grad(set_to_none=True)
        model.set_adapter(name)
        rows = [i for i, each in enumerate(NAMES) if each == name]
        own = layer(x[rows])
        torch.testing.assert_close(mixed[rows], own, rtol=1e-4, atol=1e-4)
        own.square().sum().backward()
        own_grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        assert own_grads
        for key, grad in own_grads.items():
            torch.testing.assert_close(grads[key], grad, rtol=1e-4, atol=1e-3)


def test_dropout_in_training_drops_by_row() -> None:
    """A row's elements do not depend on its neighbours' adapters."""
    model = linear_layer(lora_dropout=0.5).train()
    model.base_model.set_adapter(["default", "b"])
    x = torch.randn(4, 20)
    results = []
    for names in (["b", "default", "b", "b"], ["b", "b", "__base__", "b"]):
        torch.manual_seed(3)
        with pylora.mixed_training(model, names):
            results.append(model(x))
    assert torch.equal(results[0][[0, 3]], results[1][[0, 3]])
    assert not torch.equal(results[0][1], results[1][1])


def test_errors() -> None:
    model = linear_layer().train()
    x = torch.randn(4, 20)
    with pytest.raises(ValueError, match="non-existing adapter"), pylora.mixed_training(model, ["nope"] * 4):
        pass
    inactive = pytest.raises(ValueError, match=r"expected active adapters \(default\), got b")
    with inactive, pylora.mixed_training(model, NAMES):
        pass
    foreign = pytest.raises(TypeError, match="expected a PeftModel or LoraModel, got Linear")
    with foreign, pylora.mixed_training(nn.Linear(2, 2), NAMES):
        pass
    with pytest.raises(ValueError, match="training mode"):
        model(x, adapter_names=NAMES)
    model.base_model.set_adapter(["default", "b"])
    with pytest.raises(ValueError, match="Length of `adapter_names`"), pylora.mixed_training(model, NAMES):
        model(x[:3])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_plan_is_made_once_for_all_layers(make_transformer, monkeypatch) -> None:
    model = three_adapters(make_transformer, "llama").eval()
    plans: list[tuple[torch.Tensor, ...]] = []

    def spy(layer, x, names, *plan):
        plans.append(plan)
        return dense_mixed_forward(layer, x, names, *plan)

    monkeypatch.setattr("pylora.layers.linear.dense_mixed_forward", spy)
    model(**inputs_of("llama", 4), adapter_names=["c", "c", "b", "c"])
    assert len(plans) > 4
    assert len({order.data_ptr() for order, _, _ in plans}) == 1
    assert len({id(slots) for _, _, slots in plans}) < len(plans)


def test_names_may_change_in_place_between_calls() -> None:
    layer = linear_layer().eval().base_model.model[0]
    x, names = torch.randn(4, 20), list(NAMES)
    layer(x, adapter_names=names)
    names[0] = "default"
    torch.testing.assert_close(layer(x, adapter_names=names), expected_rows(layer, x, names))
    torch.testing.assert_close(layer(x, adapter_names=tuple(NAMES)), expected_rows(layer, x, NAMES))

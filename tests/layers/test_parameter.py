"""`target_parameters`: matrices and stacks of experts, beside PEFT and against the definition."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import pylora
from pylora import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from pylora.errors import NoMatchingPeftModuleError, UnsupportedFeatureError
from pylora.layers import ParamWrapper

EXPERTS, DIM, HIDDEN = 3, 6, 10


class Experts(nn.Module):
    """Stacks stored as [experts, out, in], used expert by expert (gpt-oss, Mixtral)."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, DIM))
        self.down = nn.Parameter(torch.randn(EXPERTS, DIM, HIDDEN))
        self.bias = nn.Parameter(torch.randn(DIM))

    def forward(self, x):
        outputs = [F.linear(F.gelu(F.linear(x, self.up[e])), self.down[e]) for e in range(EXPERTS)]
        return sum(outputs) + self.bias


class TransposedExperts(nn.Module):
    """Stacks stored as [experts, in, out], used at once (Llama 4)."""

    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, DIM, HIDDEN))
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, DIM))

    def forward(self, x):
        flat = x.reshape(1, -1, DIM).expand(EXPERTS, -1, DIM)
        return torch.bmm(F.gelu(torch.bmm(flat, self.up)), self.down).sum(0).view(x.shape)


class Model(nn.Module):
    def __init__(self, experts=Experts, dtype=torch.float32) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"experts": experts(), "lin": nn.Linear(DIM, DIM)})
        self.head = nn.Linear(DIM, 2, bias=False)
        self.to(dtype)

    def forward(self, x):
        return self.head(self.block["lin"](x) + self.block["experts"](x))


BOTH = ["experts.down", "experts.up"]


def make(experts=Experts, dtype=torch.float32, **config):
    settings = {"target_modules": [], "target_parameters": BOTH, "init_lora_weights": False, "r": 2, **config}
    return get_peft_model(Model(experts, dtype), LoraConfig(**settings)).eval()


def wrappers(model) -> dict[str, ParamWrapper]:
    return {m.parameter_name: m for m in model.modules() if isinstance(m, ParamWrapper)}


def dense(model, names=("default",)) -> nn.Module:
    """The base model in f64 with the deltas in its parameters, from PEFT's layout of the factors."""
    deltas = {}
    for parameter, wrapper in wrappers(model).items():
        for name in names:
            a, b = wrapper.lora_A[name].weight.double(), wrapper.lora_B[name].weight.double()
            a = a.view(wrapper.num_experts, -1, a.shape[1])
            b = b.view(b.shape[0], -1, wrapper.num_experts)
            delta = wrapper.scaling[name] * torch.einsum("ore,eri->eoi", b, a)
            if getattr(wrapper.get_base_layer(), "is_transposed", False):
                delta = delta.transpose(1, 2)
            deltas[parameter] = deltas.get(parameter, 0) + delta.view(wrapper.get_param().shape)
    base = copy.deepcopy(model).unload().double()
    with torch.no_grad():
        for parameter, delta in deltas.items():
            getattr(base.block["experts"], parameter).add_(delta)
    return base


@pytest.mark.parametrize("experts", [Experts, TransposedExperts])
@pytest.mark.parametrize("adapters", [("default",), ("default", "other")])
def test_definition(experts, adapters) -> None:
    model = make(experts)
    if len(adapters) > 1:
        model.add_adapter("other", LoraConfig(target_modules=[], target_parameters=BOTH, init_lora_weights=False, r=3))
        model.base_model.set_adapter(list(adapters))
    assert set(wrappers(model)) == {"up", "down"}
    x = torch.randn(2, 4, DIM)
    reference = dense(model, adapters)
    output = model(x)
    torch.testing.assert_close(output.double(), reference(x.double()), rtol=1e-4, atol=1e-4)
    # gradients: those of the dense model, carried over to the factors
    parameters = {name: getattr(reference.block["experts"], name).requires_grad_() for name in ("up", "down")}
    reference(x.double()).square().sum().backward()
    output.square().sum().backward()
    for name, wrapper in wrappers(model).items():
        grad = parameters[name].grad
        grad = grad if experts is Experts else grad.mT
        for adapter in adapters:
            a, b = wrapper._factors(adapter)
            scaling = wrapper.scaling[adapter]
            wanted_a = (scaling * b.double().mT @ grad).reshape(-1, a.shape[-1])
            wanted_b = (scaling * grad @ a.double().mT).permute(1, 2, 0).reshape(b.shape[1], -1)
            torch.testing.assert_close(wrapper.lora_A[adapter].weight.grad.double(), wanted_a, rtol=1e-3, atol=1e-2)
            torch.testing.assert_close(wrapper.lora_B[adapter].weight.grad.double(), wanted_b, rtol=1e-3, atol=1e-2)
        assert wrapper.get_param().grad is None


@pytest.mark.parametrize("experts", [Experts, TransposedExperts])
@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize("targets", [BOTH, ["up"], ["block.lin.weight"], [*BOTH, "lin.weight"]])
def test_beside_peft(experts, init, targets, tmp_path) -> None:
    base = Model(experts)
    x = torch.randn(2, 4, DIM)
    results = []
    for package in (peft, pylora):
        torch.manual_seed(1)
        config = package.LoraConfig(
            target_modules=["head"],
            target_parameters=targets,
            init_lora_weights=init,
            r=2,
            rank_pattern={"lin.weight": 3, "experts.up": 1, "head": 2},
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = package.get_peft_model(copy.deepcopy(base), config)
            output = model(x)
            output.square().sum().backward()
            model.save_pretrained(tmp_path / package.__name__)
        results.append((model, output.detach(), package.get_peft_model_state_dict(model)))
    (theirs, output, state), (ours, our_output, our_state) = results
    assert list(our_state) == list(state)
    for key in state:
        torch.testing.assert_close(our_state[key], state[key], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(our_output, output, rtol=1e-4, atol=1e-4)
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert {name for name, p in ours.named_parameters() if p.grad is not None} == grads.keys()
    for name, param in ours.named_parameters():
        if param.grad is not None:
            torch.testing.assert_close(param.grad, grads[name], rtol=1e-3, atol=1e-3)
    assert ours.base_model.targeted_parameter_names == theirs.base_model.targeted_parameter_names
    assert ours.base_model.targeted_module_names == theirs.base_model.targeted_module_names
    for package, path in ((pylora, "peft"), (peft, "pylora")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = package.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / path)
        torch.testing.assert_close(loaded(x), output, rtol=1e-4, atol=1e-4)


def test_keys_say_the_nesting_order_of_the_parameters() -> None:
    prefix = "base_model.model.block.experts"
    assert set(get_peft_model_state_dict(make())) == {
        f"{prefix}.{depth}lora_{factor}.weight" for depth in ("", "base_layer.") for factor in "AB"
    }
    outer = make().base_model.model.block["experts"]
    assert (outer.parameter_name, outer.base_layer.parameter_name) == ("down", "up")
    assert repr(outer).startswith("lora.ParamWrapper(\n  parameter_name='down',")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("experts", [Experts, TransposedExperts])
def test_merge(dtype, safe_merge, experts) -> None:
    model = make(experts, dtype)
    x = torch.randn(2, 4, DIM, dtype=dtype)
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 5e-2}[dtype]
    wanted = dense(model)(x.double())
    bound = tolerance * wanted.abs().max().item()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.testing.assert_close(model(x).double(), wanted, rtol=0, atol=bound)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.merge_adapter(safe_merge=safe_merge)
    torch.testing.assert_close(model(x).double(), wanted, rtol=0, atol=bound)
    model.unmerge_adapter()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=tolerance * 10)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert type(merged.block["experts"]) is experts
    torch.testing.assert_close(merged(x).double(), wanted, rtol=0, atol=bound)


def test_a_stack_of_one_expert() -> None:
    """PEFT adds a transposed delta here, which fails unless the matrix is square."""
    for is_transposed in (False, True):
        base = nn.Module()
        base.w = nn.Parameter(torch.randn(1, 4, 5))
        base.is_transposed = is_transposed
        layer = ParamWrapper(base, "default", "w", LoraConfig(init_lora_weights=False), r=2, lora_alpha=4)
        assert (layer.in_features, layer.out_features) == ((4, 5) if is_transposed else (5, 4))
        assert layer.get_delta_weight("default").shape == (1, 4, 5)
        before = base.w.clone()
        layer.merge()
        torch.testing.assert_close(base.w, before + layer.get_delta_weight("default"))


class Sizes(TorchDispatchMode):
    """Notes the sizes of all results that have storage of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if type(result) is torch.Tensor and not func.is_view:
            self.seen.add(result.numel())
        return result


@pytest.mark.parametrize("experts", [Experts, TransposedExperts])
def test_nothing_of_the_stack_s_size_is_made(experts) -> None:
    model = make(experts)
    model.add_adapter("other", LoraConfig(target_modules=[], target_parameters=BOTH, init_lora_weights=False, r=1))
    model.base_model.set_adapter(["default", "other"])
    x = torch.randn(1, DIM)
    with Sizes() as sizes:
        model(x).sum().backward()
    assert max(sizes.seen) < EXPERTS * HIDDEN * DIM
    assert wrappers(model)["up"].lora_A["default"].weight.grad.any()


def test_other_uses_make_one_sum(monkeypatch) -> None:
    model = make(target_parameters=["experts.up"])
    model.add_adapter("other", LoraConfig(target_modules=[], target_parameters=["experts.up"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    experts = model.base_model.model.block["experts"].get_base_layer()
    experts.forward = lambda x: (experts.up.sum() + (experts.up * 2).mean()) * x
    calls = []
    original = torch.baddbmm
    monkeypatch.setattr(torch, "baddbmm", lambda *args: calls.append(args[1].shape[-1]) or original(*args))
    model(torch.randn(1, DIM))
    assert calls == [2 + 8]


def test_autocast_keeps_the_parameter_s_dtype() -> None:
    model = make()
    seen = []
    experts = model.base_model.model.block["experts"].get_base_layer()
    forward = experts.forward
    experts.forward = lambda x: seen.append(experts.up.dtype) or forward(x)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(1, DIM))
    assert seen == [torch.float32]
    assert "up" not in vars(experts)


def test_parameter_is_restored_after_an_error() -> None:
    model = make()
    experts = model.base_model.model.block["experts"].get_base_layer()
    with pytest.raises(RuntimeError):
        model.base_model.model.block["experts"](torch.randn(2, DIM + 1))
    assert experts.up is experts._parameters["up"]
    assert not {"up", "down"} & set(vars(experts))


@pytest.mark.skipif(not hasattr(torch, "float8_e4m3fn"), reason="this torch has no float8")
def test_float8_stack() -> None:
    class Float8(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, 4, 5).to(torch.float8_e4m3fn), requires_grad=False)

        def forward(self, x):
            return x @ self.w.float()

    layer = ParamWrapper(Float8(), "default", "w", LoraConfig(init_lora_weights=False), r=2, lora_alpha=4)
    layer.lora_A.float()
    layer.lora_B.float()
    layer.lora_B["default"].weight.data.mul_(1e5)
    output = layer(torch.eye(4).expand(2, 4, 4))
    assert output.isfinite().all()
    assert output.abs().max() == torch.finfo(torch.float8_e4m3fn).max


def test_existing_parametrization() -> None:
    class Plus1(nn.Module):
        def forward(self, value):
            return value + 1

    model = Model()
    parametrize.register_parametrization(model.block["lin"], "weight", Plus1())
    base = copy.deepcopy(model)
    model = get_peft_model(
        model, LoraConfig(target_modules=[], target_parameters=["block.lin.weight"], init_lora_weights=False)
    )
    wrapper = model.base_model.model.block["lin"]
    assert isinstance(wrapper, ParamWrapper)
    x = torch.randn(3, DIM)
    wanted = F.linear(x, base.block["lin"].weight + wrapper.get_delta_weight("default"), base.block["lin"].bias)
    for _ in range(2):
        torch.testing.assert_close(wrapper(x), wanted)
        assert len(wrapper.base_layer.parametrizations.weight) == 1
    with pytest.raises(UnsupportedFeatureError, match="expected a parameter, got a parametrization"):
        model.merge_adapter()
    torch.testing.assert_close(model.unload()(x), base(x))


def test_disable_delete_and_switch() -> None:
    model = make()
    x = torch.randn(2, DIM)
    with model.disable_adapter():
        base_output = model(x)
    default = model(x)
    config = LoraConfig(target_modules=[], target_parameters=BOTH[::-1], init_lora_weights=False, r=1)
    model.add_adapter("other", config)
    assert len(wrappers(model)) == 2
    torch.testing.assert_close(model(x), default)
    model.set_adapter("other")
    torch.testing.assert_close(model(x).double(), dense(model, ["other"])(x.double()), rtol=1e-4, atol=1e-4)
    model.delete_adapter("other")
    model.set_adapter("default")
    torch.testing.assert_close(model(x), default)
    torch.testing.assert_close(model.unload()(x), base_output)


def test_load_order_does_not_matter(tmp_path) -> None:
    base = Model()
    config = {"target_modules": [], "target_parameters": BOTH, "init_lora_weights": False}
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**config))
    model.add_adapter("other", LoraConfig(**config))
    x = torch.randn(2, DIM)
    outputs = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        outputs[name] = model(x)
    model.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "other", adapter_name="other")
    result = model.load_adapter(tmp_path, "default")
    assert not result.missing_keys
    assert not result.unexpected_keys
    for name, output in outputs.items():
        model.set_adapter(name)
        torch.testing.assert_close(model(x), output)


def test_lora_modules_inside_a_wrapped_module() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(DIM, DIM))
            self.inner = nn.Linear(DIM, DIM)
            self.sub = Experts()

        def forward(self, x):
            return self.sub(self.inner(x) @ self.scale)

    model = Model(Outer)
    config = LoraConfig(
        target_modules=["inner"], target_parameters=["experts.scale", "sub.up"], init_lora_weights=False
    )
    peft_model = get_peft_model(model, config)
    x = torch.randn(2, DIM)
    wanted = peft_model(x)
    assert set(wrappers(peft_model)) == {"scale", "up"}
    peft_model.add_adapter("other", LoraConfig(target_modules=[], target_parameters=["experts.scale", "sub.up"]))
    torch.testing.assert_close(peft_model(x), wanted)
    merged = peft_model.merge_and_unload()
    torch.testing.assert_close(merged(x), wanted, rtol=1e-4, atol=1e-4)
    assert not any("lora" in type(m).__module__ for m in merged.modules())


REFUSED = [
    ({"lora_dropout": 0.1}, r"lora\.ParamWrapper does not work with lora_dropout != 0\."),
    ({"fan_in_fan_out": True, "target_modules": []}, r"lora\.ParamWrapper does not work with fan_in_fan_out\."),
    ({"lora_bias": True}, r"lora\.ParamWrapper does not work with lora_bias=True\."),
    ({"use_dora": True}, r"lora\.ParamWrapper does not work with use_dora=True\."),
    ({"init_lora_weights": "pissa"}, r"lora\.ParamWrapper does not work with init_lora_weights='pissa'"),
    ({"target_parameters": ["experts.bias"]}, "1 dimensional Parameter bias, but only 2d and 3d are supported"),
    ({"target_modules": ["lin"], "target_parameters": ["lin.weight"]}, "Trying to wrap an `nn.Parameter` of layer"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_refusals_leave_the_model_alone(config, message) -> None:
    model = Model()
    modules = list(model.named_modules())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    settings = {"target_modules": ["head"], "target_parameters": BOTH, **config}
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            get_peft_model(model, LoraConfig(**settings))
    assert list(model.named_modules()) == modules
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_refused_second_adapter_leaves_no_trace() -> None:
    model = make()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="all adapters must target the same set of parameters"):
        model.add_adapter("other", LoraConfig(target_modules=[], target_parameters=["experts.up"]))
    with pytest.raises(ValueError, match="lora_dropout"):
        model.add_adapter("other", LoraConfig(target_modules=[], target_parameters=BOTH, lora_dropout=0.5))
    assert list(model.peft_config) == ["default"]
    assert model.state_dict().keys() == state.keys()
    model.add_adapter("modules only", LoraConfig(target_modules=["lin"]))


def test_top_level_parameter() -> None:
    model = nn.Module()
    model.param = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"top-level module is not supported \(parameter 'param'\)"):
        get_peft_model(model, LoraConfig(target_parameters=["param"]))


def test_mixed_batch_is_refused() -> None:
    model = make()
    with pytest.raises(ValueError, match=r"lora\.ParamWrapper does not support mixed adapter batches yet"):
        model(torch.randn(2, DIM), adapter_names=["default", "__base__"])


def test_unmatched() -> None:
    with pytest.raises(NoMatchingPeftModuleError, match="No `target_modules` passed but also no `target_parameters`"):
        get_peft_model(Model(), LoraConfig(target_modules=[], target_parameters=["nothing"]))
    with pytest.warns(RuntimeWarning, match=r"target_parameters=\['nothing'\] were set but no parameter was matched"):
        get_peft_model(Model(), LoraConfig(target_modules=["lin"], target_parameters=["nothing"]))
    with pytest.warns(RuntimeWarning, match=r"target_modules=\{'nothing'\} were set but no module was matched"):
        get_peft_model(Model(), LoraConfig(target_modules=["nothing"], target_parameters=BOTH))
    with pytest.raises(NoMatchingPeftModuleError, match="not found in the base model"):
        get_peft_model(Model(), LoraConfig(target_modules=["nope"], target_parameters=["nothing"]))


def test_state_dict_beside_target_parameters_is_refused() -> None:
    state = get_peft_model_state_dict(make())
    with pytest.raises(ValueError, match="the PEFT config uses `target_parameters`"):
        pylora.inject_adapter_in_model(LoraConfig(target_modules=[], target_parameters=BOTH), Model(), state_dict=state)


def test_low_cpu_mem_usage(tmp_path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    base = copy.deepcopy(model).unload()
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True)
    x = torch.randn(2, DIM)
    torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_experts(implementation, dtype) -> None:
    """The three ways in which transformers runs experts, against the merged model."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=32,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        experts_implementation=implementation,
    )
    model = Qwen3MoeForCausalLM(config).to(dtype).eval()
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    model = get_peft_model(
        model, LoraConfig(r=3, target_modules=[], target_parameters=targets, init_lora_weights=False)
    )
    ids = torch.arange(14).view(2, 7)
    tolerance = 1e-4 if dtype is torch.float32 else 5e-2
    logits = model(input_ids=ids).logits
    logits.float().square().sum().backward()
    assert all(p.grad.any() for name, p in model.named_parameters() if "lora_" in name)
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=ids).logits, logits, rtol=tolerance, atol=tolerance)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, logits, rtol=tolerance, atol=tolerance)


def test_compile_and_transforms_see_plain_tensors() -> None:
    model = make()
    wrapper = model.base_model.model.block["experts"]
    x = torch.randn(2, DIM)
    torch.testing.assert_close(torch.compile(wrapper, backend="eager")(x), wrapper(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.func.vmap(wrapper)(x), wrapper(x), rtol=1e-4, atol=1e-4)

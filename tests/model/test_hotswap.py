"""Hot swap: weights and scalings of a loaded adapter replaced in place, beside PEFT and under torch.compile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import peft.utils.hotswap as peft_hotswap
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import pylora
from pylora.model.hotswap import (
    check_hotswap_configs_compatible,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.lin1 = nn.Linear(20, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin1(torch.relu(self.lin0(x)))


def base() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def config(**kwargs: Any) -> pylora.LoraConfig:
    return pylora.LoraConfig(**{"target_modules": ["lin0", "lin1"], "init_lora_weights": False, **kwargs})


def saved(folder: Path, seed: int, cfg: pylora.LoraConfig) -> Path:
    model = pylora.get_peft_model(base(), cfg)
    torch.manual_seed(seed)
    for name, param in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(param)
    model.save_pretrained(folder)
    return folder


def output(folder: Path, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return pylora.PeftModel.from_pretrained(base(), folder)(x)


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(7)
    return torch.randn(3, 10)


def test_swapped_model_computes_as_the_loaded_one(tmp_path: Path, x: torch.Tensor) -> None:
    first, second = saved(tmp_path / "0", 1, config()), saved(tmp_path / "1", 2, config())
    model = pylora.PeftModel.from_pretrained(base(), first)
    params = [id(p) for p in model.parameters()]
    with torch.no_grad():
        for folder in (second, first):
            hotswap_adapter(model, folder, adapter_name="default")
            assert torch.equal(model(x), output(folder, x))
    assert [id(p) for p in model.parameters()] == params


@pytest.mark.parametrize(("ranks", "alphas"), [((4, 6), (8, 3)), ((6, 4), (3, 8))])
@pytest.mark.parametrize("prepare", [False, True])
def test_other_ranks_alphas_and_fewer_layers(
    tmp_path: Path, x: torch.Tensor, ranks: tuple[int, int], alphas: tuple[int, int], prepare: bool
) -> None:
    first = saved(tmp_path / "0", 1, config(r=ranks[0], lora_alpha=alphas[0]))
    second = saved(tmp_path / "1", 2, config(r=ranks[1], lora_alpha=alphas[1], target_modules=["lin0"]))
    models = {}
    for name, lib, module in (("pylora", pylora, pylora.model.hotswap), ("peft", peft, peft_hotswap)):
        model = models[name] = lib.PeftModel.from_pretrained(base(), first)
        if prepare:
            module.prepare_model_for_compiled_hotswap(model, target_rank=max(ranks))
        module.hotswap_adapter(model, second, adapter_name="default")
    with torch.no_grad():
        expected = output(second, x)
        for model in models.values():
            torch.testing.assert_close(model(x), expected)
    ours, theirs = models["pylora"].state_dict(), models["peft"].state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    layer = models["pylora"].base_model.model.lin0
    assert isinstance(layer.scaling["default"], torch.Tensor if prepare else float)
    assert float(layer.scaling["default"]) == alphas[1] / ranks[1]
    layer.scale_layer(2.0)
    layer.unscale_layer()
    assert float(layer.scaling["default"]) == alphas[1] / ranks[1]


def test_rank_pattern_counts_in_the_scaling(tmp_path: Path, x: torch.Tensor) -> None:
    first = saved(tmp_path / "0", 1, config(r=6))
    second = saved(tmp_path / "1", 2, config(r=6, rank_pattern={"lin1": 2}))
    model = pylora.PeftModel.from_pretrained(base(), first)
    hotswap_adapter(model, second, adapter_name="default")
    with torch.no_grad():
        torch.testing.assert_close(model(x), output(second, x))


@pytest.mark.parametrize("training", [False, True])
def test_no_recompilation(tmp_path: Path, x: torch.Tensor, training: bool) -> None:
    folders = [
        saved(tmp_path / "0", 1, config(r=4, lora_alpha=8)),
        saved(tmp_path / "1", 2, config(r=7, lora_alpha=3)),
        saved(tmp_path / "2", 3, config(r=2, lora_alpha=1, target_modules=["lin1"])),
    ]
    expected = [output(folder, x) for folder in folders]
    model = pylora.PeftModel.from_pretrained(base(), folders[0], is_trainable=training)
    prepare_model_for_compiled_hotswap(model, target_rank=7, config=model.peft_config)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.set_grad_enabled(training), torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(compiled(x), expected[0])
        for folder, value in list(zip(folders, expected, strict=True))[1:]:
            hotswap_adapter(compiled, folder, adapter_name="default")
            torch.testing.assert_close(compiled(x), value)
    if training:
        compiled(x).sum().backward()
        assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)


def test_without_preparation_a_new_scaling_is_compiled_again(tmp_path: Path, x: torch.Tensor) -> None:
    first, second = saved(tmp_path / "0", 1, config()), saved(tmp_path / "1", 2, config(lora_alpha=3))
    model = pylora.PeftModel.from_pretrained(base(), first)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(x)
        hotswap_adapter(compiled, second, adapter_name="default")
        with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(Exception, match="Recompiling"):
            compiled(x)


def test_preparation_changes_no_output_and_keeps_flags(x: torch.Tensor) -> None:
    model = pylora.get_peft_model(base(), config(r=3, lora_bias=True, rank_pattern={"lin1": 4}))
    model.add_adapter("other", config(r=2))
    before = model(x)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    cfg = model.peft_config["default"]
    prepare_model_for_compiled_hotswap(model, target_rank=5, config=cfg)
    torch.testing.assert_close(model(x), before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert (cfg.r, cfg.rank_pattern) == (5, {"lin1": 5})
    for name, p in model.named_parameters():
        if "lora_A" in name:
            assert p.shape[0] == 5
        elif "lora_B" in name and name.endswith("weight"):
            assert p.shape[1] == 5
    assert "out_features=5" in repr(model.base_model.model.lin0.lora_A["other"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_tensor_scaling_computes_as_a_number(dtype: torch.dtype) -> None:
    model = pylora.get_peft_model(base().to(dtype), config(lora_alpha=3), autocast_adapter_dtype=False)
    x = torch.randn(4, 10, dtype=dtype)
    before = model(x)
    prepare_model_for_compiled_hotswap(model)
    exact = dtype != torch.float64  # the tensor is f32, as PEFT's
    torch.testing.assert_close(model(x), before, rtol=0 if exact else 1e-6, atol=0 if exact else 1e-6)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), before)


@pytest.mark.parametrize("prepare", [False, True])
def test_failures_change_nothing(tmp_path: Path, x: torch.Tensor, prepare: bool) -> None:
    first = saved(tmp_path / "0", 1, config(r=3))
    model = pylora.PeftModel.from_pretrained(base(), first)
    if prepare:
        prepare_model_for_compiled_hotswap(model, target_rank=4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    scalings = [float(m.scaling["default"]) for m in (model.base_model.model.lin0, model.base_model.model.lin1)]

    other = saved(tmp_path / "1", 2, config(r=3, lora_alpha=1))
    tensors = load_file(other / "adapter_model.safetensors")
    file = other / "adapter_model.safetensors"

    save_file({**tensors, "base_model.model.lin2.lora_A.weight": torch.zeros(3, 10)}, file)
    with pytest.raises(RuntimeError, match=r"unexpected keys found: base_model.model.lin2.lora_A.default.weight"):
        hotswap_adapter(model, other, adapter_name="default")
    save_file({**tensors, "base_model.model.lin1.lora_B.weight": torch.zeros(4, 3)}, file)
    with pytest.raises(ValueError, match="Incompatible shapes found for LoRA weights"):
        hotswap_adapter(model, other, adapter_name="default")
    save_file(tensors, file)
    with pytest.raises(RuntimeError, match="unexpected keys"):
        hotswap_adapter(model, other, adapter_name="unknown")
    model.merge_adapter()
    merged = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="merged into the base weights"):
        hotswap_adapter(model, other, adapter_name="default")
    assert all(torch.equal(value, merged[key]) for key, value in model.state_dict().items())
    model.unmerge_adapter()

    for key, value in model.state_dict().items():
        if "lora_" in key:
            assert torch.equal(value, before[key])
    assert [float(m.scaling["default"]) for m in (model.base_model.model.lin0, model.base_model.model.lin1)] == scalings


def test_another_merged_adapter_does_not_matter(tmp_path: Path) -> None:
    first = saved(tmp_path / "0", 1, config())
    model = pylora.PeftModel.from_pretrained(base(), first)
    model.add_adapter("other", config())
    before = model.base_model.model.lin0.weight.clone()
    model.merge_adapter(["other"])
    hotswap_adapter(model, first, adapter_name="default")
    model.unmerge_adapter()
    torch.testing.assert_close(model.base_model.model.lin0.weight, before)


def test_dora_with_kept_norms(tmp_path: Path, x: torch.Tensor) -> None:
    first = saved(tmp_path / "0", 1, config(use_dora=True))
    second = saved(tmp_path / "1", 2, config(use_dora=True, lora_alpha=3))
    expected = output(second, x)
    model = pylora.PeftModel.from_pretrained(base(), first)
    with torch.no_grad(), pylora.DoraCaching():
        model(x)
        hotswap_adapter(model, second, adapter_name="default")
        torch.testing.assert_close(model(x), expected)


def test_missing_tensors_become_zero_and_other_adapters_stay(tmp_path: Path) -> None:
    first = saved(tmp_path / "0", 1, config())
    model = pylora.PeftModel.from_pretrained(base(), first)
    model.load_adapter(first, "default2")  # contains the other's name
    lin1 = model.base_model.model.lin1
    kept = lin1.lora_A["default2"].weight.clone()
    state = {k: v for k, v in model.state_dict().items() if ".default." in k and "lin0" in k}
    hotswap_adapter_from_state_dict(model, state, "default", model.peft_config["default"])
    assert not lin1.lora_A["default"].weight.any()
    assert not lin1.lora_B["default"].weight.any()
    assert torch.equal(lin1.lora_A["default2"].weight, kept)


def test_configurations_that_do_not_agree(tmp_path: Path) -> None:
    for key, value in {
        "use_rslora": True,
        "lora_dropout": 0.5,
        "alpha_pattern": {"lin0": 3},
        "use_dora": True,
    }.items():
        with pytest.raises(ValueError, match=f"Configs are incompatible: for {key}, ") as ours:
            check_hotswap_configs_compatible(config(), config(**{key: value}))
        with pytest.raises(ValueError, match=f"Configs are incompatible: for {key}, ") as theirs:
            peft_hotswap.check_hotswap_configs_compatible(
                peft.LoraConfig(target_modules=["a"]), peft.LoraConfig(**{"target_modules": ["a"], key: value})
            )
        assert str(ours.value) == str(theirs.value)
    first = saved(tmp_path / "0", 1, config())
    model = pylora.PeftModel.from_pretrained(base(), first)
    stored = json.loads((first / "adapter_config.json").read_text())
    (first / "adapter_config.json").write_text(json.dumps({**stored, "peft_type": "IA3"}))
    with pytest.raises(ValueError, match="Incompatible PEFT types found: LORA and IA3"):
        hotswap_adapter(model, first, adapter_name="default")


def test_prepare_refuses() -> None:
    with pytest.raises(ValueError, match="No adapter layers found on the model"):
        prepare_model_for_compiled_hotswap(base())
    model = pylora.get_peft_model(base(), config(r=4, rank_pattern={"lin1": 6}))
    with pytest.raises(ValueError, match=r"target rank 5, but the original rank is larger \(6\)"):
        prepare_model_for_compiled_hotswap(model, target_rank=5)
    assert model.base_model.model.lin0.lora_A["default"].weight.shape[0] == 4
    assert type(model.base_model.model.lin0.scaling["default"]) is float
    compiled: Any = torch.compile(model)
    with pytest.raises(ValueError, match=r"\*before\* compiling"):
        prepare_model_for_compiled_hotswap(compiled)
    with pytest.warns(UserWarning, match="called with a model that is already compiled"):
        prepare_model_for_compiled_hotswap(compiled, check_compiled="warn")
    with pytest.raises(ValueError, match="got 'wrong' instead"):
        prepare_model_for_compiled_hotswap(compiled, check_compiled="wrong")  # type: ignore[arg-type]
    prepare_model_for_compiled_hotswap(compiled, check_compiled="ignore")


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv2d(4, 4, 3, groups=2), (1, 4, 8, 8)),
        (lambda: nn.Conv1d(4, 6, 3), (1, 4, 8)),
        (lambda: nn.Embedding(9, 4), None),
    ],
)
@pytest.mark.parametrize("ranks", [(2, 4), (4, 2)])
def test_other_layers(tmp_path: Path, make: Any, shape: tuple[int, ...] | None, ranks: tuple[int, int]) -> None:
    def net() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(make()).eval()

    torch.manual_seed(3)
    inputs = torch.randint(9, (2, 5)) if shape is None else torch.randn(shape)
    outputs = []
    for index, rank in enumerate(ranks):
        model: Any = pylora.get_peft_model(net(), config(target_modules=["0"], r=rank))
        outputs.append(model.eval()(inputs))
        model.save_pretrained(tmp_path / str(index))
    model = pylora.PeftModel.from_pretrained(net(), tmp_path / "0")
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    torch.testing.assert_close(model(inputs), outputs[0])
    for index in (1, 0):
        hotswap_adapter(model, tmp_path / str(index), adapter_name="default")
        torch.testing.assert_close(model(inputs), outputs[index])
    if getattr(model.get_base_model()[0].get_base_layer(), "groups", 1) == 2:
        with pytest.raises(ValueError, match="the target rank is not divisible by 2"):
            prepare_model_for_compiled_hotswap(model, target_rank=5)

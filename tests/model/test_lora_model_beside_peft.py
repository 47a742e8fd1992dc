"""LoraModel beside the installed peft: same seed, so the same keys, values, outputs, flags, errors and warnings."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from pylora.config import LoraConfig
from pylora.model.lora_model import LoraModel

peft = pytest.importorskip("peft")
PeftLoraModel = pytest.importorskip("peft.tuners.lora").LoraModel

LIBRARIES = {"peft": (PeftLoraModel, peft.LoraConfig), "pylora": (LoraModel, LoraConfig)}
TARGETS: dict[str, Any] = {
    "mlp": ["lin0", "lin1"],
    "llama": "all-linear",
    "gpt2": ["c_attn"],
    "t5": ["q", "v"],
    "falcon": None,
}
KINDS = list(TARGETS)


class Outcome(NamedTuple):
    value: Any
    error: BaseException | None
    warnings: set[tuple[str, str]]


def observe(act: Callable[[], Any]) -> Outcome:
    """What a call returns or raises, and its warnings by category and beginning."""
    value, error = None, None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            value = act()
        except Exception as raised:
            error = raised
    return Outcome(value, error, {(w.category.__name__, str(w.message)[:45]) for w in caught})


@pytest.fixture
def build(make_mlp, make_transformer) -> Callable[..., dict[str, Outcome]]:
    """Wraps the same model with both libraries."""

    def both(kind: str, **config: Any) -> dict[str, Outcome]:
        outcomes = {}
        for library, (model_cls, config_cls) in LIBRARIES.items():
            model = make_mlp() if kind == "mlp" else make_transformer(kind)
            settings = config_cls(**{"target_modules": TARGETS[kind], **config})
            torch.manual_seed(7)
            outcomes[library] = observe(lambda m=model, c=model_cls, s=settings: c(m, s, "default"))
        return outcomes

    return both


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: param.requires_grad for name, param in model.named_parameters()}


def assert_same_model(ours: Any, theirs: Any) -> None:
    state, expected = ours.state_dict(), theirs.state_dict()
    assert list(state) == list(expected)
    assert [name for name in state if not torch.equal(state[name], expected[name])] == []
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    assert flags(ours) == flags(theirs)
    assert repr(ours) == repr(theirs)
    assert ours.targeted_module_names == theirs.targeted_module_names
    assert ours.active_adapter == theirs.active_adapter
    assert ours.active_adapters == theirs.active_adapters


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"init_lora_weights": False, "r": 4, "lora_alpha": 3},
        {"init_lora_weights": "gaussian", "use_rslora": True},
        {"init_lora_weights": False, "rank_pattern": {".*(0|q|c_attn).*": 3}, "alpha_pattern": {"lin1": 5}},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"inference_mode": True},
        {"init_lora_weights": False, "lora_dropout": 0.1},
        {"init_lora_weights": False, "lora_bias": True},
    ],
    ids=lambda config: ",".join(f"{key}" for key in config) or "default",
)
def test_wrapping(build, logits, kind, config) -> None:
    theirs, ours = build(kind, **config).values()
    assert ours.error is None
    assert theirs.error is None
    assert ours.warnings == theirs.warnings
    model, expected = ours.value.eval(), theirs.value.eval()
    assert_same_model(model, expected)
    torch.testing.assert_close(logits(model, kind), logits(expected, kind), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_modules_to_save(build, logits, kind) -> None:
    theirs, ours = build(kind, modules_to_save=["head" if kind == "mlp" else "lm_head"]).values()
    assert ours.warnings == theirs.warnings
    assert_same_model(ours.value.eval(), theirs.value.eval())
    torch.testing.assert_close(logits(ours.value, kind), logits(theirs.value, kind), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["nope"]},
        {"target_modules": ["act"]},
        {"target_modules": None},
        {"target_modules": ["lin0"], "r": 0},
        {"target_modules": ["lin0"], "init_lora_weights": "nonsense"},
        {"target_modules": ["lin0"], "bias": "some"},
        {"target_modules": ["lin0"], "exclude_modules": ["lin0"]},
        {"target_modules": ["lin0"], "modules_to_save": ["default"]},
    ],
    ids=str,
)
def test_refusals(build, make_mlp, config) -> None:
    outcomes = build("mlp", **config)
    ours, theirs = outcomes["pylora"], outcomes["peft"]
    assert theirs.error is not None
    expected = type(theirs.error).__name__
    assert expected in [cls.__name__ for cls in type(ours.error).__mro__]


@pytest.mark.parametrize("name", ["a.b", "keys", ""])
def test_impossible_names(make_mlp, name) -> None:
    errors = {}
    for library, (model_cls, config_cls) in LIBRARIES.items():
        config = config_cls(target_modules=["lin0"])
        errors[library] = type(observe(lambda c=model_cls, s=config: c(make_mlp(), s, name)).error)
    assert errors["pylora"] is errors["peft"] is KeyError


def act_on(model: Any, config_cls: Any, step: str) -> None:
    """One step of a lifecycle, written once for both libraries."""
    action, _, argument = step.partition(" ")
    if action == "add":
        name, _, settings = argument.partition(" ")
        torch.manual_seed(len(name))
        config = config_cls(
            **{"target_modules": ["lin0", "lin1"], "init_lora_weights": False, **eval(settings or "{}")}
        )
        model.peft_config[name] = config
        model.inject_adapter(model.model, name)
    elif action == "set":
        model.set_adapter(argument.split(","))
    elif action == "merge":
        model.merge_adapter(argument.split(",") if argument else None)
    elif action == "safe_merge":
        model.merge_adapter(safe_merge=True)
    elif action == "unmerge":
        model.unmerge_adapter()
    elif action == "disable":
        model.disable_adapter_layers()
    elif action == "enable":
        model.enable_adapter_layers()
    elif action == "delete":
        model.delete_adapter(argument)
    elif action == "freeze":
        model.set_requires_grad(argument, False)
    elif action == "call":
        model(torch.ones(1, 10))


LIFECYCLES = [
    ["add a1", "set a1", "merge", "unmerge", "set default,a1", "safe_merge", "call", "unmerge"],
    ["add a1 {'target_modules': ['lin0']}", "set a1,default", "merge a1", "merge", "merge", "unmerge", "unmerge"],
    ["add a1 {'target_modules': ['head']}", "set a1", "delete a1", "delete default"],
    ["add a1", "add a2", "delete default", "set a2", "delete a2", "delete a1", "delete ghost"],
    ["merge", "add a1", "set a1"],
    ["merge", "set ghost", "set default", "delete ghost"],
    ["merge", "delete default", "unmerge", "delete default"],
    ["disable", "call", "add a1", "set a1", "call", "enable"],
    ["merge", "disable", "call", "enable", "merge ghost"],
    ["add a1 {'modules_to_save': ['head']}", "set a1", "disable", "enable", "set default", "delete a1"],
    [
        "add a1 {'modules_to_save': ['head']}",
        "add a2 {'modules_to_save': ['head']}",
        "set a1,a2",
        "set a2",
        "delete a2",
    ],
    ["add a1 {'bias': 'lora_only'}", "set a1", "disable", "add a2 {'bias': 'all'}"],
    ["add a1 {'inference_mode': True}", "set a1", "freeze a1", "enable"],
    ["add a1 {'modules_to_save': ['lin0']}", "set a1", "delete default"],
]


@pytest.mark.parametrize("steps", LIFECYCLES, ids=" ; ".join)
def test_lifecycles(build, logits, steps) -> None:
    """The same steps on both: after each the same outcome and state. A failing step ends it (peft is half-way then)."""
    outcomes = build("mlp", init_lora_weights=False)
    theirs, ours = outcomes["peft"].value.eval(), outcomes["pylora"].value.eval()
    for step in steps:
        expected = observe(lambda s=step: act_on(theirs, peft.LoraConfig, s))
        actual = observe(lambda s=step: act_on(ours, LoraConfig, s))
        assert type(actual.error).__name__ == type(expected.error).__name__, step
        if expected.error is not None:
            return
        assert actual.warnings == expected.warnings, step
        ours.eval(), theirs.eval()
        assert flags(ours) == flags(theirs), step
        assert list(ours.state_dict()) == list(theirs.state_dict()), step
        assert ours.active_adapter == theirs.active_adapter, step
        for mine, peers in zip(layers(ours), layers(theirs), strict=True):
            assert mine.merged_adapters == peers.merged_adapters, step
            assert mine.active_adapters == peers.active_adapters, step
            assert mine.scaling == peers.scaling, step
        torch.testing.assert_close(logits(ours, "mlp"), logits(theirs, "mlp"), rtol=1e-4, atol=1e-5)


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unload(build, logits, make_mlp, make_transformer, kind, safe_merge) -> None:
    theirs, ours = (outcome.value.eval() for outcome in build(kind, init_lora_weights=False).values())
    adapted = logits(ours, kind)
    merged, expected = ours.merge_and_unload(safe_merge=safe_merge), theirs.merge_and_unload(safe_merge=safe_merge)
    assert type(merged) is type(expected)
    assert list(merged.state_dict()) == list(expected.state_dict())
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(merged, kind), adapted, rtol=1e-4, atol=1e-4)
    assert not hasattr(merged, "peft_config")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_training_steps_follow_each_other(build, kind) -> None:
    """Without dropout, the same seed trains the same adapter."""
    models = {library: outcome.value.train() for library, outcome in build(kind).items()}
    ids = torch.arange(16).view(2, 8)
    for model in models.values():
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    expected = models["peft"].state_dict()
    for name, value in models["pylora"].state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_generate_falls_through(build, make_transformer) -> None:
    outputs = []
    for outcome in build("llama", init_lora_weights=False).values():
        ids = torch.arange(5)[None]
        outputs.append(outcome.value.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0))
    assert torch.equal(*outputs)

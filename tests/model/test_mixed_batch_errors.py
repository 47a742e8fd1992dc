"""Bad input to mixed batches, kind of layer by kind: a clear error before an adapted layer computes, and nothing is
changed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import pylora
from pylora import LoraConfig, get_peft_model
from pylora.layers import LoraLayer

ROWS = 4
NAMES = ["b", "default", "__base__", "b"]


def sequential(module: nn.Module, x: torch.Tensor):
    return nn.Sequential(module), ["0"], {"input": x}


def gpt2(make_transformer):
    return make_transformer("gpt2"), ["c_attn", "c_fc"], {"input_ids": torch.arange(ROWS * 3).view(ROWS, 3)}


def llama(make_transformer):
    ids = torch.arange(ROWS * 3).view(ROWS, 3) % 20
    return make_transformer("llama"), ["q_proj", "down_proj", "embed_tokens"], {"input_ids": ids}


KINDS = {
    "linear": lambda _: sequential(nn.Linear(6, 5), torch.randn(ROWS, 6)),
    "embedding": lambda _: sequential(nn.Embedding(20, 6), torch.arange(ROWS * 2).view(ROWS, 2)),
    "conv1d": lambda _: sequential(nn.Conv1d(4, 6, 3), torch.randn(ROWS, 4, 9)),
    "conv2d": lambda _: sequential(nn.Conv2d(4, 6, 3), torch.randn(ROWS, 4, 5, 6)),
    "conv3d": lambda _: sequential(nn.Conv3d(2, 3, 2), torch.randn(ROWS, 2, 3, 4, 3)),
    "Conv1D": gpt2,
    "llama": llama,
}


class Case:
    """A model with adapters "default", "b", and "dora" beside them, in evaluation mode."""

    def __init__(self, kind: str, make_transformer: Any) -> None:
        base, targets, self.inputs = KINDS[kind](make_transformer)
        self.model: Any = get_peft_model(base, self.config(4, targets))
        self.model.add_adapter("b", self.config(2, targets))
        self.model.add_adapter("dora", self.config(3, targets, use_dora=True))
        self.model.eval()
        self.computed: list[nn.Module] = []
        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                module.base_layer.register_forward_hook(lambda module, *_: self.computed.append(module))

    @staticmethod
    def config(rank, targets, **settings):
        return LoraConfig(r=rank, target_modules=targets, init_lora_weights=False, **settings)

    def __call__(self, names, rows=ROWS):
        inputs = {key: value[:rows] for key, value in self.inputs.items()}
        output = self.model(**inputs, adapter_names=names)
        return output if isinstance(output, torch.Tensor) else output.logits

    def state(self):
        hooks = [len(m._forward_pre_hooks) for m in self.model.modules()]
        flags = [(p.requires_grad, p.grad) for p in self.model.parameters()]
        tensors = {key: value.clone() for key, value in self.model.state_dict().items()}
        return tensors, hooks, flags

    def refuses(self, names, message, call=None, rows=ROWS):
        tensors, *rest = self.state()
        self.computed.clear()
        with pytest.raises(ValueError, match=message):
            (call or self)(names, **({} if call else {"rows": rows}))
        after, *rest_after = self.state()
        assert self.computed == []
        assert rest_after == rest
        assert all(torch.equal(after[key], value) for key, value in tensors.items())


@pytest.fixture(params=KINDS)
def case(request, make_transformer) -> Case:
    return Case(request.param, make_transformer)


def test_unknown_adapters(case) -> None:
    case.refuses(["b", "nope", "b", "nor_this"], r"non-existing adapter\(s\): nope, nor_this")
    case.refuses("default", "non-existing adapter")
    case.model.delete_adapter("b")
    case.refuses(NAMES, r"non-existing adapter\(s\): b$")


def test_another_number_of_names_than_rows(case) -> None:
    for names, rows in ((NAMES[:3], ROWS), ([*NAMES, "b"], ROWS), ([], ROWS), (NAMES, 3)):
        case.refuses(names, f"Length of `adapter_names` .* but got {len(names)} and {rows}", rows=rows)


def test_training_mode_without_the_context(case) -> None:
    case.model.train()
    case.refuses(NAMES, "Cannot pass `adapter_names` when the model is in training mode")


def test_merged_adapters(case) -> None:
    case.model.merge_adapter(["default"])
    case.refuses(NAMES, "Cannot pass `adapter_names` when there are merged adapters")


def test_the_context_of_training(case) -> None:
    case.model.train()

    def train(names):
        with pylora.mixed_training(case.model, names):
            case(None)

    case.refuses(["nope"] * ROWS, r"non-existing adapter\(s\): nope", call=train)
    case.refuses(NAMES, r"expected active adapters \(default\), got b", call=train)
    case.model.base_model.set_adapter(["default", "b"])
    case.refuses(NAMES[:3], "Length of `adapter_names`", call=train)
    case.model.merge_adapter(["default"])
    case.refuses(NAMES, "when there are merged adapters", call=train)


def test_after_an_error_the_next_batch_is_right(case) -> None:
    names = ["dora", *NAMES[1:]]
    with torch.no_grad():
        expected = case(names)
        case.refuses(["nope"] * ROWS, "non-existing")
        case.refuses(names[:2], "Length of")
        assert torch.equal(case(names), expected)


def test_an_adapter_without_the_layer_leaves_its_rows_alone(case) -> None:
    """As in PEFT: adapters of one batch may target different layers."""
    layer = next(m for m in case.model.modules() if isinstance(m, LoraLayer))
    layer.delete_adapter("b")
    seen = []
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        case(["default"] * ROWS)
        hook.remove()
        y = layer(seen[0], adapter_names=NAMES)
        base = layer.base_layer(seen[0])
    assert torch.equal(y[[0, 2, 3]], base[[0, 2, 3]])
    assert not torch.equal(y[1], base[1])


@pytest.mark.parametrize("num_beams", [1, 2])
def test_generate(make_transformer, num_beams) -> None:
    case = Case("llama", make_transformer)

    def generate(names):
        ids = case.inputs["input_ids"]
        options = {"max_new_tokens": 2, "num_beams": num_beams, "do_sample": False, "pad_token_id": 0}
        return case.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names, **options)

    expected = generate(NAMES)
    case.refuses(["b", "nope", "b", "b"], r"non-existing adapter\(s\): nope", call=generate)
    case.refuses(NAMES[:3], "Length of `adapter_names`", call=generate)
    case.model.train()
    case.refuses(NAMES, "training mode", call=generate)
    case.model.eval()
    assert torch.equal(generate(NAMES), expected)
    case.model.merge_adapter(["default"])
    case.refuses(NAMES, "merged adapters", call=generate)

"""Preparing base models: kbit training and mixed precision."""

import pytest
import torch
from torch import nn

import pylora
from pylora import cast_mixed_precision_params, prepare_model_for_kbit_training


class Quantised(nn.Module):
    """Stands for a quantised transformers model: the flags, and methods that note how they were called."""

    def __init__(self, **flags):
        super().__init__()
        self.embed = nn.Embedding(5, 4).to(torch.float16)
        self.norm = nn.LayerNorm(4).to(torch.bfloat16)
        self.packed = nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)
        self.calls = []
        for name, value in flags.items():
            setattr(self, name, value)

    def get_input_embeddings(self):
        return self.embed

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
        self.calls.append(gradient_checkpointing_kwargs)


def test_everything_is_frozen_and_half_precision_becomes_f32():
    model = Quantised()
    assert prepare_model_for_kbit_training(model) is model
    assert not any(param.requires_grad for param in model.parameters())
    assert {param.dtype for param in model.parameters()} == {torch.float32, torch.int8}
    assert model.calls == []  # not quantised: nothing is checkpointed


@pytest.mark.parametrize("method", ["gptq", "aqlm", "eetq", "torchao", "hqq"])
def test_methods_bound_to_their_dtype_keep_it(method):
    model = prepare_model_for_kbit_training(Quantised(quantization_method=method))
    assert {param.dtype for param in model.parameters()} == {torch.float16, torch.bfloat16, torch.int8}
    assert model.calls == [{}]


def test_4_bit_parameters_are_left_alone():
    class Params4bit(nn.Parameter):
        pass

    model = Quantised(is_loaded_in_4bit=True)
    model.norm.weight = Params4bit(model.norm.weight.data)
    prepare_model_for_kbit_training(model)
    assert model.norm.weight.dtype is torch.bfloat16
    assert model.norm.bias.dtype is torch.float32


@pytest.mark.parametrize(
    ("kwargs", "requires_grad"), [(None, True), ({"use_reentrant": True}, True), ({"use_reentrant": False}, False)]
)
def test_reentrant_checkpointing_gets_inputs_that_require_gradients(kwargs, requires_grad):
    model = prepare_model_for_kbit_training(Quantised(is_loaded_in_8bit=True), gradient_checkpointing_kwargs=kwargs)
    assert model.embed(torch.arange(3)).requires_grad is requires_grad
    assert model.calls == [kwargs or {}]


def test_the_model_s_own_way_to_require_gradients_goes_first():
    called = []
    model = Quantised(is_loaded_in_8bit=True, enable_input_require_grads=lambda: called.append(True))
    prepare_model_for_kbit_training(model)
    assert called == [True]
    assert not model.embed._forward_hooks


def test_checkpointing_can_be_left_out():
    assert (
        prepare_model_for_kbit_training(Quantised(is_loaded_in_8bit=True), use_gradient_checkpointing=False).calls == []
    )


def test_a_model_whose_checkpointing_takes_no_arguments_warns():
    class Old(Quantised):
        def gradient_checkpointing_enable(self):
            self.calls.append("old")

    with pytest.warns(FutureWarning, match="gradient_checkpointing_kwargs is not supported"):
        model = prepare_model_for_kbit_training(
            Old(is_loaded_in_8bit=True), gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    assert model.calls == ["old"]


@pytest.mark.parametrize("clear", [True, False])
def test_the_cache_is_cleared_if_asked(monkeypatch, clear):
    emptied = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    prepare_model_for_kbit_training(Quantised(), auto_clear_cache=clear)
    assert emptied == ([True] if clear else [])


def test_a_transformers_model_trains_after_it(make_transformer):
    base = make_transformer("llama").to(torch.bfloat16)
    base.is_loaded_in_8bit = True
    base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": True})
    model = pylora.get_peft_model(base, pylora.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).train()
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    trained = [param for param in model.parameters() if param.requires_grad]
    assert trained
    assert all(param.grad is not None and torch.isfinite(param.grad).all() for param in trained)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_frozen_parameters_take_the_dtype_and_trainable_ones_f32(make_mlp, dtype):
    model = pylora.get_peft_model(make_mlp(), pylora.LoraConfig(target_modules=["lin0"], modules_to_save=["head"]))
    model.base_model.model.lin0.lora_A.default.to(torch.bfloat16)
    before = [id(param) for param in model.parameters()]
    cast_mixed_precision_params(model, dtype)
    for name, param in model.named_parameters():
        assert param.dtype is (torch.float32 if param.requires_grad else dtype), name
    assert [id(param) for param in model.parameters()] == before

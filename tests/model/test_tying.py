"""ensure_weight_tying for target_modules and modules_to_save, beside PEFT."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import pylora
from tests.model.tiny_models import EncoderDecoder, llama

X = torch.tensor([[0, 1, 2, 3, 4, 3]])


def wrapped(lib: Any, base: Any, **kwargs: Any) -> Any:
    torch.manual_seed(5)
    options = {"ensure_weight_tying": True, "init_lora_weights": False, "r": 3, **kwargs}
    return lib.get_peft_model(base, lib.LoraConfig(**options))


def factors(model: Any, name: str = "default") -> tuple[torch.Tensor, ...]:
    embedding, head = model.get_input_embeddings(), model.get_base_model().lm_head
    return (
        embedding.lora_embedding_A[name],
        embedding.lora_embedding_B[name],
        head.lora_A[name].weight,
        head.lora_B[name].weight,
    )


def are_tied(model: Any, name: str = "default") -> bool:
    a, b, head_a, head_b = factors(model, name)
    return a.data_ptr() == head_b.data_ptr() and b.data_ptr() == head_a.data_ptr() and torch.equal(a.T, head_b)


@pytest.mark.parametrize(
    "targets",
    [
        ["lm_head"],
        ["embed_tokens"],
        ["lm_head", "model.embed_tokens"],
        ".*embed_tokens",
        ".*lm_head",
        ".*(q_proj|lm_head)",
    ],
)
def test_targets_as_in_peft(targets: Any) -> None:
    targets = targets if isinstance(targets, str) else ["q_proj", *targets]
    ours, theirs = (
        wrapped(pylora, llama(True), target_modules=targets),
        wrapped(peft, llama(True), target_modules=targets),
    )
    assert are_tied(ours)
    assert are_tied(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        if "lora_" in key:
            torch.nn.init.constant_(value, len(key))
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(X).logits, theirs(X).logits)
    trained = [{name for name, p in m.named_parameters() if p.requires_grad} for m in (ours, theirs)]
    assert trained[0] == trained[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_tied_after_saving_loading_and_casting(tmp_path: Path, dtype: torch.dtype, low_cpu_mem_usage: bool) -> None:
    model = wrapped(pylora, llama(True).to(dtype), target_modules=["q_proj", "lm_head"])
    assert are_tied(model)
    assert factors(model)[2].dtype is torch.float32
    with torch.no_grad():
        factors(model)[1].add_(1)
    expected = model(X).logits
    model.save_pretrained(tmp_path)
    loaded = pylora.PeftModel.from_pretrained(
        llama(True).to(dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True
    )
    assert are_tied(loaded)
    torch.testing.assert_close(loaded(X).logits, expected)
    assert all(p.requires_grad for p in factors(loaded))
    loaded.load_adapter(tmp_path, "other", low_cpu_mem_usage=low_cpu_mem_usage)
    assert are_tied(loaded, "other")
    assert not any(p.requires_grad for p in factors(loaded, "other"))
    for duplicate in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert are_tied(duplicate)
    if dtype is torch.float32:
        read_back = peft.PeftModel.from_pretrained(llama(True), tmp_path)
        torch.testing.assert_close(read_back(X).logits, expected)


@pytest.mark.filterwarnings("error:All adapters are already merged", "error:Already unmerged")
@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"]])
def test_a_tied_weight_is_merged_into_once(targets: list[str]) -> None:
    model = wrapped(pylora, llama(True), target_modules=targets)
    expected, base = model(X).logits, llama(True)(X).logits
    for duplicate in (model, copy.deepcopy(model)):
        duplicate.merge_adapter()
        torch.testing.assert_close(duplicate(X).logits, expected, rtol=1e-4, atol=1e-4)
        duplicate.unmerge_adapter()
        torch.testing.assert_close(duplicate(X).logits, expected, rtol=1e-4, atol=1e-4)
        duplicate.merge_adapter()
        with duplicate.disable_adapter():
            torch.testing.assert_close(duplicate(X).logits, base, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(duplicate(X).logits, expected, rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    torch.testing.assert_close(merged(X).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_modules_to_save(tmp_path: Path, modules: list[str]) -> None:
    ours, theirs = (
        wrapped(lib, llama(True), target_modules=["q_proj"], modules_to_save=list(modules)) for lib in (pylora, peft)
    )
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    copies = [ours.get_input_embeddings().modules_to_save["default"], ours.lm_head.modules_to_save["default"]]
    assert copies[0].weight is copies[1].weight
    with torch.no_grad():
        copies[0].weight.mul_(2)
        theirs.get_input_embeddings().modules_to_save["default"].weight.mul_(2)
    for key, value in theirs.state_dict().items():
        if "lora_" in key:
            ours.state_dict()[key].copy_(value)
    torch.testing.assert_close(ours(X).logits, theirs(X).logits)
    assert set(ours.peft_config["default"].modules_to_save) <= {"embed_tokens", "model.embed_tokens"}
    expected = ours(X).logits
    ours.save_pretrained(tmp_path)
    loaded = pylora.PeftModel.from_pretrained(llama(True), tmp_path)
    torch.testing.assert_close(loaded(X).logits, expected)
    assert (
        loaded.get_input_embeddings().modules_to_save["default"].weight
        is loaded.lm_head.modules_to_save["default"].weight
    )
    loaded.load_adapter(tmp_path, "second")
    assert (
        loaded.get_input_embeddings().modules_to_save["second"].weight
        is loaded.lm_head.modules_to_save["second"].weight
    )
    torch.testing.assert_close(peft.PeftModel.from_pretrained(llama(True), tmp_path)(X).logits, expected)
    merged = ours.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    torch.testing.assert_close(merged(X).logits, expected)


@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens"], ["shared"]])
def test_every_module_with_the_weight_is_tied(modules: list[str]) -> None:
    tokens = torch.tensor([[1, 5, 2]])
    if modules != ["shared"]:
        model = wrapped(pylora, EncoderDecoder(), target_modules=["linear"], modules_to_save=modules)
        core = model.get_base_model().model
        wrappers = [core.shared, core.encoder.embed_tokens, core.decoder.embed_tokens, model.get_base_model().lm_head]
        copies = [wrapper.modules_to_save["default"] for wrapper in wrappers]
        assert len({id(each.weight) for each in copies}) == 1
        assert copies[3].bias is not None
        model(tokens)

        model = wrapped(pylora, EncoderDecoder(), target_modules=["linear", *modules])
        assert are_tied(model)
        core = model.get_base_model().model
        for name in ("lora_embedding_A", "lora_embedding_B"):
            held = [
                getattr(m, name)["default"] for m in (core.shared, core.encoder.embed_tokens, core.decoder.embed_tokens)
            ]
            assert held[0] is held[1]
            assert held[0] is held[2]
        model(tokens).sum().backward()


@pytest.mark.parametrize(
    ("tied", "kwargs", "message"),
    [
        (
            True,
            {"target_modules": ["lm_head"], "ensure_weight_tying": False},
            "`ensure_weight_tying` is not set to True",
        ),
        (True, {"target_modules": ["q_proj"]}, "no tied modules are added"),
        (True, {"target_modules": "all-linear"}, "no tied modules are added"),
        (False, {"target_modules": ["lm_head"]}, "no tied modules were found in the model"),
        (
            False,
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            "no tied modules were found in the model",
        ),
    ],
)
def test_warnings_as_in_peft(tied: bool, kwargs: dict[str, Any], message: str) -> None:
    structures = []
    for lib in (pylora, peft):
        with pytest.warns(UserWarning, match=message):
            structures.append(wrapped(lib, llama(tied), **kwargs).state_dict().keys())
    assert structures[0] == structures[1]


def test_a_failure_takes_back_the_configuration() -> None:
    config = pylora.LoraConfig(
        target_modules=["q_proj", "lm_head"], ensure_weight_tying=True, trainable_token_indices={"nowhere": [1]}
    )
    before = dict(vars(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="not found"):
            pylora.get_peft_model(llama(True), config)
    assert vars(config) == before

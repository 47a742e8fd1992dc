"""trainable_token_indices, beside PEFT where it gives the same."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import pylora
from pylora.layers.trainable_tokens import TrainableTokensLayer
from pylora.model.trainable_tokens import TrainableTokensWrapper
from tests.model.tiny_models import EncoderDecoder, llama

X = torch.tensor([[0, 1, 2, 3, 4, 3]])


def config(lib: Any = pylora, **kwargs: Any) -> Any:
    return lib.LoraConfig(
        **{"target_modules": ["q_proj"], "init_lora_weights": False, "trainable_token_indices": [1, 3, 7], **kwargs}
    )


def pair(tied: bool = False, **kwargs: Any) -> tuple[Any, Any]:
    """The same model and adapter in pylora and in PEFT."""
    models = []
    for lib in (pylora, peft):
        base = llama(tied)
        torch.manual_seed(1)
        models.append(lib.get_peft_model(base, config(lib, **kwargs)))
    return models[0], models[1]


def train_rows(model: Any, adapter: str = "default") -> None:
    rows = model.get_input_embeddings().token_adapter.trainable_tokens_delta[adapter]
    torch.manual_seed(3)
    rows.data = torch.rand_like(rows)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("indices", [[1, 3, 7], {"embed_tokens": [7, 3, 1]}, {"model.embed_tokens": [3]}])
def test_forward_state_and_training_as_in_peft(tied: bool, indices: Any) -> None:
    ours, theirs = pair(tied, trainable_token_indices=indices)
    for model in (ours, theirs):
        train_rows(model)
    torch.testing.assert_close(ours(X).logits, theirs(X).logits)
    state, expected = ours.state_dict(), theirs.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in state)
    trained = [{name for name, p in m.named_parameters() if p.requires_grad} for m in (ours, theirs)]
    assert trained[0] == trained[1]
    grads = []
    for model in (ours, theirs):
        model(X).logits.square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-5)
    mine = pylora.get_peft_model_state_dict(ours)
    assert mine.keys() == peft.get_peft_model_state_dict(theirs).keys()
    assert [key for key in mine if "token" in key] == [
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    ]
    assert isinstance(ours.base_model.model.lm_head, TrainableTokensWrapper) is tied
    assert ours.get_input_embeddings().original_module is ours.get_input_embeddings().token_adapter.base_layer
    torch.testing.assert_close(ours.get_input_embeddings().weight, theirs.get_input_embeddings().weight)


@pytest.mark.parametrize("tied", [False, True])
def test_files_go_both_ways(tmp_path: Path, tied: bool) -> None:
    ours, theirs = pair(tied)
    for model, name in ((ours, "ours"), (theirs, "theirs")):
        train_rows(model)
        model.save_pretrained(tmp_path / name)
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    for low_cpu in (False, True):
        loaded = pylora.PeftModel.from_pretrained(llama(tied), tmp_path / "theirs", low_cpu_mem_usage=low_cpu)
        torch.testing.assert_close(loaded(X).logits, theirs(X).logits)
        assert not any(p.requires_grad for p in loaded.parameters())
    read_back = peft.PeftModel.from_pretrained(llama(tied), tmp_path / "ours")
    torch.testing.assert_close(read_back(X).logits, theirs(X).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_merge_and_unmerge(tied: bool) -> None:
    model, _ = pair(tied)
    train_rows(model)
    before = llama(tied).state_dict()
    expected = model(X).logits
    model.merge_adapter()
    torch.testing.assert_close(model(X).logits, expected)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    model.unmerge_adapter()
    torch.testing.assert_close(model(X).logits, expected)
    embedding = model.get_input_embeddings().original_module
    assert torch.equal(embedding.weight, before["model.embed_tokens.weight"])
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(X).logits, llama(tied)(X).logits)
    torch.testing.assert_close(model(X).logits, expected)
    model.merge_adapter()
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(X).logits, expected)
    assert not any(isinstance(m, (TrainableTokensLayer, TrainableTokensWrapper)) for m in merged.modules())
    assert (merged.model.embed_tokens.weight is merged.lm_head.weight) is tied


def test_unload_leaves_the_base_model() -> None:
    model, _ = pair()
    train_rows(model)
    base = model.unload()
    assert torch.equal(base(X).logits, llama()(X).logits)
    assert base.state_dict().keys() == llama().state_dict().keys()


def test_several_adapters(tmp_path: Path) -> None:
    model = pylora.get_peft_model(llama(), config(trainable_token_indices=[1, 2]), adapter_name="a")
    train_rows(model, "a")
    only_a = model(X).logits
    model.add_adapter("b", config(trainable_token_indices=[2, 4]))
    model.add_adapter("none", config(trainable_token_indices=None))
    train_rows(model, "b")
    assert torch.equal(model(X).logits, only_a)
    rows = model.get_input_embeddings().token_adapter.trainable_tokens_delta
    assert (rows["a"].requires_grad, rows["b"].requires_grad) == (True, False)
    model.set_adapter("b")
    assert (rows["a"].requires_grad, rows["b"].requires_grad) == (False, True)
    assert model.get_input_embeddings().token_adapter.active_adapter == ["b"]
    only_b = model(X).logits
    model.set_adapter("none")
    only_none = model(X).logits
    embeddings = model.get_input_embeddings()
    assert torch.equal(embeddings(X), llama().get_input_embeddings()(X))

    model.eval()
    batch = X.expand(4, -1)
    mixed = model(batch, adapter_names=["a", "b", "none", "__base__"]).logits
    for row, expected in zip(mixed, (only_a, only_b, only_none, llama()(X).logits), strict=True):
        torch.testing.assert_close(row, expected[0])

    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="are already defined and would result in undefined merging behavior"):
        model.merge_adapter(["a", "b"])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.merge_adapter(["a"])
    with pytest.raises(ValueError, match=r"adapter b are already defined"):
        model.merge_adapter(["b"])
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("a")
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("b")
    torch.testing.assert_close(model(X).logits, only_b)
    model.delete_adapter("a")
    assert list(rows) == ["b"]
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("b")
    assert torch.equal(embeddings(X), llama().get_input_embeddings()(X))
    model.load_adapter(tmp_path / "b", "again")
    model.set_adapter("again")
    torch.testing.assert_close(model(X).logits, only_b)


def test_safe_merge_changes_nothing() -> None:
    model, _ = pair()
    model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"].data[0, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
            call(safe_merge=True)
    assert all(torch.equal(v, before[k]) or "delta" in k for k, v in model.state_dict().items())


def test_two_embeddings_scaled_and_narrow() -> None:
    class Scaled(nn.Embedding):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.register_buffer("embed_scale", torch.tensor(3.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.embed_scale

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text = Scaled(10, 4, padding_idx=2)
            self.image = nn.Embedding(6, 4, max_norm=1.0)
            self.lin = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lin(self.text(x) + self.image(x))

    for dtype in (torch.float32, torch.bfloat16):
        models = []
        for lib in (pylora, peft):
            torch.manual_seed(0)
            cfg = config(lib, target_modules=["lin"], trainable_token_indices={"text": [1, 2], "image": [0, 5]})
            model: Any = lib.get_peft_model(Net().to(dtype), cfg)
            for param in (model.text, model.image):
                param.token_adapter.trainable_tokens_delta["default"].data.mul_(2)
            models.append(model)
        x = torch.tensor([[0, 1, 2, 5, 4]], dtype=torch.int32)
        outputs = [model(x) for model in models]
        torch.testing.assert_close(outputs[0], outputs[1])
        for output in outputs:
            output.float().square().sum().backward()
        for name in ("text", "image"):
            ours, theirs = (getattr(m, name).token_adapter.trainable_tokens_delta["default"] for m in models)
            assert ours.dtype is torch.float32
            torch.testing.assert_close(
                ours.grad, theirs.grad, rtol=2e-2 if dtype is torch.bfloat16 else 1e-4, atol=1e-3
            )
        assert not models[0].text.token_adapter.trainable_tokens_delta["default"].grad[1].any()  # the padding row


def test_a_tied_output_layer_keeps_its_bias() -> None:
    model: Any = pylora.get_peft_model(
        EncoderDecoder(), config(target_modules=["linear"], trainable_token_indices={"shared": [1, 4]})
    )
    train_rows(model)
    rows = model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"]
    weight = EncoderDecoder().lm_head.weight.detach().clone()
    weight[[1, 4]] = rows.detach()
    hidden = torch.randn(3, 8)
    torch.testing.assert_close(
        model.lm_head(hidden), F.linear(hidden, weight, model.lm_head.token_adapter.base_layer.bias)
    )
    tokens = torch.tensor([[1, 2, 4]])
    for embedding in (
        model.model.model.encoder.embed_tokens,
        model.model.model.decoder.embed_tokens,
        model.model.model.shared,
    ):
        torch.testing.assert_close(embedding(tokens), F.embedding(tokens, weight))
    assert [k for k in pylora.get_peft_model_state_dict(model) if "token" in k] == [
        "base_model.model.model.shared.token_adapter.trainable_tokens_delta"
    ]


@pytest.mark.parametrize(
    ("indices", "ensure", "shared"),
    [
        ({"lm_head": [1, 2], "embed_tokens": [1, 2]}, False, True),
        ({"lm_head": [1, 2], "embed_tokens": [3]}, False, False),
        ({"lm_head": [1, 2], "embed_tokens": [1, 2]}, True, True),
        ([1, 2], True, True),
        ({"lm_head": [1, 2]}, False, None),
    ],
)
@pytest.mark.parametrize("keys", ["mapping", "list"])
def test_tying(indices: Any, ensure: bool, shared: bool | None, keys: str) -> None:
    def wrapped(lib: Any) -> Any:
        base = llama(tied=True)
        if keys == "list":
            base._tied_weights_keys = list(base._tied_weights_keys)
        cfg = config(lib, trainable_token_indices=indices, ensure_weight_tying=ensure)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return lib.get_peft_model(base, cfg)

    model, theirs = wrapped(pylora), wrapped(peft)
    assert set(model.state_dict()) == set(theirs.state_dict())
    if shared is None:
        return
    head, embedding = model.lm_head.token_adapter, model.model.model.embed_tokens.token_adapter
    assert (head.trainable_tokens_delta is embedding.trainable_tokens_delta) is shared
    model.add_adapter("other", config(trainable_token_indices=indices, ensure_weight_tying=ensure))
    if shared:
        assert head.token_indices["other"] == [1, 2]
    model.set_adapter("other")
    assert model.lm_head.active_adapters == ["other"]
    model.delete_adapter("default")
    assert "default" not in model.lm_head._adapters


def test_refusals_change_nothing() -> None:
    cases = [
        (False, {"trainable_token_indices": {"nowhere": [1]}}, ValueError, "not found in the base model"),
        (
            False,
            {"trainable_token_indices": {"embed_tokens": [1]}, "modules_to_save": ["embed_tokens"]},
            ValueError,
            "The embedding layer is already marked to be trained fully",
        ),
        (
            True,
            {"trainable_token_indices": {"lm_head": [1], "embed_tokens": [2]}, "ensure_weight_tying": True},
            ValueError,
            "Cannot ensure weight tying when different token indices are specified",
        ),
        (False, {"trainable_token_indices": [1000]}, IndexError, "expected numbers from 0 to 29"),
        (
            False,
            {"target_modules": ["embed_tokens"], "trainable_token_indices": [1]},
            TypeError,
            "trainable_token_indices cannot be applied to modules of type",
        ),
    ]
    for tied, kwargs, error, message in cases:
        base = llama(tied)
        structure, flags = str(base), [p.requires_grad for p in base.parameters()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(error, match=message):
                pylora.get_peft_model(base, config(**kwargs))
            if error is not IndexError:
                with pytest.raises(error):
                    peft.get_peft_model(llama(tied), config(peft, **kwargs))
        assert str(base) == structure
        assert [p.requires_grad for p in base.parameters()] == flags
        assert not hasattr(base, "peft_config")
    model, _ = pair()
    before = model.state_dict().keys()
    with pytest.raises(IndexError):
        model.add_adapter("other", config(trainable_token_indices=[1, 99]))
    assert model.state_dict().keys() == before
    assert model.get_input_embeddings()._adapters == {"default"}


def test_warns_when_there_is_nothing_to_tie() -> None:
    with pytest.warns(UserWarning, match="ensure_weight_tying=True but the model does not have tied weights"):
        pylora.get_peft_model(llama(), config(ensure_weight_tying=True))


@pytest.mark.parametrize("merge", [False, True])
def test_copies_and_status(merge: bool) -> None:
    model, theirs = pair(tied=True)
    train_rows(model)
    expected = model(X).logits
    if merge:
        model.merge_adapter()
        theirs.merge_adapter()
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(duplicate(X).logits, expected)
        if merge:
            duplicate.unmerge_adapter()
        torch.testing.assert_close(duplicate(X).logits, expected)
        adapter = duplicate.lm_head.token_adapter
        assert adapter.trainable_tokens_delta is duplicate.get_input_embeddings().token_adapter.trainable_tokens_delta
    ours = [vars(status) for status in model.get_layer_status()]
    peft_status = [vars(status) for status in theirs.get_layer_status()]
    assert ours == peft_status
    a, b = vars(model.get_model_status()), vars(theirs.get_model_status())
    assert a == b


def test_compiles_in_one_graph() -> None:
    model, _ = pair()
    train_rows(model)
    torch._dynamo.reset()
    compiled = torch.compile(model.get_input_embeddings(), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), model.get_input_embeddings()(X))

"""The GPT-J example: attention and feed-forward layers together with the token embedding."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from torch import nn

import pylora
from pylora.layers import Embedding, Linear

TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out", "wte"]


@pytest.fixture(scope="module")
def base() -> nn.Module:
    from transformers import GPTJConfig, GPTJForCausalLM

    torch.manual_seed(0)
    config = GPTJConfig(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_inner=48)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    return GPTJForCausalLM(config).eval()


def wrap(package, base, init: bool | str = True) -> nn.Module:
    torch.manual_seed(1)
    config = package.LoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS, bias="none", task_type="CAUSAL_LM", init_lora_weights=init
    )
    return package.get_peft_model(copy.deepcopy(base), config).eval()


def train(model: nn.Module, steps: int = 3) -> list[float]:
    ids = torch.arange(24).view(2, 12) % 50
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_layers(base) -> None:
    model = wrap(pylora, base)
    transformer = model.base_model.model.transformer
    assert type(transformer.wte) is Embedding
    for block in transformer.h:
        assert all(type(getattr(block.attn, name)) is Linear for name in TARGETS[:4])
        assert all(type(getattr(block.mlp, name)) is Linear for name in TARGETS[4:6])
    assert len(pylora.get_peft_model_state_dict(model)) == 2 * (2 * 6 + 1)


def test_training_runs_as_with_peft(base, tmp_path) -> None:
    ours, theirs = wrap(pylora, base), wrap(peft, base)
    losses = train(ours)
    assert losses == pytest.approx(train(theirs), rel=1e-4)
    assert losses[-1] < losses[0]
    state, their_state = pylora.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)
    assert list(state) == list(their_state)
    for key in state:
        torch.testing.assert_close(state[key], their_state[key], rtol=1e-3, atol=1e-4)
    ids = torch.arange(6).view(1, 6)
    wanted = ours(input_ids=ids).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT saves the embedding layers, as its "auto" finds one adapted
        for package, model in ((pylora, theirs), (peft, ours)):
            model.save_pretrained(tmp_path / package.__name__)
            loaded = package.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / package.__name__).eval()
            torch.testing.assert_close(loaded(input_ids=ids).logits, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_merge_and_generate(base) -> None:
    model = wrap(pylora, base, init=False)
    ids = torch.arange(6).view(1, 6)
    logits = model(input_ids=ids).logits
    generated = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=ids).logits, base(input_ids=ids).logits)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(merged.generate(input_ids=ids, max_new_tokens=5, do_sample=False), generated)
    assert merged.state_dict().keys() == base.state_dict().keys()


def test_mixed_batch(base) -> None:
    model = wrap(pylora, base, init=False)
    ids = torch.arange(12).view(2, 6)
    mixed = model(input_ids=ids, adapter_names=["__base__", "default"]).logits
    torch.testing.assert_close(mixed[0], base(input_ids=ids[:1]).logits[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[1], model(input_ids=ids[1:]).logits[0], rtol=1e-4, atol=1e-4)

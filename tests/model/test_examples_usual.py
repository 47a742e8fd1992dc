"""The examples that PEFT's documentation starts with, on tiny random models, beside the installed PEFT.

Each trains the same adapter in both libraries, saves it, loads it onto a fresh base and merges it.
"""

import peft
import pytest
import torch
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import pylora

IDS = torch.randint(2, 40, (4, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
STEPS = 4


def t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=40,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).eval()


def falcon():
    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32
    )
    return FalconForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0
    )
    return GPT2LMHeadModel(config).eval()


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config).eval()


EXAMPLES = {
    "t5": (t5, {"r": 8, "lora_alpha": 32, "target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}),
    "falcon": (falcon, {"r": 8, "target_modules": ["query_key_value"], "task_type": "CAUSAL_LM"}),
    "gpt2": (gpt2, {"r": 8, "target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}),
    "llama": (llama, {"r": 16, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
}


def train(library, make_base, fields):
    """(trained model, losses)"""
    base = make_base()
    torch.manual_seed(1)
    model = library.get_peft_model(base, library.LoraConfig(**fields)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model.eval(), losses


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK, labels=IDS).logits


@pytest.mark.parametrize("name", EXAMPLES)
def test_train_save_load_merge(name, tmp_path):
    make_base, fields = EXAMPLES[name]
    model, losses = train(pylora, make_base, fields)
    theirs, their_losses = train(peft, make_base, fields)
    assert losses == pytest.approx(their_losses, abs=1e-4)
    assert losses[-1] < losses[0]
    expected = logits(model)
    torch.testing.assert_close(expected, logits(theirs), rtol=0, atol=1e-4)
    assert not torch.allclose(expected, logits(make_base()), atol=1e-3)

    model.save_pretrained(tmp_path)
    for library in (pylora, peft):
        loaded = library.PeftModel.from_pretrained(make_base(), str(tmp_path))
        torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-4)
        merged = loaded.merge_and_unload()
        assert type(merged) is type(make_base())
        assert [key for key, _ in merged.named_parameters()] == [key for key, _ in make_base().named_parameters()]
        torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-4)

    tokens = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": MASK}
    assert torch.equal(model.generate(input_ids=IDS, **tokens), theirs.generate(input_ids=IDS, **tokens))


def test_t5_through_lora_model():
    """LoraModel is used by itself in the first example of PEFT's documentation."""
    config = pylora.LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=8, lora_alpha=32, target_modules=["q", "v"], lora_dropout=0.01
    )
    base = t5()
    lora_model = pylora.LoraModel(base, config, "default")
    assert lora_model.model is base
    torch.testing.assert_close(logits(lora_model), logits(t5()))  # B starts at zero
    lora_model.train()
    loss = lora_model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    trained = [n for n, p in lora_model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * (2 + 2 + 2)  # q and v, A and B: encoder, decoder and cross attention of two layers
    assert all(p.grad is not None for p in lora_model.parameters() if p.requires_grad)


def test_falcon_merged_model_is_saved_and_loaded_as_a_base_model(tmp_path):
    make_base, fields = EXAMPLES["falcon"]
    model, _ = train(pylora, make_base, fields)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    model = pylora.PeftModel.from_pretrained(make_base(), tmp_path / "adapter")
    merged = model.merge_and_unload(progressbar=False, safe_merge=True, adapter_names=["default"])
    merged.save_pretrained(tmp_path / "merged")
    loaded = FalconForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-4)


def test_gpt2_fan_in_fan_out_is_set_right_with_a_warning():
    config = pylora.LoraConfig(target_modules=["c_attn"], task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = pylora.get_peft_model(gpt2(), config)
    assert config.fan_in_fan_out is True
    layer = model.transformer.h[0].attn.c_attn
    assert layer.lora_A.default.weight.shape == (8, 16)
    assert layer.lora_B.default.weight.shape == (48, 8)


def test_llama_all_linear_leaves_the_output_layer_out():
    model = pylora.get_peft_model(llama(), pylora.LoraConfig(**EXAMPLES["llama"][1]))
    names = [status.name for status in model.get_layer_status()]
    assert len(names) == 2 * 7
    assert not any(name.endswith("lm_head") for name in names)
    trainable, total = model.get_nb_trainable_parameters()
    assert (trainable, total) == peft.get_peft_model(
        llama(), peft.LoraConfig(**EXAMPLES["llama"][1])
    ).get_nb_trainable_parameters()

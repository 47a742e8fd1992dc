"""The conversion: a real GGUF file of a tiny Llama in, an ordinary transformers folder out, once."""

from __future__ import annotations

import cache
import convert
import gguf
import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WIDTH, HIDDEN, LAYERS, HEADS = 32, 64, 2, 4


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    _write_tiny_llama(path)
    return path


def _write_tiny_llama(path):
    tokens = ["<|end|>", *gguf_bytes(), "th", "the"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(tokens) - 1))
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    random = numpy.random.default_rng(0)

    def add(name, *shape):
        writer.add_tensor(name, random.standard_normal(shape, dtype=numpy.float32))

    add("token_embd.weight", len(tokens), WIDTH)
    add("output_norm.weight", WIDTH)
    for block in (f"blk.{layer}" for layer in range(LAYERS)):
        for name in ("attn_norm", "ffn_norm"):
            add(f"{block}.{name}.weight", WIDTH)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"{block}.{name}.weight", WIDTH, WIDTH)
        for name in ("ffn_gate", "ffn_up"):
            add(f"{block}.{name}.weight", HIDDEN, WIDTH)
        add(f"{block}.ffn_down.weight", WIDTH, HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_bytes():
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def test_the_conversion_computes_what_the_gguf_file_does(gguf_file, tmp_path):
    stages = []
    folder = convert.convert(gguf_file, "0" * 64, tmp_path / "float32", stages.append)
    assert tuple(stages) == convert.STAGES
    assert (folder / "model.safetensors").is_file()

    converted = AutoModelForCausalLM.from_pretrained(folder)
    original = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    assert converted.dtype == torch.float32
    assert not hasattr(converted.config, "quantization_config")
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        torch.testing.assert_close(converted(tokens).logits, original(tokens).logits, rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(folder)("the")["input_ids"] == [258]


@pytest.fixture
def fake_writer(monkeypatch):
    class Writer:
        calls = 0
        fails = False

        def __call__(self, gguf_path, target, on_stage):
            self.calls += 1
            (target / "config.json").write_text("{}")
            if self.fails:
                raise OSError("No space left on device")
            (target / "model.safetensors").write_bytes(b"weights")

    writer = Writer()
    monkeypatch.setattr(convert, "_write_safetensors", writer)
    return writer


def run_conversion(tmp_path, gguf_sha256="0" * 64):
    return convert.convert(tmp_path / "unread.gguf", gguf_sha256, tmp_path / "float32", lambda stage: None)


def test_it_is_converted_once_and_then_reused(fake_writer, tmp_path):
    run_conversion(tmp_path)
    run_conversion(tmp_path)
    assert fake_writer.calls == 1


def test_a_truncated_conversion_is_made_again(fake_writer, tmp_path):
    (run_conversion(tmp_path) / "model.safetensors").write_bytes(b"weig")
    assert (run_conversion(tmp_path) / "model.safetensors").read_bytes() == b"weights"
    assert fake_writer.calls == 2


def test_a_conversion_of_another_file_does_not_count(fake_writer, tmp_path):
    run_conversion(tmp_path)
    run_conversion(tmp_path, gguf_sha256="1" * 64)
    assert fake_writer.calls == 2


def test_a_conversion_that_fails_half_way_leaves_nothing_and_is_made_again(fake_writer, tmp_path):
    fake_writer.fails = True
    with pytest.raises(OSError, match="No space left"):
        run_conversion(tmp_path)
    assert list(tmp_path.iterdir()) == []
    fake_writer.fails = False
    assert cache.flaw(run_conversion(tmp_path), convert.recipe_for("0" * 64)) is None

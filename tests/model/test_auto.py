"""AutoPeftModel classes on adapters and base models in local folders."""

import json

import pytest
import torch
import transformers
from transformers import BertConfig, LlamaConfig, T5Config

import pylora
from pylora.model.auto import check_import_allowlist, get_default_import_allowlist

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
# task -> (auto class, base class, its configuration, targets)
TASKS = {
    "CAUSAL_LM": ("ForCausalLM", "LlamaForCausalLM", LlamaConfig(**SIZES), ["q_proj"]),
    "SEQ_2_SEQ_LM": (
        "ForSeq2SeqLM",
        "T5ForConditionalGeneration",
        T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0),
        ["q"],
    ),
    "SEQ_CLS": ("ForSequenceClassification", "BertForSequenceClassification", BertConfig(**SIZES), ["query"]),
    "TOKEN_CLS": ("ForTokenClassification", "BertForTokenClassification", BertConfig(**SIZES), ["query"]),
    "QUESTION_ANS": ("ForQuestionAnswering", "BertForQuestionAnswering", BertConfig(**SIZES), ["query"]),
    "FEATURE_EXTRACTION": ("ForFeatureExtraction", "BertModel", BertConfig(**SIZES), ["query"]),
    None: ("", "BertModel", BertConfig(**SIZES), ["query"]),
}


def auto_class(task):
    return getattr(pylora, f"AutoPeftModel{TASKS[task][0]}")


def save(folder, task):
    """A base model in folder/base and an adapter for it in folder/adapter; returns the adapted model."""
    _, base_name, base_config, targets = TASKS[task]
    base = getattr(transformers, base_name)(base_config).eval()
    base.save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    base.config._name_or_path = str(folder / "base")
    config = pylora.LoraConfig(task_type=task, target_modules=targets, init_lora_weights=False)
    model = pylora.get_peft_model(base, config).eval()
    model.save_pretrained(folder / "adapter")
    return model


@pytest.mark.parametrize("task", TASKS)
def test_base_and_adapter_come_back(tmp_path, task):
    model = save(tmp_path, task)
    loaded = auto_class(task).from_pretrained(tmp_path / "adapter")
    assert type(loaded) is type(model)
    ids = torch.arange(6)[None]
    inputs = {"input_ids": ids, "decoder_input_ids": ids} if task == "SEQ_2_SEQ_LM" else {"input_ids": ids}
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs)[0], model(**inputs)[0])
    assert not any(param.requires_grad for param in loaded.parameters())


def test_arguments_reach_base_model_and_adapter(tmp_path):
    save(tmp_path, "CAUSAL_LM")
    loaded = pylora.AutoPeftModelForCausalLM.from_pretrained(
        str(tmp_path / "adapter"), adapter_name="mine", is_trainable=True, dtype=torch.bfloat16
    )
    assert loaded.get_base_model().dtype is torch.bfloat16
    assert loaded.active_adapter == "mine"
    assert any(param.requires_grad for param in loaded.parameters())


def test_a_configuration_may_be_given(tmp_path):
    save(tmp_path, "CAUSAL_LM")
    config = pylora.LoraConfig.from_pretrained(tmp_path / "adapter")
    config.lora_alpha = 80
    loaded = pylora.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", config=config)
    assert loaded.peft_config["default"].lora_alpha == 80


@pytest.mark.parametrize(("extra", "rows"), [(3, 43), (-5, 40)])
def test_embeddings_grow_to_the_tokenizer_and_never_shrink(tmp_path, extra, rows):
    from tokenizers import Tokenizer, models

    save(tmp_path, "CAUSAL_LM")
    vocabulary = {f"w{i}": i for i in range(40 + extra)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    )
    tokenizer.save_pretrained(tmp_path / "adapter")
    loaded = pylora.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert loaded.get_base_model().get_input_embeddings().weight.shape[0] == rows


def test_the_wrong_class_for_a_task(tmp_path):
    save(tmp_path, "CAUSAL_LM")
    with pytest.raises(ValueError, match="Expected target PEFT class: PeftModelForCausalLM"):
        pylora.AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"Cannot use `AutoPeftModel` with a task type.*'CAUSAL_LM'"):
        pylora.AutoPeftModel.from_pretrained(tmp_path / "adapter")


def edit_config(tmp_path, **fields):
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_package_outside_the_list_is_not_imported(tmp_path, monkeypatch):
    save(tmp_path, None)
    (tmp_path / "pylora_test_planted.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    edit_config(tmp_path, auto_mapping={"parent_library": "pylora_test_planted", "base_model_class": "Model"})
    with pytest.raises(ValueError, match=r"import_allowlist=\['pylora_test_planted'\]"):
        pylora.AutoPeftModel.from_pretrained(tmp_path / "adapter")


def test_a_package_can_be_allowed(tmp_path, monkeypatch):
    save(tmp_path, None)
    (tmp_path / "pylora_test_wanted.py").write_text("from transformers import BertModel as Model")
    monkeypatch.syspath_prepend(tmp_path)
    edit_config(tmp_path, auto_mapping={"parent_library": "pylora_test_wanted", "base_model_class": "Model"})
    loaded = pylora.AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=["pylora_test_wanted"])
    assert type(loaded.get_base_model()).__name__ == "BertModel"


def test_neither_task_nor_mapping(tmp_path):
    save(tmp_path, None)
    edit_config(tmp_path, auto_mapping=None)
    with pytest.raises(ValueError, match="Cannot infer the auto class from the config"):
        pylora.AutoPeftModel.from_pretrained(tmp_path / "adapter")


def test_they_are_not_instantiated():
    with pytest.raises(OSError, match=r"AutoPeftModelForCausalLM.from_pretrained"):
        pylora.AutoPeftModelForCausalLM()


def test_the_allow_list_matches_packages_and_what_is_in_them():
    allowed = get_default_import_allowlist()
    assert "transformers" in allowed
    assert check_import_allowlist(allowed, "transformers.models.bert")
    assert not check_import_allowlist(allowed, "transformers_evil")
    assert not check_import_allowlist(allowed, "")

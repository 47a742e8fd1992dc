"""The task classes on tiny transformers models, beside the installed PEFT's."""

import warnings

import peft
import pytest
import torch
import transformers
from transformers import BertConfig, LlamaConfig, T5Config

import pylora
from pylora.model import task_models

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
T5_SIZES = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
IDS = torch.randint(0, 40, (3, 7), generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([0, 1, 0])

# task -> (base class, its configuration, targets, arguments with labels)
TASKS = {
    "CAUSAL_LM": ("LlamaForCausalLM", LlamaConfig(**SIZES), None, {"labels": IDS}),
    "SEQ_2_SEQ_LM": (
        "T5ForConditionalGeneration",
        T5Config(**T5_SIZES, decoder_start_token_id=0),
        ["q", "v"],
        {"labels": IDS},
    ),
    "SEQ_CLS": ("BertForSequenceClassification", BertConfig(**SIZES), None, {"labels": CLASSES}),
    "TOKEN_CLS": ("BertForTokenClassification", BertConfig(**SIZES), ["query"], {"labels": IDS % 2}),
    "QUESTION_ANS": (
        "BertForQuestionAnswering",
        BertConfig(**SIZES),
        ["value"],
        {"start_positions": CLASSES, "end_positions": CLASSES + 2},
    ),
    "FEATURE_EXTRACTION": ("BertModel", BertConfig(**SIZES), ["key"], {}),
}
HEADS = {"SEQ_CLS": ["classifier", "score"], "TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}


def base_model(task):
    torch.manual_seed(0)
    name, config, *_ = TASKS[task]
    return getattr(transformers, name)(config).eval()


def make(library, task, **fields):
    config = library.LoraConfig(
        **{"r": 4, "task_type": task, "target_modules": TASKS[task][2], "init_lora_weights": False, **fields}
    )
    torch.manual_seed(1)
    return library.get_peft_model(base_model(task), config).eval()


def tensors_of(output):
    return {key: value for key, value in output.items() if torch.is_tensor(value)}


@pytest.fixture(params=TASKS)
def task(request):
    return request.param


def test_class_names_are_pefts(task):
    ours, theirs = make(pylora, task), make(peft, task)
    assert type(ours).__name__ == type(theirs).__name__
    assert type(ours) is task_models.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task]


def test_outputs_gradients_and_trained_parameters_are_pefts(task):
    results = []
    for library in (pylora, peft):
        model = make(library, task)
        output = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), task_ids=None, **TASKS[task][3])
        loss = output["loss"] if "loss" in output else output[0].square().mean()
        loss.backward()
        results.append((tensors_of(output), {n: p for n, p in model.named_parameters() if p.requires_grad}))
    (ours, our_parameters), (theirs, their_parameters) = results
    assert set(ours) == set(theirs)
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-5)
    assert list(our_parameters) == list(their_parameters)
    for name, parameter in our_parameters.items():
        torch.testing.assert_close(parameter.grad, their_parameters[name].grad, rtol=0, atol=1e-5)


def test_positional_arguments_have_pefts_order(task):
    model = make(pylora, task)
    mask = torch.ones_like(IDS)
    first = ("input_ids", "attention_mask")
    if task == "SEQ_2_SEQ_LM":
        expected = model(input_ids=IDS, attention_mask=mask, decoder_input_ids=IDS).logits
        assert torch.equal(model(IDS, mask, None, IDS).logits, expected)
    else:
        expected = model(**dict(zip(first, (IDS, mask), strict=True)))[0]
        assert torch.equal(model(IDS, mask)[0], expected)


def test_heads_are_trained_saved_and_loaded(task, tmp_path):
    model = make(pylora, task)
    assert (model.modules_to_save or set()) == set(HEADS.get(task, ()))
    assert model.peft_config["default"].modules_to_save == HEADS.get(task)
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" in n}
    assert bool(trained) == (task in HEADS)
    model.save_pretrained(tmp_path)
    expected = model(input_ids=IDS, **TASKS[task][3])
    for library in (pylora, peft):
        loaded = library.PeftModel.from_pretrained(base_model(task), str(tmp_path))
        assert type(loaded).__name__ == type(model).__name__
        for key, value in tensors_of(loaded(input_ids=IDS, **TASKS[task][3])).items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-4)
        # PEFT's lists grow by the heads' names with each load; these do not.
        if library is pylora:
            assert loaded.peft_config["default"].modules_to_save == HEADS.get(task)


def test_further_adapters_have_heads_too():
    model = make(pylora, "SEQ_CLS")
    config = pylora.LoraConfig(target_modules=["query"], modules_to_save=["pooler.dense"])
    model.add_adapter("other", config)
    assert config.modules_to_save == ["pooler.dense", "classifier", "score"]
    model.set_adapter("other")
    assert any(
        p.requires_grad for n, p in model.named_parameters() if n.endswith("classifier.modules_to_save.other.bias")
    )


def test_the_callers_list_is_not_changed():
    names = ["pooler"]
    make(pylora, "SEQ_CLS", modules_to_save=names)
    assert names == ["pooler"]


def test_heads_leave_the_configuration_when_wrapping_fails():
    config = pylora.LoraConfig(task_type="SEQ_CLS", target_modules=["nothing"], modules_to_save=["pooler"])
    with pytest.raises(ValueError):
        pylora.get_peft_model(base_model("SEQ_CLS"), config)
    assert config.modules_to_save == ["pooler"]
    model = make(pylora, "SEQ_CLS")
    with pytest.raises(ValueError):
        model.add_adapter("other", config)
    assert config.modules_to_save == ["pooler"]


@pytest.mark.parametrize("task", ["TOKEN_CLS", "QUESTION_ANS"])
def test_heads_get_no_adapter_of_their_own(task):
    """PEFT adapts the head first and then fails to train it whole."""
    model = make(pylora, task, target_modules="all-linear")
    head = getattr(model.get_base_model(), HEADS[task][0])
    assert type(head).__name__ == "ModulesToSaveWrapper"
    assert type(head.original_module) is torch.nn.Linear


def test_question_answering_passes_token_types_on():
    """PEFT's forward names token_type_ids and position_ids and drops both."""
    model = make(pylora, "QUESTION_ANS")
    expected = model.base_model(input_ids=IDS, token_type_ids=IDS % 2).start_logits
    assert torch.equal(model(input_ids=IDS, token_type_ids=IDS % 2).start_logits, expected)
    assert not torch.allclose(model(input_ids=IDS).start_logits, expected)


@pytest.mark.parametrize("return_dict", [None, False])
def test_return_dict(return_dict):
    output = make(pylora, "SEQ_CLS")(input_ids=IDS, return_dict=return_dict)
    assert isinstance(output, tuple) == (return_dict is False)


class TestGeneration:
    @pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
    @pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
    def test_same_tokens_as_peft(self, task, arguments):
        arguments = {
            "input_ids": IDS,
            "attention_mask": torch.ones_like(IDS),
            "max_new_tokens": 5,
            "do_sample": False,
            "pad_token_id": 0,
            **arguments,
        }
        ours, theirs = (make(library, task).generate(**arguments) for library in (pylora, peft))
        assert torch.equal(ours, theirs)
        with make(pylora, task).disable_adapter():
            pass

    def test_positional_arguments(self):
        model = make(pylora, "CAUSAL_LM")
        arguments = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(IDS, **arguments), model.generate(input_ids=IDS, **arguments))
        with pytest.raises(TypeError):
            make(pylora, "SEQ_2_SEQ_LM").generate(IDS)

    def test_adapters_by_row(self):
        model = make(pylora, "CAUSAL_LM")
        torch.manual_seed(3)
        model.add_adapter("other", pylora.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
        arguments = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        expected = {}
        for name in ("default", "other"):
            model.set_adapter(name)
            expected[name] = model.generate(input_ids=IDS, **arguments)
        with model.disable_adapter():
            expected["__base__"] = model.generate(input_ids=IDS, **arguments)
        names = ["other", "__base__", "default"]
        mixed = model.generate(input_ids=IDS, adapter_names=names, **arguments)
        for row, name in enumerate(names):
            assert torch.equal(mixed[row], expected[name][row])

    def test_inputs_are_prepared_by_the_base_model(self):
        model = make(pylora, "CAUSAL_LM")
        arguments = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "cache_position": torch.arange(7)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inputs = model.prepare_inputs_for_generation(**arguments)
            base = model.base_model_prepare_inputs_for_generation(**arguments)
        assert "cache_position" not in inputs
        assert set(base) - {"cache_position"} == set(inputs)

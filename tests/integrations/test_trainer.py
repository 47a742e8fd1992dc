"""A pylora model under transformers' Trainer, accelerate and TRL's SFTTrainer."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pylora
from pylora.testing.llama import tiny_llama

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # until its v6
LENGTH = 8


def adapted(**settings: Any) -> pylora.PeftModel:
    torch.manual_seed(0)
    settings = {"r": 4, "lora_dropout": 0.1, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    return pylora.get_peft_model(tiny_llama(layers=1, width=64), pylora.LoraConfig(**settings))


def texts(count: int = 16) -> list[dict[str, Any]]:
    ids = torch.randint(0, 100, (count, LENGTH), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row, "not_an_argument": 1} for row in ids]


def trainer(model: Any, folder: Path, cls: Any = transformers.Trainer, **settings: Any) -> Any:
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 6,
        "save_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    arguments = transformers.TrainingArguments(**(options | settings))
    return cls(model, arguments, train_dataset=texts(), eval_dataset=texts(4))


def losses(run: Any) -> list[float]:
    return [float(entry["loss"]) for entry in run.state.log_history if "loss" in entry]


class TestTrainer:
    """With PEFT installed: transformers' own Trainer."""

    @pytest.fixture(autouse=True)
    def _peft(self) -> None:
        pytest.importorskip("peft")

    @pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
    def test_checkpoints_hold_adapters_and_are_resumed(self, tmp_path, settings):
        model = adapted(**settings)
        base = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.detach().clone()
        first = trainer(model, tmp_path)
        first.train()
        assert losses(first)[-1] < losses(first)[0]
        folder = tmp_path / "checkpoint-3"
        files = {path.name for path in folder.iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= files
        assert not {"model.safetensors", "pytorch_model.bin"} & files

        second = trainer(adapted(**settings), tmp_path / "second")
        second.train(resume_from_checkpoint=str(folder))
        assert losses(second) == losses(first)
        expected = model.state_dict()
        for name, tensor in second.model.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
        q_proj = model.base_model.model.model.layers[0].self_attn.q_proj
        assert torch.equal(q_proj.base_layer.weight, base)

        torch.manual_seed(0)
        loaded = pylora.PeftModel.from_pretrained(tiny_llama(layers=1, width=64), tmp_path / "checkpoint-6").eval()
        ids = texts(1)[0]["input_ids"][None]
        torch.testing.assert_close(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)

    def test_evaluation_and_the_best_checkpoint(self, tmp_path):
        run = trainer(adapted(), tmp_path, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True)
        run.train()
        assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-6")
        assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric, rel=1e-5)
        output = run.predict(texts(4))
        assert output.predictions.shape[:2] == output.label_ids.shape == (4, LENGTH)

    def test_labels_and_columns_are_found(self, tmp_path):
        run = trainer(adapted(), tmp_path)
        assert run.label_names == ["labels"]
        run._set_signature_columns_if_needed()
        assert "input_ids" in run._signature_columns
        assert "not_an_argument" not in run._signature_columns
        assert run.model_accepts_loss_kwargs == trainer(tiny_llama(1, 64), tmp_path).model_accepts_loss_kwargs

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing_gives_the_same_losses(self, tmp_path, reentrant):
        plain = trainer(adapted(), tmp_path, save_strategy="no")
        plain.train()
        settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        checkpointed = trainer(adapted(), tmp_path, save_strategy="no", **settings)
        checkpointed.train()
        assert losses(checkpointed) == pytest.approx(losses(plain), rel=1e-5)

    def test_bf16_autocast(self, tmp_path):
        plain = trainer(adapted(), tmp_path, save_strategy="no")
        plain.train()
        autocast = trainer(adapted(), tmp_path, save_strategy="no", bf16=True)
        autocast.train()
        assert losses(autocast) == pytest.approx(losses(plain), rel=2e-2)
        assert losses(autocast) != losses(plain)
        trained = [p for p in autocast.model.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {torch.float32}

    @pytest.mark.slow
    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    @pytest.mark.parametrize("variant", [{}, {"use_dora": True}])
    def test_compiled(self, tmp_path, backend, variant):
        torch._dynamo.reset()
        plain = trainer(adapted(lora_dropout=0.0, **variant), tmp_path)
        plain.train()
        settings = {"torch_compile": True, "torch_compile_backend": backend}
        compiled = trainer(adapted(lora_dropout=0.0, **variant), tmp_path / "compiled", **settings)
        compiled.train()
        assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
        files = {path.name for path in (tmp_path / "compiled" / "checkpoint-6").iterdir()}
        assert "adapter_model.safetensors" in files
        assert "model.safetensors" not in files
        torch._dynamo.reset()

    def test_several_adapters_are_saved_and_the_active_one_resumed(self, tmp_path):
        def two() -> pylora.PeftModel:
            model = adapted(target_modules=["q_proj"])
            model.add_adapter("other", pylora.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
            return model

        model = two()
        trainer(model, tmp_path).train()
        assert (tmp_path / "checkpoint-6" / "other" / "adapter_model.safetensors").exists()
        again = trainer(two(), tmp_path / "again", max_steps=7)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
        assert again.model.active_adapters == ["default"]
        expected = model.state_dict()
        for name, tensor in again.model.state_dict().items():
            if "other" in name:
                assert torch.equal(tensor, expected[name]), name


def test_accelerate():
    pytest.importorskip("peft")
    accelerate = pytest.importorskip("accelerate")
    from accelerate.utils import is_peft_model

    accelerator = accelerate.Accelerator(cpu=True)
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    assert is_peft_model(prepared)
    assert accelerator.unwrap_model(prepared) is model
    batch = torch.stack([text["input_ids"] for text in texts(4)])
    found = []
    for _ in range(4):
        loss = prepared(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    assert found[-1] < found[0]


def run_python(code: str) -> str:
    tests = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {tests!r})\n" + textwrap.dedent(code)
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_adapter_trainer_without_peft(tmp_path):
    """PEFT hidden from a fresh interpreter: adapters alone are saved, and training goes on from them."""
    output = run_python(f"""
        import pathlib
        sys.modules["peft"] = None
        import pytest, torch, pylora
        from transformers.utils import is_peft_available
        from test_trainer import adapted, losses, texts, trainer
        from pylora.integrations.trainer import AdapterTrainer
        from pylora.testing.llama import tiny_llama
        assert not is_peft_available()
        folder = pathlib.Path({str(tmp_path)!r})
        settings = dict(cls=AdapterTrainer, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True)
        model = adapted(modules_to_save=["lm_head"])
        first = trainer(model, folder, **settings)
        assert first.label_names == ["labels"]
        first.train()
        files = {{path.name for path in (folder / "checkpoint-3").iterdir()}}
        assert {{"adapter_config.json", "adapter_model.safetensors"}} <= files, files
        from safetensors import safe_open
        with safe_open(folder / "checkpoint-3" / "model.safetensors", "pt") as file:
            names = set(file.keys())
        assert all("lora_" in name or "modules_to_save" in name for name in names), names
        second = trainer(adapted(modules_to_save=["lm_head"]), folder / "second", **settings)
        second.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
        assert losses(second) == losses(first)
        expected = model.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in second.model.state_dict().items())
        torch.manual_seed(0)
        loaded = pylora.PeftModel.from_pretrained(tiny_llama(layers=1, width=64), folder / "checkpoint-6").eval()
        ids = texts(1)[0]["input_ids"][None]
        assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
        print("done")
    """)
    assert output.splitlines()[-1] == "done"


def test_adapter_trainer_with_peft_writes_what_trainer_does(tmp_path):
    pytest.importorskip("peft")
    from pylora.integrations.trainer import AdapterTrainer

    trainer(adapted(), tmp_path, AdapterTrainer).train()
    files = {path.name for path in (tmp_path / "checkpoint-6").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files


def test_adapter_trainer_leaves_other_models_alone(tmp_path):
    from pylora.integrations.trainer import AdapterTrainer

    trainer(tiny_llama(1, 64), tmp_path, AdapterTrainer).train()
    assert (tmp_path / "checkpoint-6" / "model.safetensors").exists()


class TestIsInstance:
    """What `isinstance` and `__class__` answer, and that nothing else notices."""

    @pytest.fixture(autouse=True)
    def _peft(self) -> None:
        self.peft = pytest.importorskip("peft")

    def test_it_is_of_both_classes(self):
        model = adapted()
        assert isinstance(model, self.peft.PeftModelForCausalLM)
        assert isinstance(model, pylora.PeftModelForCausalLM)
        assert not isinstance(model, self.peft.PeftModelForSeq2SeqLM)
        assert type(model) is pylora.PeftModelForCausalLM
        assert not issubclass(type(model), self.peft.PeftModel)
        assert (model.__class__.__name__, model.__class__.__module__) == (type(model).__name__, type(model).__module__)
        assert model.__class__.forward is type(model).forward
        assert inspect.signature(model.__class__.forward) == inspect.signature(type(model).forward)
        assert isinstance(
            pylora.get_peft_model(nn.Sequential(nn.Linear(2, 2)), pylora.LoraConfig(target_modules=["0"])),
            self.peft.PeftModel,
        )
        assert not isinstance(model.base_model, self.peft.PeftModel)

    def test_classes_of_users(self):
        class Mine(pylora.PeftModel):
            pass

        model = Mine(nn.Sequential(nn.Linear(2, 2)), pylora.LoraConfig(target_modules=["0"]))
        assert isinstance(model, self.peft.PeftModel)
        assert isinstance(model, Mine)
        assert model.__class__.__name__ == "Mine"

    def test_layers_are_tuner_layers_once_the_model_has_been_asked(self):
        model = adapted()
        assert isinstance(model, self.peft.PeftModel)
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        assert isinstance(layer, self.peft.tuners.tuners_utils.BaseTunerLayer)
        assert not isinstance(model.base_model.model.lm_head, self.peft.tuners.tuners_utils.BaseTunerLayer)

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_pickles(self, protocol):
        model = adapted()
        twin = pickle.loads(pickle.dumps(model, protocol))
        assert type(twin) is type(model)
        expected = model.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in twin.state_dict().items())

    @pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy])
    def test_copies(self, copier):
        model = adapted()
        twin = copier(model)
        assert type(twin) is type(model)
        assert (twin.base_model is model.base_model) == (copier is copy.copy)

    def test_the_class_can_be_assigned(self):
        """As torch's fully_shard does."""
        model = adapted().eval()
        ids = texts(1)[0]["input_ids"][None]
        expected = model(input_ids=ids).logits
        sharded = type("Sharded", (model.__class__,), {})
        model.__class__ = sharded
        assert type(model) is model.__class__ is sharded
        assert isinstance(model, self.peft.PeftModel)
        assert torch.equal(model(input_ids=ids).logits, expected)

    def test_peft_is_not_imported(self):
        output = run_python("""
            import torch, pylora
            model = pylora.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)),
                                          pylora.LoraConfig(target_modules=["0"]))
            assert model.__class__ is type(model)
            assert isinstance(model, pylora.PeftModel)
            print("peft" in sys.modules)
            import peft
            print(isinstance(model, peft.PeftModel))
        """)
        assert output.split() == ["False", "True"]


class TestSft:
    @pytest.fixture(autouse=True)
    def _trl(self, tmp_path) -> None:
        self.trl = pytest.importorskip("trl")
        self.peft = pytest.importorskip("peft")
        self.folder = tmp_path

    def trained(self, model: Any, **settings: Any) -> Any:
        from datasets import Dataset
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        tokenizer = Tokenizer(models.WordLevel({"<end>": 0, "<unk>": 1}, unk_token="<unk>"))
        arguments = self.trl.SFTConfig(
            output_dir=str(self.folder),
            max_steps=6,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        )
        run = self.trl.SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list([{"input_ids": text["input_ids"].tolist()} for text in texts(4)]),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>"),
            **settings,
        )
        run.train()
        run.save_model(str(self.folder / "end"))
        assert losses(run)[-1] < losses(run)[0]
        assert (self.folder / "end" / "adapter_model.safetensors").exists()
        assert not (self.folder / "end" / "model.safetensors").exists()
        return run

    def test_a_pylora_model(self):
        run = self.trained(adapted(lora_dropout=0.0))
        assert type(run.model) is pylora.PeftModelForCausalLM

    def test_trl_makes_the_model_and_pylora_computes(self, monkeypatch):
        from pylora.integrations.patch_peft import forward as patched

        config = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        calls = []
        original = patched.dense_forward
        monkeypatch.setattr(patched, "dense_forward", lambda *args: calls.append(original(*args)) or calls[-1])
        expected = losses(self.trained(tiny_llama(1, 64), peft_config=self.peft.LoraConfig(**config)))
        assert calls == []
        pylora.patch_peft()
        try:
            found = losses(self.trained(tiny_llama(1, 64), peft_config=self.peft.LoraConfig(**config)))
        finally:
            pylora.unpatch_peft()
        assert len(calls) > 0
        assert all(result is not None for result in calls)
        assert found == pytest.approx(expected, rel=1e-3)

    def test_an_adapted_output_layer_is_refused_as_for_peft(self):
        model = adapted(target_modules=["lm_head"], lora_dropout=0.0)
        with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
            self.trained(model)

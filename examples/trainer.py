"""Train a pylora model with transformers' Trainer: adapters in the checkpoints, resumed, evaluated, loaded.

python examples/trainer.py [--steps 200]

The model is a small random Llama that learns to repeat what it has read, so nothing is downloaded. With PEFT installed,
transformers' own Trainer saves adapters; `AdapterTrainer` is a Trainer that does so without it as well.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import pylora
from pylora.integrations.trainer import AdapterTrainer

WORDS = 12
HALF = 6  # tokens of a text before it repeats


def make_base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


def make_model() -> pylora.PeftModel:
    config = pylora.LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.05,
        target_modules="all-linear",
        modules_to_save=["embed_tokens", "lm_head"],
        task_type="CAUSAL_LM",
    )
    return pylora.get_peft_model(make_base(), config)


def make_texts(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Texts whose second half is their first; the loss is that of the second."""
    generator = torch.Generator().manual_seed(seed)
    halves = torch.randint(0, WORDS, (count, HALF), generator=generator)
    texts = torch.cat([halves, halves], dim=1)
    labels = texts.clone()
    labels[:, :HALF] = -100
    return [{"input_ids": text, "labels": label} for text, label in zip(texts, labels, strict=True)]


def make_trainer(folder: Path, steps: int, **settings: Any) -> AdapterTrainer:
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 16,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "save_strategy": "steps",
        "save_steps": max(1, steps // 2),
        "eval_strategy": "steps",
        "eval_steps": max(1, steps // 2),
        "logging_steps": 10,
        "gradient_checkpointing": True,
        "bf16": True,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    arguments = TrainingArguments(**(options | settings))
    return AdapterTrainer(make_model(), arguments, train_dataset=make_texts(512, 0), eval_dataset=make_texts(64, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a pylora model with transformers' Trainer.")
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trainer = make_trainer(folder, arguments.steps)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        print(f"loss on texts it has not seen: {float(before):.3f} -> {float(trainer.evaluate()['eval_loss']):.3f}")

        halfway, last = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        print("a checkpoint:", ", ".join(sorted(path.name for path in halfway.iterdir())))
        resumed = make_trainer(folder / "resumed", arguments.steps)
        resumed.train(resume_from_checkpoint=str(halfway))
        print(f"resumed from half of the steps: {float(resumed.evaluate()['eval_loss']):.3f}")

        loaded = pylora.PeftModel.from_pretrained(make_base(), last).eval()
        text = make_texts(1, 2)[0]["input_ids"][None]
        with torch.no_grad():
            guesses = loaded(input_ids=text).logits[0, HALF - 1 : -1].argmax(1)
        print(f"loaded: repeats {text[0, HALF:].tolist()} as {guesses.tolist()}")


if __name__ == "__main__":
    main()

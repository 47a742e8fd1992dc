"""Supervised fine-tuning by TRL's SFTTrainer, with pylora's kernels, in either of two ways.

python examples/trl_sft.py [--steps 40]             # the trainer gets a pylora model
python examples/trl_sft.py --let-trl-wrap           # the trainer makes PEFT's model itself, under patch_peft

The model is a small random Llama with a tokenizer of single bytes, so nothing is downloaded. It learns a few sentences.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import pylora

SENTENCES = ["a rank of four", "the base stays frozen", "two factors, one update", "merge, then serve"]
SETTINGS: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and one for the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|end|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def make_base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def make_trainer(folder: Path, steps: int, let_trl_wrap: bool) -> SFTTrainer:
    config = None
    model: Any = make_base()
    if let_trl_wrap:
        import peft

        pylora.patch_peft()
        config = peft.LoraConfig(**SETTINGS)
    else:
        model = pylora.get_peft_model(model, pylora.LoraConfig(**SETTINGS))
    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=max(1, steps // 4),
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    data = Dataset.from_dict({"text": SENTENCES})
    return SFTTrainer(
        model=model, args=arguments, train_dataset=data, processing_class=make_tokenizer(), peft_config=config
    )


def train(folder: Path, steps: int = 40, let_trl_wrap: bool = False) -> list[float]:
    """Train, save the adapter into `folder`, and return the losses that were logged."""
    trainer = make_trainer(folder, steps, let_trl_wrap)
    trainer.train()
    trainer.save_model(str(folder))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune with TRL and pylora.")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--let-trl-wrap", action="store_true", help="pass peft_config, and patch PEFT")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        losses = train(folder, arguments.steps, arguments.let_trl_wrap)
        print(f"loss {float(losses[0]):.3f} -> {float(losses[-1]):.3f}")
        print("saved:", ", ".join(sorted(path.name for path in folder.iterdir() if path.is_file())))
        model = pylora.PeftModel.from_pretrained(make_base(), folder).eval()
        tokenizer = make_tokenizer()
        prompt = tokenizer("the base", return_tensors="pt").input_ids
        answer = model.generate(input_ids=prompt, max_new_tokens=20, do_sample=False)
        print("written:", tokenizer.decode(answer[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()

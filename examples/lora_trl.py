"""LoRA with TRL's SFTTrainer: adapters first, then prac, then the trainer.

    python examples/lora_trl.py --model HuggingFaceTB/SmolLM2-135M --data trl-lib/Capybara
    python examples/lora_trl.py --model Qwen/Qwen3-4B --data chats.jsonl --preset small --seq-len 8192 --batch-size 1

With frozen weights a linear layer keeps nothing for its own gradient; what fills the memory are the inputs of the
adapters, norms, activations and attention, and those are what prac compresses. Logits are the SFTTrainer's business: it
computes its loss without them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import prac


def main(argv: Sequence[str] | None = None) -> float:
    """Returns the mean training loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or a hub name")
    parser.add_argument("--data", required=True, help="as SFTTrainer takes it: a hub data set, or a file of JSON lines")
    parser.add_argument("--preset", default="lean", choices=("lean", "small"))
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", default="runs/lora", help="the adapters go here")
    arguments = parser.parse_args(argv)

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    # lora_dropout=0: with dropout each adapter reads an input of its own, and keeps it.
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"))
    handle = prac.compress(model, arguments.preset)

    local = Path(arguments.data).is_file()
    data = load_dataset(*(("json",) if local else (arguments.data,)), split="train",
                        **({"data_files": arguments.data} if local else {}))  # fmt: skip
    trainer = SFTTrainer(
        model,
        SFTConfig(
            arguments.out,
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            max_length=arguments.seq_len,
            gradient_checkpointing=False,  # on by default; prac keeps the activations, in few bits
            learning_rate=2e-4,
            bf16=dtype == torch.bfloat16,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
    )
    found = trainer.train()
    print(handle.summary())  # after a step it knows what every layer keeps
    trainer.save_model()
    return found.training_loss


if __name__ == "__main__":
    main()

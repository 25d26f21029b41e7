"""Fine-tune a causal language model with the Trainer of transformers in the memory that there is.

    python examples/trainer.py --model HuggingFaceTB/SmolLM2-135M --data roneneldan/TinyStories
    python examples/trainer.py --model Qwen/Qwen3-0.6B --data notes.jsonl --budget 16GiB --batch-size 8 --seq-len 2048

``--data`` is a hub data set or a file of JSON lines with a field "text". With ``--budget`` the mildest way that fits is
taken; without it, ``lean``, and the loss is computed without logits.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import prac
from prac.integrations.transformers import PracCallback


def blocks(data: str, tokenizer, seq_len: int) -> Dataset:
    """The texts, one after the other, cut into blocks of ``seq_len`` tokens."""
    local = Path(data).is_file()
    texts = load_dataset("json", data_files=data, split="train") if local else load_dataset(data, split="train")

    def packed(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = [i for row in tokenizer(rows["text"])["input_ids"] for i in [*row, tokenizer.eos_token_id]]
        cut = [ids[i : i + seq_len] for i in range(0, len(ids) - seq_len + 1, seq_len)]
        return {"input_ids": cut, "labels": cut}

    return texts.map(packed, batched=True, remove_columns=texts.column_names)


def main(argv: Sequence[str] | None = None) -> float:
    """Returns the mean training loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or a hub name")
    parser.add_argument("--data", required=True, help="a hub data set, or a file of JSON lines")
    parser.add_argument("--budget", help="memory of a step, such as 22GiB")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", default="runs/trainer", help="the model and its checkpoints go here")
    arguments = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    data = blocks(arguments.data, tokenizer, arguments.seq_len)

    if arguments.budget:
        ids = torch.empty(arguments.batch_size, arguments.seq_len, dtype=torch.long)  # only its shape matters
        how = {"autocast": torch.bfloat16, "check": False}  # it is on the CPU until the Trainer takes it
        handle = prac.compress(model, budget=arguments.budget, batch={"input_ids": ids, "labels": ids}, **how)
    else:
        handle = prac.compress(model, loss="chunked")
    print(handle.summary())

    trainer = Trainer(
        model,
        TrainingArguments(
            arguments.out,
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=2e-5,
            bf16=torch.cuda.is_available(),
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=data,
    )
    trainer.add_callback(PracCallback(handle, trainer))  # what is lost, layer by layer; and exact resumption
    found = trainer.train()
    trainer.save_model()  # the state_dict is the model's own: nothing of prac is in it
    return found.training_loss


if __name__ == "__main__":
    main()

"""A LLaMA trained on text, method by method: the same tokens in the same order, the loss on text that none has seen.

Tokens come from a file (`--tokens`, .npy or .pt), or are the bytes of the sources of Python's standard library: text
that is everywhere. AdamW with warm-up and a cosine, gradients clipped at 1.
"""

from __future__ import annotations

import functools
import hashlib
import math
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rows import AS_TORCH_CHOOSES, FLASH, Row, attention
from shapes import Model, Training
from torch import Tensor

import prac
from prac import Config
from prac.lab.measured.meters import synchronize

TOY_BYTES = 100_000
WARM = 6  # steps before the clock starts


def setting_of(shape: Model, training: Training, toy: bool, flash: bool, tokens: str | None) -> Row:
    """What all rows of one model and one text have in common.

    Raises:
        ValueError: if the text is too short, or none.
    """
    text = read(**source(tokens, toy))
    check(text, training.batch.sequence_length, training.validation_sequences + training.batch.sequences, tokens)
    about = {
        "text": Path(tokens).name if tokens else "sources of the standard library, bytes",
        "tokens": text.numel(),
        "sha256": hashlib.sha256(text.numpy().tobytes()).hexdigest()[:16],
    }
    vocabulary = 64 * math.ceil((int(text.max()) + 1) / 64) if tokens else 256
    return asdict(shape) | asdict(training) | {"vocab_size": vocabulary} | about | {
        "autocast": "bf16" if training.autocast and not toy else None,
        "attention": FLASH if flash else AS_TORCH_CHOOSES,
    }  # fmt: skip


def kept(config: Config | None) -> Row:
    """What a row's setting says of a config, so that it is measured again when a preset has changed."""
    return {"config": None if config is None else config.to_dict()}


def source(tokens: str | None, toy: bool) -> Row:
    """Where the text is from, as rows' functions take it."""
    return {"tokens": tokens, "limit": TOY_BYTES if toy else None}


@functools.lru_cache(maxsize=1)  # every stage and size is planned on the same text
def read(tokens: str | None, limit: int | None = None) -> Tensor:
    """Tokens of a file, or the bytes of the standard library's sources; of those no more than ``limit``.

    Raises:
        ValueError: if the file has no whole numbers from 0.
    """
    if tokens is None:
        return _standard_library(limit)
    if tokens.endswith(".npy"):
        import numpy

        text = torch.from_numpy(numpy.load(tokens).astype("int64"))
    elif tokens.endswith(".pt"):
        text = torch.load(tokens, weights_only=True)
    else:
        raise ValueError(f"--tokens {tokens}: give a .npy file or a .pt file of whole numbers.")
    if not isinstance(text, Tensor) or text.is_floating_point() or not text.numel() or text.min() < 0:
        raise ValueError(f"--tokens {tokens} holds no whole numbers from 0: save the ids of tokens, one after another.")
    return text.flatten().to(torch.int32)


def _standard_library(limit: int | None) -> Tensor:
    """Without its tests and without what others have installed, in the order of the names."""
    folder, text = Path(sysconfig.get_path("stdlib")), bytearray()
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    for path in sorted(folder.rglob("*.py")):
        if not skipped & set(path.relative_to(folder).parts):
            text += path.read_bytes()
        if limit and len(text) >= limit:
            break
    return torch.tensor(text[:limit], dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)


def check(text: Tensor, length: int, sequences: int, path: str | None) -> None:
    """Refuse a text that is too short.

    Raises:
        ValueError: if it has no more than so many sequences.
    """
    if text.numel() // length <= sequences:
        raise ValueError(
            f"{path or 'the standard library'} has {text.numel():,} tokens, and {sequences} sequences of {length} are "
            "not enough to train on: give --tokens a longer text."
        )


def train(
    setting: Row,
    device: str,
    config: Config | None,
    tokens: str | None,
    limit: int | None,
    *,
    optimizer_of: Callable[[Any], torch.optim.Optimizer] | None = None,
    more: Callable[[Any, Tensor], Row] | None = None,
) -> Iterator[Row]:
    """A row, at each loss on unseen text.

    Args:
        setting: of :func:`setting_of`, and a seed.
        device: where to.
        config: what is compressed; None for plain training.
        tokens: as of :func:`read`.
        limit: likewise.
        optimizer_of: makes the optimizer of a model; AdamW by default.
        more: what else a row is to say at each of these, of the model and a batch.
    """
    torch.manual_seed(setting["seed"])
    place = torch.device(device)
    size, steps, length = setting["batch"]["sequences"], setting["steps"], setting["batch"]["sequence_length"]
    text = read(tokens, limit)
    text_NS = text[: text.numel() // length * length].view(-1, length)
    # The seed is the model's and the draws'; the order of the text is everyone's.
    text_NS = text_NS[torch.randperm(len(text_NS), generator=torch.Generator().manual_seed(0))]
    unseen_NS, train_NS = text_NS.split(
        [setting["validation_sequences"], len(text_NS) - setting["validation_sequences"]]
    )
    model = build(setting, config, place)
    optimizer = optimizer_of(model) if optimizer_of else adamw(model)
    half = torch.autocast(place.type, torch.bfloat16) if setting["autocast"] else nullcontext()
    validation, train, begun = [], [], time.perf_counter()
    with attention(setting["attention"]):
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, setting["learning_rate"])
            at = step * size % (len(train_NS) - size)
            ids_BS = train_NS[at : at + size].to(place, torch.int64)
            with half:
                loss = model(input_ids=ids_BS, labels=ids_BS).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step == WARM - 1:
                synchronize(place)
                begun = time.perf_counter()
            if (step + 1) % setting["validation_every"] == 0 or step + 1 == steps:
                train.append([step + 1, loss.item()])
                validation.append([step + 1, evaluate(model, unseen_NS, min(size, 64), place, half)])
                found = more(model, ids_BS) if more else {}
                yield found | {
                    "validation": validation,
                    "train": train,
                    "seconds": time.perf_counter() - begun,
                    "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if place.type == "cuda" else None,
                    "epochs": (step + 1) * size / len(train_NS),
                }


def adamw(model: Any) -> torch.optim.Optimizer:
    """The optimizer of methods that have none of their own."""
    return torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def build(setting: Row, keep: Config | None, device: torch.device) -> Any:
    """The model with its method at work, without logits in training."""
    from transformers import LlamaConfig, LlamaForCausalLM

    length = setting["batch"]["sequence_length"]
    shape = {key: setting[key] for key in Model.__dataclass_fields__}
    config = LlamaConfig(**shape, max_position_embeddings=length, use_cache=False, attn_implementation="sdpa")
    model = LlamaForCausalLM(config).to(device).train()  # drawn on the CPU: a seed means the same weights everywhere
    if keep is None:
        prac.ChunkedLoss(model)
    else:
        prac.compress(model, keep.replace(seed=setting["seed"]), loss="chunked")
    return model


def learning_rate(step: int, steps: int, peak: float) -> float:
    """A tenth of the steps up to the peak, then a cosine down to a tenth of it."""
    warm = max(1, steps // 10)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm))))


def evaluate(
    model: Any, unseen_NS: Tensor, size: int, device: torch.device, half: AbstractContextManager[Any]
) -> float:
    """The mean loss of a token."""
    model.eval()
    total = 0.0
    for part_BS in unseen_NS.split(size):
        ids_BS = part_BS.to(device, torch.int64)
        with torch.no_grad(), half:
            logits_BSV = model(input_ids=ids_BS).logits
        loss = F.cross_entropy(logits_BSV[:, :-1].float().flatten(0, 1), ids_BS[:, 1:].flatten(), reduction="sum")
        total += loss.item()
    model.train()
    return total / (unseen_NS.numel() - len(unseen_NS))

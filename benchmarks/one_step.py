"""One training step beside what users would pick instead: bytes kept, time, and what the gradient loses.

    python benchmarks/one_step.py                      # llama-tiny, then one wider model

Methods: plain training, Hugging Face's gradient checkpointing, `paper`, and both together. Bytes are counted on a real
forward pass; times are ratios to plain, all methods in turn, median over the rounds; the error of a gradient is
‖g̃ − g‖ / ‖g‖ over all parameters, for one draw. Writes `results/one_step.json`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import prac
from prac.lab import models, results
from prac.memory import track_kept

HERE = Path(__file__).parent / "results"
METHODS = ("plain", "checkpoint", "paper", "paper + checkpoint")


def build(size: models.Size) -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_attention_heads=size.heads,
        num_hidden_layers=size.layers,
    )
    plain = LlamaForCausalLM(config).train()
    found: dict[str, torch.nn.Module] = {}
    for method in METHODS:
        model = copy.deepcopy(plain)
        if "paper" in method:
            prac.compress(model, "paper")
        if "checkpoint" in method:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found[method] = model
    return found


def gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


def measure(name: str, tokens: int, rounds: int) -> list[results.Row]:
    size = models.SIZES[name]
    built = build(size)
    ids = torch.randint(4096, (tokens // 128, 128), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids, "use_cache": False}
    rows: dict[str, results.Row] = {}
    for method, model in built.items():
        with track_kept(model) as kept:
            loss = model(**batch).loss
        loss.backward()  # also makes the subspaces, so that refreshes are not timed
        rows[method] = {"model": name, "method": method, "tokens": tokens, "kept_bytes": kept.total}
    exact = gradient(built["plain"])
    for method, model in built.items():
        rows[method]["gradient_error"] = ((gradient(model) - exact).norm() / exact.norm()).item()
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in tqdm(range(rounds), desc=name, unit="round"):
        for method, model in built.items():
            start = time.perf_counter()
            model(**batch).loss.backward()
            seconds[method].append(time.perf_counter() - start)
    for method, row in rows.items():
        ratios = [a / b for a, b in zip(seconds[method], seconds["plain"], strict=True)]
        row |= {"time_ratio": statistics.median(ratios), "seconds": statistics.median(seconds[method])}
        row |= {"rounds": rounds, "threads": torch.get_num_threads()}
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama-tiny", "llama-60m"], help="sizes (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    rows = [row for name in arguments.models for row in measure(name, arguments.tokens, arguments.rounds)]
    results.write(HERE / "one_step.json", "benchmarks/one_step.py", rows)
    table = Table(title=f"One step of {arguments.tokens} tokens, {torch.get_num_threads()} CPU threads")
    for column in ("model", "method", "kept", "of plain", "time", "gradient error"):
        table.add_column(column)
    for row in rows:
        plain = next(r for r in rows if r["model"] == row["model"] and r["method"] == "plain")
        share, kept = row["kept_bytes"] / plain["kept_bytes"], f"{row['kept_bytes'] / 2**20:.1f} MiB"
        cells = (f"{share:.0%}", f"{row['time_ratio']:.2f}×", f"{row['gradient_error']:.1%}")
        table.add_row(row["model"], row["method"], kept, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()

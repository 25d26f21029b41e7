"""What refreshing subspaces costs: of one subspace by either way, and of a run's first thousand steps.

    python benchmarks/refreshing.py                          # LLaMA-60M's shapes on this machine
    python benchmarks/refreshing.py --device cuda --dtype bf16 --model llama-130m --tokens 32768

For each width of the model: the time of a refresh by `eigh` of the Gram matrix and by subspace iteration from the basis
before, and how much energy the second misses of the best. The activations have singular values that fall as 1/√i, and
have turned since the basis before so far that it misses about 5%. Then the refreshes that `paper` makes in a thousand
steps, against the time of these: blocks alone, measured (head, loss and optimizer come on top). Writes
`results/refreshing.json`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import prac
from prac.estimators import bases
from prac.estimators.clock import Clock
from prac.estimators.subspace import Subspace
from prac.lab.commands.bench import device_name
from prac.lab.materials import blocks, models
from prac.lab.measured.meters import synchronize
from prac.lab.report import results
from prac.runtime.text import aligned

STEPS = 1000
OUT = Path(__file__).parent / "results" / "refreshing.json"


def median_s(call: Callable[[], Any], device: torch.device, times: int = 5) -> float:
    """Seconds of a call, the median after one to warm up."""
    found = []
    for _ in range(times + 1):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def activations(tokens: int, n: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two batches (tokens, n), the second some way further."""
    generator = torch.Generator(device).manual_seed(n)

    def gaussian(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=generator)

    sizes_N = torch.arange(1, n + 1, device=device) ** -0.5
    axes_NN, turn_NN = torch.linalg.qr(gaussian(n, n)).Q, gaussian(n, n)
    further_NN = torch.matrix_exp(0.1 * (turn_NN - turn_NN.mT) / n**0.5)
    first = (gaussian(tokens, n) * sizes_N) @ axes_NN.mT
    second = (gaussian(tokens, n) * sizes_N) @ (axes_NN.mT @ further_NN)
    return first.to(dtype), second.to(dtype)


def one(n: int, rank: prac.Rank, hidden: int, tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """A row for subspaces of one width and rank."""
    before_MN, x_MN = activations(tokens, n, device, dtype)
    subspace = Subspace(rank, Clock(None), width=n, hidden=hidden, T1=1, T2=1)
    subspace.keep(before_MN)
    row: dict[str, Any] = {"width": n, "r1": subspace.r1, "r2": subspace.r2, "tokens": tokens}
    if device.type == "cuda" or n > bases.EIGH_MAX_WIDTH_WARM:
        row["way"] = "subspace iteration"
    else:
        row["way"] = "eigh"

    def refresh() -> None:
        subspace._q1_step = -subspace.T1 if subspace.T1 else 0  # due again
        subspace.update(x_MN)

    row["seconds"] = median_s(refresh, device)
    if subspace.r1:
        gram_NN = bases.gram_matrix(x_MN)
        values_N = torch.linalg.eigvalsh(gram_NN.double())
        row["eigh_s"] = median_s(lambda: torch.linalg.eigh(gram_NN), device, 3)
        old_NR = torch.linalg.eigh(bases.gram_matrix(before_MN)).eigenvectors[:, n - subspace.r1 :]
        most, bases.EIGH_MAX_WIDTH_WARM = bases.EIGH_MAX_WIDTH_WARM, 0
        try:
            q_NR = bases.principal_basis(gram_NN, subspace.r1, start_NR=old_NR)
            row["iteration_s"] = median_s(
                lambda: bases.principal_basis(gram_NN, subspace.r1, start_NR=old_NR), device, 3
            )
        finally:
            bases.EIGH_MAX_WIDTH_WARM = most
        best = values_N[n - subspace.r1 :].sum()

        def missed(q: Tensor) -> float:
            return 1 - float((q.double().mT @ gram_NN.double() @ q.double()).diagonal().sum() / best)

        row |= {"missed_before": missed(old_NR), "missed": missed(q_NR)}
    return row


def refreshes(growth: float, interval: int) -> int:
    """How many a subspace makes in the first steps."""
    clock = Clock(None)
    subspace = Subspace(prac.Rank(1, 1), clock, width=4, T1=interval, T2=interval, growth=growth)
    x_MN = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    for step in range(STEPS):
        clock.step = step
        subspace.update(x_MN)
    return subspace.refreshes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-60m", help="(default: llama-60m)")
    parser.add_argument("--tokens", type=int, default=16_384, help="of a step (default: 16384)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=list(blocks.DTYPES))
    parser.add_argument("--out", type=Path, default=OUT, help=f"(default: {OUT.name})")
    arguments = parser.parse_args()
    size, config = models.SIZES[arguments.model], prac.PRESETS["paper"]
    device, dtype = torch.device(arguments.device), blocks.DTYPES[arguments.dtype]
    n, m = size.hidden, size.intermediate
    assert isinstance(config.linear, prac.Rank)
    assert isinstance(config.norm, prac.Rank)
    assert isinstance(config.activation, prac.Rank)
    # What a block of a LLaMA keeps: q, k, v's input, o's, that of gate and up, that of down; two norms; SiLU's.
    kinds = [("linear", n, config.linear, 3, 0.0), ("down", m, config.linear, 1, 0.0)]
    kinds += [("norm", n, config.norm, 2, config.growth), ("silu", m, config.activation, 1, config.growth)]
    rows = []
    for kind, width, rank, count, growth in kinds:
        row = one(width, rank, n, arguments.tokens, device, dtype)
        often = refreshes(growth, config.T1 or STEPS)
        rows.append({"kind": kind, "of_a_block": count, "in_1000_steps": often} | row)
    shape = blocks.shape("llama", hidden=n, tokens=arguments.tokens, intermediate=m, heads=size.heads)
    block, (x, dy) = blocks.build(shape, dtype=dtype, device=device)

    def step() -> None:
        block(x).backward(dy)

    block_s = median_s(step, device, 3)
    cost = sum(row["of_a_block"] * row["in_1000_steps"] * row["seconds"] for row in rows)
    share = cost / (STEPS * block_s)
    cells = [
        ["kind", "width", "r1 + r2", "way", "ms", "eigh, ms", "iteration, ms", "missed", "before", "in 1,000 steps"]
    ]
    for row in rows:
        cells.append([
            row["kind"], str(row["width"]), f"{row['r1']} + {row['r2']}", row["way"], f"{1e3 * row['seconds']:.1f}",
            f"{1e3 * row['eigh_s']:.1f}", f"{1e3 * row['iteration_s']:.1f}", f"{row['missed']:.2%}",
            f"{row['missed_before']:.2%}", f"{row['of_a_block']} × {row['in_1000_steps']}",
        ])  # fmt: skip
    print("\n".join(aligned(cells, set(range(1, 10)) - {3})))
    print(f"a block forward and backward, {arguments.tokens:,} tokens: {1e3 * block_s:.0f} ms; refreshes: {share:.1%}")
    about = {"model": arguments.model, "dtype": arguments.dtype, "device": device_name(device)}
    command = f"python benchmarks/refreshing.py --device {device.type} --dtype {arguments.dtype}"
    command += f" --model {arguments.model} --tokens {arguments.tokens}"
    results.write(arguments.out, command, [about | row | {"block_s": block_s, "share": share} for row in rows])


if __name__ == "__main__":
    main()

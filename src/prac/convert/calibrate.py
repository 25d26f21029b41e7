"""Bases made once, of calibration batches, as LANCE has it: one decomposition for a whole run."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from prac.convert.handle import Handle
from prac.estimators.base import Kept
from prac.estimators.bases import gram_matrix
from prac.estimators.rounded import Rounded
from prac.estimators.subspace import Subspace
from prac.runtime.running import Example, call, in_mode


def calibrate(handle: Handle, batches: Iterable[Example]) -> None:
    """Make every principal basis from all of ``batches`` together, in place of the first training batch's.

    For configs whose bases are made once (``T1=None``, the preset "one-shot"); with others it is the first basis, kept
    until T1. Runs the model forward on each batch as in training. Weights and the random state stay as they are.

    Raises:
        ValueError: if nothing is kept at a rank, there are no batches, or they give NaN or Inf.

    >>> handle = prac.compress(model, "one-shot")
    >>> calibrate(handle, itertools.islice(loader, 8))
    """
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("no batches to calibrate with.")
    handle.look(first)
    subspaces = list(handle.subspaces())
    if not subspaces:
        raise ValueError("nothing to calibrate: this config keeps no tensor in a subspace.")
    grams: dict[Subspace, Tensor] = {}

    def collect(subspace: Subspace, x_MN: Tensor, dtype: torch.dtype) -> Kept:
        gram_NN = gram_matrix(x_MN)
        grams[subspace] = grams[subspace] + gram_NN if subspace in grams else gram_NN
        return Kept((x_MN.to(dtype),), Rounded(None, x_MN.shape[1], dtype))  # there is no backward to use it

    try:
        for subspace in subspaces:
            subspace.compress = functools.partial(collect, subspace)  # type: ignore[method-assign]
        with in_mode(handle.model, training=True), torch.enable_grad(), torch.random.fork_rng():
            for batch in itertools.chain([first], batches):
                call(handle.model, batch)
    finally:
        for subspace in subspaces:
            del subspace.compress
    for subspace, gram_NN in grams.items():
        subspace.settle(gram_NN)

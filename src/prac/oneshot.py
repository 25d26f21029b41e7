"""Bases made once, of calibration batches, as LANCE has it: one decomposition for a whole run."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from prac.bases import gram_matrix
from prac.estimator import Estimator, Kept
from prac.handle import Handle
from prac.structure import Example, call, in_mode
from prac.subspace import Subspace


def calibrate(handle: Handle, batches: Iterable[Example]) -> None:
    """Make every principal basis from all of ``batches`` together, in place of the first training batch's.

    For configs whose bases are made once (``T1=None``, the preset "one-shot"); with others it is the first basis, kept
    until T1. Runs the model forward on each batch as in training. Weights and the random state stay as they are.

    Raises:
        ValueError: if nothing is kept at a rank, there are no batches, or they give NaN or Inf.

    >>> handle = prac.compress(model, "one-shot")
    >>> prac.calibrate(handle, itertools.islice(loader, 8))
    """
    subspaces = list(handle.subspaces())
    if not subspaces:
        raise ValueError("nothing to calibrate: this config keeps no tensor in a subspace.")
    grams: dict[Subspace, Tensor] = {}

    def look(estimator: Estimator, x: Tensor, kept: Kept) -> None:
        # Readers that share a tensor each show it: it then counts as often in every batch, which turns no direction.
        if isinstance(estimator, Subspace):
            gram_NN = gram_matrix(x.detach().reshape(-1, x.shape[-1]))
            grams[estimator] = grams[estimator] + gram_NN if estimator in grams else gram_NN

    with in_mode(handle.model, training=True), torch.enable_grad(), torch.random.fork_rng():
        for batch in batches:
            if any(s.p_NR is None for s in subspaces):
                call(handle.model, batch)  # the first bases, to be replaced
            with handle.observed(look):
                call(handle.model, batch)
    if not grams:
        raise ValueError("no batches to calibrate with.")
    for subspace, gram_NN in grams.items():
        subspace.settle(gram_NN)

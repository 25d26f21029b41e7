"""One training step on which everything is kept in full, watching what weight gradients ask of what is kept.

The model is compressed with estimators that lose nothing and take notes, so what is measured is what would be kept:
the same tensors, read by the same layers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prac.config import Rank
from prac.convert.handle import Handle
from prac.estimators.base import Estimator, Form, Kept
from prac.estimators.bases import gram_matrix
from prac.estimators.clock import Clock
from prac.estimators.codes import Tensors
from prac.layers import Compressed, SharedNorm
from prac.layers.linear import Linear
from prac.runtime import kernel
from prac.runtime.kernel import as_written
from prac.runtime.running import Example, buffers_kept, call, in_mode, loss_of

# Put in for the rank of norm groups, and found again by its identity: how a tensor is known to be such a group's.
GROUP = Rank(1, 1)


class Half(NamedTuple):
    """Of one half of the batch's rows."""

    gram_NN: Tensor  # XᵀX
    second_NN: Tensor  # DᵀD


@dataclass(frozen=True)
class Measured:
    """A tensor that linear layers read, X (M × n), and the exact gradients dW_i = dY_iᵀX Γ of their weights."""

    name: str  # of the module that keeps it
    x_MN: Tensor
    weight_M: Tensor  # Σ_i ‖dy_i‖² of each token
    second_NN: Tensor  # DᵀD = Σ_i XᵀdY_i dY_iᵀX
    gamma_N: Tensor | None  # of the norm whose x̂ it is
    itemsize: int  # of a value that is kept in full, as handle.summary() counts it: that of the weights
    ranked: bool  # whether it may be kept at a rank
    beside: int  # bytes per token that its readers keep as well where it is at a rank, for the norm's exact scalar
    halves: tuple[Half, ...] = ()  # the two of the batch, each by itself

    @property
    def energy(self) -> float:
        """Σ_i ‖dW_i‖²."""
        return self.energy_of(self.second_NN)

    def energy_of(self, second_NN: Tensor) -> float:
        """The same of any DᵀD."""
        diagonal_N = second_NN.diagonal().double()
        return (diagonal_N if self.gamma_N is None else diagonal_N * self.gamma_N.double().square()).sum().item()


class _Input:
    """A tensor that was kept, and how often a gradient was asked of it."""

    def __init__(self, x_MN: Tensor) -> None:
        self.x_MN, self.asked = x_MN, 0
        dtype = torch.promote_types(x_MN.dtype, torch.float32)
        self.weight_M = torch.zeros(x_MN.shape[0], dtype=dtype, device=x_MN.device)


class Watch(Estimator):
    """Keeps a tensor as it is, and notes which weight gradients are computed from it."""

    def __init__(self, clock: Clock, name: str) -> None:
        super().__init__(clock, name=name)
        self.inputs: dict[int, _Input] = {}
        # dY_iᵀX of the first and of the second half of the rows, for each layer that reads it.
        self.grads: list[tuple[Tensor, Tensor]] = []

    def compress(self, x_MN: Tensor, dtype: torch.dtype) -> Kept:
        """(M, n), by reference where the dtype is that already."""
        self.width = x_MN.shape[1]
        return Kept((x_MN.to(dtype),), _Watched(self))

    def label(self) -> str:
        """``in full``."""
        return "in full"

    def bytes_per_token(self, itemsize: int) -> int:
        """Bytes of a row."""
        return (self.width or 0) * itemsize

    def note(self, dy_MO: Tensor, x_MN: Tensor) -> Tensor:
        """``dyᵀ x``, exactly.

        By its address a tensor is known again that several layers read, or that a checkpoint computes again. A module
        that runs several times has several; its readers then ask in the same order each time, and their gradients add
        up.
        """
        seen = self.inputs.setdefault(x_MN.data_ptr(), _Input(x_MN))
        wide = seen.weight_M.dtype
        halves = [dy.mT @ x.to(dy.dtype) for dy, x in zip(_halves(dy_MO), _halves(x_MN), strict=True)]
        first_ON, second_ON = (half_ON.to(wide) for half_ON in halves)
        seen.weight_M += dy_MO.to(wide).square().sum(1)
        if seen.asked < len(self.grads):
            before = self.grads[seen.asked]
            self.grads[seen.asked] = (before[0] + first_ON, before[1] + second_ON)
        else:
            self.grads.append((first_ON, second_ON))
        seen.asked += 1
        return (first_ON + second_ON).to(dy_MO.dtype)


def _halves(x_MN: Tensor) -> tuple[Tensor, Tensor]:
    half = x_MN.shape[0] // 2
    return x_MN[:half], x_MN[half:]


@dataclass(frozen=True, eq=False)
class _Watched(Form):
    """The form of what a :class:`Watch` keeps; not complete, so that each gradient is asked for by itself."""

    watch: Watch

    def reconstruct(self, tensors: Tensors) -> Tensor:
        """The tensor, (M, n)."""
        return tensors[0]

    def weight_grad(self, dy_MO: Tensor, tensors: Tensors) -> Tensor:
        """``dyᵀ x``, (O, n)."""
        return self.watch.note(dy_MO, tensors[0])


class _Place(NamedTuple):
    """Where a watched tensor is kept, and by whom it is read."""

    watch: Watch
    maker: Compressed
    ranked: bool
    beside: int


def watched_step(
    handle: Handle,
    batch: Example,
    *,
    autocast: torch.dtype | None = None,
    objective: Callable[[Any], Tensor] | None = None,
) -> list[Measured]:
    """Forward and backward once, in training mode: every tensor that a trained linear layer reads, in order.

    Weights, gradients, modes, buffers and random numbers are left as they were, the handle is not: restore it. Takes
    the memory of a plain training step, and of one copy of the weights' gradients.

    Args:
        handle: of a model that was compressed with :data:`GROUP` for its norm groups.
        batch: as large as those it is trained on, if not larger.
        autocast: dtype of the forward pass.
        objective: the scalar to differentiate, of the model's output; by default its ``loss``, or itself.

    Raises:
        ValueError: if activations or gradients are not finite, naming the layer, or if the output has no loss.
    """
    model = handle.model
    handle.look(batch)
    places = _watch(handle)
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device if parameters else torch.device("cpu")
    cast = nullcontext() if autocast is None else torch.autocast(device.type, autocast)
    with (
        buffers_kept(model),
        in_mode(model, training=True),
        torch.enable_grad(),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        kernel.run_by(as_written),
    ):
        with cast:
            value = loss_of(call(model, batch), objective)
        # Not backward(): the gradients that are there stay, and so does an optimizer that steps inside of it.
        torch.autograd.grad(value, parameters, allow_unused=True)
    default = next(model.parameters()).dtype
    return [_measured(place, default) for place in places if place.watch.grads]


def _watch(handle: Handle) -> list[_Place]:
    """Put a watch in the place of every estimator that linear layers read from, and keep all else in full."""
    layers = handle.layers()
    reads = {name: handle.read_by(name) for name in layers}
    makers: dict[Estimator, Compressed] = {}
    for name, layer in layers.items():
        for estimator in layer.estimators.values():
            if estimator in reads[name]:
                makers.setdefault(estimator, layer)
    read = {e: name for name, layer in layers.items() if layer.kind == "linear" for e in reads[name]}
    found: dict[Estimator, _Place] = {}
    for estimator, maker in makers.items():
        if estimator not in read or maker.kind not in ("linear", "norm"):
            continue
        grouped = getattr(estimator, "rank", None) is GROUP
        beside = sum(_output_bytes(layers[name]) for name, kept in reads.items() if kept == [estimator])
        found[estimator] = _Place(
            Watch(estimator.clock, estimator.name), maker, maker.kind == "linear" or grouped, beside
        )
    for layer in layers.values():
        layer.estimators = {
            tensor: found[e].watch if e in found else _in_full(layer, e) for tensor, e in layer.estimators.items()
        }
    return list(found.values())


def _in_full(layer: Compressed, estimator: Estimator) -> Estimator:
    if estimator.complete and layer.kind != "attention":
        estimator.bits = None
    else:
        layer._prac.suspended = True
    return estimator


def _output_bytes(layer: Compressed) -> int:
    """Bytes per token of a reader's own output, which it keeps where what it reads is at a rank."""
    outputs = layer.estimators.get("y")
    if outputs is None or outputs.bits is None:
        return 0
    assert isinstance(layer, Linear)
    weight = layer.get_parameter("weight")
    _, outputs.width = layer.widths(weight)
    return outputs.bytes_per_token(weight.dtype.itemsize)


def _measured(place: _Place, default: torch.dtype) -> Measured:
    watch, maker = place.watch, place.maker
    inputs = [seen for seen in watch.inputs.values() if seen.asked]
    x_MN = torch.cat([seen.x_MN for seen in inputs]) if len(inputs) > 1 else inputs[0].x_MN
    weight_M = torch.cat([seen.weight_M for seen in inputs])
    second_NN = gram_matrix(torch.cat([first_ON + second_ON for first_ON, second_ON in watch.grads]))
    halves = tuple(
        Half(
            torch.stack([gram_matrix(_halves(seen.x_MN)[i]) for seen in inputs]).sum(0),
            gram_matrix(torch.cat([grads[i] for grads in watch.grads])),
        )
        for i in (0, 1)
    )
    watch.grads.clear()
    for what, tensor in (("activations", x_MN), ("gradients", second_NN), ("gradients", weight_M)):
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{watch.name}: its {what} on the calibration batch hold NaN or Inf, or overflow when squared; check "
                "the data and the loss, or exclude the layer."
            )
    gamma_N = None
    if isinstance(maker, SharedNorm):
        gamma_N = maker._prac.match.facts.scale(maker.weight, weight_M.dtype)
    weight = getattr(maker, "weight", None)
    itemsize = (default if weight is None else weight.dtype).itemsize
    return Measured(watch.name, x_MN, weight_M, second_NN, gamma_N, itemsize, place.ranked, place.beside, halves)

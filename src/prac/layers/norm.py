"""LayerNorm, and RMSNorm in the variants that models define for themselves."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from prac.config import Kind
from prac.layers.alike import distances
from prac.layers.base import Compressed, trained
from prac.layers.marks import mark
from prac.layers.record import Match
from prac.layers.swapping import without_prac
from prac.ops import Norm, layer_norm, normalise, rms_norm
from prac.runtime.autocast import autocast_of
from prac.runtime.fake import with_numbers
from prac.runtime.processes import among_several


class LayerNorm(Compressed):
    """Keeps Z = X P and the exact statistics in place of X."""

    kind: ClassVar[Kind] = "norm"
    statistics: ClassVar[int] = 2
    weight: Tensor | None
    bias: Tensor | None

    def _compressed(self, x: Tensor) -> Tensor:
        """(..., n) to (..., n)."""
        if not trained(x, self.weight, self.bias):
            return self._idle(x)
        eps, estimator = self._prac.match.facts.eps, self.estimators["x"]
        return layer_norm(x, self.weight, self.bias, eps, estimator, compute=self._original)


class RMSNorm(Compressed):
    """Keeps Z = X P and the exact inverse scale in place of X."""

    kind: ClassVar[Kind] = "norm"
    statistics: ClassVar[int] = 1
    weight: Tensor | None

    def _compressed(self, x: Tensor) -> Tensor:
        """(..., n) to (..., n)."""
        if not trained(x, self.weight):
            return self._idle(x)
        estimator, norm = self.estimators["x"], _norm(self, x)
        return rms_norm(x, self.weight, norm.eps, estimator, offset=norm.offset, compute=self._original)


class SharedNorm(Compressed):
    """Either norm, keeping its x̂ and the exact inverse deviation for itself and all who read its output."""

    kind: ClassVar[Kind] = "norm"
    statistics: ClassVar[int] = 1
    weight: Tensor | None
    bias: Tensor | None

    def _compressed(self, x: Tensor) -> Tensor:
        """(..., n) to (..., n)."""
        bias = getattr(self, "bias", None)
        if not trained(x, self.weight, bias):
            return self._idle(x)
        y, normed = normalise(x, self.weight, bias, _norm(self, x), self.estimators["x"], self._dtype(x))
        return mark(y, normed._replace(weight=self._lasting(self.weight), bias=self._lasting(bias)))

    def _lasting(self, p: Tensor | None) -> Tensor | None:
        """γ or β for backward; among several processes a copy, since sharding (FSDP, ZeRO) frees a parameter in place.

        It does so when the block of the norm is done, forward or backward, while readers in another still need it.
        """
        return p.detach().clone() if p is not None and among_several() else p

    def _dtype(self, x: Tensor) -> torch.dtype:
        """Of the output, as the original has it for one token: classes of RMSNorm have each a rule of its own."""
        dtypes = self._prac.dtypes
        key = (x.dtype, None if self.weight is None else self.weight.dtype, autocast_of(x.device.type))
        if key not in dtypes:
            with torch.no_grad():
                dtypes[key] = self._original(x.detach().reshape(-1, x.shape[-1])[:1]).dtype
        return dtypes[key]


def _norm(layer: Compressed, x: Tensor) -> Norm:
    norm: Norm = layer._prac.match.facts
    return norm if norm.eps is not None else norm._replace(eps=machine_eps(x.dtype))


def recognise(module: nn.Module) -> Match | str | None:
    """LayerNorm by its class; RMSNorm by trying whether the module computes it."""
    if isinstance(module, nn.LayerNorm):
        if type(module).forward is not nn.LayerNorm.forward:
            return "a LayerNorm with a forward of its own"
        if len(module.normalized_shape) != 1:
            return f"normalises over {len(module.normalized_shape)} dimensions; only the last one is supported"
        norm = Norm(module.eps, 0.0, True)
        return Match(LayerNorm, {"x": module.normalized_shape[0]}, norm, grouped=SharedNorm)
    if not type(module).__name__.endswith("Norm") or any(module.children()):
        return None
    weight = getattr(module, "weight", None)
    own = [*dict(module.named_parameters()), *dict(module.named_buffers())]
    if own != ["weight"] or weight is None or weight.dim() != 1:
        return "a norm, but not one over the last dimension with a weight and nothing else"
    formula = _rms_formula(module, weight.numel())
    if formula is None:
        return "a norm, but its output is not that of an RMSNorm"
    return Match(RMSNorm, {"x": weight.numel()}, Norm(*formula, False), grouped=SharedNorm)


def _rms_formula(module: nn.Module, n: int) -> tuple[float | None, float] | None:
    """(eps, offset) if ``module(x) = (offset + γ) x / √(mean x² + eps)``; of an eps of None, None.

    Models write their own RMSNorm; what the class is called does not say whether γ or 1 + γ
    multiplies, nor which attribute holds eps. A float32 copy with random weights does.
    """
    with with_numbers(module) as real:
        # Its own parameters are not touched, nor copied: what a forward left on the module may have a graph.
        twin = without_prac(real)
        weight = real._parameters.get("weight")  # not a parameter where the module is called as a function of it
        device = torch.device("cpu") if weight is None else weight.device
        vars(twin)["_parameters"] = {"weight": nn.Parameter(torch.ones(n, dtype=torch.float32, device=device))}
        return _evaluated(twin, n)


def _evaluated(twin: nn.Module, n: int) -> tuple[float | None, float] | None:
    generator, device = torch.Generator().manual_seed(0), twin.get_parameter("weight").device
    f32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the process's defaults are
    weight = (torch.rand(n, generator=generator, **f32) + 0.5).to(device)
    with torch.no_grad():
        twin.get_parameter("weight").copy_(weight)
    found = [vars(twin)[a] for a in ("eps", "variance_epsilon", "epsilon") if a in vars(twin)]
    its_eps = next((float(e) for e in found if e is not None), None)
    eps = machine_eps(torch.float32) if its_eps is None else its_eps
    # Rows of ordinary size, and rows so small that eps decides.
    sizes = torch.tensor([[1.0], [max(eps, 1e-12) ** 0.5]] * 4, **f32)
    x = (torch.randn(8, n, generator=generator, **f32) * sizes).to(device)

    def formula(offset: float, x: Tensor) -> Tensor:
        return (offset + weight) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    offsets = (0.0, 1.0)
    apart = distances(twin, [functools.partial(formula, offset) for offset in offsets], x)
    return next(((its_eps, offset) for offset, far in zip(offsets, apart, strict=True) if far < 1e-4), None)


@functools.cache
def machine_eps(dtype: torch.dtype) -> float:
    """What ``F.rms_norm`` takes for an eps of None: the machine epsilon of the input's dtype, or of a wider one."""
    with unset_fake_temporarily():
        x = torch.full((1, 16), 2.0**-12, dtype=dtype, device="cpu")
        size = (x / F.rms_norm(x, (16,))).double().square().mean().item()  # x² + eps
    found = (torch.finfo(d).eps for d in (dtype, torch.promote_types(dtype, torch.float32)))
    return min(found, key=lambda eps: abs(size - 2.0**-24 - eps))

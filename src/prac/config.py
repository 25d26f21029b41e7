"""What to keep: the policy, as plain frozen dataclasses.

A :class:`Config` says, for each kind of layer, how its input is kept for backward: at a
:class:`Rank` (Section 5.1 of the paper, "Layer-Wise Design") or in few :class:`Bits`, and how often
the subspaces are refreshed (Algorithm 1). It holds no tensors and knows no model.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

# Ranks of so many directions and more are rounded up to a multiple of EVEN, which GPUs' fast products want.
EVEN, PADDED = 8, 128
Kind = Literal["linear", "norm", "activation", "attention"]


@dataclass(frozen=True)
class Bits:
    """Keep every direction, in few bits: see :mod:`prac.estimators.codes`.

    To the nearest code where a nonlinearity follows, unbiased where the use is linear: that is the layer's to know.

    Args:
        bits: 2, 4, 6, 8 or 16 (bfloat16) a value; 32 keeps the tensor as it is, whatever its dtype.
        group: features of a token that share a scale: two numbers in bfloat16, or one where they are rotated. A width
            that it does not divide gets another that suits it.
        rotate: turn each group, a power of two, by a Hadamard matrix before it is rounded. Where few values are much
            larger than the others, as on weights that are trained, 4 bits lose half as much.
        compand: codes of asinh(x), finer around 0: for ``activation`` alone, since they cannot be rounded without bias.
    """

    bits: int = 4
    group: int = 64
    rotate: bool = False
    compand: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or self.bits not in (2, 4, 6, 8, 16, 32):
            raise ValueError(f"bits must be 2, 4, 6, 8, 16 or 32, got {self.bits!r}.")
        if isinstance(self.group, bool) or not isinstance(self.group, int) or self.group < 4:
            raise ValueError(f"group must be a whole number of at least 4 features, got {self.group!r}.")
        suits = self.bits <= 8 and self.group in (4, 8, 16, 32, 64, 128, 256, 512, 1024)
        if not isinstance(self.rotate, bool) or (self.rotate and not suits):
            raise ValueError(f"rotate must be False, or with up to 8 bits and group 4, 8, 16, … or 1024, got {self!r}.")
        if not isinstance(self.compand, bool) or (self.compand and (self.rotate or self.bits > 8)):
            raise ValueError(f"compand must be False, or with up to 8 bits and without rotate, got {self!r}.")

    @property
    def label(self) -> str:
        """For a table: ``4 bits``."""
        how = str(self).removesuffix(f"{self.bits}bits")
        return "in full" if self.bits == 32 else f"{self.bits} bits{how and f', {how}'}"

    def __str__(self) -> str:
        return f"{'rotated' if self.rotate else 'companded' if self.compand else ''}{self.bits}bits"


@dataclass(frozen=True)
class Rank:
    """How many directions of an activation are kept: ``r1`` principal, ``r2`` random.

    Args:
        r1: principal directions. A float is a fraction of the width n (floored, as in the paper), an int a number.
        r2: random directions, likewise. ``r2 = 0`` is PAC (biased), ``r1 = 0`` is RAC (unbiased, high variance); see
            Table 1.
        k: scale of the random part, in units of the unbiased ``k0 = (n - r1) / r2``. Anything but 1.0 biases the
            estimate; it is here for the ablation of Figure 7.
        bits: how Z is kept; None in the activation's own dtype, as the paper has it.
        orthonormal: False leaves random directions as they are drawn, Gaussian of variance 1/r2: as unbiased, noisier.
        of: what a float is a fraction of: the tensor's own ``"width"``, or the ``"hidden"`` size, which is the width
            that the linear layer before it reads (of a GELU four times less). Where none ran before, or one that reads
            more, its own width.

    >>> Rank(0.3, 0.3).resolve(768)
    (230, 234)
    """

    r1: float | int = 0.3
    r2: float | int = 0.3
    k: float = 1.0
    bits: Bits | None = None
    orthonormal: bool = True
    of: Literal["width", "hidden"] = "width"

    def __post_init__(self) -> None:
        for name in ("r1", "r2"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name} must be a fraction (0.3) or a count (64), got {value!r}.")
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} must be finite and not negative, got {value!r}.")
            if isinstance(value, float) and value > 1:
                raise ValueError(
                    f"{name} = {value} is a float, so a fraction of the width, and must be at most 1; "
                    f"write {name} = {int(value)} (an int) for a number of directions."
                )
        if self.r1 == 0 and self.r2 == 0:
            raise ValueError("rank 0 keeps nothing: give r1, r2 or both a value above 0.")
        if not _is_number(self.k) or self.k <= 0:
            raise ValueError(f"k must be a finite number above 0 (1.0 is unbiased), got {self.k!r}.")
        if self.k != 1 and self.r2 == 0:
            raise ValueError(f"k scales the random directions, and r2 = 0 has none: leave k away, got {self.k!r}.")
        if self.bits is not None and (not isinstance(self.bits, Bits) or self.bits.compand):
            raise ValueError(f"bits must be a Bits without compand, or None, got {self.bits!r}: write bits=Bits(8).")
        if not isinstance(self.orthonormal, bool):
            raise ValueError(f"orthonormal must be True or False, got {self.orthonormal!r}.")
        if self.of not in ("width", "hidden"):
            raise ValueError(f'of must be "width" or "hidden", got {self.of!r}.')

    def __str__(self) -> str:
        scale = "" if self.k == 1 else f",{self.k}"
        of = "" if self.of == "width" else f"/{self.of}"
        return f"{self.r1},{self.r2}{scale}{of}" + ("" if self.bits is None else f"@{self.bits}")

    def resolve(self, width: int, where: str = "", *, hidden: int | None = None) -> tuple[int, int]:
        """The number of directions ``(r1, r2)`` for a width of ``width`` features.

        Where it is given in fractions, r1 + r2 is rounded up to a multiple of :data:`EVEN` from :data:`PADDED` on:
        matrix products of other sizes run some three times slower on GPUs. The extra directions are random ones.

        Args:
            width: n.
            where: the layer, for messages.
            hidden: what a fraction is of, where it is of the hidden size.

        Raises:
            ValueError: if nothing is left after flooring, or ``r1 + r2 > width``.
        """
        whole = width if self.of == "width" or hidden is None else min(hidden, width)
        r1, r2 = (_count(value, whole) for value in (self.r1, self.r2))
        if isinstance(self.r1 + self.r2, float) and r1 + r2 >= PADDED:
            more = max(0, min(-(r1 + r2) % EVEN, width - r1 - r2))
            r1, r2 = (r1, r2 + more) if r2 else (r1 + more, r2)
        layer = f"{where}: " if where else ""
        if r1 + r2 == 0:
            said = f"{layer}rank ({self.r1}, {self.r2}) of a width of {whole} is 0 directions."
            raise ValueError(f"{said} Raise the rank, or exclude the layer.")
        if r1 + r2 > width:
            said = f"{layer}r1 + r2 = {r1} + {r2} = {r1 + r2} exceeds the width {width}."
            raise ValueError(f"{said} Lower the rank, or exclude the layer.")
        return r1, r2


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _count(value: float | int, width: int) -> int:
    # The small term keeps 0.29 * 100 = 28.999… from flooring to 28.
    return value if isinstance(value, int) else math.floor(value * width + 1e-9)


@dataclass(frozen=True)
class Factors:
    """Keep two factors of a low-rank approximation that is made anew in every forward pass, as LoRAct does.

    See :mod:`prac.estimators.factors`. Nothing is carried from step to step; the price is a decomposition each time,
    and a bias: what is outside the rank is gone.

    Args:
        rank: a float is a fraction of the width (the compression ratio r), an int a number of directions.
        iterations: power iterations t; each sharpens the approximation for two more passes over the tensor.
        sketch: ``"sampled"`` starts from some of the tensor's own columns (LoRAct), ``"gaussian"`` from random
            combinations of its rows (RSVD).
    """

    rank: float | int = 0.125
    iterations: int = 0
    sketch: Literal["sampled", "gaussian"] = "sampled"

    def __post_init__(self) -> None:
        Rank(self.rank, 0)  # raises what there is to say of the rank
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int) or self.iterations < 0:
            raise ValueError(f"iterations must be a whole number of at least 0, got {self.iterations!r}.")
        if self.sketch not in ("sampled", "gaussian"):
            raise ValueError(f'sketch must be "sampled" or "gaussian", got {self.sketch!r}.')

    def resolve(self, width: int, where: str = "") -> int:
        """The number of directions for a width of ``width`` features; errors as of :meth:`Rank.resolve`."""
        return Rank(self.rank, 0).resolve(width, where)[0]


# How one tensor is kept.
Keep = Rank | Bits | Factors


@dataclass(frozen=True)
class Config:
    """Which tensors are kept how, and how often subspaces are refreshed.

    Each of the first four is a :class:`Rank`, a :class:`Bits`, a :class:`Factors`, or None to leave that kind alone.

    Args:
        linear: inputs of linear layers that nothing else keeps already.
        norm: inputs of LayerNorm and RMSNorm; with ``group`` set, the normalised x̂ of the norms
            that are not a group of their own.
        activation: inputs of GELU, SiLU and of the gated product ``silu(g) * u`` (both g and u). With Bits the output
            is not kept either: what reads it computes it again.
        product: False leaves gated products alone: of ``silu(g) * u`` the input of ``silu`` is compressed, and both
            factors stay in full.
        last_norm: False leaves the norm that runs last in full, through which every gradient goes where the model has
            one trunk; of two towers it is the second one's.
        renormalise: norms that keep an input of their own at a rank scale the estimate of x̂ to the length that x̂ has, a
            token at a time (:func:`prac.ops.rms_norm`). Those that share x̂, with ``group`` set, do not.
        group: None has every layer keep an input of its own, as in the paper. Otherwise a norm and the linear layers
            that alone read its output (q, k, v; gate, up) keep its x̂, once for all.
        attention_bits: keep q, k, v and the output of attention in so many bits, rotated; None leaves them to
            attention, in full. For models of transformers that run "sdpa".
        T1: optimizer steps between refreshes of the principal basis Q1; None keeps the first one for good, which is
            best made of several batches (:func:`prac.convert.calibrate.calibrate`).
        T2: optimizer steps between refreshes of the random basis Q2, or None. Q2 is also redrawn whenever Q1 changes.
        growth: if above 0, no interval of a norm or an activation is longer than this share of the steps before it: 0.1
            refreshes at steps 0 to 20, then 22, 24, …, 30, 33, 36, …, until an interval is as long as T1 or T2. Early
            in training a stale basis does harm there, and none to linear layers. At most 1; 0 for fixed intervals.
        factored: leave the weight gradients of linear layers that keep a rank or factors in two factors, through
            accumulation and clipping into the optimizer (:class:`prac.optim.FactoredGradient`). Not together with
            ``group``.
        seed: of the random bases and of the rounding. Each layer draws from a generator of its own, not the user's.
        min_width: layers with narrower inputs are left alone, since P would cost more there than it saves.
        layers: single linear layers and norms, by module name, that keep theirs otherwise than their kind does. Of
            layers that share an input the first is named, of a norm group the norm. :func:`prac.allocation.allocate`
            fills it.
    """

    linear: Keep | None = Rank(0.3, 0.3)
    norm: Keep | None = Rank(0.2, 0.2)
    activation: Keep | None = Rank(0.2, 0.2)
    group: Keep | None = None
    attention_bits: int | None = None
    product: bool = True
    last_norm: bool = True
    renormalise: bool = False
    T1: int | None = 500
    T2: int | None = 500
    growth: float = 0.0
    factored: bool = False
    seed: int = 0
    min_width: int = 32
    layers: dict[str, Keep] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("linear", "norm", "activation", "group"):
            keep = getattr(self, name)
            if keep is not None and not isinstance(keep, Rank | Bits | Factors):
                example = f"Bits({keep})" if keep in (2, 4, 6, 8, 16, 32) else "Bits(8), Rank(0.3, 0.3)"
                raise ValueError(f"{name} must be a Rank, Bits, Factors or None, got {keep!r}: write {name}={example}.")
        for name, least in (("T1", 1), ("T2", 1), ("min_width", 1), ("seed", None)):
            value, bound = getattr(self, name), "" if least is None else f" of at least {least}"
            if value is None and name in ("T1", "T2"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
                raise ValueError(f"{name} must be a whole number{bound}, got {value!r}.")
        if not _is_number(self.growth) or not 0 <= self.growth <= 1:
            raise ValueError(f"growth must be a number from 0 (fixed intervals) to 1, got {self.growth!r}.")
        for name in ("product", "last_norm", "renormalise", "factored"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {value!r}.")
        if self.attention_bits not in (None, 4, 6, 8) or isinstance(self.attention_bits, float):
            raise ValueError(f"attention_bits must be 4, 6, 8 or None, got {self.attention_bits!r}.")
        if self.factored and (self.group is not None or not isinstance(self.linear, Rank | Factors)):
            raise ValueError(
                "factored gradients come of linear layers that keep their own input at a rank: set linear to a Rank or "
                f"Factors and group to None, got linear = {self.linear} and group = {self.group}."
            )
        for name, keep in self.layers.items():
            if not isinstance(keep, Rank | Bits | Factors):
                raise ValueError(f"layers must give a Rank, Bits or Factors for each name, got {keep!r} for {name!r}.")

    def keep(self, kind: Kind) -> Keep | None:
        """How one kind of layer keeps its input, or None where that kind is left alone."""
        if kind == "attention":
            return None if self.attention_bits is None else Bits(self.attention_bits, 32, rotate=True)
        keep: Keep | None = getattr(self, kind)
        return keep

    def replace(self, **changes: Any) -> Config:
        """A copy with some fields changed: ``PRESETS["paper"].replace(T1=200)``."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Config:
        """The inverse of :meth:`to_dict`."""
        layers = {name: _keep(value) for name, value in data.get("layers", {}).items()}
        return cls(**{name: _keep(value) for name, value in data.items() if name != "layers"}, layers=layers)


def _keep(value: Any) -> Any:
    """A Rank, Bits or Factors from the plain data of one; anything else as it is."""
    if not isinstance(value, dict):
        return value
    inner = {name: _keep(v) for name, v in value.items()}
    return Rank(**inner) if "r1" in inner else Factors(**inner) if "rank" in inner else Bits(**inner)

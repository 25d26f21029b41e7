"""Weight gradients that stay in factors: activation-gradient co-compression.

A linear layer that kept its input as ``x̃ = Z Pᵀ`` has the weight gradient ``dW = dYᵀ x̃ = (dYᵀ Z) Pᵀ``. The two factors
say all of it in ``(o + n) r`` numbers in place of ``o n``, and the second is there anyway. Nothing is lost by leaving
it so: the factored dW is as unbiased as x̃ is, and so is whatever is linear in it.

:class:`FactoredGradient` is a tensor in this form. It goes where gradients go: ``.grad``, accumulation, clipping, any
optimizer. Sums, multiples and norms are taken of the factors; everything else is given the full matrix, made for that
one operation. So torch's fused optimizers, and those that take one parameter after another, expand one layer at a time;
with ``foreach=True`` they expand all at once; :class:`prac.optim.SubspaceAdamW` keeps its state in the subspace too.

DistributedDataParallel exchanges full matrices: it works, and saves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
_RULES: dict[Any, Callable[..., Any]] = {}


class FactoredGradient(Tensor):
    """``coefficients_OR @ basis_NR.T``, (O, N), or its transpose; made only where somebody asks for entries.

    Args:
        coefficients_OR: such as ``dYᵀ Z``.
        basis_NR: such as P. It is shared by gradients of the same subspace and never written to.
        transposed: of a weight that is stored as (N, O).
        subspace: stands for the subspace where the basis is a copy in another dtype; gradients with the same one are
            added by their coefficients.

    >>> g = FactoredGradient(torch.ones(4, 2), torch.ones(6, 2))
    >>> g, bool(g.norm() == g.dense().norm())
    (FactoredGradient((4, 6), rank 2, torch.float32), True)
    """

    coefficients_OR: Tensor
    basis_NR: Tensor
    transposed: bool
    subspace: Any

    @staticmethod
    def __new__(
        cls, coefficients_OR: Tensor, basis_NR: Tensor, transposed: bool = False, subspace: Any = None
    ) -> FactoredGradient:
        """A wrapper around the two factors, with no memory of its own."""
        shape = (coefficients_OR.shape[0], basis_NR.shape[0])
        made: FactoredGradient = Tensor._make_wrapper_subclass(
            cls, shape[::-1] if transposed else shape, dtype=coefficients_OR.dtype, device=coefficients_OR.device
        )
        made.coefficients_OR, made.basis_NR, made.transposed = coefficients_OR, basis_NR, transposed
        made.subspace = basis_NR if subspace is None else subspace
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @property
    def rank(self) -> int:
        """Columns of the factors; it grows where gradients of different subspaces are added."""
        return self.coefficients_OR.shape[1]

    def dense(self) -> Tensor:
        """The matrix itself."""
        return self.expanded(self.coefficients_OR)

    def expanded(self, coefficients_OR: Tensor) -> Tensor:
        """The matrix with these coefficients in place of its own: how an update leaves the subspace."""
        full_ON = coefficients_OR @ self.basis_NR.to(coefficients_OR.dtype).mT
        return full_ON.mT if self.transposed else full_ON

    def replaced(self, coefficients_OR: Tensor) -> FactoredGradient:
        """The same basis with other coefficients."""
        return FactoredGradient(coefficients_OR, self.basis_NR, self.transposed, self.subspace)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FactoredGradient({tuple(self.shape)}, rank {self.rank}, {self.dtype})"

    def __tensor_flatten__(self) -> tuple[list[str], tuple[bool, Any]]:
        return ["coefficients_OR", "basis_NR"], (self.transposed, self.subspace)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor], meta: tuple[bool, Any], size: Any, stride: Any
    ) -> FactoredGradient:
        return FactoredGradient(inner["coefficients_OR"], inner["basis_NR"], *meta)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.name().startswith("aten::_fused_"):
            return _one_by_one(func, args, kwargs)
        rule = _RULES.get(func)
        if rule is not None and (found := rule(*args, **kwargs)) is not NotImplemented:
            return found
        written = [a for a, info in zip(args, func._schema.arguments, strict=False) if info.is_write]
        if any(isinstance(leaf, FactoredGradient) for leaf in tree_leaves(written)):
            raise RuntimeError(f"{func} would write entries into a gradient that is kept in factors; use .dense().")
        args, kwargs = tree_map_only(FactoredGradient, FactoredGradient.dense, (args, kwargs))
        return func(*args, **kwargs)


def _one_by_one(func: Any, args: Any, kwargs: Any) -> None:
    """A fused optimizer on lists (parameters, gradients, states …): so that one gradient at a time is full.

    It calls gradients written to, since it may take a loss scale off them; what it has used up here need not be right.
    """

    def step(index: int) -> None:
        gradient = args[1][index]
        dense = gradient.dense() if isinstance(gradient, FactoredGradient) else gradient
        one = [[each[index]] if isinstance(each, list) and each else each for each in args]
        func(one[0], [dense], *one[2:], **kwargs)

    for index in range(len(args[1])):
        step(index)  # whose full matrix is gone before the next one is made


def _rule(*ops: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _RULES.update(dict.fromkeys(ops, function))
        return function

    return register


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0)


@_rule(aten.detach.default, aten.alias.default, aten.clone.default)
def _detach(g: FactoredGradient, **how: Any) -> FactoredGradient:
    return g.replaced(g.coefficients_OR)  # a clone as well: factors are replaced, never written to


@_rule(aten.new_empty_strided.default)
def _new_for_a_copy(g: FactoredGradient, size: Any, stride: Any, **how: Any) -> Any:
    """What autograd asks for where a weight is not contiguous, to copy its first gradient into."""
    return g.replaced(torch.zeros_like(g.coefficients_OR)) if tuple(size) == tuple(g.shape) else NotImplemented


@_rule(aten.t.default, aten.transpose.int)
def _transpose(g: FactoredGradient, first: int = 0, second: int = 1) -> FactoredGradient:
    return FactoredGradient(g.coefficients_OR, g.basis_NR, g.transposed ^ (first % 2 != second % 2), g.subspace)


@_rule(aten._to_copy.default)
def _to_copy(g: FactoredGradient, **how: Any) -> FactoredGradient:
    how = {name: value for name, value in how.items() if name in ("dtype", "device", "non_blocking")}
    return FactoredGradient(g.coefficients_OR.to(**how), g.basis_NR.to(**how), g.transposed, g.subspace)


@_rule(aten.mul.Tensor, aten.mul.Scalar)
def _mul(g: Any, by: Any) -> Any:
    if not isinstance(g, FactoredGradient):
        g, by = by, g
    return g.replaced(g.coefficients_OR * by) if _is_number(by) else NotImplemented


@_rule(aten.div.Tensor, aten.div.Scalar)
def _div(g: Any, by: Any) -> Any:
    ours = isinstance(g, FactoredGradient) and _is_number(by)
    return g.replaced(g.coefficients_OR / by) if ours else NotImplemented


@_rule(aten.add.Tensor)
def _add(a: Any, b: Any, alpha: float = 1) -> Any:
    """The sum by its coefficients where both lie in one subspace, else the factors side by side."""
    if not (isinstance(a, FactoredGradient) and isinstance(b, FactoredGradient)) or a.transposed != b.transposed:
        return NotImplemented
    if a.subspace is b.subspace:
        return a.replaced(torch.add(a.coefficients_OR, b.coefficients_OR, alpha=alpha))
    both_OR = torch.cat([a.coefficients_OR, alpha * b.coefficients_OR], dim=1)
    return FactoredGradient(both_OR, torch.cat([a.basis_NR, b.basis_NR], dim=1), a.transposed)


@_rule(aten.copy_.default)
def _copy_in_place(g: Any, source: Any, non_blocking: bool = False) -> Any:
    """What DistributedDataParallel brings back is a full matrix: its own coefficients of the identity."""
    if not isinstance(g, FactoredGradient):
        return NotImplemented
    if isinstance(source, FactoredGradient):
        return _become(g, source)
    full_ON = source.mT if g.transposed else source
    identity_NN = torch.eye(full_ON.shape[1], dtype=full_ON.dtype, device=full_ON.device)
    return _become(g, FactoredGradient(full_ON.clone(), identity_NN, g.transposed))


def _become(g: FactoredGradient, other: Any) -> Any:
    if other is not NotImplemented:
        g.coefficients_OR, g.basis_NR, g.subspace = other.coefficients_OR, other.basis_NR, other.subspace
        return g
    return other


def _in_place(rule: Callable[..., Any]) -> Callable[..., Any]:
    def run(g: Any, *args: Any, **kwargs: Any) -> Any:
        return _become(g, rule(g, *args, **kwargs)) if isinstance(g, FactoredGradient) else NotImplemented

    return run


_rule(aten.mul_.Tensor, aten.mul_.Scalar)(_in_place(_mul))
_rule(aten.div_.Tensor, aten.div_.Scalar)(_in_place(_div))
_rule(aten.add_.Tensor)(_in_place(_add))
_rule(aten.zero_.default)(_in_place(lambda g: g.replaced(torch.zeros_like(g.coefficients_OR))))


@_rule(aten.linalg_vector_norm.default)
def _norm(g: FactoredGradient, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """‖L Rᵀ‖² = ⟨LᵀL, RᵀR⟩, from two r × r matrices."""
    if ord != 2 or dim is not None or keepdim:
        return NotImplemented
    wide = torch.promote_types(g.dtype, torch.float32)
    left_OR, right_NR = g.coefficients_OR.to(wide), g.basis_NR.to(wide)
    square = ((left_OR.mT @ left_OR) * (right_NR.mT @ right_NR)).sum()
    return square.clamp_min(0).sqrt().to(dtype or g.dtype)


@_rule(aten._foreach_norm.Scalar)
def _foreach_norm(gradients: Any, ord: float = 2, dtype: Any = None) -> Any:
    return [torch.linalg.vector_norm(g, ord, dtype=dtype) for g in gradients]


@_rule(aten._foreach_mul_.Tensor, aten._foreach_mul_.Scalar)
def _foreach_mul_in_place(gradients: Any, by: Any) -> None:
    for g in gradients:
        g.mul_(by)


@_rule(aten._amp_foreach_non_finite_check_and_unscale_.default)
def _unscale_in_place(gradients: Any, found_inf: Tensor, inverse: Tensor) -> None:
    """What ``torch.amp.GradScaler`` does to gradients."""
    for g in gradients:
        tensor = g.coefficients_OR.clone() if isinstance(g, FactoredGradient) else g
        torch._amp_foreach_non_finite_check_and_unscale_([tensor], found_inf, inverse)
        if isinstance(g, FactoredGradient):
            g.coefficients_OR = tensor

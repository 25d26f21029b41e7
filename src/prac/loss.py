"""The loss of a causal language model without its logits.

Tokens × vocabulary is often the largest tensor of a training step: in float32, 128 × 256 tokens and 32,000 words are
4 GiB, and there are three of them at the peak. :func:`prac.ops.linear_cross_entropy` goes through the tokens in
chunks and never makes them; this module puts it into a model of transformers. The loss and its gradients are those of
the plain way, to rounding.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from prac.ops import linear_cross_entropy
from prac.probe import example_for
from prac.tangible import hollow

HELP = "leave the loss as it is (loss=None, or --loss plain)"


class ChangedLogits(AttributeError, ValueError):
    """Somebody asked for what logits have and their stand-in has not; an AttributeError, so that hasattr says no."""


class Deferred:
    """What the output head returns in place of logits, for the loss that follows."""

    def __init__(self, hidden: Tensor, head: nn.Linear) -> None:
        self.hidden, self.weight, self.bias = hidden, head.weight, head.bias

    def _refuse(self, *_: Any) -> NoReturn:
        raise ChangedLogits(
            "the chunked loss needs a model that hands its logits to the loss as they are; this one changes them "
            f"first (soft-capping, scaling) or has a loss of its own: {HELP}."
        )

    def __getattr__(self, name: str) -> NoReturn:
        self._refuse()

    __add__ = __sub__ = __mul__ = __truediv__ = __getitem__ = __neg__ = __pow__ = __matmul__ = _refuse
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __iter__ = __len__ = _refuse

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        cls._refuse(next(a for a in args if isinstance(a, cls)))


class ChunkedLoss:
    """Puts the chunked loss into a model, and takes it out again.

    In training, when the model is called with ``labels``, its output then has a loss and no logits (None). In eval
    mode, without labels, or under ``no_grad`` nothing changes, unless asked for.

    Args:
        model: one of transformers, or a wrapper of one (PEFT).
        label_smoothing: as for ``F.cross_entropy``; in training alone.
        always: also in eval mode and under ``no_grad``, for evaluations that want the loss alone.

    Raises:
        ValueError: if it has no output head, its loss is not the one for causal language models, or it changes its
            logits before that.
    """

    def __init__(self, model: nn.Module, label_smoothing: float = 0.0, *, always: bool = False) -> None:
        self.label_smoothing, self.always = label_smoothing, always
        self.model = _with_head(model)
        self.head: nn.Linear = self.model.get_output_embeddings()  # type: ignore[operator]
        self._deferring = False
        self._had = vars(self.model).get("_loss_function")
        self.model.loss_function = self._loss  # type: ignore[assignment]
        self._hooks = [
            self.model.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.model.register_forward_hook(self._leave, always_call=True),
        ]
        self.head.forward = self._head
        try:
            self._try()
        except Exception:
            self.remove()
            raise

    def _try(self) -> None:
        """Find out now, on a copy without numbers, whether the logits reach the loss as they are."""
        example = example_for(self.model)
        if isinstance(example, Mapping) and not isinstance(self.head.weight, FakeTensor):
            labels = example.get("decoder_input_ids", example["input_ids"])
            with hollow(self.model, dict(example) | {"labels": labels}) as (model, batch):
                model.train()(**batch)

    def remove(self) -> None:
        """Make the model as it was."""
        for hook in self._hooks:
            hook.remove()
        del self.head.forward
        if self._had is None:
            del self.model._loss_function
        else:
            self.model.loss_function = self._had

    def _enter(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        labels = kwargs.get("labels")
        if labels is None and args:
            labels = inspect.signature(type(model).forward).bind_partial(model, *args).arguments.get("labels")
        self._deferring = labels is not None and (self.always or (model.training and torch.is_grad_enabled()))

    def _leave(self, model: nn.Module, args: Any, output: Any) -> Any:
        self._deferring = False
        if isinstance(output, tuple):
            return tuple(None if isinstance(part, Deferred) else part for part in output)
        if isinstance(getattr(output, "logits", None), Deferred):
            return type(output)(**{name: part for name, part in output.items() if name != "logits"})
        return output

    def _head(self, hidden: Tensor) -> Any:
        return Deferred(hidden, self.head) if self._deferring else nn.Linear.forward(self.head, hidden)

    def _loss(
        self,
        logits: Any,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """``ForCausalLMLoss`` of transformers, of what the head left."""
        if shift_labels is None:  # tokens before n predict n
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        target_M = shift_labels.reshape(-1)
        reduction = "mean" if num_items_in_batch is None else "sum"
        if isinstance(logits, Deferred):
            loss = self._chunked(logits, target_M.to(logits.hidden.device), ignore_index, reduction)
        else:
            loss = F.cross_entropy(
                logits.float().reshape(-1, vocab_size), target_M.to(logits.device), ignore_index=ignore_index,
                reduction=reduction, label_smoothing=self.label_smoothing if self.model.training else 0.0,
            )  # fmt: skip
        if num_items_in_batch is not None:
            count = num_items_in_batch
            loss = loss / (count.to(loss.device) if isinstance(count, Tensor) else count)
        return loss

    def _chunked(self, deferred: Deferred, target_M: Tensor, ignore_index: int, reduction: str) -> Tensor:
        return linear_cross_entropy(
            deferred.hidden.reshape(-1, deferred.hidden.shape[-1]),
            deferred.weight,
            target_M,
            deferred.bias,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=self.label_smoothing if self.model.training else 0.0,
        )


def _with_head(model: nn.Module) -> nn.Module:
    """The module inside of ``model``, or itself, that has the output head and calls the loss."""
    for module in model.modules():
        # Of the class, since wrappers pass on the attributes of what they wrap.
        if not hasattr(type(module), "loss_function") or not hasattr(type(module), "get_output_embeddings"):
            continue
        head = module.get_output_embeddings()  # type: ignore[operator]
        if isinstance(head, nn.Linear):
            if type(head).forward is not nn.Linear.forward or "forward" in vars(head):
                raise ValueError(
                    f"the chunked loss needs a plain linear output head, not a {type(head).__name__}: {HELP}."
                )
            name = getattr(module.loss_function, "__name__", "")
            if name != "ForCausalLMLoss":
                raise ValueError(
                    f"the chunked loss is for causal language models; the loss of this {type(module).__name__} is "
                    f"{name or module.loss_function}: {HELP}."
                )
            return module
    raise ValueError(
        f"this {type(model).__name__} has no output head whose loss could be chunked; "
        f"it takes a causal language model of transformers: {HELP}."
    )

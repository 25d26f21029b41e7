"""The loss of a causal language model without its logits.

Tokens × vocabulary is often the largest tensor of a training step: in float32, 128 × 256 tokens and 32,000 words are
4 GiB, and there are three of them at the peak. :func:`prac.ops.linear_cross_entropy` goes through the tokens in
chunks and never makes them; this module puts it into a model of transformers. The loss and its gradients are those of
the plain way, to rounding.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from prac.convert.deferred import Deferred, settled
from prac.convert.example import example_for
from prac.convert.head import Call, PuttingOff, calls, outside_graphs, why_not
from prac.ops import linear_cross_entropy
from prac.runtime.fake import faked
from prac.runtime.warn import warn

HELP = "leave the loss as it is (loss=None, or --loss plain)"


class NotChunked(ValueError):
    """A loss that should have been chunked cannot be."""


def is_chunked(loss: Any) -> bool:
    """What the option ``loss`` says.

    Raises:
        ValueError: if it is neither ``"chunked"`` nor None.
    """
    if loss not in (None, "chunked"):
        raise ValueError(f'loss must be "chunked" or None, got {loss!r}; a function of the output is an objective=.')
    return loss is not None


def has_chunked(model: nn.Module) -> bool:
    """Whether some module in it has a chunked loss already."""
    losses = (vars(module).get("_loss_function") for module in model.modules())
    return any(isinstance(getattr(loss, "__self__", None), ChunkedLoss) for loss in losses)


class ChunkedLoss:
    """Puts the chunked loss into a model, and takes it out again.

    In training, when the model is called with ``labels``, its output then has a loss and no logits (None). In eval
    mode, without labels, or under ``no_grad`` nothing changes, unless asked for.

    What is true at the call counts. Where the head or the loss has been replaced since by one that this cannot take the
    place of (adapters on the head, quantisation, another ``loss_function``), or somebody changes the logits on their
    way, the model trains as it would without this, with its logits; one warning says why.

    Args:
        model: one of transformers, or a wrapper of one (PEFT).
        label_smoothing: as for ``F.cross_entropy``; in training alone.
        always: also in eval mode and under ``no_grad``, for evaluations that want the loss alone.
        strict: raise :class:`ValueError` in place of that warning.

    Raises:
        ValueError: if it has no output head, its loss is not the one for causal language models, it changes its
            logits before that, or it has the chunked loss already. The model is then unchanged.
    """

    def __init__(
        self, model: nn.Module, label_smoothing: float = 0.0, *, always: bool = False, strict: bool = False
    ) -> None:
        self.label_smoothing, self.always, self.strict = label_smoothing, always, strict
        caller, head = _with_head(model)
        if not isinstance(head.weight, FakeTensor):
            _try(caller)
        self._install(caller, head)

    def _install(self, model: nn.Module, head: nn.Linear) -> None:
        # Weakly: the model holds this object by its hooks, and a cycle would keep it alive until it is collected.
        self._model, self._head = weakref.ref(model), weakref.ref(head)
        self._warned: set[str] = set()
        self._had = {name: value for name, value in vars(model).items() if name == "_loss_function"}
        model.loss_function = self._loss  # type: ignore[assignment]
        self._hooks = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]
        self._put_off(head)

    def _put_off(self, head: nn.Linear) -> None:
        head.forward = PuttingOff(head, self.always)  # type: ignore[method-assign, assignment]

    def remove(self) -> None:
        """Make the model as it was. What somebody has put in the place of the loss or the head since stays."""
        for hook in self._hooks:
            hook.remove()
        self._release()
        model = self._model()
        if model is not None and vars(model).get("_loss_function") == self._loss:
            del model._loss_function
            vars(model).update(self._had)

    def remark(self) -> str:
        """What is to be said of it under a summary."""
        if self._warned:
            reasons = "; ".join(sorted(self._warned))
            return f"The loss was to be chunked, and calls were made with all of their logits: {reasons}."
        return "The loss goes through the tokens in chunks: of the logits, nothing is kept and nothing returned."

    def _release(self) -> None:
        head = self._head()
        if head is not None and isinstance(vars(head).get("forward"), PuttingOff):
            del head.forward

    # --- a call of the model -----------------------------------------------------------

    def _enter(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self.always or model.training:
            self._begin(model, args, kwargs)

    def _leave(self, model: nn.Module, args: Any, output: Any) -> Any:
        return self._end(model, output) if self.always or model.training else output

    @outside_graphs
    def _begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        calls.innermost()
        call = Call(model)
        calls.stack.append(call)
        labels = kwargs.get("labels")
        if labels is None and args:
            labels = inspect.signature(type(model).forward).bind_partial(model, *args).arguments.get("labels")
        if labels is not None and (self.always or torch.is_grad_enabled()):
            head = self._head_of(model)
            call.of = call.of if head is None else weakref.ref(head)

    def _head_of(self, model: nn.Module) -> nn.Module | None:
        """The output head as it is now, ready to put its logits off; None where the loss is not to be chunked."""
        head = model.get_output_embeddings()  # type: ignore[operator]
        reason = why_not(head)
        if getattr(model, "loss_function", None) != self._loss:
            reason = "its loss was replaced"
        # A replica of DataParallel has heads of its own for one call; otherwise the head was replaced.
        if self._head() is not head and model is self._model():
            self._release()
        if reason:
            self._say(model, reason)
            return None
        forward = vars(head).get("forward")
        if not isinstance(forward, PuttingOff) or forward.of() is not head:
            self._put_off(head)
            if model is self._model():
                self._head = weakref.ref(head)
        return head

    @outside_graphs
    def _end(self, model: nn.Module, output: Any) -> Any:
        call = calls.innermost()
        if call is not None:
            calls.stack.remove(call)
        if call is None or call.of() is None:
            return output
        if not call.taken and output is not None:  # None where forward raised
            self._say(model, "it changes its logits before the loss (soft-capping, scaling) or has a loss of its own")
        return settled(output, call.taken)

    def _say(self, model: nn.Module, reason: str) -> None:
        message = f"the chunked loss is not for this {type(model).__name__}: {reason}"
        if self.strict:
            raise NotChunked(f"{message}: {HELP}.")
        if reason not in self._warned:
            self._warned.add(reason)
            warn(f"{message}. It trains with its logits.")

    # --- the loss ----------------------------------------------------------------------

    @outside_graphs
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
        target_M = shift_labels.reshape(-1).to(logits.device)
        model = self._model()
        how: dict[str, Any] = {
            "ignore_index": ignore_index,
            "reduction": "mean" if num_items_in_batch is None else "sum",
            "label_smoothing": self.label_smoothing if model is not None and model.training else 0.0,
        }
        if isinstance(logits, Deferred) and not logits.touched:
            call = calls.innermost()
            assert call is not None
            call.taken = True
            hidden, weight_VN, bias_V = logits.factors()
            loss = linear_cross_entropy(hidden.reshape(-1, hidden.shape[-1]), weight_VN, target_M, bias_V, **how)
        else:
            logits = logits.logits() if isinstance(logits, Deferred) else logits
            loss = F.cross_entropy(logits.float().reshape(-1, vocab_size), target_M, **how)
        if num_items_in_batch is not None:
            count = num_items_in_batch
            loss = loss / (count.to(loss.device) if isinstance(count, Tensor) else count)
        return loss

    # --- copies ------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_model": self._model(), "_head": self._head()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._model, self._head = weakref.ref(state["_model"]), weakref.ref(state["_head"])


def _with_head(model: nn.Module) -> tuple[nn.Module, nn.Linear]:
    """The module inside of ``model``, or itself, that has the output head and calls the loss; and that head."""
    for module in model.modules():
        # Of the class, since wrappers pass on the attributes of what they wrap.
        if not hasattr(type(module), "loss_function") or not hasattr(type(module), "get_output_embeddings"):
            continue
        head = module.get_output_embeddings()  # type: ignore[operator]
        if isinstance(head, nn.Linear):
            loss = module.loss_function
            if has_chunked(module):
                raise NotChunked(f"this {type(module).__name__} has the chunked loss already.")
            if reason := why_not(head):
                raise NotChunked(f"the chunked loss needs a plain linear output head; {reason}: {HELP}.")
            name = getattr(loss, "__name__", "")
            if name != "ForCausalLMLoss":
                raise NotChunked(
                    f"the chunked loss is for causal language models; the loss of this {type(module).__name__} is "
                    f"{name or loss}: {HELP}."
                )
            return module, head
    raise NotChunked(
        f"this {type(model).__name__} has no output head whose loss could be chunked; "
        f"it takes a causal language model of transformers: {HELP}."
    )


def _try(model: nn.Module) -> None:
    """Find out now, on a copy without numbers, whether the logits reach the loss as they are."""
    example = example_for(model)
    if not isinstance(example, Mapping):
        return
    labels = example.get("decoder_input_ids", example.get("input_ids"))
    try:
        with faked(model, dict(example) | {"labels": labels}) as (twin, batch):
            ChunkedLoss(twin, strict=True)
            twin.train()(**batch)
    except NotChunked:
        raise
    except Exception:  # a made-up input says nothing of a model that will not run on it; the first real one will
        return

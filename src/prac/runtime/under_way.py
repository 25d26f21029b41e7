"""Whether a call of a model is still under way, where nothing says that it ended.

torch runs the hooks at the end of a call also where the call raises, but not for Ctrl-C and ``sys.exit()``, which are
no ``Exception``.
"""

from __future__ import annotations

import sys
import weakref

from torch import nn

_CALL = nn.Module._call_impl.__code__


class UnderWay:
    """The call of ``model`` that begins as this is made, in a hook before its forward. Keeps nothing alive."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._shows = self._is_on_the_stack()  # not where torch.compile has made other frames of it

    def is_over(self) -> bool:
        """Whether it ended, asked in the same thread; False where that cannot be told."""
        return self._shows and not self._is_on_the_stack()

    def _is_on_the_stack(self) -> bool:
        model, frame = self._model(), sys._getframe(1)
        while frame is not None and model is not None:
            if frame.f_code is _CALL and frame.f_locals.get("self") is model:
                return True
            frame = frame.f_back  # type: ignore[assignment]
        return False

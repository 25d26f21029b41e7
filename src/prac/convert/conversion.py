"""What ``compress`` was asked for, turned into layers: at once, and again when more is known of the model."""

from __future__ import annotations

import copy
import difflib
import fnmatch
import weakref
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from prac.config import Config, Rank
from prac.convert import state as saved_state
from prac.convert.plan import Plan
from prac.convert.probe import Structure
from prac.estimators.base import Estimator
from prac.estimators.clock import Clock
from prac.layers import (
    MLP,
    ElementWise,
    Match,
    Source,
    attention,
    layers_of,
    overrides_forward,
    recognise,
    swap,
    unswap,
)
from prac.layers.record import Shared
from prac.runtime.fake import is_fake
from prac.runtime.warn import warn

Filter = str | Sequence[str] | Callable[[nn.Module, str], bool]
Found = dict[str, Match | str | None]
Layers = dict[str, tuple[Match, dict[str, Estimator], Source | None]]
_HALF = "its input lies in one tensor with the product's other factor, which stays in full: compressing it would cost"


class Conversion:
    """The user's wishes, the clock, and why modules were left alone.

    Holds no module and no parameter: what it knows goes with the model.

    Attributes:
        notes: why a module was left alone.
        shared: what all of its layers share.
        is_final: whether the model's structure was known when its layers were made.
        is_undone: whether its layers have been restored.
        state: of a handle, to be taken up as soon as the structure is known.
    """

    def __init__(self, model: nn.Module, config: Config, include: Filter | None, exclude: Filter | None) -> None:
        self.config, self._include, self._exclude = config, include, exclude
        for what, filter in (("include", include), ("exclude", exclude)):
            _check_names(what, filter, [name for name, _ in model.named_modules()])
        self.clock = Clock(model)
        self.notes: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self.shared = Shared()
        self.clock.on_step = self.shared.stepped
        self.is_final = self.is_undone = False
        self.state: dict[str, Any] | None = None
        self._calls: dict[str, int] = {}
        self._kept_anyway: set[str] = set()
        self._layers: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def found(self, model: nn.Module) -> Found:
        """What each module is recognised as, by name."""
        layers = layers_of(model).values()
        for layer in layers:
            layer._prac.suspended = True
        try:
            device = next((p.device for p in model.parameters() if not is_fake(p)), torch.device("cpu"))
            known: dict[Hashable, Match | None] = {}
            return {name: recognise(module, device, known) for name, module in model.named_modules()}
        finally:
            for layer in layers:
                layer._prac.suspended = False

    def names(self, model: nn.Module, found: Found | None = None) -> list[str]:
        """Of the modules whose inputs and outputs matter."""
        found = self.found(model) if found is None else found
        layers = layers_of(model)
        return [name for name, match in found.items() if isinstance(match, Match) or name in layers]

    def plan(self, model: nn.Module, structure: Structure | None, found: Found | None = None) -> Layers:
        """The layers to swap in, by name; the model stays as it is.

        Args:
            model: without layers of prac's.
            structure: where it is known.
            found: by :meth:`found`, where that was asked already.

        Raises:
            ValueError: nothing matched, a rank does not fit a layer, or ``config.layers`` names what keeps nothing.
        """
        config, modules = self.config, dict(model.named_modules())
        found = self.found(model) if found is None else found
        matches = {name: match for name, match in found.items() if isinstance(match, Match)}
        notes = {name: why for name, why in found.items() if isinstance(why, str)}
        known = Structure() if structure is None else structure
        self._calls, self._kept_anyway = known.calls, known.keeps_input
        reasons: dict[str, str | None] = {}
        for name, seen in known.attention.items():
            if isinstance(found.get(name), Match):
                continue
            if not isinstance(seen, str):
                matches[name] = attention.match(seen, config.keep("attention"))
            elif config.attention_bits is not None:
                notes[name] = f"attention in full: {seen}"
        heads = known.heads | _output_embeddings(model, modules)
        # What was called last comes last.
        norms = [name for name in known.calls if name in matches and matches[name].layer.kind == "norm"]
        last = None if config.last_norm or not norms else norms[-1]
        reasons |= {n: self._why_not(n, m, modules, known, heads, last) for n, m in matches.items()}
        reasons |= {name: _HALF for name in self._halves(matches) if reasons.get(name, _HALF) is None}
        if structure is not None:
            self._warn_of_attention(model, structure, notes, reasons)
        chosen = {name: match for name, match in matches.items() if reasons[name] is None}
        plan = Plan(config, chosen, known, [name for name, match in matches.items() if match.shareable])
        reasons |= plan.left_to_others
        chosen = {name: match for name, match in chosen.items() if reasons[name] is None}
        if not chosen:
            skipped = sorted({reason for reason in reasons.values() if reason}) or ["no known layer in it"]
            raise ValueError(f"nothing to compress in this {type(model).__name__}: {'; '.join(skipped)}.")
        layers = {name: (*plan.layer(name, self.clock), plan.sources().get(name)) for name in chosen}
        if structure is not None:
            plan.check_named()
            self.is_final = True
        notes |= {name: reason for name, reason in reasons.items() if reason}
        self.notes.clear()
        self.notes.update({modules[name]: note for name, note in notes.items() if name in modules})
        return layers

    def _halves(self, matches: Mapping[str, Match]) -> Iterator[str]:
        """Activations that read one half of a tensor of which a product that is left alone keeps the other."""
        for name, match in matches.items():
            if match.layer is MLP and not self.config.product:
                roles = match.facts.roles
                if roles.gated and len(roles.into) == 1 and roles.original:
                    yield f"{name}.{roles.original}"

    def _why_not(
        self,
        name: str,
        match: Match,
        modules: dict[str, nn.Module],
        known: Structure,
        heads: set[str],
        last_norm: str | None,
    ) -> str | None:
        """The reason to leave a layer alone although it could be compressed."""
        config, module, kind = self.config, modules[name], match.layer.kind
        parent = modules.get(name.rpartition(".")[0])
        width = known.width.get(name) or next(iter(match.inputs.values()))
        if kind == "attention":
            if config.keep(kind) is None:
                return ""  # nothing to say of it: nobody asked
            if overrides_forward(module):
                return "its forward was replaced on the instance; compress first"
        if _matches(self._exclude, module, name):
            return "excluded"
        if self._include is not None:
            if not _matches(self._include, module, name):
                return "not included"
        elif match.shareable and name in heads:
            return "output head"
        elif name in known.per_sample:
            return "sees one row per sample, not per token"
        by_kind = config.keep(kind) is None and not (config.group is not None and kind != "activation")
        if by_kind and name not in config.layers:
            return f"the config leaves {kind} layers alone"
        if not config.product and match.layer is MLP and match.facts.roles.gated:
            return "the config leaves gated products alone: both factors stay in full"
        if name == last_norm and name not in config.layers:
            return "the norm that runs last stays in full, as the config has it"
        calls = known.calls.get(name, 1)
        if kind == "activation" and calls > 1 and isinstance(config.activation, Rank):
            return f"runs {calls} times in a pass, and one basis would not serve all: give each place its own module"
        if isinstance(parent, nn.MultiheadAttention):
            return "nn.MultiheadAttention uses its weights without calling it"
        if width is not None and width < config.min_width:
            return f"width {width} is below min_width = {config.min_width}"
        return None

    def _warn_of_attention(
        self, model: nn.Module, structure: Structure, notes: dict[str, str], reasons: dict[str, str | None]
    ) -> None:
        if self.config.attention_bits is None:
            return
        asked, whose = f"attention_bits = {self.config.attention_bits}", f"this {type(model).__name__}"
        if not structure.attention:
            text = (
                f"{asked} has no effect on {whose}: no module of it calls torch's scaled_dot_product_attention. "
                "With transformers, load it with attn_implementation='sdpa'."
            )
        else:
            full = {name: str(seen) for name, seen in structure.attention.items() if name in notes}
            full |= {name: why for name in structure.attention if (why := reasons.get(name)) and "min_width" in why}
            if not full:
                return
            why = "; ".join(sorted(set(full.values())))
            text = f"{asked} has no effect on {len(full)} attention modules of {whose} ({next(iter(full))}, …): {why}."
        warn(text)

    def swap(self, model: nn.Module, layers: Layers) -> None:
        """Swap the layers in."""
        self.is_undone = False
        modules = dict(model.named_modules())
        for name, (match, estimators, source) in layers.items():
            module, own = modules[name], modules[name]
            if match.layer is ElementWise and module is not model:
                own = copy.copy(module)
                _replace(model, {module: own})
            swap(own, match, estimators, name=name, source=source, shared=self.shared)
            own._prac.calls, own._prac.kept_anyway = self._calls.get(name, 1), name in self._kept_anyway
            if own is not module:  # others may use it too, also outside of this model
                own._prac.stands_for = module
            self._layers.add(own)

    def again(self, model: nn.Module, structure: Structure) -> None:
        """Swap the layers anew, now that the structure is known; what was kept so far is forgotten."""
        self.restore(model)
        self.shared.is_watched = False
        self.swap(model, self.plan(model, structure))
        if self.state is not None:
            saved_state.take_up(self.state, model, self.clock)
            self.state = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Conversion:
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.clock, twin.shared = copy.deepcopy(self.clock, memo), copy.deepcopy(self.shared, memo)
        twin.notes, twin._layers = weakref.WeakKeyDictionary(), weakref.WeakSet()
        return twin

    def restore(self, model: nn.Module) -> None:
        """Give every module its own class back: those in ``model``, copies too, and those that have left it."""
        originals: dict[nn.Module, nn.Module] = {}
        for module in dict.fromkeys([*model.modules(), *self._layers]):
            if "_prac" in vars(module):  # also where somebody gave it another class since
                record = unswap(module)
                if record.stands_for is not None:
                    originals[module] = record.stands_for
        _replace(model, originals)
        self._layers.clear()
        self.is_undone = True


def _replace(model: nn.Module, others: Mapping[nn.Module, nn.Module]) -> None:
    """Put other modules in the place of some, wherever they are in ``model``."""
    if others:
        for parent in model.modules():
            for name, child in parent._modules.items():
                if child is not None and child in others:
                    parent._modules[name] = others[child]


def _matches(filter: Filter | None, module: nn.Module, name: str) -> bool:
    if callable(filter):
        return bool(filter(module, name))
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _patterns(filter))


def _patterns(filter: Filter | None) -> list[str]:
    if filter is None or callable(filter):
        return []
    return [filter] if isinstance(filter, str) else list(filter)


def _check_names(what: str, filter: Filter | None, names: Sequence[str]) -> None:
    """Raise TypeError for what is no filter, and warn of patterns that match nothing, which are misspelt."""
    is_several = isinstance(filter, Collection) and all(isinstance(each, str) for each in filter)
    if not (filter is None or callable(filter) or is_several):
        raise TypeError(f"{what} must be a pattern, several, or a function of (module, name), got {filter!r}.")
    for pattern in _patterns(filter):
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            like = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
            nearest = f" Its modules have names such as {like[0]!r}." if like else ""
            warn(f"{what}={pattern!r} names no module of the model.{nearest}")


def _output_embeddings(model: nn.Module, modules: dict[str, nn.Module]) -> set[str]:
    # Where the model changes its logits after the head (soft-capping), the probe cannot see it.
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    return {name for name, module in modules.items() if module is head}

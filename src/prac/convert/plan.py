"""Who keeps what: from the config and the structure of a model to an estimator for every tensor."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection
from typing import Any

from prac.config import Bits, Config, Factors, Keep, Rank
from prac.convert.probe import Structure
from prac.estimators.base import Estimator
from prac.estimators.clock import Clock
from prac.estimators.factors import Decomposed
from prac.estimators.rounded import Stored
from prac.estimators.subspace import Subspace
from prac.layers import MAKER, MLP, ElementWise, Match, Source

# For the exact scalar of a norm whose x̂ is kept at a rank, its readers' outputs are rounded without bias. Four
# bits leave a relative error of 0.13 / √n in the scalar.
SCALAR = Bits(4)
INSIDE = "runs inside its MLP"


class Plan:
    """The policy applied to one model.

    With ``config.group`` a tensor is kept once, by whoever makes it, and those that read it take it from there:
    a norm's x̂ serves the linear layers behind it, g and u (or the input of a GELU) serve the projection that
    reads what is computed from them, and what attention keeps serves the projection of its output.
    Without, every layer keeps its own input, and only linear layers share.

    Args:
        config: the policy.
        chosen: the modules to compress, by name.
        structure: what is known of the model.
        linears: all linear layers, chosen or not.
    """

    def __init__(
        self, config: Config, chosen: dict[str, Match], structure: Structure, linears: Collection[str]
    ) -> None:
        self.config, self.structure = config, structure
        self.left_to_others: dict[str, str] = {}
        together = config.group is not None
        self._matches = dict(chosen)
        self._linears = set(linears)
        self._readers = {
            norm: [name for name in structure.readers(norm) if name in chosen and chosen[name].shareable]
            for norm, match in chosen.items()
            if together and match.layer.kind == "norm"
        }
        self._as_one: dict[str, list[str]] = {}
        for name in [n for n, match in chosen.items() if match.layer is MLP]:
            self._settle_mlp(name)
        for name in [n for n, match in chosen.items() if match.layer is ElementWise]:
            readers = [r for r in structure.readers(name) if r in chosen and chosen[r].shareable]
            if name in structure.keeps_input and not readers:
                self.left_to_others[name] = "its input is kept in full by others anyway, so compressing it would cost"
        self._sources = self._from_attention(together) | (self._find_sources() if together else {})
        for name, match in chosen.items():
            if self._keep(name) is None and name not in self._sources and name not in self.left_to_others:
                self.left_to_others[name] = f"the config leaves {match.layer.kind} layers alone"
        self._leaders: dict[Any, Estimator] = {}
        self._keeps_own: set[str] = set()  # of the layers made so far, those that config.layers may name

    def _settle_mlp(self, name: str) -> None:
        """An MLP takes over its activation; one without a gate only where it can run as one operation."""
        match = self._matches[name]
        roles = match.facts.roles
        inside = [f"{name}.{child}" for child in (*roles.into, roles.down)]
        norm = next((n for n, readers in self._readers.items() if readers and set(inside[:-1]) <= set(readers)), None)
        if norm is not None and isinstance(self.config.activation, Bits) and inside[-1] in self._matches:
            self._as_one[name] = inside
        if roles.gated or name in self._as_one:
            if roles.original:
                self.left_to_others[f"{name}.{roles.original}"] = INSIDE
        else:
            self.left_to_others[name] = "its layers are compressed one by one"

    def _find_sources(self) -> dict[str, Source]:
        sources: dict[str, Source] = {}
        for norm, readers in self._readers.items():
            sources |= dict.fromkeys(readers, Source(norm, "x̂"))
        for name, match in self._matches.items():
            if name in self.left_to_others or not isinstance(self.config.activation, Bits):
                continue
            if match.layer is MLP:
                roles = match.facts.roles
                of_mlp = Source(name, "g and u" if roles.gated else "its hidden layer")
                sources |= dict.fromkeys(self._readers_in(f"{name}.{roles.down}"), of_mlp)
            elif match.layer is ElementWise:
                readers = [r for r in self.structure.readers(name) if r in self._matches and self._matches[r].shareable]
                sources |= dict.fromkeys(readers, Source(name, "its input"))
        return {name: source for name, source in sources.items() if name in self._matches}

    def _readers_in(self, down: str) -> list[str]:
        """The layer, or of a wrapper (an adapter) those inside it that read what it reads."""
        inside = [n for n in self.structure.reads if n == down or n.startswith(f"{down}.")]
        return [n for n in inside if self.structure.reads[n] == self.structure.reads[inside[0]]] or [down]

    def _from_attention(self, together: bool) -> dict[str, Source]:
        """What attention keeps anyway; the paper's way has use for it only where it is in few bits."""
        if not together and (self.config.attention_bits is None or self.config.linear is None):
            return {}
        read = [n for n, match in self._matches.items() if match.shareable and n in self.structure.keeps_input]
        makers = self.structure.from_keeper
        return {name: Source("", MAKER if name in makers else "another operation") for name in read}

    def qualifies(self, norm: str) -> bool:
        """Whether every use of a norm's output is a linear layer that takes it from the norm."""
        return bool(self._readers[norm]) and self.structure.edges.get(norm) == len(self._readers[norm])

    def sources(self) -> dict[str, Source]:
        """For every layer that keeps no input of its own, where it has it from."""
        return self._sources

    def check_named(self) -> None:
        """Whether ``config.layers`` names what is kept; asked when every layer is made.

        Raises:
            ValueError: naming those that keep nothing of their own that a linear use follows, and why.
        """
        wrong = [f"{name} ({self._why_not(name)})" for name in self.config.layers if name not in self._keeps_own]
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise ValueError(
                f"config.layers names what keeps no tensor of its own: {'; '.join(wrong[:5])}{more}. Name the norm of "
                "a group, and of linear layers that share an input the first; handle.summary() shows which they are."
            )

    def _why_not(self, name: str) -> str:
        if name not in self._matches or name in self.left_to_others:
            return self.left_to_others.get(name, "no layer that is compressed")
        if source := self._sources.get(name):
            return f"has its input from {source.what}" + (f" of {source.name}" if source.name else "")
        match = self._matches[name]
        if match.layer.kind in ("activation", "attention"):
            return f"{match.layer.kind}, kept as its kind is"
        return f"shares the input of {self._leaders[self.structure.reads[name]].name}"

    def _keep(self, name: str) -> Keep | None:
        if name in self.config.layers:
            return self.config.layers[name]
        kind = self._matches[name].layer.kind
        if kind == "norm" and name in self._readers and self.qualifies(name):
            return self.config.group
        return self.config.keep(kind)

    def layer(self, name: str, clock: Clock) -> tuple[Match, dict[str, Estimator]]:
        """The layer to swap in, and its estimators."""
        match = self._matches[name]
        if self.config.group is not None and match.grouped is not None:
            match = dataclasses.replace(match, layer=match.grouped)
        source = self._sources.get(name)
        estimators: dict[str, Estimator] = {}
        for tensor, known_width in match.inputs.items():
            width = known_width or self.structure.width.get(name)
            full_name = name if tensor == "x" else f"{name}:{tensor}"
            if source is not None:
                # Used only where the source is not what the probe saw, or keeps nothing (a frozen norm of an input
                # that needs no gradient): then x is kept here.
                linear, group = self.config.linear, self.config.group
                own_bits = linear if isinstance(linear, Bits) else group if isinstance(group, Bits) else Bits(8)
                own = Stored(own_bits, clock, unbiased=True, name=full_name, seed=self.config.seed)
                estimators[tensor] = self._leaders.setdefault(("instead of", self.structure.reads.get(name, name)), own)
                continue
            # What is followed by a nonlinearity: the inputs of activations, and q and k of attention.
            nonlinear = match.layer.kind == "activation" or tensor in ("q", "k")
            estimator = self._estimator(self._keep(name), name, not nonlinear, width, full_name, clock)
            shared = match.shareable and name in self.structure.reads
            estimators[tensor] = (
                self._leaders.setdefault(self.structure.reads[name], estimator) if shared else estimator
            )
            if estimators[tensor] is estimator and match.layer.kind in ("linear", "norm"):
                self._keeps_own.add(name)
        in_mlp = any(name in inside for inside in self._as_one.values())
        if source is not None and source.what == "x̂" and not in_mlp and isinstance(self._keep(source.name), Rank):
            anyway = name in self.structure.keeps_output and self.config.attention_bits is None
            bits = None if anyway else SCALAR
            estimators["y"] = Stored(bits, clock, unbiased=True, name=f"{name}:y", seed=self.config.seed)
        return match, estimators

    def _estimator(
        self, keep: Keep | None, layer: str, linear: bool, width: int | None, name: str, clock: Clock
    ) -> Estimator:
        config = self.config
        if isinstance(keep, Bits):
            return Stored(keep, clock, unbiased=linear, name=name, seed=config.seed, width=width)
        assert keep is not None
        own: dict[str, Any] = {"width": width, "name": name, "seed": config.seed, "factored": config.factored}
        if isinstance(keep, Factors):
            return Decomposed(keep, clock, **own)
        growth = 0.0 if self._matches[layer].layer.kind == "linear" else config.growth
        found = Subspace(keep, clock, T1=config.T1, T2=config.T2, growth=growth, hidden=self._hidden(layer), **own)
        found.renormalise = config.renormalise
        return found

    def _hidden(self, name: str) -> int | None:
        """The width that the linear layer before ``name`` reads; of an MLP its own input's.

        Where that is inside a module beside ``name``, such as an adapter's wrapper, the first in there is meant.
        """
        reads, width = self.structure.reads, self.structure.width
        if name not in reads or self._matches[name].layer is MLP:
            return width.get(name)
        before = [n for n in itertools.takewhile(lambda n: n != name, reads) if n in self._linears]
        if not before:
            return None
        last, ours = before[-1].split("."), name.split(".")
        shared = next((i for i, (a, b) in enumerate(zip(last, ours, strict=False)) if a != b), 0)
        beside = last[: shared + 1]
        return next(width.get(n) for n in before if n.split(".")[: shared + 1] == beside)

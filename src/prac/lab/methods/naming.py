"""Methods by name: what is kept how, by which optimizer it is trained, and what a user would pick instead.

A name is a base and modifiers: ``lean``, ``checkpoint``, ``paper+muon``, ``lean+checkpoint2``, ``compile0.5``. Every
command takes the same names.

>>> parse("paper+muon").optimizer, parse("lean+checkpoint2").checkpoint
('muon', 2)
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from prac.config import Config
from prac.presets import PRESETS

# Bases beside the presets. All but the last two change what is kept and nothing else.
PEERS = ("plain", "checkpoint", "selective", "compile", "offload", "galore", "velora")
MODIFIERS = ("checkpoint[K]", "selective", "compile[BUDGET]", "offload", "attention8", "muon", "adam-mini", "lora")
COMPILED = "+compile"
# Whose moments live in a subspace, and what becomes of them when it changes.
SUBSPACE = {"compact": "reproject", "rso": "reset"}


@dataclass(frozen=True)
class Method:
    """One way to train.

    Args:
        name: as it was given.
        config: what prac compresses; None where it does not.
        optimizer: ``adamw``, ``muon``, ``adam-mini``, ``galore``, or SubspaceAdamW's ``reproject`` or ``reset``.
        checkpoint: recompute every so many-th block; 0 for none.
        selective: recompute within blocks all but matrix products and attention.
        compiled: with torch.compile.
        budget: of memory that torch.compile may use for activations, of what it would (1.0); None leaves it alone.
        offload: keep what autograd saves in CPU memory.
        lora: train LoRA adapters on frozen weights (peft).
        velora: VeLoRA's adapters, which keep their input at rank 1 by groups (peft).
    """

    name: str
    config: Config | None = None
    optimizer: str = "adamw"
    checkpoint: int = 0
    selective: bool = False
    compiled: bool = False
    budget: float | None = None
    offload: bool = False
    lora: bool = False
    velora: bool = False

    @property
    def base(self) -> str:
        """The name without modifiers."""
        return self.name.split("+")[0]


def parse(name: str) -> Method:
    """The method of a name.

    Raises:
        ValueError: for an unknown base or modifier, or two optimizers; the message lists what there is.
    """
    base, *modifiers = name.split("+")
    if base in PRESETS:
        method = Method(name, PRESETS[base], SUBSPACE.get(base, "adamw"))
    elif base == "plain":
        method = Method(name)
    elif base == "galore":
        method = Method(name, optimizer="galore")
    elif base == "velora":
        method = Method(name, lora=True, velora=True)
    else:  # a modifier of plain
        method = _with(Method(name), base, name)
    for modifier in modifiers:
        method = _with(method, modifier, name)
    return method


def _with(method: Method, modifier: str, name: str) -> Method:
    if modifier in ("muon", "adam-mini"):
        if method.optimizer != "adamw":
            raise ValueError(f"{name}: {method.base} comes with an optimizer of its own; leave {modifier} out.")
        return dataclasses.replace(method, optimizer=modifier)
    if modifier in ("selective", "offload", "lora"):
        return dataclasses.replace(method, **{modifier: True})  # type: ignore[arg-type]
    if found := re.fullmatch(r"checkpoint([1-9]\d*)?", modifier):
        return dataclasses.replace(method, checkpoint=int(found[1] or 1))
    if found := re.fullmatch(r"compile(0(?:\.\d+)?|1(?:\.0+)?)?", modifier):
        return dataclasses.replace(method, compiled=True, budget=float(found[1]) if found[1] else None)
    if (found := re.fullmatch(r"attention([468])", modifier)) and method.config is not None:
        return dataclasses.replace(method, config=method.config.replace(attention_bits=int(found[1])))
    raise ValueError(f"unknown method {name!r}; {CHOICES}.")


CHOICES = f"choose from {', '.join((*PEERS, *PRESETS))}, with any of +{', +'.join(MODIFIERS)}"


def names(given: list[str]) -> list[str]:
    """Names given apart or with commas between them, each once, all known.

    Raises:
        ValueError: for the first that is not.
    """
    found = list(dict.fromkeys(name for each in given for name in each.split(",") if name))
    for name in found:
        parse(name)
    return found

"""One small model of transformers: its class, its configuration, a batch to train it on."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
import transformers
from torch import nn

SAMPLES, LENGTH, VOCAB, WIDTH, HEADS, LAYERS = 4, 32, 128, 64, 4, 2
IGNORED = -100  # the label that no loss counts

Batch = dict[str, Any]
Nested = Mapping[str, Any]


def seed(number: int) -> None:
    """Of torch, Python and numpy: models of speech draw their masks from the last."""
    torch.manual_seed(number)
    random.seed(number)
    numpy.random.seed(number)


@dataclass(frozen=True)
class Architecture:
    """A model by the ``model_type`` that transformers knows it by.

    Attributes:
        of_class: the model's class, one with a loss where the architecture has one.
        kind: what it is for a table: decoder, encoder, mixture of experts, …
        config: what differs from the configuration's own defaults; parts are mappings with a ``model_type``.
        batch: makes a training batch for a model.
    """

    name: str
    of_class: str
    kind: str
    batch: Callable[[nn.Module], Batch]
    config: Nested = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The model in training mode, with random weights that are the same every time."""
        seed(0)
        config = transformers.AutoConfig.for_model(self.name, **self.config)
        return getattr(transformers, self.of_class)(config).train()

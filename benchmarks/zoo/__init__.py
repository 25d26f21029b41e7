"""Small models of many architectures of transformers, each with a batch to train on."""

from zoo.architecture import Architecture, Batch, seed
from zoo.sound import SOUND
from zoo.text import TEXT
from zoo.vision import VISION

ARCHITECTURES = {architecture.name: architecture for architecture in (*TEXT, *VISION, *SOUND)}

__all__ = ["ARCHITECTURES", "Architecture", "Batch", "seed"]

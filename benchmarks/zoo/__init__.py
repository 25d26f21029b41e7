"""Small models of many architectures of transformers, each with a batch to train on."""

from zoo.architecture import Architecture, Batch, seed
from zoo.pictures import PICTURES
from zoo.readers import READERS
from zoo.sound import SOUND
from zoo.text import TEXT

ARCHITECTURES = {architecture.name: architecture for architecture in (*TEXT, *PICTURES, *READERS, *SOUND)}

__all__ = ["ARCHITECTURES", "Architecture", "Batch", "seed"]

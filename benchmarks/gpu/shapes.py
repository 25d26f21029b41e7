"""What is measured on a GPU: one block of a LLaMA, whole LLaMAs of random weights, a model that is trained on text.

Each has a real size and a toy's. A toy goes the same way on a CPU in a second and says nothing about time or memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from prac.lab.materials.blocks import Shape


@dataclass(frozen=True)
class Model:
    """A LLaMA, in the names of ``LlamaConfig``."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool = False


@dataclass(frozen=True)
class Batch:
    """What goes through a model at each step."""

    sequences: int
    sequence_length: int


@dataclass(frozen=True)
class Training:
    """How the loss is compared: how many steps of what, and how often the loss on unseen text is taken."""

    batch: Batch
    steps: int
    validation_every: int
    validation_sequences: int
    learning_rate: float = 1e-3
    autocast: bool = True  # to bfloat16


BLOCKS = {
    "block": Shape("llama", hidden=2048, intermediate=5472, heads=32, tokens=32_768, sequence_length=256),
    "block4096": Shape("llama", hidden=4096, intermediate=14_336, heads=32, tokens=16_384, sequence_length=2048),
}
TOY_BLOCKS = {
    "block": Shape("llama", hidden=64, intermediate=96, heads=2, tokens=64, sequence_length=32),
    "block4096": Shape("llama", hidden=64, intermediate=128, heads=2, tokens=64, sequence_length=64),
}

# LLaMA-1B with an MLP of 5,504: at the 5,461 that was published, torch's products run three times slower in bf16.
MODELS = {
    "llama-1b-5504": (Model(2048, 5504, 24, 32, 32, 32_000), Batch(64, 256)),
    "llama-3.2-1b": (Model(2048, 8192, 16, 32, 8, 128_256, tie_word_embeddings=True), Batch(8, 2048)),
    "llama-8b-4layers": (Model(4096, 14_336, 4, 32, 8, 128_256), Batch(4, 4096)),
}
TOY_MODELS = {
    "llama-1b-5504": (Model(64, 96, 1, 2, 2, 128), Batch(2, 32)),
    "llama-3.2-1b": (Model(64, 128, 2, 2, 1, 128, tie_word_embeddings=True), Batch(1, 64)),
}

# Pre-training by the paper's own sizes (its Table 7), each at the learning rate that a short run was best at; and
# a model so small that every way to refresh can be tried.
PRETRAINED = {
    "llama-60m": (Model(512, 1376, 8, 8, 8, 32_000), Training(Batch(128, 256), 600, 50, 512)),
    "llama-130m": (Model(768, 2048, 12, 12, 12, 32_000), Training(Batch(128, 256), 600, 50, 512)),
}
SHORT = Training(Batch(128, 256), 120, 120, 512)
GRID = (0.0006, 0.0008, 0.001, 0.002, 0.004)  # of Appendix D.1
TINY = (Model(192, 512, 4, 4, 4, 4096), Training(Batch(16, 128), 260, 26, 512, 2e-3, autocast=False))
TOY_PRETRAINED = {"llama-60m": (Model(64, 96, 2, 2, 2, 256), Training(Batch(4, 32), 6, 3, 8))}
TOY_SHORT = Training(Batch(4, 32), 3, 3, 8)
TOY_TINY = (Model(64, 96, 2, 2, 2, 256), Training(Batch(4, 32), 4, 2, 8, autocast=False))

# LLaMA-130M; its vocabulary is that of the text.
TRAINED = Model(768, 2048, 12, 12, 12, 32_000)
TOY_TRAINED = Model(64, 96, 1, 2, 2, 256)
TRAINING = Training(Batch(128, 256), steps=700, validation_every=100, validation_sequences=512)
TOY_TRAINING = Training(Batch(4, 32), steps=20, validation_every=10, validation_sequences=8)

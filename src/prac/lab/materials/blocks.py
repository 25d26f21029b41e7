"""One transformer block of ``transformers``, alone: its shape, its weights, its input.

>>> shape("llama", hidden=1024, tokens=2048).intermediate
2736
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

FAMILIES = ("llama", "gpt2")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """The sizes of a block and of its input.

    Args:
        family: ``llama`` (RMSNorm, rotary attention, gated MLP) or ``gpt2`` (LayerNorm, biases, GELU).
        hidden: n, features of the block's input.
        intermediate: m, features between the two products of the MLP.
        heads: of attention; as many for keys and values as for queries.
        tokens: M, of all sequences together.
        sequence_length: tokens per sequence.
    """

    family: str
    hidden: int
    intermediate: int
    heads: int
    tokens: int
    sequence_length: int

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"unknown block {self.family!r}; choose one of {', '.join(FAMILIES)}.")
        if self.hidden < 32:
            raise ValueError(f"hidden must be at least 32, got {self.hidden}.")
        for name in ("intermediate", "heads", "tokens", "sequence_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.hidden % self.heads:
            raise ValueError(f"{self.heads} heads do not divide hidden = {self.hidden}; give --heads a divisor of it.")
        if self.family == "llama" and self.hidden // self.heads % 2:
            raise ValueError(
                f"rotary embeddings turn pairs of features, and hidden / heads = {self.hidden // self.heads} is odd; "
                "give --heads another value."
            )
        if self.tokens % self.sequence_length:
            raise ValueError(
                f"sequences of {self.sequence_length} do not divide {self.tokens} tokens; "
                "give --sequence-length a divisor of --tokens."
            )


def shape(
    family: str,
    hidden: int,
    tokens: int,
    sequence_length: int = 256,
    intermediate: int | None = None,
    heads: int | None = None,
) -> Shape:
    """A :class:`Shape` with the usual widths: 8/3 n, up to a multiple of 16, in a gated MLP, else 4 n; 64 a head.

    Raises:
        ValueError: if the sizes do not go together.
    """
    usual = 16 * math.ceil(round(8 / 3 * hidden) / 16) if family == "llama" else 4 * hidden
    return Shape(
        family=family,
        hidden=hidden,
        intermediate=usual if intermediate is None else intermediate,
        heads=max(1, hidden // 64) if heads is None else heads,
        tokens=tokens,
        sequence_length=sequence_length,
    )


class Block(nn.Module):
    """A decoder layer with causal attention as a function of one tensor, (B, S, n) to (B, S, n).

    Attributes:
        layer: the layer of ``transformers``.
        around: runs in place of :meth:`run` where set, such as a checkpointed ``run``.
    """

    def __init__(self, layer: nn.Module, cos: Tensor | None = None, sin: Tensor | None = None) -> None:
        super().__init__()
        self.layer = layer
        # A model makes the rotary tables once for all of its layers, so they are no activation of this one.
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.around: Callable[[Tensor], Tensor] | None = None

    def run(self, x: Tensor) -> Tensor:
        """The layer itself."""
        rotary = {} if self.cos is None else {"position_embeddings": (self.cos, self.sin)}
        y: Tensor = self.layer(x, **rotary)
        return y

    def forward(self, x: Tensor) -> Tensor:
        """The layer, on an input that is made here: whoever keeps it keeps an activation, as inside a model."""
        x = x + 0.0
        return self.run(x) if self.around is None else self.around(x)


def build(
    shape: Shape, *, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> tuple[Block, tuple[Tensor, Tensor]]:
    """A block in training mode, and what goes through it.

    Everything is drawn on the CPU in fp32, so that a seed means the same numbers on every device.

    Returns:
        The block; and its input x, a leaf that needs a gradient, with dy, the gradient of its output: both (B, S, n)
        and standard normal.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # their constructors draw from the user's generator
        block = _llama(shape) if shape.family == "llama" else _gpt2(shape)
    _initialise(block, generator)
    block = block.to(device=device, dtype=dtype).train()
    size = (shape.tokens // shape.sequence_length, shape.sequence_length, shape.hidden)
    x, dy = (torch.randn(size, generator=generator).to(device=device, dtype=dtype) for _ in range(2))
    return block, (x.requires_grad_(), dy)


@torch.no_grad()
def _initialise(block: Block, generator: torch.Generator) -> None:
    """Matrices as ``transformers`` draws them; norms a little off 1 and biases off 0, as after some training.

    At exactly 1 and 0 a gradient that forgets them would look right.
    """
    for name, parameter in block.named_parameters():
        draw = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1 or name.endswith("bias"):
            parameter.copy_(0.02 * draw)
        else:
            parameter.copy_(1 + 0.1 * draw)


def _llama(shape: Shape) -> Block:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_hidden_layers=1,
        max_position_embeddings=shape.sequence_length,
        attn_implementation="sdpa",
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.empty(0), torch.arange(shape.sequence_length)[None])
    return Block(LlamaDecoderLayer(config, 0), cos, sin)


def _gpt2(shape: Shape) -> Block:
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block

    config = GPT2Config(
        n_embd=shape.hidden,
        n_inner=shape.intermediate,
        n_head=shape.heads,
        n_layer=1,
        n_positions=shape.sequence_length,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="sdpa",
    )
    return Block(GPT2Block(config, 0))

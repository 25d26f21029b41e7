"""Small models of every supported family, with a batch for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prac
from prac.layers import Compressed

N, M, LAYERS, VOCAB = 32, 48, 2, 97
IDS = torch.randint(3, VOCAB, (4, 17), generator=torch.Generator().manual_seed(0))
TEXT: dict[str, Any] = {"input_ids": IDS}
COMMON = dict(hidden_size=N, intermediate_size=M, num_hidden_layers=LAYERS, num_attention_heads=4, vocab_size=VOCAB)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**COMMON))


def mistral() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**COMMON, num_key_value_heads=2))


def qwen2() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**COMMON, num_key_value_heads=2))


def qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**COMMON, num_key_value_heads=2, head_dim=8))


def gemma2() -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(Gemma2Config(**COMMON, num_key_value_heads=2, head_dim=8, attn_implementation="eager"))


def phi3() -> nn.Module:
    from transformers import Phi3Config, Phi3ForCausalLM

    return Phi3ForCausalLM(Phi3Config(**COMMON, pad_token_id=0))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=N, n_inner=M, n_layer=LAYERS, n_head=4, n_positions=32, vocab_size=VOCAB, **dropout)
    )


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**COMMON, **NO_DROPOUT))


def roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaForMaskedLM

    return RobertaForMaskedLM(RobertaConfig(**COMMON, **NO_DROPOUT, max_position_embeddings=40))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {k: v for k, v in COMMON.items() if k != "vocab_size"}
    return ViTForImageClassification(ViTConfig(**sizes, **NO_DROPOUT, image_size=24, patch_size=6, num_labels=5))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(d_model=N, d_ff=M, d_kv=8, num_layers=LAYERS, num_heads=4, vocab_size=VOCAB, dropout_rate=0.0,
                 feed_forward_proj="gated-gelu", decoder_start_token_id=0)
    )  # fmt: skip


def encoder() -> nn.Module:
    """torch's own encoder layers, with the activation as a module."""
    layer = nn.TransformerEncoderLayer(N, 4, M, dropout=0.0, activation=nn.GELU(), batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)


class FeedForward(nn.Module):
    """A gated MLP as people write it by hand: no activation module, names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(N, M, False), nn.Linear(M, N, False), nn.Linear(N, M, False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(N), nn.RMSNorm(N)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(N, N, False) for _ in range(4))
        self.mlp = FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (w(h).unflatten(-1, (4, N // 4)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.wo(a)
        return x + self.mlp(self.norm2(x))


def plain() -> nn.Module:
    """A decoder in plain PyTorch that follows nobody's conventions."""
    return nn.Sequential(nn.Embedding(VOCAB, N), *(Block() for _ in range(LAYERS)), nn.RMSNorm(N), nn.Linear(N, VOCAB))


PIXELS = {"pixel_values": torch.randn(6, 3, 24, 24, generator=torch.Generator().manual_seed(0))}
HIDDEN = {"src": torch.randn(4, 17, N, generator=torch.Generator().manual_seed(0))}

FAMILIES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "llama": (llama, TEXT),
    "mistral": (mistral, TEXT),
    "qwen2": (qwen2, TEXT),
    "qwen3": (qwen3, TEXT),
    "gemma2": (gemma2, TEXT),
    "phi3": (phi3, TEXT),
    "gpt2": (gpt2, TEXT),
    "bert": (bert, TEXT),
    "roberta": (roberta, TEXT),
    "vit": (vit, PIXELS),
    "t5": (t5, TEXT | {"labels": IDS}),
    "encoder": (encoder, HIDDEN),
    "plain": (plain, {"input": IDS}),
}


def build(family: str, seed: int = 0) -> nn.Module:
    """A model in training mode whose weights are all random, biases and norms too."""
    torch.manual_seed(seed)
    model = FAMILIES[family][0]()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.train()


# Everything of every kind at a rank of its own width: what most tests of layers and loops are about.
PAPER = prac.PRESETS["paper-product"].replace(min_width=8, last_norm=True, growth=0.0)
BATCH = {"input_ids": IDS, "labels": IDS}


def compressed_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, Compressed)}


def train(model: nn.Module, steps: int, lr: float = 0.05, micro: int = 1) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        for _ in range(micro):
            value = model(**BATCH).loss
            value.backward()
        losses.append(value.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses

"""The models of the paper's Table 7 by name, and any other by folder or hub name.

>>> SIZES["llama-130m"].hidden
768
>>> SIZES["llama-128x4"].layers
4
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Recipe:
    """How a model is trained unless told otherwise.

    ``batch_size`` is per device and ``lr`` the peak of the schedule; ``warmup`` is a fraction of ``steps``.
    ``interval`` is how many of them pass between the subspaces of methods whose optimizer lives in one; ``None`` for
    the methods' own.
    """

    steps: int
    batch_size: int
    grad_accum: int
    seq_len: int
    lr: float
    warmup: float = 0.1
    interval: int | None = None


@dataclass(frozen=True)
class Size:
    """One row of Table 7: the architecture and how it is trained from scratch."""

    family: Literal["llama", "gpt2"]
    hidden: int
    intermediate: int
    heads: int
    layers: int
    recipe: Recipe


class _Sizes(dict[str, Size]):
    """Sizes by name; also finds ``llama-HIDDENxLAYERS``, which it does not list."""

    def __missing__(self, name: str) -> Size:
        if (size := _by_shape(name)) is None:
            raise KeyError(name)
        return size

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and _by_shape(name) is not None)


def _by_shape(name: str) -> Size | None:
    """``llama-128x4``: a LLaMA of width 128 with 4 layers and heads of 32, trained like ``llama-tiny``.

    Raises:
        ValueError: if the name has this form and no model does.
    """
    found = re.fullmatch(r"llama-(\d+)x(\d+)", name)
    if found is None:
        return None
    hidden, layers = int(found[1]), int(found[2])
    if hidden < 32 or hidden % 32 or layers < 1:
        raise ValueError(
            f"{name}: in llama-HIDDENxLAYERS, HIDDEN is a multiple of 32 (heads of 32), LAYERS at least 1."
        )
    intermediate = -(-8 * hidden // (3 * 16)) * 16
    return Size("llama", hidden, intermediate, hidden // 32, layers, SIZES["llama-tiny"].recipe)


# Appendix D.1: sequences of 256 (1024 for GPT-2), 512 a step. Table 2: micro-batches of 128 (64 and 32 for GPT-2).
# Learning rates: one of the paper's grid for LLaMA, those of nanoGPT for GPT-2; the paper does not name its choices.
def _llama(steps: int) -> Recipe:
    return Recipe(steps=steps, batch_size=128, grad_accum=4, seq_len=256, lr=1e-3)


SIZES: dict[str, Size] = _Sizes()
SIZES |= {
    # Not in the paper: small enough for a laptop. A run this short sees few subspaces.
    "llama-tiny": Size("llama", 192, 512, 4, 4, Recipe(260, 16, 1, 128, 2e-3, interval=50)),
    "llama-35m": Size("llama", 384, 1024, 8, 6, _llama(5_000)),
    "llama-60m": Size("llama", 512, 1376, 8, 8, _llama(10_000)),
    "llama-130m": Size("llama", 768, 2048, 12, 12, _llama(20_000)),
    "llama-350m": Size("llama", 1024, 2736, 16, 24, _llama(60_000)),
    # Table 7 has heads and layers of this row swapped: 2048 is not divisible by 24.
    "llama-1b": Size("llama", 2048, 5461, 32, 24, _llama(150_000)),
    "gpt2-124m": Size("gpt2", 768, 3072, 12, 12, Recipe(50_000, 64, 8, 1024, 6e-4, warmup=0.04)),
    "gpt2-355m": Size("gpt2", 1024, 4096, 16, 24, Recipe(50_000, 32, 16, 1024, 3e-4, warmup=0.04)),
}

HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
HUB_SECONDS = 10
# Models of the hub that look like a size and are older than owners' names.
WITHOUT_OWNER = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2", "openai-gpt")

# For models that bring their weights.
FINE_TUNING = Recipe(steps=1_000, batch_size=8, grad_accum=1, seq_len=256, lr=3e-5)


def recipe(model: str) -> Recipe:
    """How ``model`` is trained unless told otherwise."""
    return SIZES[model].recipe if model in SIZES else FINE_TUNING


def build(model: str, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> PreTrainedModel:
    """A model for ``tokenizer``: a size with fresh weights drawn from torch's generator, or a pretrained one.

    Raises:
        ValueError: if the name is unknown, or the model does not fit the tokenizer or ``seq_len``.
    """
    network = _from_scratch(SIZES[model], tokenizer, seq_len) if model in SIZES else _pretrained(model)
    limit = getattr(network.config, "max_position_embeddings", None)
    if limit is not None and seq_len > limit:
        raise ValueError(f"{model} takes at most {limit} tokens, got a sequence length of {seq_len}: lower --seq-len.")
    vocabulary = network.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"{model} knows {vocabulary} tokens, the tokenizer has {len(tokenizer)}: "
            "leave out --tokenizer to use the model's own."
        )
    return network


def _from_scratch(size: Size, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    network: PreTrainedModel = AutoModelForCausalLM.from_config(architecture(size, len(tokenizer), seq_len, **special))
    return network


def architecture(size: Size, vocabulary: int, seq_len: int, **more: Any) -> PreTrainedConfig:
    """The config of a size, for so many tokens in the vocabulary and in a sequence."""
    from transformers import GPT2Config, LlamaConfig

    if size.family == "llama":
        return LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_attention_heads=size.heads,
            num_hidden_layers=size.layers,
            max_position_embeddings=max(2048, seq_len),
            **more,
        )
    return GPT2Config(
        vocab_size=vocabulary,
        n_embd=size.hidden,
        n_inner=size.intermediate,
        n_head=size.heads,
        n_layer=size.layers,
        # As nanoGPT, which takes the exact GELU, as one kernel, and pre-trains without dropout.
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **more,
    )


def without_weights(model: str, seq_len: int, dtype: torch.dtype) -> PreTrainedModel:
    """A size, or any causal language model by folder or hub name, on the meta device; no weights are read.

    Sizes get the paper's vocabularies: 32,000 tokens for LLaMA, 50,257 for GPT-2.

    Raises:
        ValueError: if the name is unknown.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    check(model)
    if model in SIZES:
        size = SIZES[model]
        # 0 and 1 rather than the ids of some tokenizer; memory does not depend on them.
        config = architecture(
            size, 32_000 if size.family == "llama" else 50_257, seq_len, bos_token_id=0, eos_token_id=1
        )
    else:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    with torch.device("meta"):
        network: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return network


def _pretrained(model: str) -> PreTrainedModel:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        network: PreTrainedModel
        network, loaded = AutoModelForCausalLM.from_pretrained(
            model, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except SafetensorError as error:
        raise ValueError(
            f"the weights of {model} are cut off or damaged ({_line(error)}): {_damaged(model)}. Restore it from a "
            "copy, or download it again."
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{model} is no causal language model with safetensors weights: {_line(error)}") from error
    if missing := sorted(loaded["missing_keys"]):
        print(
            f"prac: {model} has no weights for {', '.join(missing)[:200]}: they are drawn at random.", file=sys.stderr
        )
    return network


def _damaged(model: str) -> str:
    """The first file of weights in a folder that cannot be opened; the name of the model, if it is no folder."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(Path(model).glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError:
            return str(path)
    return model


def check(model: str) -> None:
    """Find out early whether ``model`` can be had, and at once where its name alone tells that it cannot.

    Raises:
        ValueError: if it is no size, folder or hub name; the message has the nearest size.
    """
    if model in SIZES:
        return
    choices = f"choose {', '.join(SIZES)}, llama-HIDDENxLAYERS, or a folder or hub name of a model"
    folder = Path(model)
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise ValueError(f"unknown model {model!r}: there is no config.json in it; {choices}.")
    elif not HUB_NAME.fullmatch(model):
        raise ValueError(f"unknown model {model!r}: there is no such folder; {choices}.")
    elif "/" not in model and model not in WITHOUT_OWNER and (near := nearest(model, SIZES)):
        raise ValueError(f"unknown model {model!r}: {choices}; the nearest is {near}.")
    try:
        _find(model, folder)
    except Exception as error:  # the hub, the network and transformers raise their own kinds
        raise ValueError(f"unknown model {model!r}: {choices} ({_line(error)})") from error


def _find(model: str, folder: Path) -> None:
    """Read the config of a model; ask the hub just once where it is not on this machine."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    if not folder.exists() and not isinstance(try_to_load_from_cache(model, "config.json"), str):
        HfApi().model_info(model, timeout=HUB_SECONDS)
    from transformers import AutoConfig

    AutoConfig.from_pretrained(model, trust_remote_code=False)


def nearest(name: str, names: Iterable[str]) -> str:
    """The one of ``names`` that looks most like ``name``; empty if none does.

    >>> nearest("LLaMA-tinny", SIZES)
    'llama-tiny'
    """
    return next(iter(difflib.get_close_matches(name.lower(), list(names), 1, 0.6)), "")


def _line(error: Exception, length: int = 160) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= length else text[:length] + "…"

"""Models that read text with pictures in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo.architecture import HEADS, IGNORED, LAYERS, LENGTH, SAMPLES, VOCAB, WIDTH, Architecture, Batch
from zoo.pictures import PATCH, PATCHES, SEES, SHAPE, SIDE, pixels
from zoo.text import COMMON, GROUPED, tokens

PICTURE = VOCAB - 1  # the token that stands for a piece of a picture
READS = {"model_type": "llama", **GROUPED}


def described(pieces: int, **more: Any) -> Batch:
    """Text after a picture of so many pieces; the loss is over the text."""
    batch = tokens(length=pieces + LENGTH // 2)
    batch["input_ids"][:, 1 : pieces + 1] = PICTURE
    batch["labels"][:, 1 : pieces + 1] = IGNORED
    return batch | more


def llava(model: nn.Module) -> Batch:
    return described(PATCHES, pixel_values=pixels())


def quartered(model: nn.Module) -> Batch:
    """Four patches make one token."""
    return described(PATCHES // 4, pixel_values=pixels())


def smolvlm(model: nn.Module) -> Batch:
    """Pictures cut into frames, of which there is one each."""
    return described(PATCHES // 4, pixel_values=pixels()[:, None])


def paligemma(model: nn.Module) -> Batch:
    """With the kinds of tokens: those of the picture see each other."""
    batch = llava(model)
    return batch | {"token_type_ids": (batch["labels"] != IGNORED).long()}


def gemma3(model: nn.Module) -> Batch:
    batch = described(4, pixel_values=pixels())
    return batch | {"token_type_ids": (batch["input_ids"] == PICTURE).long()}


def blip2(model: nn.Module) -> Batch:
    return described(4, pixel_values=pixels())


def qwen(model: nn.Module) -> Batch:
    """Pictures as rows of patches, four of which make one token; the grid says which belong together."""
    vision = model.config.vision_config
    features = 3 * vision.temporal_patch_size * vision.patch_size**2
    batch = described(PATCHES // 4)
    grid = torch.tensor([[1, SIDE // PATCH, SIDE // PATCH]] * SAMPLES)
    patches = torch.randn(SAMPLES * PATCHES, features, generator=torch.Generator().manual_seed(0))
    kinds = (batch["input_ids"] == PICTURE).int()
    return batch | {"pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": kinds}


QWEN_TOKENS = dict(
    image_token_id=PICTURE, video_token_id=VOCAB - 2, vision_start_token_id=VOCAB - 3, vision_end_token_id=VOCAB - 4
)
QWEN_READS = GROUPED | dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]})
QWEN_SEES = dict(depth=LAYERS, num_heads=HEADS, patch_size=PATCH, spatial_merge_size=2, temporal_patch_size=2)
SIGLIP = {"model_type": "siglip_vision_model", **SEES}

READERS = [
    Architecture(
        "llava",
        "LlavaForConditionalGeneration",
        "vision-language",
        llava,
        dict(
            text_config=READS,
            vision_config={"model_type": "clip_vision_model", **SEES},
            image_token_index=PICTURE,
            image_token_id=PICTURE,
        ),
    ),
    Architecture(
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        "vision-language",
        qwen,
        dict(text_config=QWEN_READS, vision_config=QWEN_SEES | dict(embed_dim=WIDTH, hidden_size=WIDTH), **QWEN_TOKENS),
    ),
    Architecture(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        "vision-language",
        qwen,
        dict(
            text_config=QWEN_READS,
            vision_config=QWEN_SEES
            | dict(
                hidden_size=WIDTH,
                out_hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                window_size=32,
                fullatt_block_indexes=[1],
            ),
            **QWEN_TOKENS,
        ),
    ),
    Architecture(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        "vision-language",
        gemma3,
        dict(
            text_config=GROUPED
            | dict(query_pre_attn_scalar=16, sliding_window=16, layer_types=["sliding_attention", "full_attention"]),
            vision_config=SIGLIP,
            mm_tokens_per_image=4,
            image_token_index=PICTURE,
            image_token_id=PICTURE,
        ),
    ),
    Architecture(
        "paligemma",
        "PaliGemmaForConditionalGeneration",
        "vision-language",
        paligemma,
        dict(
            text_config={"model_type": "gemma", **GROUPED},
            vision_config=SIGLIP,
            projection_dim=WIDTH,
            image_token_index=PICTURE,
            image_token_id=PICTURE,
        ),
    ),
    Architecture(
        "smolvlm",
        "SmolVLMForConditionalGeneration",
        "vision-language",
        smolvlm,
        dict(
            text_config=READS,
            vision_config={"model_type": "smolvlm_vision", **SEES},
            scale_factor=2,
            image_token_id=PICTURE,
        ),
    ),
    Architecture(
        "blip-2",
        "Blip2ForConditionalGeneration",
        "vision-language",
        blip2,
        dict(
            vision_config=SEES,
            qformer_config=COMMON | dict(encoder_hidden_size=WIDTH),
            text_config={"model_type": "opt", **COMMON, "ffn_dim": 128, "word_embed_proj_dim": WIDTH},
            num_query_tokens=4,
            image_token_index=PICTURE,
            image_token_id=PICTURE,
        ),
    ),
    Architecture(
        "internvl",
        "InternVLForConditionalGeneration",
        "vision-language",
        quartered,
        dict(
            text_config={"model_type": "qwen2", **GROUPED},
            vision_config={
                "model_type": "internvl_vision",
                **SHAPE,
                "image_size": [SIDE, SIDE],
                "patch_size": [PATCH, PATCH],
            },
            downsample_ratio=0.5,
            image_token_id=PICTURE,
        ),
    ),
]

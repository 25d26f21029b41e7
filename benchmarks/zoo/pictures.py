"""Models of pictures, and of pictures beside texts."""

from __future__ import annotations

import torch
from torch import nn

from zoo.architecture import HEADS, LAYERS, SAMPLES, WIDTH, Architecture, Batch
from zoo.text import COMMON, tokens

SIDE, PATCH = 32, 8
PATCHES = (SIDE // PATCH) ** 2
SHAPE = {
    k: v
    for k, v in COMMON.items()
    if k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
}
SEES = SHAPE | dict(image_size=SIDE, patch_size=PATCH)


def pixels(samples: int = SAMPLES, side: int = SIDE) -> torch.Tensor:
    return torch.randn(samples, 3, side, side, generator=torch.Generator().manual_seed(0))


def pictures(model: nn.Module) -> Batch:
    """A class for each picture."""
    return {"pixel_values": pixels(), "labels": torch.arange(SAMPLES) % 2}


def large(model: nn.Module) -> Batch:
    """Of 64 × 64, for models that halve it several times."""
    return {"pixel_values": pixels(side=64), "labels": torch.arange(SAMPLES) % 2}


def segments(model: nn.Module) -> Batch:
    """A class for each pixel."""
    return {"pixel_values": pixels(side=64), "labels": torch.arange(SAMPLES * 64 * 64).view(SAMPLES, 64, 64) % 2}


def unlabelled(model: nn.Module) -> Batch:
    """Without a label: DETR's loss matches boxes with scipy, so its outputs are squared instead."""
    return {"pixel_values": pixels(side=64)}


def captions(model: nn.Module) -> Batch:
    """Pictures and texts that belong together, for a contrastive loss."""
    text = tokens()
    text["input_ids"][:, -6] = 2  # CLIP reads a text at its end token
    return {"pixel_values": pixels(), "return_loss": True} | {k: text[k] for k in ("input_ids", "attention_mask")}


def masked(model: nn.Module) -> Batch:
    return {"pixel_values": pixels()}


PICTURES = [
    Architecture("vit", "ViTForImageClassification", "vision", pictures, SEES),
    Architecture("dinov2", "Dinov2ForImageClassification", "vision", pictures, SEES),
    Architecture(
        "swin",
        "SwinForImageClassification",
        "vision",
        large,
        dict(image_size=64, patch_size=4, embed_dim=32, depths=[1, 2], num_heads=[2, 4], window_size=4),
    ),
    Architecture(
        "convnext",
        "ConvNextForImageClassification",
        "vision",
        large,
        dict(num_stages=2, hidden_sizes=[32, 64], depths=[1, 2], image_size=64),
    ),
    Architecture(
        "segformer",
        "SegformerForSemanticSegmentation",
        "vision",
        segments,
        dict(
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[32, 64],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[2, 4],
            mlp_ratios=[2, 2],
            decoder_hidden_size=32,
            num_labels=2,
        ),
    ),
    Architecture(
        "detr",
        "DetrForObjectDetection",
        "vision",
        unlabelled,
        dict(
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            backbone_config={
                "model_type": "resnet",
                "embedding_size": 16,
                "hidden_sizes": [16, 32],
                "depths": [1, 1],
                "out_features": ["stage2"],
                "layer_type": "basic",
            },
            d_model=WIDTH,
            encoder_layers=LAYERS,
            decoder_layers=LAYERS,
            encoder_ffn_dim=128,
            decoder_ffn_dim=128,
            encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS,
            num_queries=5,
            num_labels=2,
        ),
    ),
    Architecture(
        "vit_mae",
        "ViTMAEForPreTraining",
        "vision",
        masked,
        SEES
        | dict(
            decoder_hidden_size=32,
            decoder_intermediate_size=64,
            decoder_num_attention_heads=2,
            decoder_num_hidden_layers=1,
        ),
    ),
    Architecture(
        "clip",
        "CLIPModel",
        "two towers",
        captions,
        dict(text_config=COMMON | dict(max_position_embeddings=64), vision_config=SEES, projection_dim=WIDTH),
    ),
    Architecture("siglip", "SiglipModel", "two towers", captions, dict(text_config=COMMON, vision_config=SEES)),
]

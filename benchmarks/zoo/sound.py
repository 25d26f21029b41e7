"""Models of sound: those that hear, and one that writes music."""

from __future__ import annotations

import torch
from torch import nn

from zoo.architecture import HEADS, LAYERS, LENGTH, SAMPLES, VOCAB, WIDTH, Architecture, Batch
from zoo.pictures import SHAPE
from zoo.text import BART, COMMON, tokens

MELS = 16


def spectrogram(model: nn.Module) -> Batch:
    """Of twice as many frames as Whisper's encoder has positions, with a text."""
    features = torch.randn(SAMPLES, MELS, 2 * LENGTH, generator=torch.Generator().manual_seed(0))
    return {"input_features": features, "labels": tokens(length=LENGTH // 2)["labels"]}


def frames(model: nn.Module) -> Batch:
    """The same with time first."""
    batch = spectrogram(model)
    return batch | {"input_features": batch["input_features"].mT.contiguous()}


def waves(model: nn.Module) -> Batch:
    """Raw sound with a short text, for a loss by alignment (CTC)."""
    return {
        "input_values": torch.randn(SAMPLES, 2048, generator=torch.Generator().manual_seed(0)),
        "labels": tokens(length=8)["labels"].clamp(min=1),
    }


def heard(model: nn.Module) -> Batch:
    """A class for each spectrogram."""
    return {"input_values": frames(model)["input_features"], "labels": torch.arange(SAMPLES) % 2}


def codes(model: nn.Module) -> Batch:
    """Two streams of the codes of music."""
    ids = torch.randint(3, VOCAB, (SAMPLES * 2, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.view(SAMPLES, 2, LENGTH).mT.contiguous()}


HEARS = {k: v for k, v in COMMON.items() if k != "max_position_embeddings"} | dict(
    conv_dim=[32, 32, 32], conv_kernel=[10, 3, 3], conv_stride=[5, 2, 4], num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4, mask_time_length=2, ctc_loss_reduction="mean",
)  # fmt: skip

SOUND = [
    Architecture(
        "whisper",
        "WhisperForConditionalGeneration",
        "audio",
        spectrogram,
        BART | dict(num_mel_bins=MELS, max_source_positions=LENGTH, max_target_positions=LENGTH),
    ),
    Architecture("wav2vec2", "Wav2Vec2ForCTC", "audio", waves, HEARS),
    Architecture("hubert", "HubertForCTC", "audio", waves, HEARS),
    Architecture("wavlm", "WavLMForCTC", "audio", waves, HEARS | dict(num_buckets=8, max_bucket_distance=16)),
    Architecture(
        "speech_to_text",
        "Speech2TextForConditionalGeneration",
        "audio",
        frames,
        BART
        | dict(
            input_feat_per_channel=MELS, conv_channels=32, max_source_positions=2 * LENGTH, max_target_positions=LENGTH
        ),
    ),
    Architecture(
        "audio-spectrogram-transformer",
        "ASTForAudioClassification",
        "audio",
        heard,
        SHAPE | dict(num_mel_bins=MELS, max_length=2 * LENGTH, patch_size=8, frequency_stride=8, time_stride=8),
    ),
    Architecture(
        "musicgen_decoder",
        "MusicgenForCausalLM",
        "audio",
        codes,
        dict(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            ffn_dim=128,
            num_codebooks=2,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=0,
        ),
    ),
]

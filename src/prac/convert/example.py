"""An input made up for a model, where the user gave none."""

from __future__ import annotations

import torch
from torch import nn

from prac.runtime.running import Example


def example_for(model: nn.Module) -> Example | None:
    """A small input, for models that follow Hugging Face's conventions; None for others.

    None too for models made of several (a text alone would not show what becomes of pictures).
    """
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    parameter = next(model.parameters(), None)
    if config is None or parameter is None or set(getattr(config, "sub_configs", ())) - {"text_config"}:
        return None
    device = parameter.device
    if main == "input_ids" and getattr(config, "vocab_size", None):
        ids = torch.arange(2 * 9, device=device).reshape(2, 9) % config.vocab_size
        return {main: ids, "decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {main: ids}
    if main == "pixel_values" and getattr(config, "image_size", None):
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (2, getattr(config, "num_channels", 3), height, width)
        return {main: torch.zeros(shape, device=device, dtype=parameter.dtype)}
    return None

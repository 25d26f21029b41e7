"""Copies without numbers: which models can be followed on them, and what is said of those that cannot."""

from __future__ import annotations

import logging
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prac
from prac.memory import Step, choose, measure, predict
from prac.memory.largest_batch import rows_of
from prac.runtime.fake import faked

SIZES = dict(
    vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2)
ROUTED = dict(n_routed_experts=4, num_experts_per_tok=2, topk_group=1, moe_intermediate_size=32)
STATE = dict(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=8)
SEQ2SEQ = dict(
    vocab_size=128, d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_layers=1, decoder_layers=1,
    encoder_attention_heads=4, decoder_attention_heads=4,
)  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral": ("Mixtral", SIZES | dict(num_local_experts=4)),
    "Qwen2Moe": ("Qwen2Moe", SIZES | EXPERTS | dict(moe_intermediate_size=32, shared_expert_intermediate_size=32)),
    "Qwen3Moe": ("Qwen3Moe", SIZES | EXPERTS | dict(moe_intermediate_size=36, head_dim=8)),
    "DeepseekV3": (
        "DeepseekV3",
        SIZES
        | ROUTED
        | dict(num_key_value_heads=4, n_group=2, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16,
               qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8),
    ),
    "Olmoe": ("Olmoe", SIZES | EXPERTS),
    "GraniteMoe": ("GraniteMoe", SIZES | dict(num_local_experts=4, num_experts_per_tok=2)),
    "GptOss": ("GptOss", SIZES | dict(num_local_experts=4, num_experts_per_tok=2, head_dim=8)),
    "Jamba": (
        "Jamba",
        SIZES
        | EXPERTS
        | dict(use_mamba_kernels=False, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
               expert_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4),
    ),
    "Mamba": ("Mamba", STATE),
    "Gemma3": ("Gemma3", SIZES | dict(head_dim=8)),
    "T5": ("T5", dict(vocab_size=128, d_model=32, d_ff=64, d_kv=8, num_layers=1, num_heads=4, pad_token_id=0,
                      decoder_start_token_id=0)),
    "Bart": ("Bart", SEQ2SEQ | dict(max_position_embeddings=64)),
    "Whisper": (
        "Whisper",
        SEQ2SEQ
        | dict(max_source_positions=20, max_target_positions=32, num_mel_bins=16, pad_token_id=0, bos_token_id=1,
               eos_token_id=2, decoder_start_token_id=1),
    ),
}  # fmt: skip


def build(family: str) -> nn.Module:
    import transformers

    name, sizes = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")(**sizes)
    of = "ForConditionalGeneration" if name in ("T5", "Bart", "Whisper") else "ForCausalLM"
    return getattr(transformers, f"{name}{of}")(config).train()


def batch_for(family: str, rows: int = 4) -> dict[str, Tensor]:
    ids = torch.randint(3, 128, (rows, 16), generator=torch.Generator().manual_seed(0))
    if family == "Whisper":
        return {"input_features": torch.randn(rows, 16, 40), "labels": ids}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_in_float32_is_followed(family: str) -> None:
    """Also of experts, whose grouped products torch's fake has in bfloat16 alone. Bytes are those of a real step."""
    predicted = predict(build(family), batch_for(family), optimizer=None)
    real = measure(build(family), batch_for(family))
    assert predicted.activations == pytest.approx(real.activations, rel=0.1)


@pytest.mark.parametrize("family", ["Mixtral", pytest.param("DeepseekV3", marks=pytest.mark.long), "GptOss"])
def test_compressed_and_chunked(family: str) -> None:
    config = prac.PRESETS["lean"].replace(min_width=16)
    plain = predict(build(family), batch_for(family)).activations
    assert 0 < predict(build(family), batch_for(family), config, loss="chunked").activations < plain
    assert choose(Step(build(family), batch_for(family)), "1GiB").name == "plain"
    model = build(family)
    prac.compress(model, config, loss="chunked")
    output = model(**batch_for(family))
    output.loss.backward()
    assert output.logits is None


def with_loops() -> nn.Module:
    model = build("Mixtral")
    model.set_experts_implementation("eager")
    return model


def test_a_model_that_looks_at_numbers_is_told_so() -> None:
    with pytest.raises(ValueError, match=r"MixtralForCausalLM .*depends on the numbers .*nonzero.*grouped_mm"):
        predict(with_loops(), batch_for("Mixtral"))
    with pytest.raises(ValueError, match=r"depends on the numbers .*prac\.measure"):
        choose(Step(with_loops(), batch_for("Mixtral")), "1GiB")

    class Deciding(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum() > 0 else x

    with faked(Deciding(), torch.ones(3)) as (_, x):
        assert x.shape == (3,)
    with pytest.raises(ValueError, match=r"Deciding .*local_scalar"), faked(Deciding(), torch.ones(3)) as (twin, x):
        twin(x)


def test_its_loss_is_found_out_at_the_first_call() -> None:
    model = with_loops()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prac.ChunkedLoss(model)
        assert model(**batch_for("Mixtral")).logits is None


class Remembers(nn.Module):
    """Keeps what it computed, as models do with the auxiliary loss of their experts."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = nn.Linear(64, 64), {}

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.layer(x)
        self.seen["loss"] = [self.last.square().mean()]
        return self.seen["loss"][0]


def test_what_a_call_left_on_a_module_is_no_obstacle() -> None:
    model = Remembers()
    expected = predict(model, torch.ones(8, 64)).peak
    model(torch.ones(8, 64)).backward()
    last = model.last
    assert predict(model, torch.ones(8, 64)).peak == expected
    assert model.last is last


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")])
def test_whatever_is_around(around: Any) -> None:
    expected = predict(build("Mixtral"), batch_for("Mixtral"), loss="chunked").peak
    model, batch = build("Mixtral"), batch_for("Mixtral")
    capped = build("GraniteMoe")
    with around():
        assert predict(model, batch, loss="chunked").peak == expected
        with pytest.raises(ValueError, match="scaling"):
            prac.ChunkedLoss(capped)


def test_samples_are_counted_by_most_tensors() -> None:
    patches, ids = torch.empty(300, 48), torch.empty(4, 16)
    assert rows_of({"pixel_values": patches, "input_ids": ids, "labels": ids}) == 4
    assert rows_of(torch.empty(5, 2)) == rows_of((torch.empty(5, 2), torch.tensor(0))) == 5
    with pytest.raises(ValueError, match="no tensor whose rows"):
        rows_of({"scale": torch.tensor(1.0)})


def test_what_a_model_refuses_without_numbers_is_not_in_the_log() -> None:
    class Fussy(nn.Module):
        main_input_name = "input_ids"

        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace(vocab_size=9)
            self.embed, self.block = nn.Embedding(9, 32), nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.block(self.embed(input_ids).masked_fill(torch.ones(64, 1) == 0, 0.0))

    said: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = said.append  # type: ignore[method-assign]
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addHandler(handler)
    try:
        with faked(Fussy(), torch.zeros(2, 9, dtype=torch.long)) as (twin, ids), pytest.raises(RuntimeError):
            twin(ids)
        model = Fussy().train()
        handle = prac.compress(model, "lean")
        model(torch.zeros(2, 64, dtype=torch.long)).sum().backward()
    finally:
        logger.removeHandler(handler)
    assert any(row.compressed for row in handle.rows())
    assert not said and not logger.disabled

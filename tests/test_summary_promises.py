"""No promise without effect: what is asked for is done or said, and `summary()` says what a step keeps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import FAMILIES, N, build
from torch import Tensor, nn

import prac
from prac.memory import track_kept

FULL = prac.Bits(32)
EXACT = prac.Config(linear=FULL, norm=FULL, activation=FULL, group=FULL, min_width=1)
X = torch.randn(4, 17, N, generator=torch.Generator().manual_seed(1))


def llava() -> tuple[nn.Module, dict[str, Tensor]]:
    import transformers as T

    sizes = {"hidden_size": N, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = T.LlamaConfig(**sizes, vocab_size=256)
    vision = T.CLIPVisionConfig(**sizes, image_size=24, patch_size=6)
    ids = torch.arange(96).reshape(4, 24)
    ids[:, :16] = 250
    batch = {"input_ids": ids, "pixel_values": torch.randn(4, 3, 24, 24), "attention_mask": torch.ones_like(ids)}
    config = T.LlavaConfig(vision_config=vision, text_config=text, image_token_index=250)
    return T.LlavaForConditionalGeneration(config).train(), batch | {"labels": ids.masked_fill(ids == 250, -100)}


def test_a_vision_language_model_shows_its_structure_by_its_first_batch() -> None:
    kept = []
    for given in (True, False):
        torch.manual_seed(0)
        model, batch = llava()
        handle = prac.compress(
            model, prac.PRESETS["small"].replace(min_width=8), **({"example": batch} if given else {})
        )
        with track_kept(model, batch) as found:
            model(**batch).loss.backward()
        kept.append(found.by_module)
        assert sum(row.what == "attention" for row in handle.rows()) == 4
    assert kept[0] == kept[1]


def test_what_attention_cannot_do_is_said_and_done() -> None:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=97, hidden_size=N, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, q_lora_rank=16, kv_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=2, n_group=1, topk_group=1,
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config).train()
    with pytest.warns(UserWarning, match="no effect on 2 attention modules.*differ in size"):
        handle = prac.compress(model, "small")
    notes = [row.note for row in handle.rows() if "attention in full" in row.note]
    assert len(notes) == 2 and "differ in size" in notes[0]


def test_large_scores_get_enough_bits_by_themselves() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(N, N) for _ in range(4))
            self.scale = 1.0

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (f(x).unflatten(-1, (2, N // 2)).transpose(1, 2) for f in (self.q, self.k, self.v))
            return self.o(F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    found = {}
    for size in (0.02, 0.08, 0.4, 30.0):
        model = Attends().train()
        model.scale = size
        with torch.no_grad():
            for f in (model.q, model.k):
                f.weight.mul_(N**0.5)
        handle = prac.compress(model, EXACT.replace(attention_bits=4), include="*", example=X)
        model(X).sum().backward()
        (found[size],) = (row.rank for row in handle.rows() if row.what == "attention")
    assert found == {
        0.02: "4 bits, rotated", 0.08: "6 bits, rotated / 4 bits, rotated", 0.4: "8 bits, rotated / 4 bits, rotated",
        30.0: "in full / 4 bits, rotated",
    }  # fmt: skip


class Odd(nn.Module):
    """Attention over few keys, left out at random by a number; a layer that reads what is kept, but across its rows."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.q, self.k, self.v, self.o, self.across = (nn.Linear(N, N) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand([]) > 2:  # no tensor without numbers can tell
            return x
        return self.across(self.o(self.attend(x)).mT.contiguous().exp().mT)

    def attend(self, x: Tensor) -> Tensor:
        few = x[:, ::4]
        projected = (self.q(x), self.k(few), self.v(few))
        q, k, v = (t.unflatten(-1, (2, N // 2)).transpose(1, 2) for t in projected)
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(2)


@pytest.mark.filterwarnings("ignore:attention_bits")
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_summary_promises_what_training_keeps(dropout: float, given: bool) -> None:
    torch.manual_seed(0)
    model, x = Odd(dropout).train(), torch.randn(4, 20, N)
    config = EXACT.replace(linear=prac.Bits(8), group=None, attention_bits=4)
    handle = prac.compress(model, config, include="*", **({"example": x} if given else {}))
    model(x).sum().backward()
    with track_kept(model, x) as kept:
        model(x).sum()
    rows = {row.name: row for row in handle.rows() if row.compressed}
    assert ("" in rows) == (dropout == 0.0)  # the attention, that a CPU has no flash kernel with dropout for
    if not dropout:
        # q and the output of a query, k and v of a quarter of a key: 4 bits, and a step of 2 bytes for 32 of them.
        assert rows.pop("").after == 2.5 * (N // 2 + N // 16)
    promised = {name: row.after * (20 if name in ("k", "v") else 80) for name, row in rows.items() if row.after}
    assert promised == {name: size for name, size in kept.by_module.items() if name}
    assert ("o" in promised) == (dropout > 0.0)


def lora(model: nn.Module, *targets: str) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(2)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=list(targets)), model)


def only(*parts: str) -> Callable[[nn.Module], None]:
    def freeze(model: nn.Module) -> None:
        for name, p in model.named_parameters():
            p.requires_grad_(any(part in name for part in parts))

    return freeze


def rest_in_eval_mode(model: nn.Module) -> None:
    only("h.1", "layers.1", "layer.1")(model)
    for name, module in model.named_modules():
        if name.endswith(".0"):
            module.eval()


FROZEN: dict[str, Callable[[nn.Module], None]] = {
    "output of attention": only("o_proj", "attn.c_proj", "attention.output.dense", "attention.o_proj"),
    "up": only("up_proj", "mlp.c_fc", "intermediate.dense", "fc1"),
    "down": only("down_proj", "mlp.c_proj", "fc2"),
    "second block": only("h.1", "layers.1", "layer.1"),
    "eval mode": rest_in_eval_mode,
    "norms": only("norm", "ln_"),
    "head": only("lm_head", "classifier"),
    "lora on o": lambda model: lora(model, "o_proj", "attn.c_proj"),
    "lora on down": lambda model: lora(model, "down_proj", "mlp.c_proj", "fc2"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
@pytest.mark.parametrize("trained", FROZEN)
def test_the_summary_of_a_partly_frozen_model(family: str, trained: str) -> None:
    model = build(family)
    if family == "vit" and trained == "lora on o":
        pytest.skip("it has no such layer")
    FROZEN[trained](model)
    if not any(p.requires_grad for p in model.parameters()):
        pytest.skip("it has no such layer")
    batch = FAMILIES[family][1]
    handle = prac.compress(model, prac.PRESETS["lean"].replace(min_width=8), include="*", example=batch)
    model(**batch).logits.sum().backward()
    kept, read = kept_and_read(model, batch)
    rows = [row for row in handle.rows() if row.compressed and row.what != "attention"]
    assert rows
    for row in rows:
        assert kept.get(row.name, 0) == row.after * read.get(row.name, 0), (row, kept)


def kept_and_read(model: nn.Module, batch: dict[str, Tensor]) -> tuple[dict[str, int], dict[str, int]]:
    """Of each module in a forward pass: the bytes that it keeps, and the rows that it reads."""
    read: dict[str, int] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = next(iter((*args, *kwargs.values())), None)
            read[name] = x.numel() // x.shape[-1] if isinstance(x, Tensor) and x.dim() else 0

        hook.only_counts = True  # type: ignore[attr-defined]
        return hook

    hooks = [m.register_forward_pre_hook(look(name), with_kwargs=True) for name, m in model.named_modules()]
    with track_kept(model, batch) as kept:
        model(**batch)
    for each in hooks:
        each.remove()
    return kept.by_module, read


DTYPES = {
    "float64": (torch.float64, False),
    "bfloat16": (torch.bfloat16, False),
    "autocast": (torch.float32, True),
}


@pytest.mark.parametrize("config", [EXACT, EXACT.replace(group=None), prac.PRESETS["paper"].replace(min_width=1)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_summary_in_the_dtype_that_is_kept(family: str, dtype: str, config: prac.Config) -> None:
    batch = FAMILIES[family][1]
    model = build(family).to(DTYPES[dtype][0])
    handle = prac.compress(model, config, include="*", example=batch)
    with torch.autocast("cpu", torch.bfloat16, enabled=DTYPES[dtype][1]):
        model(**batch)
        kept, read = kept_and_read(model, batch)
    by_reference = config.group is None and config.linear == FULL
    for row in handle.rows():
        if not row.compressed or row.what == "attention":
            continue
        if by_reference and row.name.endswith(("o_proj", "attn.c_proj")):
            continue  # what it reads is the output that torch's attention keeps, as in plain training
        assert kept.get(row.name, 0) == row.after * read.get(row.name, 0), (row, kept)
        if by_reference and row.what == "linear":
            assert row.before == row.after


def eager(model: nn.Module) -> None:
    model.set_attn_implementation("eager")


def dropping(model: nn.Module) -> None:
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1


@pytest.mark.parametrize("change", [eager, dropping])
def test_attention_that_stops_keeping_its_output(change: Callable[[nn.Module], None]) -> None:
    model, batch = build("llama"), FAMILIES["llama"][1]
    handle = prac.compress(model, prac.PRESETS["lean"].replace(min_width=8))
    for changed in (False, True):
        if changed:
            change(model)
        model(**batch).logits.sum().backward()
        kept, read = kept_and_read(model, batch)
        found = [row for row in handle.rows() if row.name.endswith("o_proj")]
        assert [row.after * read[row.name] for row in found] == [kept.get(row.name, 0) for row in found]
        assert all(("does not keep it" in row.note, row.after > 0) == (changed, changed) for row in found)


class Again(nn.Module):
    """One block, run three times; its projection once more, of what nobody else keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(N), nn.Linear(N, N), nn.Linear(N, N)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.b(torch.sigmoid(self.a(self.norm(x))))
        return self.b(x * 2)


@pytest.mark.parametrize("given", [True, False])
def test_layers_that_are_called_several_times(given: bool) -> None:
    torch.manual_seed(0)
    model = Again().train()
    config = EXACT.replace(linear=prac.Bits(8))
    handle = prac.compress(model, config, include="*", **({"example": X} if given else {}))
    model(X).sum().backward()
    with track_kept(model, X) as kept:
        model(X).sum()
    rows = {row.name: row for row in handle.rows()}
    assert [rows[name].calls for name in ("norm", "a", "b")] == [3, 3, 4]
    tokens = X.numel() // N
    assert kept.by_module["norm"] == rows["norm"].after * tokens * 3
    # Of its first call it is said that the sigmoid keeps it; the last call decides.
    assert kept.by_module["b"] == rows["b"].after * tokens
    assert f"→ {3 * rows['norm'].after + 4 * rows['b'].after}" in handle.summary()
    assert "called 3 times in a pass" in handle.summary()

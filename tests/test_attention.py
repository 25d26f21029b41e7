"""Attention in few bits: exact in 32, close in 8, kept once, whoever calls it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Steps, gradients, relative
from models import FAMILIES, HIDDEN, TEXT, N, build, encoder
from torch import Tensor, nn

import prac
from prac.config import Bits
from prac.estimators.rounded import Stored
from prac.layers import Attention
from prac.layers.marks import mark, source_of
from prac.memory import track_kept
from prac.ops.attention import Call, attention, choose

FULL = Bits(32)
WHOLE = prac.Config(linear=FULL, norm=FULL, activation=FULL, group=FULL, min_width=1)


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def keepers(bits: int) -> dict[str, Stored]:
    return {t: Stored(Bits(bits), Steps(), unbiased=t in ("v", "out"), name=t) for t in ("q", "k", "v", "out")}


MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "additive": {"attn_mask": torch.randn(5, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)},
    "per sample": {"attn_mask": torch.randn(2, 1, 5, 7, dtype=torch.float64)},
    "scaled": {"scale": 0.7},
}


@pytest.mark.parametrize("heads", [6, 2, 1])
@pytest.mark.parametrize("mask", MASKS)
def test_against_autograd_in_float64(mask: str, heads: int) -> None:
    """Odd lengths, a head of 11 features, k and v with as many heads or fewer."""
    q, k, v = tensor(2, 6, 5, 11), tensor(2, heads, 7, 11, seed=1), tensor(2, heads, 7, 11, seed=2)
    options = MASKS[mask]
    gqa = heads != 6
    expected = F.scaled_dot_product_attention(q, k, v, **options, enable_gqa=gqa)
    names = {"attn_mask": "mask", "is_causal": "causal"}
    got, kept = attention(q, k, v, keepers(32), **{names.get(n, n): o for n, o in options.items()}, gqa=gqa)
    dout = torch.randn(expected.shape, dtype=torch.float64)
    torch.testing.assert_close(got, expected)
    ours, theirs = (torch.autograd.grad(out, [q, k, v], dout) for out in (got, expected))
    assert all(relative(a, b) < 1e-9 for a, b in zip(ours, theirs, strict=True))
    torch.testing.assert_close(kept.reconstruct(), got.transpose(1, 2).reshape(10, 66))


@pytest.mark.parametrize(("bits", "least", "most"), [(8, 0.002, 0.02), (4, 0.04, 0.3)])
def test_error_is_what_the_docstring_says(bits: int, least: float, most: float) -> None:
    q, k, v = (tensor(2, 4, 64, 32, seed=seed) for seed in range(3))
    dout = torch.randn(2, 4, 64, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    exact = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True), [q, k, v], dout)
    ours = torch.autograd.grad(attention(q, k, v, keepers(bits), causal=True)[0], [q, k, v], dout)
    for a, b in zip(ours, exact, strict=True):
        assert least < relative(a, b) < most


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [4.0, 8.0])
def test_large_scores_do_not_blow_up(bits: int, size: float) -> None:
    """Scores of some hundreds, as of trained models: gradients are those of rounded q, k and v, by definition."""
    q, k, v = (tensor(2, 4, 64, 32, seed=seed) for seed in range(3))
    q, k = ((size * t).detach().requires_grad_() for t in (q, k))
    dout = torch.randn(2, 4, 64, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    ours = torch.autograd.grad(attention(q, k, v, keepers(bits), causal=True)[0], [q, k, v], dout)
    rows = {name: t.transpose(1, 2).reshape(-1, 128) for name, t in (("q", q), ("k", k), ("v", v))}
    kept = {name: keepers(bits)[name].keep(t.detach()).reconstruct() for name, t in rows.items()}
    rounded = [t.view(2, 64, 4, 32).transpose(1, 2).requires_grad_() for t in kept.values()]
    theirs = torch.autograd.grad(F.scaled_dot_product_attention(*rounded, is_causal=True), rounded, dout)
    exact = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True), [q, k, v], dout)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert relative(a, b) < 1e-9
        assert relative(a, c) < 2


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "bert", "vit", "t5", "plain"])
def test_found_in_any_model_and_exact_in_full(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every module that calls torch's attention, transformers' or not; with 32 bits gradients are autograd's."""
    # 32 bits are for tests alone.
    keep = prac.Config.keep
    monkeypatch.setattr(prac.Config, "keep", lambda self, kind: Bits(32) if kind == "attention" else keep(self, kind))
    model = build(family)
    plain = copy.deepcopy(model)
    batch: dict[str, Any] = FAMILIES[family][1]
    handle = prac.compress(model, WHOLE.replace(attention_bits=8), **({"example": batch} if family == "plain" else {}))
    assert {row.what for row in handle.rows()} >= {"attention", "linear", "norm"}
    got, expected = gradients(model, **batch), gradients(plain, **batch)
    scale = max(g.abs().max().item() for g in expected.values())
    for name, g in expected.items():
        assert (got[name] - g).abs().max() < 1e-6 * scale or relative(got[name], g) < 2e-4, name
    handle.restore()
    assert not any(isinstance(m, Attention) for m in model.modules())


def test_the_output_is_kept_once() -> None:
    """Q, k, v and the output at 8.5 bits, and not once more for the projection that reads the output."""
    wide = {"hidden_size": 128, "intermediate_size": 192}
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**wide, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)).train()
    handle = prac.compress(model, WHOLE.replace(attention_bits=8))
    ids = {"input_ids": TEXT["input_ids"] % 50}
    with track_kept(model) as kept:
        model(**ids)
    tokens = ids["input_ids"].numel()
    attention_bytes = {name: b for name, b in kept.by_module.items() if "self_attn" in name and b}
    cosines = 2 * ids["input_ids"].shape[1] * 64 * 4
    assert attention_bytes == {"model.layers.0.self_attn": tokens * 4 * (128 + 2 * 4) + cosines}
    (row,) = [row for row in handle.rows() if row.what == "attention"]
    assert (row.before, row.after) == (4 * 128 * 4, 4 * (128 + 2 * 4))


def test_a_model_without_torchs_attention_is_told_so() -> None:
    with pytest.warns(UserWarning, match="attn_implementation='sdpa'"):
        prac.compress(build("gemma2"), WHOLE.replace(attention_bits=8))
    with pytest.warns(UserWarning, match="no effect"):
        prac.compress(encoder().train(), WHOLE.replace(attention_bits=8), example=HIDDEN)
    with pytest.warns(UserWarning, match="no effect on 2 attention modules.*width 32 is below min_width = 40"):
        prac.compress(build("llama"), WHOLE.replace(attention_bits=8, min_width=40))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prac.compress(build("llama"), WHOLE)


def test_stands_aside_where_torch_would_not_run_its_kernel() -> None:
    """Dropout on CPU, a mask that learns, values of another width: the module runs as it was."""
    q, k, v = (tensor(1, 2, 5, 8, seed=seed) for seed in range(3))
    backend = choose(Call(q, k, v, causal=True))
    assert not isinstance(backend, str) and (backend.name, backend.device) == ("flash", "cpu")
    assert "dropout" in choose(Call(q, k, v, dropout=0.1, causal=True))
    learns = torch.zeros(5, 5, dtype=q.dtype, requires_grad=True)
    assert "needs a gradient" in choose(Call(q, k, v, learns))
    assert "differ in size" in choose(Call(q, k, tensor(1, 2, 5, 4), causal=True))
    with pytest.raises(ValueError, match="its plain kernel"):
        attention(q, k, v, keepers(8), dropout=0.1, causal=True)


class Odd(nn.Module):
    """Masks by booleans, positional arguments, a projection that reads heads one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(N, 3 * N), nn.Linear(N // 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.into(x).unflatten(-1, (3, 4, N // 4)).permute(2, 0, 3, 1, 4)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        return self.out(F.scaled_dot_product_attention(q, k, v, mask))


def test_an_odd_caller() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Odd()).train()
    plain = copy.deepcopy(model)
    x = torch.randn(3, 7, N)
    prac.compress(model, WHOLE.replace(attention_bits=8), example=x)
    assert isinstance(model[0], Attention)
    got, expected = gradients(model, x), gradients(plain, x)
    assert all(0 < relative(got[n], expected[n]) < 0.02 for n in expected if "into" in n)


def test_a_source_is_for_the_tensor_it_was_noted_on() -> None:
    """Found on the tensor and on another view of all of it with rows of that width; not after a change."""
    y = torch.zeros(2, 3, 4).requires_grad_().clone()
    kept = Stored(FULL, Steps(), unbiased=True).keep(y.transpose(0, 1).reshape(-1, 8))
    mark(y, kept, width=8)
    assert source_of(y) is None
    assert source_of(y.view(3, 8)) is kept
    assert source_of(y.view(2, 12)) is None and source_of(y[:1]) is None and source_of(y + 0) is None
    y.add_(1)
    assert source_of(y.view(3, 8)) is None

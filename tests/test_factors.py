"""LoRAct's factors against their definition, and what it does with them: norms, activations, PEFT, ViT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Steps, activations
from models import FAMILIES, IDS
from torch import Tensor, nn

import prac
from prac.config import Factors
from prac.estimators.factors import Decomposed
from prac.layers import Compressed
from prac.memory import track_kept
from prac.ops import linear

LORACT = prac.PRESETS["loract"].replace(min_width=8)


def decomposed(rank: int | float, iterations: int = 0, sketch: Any = "sampled", **kwargs: Any) -> Decomposed:
    return Decomposed(Factors(rank, iterations, sketch), Steps(), name="layer", **kwargs)


def slow(m: int, n: int, decay: float, seed: int = 0) -> Tensor:
    """Singular values that decay as i^-decay, with incoherent singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    u, v = (torch.linalg.qr(torch.randn(size, k, generator=generator, dtype=torch.float64)).Q for size in (m, n))
    return (u * torch.arange(1, k + 1, dtype=torch.float64) ** -decay) @ v.T


@pytest.mark.parametrize(("m", "n", "r"), [(67, 23, 5), (23, 67, 5), (31, 31, 31), (3, 11, 7), (50, 9, 1)])
@pytest.mark.parametrize("iterations", [0, 2])
def test_the_factors_are_those_of_the_definition(m: int, n: int, r: int, iterations: int) -> None:
    """Q = orth((XᵀX)ᵗ Xᵀ X_S) for the columns S that are drawn (of Xᵀ where tokens are fewer), and X̃ = X QQᵀ."""
    x, estimator = slow(m, n, 1.0), decomposed(r, iterations)
    kept = estimator.keep(x)
    generator = estimator.generator((0, 1), x.device)
    tall = x if m >= n else x.T
    chosen = torch.randperm(tall.shape[1], generator=generator)[: min(r, *x.shape)]
    q = torch.linalg.svd(torch.linalg.matrix_power(tall.T @ tall, iterations) @ tall.T @ tall[:, chosen], False).U
    expected = x @ q @ q.T if m >= n else q @ q.T @ x
    torch.testing.assert_close(kept.reconstruct(), expected, rtol=1e-6, atol=1e-8)
    assert [t.shape for t in kept.tensors] == [(m, min(r, m, n)), (n, min(r, m, n))]
    dy = activations(m, 4, seed=2)
    torch.testing.assert_close(kept.weight_grad(dy), dy.T @ expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("sketch", "bounds"), [("sampled", (1.5, 1.15, 1.06)), ("gaussian", (2.8, 1.2, 1.08))], ids=["sampled", "gaussian"]
)
@pytest.mark.parametrize("ratio", [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32])
def test_how_far_from_the_best(sketch: str, bounds: tuple[float, ...], ratio: float) -> None:
    """‖X − X̃‖² over the least possible, Σ_{i>r} σ_i², with t = 0, 1, 2: never below 1, and in the mean of 20 draws at

    most 1.5, 1.15, 1.06 from columns of X, 2.8, 1.2, 1.08 from random ones: what LoRAct says of its start against RSVD.
    """
    x = slow(300, 96, 1.0)
    best = torch.linalg.svdvals(x)[round(ratio * 96) :].square().sum()
    for iterations, bound in enumerate(bounds):
        estimator = decomposed(ratio, iterations, sketch)
        errors = torch.stack([(x - estimator.compress(x, x.dtype).reconstruct()).square().sum() for _ in range(20)])
        assert (errors >= best * (1 - 1e-9)).all()
        assert errors.mean() / best < bound, (iterations, (errors.mean() / best).item())


def test_a_tensor_of_low_rank_is_kept_exactly() -> None:
    x = slow(80, 40, 1.0)
    x = (x @ torch.linalg.svd(x).Vh[:5].T) @ torch.linalg.svd(x).Vh[:5]
    for sketch in ("sampled", "gaussian"):
        torch.testing.assert_close(decomposed(5, 0, sketch).keep(x).reconstruct(), x, rtol=1e-8, atol=1e-10)


def test_draws_differ_and_repeat() -> None:
    x, clock = slow(60, 30, 0.5), Steps()

    def three() -> list[Tensor]:
        estimator = Decomposed(Factors(4), clock, name="layer")
        return [estimator.compress(x, x.dtype).reconstruct() for _ in range(3)]

    first, again = three(), three()
    assert not torch.equal(first[0], first[1])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    # Within one forward pass layers that read the same tensor share its factors.
    estimator = decomposed(4)
    kept = estimator.keep(x)
    assert all(a is b for a, b in zip(kept.tensors, estimator.keep(x).tensors, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """No overflow in products over many tokens, and the error of the dtype."""
    x = (40 * slow(3000, 24, 0.0)).to(dtype) * 30
    kept = decomposed(24, 2).keep(x)
    assert all(t.dtype == dtype for t in kept.tensors)
    assert (kept.reconstruct().double() - x.double()).norm() < 0.02 * x.double().norm()


def test_bad_ranks() -> None:
    for bad, word in ((0.0, "rank 0"), (-1, "not negative"), (1.5, "fraction of the width")):
        with pytest.raises(ValueError, match=word):
            Factors(bad)
    with pytest.raises(ValueError, match="iterations must be"):
        Factors(0.5, -1)
    with pytest.raises(ValueError, match="sketch must be"):
        Factors(0.5, 0, "svd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layer: r1 \\+ r2 = 65 \\+ 0 = 65 exceeds the width 64"):
        decomposed(65, width=64)


def test_pre_norm_keeps_one_tensor_for_norm_and_readers() -> None:
    """One pair of factors of x̂ serves the norm and q, k, v; the gradients are those of x̃ in every formula."""
    torch.manual_seed(0)
    model = FAMILIES["llama"][0]().double().train()
    handle = prac.compress(model, LORACT)
    table = handle.summary()
    assert "from x̂ of input_layernorm" in table and "rank 4 of 32, every step" in table
    layer = model.model.layers[0]
    seen: dict[str, Any] = {}
    layer.input_layernorm.estimators["x"].observer = lambda x, kept: seen.update(x=x, kept=kept)
    with torch.enable_grad():
        x = activations(4 * 17, 32).view(4, 17, 32).requires_grad_()
        y = layer.input_layernorm(x)
        q = layer.self_attn.q_proj(y)
    dq = activations(4 * 17, 32, seed=5).view(4, 17, 32)
    q.backward(dq)
    xhat, gamma = seen["kept"].reconstruct(), layer.input_layernorm.weight.detach()
    g = dq.reshape(-1, 32) @ layer.self_attn.q_proj.weight.detach()
    torch.testing.assert_close(layer.self_attn.q_proj.weight.grad, dq.reshape(-1, 32).T @ (xhat * gamma))
    torch.testing.assert_close(layer.input_layernorm.weight.grad, (g * xhat).sum(0))
    rho = (
        1 / (x.detach().reshape(-1, 32).square().mean(-1, keepdim=True) + layer.input_layernorm.variance_epsilon).sqrt()
    )
    expected = rho * (g * gamma - xhat * (g * gamma * xhat).mean(-1, keepdim=True))
    torch.testing.assert_close(x.grad.reshape(-1, 32), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
def test_at_full_rank_gradients_are_exact(family: str) -> None:
    """Every kind of layer: linear, norm, activation, in both forms."""
    build, batch = FAMILIES[family]
    full = Factors(1.0, 1)
    for group in (None, full):
        torch.manual_seed(0)
        model = build().double().train()
        batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        plain = gradients(model, batch)
        prac.compress(model, LORACT.replace(linear=full, norm=full, activation=full, group=group))
        for name, g in gradients(model, batch).items():
            torch.testing.assert_close(g, plain[name], rtol=1e-6, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    out = model(**batch)
    value = out[0] if not isinstance(out, Tensor) else out
    value.square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_peft_keeps_less_the_lower_the_ratio() -> None:
    """LoRA on frozen weights: the loss falls, only adapters get gradients, bytes follow r; ViT the same way."""
    from peft import LoraConfig, get_peft_model

    kept = {}
    for ratio in (None, 1 / 2, 1 / 4, 1 / 8):
        torch.manual_seed(0)
        model = get_peft_model(FAMILIES["llama"][0](), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"]))
        model.train()
        if ratio is not None:
            f = Factors(ratio)
            prac.compress(model, LORACT.replace(linear=f, norm=f, activation=f, group=f))
        with track_kept(model) as found:
            model(input_ids=IDS, labels=IDS)
        kept[ratio] = sum(n for name, n in found.by_module.items() if ".layers." in name)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(12):
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.05, (ratio, losses)
        assert all(p.requires_grad == ("lora" in n) for n, p in model.named_parameters())
    assert kept[1 / 8] < kept[1 / 4] < kept[1 / 2] < kept[None]


def test_vit_trains() -> None:
    torch.manual_seed(0)
    build, batch = FAMILIES["vit"]
    model = build().train()
    prac.compress(model, LORACT.replace(group=Factors(0.5), linear=Factors(0.5), activation=Factors(0.5)))
    assert any(isinstance(m, Compressed) for m in model.modules())
    labels = torch.arange(len(batch["pixel_values"])) % 2
    head, losses = nn.Linear(32, 2), []
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(15):
        out = model(**batch)
        state = out.last_hidden_state[:, 0] if hasattr(out, "last_hidden_state") else out.logits
        loss = nn.functional.cross_entropy(head(state) if state.shape[-1] == 32 else state[:, :2], labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_linear_op_with_factors() -> None:
    x, dy = slow(40, 12, 1.0).requires_grad_(), activations(40, 6)
    w = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)
    linear(x, w, None, decomposed(12)).backward(dy)
    torch.testing.assert_close(w.grad, dy.T @ x.detach())
    torch.testing.assert_close(x.grad, dy @ w.detach())

"""What autograd promises of any layer, whatever keeps its input; and no promise of prac's without effect."""

from __future__ import annotations

import copy
import sys
import threading
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import gradients, relative
from models import BATCH, IDS, Block, N, build
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import prac
from prac.layers import Compressed
from prac.memory import track_kept

FULL = prac.Bits(32)
EXACT = prac.Config(linear=FULL, norm=FULL, activation=FULL, group=FULL, min_width=1)
# Ranks that lose nothing, so that the exact scalar is used.
RANK = EXACT.replace(group=prac.Rank(0.0, 1.0), linear=FULL)
X = torch.randn(4, 17, N, generator=torch.Generator().manual_seed(1))


class Two(nn.Module):
    """A norm with two readers, of which a call may use one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b, self.out = nn.LayerNorm(N), *(nn.Linear(N, N) for _ in range(3))

    def forward(self, x: Tensor, use: str = "ab", seen: list[Tensor] | None = None) -> Tensor:
        h = self.norm(x)
        if seen is not None:
            h.retain_grad()
            seen.append(h)
        return self.out(sum(torch.tanh(getattr(self, name)(h)) for name in use))


@pytest.mark.parametrize("config", [EXACT, RANK])
@pytest.mark.parametrize("use", ["ab", "a", "b"])
def test_none_where_plain_gives_none_and_gradients_at_the_norm(config: prac.Config, use: str) -> None:
    torch.manual_seed(0)
    plain = Two().train()
    model = copy.deepcopy(plain)
    prac.compress(model, config, example=X)
    outputs: list[list[Tensor]] = [[], []]
    for m, seen in zip((model, plain), outputs, strict=True):
        m(X.clone().requires_grad_(), use, seen).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or relative(p.grad, q.grad) < 1e-4, name
    assert relative(outputs[0][0].grad, outputs[1][0].grad) < 1e-5


@pytest.mark.parametrize("config", [EXACT, RANK])
@pytest.mark.parametrize("stranger", ["none", "reads", "hook"])
def test_the_exact_scalar_knows_what_it_does_not_cover(config: prac.Config, stranger: str) -> None:
    """Where somebody else reads a norm's output, or changes its gradient, the norm's own gradient is still right."""
    torch.manual_seed(0)
    plain = Two().train()
    model = copy.deepcopy(plain)
    prac.compress(model, config, example=X)

    def step(m: nn.Module) -> Tensor:
        x = X.clone().requires_grad_()
        h = m.norm(x)
        if stranger == "hook":
            h.register_hook(lambda g: 2 * g + 0.3)
        y = m.a(h).tanh() + m.b(h)
        y = y + h.sin() if stranger == "reads" else y
        y.square().sum().backward()
        return x.grad

    # Readers keep their outputs in 4 bits for the exact scalar: 0.13 / √n of it.
    assert relative(step(model), step(plain)) < (0.05 if config is RANK and stranger == "none" else 1e-4)


@pytest.mark.parametrize("preset", ["lean", "small", "fast", "paper"])
def test_changes_in_place(preset: str) -> None:
    """Of an output as in plain PyTorch; of a norm's input between it and its readers, with the right gradient."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc, self.mid, self.out = nn.LayerNorm(N), *(nn.Linear(N, N) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            h[:, 0] = 0
            y = F.relu(self.fc(h), inplace=True)
            z = self.mid(y)
            z[:, 1] += 1.0
            return self.out(z)

    model = Net().train()
    plain = copy.deepcopy(model)
    prac.compress(model, prac.PRESETS[preset].replace(min_width=8), include="*", example=X)
    torch.testing.assert_close(model(X), plain(X))
    assert gradients(model, X).keys() == gradients(plain, X).keys()

    def modified(m: nn.Module, copied: bool) -> Tensor:
        leaf = X.clone().requires_grad_()
        x = leaf * 1
        h = m.norm(x)
        x = 2 * x if copied else x.mul_(2)
        (m.fc(h) * x).sum().backward()
        return leaf.grad

    if preset in ("lean", "fast"):
        exact = copy.deepcopy(plain)
        prac.compress(exact, EXACT, include="*", example=X)
        assert relative(modified(exact, False), modified(plain, True)) < 1e-4


@pytest.mark.parametrize("preset", ["lean", "fast", "paper"])
def test_ways_to_call_a_layer(preset: str) -> None:
    model = build("llama")
    prac.compress(model, prac.PRESETS[preset].replace(min_width=8))
    layer = model.model.layers[0]
    assert torch.equal(layer.input_layernorm(hidden_states=X), layer.input_layernorm(X))
    assert torch.equal(layer.self_attn.o_proj(input=X), layer.self_attn.o_proj(X))
    assert layer.mlp(x=X).shape == X.shape
    empty = X[:, :0].requires_grad_()
    layer.mlp(layer.post_attention_layernorm(empty)).sum().backward()
    assert empty.grad.shape == empty.shape
    with pytest.raises(TypeError, match=r"positional argument"):
        layer.self_attn.o_proj(X, X)


def test_tensors_that_are_not_rows_of_features_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(N, N), nn.Linear(N, N)).train()
    prac.compress(model, "lean", include="*", example=X)
    jagged = torch.nested.nested_tensor([X[0, :3], X[1, :5]], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"0: its input is a nested tensor.*exclude='0'"):
        model(jagged)


def replica(network: nn.Module) -> nn.Module:
    """What ``nn.parallel.replicate`` makes for each device, on the CPU."""
    modules = list(network.modules())
    number = {m: i for i, m in enumerate(modules)}
    copies = [m._replicate_for_data_parallel() for m in modules]
    for module, twin in zip(modules, copies, strict=True):
        twin._former_parameters = {}
        for name, child in module._modules.items():
            setattr(twin, name, None if child is None else copies[number[child]])
        for name, p in module._parameters.items():
            if p is None:
                twin._parameters[name] = None
            else:
                setattr(twin, name, p.view_as(p))
        twin._buffers = dict(module._buffers)
    return copies[0]


@pytest.mark.parametrize("config", [EXACT, prac.PRESETS["paper"].replace(min_width=8)])
def test_replicas_of_a_model(config: prac.Config) -> None:
    model = build("llama")
    plain = copy.deepcopy(model)
    prac.compress(model, config)
    torch.testing.assert_close(replica(model)(**BATCH).loss, plain(**BATCH).loss)
    replica(model)(**BATCH).loss.backward()
    plain(**BATCH).loss.backward()
    if config is EXACT:
        assert all(relative(p.grad, q.grad) < 1e-3 for p, q in zip(model.parameters(), plain.parameters(), strict=True))


def bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=99, d_model=N, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
    )  # fmt: skip
    torch.manual_seed(0)
    return BartForConditionalGeneration(config).train()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("config", [EXACT, RANK, prac.PRESETS["paper"].replace(min_width=8)])
def test_encoder_decoders_under_checkpointing(config: prac.Config, reentrant: bool) -> None:
    model = bart()
    plain = copy.deepcopy(model)
    prac.compress(model, config)
    for m in (model, plain):
        m.gradient_checkpointing_enable({"use_reentrant": reentrant})
        m.config.use_cache = False
        torch.manual_seed(1)
        m(input_ids=IDS, labels=IDS).loss.backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if config in (EXACT, RANK) and q.grad is not None and q.grad.abs().max() > 1e-4:
            assert relative(p.grad, q.grad) < 1e-3, name


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("config", [EXACT, RANK])
def test_the_first_step_of_a_checkpointed_block(config: prac.Config, given: bool, reentrant: bool) -> None:
    block, x = nn.Sequential(Block(), Block()).train(), X.clone().requires_grad_()
    plain = copy.deepcopy(block)
    prac.compress(block, config, include="*", **({"example": X} if given else {}))
    for m in (block, plain):
        checkpoint(m, x, use_reentrant=reentrant).square().sum().backward()
    for (name, p), q in zip(block.named_parameters(), plain.named_parameters(), strict=True):
        assert relative(p.grad, q[1].grad) < 1e-4, name


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
    for size in (0.02, 0.4, 30.0):
        model = Attends().train()
        model.scale = size
        with torch.no_grad():
            for f in (model.q, model.k):
                f.weight.mul_(N**0.5)
        handle = prac.compress(model, EXACT.replace(attention_bits=4), include="*", example=X)
        model(X).sum().backward()
        (found[size],) = (row.rank for row in handle.rows() if row.what == "attention")
    assert found == {0.02: "4 bits", 0.4: "8 bits / 4 bits", 30.0: "in full / 4 bits"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_any_default_dtype(dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    expected = prac.compress(build("llama"), "lean").summary()
    torch.set_default_dtype(dtype)
    try:
        model = build("llama")
        handle = prac.compress(model, "lean")
        model(**BATCH).loss.backward()
    finally:
        torch.set_default_dtype(before)
    kinds = [line.split()[:2] for line in handle.summary().splitlines()]
    assert kinds == [line.split()[:2] for line in expected.splitlines()]


def test_settings_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    with torch.inference_mode():
        handle = prac.compress(model, "lean")
    torch.use_deterministic_algorithms(True)
    try:
        model(**BATCH).loss.backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert handle.summary().count("x̂") > 1

    class Ascii:
        encoding = "ascii"

    monkeypatch.setattr(sys, "stdout", Ascii())
    assert handle.summary().isascii()


def test_threads_that_bring_the_first_batch_together() -> None:
    model = nn.Sequential(Block(), Block()).train()
    prac.compress(model, "lean", include="*")
    failed: list[BaseException] = []

    def run() -> None:
        try:
            model(X).sum().backward()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and any(isinstance(m, Compressed) for m in model.modules())


def test_resuming_before_the_first_batch() -> None:
    config = prac.PRESETS["paper"].replace(min_width=8)

    def made() -> tuple[nn.Module, prac.Handle]:
        torch.manual_seed(0)
        model = nn.Sequential(Block(), Block()).train()
        return model, prac.compress(model, config, include="*")

    model, handle = made()
    model(X).sum().backward()
    handle.tick()
    state = handle.state_dict()
    twin, resumed = made()
    resumed.load_state_dict(state)
    assert resumed.state_dict()["shared"] == state["shared"] and resumed.step == 1
    twin(X).sum().backward()
    for name, subspace in state["subspaces"].items():
        assert torch.equal(resumed.state_dict()["subspaces"][name]["p"], subspace["p"])
    with pytest.raises(ValueError, match="no state of prac"):
        handle.load_state_dict({})


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda: prac.compress({}), "takes a model"),
        (lambda: prac.compress(Block(), {"linear": 1}), "config must be"),
        (lambda: prac.compress(Block(), example=5), "a batch is a tensor"),
    ],
)
def test_what_is_no_model_config_or_batch(call: Any, what: str) -> None:
    with pytest.raises(TypeError, match=what):
        call()


def test_ordinary_training_gives_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for family in ("llama", "gpt2", "bert", "vit", "plain"):
            model = build(family)
            prac.compress(model, prac.PRESETS["lean"].replace(min_width=8))
            if family == "plain":
                model(IDS).sum().backward()


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
        # q and the output of a query, k and v of a quarter of a key: 4 bits and a scale of 2 bytes for each of 2 heads.
        assert rows.pop("").after == 2.5 * (N // 2 + 4)
    promised = {name: row.after * (20 if name in ("k", "v") else 80) for name, row in rows.items() if row.after}
    assert promised == {name: size for name, size in kept.by_module.items() if name}
    assert ("o" in promised) == (dropout > 0.0)

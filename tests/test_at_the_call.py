"""What a module is when it is called counts, not what it was when it was compressed."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import agree
from models import BATCH, IDS, Block, FeedForward, N, build
from torch import Tensor, nn

import prac
from prac.layers import Compressed

FULL = prac.Bits(32)
EXACT = prac.Config(linear=FULL, norm=FULL, activation=FULL, group=FULL, min_width=1)
X = torch.randn(4, 17, N, generator=torch.Generator().manual_seed(1))


def replace_activation(model: nn.Module) -> None:
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.ReLU()


def replace_forward(model: nn.Module) -> None:
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(torch.tanh(mlp.up_proj(x)))


def replace_forward_of_child(model: nn.Module) -> None:
    down = model.model.layers[1].mlp.down_proj
    down.forward = lambda x: 2 * F.linear(x, down.weight)


def hook_activation(model: nn.Module) -> None:
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda module, args, output: output * 1.5)


def hook_projection(model: nn.Module) -> None:
    model.model.layers[0].mlp.gate_proj.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))


def hook_norm(model: nn.Module) -> None:
    model.model.layers[0].input_layernorm.register_forward_hook(lambda module, args, output: output * 1.5)


def change_eps(model: nn.Module) -> None:
    model.model.norm.variance_epsilon = 0.5


def other_class(model: nn.Module) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model.model.layers[0].self_attn.q_proj.__class__ = Doubled


def parametrized(model: nn.Module) -> None:
    class Symmetric(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w.triu() + w.triu(1).mT

    nn.utils.parametrize.register_parametrization(model.model.layers[0].self_attn.k_proj, "weight", Symmetric())


def pruned(model: nn.Module) -> None:
    from torch.nn.utils import prune

    prune.l1_unstructured(model.model.layers[0].mlp.up_proj, "weight", 0.5)


def frozen(model: nn.Module) -> None:
    model.model.layers[0].requires_grad_(False)


def resized(model: nn.Module) -> None:
    torch.manual_seed(5)
    model.resize_token_embeddings(120, mean_resizing=False)


def adapted(model: nn.Module) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(5)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False), model)


def widened(model: nn.Module) -> None:
    model.model.layers[0].mlp.down_proj = nn.Sequential(copy.deepcopy(model.model.layers[0].mlp.down_proj), nn.Tanh())


CHANGES = [
    replace_activation, replace_forward, replace_forward_of_child, hook_activation, hook_projection, hook_norm,
    change_eps, other_class, parametrized, pruned, frozen, resized, adapted, widened,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*that prac compressed")
@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_compress_are_honoured(change: Callable[[nn.Module], None]) -> None:
    model = build("llama")
    plain = copy.deepcopy(model)
    handle = prac.compress(model, EXACT)
    model(**BATCH).loss.backward()  # what was kept before is not used again
    change(model)
    change(plain)
    agree(model, plain, **BATCH)
    handle.summary()
    handle.restore()
    assert not any(isinstance(module, Compressed) or "_prac" in vars(module) for module in model.modules())
    agree(model, plain, **BATCH)


def test_what_was_changed_is_said_once_and_in_the_summary() -> None:
    model = build("llama")
    handle = prac.compress(model, EXACT)
    replace_activation(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model(**BATCH).loss.backward()
    texts = [str(w.message) for w in caught if "prac compressed" in str(w.message)]
    assert sum("act_fn was changed" in text for text in texts) == 1 and len(texts) == len(set(texts)) <= 2
    rows = {row.name: row for row in handle.rows()}
    for layer in range(2):
        assert "act_fn was changed" in rows[f"model.layers.{layer}.mlp"].note
        assert "keeps an input of its own" in rows[f"model.layers.{layer}.mlp.down_proj"].note


def test_a_dropout_switched_on_later_drops() -> None:
    class Feed(FeedForward):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Dropout(0.0), nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(self.w2(self.inner(F.silu(self.w1(x)) * self.w3(x))))

    model = nn.Sequential(nn.RMSNorm(N), Feed()).train()
    plain = copy.deepcopy(model)
    prac.compress(model, EXACT, include="*", example=X)
    agree(model, plain, X)
    for each in (model, plain):
        each[1].inner.p, each[1].outer.p = 0.5, 0.7
    with pytest.warns(UserWarning, match="inner was changed"):
        agree(model, plain, X)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_eps_of_none_is_that_of_the_dtype(dtype: torch.dtype) -> None:
    norm = nn.Sequential(nn.RMSNorm(N), nn.Linear(N, 5)).to(dtype).train()
    plain = copy.deepcopy(norm)
    prac.compress(norm, EXACT, include="*", example=X.to(dtype))
    small = X.to(dtype) * 1e-3
    torch.testing.assert_close(norm(small), plain(small), rtol=2e-2, atol=0)


def test_a_moved_model_and_a_grown_one_are_restored_whole() -> None:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=4, target_modules="all-linear")
    merged = get_peft_model(build("llama"), lora)
    handles = [prac.compress(merged)]
    merged.merge_and_unload()
    wrapped, grown = build("llama"), build("llama")
    handles += [prac.compress(wrapped), prac.compress(grown)]
    get_peft_model(wrapped, lora)
    grown.model.layers.append(copy.deepcopy(grown.model.layers[1]))
    gone = grown.model.layers[0]
    del grown.model.layers[0]
    for handle in handles:
        assert handle.summary()
        handle.restore()
        assert not any(isinstance(m, Compressed) or "_prac" in vars(m) for m in handle.model.modules())
    assert not any(isinstance(m, Compressed) for m in gone.modules())


def double(x: Tensor) -> Tensor:
    return 2 * x


@pytest.mark.filterwarnings("ignore:.*that prac compressed")
def test_changes_before_the_first_batch_and_methods_taken_before() -> None:
    """Without an example the layers are swapped anew at the first batch; what somebody took of them still works."""
    model = build("plain")
    plain = copy.deepcopy(model)
    handle = prac.compress(model, EXACT)
    for each in (model, plain):
        taken = each[1].wq.forward
        each[1].wq.forward = lambda x, taken=taken: double(taken(x))
        each[2].wk.__class__ = type("Sub", (type(each[2].wk),), {"forward": lambda s, x: double(F.linear(x, s.weight))})

        class Sub(type(each[2].wv)):  # type: ignore[misc]
            def forward(self, x: Tensor) -> Tensor:
                return double(super().forward(x))

        each[2].wv.__class__ = Sub
    agree(model, plain, IDS)
    handle.restore()
    agree(model, plain, IDS)


def test_pickling_says_what_to_do() -> None:
    model = build("plain")
    handle = prac.compress(model, "lean")
    with pytest.raises(TypeError, match=r"state_dict\(\).*restore\(\)"):  # while it waits for a batch
        torch.save(model, io.BytesIO())
    copy.deepcopy(model)(IDS)
    model(IDS)
    with pytest.raises(TypeError, match=r"state_dict\(\).*restore\(\)"):
        torch.save(model, io.BytesIO())
    twin = copy.deepcopy(model)
    twin(IDS)
    assert copy.copy(model[1]).wq is model[1].wq
    handle.restore()
    torch.save(model, io.BytesIO())


def test_trained_in_eval_mode_is_told_once() -> None:
    block = nn.Sequential(Block(), Block()).eval()
    prac.compress(block, "lean", include="*", example=X)
    optimizer = torch.optim.SGD(block.parameters(), 1e-3)

    def step() -> None:
        block(X).sum().backward()
        optimizer.step()

    with pytest.warns(UserWarning, match="trained in eval mode"):
        step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()
        block.train()
        step()
        block.eval()(X)  # evaluation with gradients on, then training: as people do
        block.train()
        step()

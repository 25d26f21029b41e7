"""The chunked loss and what becomes of a model after it was put in: honoured at the call, or plain with one warning."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import build
from test_loss import batch, step
from torch import Tensor, nn

from prac.convert.chunked_loss import ChunkedLoss


def agree(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=name, check_dtype=False)


# --- honoured ------------------------------------------------------------------------


def resized(model: nn.Module) -> None:
    torch.manual_seed(1)
    model.resize_token_embeddings(120, mean_resizing=False)


def another_head(model: nn.Module) -> None:
    torch.manual_seed(1)
    model.lm_head = nn.Linear(32, 97)


def another_weight(model: nn.Module) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)


def tied(model: nn.Module) -> None:
    model.lm_head.weight = model.get_input_embeddings().weight


def parametrized(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model.lm_head)


def watched(model: nn.Module) -> None:
    model.lm_head.register_forward_hook(lambda module, args, output: None)
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))


def in_another_dtype(model: nn.Module) -> None:
    model.double()


CHANGES = [resized, another_head, another_weight, tied, parametrized, watched, in_another_dtype]


@pytest.mark.parametrize("change", CHANGES)
def test_a_head_that_is_still_a_linear_layer(change: Callable[[nn.Module], None]) -> None:
    plain = build("llama")
    chunked = copy.deepcopy(plain)
    loss = ChunkedLoss(chunked, strict=True)
    step(chunked, **batch())
    old = chunked.lm_head
    for model in (plain, chunked):
        change(model)
    agree(step(chunked, **batch()), step(plain, **batch()))
    assert chunked(**batch()).logits is None
    assert old is chunked.lm_head or "forward" not in vars(old)
    loss.remove()
    assert "forward" not in vars(chunked.lm_head)
    torch.testing.assert_close(chunked(**batch()).logits, plain(**batch()).logits)


# --- plain, with one warning ---------------------------------------------------------


class Wide(nn.Linear):
    """Logits in float32 whatever comes in."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.float(), self.weight.float())


def adapters(model: nn.Module) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(1)
    inject_adapter_in_model(LoraConfig(target_modules=["lm_head"], r=4, init_lora_weights=False), model)
    model.requires_grad_(True)


def own_forward(model: nn.Module) -> None:
    wide = Wide(32, 97, bias=False)
    wide.weight = model.lm_head.weight
    model.lm_head = wide


def forward_replaced(model: nn.Module) -> None:
    head = model.lm_head
    head.forward = lambda x: nn.functional.linear(x, head.weight) * 2


def scaled_by_a_hook(model: nn.Module) -> None:
    model.lm_head.register_forward_hook(lambda module, args, output: 3 * output)


def capped_in_place(model: nn.Module) -> None:
    def cap(module: nn.Module, args: Any, output: Any) -> None:
        output[..., 5] = -10.0

    model.lm_head.register_forward_hook(cap)


def hooked_on_gradients(model: nn.Module) -> None:
    model.lm_head.register_full_backward_hook(lambda module, dx, dy: (dx[0] * 2,))


def another_loss(model: nn.Module) -> None:
    def focal(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        return (1 - logits.softmax(-1)[:, :-1].gather(-1, labels[:, 1:].clamp_min(0).unsqueeze(-1))).square().mean()

    model.loss_function = focal


PLAIN = {
    adapters: "not a linear layer|a forward of its own",
    own_forward: "a forward of its own",
    forward_replaced: "a forward of its own",
    scaled_by_a_hook: "changes its logits",
    capped_in_place: "changes its logits",
    hooked_on_gradients: "hooked on to the gradients",
    another_loss: "its loss was replaced",
}


@pytest.mark.parametrize("change", PLAIN)
def test_what_cannot_be_chunked_any_more(change: Callable[[nn.Module], None]) -> None:
    plain = build("llama")
    chunked = copy.deepcopy(plain)
    loss = ChunkedLoss(chunked)
    for model in (plain, chunked):
        change(model)
    with pytest.warns(UserWarning, match=PLAIN[change]) as seen:
        found = step(chunked, **batch())
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = step(chunked, **batch())
        logits = chunked(**batch()).logits
    expected = step(plain, **batch())
    agree(found, expected)
    torch.testing.assert_close(logits, plain(**batch()).logits)
    loss.strict = True
    with pytest.raises(ValueError, match=PLAIN[change]):
        chunked(**batch())
    loss.remove()
    agree(step(chunked, **batch()), expected)


def test_a_model_that_does_not_run_on_a_made_up_input_is_found_out_at_the_first_real_one() -> None:
    from transformers import LlamaForCausalLM

    class Demanding(LlamaForCausalLM):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None, *, image: Tensor) -> Any:
            assert image.sum() > 0
            return super().forward(input_ids, labels=labels)

    model = Demanding(build("llama").config)
    ChunkedLoss(model, strict=True)
    assert model.train()(**batch(), image=torch.ones(1)).logits is None

"""The chunked loss and what becomes of a model after it was put in: honoured at the call, or plain with one warning."""

from __future__ import annotations

import copy
import gc
import io
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build
from test_loss import batch, step
from torch import Tensor, nn

import prac
from prac.loss import ChunkedLoss


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


# --- what a call is ------------------------------------------------------------------


def test_labels_by_position_and_outputs_as_a_tuple() -> None:
    model = build("llama")
    expected = model(**batch(), output_hidden_states=True)
    ChunkedLoss(model, strict=True)
    inputs = batch()
    found = model(inputs["input_ids"], None, None, None, None, inputs["labels"], output_hidden_states=True)
    torch.testing.assert_close(found.loss, expected.loss)
    assert found.logits is None
    assert len(found.hidden_states) == len(expected.hidden_states)
    loss, logits = model(**inputs, return_dict=False)[:2]
    torch.testing.assert_close(loss, expected.loss)
    assert logits is None


def test_targets_that_are_shifted_already() -> None:
    model, inputs = build("llama"), batch()
    shifted = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[..., 1:]
    expected = model(**inputs).loss
    ChunkedLoss(model, strict=True)
    torch.testing.assert_close(model(**inputs, shift_labels=shifted).loss, expected)


def test_label_smoothing_also_where_it_is_plain() -> None:
    plain, chunked = build("llama"), build("llama")
    ChunkedLoss(chunked, label_smoothing=0.1, strict=True)
    ChunkedLoss(plain, label_smoothing=0.1)
    plain.lm_head.register_forward_hook(lambda module, args, output: output * 1.0)
    with pytest.warns(UserWarning, match="changes its logits"):
        expected = step(plain, **batch())
    agree(step(chunked, **batch()), expected)


def test_a_forward_that_raises_leaves_nothing_behind() -> None:
    model = build("llama")
    ChunkedLoss(model, strict=True)
    handle = model.model.norm.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError("stop")))
    with pytest.raises(KeyError):
        model(**batch())
    with pytest.raises(TypeError):
        model(*range(50), **batch())
    handle.remove()
    assert isinstance(model.lm_head(torch.ones(1, 32)), Tensor)
    assert model(**batch()).logits is None


def test_a_call_inside_of_a_call() -> None:
    model = build("llama")
    ChunkedLoss(model, strict=True)
    inside: list[Any] = []

    def look(module: nn.Module, args: Any) -> None:
        if not inside:
            inside.append(None)
            inside.append(model(input_ids=batch()["input_ids"]))

    model.lm_head.register_forward_pre_hook(look)
    assert model(**batch()).logits is None
    assert inside[1].logits.shape == (3, 17, 97)


def test_threads_do_not_see_each_others_calls() -> None:
    model = build("llama")
    ChunkedLoss(model, strict=True)
    barrier, found = threading.Barrier(2, timeout=60), {}
    model.model.norm.register_forward_hook(lambda *_: barrier.wait() * 0 or None)

    def run(labels: bool) -> None:
        found[labels] = model(**batch()) if labels else model(input_ids=batch()["input_ids"])

    threads = [threading.Thread(target=run, args=(labels,)) for labels in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[True].logits is None
    assert found[False].logits.shape == (3, 17, 97)


def replica_of(model: nn.Module) -> nn.Module:
    """As ``DataParallel`` makes them, without a second device."""
    twins = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, twin in twins.items():
        for name, child in module._modules.items():
            setattr(twin, name, twins[child])
        for name, parameter in module._parameters.items():
            setattr(twin, name, None if parameter is None else parameter * 1.0)
    return twins[model]


def test_a_replica_uses_its_own_head() -> None:
    model = build("llama")
    ChunkedLoss(model, strict=True)
    expected = step(model, **batch())
    replica, forward = replica_of(model), vars(model.lm_head)["forward"]
    replica.lm_head.weight = replica.lm_head.weight * 2
    model.zero_grad()
    output = replica(**batch())
    output.loss.backward()
    assert output.logits is None
    assert output.loss.item() != pytest.approx(expected["loss"].item(), rel=1e-3)
    assert vars(model.lm_head)["forward"] is forward
    assert model.lm_head.weight.grad.any()


# --- FSDP2 ---------------------------------------------------------------------------


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("unit", ["head", "head and norm", "none"])
@pytest.mark.parametrize("change", [None, scaled_by_a_hook])
def test_a_head_that_is_sharded(mesh: Any, unit: str, change: Callable[[nn.Module], None] | None) -> None:
    from torch.distributed.fsdp import fully_shard

    plain = build("llama")
    chunked = copy.deepcopy(plain)
    ChunkedLoss(chunked, strict=change is None)
    if change is not None:
        change(plain)
        change(chunked)
    if unit != "none":
        modules = chunked.lm_head if unit == "head" else [chunked.model.norm, chunked.lm_head]
        fully_shard(modules, mesh=mesh, reshard_after_forward=True)
    fully_shard(chunked, mesh=mesh)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [step(chunked, **batch()) for _ in range(2)][1]
    agree({name: getattr(g, "full_tensor", lambda g=g: g)() for name, g in found.items()}, step(plain, **batch()))


# --- no traces -----------------------------------------------------------------------


def state(model: nn.Module) -> list[dict[str, Any]]:
    return [{k: dict(v) if isinstance(v, dict) else v for k, v in vars(m).items()} for m in model.modules()]


def own_loss_before(model: nn.Module) -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    model.loss_function = ForCausalLMLoss


@pytest.mark.parametrize("before", [lambda model: None, own_loss_before])
def test_removed_without_a_trace(before: Callable[[nn.Module], None]) -> None:
    model = build("llama")
    before(model)
    step(model, **batch())
    was = state(model)
    loss = ChunkedLoss(model)
    step(model, **batch())
    loss.remove()
    model.zero_grad()
    assert state(model) == was


def test_what_cannot_have_it_is_not_touched() -> None:
    for family in ("gemma2", "t5", "bert"):
        model = build(family)
        was = state(model)
        with pytest.raises(ValueError, match="loss"):
            ChunkedLoss(model)
        assert state(model) == was
    model = build("llama")
    ChunkedLoss(model)
    was = state(model)
    with pytest.raises(ValueError, match="has the chunked loss already"):
        ChunkedLoss(model)
    assert state(model) == was


def test_a_loss_that_was_put_in_since_stays() -> None:
    model = build("llama")
    loss = ChunkedLoss(model)
    another_loss(model)
    mine = model.loss_function
    loss.remove()
    assert model.loss_function is mine


@pytest.mark.parametrize("trained", [False, True])
def test_it_keeps_no_model_alive(trained: bool) -> None:
    model = build("llama")
    loss = ChunkedLoss(model)
    if trained:
        step(model, **batch())
    alive = [weakref.ref(p) for p in model.parameters()]
    gc.collect()
    gc.disable()
    try:
        head = weakref.ref(model.lm_head)
        model.lm_head = nn.Linear(32, 97)
        step(model, **batch())
        assert head() is None
        del model
        assert not any(ref() is not None for ref in alive)
    finally:
        gc.enable()
    loss.remove()


def test_saved_and_loaded_whole() -> None:
    model, file = build("llama"), io.BytesIO()
    ChunkedLoss(model, strict=True)
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    agree(step(loaded, **batch()), step(model, **batch()))
    assert loaded(**batch()).logits is None


def test_beside_a_compressed_head() -> None:
    config = prac.PRESETS["lean"].replace(min_width=8)
    plain, chunked = build("llama"), build("llama")
    prac.compress(plain, config, include="*.mlp*")
    handle = prac.compress(chunked, config, include=["*.mlp*", "lm_head"], loss="chunked")
    agree(step(chunked, **batch()), step(plain, **batch()))
    handle.restore()
    assert "forward" not in vars(chunked.lm_head)
    assert chunked(**batch()).logits is not None

"""The chunked loss in calls of every kind, sharded, and taken out again without a trace."""

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
from test_loss_later import agree, another_loss, scaled_by_a_hook
from torch import Tensor, nn

import prac
from prac.convert.chunked_loss import ChunkedLoss

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

"""The monitor measures what is there, and changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from monitored import batches, llama, steps
from torch import nn

import prac
from prac.layers import Compressed
from prac.monitoring import monitor
from prac.monitoring.rerun import Call


@pytest.mark.parametrize("preset", ["paper", "lean", "fast", "loract", "co-compression"])
def test_a_monitored_run_is_the_same_run(preset):
    ends = []
    for monitored in (False, True):
        torch.manual_seed(0)
        model = llama(attention_dropout=0.1)
        handle = prac.compress(model, prac.PRESETS[preset].replace(T1=2, T2=3, min_width=8))
        watch = prac.Monitor(handle, every=2, parts=3) if monitored else None
        steps(model, batches(7), watch)
        ends.append((list(model.parameters()), torch.random.get_rng_state(), handle.state_dict()))
        assert watch is None or [reading.step for reading in watch.history] == [1, 2, 4, 6]
    (plain, plain_rng, plain_state), (seen, seen_rng, seen_state) = ends
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))
    assert torch.equal(plain_rng, seen_rng)
    assert plain_state["step"] == seen_state["step"] == 7
    for name, subspace in plain_state["subspaces"].items():
        assert subspace["refreshes"] == seen_state["subspaces"][name]["refreshes"]
        assert torch.equal(subspace["p"], seen_state["subspaces"][name]["p"])


@pytest.mark.parametrize(("rows", "parts"), [(7, 1), (7, 3), (5, 8)])
def test_numbers_of_a_linear_layer_against_their_formulas(rows, parts):
    torch.manual_seed(rows + parts)
    model = nn.Sequential(nn.Linear(13, 9, dtype=torch.float64))
    handle = prac.compress(model, prac.Config(linear=prac.Rank(3, 4), min_width=1), include="*")
    watch = prac.Monitor(handle, parts=parts)
    x_BSN, dy_BSO = torch.randn(rows, 11, 13, dtype=torch.float64), torch.randn(rows, 11, 9, dtype=torch.float64)
    with watch:
        model(x_BSN).backward(dy_BSO)
    (reading,) = watch.history
    (layer,) = reading.layers

    x_MN, dy_MO = x_BSN.reshape(-1, 13), dy_BSO.reshape(-1, 9)
    p_NR = next(iter(handle.state_dict()["subspaces"].values()))["p"]
    off_MN = x_MN @ p_NR @ p_NR.mT - x_MN
    dw_ON, db_O, off_ON = dy_MO.mT @ x_MN, dy_MO.sum(0), dy_MO.mT @ off_MN
    variance = off_ON.square().sum() / (dw_ON.square().sum() + db_O.square().sum())  # the bias is exact
    assert layer.gradient_variance == pytest.approx(variance.item(), rel=1e-9)
    assert layer.reconstruction_error == pytest.approx((off_MN.square().sum() / x_MN.square().sum()).item(), rel=1e-5)
    assert layer.kept_bytes == reading.kept_bytes == rows * 11 * 7 * 8
    assert layer.refreshes == reading.refreshes == 1
    assert (layer.name, layer.kind, layer.rank) == ("0", "linear", "3+4 of 13")


@pytest.mark.parametrize("preset", ["paper", "lean"])
def test_numbers_of_a_whole_model(preset):
    torch.manual_seed(1)
    model = llama()
    twin = copy.deepcopy(model)
    handle = prac.compress(model, prac.PRESETS[preset].replace(min_width=8, attention_bits=8))
    watch = prac.Monitor(handle, parts=1)
    (batch,) = batches(1)
    watch.begin()
    model(**batch).loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    reading = watch.end()
    assert all(torch.equal(grad, p.grad) for (_, p), grad in zip(model.named_parameters(), grads.values(), strict=True))

    with prac.memory.track_kept(model, batch) as kept:
        model(**batch)
    assert reading.kept_bytes == kept.total
    errors = handle.reconstruction_error(batch)
    twin(**batch).loss.backward()
    exact = {name: p.grad for name, p in twin.named_parameters()}
    layers = {layer.name: layer for layer in reading.layers}
    assert set(layers) == {
        name for name, module in model.named_modules() if isinstance(module, Compressed) or f"{name}.weight" in grads
    }
    for name, layer in layers.items():
        if f"{name}.weight" in exact:  # another draw of the rounding: the same size, not the same number
            g = exact[f"{name}.weight"]
            variance = ((grads[f"{name}.weight"] - g).square().sum() / g.square().sum()).item()
            assert layer.gradient_variance == pytest.approx(variance, rel=1.0, abs=1e-10)
        if name in errors:
            assert layer.reconstruction_error == pytest.approx(errors[name], rel=0.2)
    assert layers["model.layers.0.self_attn.o_proj"].reconstruction_error > 0
    assert layers["lm_head"].gradient_variance < 1e-9
    assert layers["model.embed_tokens"].kind == "-"


@pytest.mark.parametrize("preset", ["paper", "lean"])
def test_nothing_lost_reads_nothing(preset):
    full = prac.Bits(32)
    lossless = {
        "paper": prac.Config(linear=prac.Rank(1.0, 0.0), norm=prac.Rank(1.0, 0.0), activation=prac.Rank(1.0, 0.0)),
        "lean": prac.Config(linear=full, norm=full, activation=full, group=full),
    }[preset].replace(min_width=1)
    model = llama(attention_dropout=0.2)  # both passes have to draw the same
    watch = prac.Monitor(prac.compress(model, lossless), parts=2)
    steps(model, batches(1), watch)
    for layer in watch.history[0].layers:
        assert (layer.gradient_variance or 0.0) < 1e-9
        assert (layer.reconstruction_error or 0.0) < 1e-9


@pytest.mark.parametrize("how", ["autocast", "checkpointing", "compile", "lora", "chunked", "logits"])
def test_where_it_works(how):
    model = llama()
    if how == "lora":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
        for name, p in model.named_parameters():
            if "lora_B" in name:  # where it is zero, so are the gradients of A
                nn.init.normal_(p, std=0.1)
    handle = prac.compress(
        model, prac.PRESETS["lean"].replace(min_width=8), loss="chunked" if how == "chunked" else None
    )
    if how == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    called = torch.compile(model, backend="eager") if how == "compile" else model
    (batch,) = batches(1)
    watch = prac.Monitor(handle, parts=2)
    with watch:
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            output = called(**batch)
        if how == "logits":  # a loss of the user's own
            output.logits.square().mean().backward()
        else:
            output.loss.backward()
    (reading,) = watch.history
    trained = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert {layer.name for layer in reading.layers if layer.gradient_variance is not None} == trained
    assert 0 < max(layer.gradient_variance or 0.0 for layer in reading.layers) < 0.5
    with prac.memory.track_kept(model, batch) as kept, torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        model(**batch)
    assert reading.kept_bytes == pytest.approx(kept.total, rel=0.05)  # what is kept per batch is kept per part


def test_gradients_from_outside_alone_count(monkeypatch):
    """Outputs that the model computes one from the other, as a loss from logits and these from hidden states."""
    model = llama()
    watch = prac.Monitor(prac.compress(model, prac.PRESETS["lean"].replace(min_width=8)))
    (batch,) = batches(1)
    calls = []
    monkeypatch.setattr(Call, "backward", lambda self, output, grads: calls.append(grads))
    with watch:
        output = model(**batch, output_hidden_states=True)
        assert type(output).__name__ == "CausalLMOutputWithPast"
        (3 * output.loss + output.hidden_states[1].sum()).backward()
    grads = calls[0].values()
    assert sorted(g.dim() for g in grads) == [0, 3]
    assert sum(g.sum().item() for g in grads if g.dim() == 0) == 3.0
    assert all((g == 1).all() for g in grads if g.dim() == 3)


def test_buffers_are_put_back():
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16))
    watch = prac.Monitor(prac.compress(model, prac.Config(linear=prac.Rank(4, 4), min_width=1)))
    with watch:
        model(torch.randn(64, 16)).square().sum().backward()
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert len(watch.history) == 1
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


def test_a_step_is_measured_once_however_many_batches_it_takes():
    model = llama()
    handle = prac.compress(model, prac.PRESETS["lean"].replace(min_width=8))
    watch, optimizer = prac.Monitor(handle, every=2), torch.optim.SGD(model.parameters(), 0.01)
    for number, batch in enumerate(batches(8)):
        with watch:
            model(**batch).loss.backward()
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()
    assert [reading.step for reading in watch.history] == [1, 2, 4]


# --- what can go wrong -------------------------------------------------------------------------


def test_a_model_that_is_not_called_gets_one_warning():
    model = llama()
    watch = prac.Monitor(prac.compress(model, prac.PRESETS["lean"].replace(min_width=8)), every=1)
    (batch,) = batches(1)
    with pytest.warns(UserWarning, match="Compress the module that the training loop calls") as warned:
        for _ in range(2):
            watch.begin()
            model.model(batch["input_ids"]).last_hidden_state.sum().backward()  # only a part of it
            assert watch.end() is None
    assert len(warned) == 1
    assert not watch.history


def test_without_memory_for_the_exact_gradient_the_rest_is_measured(monkeypatch):
    model = llama()
    handle = prac.compress(model, prac.PRESETS["lean"].replace(min_width=8))
    watch = prac.Monitor(handle)

    def full(self, output, grads):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Call, "backward", full)
    with pytest.warns(UserWarning, match="raise parts"):
        steps(model, batches(1), watch)
    (reading,) = watch.history
    assert all(layer.gradient_variance is None for layer in reading.layers)
    assert reading.totals()["prac/reconstruction_error"] > 0
    assert model.training


def test_an_optimizer_inside_backward_is_left_in_peace():
    model = llama()
    watch = prac.Monitor(prac.compress(model, prac.PRESETS["lean"].replace(min_width=8)))
    calls = []
    model.lm_head.weight.register_post_accumulate_grad_hook(lambda p: calls.append(1))
    with pytest.warns(UserWarning, match="steps inside of backward"):
        steps(model, batches(1), watch)
    assert len(calls) == 1
    assert watch.history[0].kept_bytes > 0


def test_an_error_in_the_step_leaves_no_hook_behind():
    model = llama()
    watch = prac.Monitor(prac.compress(model, prac.PRESETS["lean"].replace(min_width=8)))
    with pytest.raises(ZeroDivisionError), watch:
        raise ZeroDivisionError
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_settings_that_make_no_sense():
    handle = prac.compress(llama(), prac.PRESETS["lean"].replace(min_width=8))
    for wrong in ({"every": 0}, {"parts": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            prac.Monitor(handle, **wrong)


# --- the file ------------------------------------------------------------------------------------


def test_the_file_goes_on_where_a_run_is_resumed(tmp_path):
    path = tmp_path / "run" / "layers.jsonl"
    model = llama()
    handle = prac.compress(model, prac.PRESETS["lean"].replace(min_width=8))
    steps(model, batches(5), prac.Monitor(handle, every=1, path=path))
    before = monitor.read(path)
    assert [reading.step for reading in before] == [1, 2, 3, 4, 5]

    model = llama()
    handle = prac.compress(model, prac.PRESETS["lean"].replace(min_width=8))
    handle.load_state_dict({"step": 3, "subspaces": {}, "shared": handle.state_dict()["shared"]})
    steps(model, batches(2), prac.Monitor(handle, every=1, path=path))
    after = monitor.read(path)
    assert [reading.step for reading in after] == [1, 2, 3, 4, 5]
    assert after[:3] == before[:3]
    assert after[3] != before[3]
    path.write_text(path.read_text()[:-100])  # killed while it wrote
    assert monitor.read(path) == after[:4]


def test_a_file_that_is_something_else_is_not_overwritten(tmp_path):
    path = tmp_path / "notes.txt"
    for text in ("my notes", '{"step": 3, "loss": 2.0}\n', "my notes\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match="holds no readings"):
            monitor.read(path)
    model = llama()
    with pytest.raises(ValueError, match="holds no readings"):
        prac.Monitor(prac.compress(model, prac.PRESETS["lean"].replace(min_width=8)), path=path)
    assert path.read_text() == "my notes\n"


def test_a_full_disk_is_no_reason_to_stop(tmp_path):
    (tmp_path / "file").write_text("")
    model = llama()
    handle = prac.compress(model, prac.PRESETS["lean"].replace(min_width=8))
    watch = prac.Monitor(handle, path=tmp_path / "file" / "layers.jsonl")
    with pytest.warns(UserWarning, match="could not be written"):
        steps(model, batches(1), watch)
    assert len(watch.history) == 1

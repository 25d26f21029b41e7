"""Every method by name: parsed, trained with, resumed; and what is not prac's own against its definition."""

import dataclasses
import math

import pytest
import torch
from torch import nn

import prac
from prac.lab import methods
from prac.lab.materials import blocks, models
from prac.lab.methods import optimizers, peers
from prac.lab.runs import train
from prac.lab.runs.options import Options
from prac.lab.runs.options import options as recipe_options
from prac.memory import track_kept

STEPS = 5


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", {}),
        ("checkpoint", {"checkpoint": 1}),
        ("checkpoint3", {"checkpoint": 3}),
        ("selective", {"selective": True}),
        ("compile", {"compiled": True}),
        ("compile0.4", {"compiled": True, "budget": 0.4}),
        ("offload", {"offload": True}),
        ("galore", {"optimizer": "galore"}),
        ("velora", {"lora": True, "velora": True}),
        ("plain+muon", {"optimizer": "muon"}),
        ("plain+lora", {"lora": True}),
        ("lean", {"config": prac.PRESETS["lean"]}),
        ("lean+attention8", {"config": prac.PRESETS["lean"].replace(attention_bits=8)}),
        ("lean+checkpoint2+adam-mini", {"config": prac.PRESETS["lean"], "checkpoint": 2, "optimizer": "adam-mini"}),
        ("loract+lora", {"config": prac.PRESETS["loract"], "lora": True}),
        ("compact", {"config": prac.PRESETS["compact"], "optimizer": "reproject"}),
        ("rso", {"config": prac.PRESETS["rso"], "optimizer": "reset"}),
        ("co-compression", {"config": prac.PRESETS["co-compression"]}),
        ("paper+compile", {"config": prac.PRESETS["paper"], "compiled": True}),
    ],
)
def test_parse(name, expected):
    assert methods.parse(name) == methods.Method(name, **expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("papier", "unknown method 'papier'; choose from plain, checkpoint"),
        ("lean+", "unknown method 'lean\\+'"),
        ("lean+turbo", "unknown method 'lean\\+turbo'"),
        ("plain+attention8", "unknown method"),
        ("checkpoint0", "unknown method"),
        ("compile2", "unknown method"),
        ("galore+muon", "galore comes with an optimizer of its own; leave muon out"),
        ("rso+adam-mini", "rso comes with an optimizer of its own"),
    ],
)
def test_parse_refuses(name, message):
    with pytest.raises(ValueError, match=message):
        methods.parse(name)


def test_names_with_commas():
    assert methods.names(["plain,lean", "paper+muon", "lean"]) == ["plain", "lean", "paper+muon"]


@pytest.fixture(scope="module")
def options(corpus_file):
    def make(name, **changes):
        method = methods.parse(name)
        config = method.config
        if config is not None and config.T1 is not None:
            config = config.replace(T1=2, T2=2)
        common = {"model": "llama-tiny", "data": str(corpus_file), "tokenizer": "bpe:300", "steps": STEPS}
        common |= {"batch_size": 8, "seq_len": 32, "lr": 3e-3, "warmup": 0.2, "eval_blocks": 1}
        return Options(**({"method": name, "config": config} | common | changes))

    return make


TRAINED = (
    "galore", "rso", "compact", "co-compression", "co-compression-rp", "loract", "one-shot", "paper+muon",
    "lean+adam-mini", "checkpoint2", "lean+checkpoint2", "selective",
)  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_every_method_trains(name, options, tmp_path):
    """The loss falls by as much as it takes to see that steps are of the right size and sign."""
    steps = 2 if "muon" in name else STEPS  # its iteration is slow on a CPU
    row = train.run(options(name, steps=steps), tmp_path)
    assert row["method"] == name and row["steps"] == steps
    assert row["val_loss"] < math.log(300) - (0.05 if "muon" in name else 0.25)
    assert row["kept_bytes"] > 0 and row["tokens_per_s"] > 0


@pytest.mark.parametrize("name", ["galore", pytest.param("rso", marks=pytest.mark.long)])
def test_optimizers_resume(name, options, tmp_path):
    """Interrupted after step 4 and taken up again, a run ends as one that was not."""
    Spy = pytest.importorskip("test_train").Spy

    whole = train.run(options(name, save_every=2), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train.run(options(name, save_every=2), tmp_path / "cut", callbacks=[Spy(stop=4)])
    again = train.run(options(name, save_every=2), tmp_path / "cut", resume=True)
    assert again["val_loss"] == whole["val_loss"]


def test_recipes_reach_the_bases_that_they_are_for():
    """A short run's interval is for the subspaces that optimizers live in; what is made at every step stays so."""

    def config(method):
        return recipe_options(method).config

    tiny = models.recipe("llama-tiny")
    assert (config("paper").T1, config("paper-as-printed").T1) == (500, 500)
    assert config("rso").T2 == config("compact").T1 == tiny.interval
    assert config("one-shot").T1 is None and config("co-compression-rp").T2 == 1


# --- against definitions ------------------------------------------------------------------------


def test_galore_is_its_definition():
    """Adam on Pᵀ G (or G P, on the shorter side) with P the leading singular vectors of the first gradient, times α."""
    from galore_torch import GaLoreAdamW

    generator = torch.Generator().manual_seed(0)
    for o, n in ((5, 9), (9, 5)):
        w = nn.Parameter(torch.randn(o, n, dtype=torch.float64, generator=generator))
        expected, m, v, p = w.detach().clone(), 0.0, 0.0, None
        group = {"params": [w], "rank": 2, "update_proj_gap": 3, "scale": 0.25, "proj_type": "std"}
        optimizer = GaLoreAdamW([group], lr=0.1, eps=1e-8, no_deprecation_warning=True)
        for step in range(5):
            g = torch.randn(o, n, dtype=torch.float64, generator=generator)
            w.grad = g
            optimizer.step()
            if step % 3 == 0:
                u, _, vh = torch.linalg.svd(g.float(), full_matrices=False)  # as the package has it, in float32
                p = (u[:, :2] if o < n else vh[:2]).double()
            low = p.T @ g if o < n else g @ p.T
            m, v = 0.9 * m + 0.1 * low, 0.999 * v + 0.001 * low**2
            update = m / (1 - 0.9 ** (step + 1)) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            expected = expected - 0.1 * 0.25 * (p @ update if o < n else update @ p)
        torch.testing.assert_close(w.detach(), expected, rtol=1e-5, atol=1e-6)


def test_velora_is_its_definition():
    """The adapter's gradient is dYᵀ x̃, where x̃ is each group of features projected on one vector."""
    from peft.tuners.lora.velora import VeloraFunction

    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(13, size, dtype=torch.float64, generator=generator) for size in (12, 4))
    w = torch.randn(4, 12, dtype=torch.float64, generator=generator).requires_grad_()
    v = torch.randn(3, dtype=torch.float64, generator=generator)
    v = v / v.norm()
    x = x.requires_grad_()
    VeloraFunction.apply(x, w, None, v, 4, 1.0).backward(dy)
    groups = x.detach().view(13, 4, 3)
    estimate = ((groups @ v).unsqueeze(-1) * v).view(13, 12)
    torch.testing.assert_close(w.grad, dy.T @ estimate)
    torch.testing.assert_close(x.grad, dy @ w.detach())


@pytest.fixture(scope="module")
def tiny():
    def make():
        torch.manual_seed(0)
        config = models.architecture(models.SIZES["llama-tiny"], 300, 32, bos_token_id=0, eos_token_id=1)
        config.num_hidden_layers = 4
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_config(config).train()

    return make


def test_checkpointing_every_kth_block_keeps_the_others(tiny):
    ids = torch.randint(300, (4, 32))
    kept, gradients = {}, {}
    for every in (0, 1, 2):
        model = tiny()
        if every:
            peers.checkpoint_blocks(model, every=every)
            blocks_of = [layer.gradient_checkpointing for layer in model.model.layers]
            assert blocks_of == [index % every == 0 for index in range(4)]
        with track_kept(model) as found:
            model(input_ids=ids, labels=ids)
        kept[every] = found.total
        model(input_ids=ids, labels=ids).loss.backward()
        gradients[every] = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert kept[1] < kept[2] < kept[0]
    for every in (1, 2):
        assert torch.equal(gradients[every], gradients[0])


def test_offloading_changes_no_gradient(tiny):
    ids = torch.randint(300, (4, 32))
    expected = None
    for method in ("plain", "offload"):
        model = tiny()
        peers.wrap(model, methods.parse(method))
        model(input_ids=ids, labels=ids).loss.backward()
        found = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert expected is None or torch.equal(found, expected)
        expected = found
    with pytest.raises(ValueError, match="offload moves what a GPU keeps"):
        peers.check_device(methods.parse("lean+offload"), torch.device("cpu"))


def test_a_budget_makes_torch_compile_keep_less():
    block_shape = blocks.shape("llama", 64, 256, 64, heads=2)
    kept = {}
    for name in ("compile", "compile0.2"):
        torch.compiler.reset()
        method = methods.parse(name)
        peers.limit_compiled_memory(method.budget)
        block, (x, dy) = blocks.build(block_shape, dtype=torch.float32, device=torch.device("cpu"))
        peers.apply(block, method, x)
        block(x).backward(dy)
        with track_kept(block) as found:
            block(x)
        kept[name] = found.total
    peers.limit_compiled_memory(None)
    assert kept["compile0.2"] < kept["compile"]


def test_together_is_each(tiny):
    """Muon and AdamW as one: the weights of both by hand, a scheduler that reaches both, state there and back."""
    options = Options("plain+muon", None, "llama-tiny", "sotu", "bpe:300", 10, 1, 8, 1e-3, 0.0)
    model, ids = tiny(), torch.randint(300, (2, 16))
    optimizer = optimizers.make(methods.parse("plain+muon"), model, options)
    muon, adamw = optimizer.optimizers
    inside = {id(p) for group in muon.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert (id(p) in inside) == (".layers." in name and "norm" not in name), name
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert {group["lr"] for group in (*muon.param_groups, *adamw.param_groups)} == {5e-4}
    model(input_ids=ids, labels=ids).loss.backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    schedule.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    other = optimizers.make(methods.parse("plain+muon"), model, dataclasses.replace(options, lr=1.0))
    other.load_state_dict(optimizer.state_dict())
    assert {group["lr"] for group in other.param_groups} == {5e-4}
    assert other.param_groups[0] is other.optimizers[0].param_groups[0]


def test_adapters_want_a_pretrained_model(options, tmp_path):
    with pytest.raises(ValueError, match="adapters on frozen random weights learn nothing"):
        train.run(options("velora"), tmp_path)


@pytest.mark.parametrize("name", ["velora", "plain+lora", "loract+lora", "lean+lora"])
def test_adapters_train(name, options, tmp_path, tiny):
    model = tiny()
    folder = tmp_path / "pretrained"
    model.save_pretrained(folder)
    tokenizer, _ = train.prepare(options("plain"))
    tokenizer.save_pretrained(folder)
    row = train.run(options(name, model=str(folder), tokenizer=str(folder)), tmp_path / "run")
    assert row["steps"] == STEPS and math.isfinite(row["val_loss"])

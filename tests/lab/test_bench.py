"""What `prac bench` measures, against counts by hand."""

import dataclasses
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import prac
from prac.lab.commands import bench as bench_command
from prac.lab.commands.main import main
from prac.lab.materials import blocks
from prac.lab.measured import meters
from prac.lab.measured.block import Cost, measure_block
from prac.lab.methods import naming, peers

METHODS = ("plain", "checkpoint", "selective", "compile", "paper")
M, S, n, heads = 256, 64, 64, 2
CPU = torch.device("cpu")


def measure(family, methods=METHODS, **settings):
    shape = blocks.shape(family, n, M, S, heads=heads)
    return {row.method: row for row in measure_block(shape, methods, repeats=2, **settings)}


def check(rows):
    """What holds for either block."""
    assert tuple(rows) == METHODS
    plain, checkpoint, selective, compiled, paper = rows.values()

    assert checkpoint.kept_units == 1.0
    for row in rows.values():
        assert row.kept_units == row.kept_bytes / (M * n * 4)
        # Hooks and allocator agree, but for the state of the random generator (5,056 bytes) and loose numbers.
        assert row.kept_bytes <= row.held_bytes <= row.kept_bytes + 6_000
        # At the peak there is at least what is kept at some moment and, in the end, the gradients.
        assert row.peak_bytes > row.kept_bytes
        assert row.time_ms > 0 and row.time_ratio > 0
        assert 0 < row.time_spread[0] <= row.time_spread[1]
        assert row == Cost(**row.to_dict() | {"time_spread": row.time_spread})
        assert json.loads(json.dumps(row.to_dict())) == row.to_dict()
    assert paper.kept_bytes < plain.kept_bytes
    assert compiled.kept_bytes < plain.kept_bytes
    assert checkpoint.kept_bytes < selective.kept_bytes < plain.kept_bytes

    assert plain.flops_ratio == 1.0 == plain.time_ratio
    assert compiled.flops == plain.flops  # its products are seen, though torch's counter would see none of them
    assert selective.flops_ratio == 1.0  # attention is kept too
    assert paper.flops != plain.flops

    for row in (plain, checkpoint, selective):
        assert (row.input_grad_error, row.weight_grad_error, row.worst_parameter) == (0.0, 0.0, None)
    assert compiled.input_grad_error < 1e-5 and compiled.weight_grad_error < 1e-5
    assert paper.input_grad_error > 0 and 0 < paper.weight_grad_error <= paper.worst_parameter_error
    assert paper.worst_parameter.startswith("layer.")

    assert all(row.refresh_ms is None for row in (plain, checkpoint, selective, compiled))
    assert paper.refresh_ms >= 0 and paper.refresh_share >= 0


def test_llama():
    rows = measure("llama")
    check(rows)
    m = blocks.shape("llama", n, M, S).intermediate
    assert m == 176

    # In activations of tokens × hidden: x, x̂ and y of the first norm (3), q, k, v (3), the output of attention, which
    # is also the input of its projection (1), h, ĥ and y of the second norm (3); four of m features: gate, silu(gate),
    # up, and their product. And numbers per token: 1/rms of either norm, the log-sum-exp of each head.
    assert rows["plain"].kept_units == 10 + 4 * m / n + (2 + heads) / n
    # The outputs of all seven products, also of the last, which nobody needs; attention's output and log-sum-exp; x.
    assert rows["selective"].kept_units == (3 + 1 + 2 * m / n + 1) + (1 + heads / n) + 1

    # Products: 4 n × n, 3 n × m; each once forward and twice backward. Attention: 2 products of S × S, and 5 backward.
    forward = 2 * M * (4 * n * n + 3 * n * m)
    attention = 2 * M * S * n
    assert rows["plain"].flops == 3 * forward + (2 + 5) * attention
    # Recomputing stops where everything saved is back: before the last product.
    assert rows["checkpoint"].flops == rows["plain"].flops + forward - 2 * M * n * m + 2 * attention
    assert rows["checkpoint"].flops_ratio > 1.25


def test_gpt2():
    rows = measure("gpt2")
    check(rows)
    # x and y of the first norm (2), q, k, v (3), the output of attention (1), h and y of the second norm (2); of 4 n
    # features, as transformers spells out its GELU: a, a / 2, tanh, 1 + tanh and the result. Numbers per token: mean
    # and 1/σ of either norm, the log-sum-exp of each head.
    assert rows["plain"].kept_units == 8 + 5 * 4 + (4 + heads) / n
    forward, attention = 2 * M * 12 * n * n, 2 * M * S * n
    assert rows["plain"].flops == 3 * forward + (2 + 5) * attention
    assert rows["checkpoint"].flops == rows["plain"].flops + forward - 2 * M * 4 * n * n + 2 * attention


def test_bf16_units_are_of_bf16():
    rows = measure("gpt2", ["checkpoint"], dtype=torch.bfloat16)
    assert rows["checkpoint"].kept_units == 1.0
    assert rows["checkpoint"].kept_bytes == M * n * 2


def test_operations_are_those_of_torch():
    """But for attention on a CPU, of which torch's counter knows nothing."""
    block, (x, dy) = blocks.build(blocks.shape("llama", n, M, S), dtype=torch.float32, device=CPU)
    with FlopCounterMode(display=False) as counter:
        block(x).backward(dy)
    heads = n // 64
    sdpa = 2 * (M // S) * heads * S * S * (n // heads)
    assert meters.step_flops(block, x, dy) == counter.get_total_flops() + 7 * sdpa


def test_operations_inside_an_operator_of_prac_count():
    @torch.library.custom_op("prac::test_bench_product", mutates_args=())
    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b

    product.register_autograd(
        lambda ctx, dy: (product(dy, ctx.saved_tensors[0].mT), None),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1]),
    )
    weight = torch.nn.Linear(8, 16, bias=False)
    weight.forward = lambda x: product(x, weight.weight)
    x = torch.randn(4, 16, requires_grad=True)
    assert meters.step_flops(weight, x, torch.ones(4, 8)) == 2 * (2 * 4 * 16 * 8)


def test_operations_in_place_count():
    class InPlace(torch.nn.Module):
        def forward(self, x):
            y = x.new_zeros(4, 8).addmm_(x.detach(), x.new_ones(16, 8))
            return y.unsqueeze(0).baddbmm_(x.new_ones(1, 4, 16), x.new_ones(1, 16, 8)) + x.sum()

    x = torch.randn(4, 16, requires_grad=True)
    assert meters.step_flops(InPlace(), x, torch.ones(1, 4, 8)) == 2 * (2 * 4 * 16 * 8)


def test_a_block_is_the_same_each_time_and_leaves_the_generator_alone():
    shape = blocks.shape("gpt2", n, M, S)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, (x, dy) = blocks.build(shape, dtype=torch.float32, device=CPU, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    two, (again, _) = blocks.build(shape, dtype=torch.float32, device=CPU, seed=3)
    assert torch.equal(x, again) and not torch.equal(x, dy)
    assert torch.equal(one(x), two(x))
    assert one.training and one(x).shape == x.shape == (M // S, S, n)
    # Causal: a change of the last token reaches no other.
    changed = x.detach().clone()
    changed[:, -1] += 1
    assert torch.equal(one(changed)[:, :-1], one(x)[:, :-1])
    assert not torch.equal(one.layer.ln_1.weight, torch.ones(n)) and one.layer.attn.c_attn.bias.any()


def test_usual_widths():
    llama, gpt2 = blocks.shape("llama", 1024, 2048), blocks.shape("gpt2", 1024, 2048)
    assert (llama.intermediate, llama.heads, llama.sequence_length) == (2736, 16, 256)
    assert (gpt2.intermediate, gpt2.heads) == (4096, 16)


def test_variants():
    assert list(peers.variants(["paper", "compile", "paper"])) == ["plain", "paper", "compile"]
    assert list(peers.variants(peers.DEFAULTS)) == list(peers.DEFAULTS)


def test_attention_bits_make_a_second_row():
    found = peers.variants(["paper", "lean", "lean+compile", "small"], attention_bits=4)
    assert list(found) == ["plain", "paper", "lean", "lean+attention4", "lean+compile", "small"]
    assert found["lean+attention4"].config == prac.PRESETS["lean"].replace(attention_bits=4)
    with pytest.raises(ValueError, match="attention_bits goes with a preset that keeps norm groups"):
        peers.variants(["paper"], attention_bits=8)


def test_methods_of_others():
    """What they keep and lose on a block: exact ones lose nothing."""
    names = ("loract", "co-compression", "compact", "galore", "paper+checkpoint", "checkpoint2")
    rows = measure("llama", names)
    plain = rows["plain"]
    for name in ("galore", "checkpoint2"):  # an optimizer has no part in a block's step, and exact is exact
        assert rows[name].weight_grad_error == rows[name].input_grad_error == 0
    assert rows["galore"].kept_bytes == plain.kept_bytes
    for name in ("loract", "co-compression", "compact"):
        assert rows[name].kept_bytes < plain.kept_bytes and rows[name].weight_grad_error > 0.1
    assert rows["co-compression"].input_grad_error < 1e-5  # linear layers alone: what is sent back is exact
    assert rows["paper+checkpoint"].kept_units == 1.0


def test_a_method_of_ones_own_on_a_block_with_kernels_of_ones_own():
    """What is put into a block is in that block alone, before the method is put to work on it."""
    told = []

    def before(name, block):
        told.append(name)
        if name == "other":
            assert block.around is None
            with torch.no_grad():
                block.layer.input_layernorm.weight.mul_(2)

    own = {"plain": None, "same": naming.parse("checkpoint"), "other": naming.parse("checkpoint"), "none": None}
    rows = measure("llama", own, before=before)
    assert told == list(rows) == list(own)
    assert rows["same"].kept_units == rows["other"].kept_units == 1.0 < rows["none"].kept_units
    assert rows["same"].weight_grad_error == rows["none"].weight_grad_error == 0 < rows["other"].weight_grad_error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--hidden 100 --heads 3", "3 heads do not divide hidden = 100"),
        ("--hidden 33 --heads 11", "is odd"),
        ("--hidden 16", "hidden must be at least 32, got 16"),
        ("--tokens 100", "sequences of 256 do not divide 100 tokens"),
        ("--tokens 0", "tokens must be at least 1"),
        ("--block bert", "unknown block 'bert'; choose one of llama, gpt2"),
        ("--methods plain papier", "unknown method 'papier'; choose from plain, checkpoint"),
        ("--methods plain --attention-bits 8", "attention_bits goes with a preset"),
        ("--methods plain --repeats 0", "repeats must be at least 1"),
        ("--hidden 64 --tokens 64 --sequence-length 8 --methods paper --intermediate 512", "paper: "),
    ],
)
def test_bad_input_is_one_line(capsys, argv, message):
    assert main(["bench", *argv.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("prac: error: ") and message in err


def test_no_gpu_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--device", "cuda"]) == 2
    assert "torch finds no GPU here" in capsys.readouterr().err


def test_the_command_prints_a_table_and_writes_json(capsys, tmp_path):
    path = tmp_path / "deep" / "bench.json"
    argv = ["bench", "--hidden", "64", "--tokens", "64", "--sequence-length", "32", "--repeats", "1", "--device", "cpu"]
    argv += ["--methods", "checkpoint", "paper", "--json", str(path)]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "llama block, 64 hidden" in out and bench_command.device_name(CPU).split()[0] in out
    assert "A unit is one activation of tokens" in out

    document = json.loads(path.read_text())
    assert document.keys() == {"command", "versions", "setting", "rows"}
    setting = document["setting"]
    assert (setting["block"], setting["hidden"], setting["intermediate"], setting["heads"]) == ("llama", 64, 176, 1)
    assert (setting["tokens"], setting["sequence_length"], setting["dtype"]) == (64, 32, "fp32")
    assert setting["command"] == " ".join(["prac", *argv])
    assert [row["method"] for row in document["rows"]] == ["plain", "checkpoint", "paper"]
    for row in document["rows"]:
        assert row.keys() == {field.name for field in dataclasses.fields(Cost)}
        assert f"{row['kept_units']:.2f}" in out

    assert main(argv) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*argv, "--overwrite"]) == 0

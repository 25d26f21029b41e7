"""``torchrun -m prac train`` with DDP and FSDP2, resumed on another number of processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from prac.lab.report import results
from prac.monitoring import monitor

COMMON = ["--model", "llama-tiny", "--tokenizer", "bpe:300", "--batch-size", "8", "--seq-len", "32", "--steps", "6",
          "--save-every", "3", "--T1", "3", "--T2", "3", "--method", "paper", "--quiet"]  # fmt: skip


def launch(processes, out, corpus_file, *more):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
               "-m", "prac", "train", *COMMON, "--data", str(corpus_file), "--out", str(out), *more]  # fmt: skip
    ran = subprocess.run(
        command, env=os.environ | {"PRAC_KERNELS": "eager"}, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return results.read(out / "result.json")["rows"][0]


@pytest.mark.parametrize(
    "kind", [pytest.param([], marks=pytest.mark.long, id="ddp"), pytest.param(["--fsdp"], id="fsdp")]
)
def test_train_and_resume_on_another_number_of_processes(kind, corpus_file, tmp_path):
    out = tmp_path / "run"
    row = launch(2, out, corpus_file, *kind)
    assert (row["processes"], row["steps"]) == (2, 6)
    states = [torch.load(out / "checkpoint-3" / name, weights_only=True) for name in ("prac.pt", "prac-1.pt")]
    for name, subspace in states[0]["subspaces"].items():  # of its own tokens, from its own generator
        assert not torch.equal(subspace["p"], states[1]["subspaces"][name]["p"]), name
    if kind:
        assert {p.name for p in (out / "checkpoint-3" / "optimizer_0").glob("*.distcp")} == {
            "__0_0.distcp",
            "__1_0.distcp",
        }
    readings = monitor.read(out / "layers.jsonl")
    assert readings[-1].step == 6
    assert all(layer.gradient_variance > 0 for layer in readings[-1].layers if layer.kind in ("linear", "norm"))
    final = load_file(out / ("model" if kind else "checkpoint-6") / "model.safetensors")

    (out / "result.json").unlink()
    shutil.rmtree(out / "checkpoint-6")
    more = launch(3, out, corpus_file, *kind, "--resume")
    assert (more["processes"], more["steps"]) == (3, 6)
    assert [line["step"] for line in results.read_lines(out / "metrics.jsonl") if "loss" in line] == list(range(1, 7))
    assert (out / "checkpoint-6" / "prac-2.pt").exists()
    resumed = load_file(out / ("model" if kind else "checkpoint-6") / "model.safetensors")
    assert more["val_loss"] == pytest.approx(row["val_loss"], rel=0.05)
    assert all((resumed[name] - final[name]).norm() < 0.2 * final[name].norm() for name in final)


PARTING = """
import os, socket, sys
import torch
from accelerate import PartialState
from prac.lab.runs.trainer import leave_processes

def work():
    PartialState(cpu=True)
    for _ in range(40):  # left to Gloo's threads, with tensors that Python knows
        parts_2N = [torch.ones(200_000) for _ in range(2)]
        torch.distributed.all_gather(parts_2N, torch.ones(200_000), async_op=True)
        del parts_2N
    leave_processes()
    assert not torch.distributed.is_initialized()

failed = 0
for _ in range(3):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=port, WORLD_SIZE="2")
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            work()
            sys.exit(0)  # through all that Python does at its end, as os._exit would not
        children.append(child)
    failed += sum(os.waitpid(child, 0)[1] != 0 for child in children)
sys.exit(failed)
"""


def test_processes_part_before_python_comes_down():
    ran = subprocess.run([sys.executable, "-c", PARTING], capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, f"{ran.returncode} of 6 processes failed: {ran.stderr[-2000:]}"


def test_sharding_needs_processes(corpus_file, tmp_path, capsys):
    from prac.lab.commands.main import main

    assert main(["train", *COMMON, "--data", str(corpus_file), "--out", str(tmp_path / "run"), "--fsdp"]) == 2
    assert "start it as torchrun" in capsys.readouterr().err

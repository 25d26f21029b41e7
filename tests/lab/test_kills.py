"""A run that is killed again and again and resumed each time, against one that nobody disturbed: bit for bit."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prac.lab.report import results
from prac.lab.runs import checkpoints, train
from prac.lab.runs.options import Options
from prac.presets import PRESETS

STEPS = 30


def _work(options, out, compiled):
    """In a process of its own, forked from one that has everything imported and has computed nothing yet."""
    os.dup2(os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)  # progress bars
    os.environ["PRAC_KERNELS"] = "auto" if compiled else "eager"
    torch.set_num_threads(1)
    train.run(options, out, resume=True)


@pytest.fixture(scope="module")
def context():
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(
        ["prac.lab.runs.train", "prac.lab.materials.models", "transformers.models.llama.modeling_llama"]
    )
    return found


def start(context, options, out, compiled):
    process = context.Process(target=_work, args=(options, out, compiled), daemon=True)
    process.start()
    return process


def last_step(out):
    path = out / "metrics.jsonl"
    return max((line["step"] for line in results.read_lines(path)), default=0) if path.exists() else 0


def killed(context, options, out, compiled, kills, seed):
    """Run to the end through so many kills; returns the steps at which they hit."""
    chance, hits, path = random.Random(seed), [], out / "metrics.jsonl"
    while len(hits) < kills:
        newest = checkpoints.newest(out)
        step = 0 if newest is None else checkpoints.step(newest)
        # A few steps on from where it resumes, but never past the end; and up to 60 ms into whatever comes next.
        target = min(step + chance.randint(0 if hits else 4, 6), STEPS - 2)
        delay = chance.random() * 0.06
        before = path.stat().st_mtime_ns if path.exists() else 0
        process = start(context, options, out, compiled)
        while process.is_alive() and (not path.exists() or path.stat().st_mtime_ns == before):
            time.sleep(0.002)
        while process.is_alive() and last_step(out) < target:
            time.sleep(0.002)
        time.sleep(delay)
        assert process.is_alive(), f"it ended before it was killed:\n{Path(f'{out}.log').read_text()}"
        process.kill()
        process.join()
        hits.append(last_step(out))
    process = start(context, options, out, compiled)
    process.join()
    assert process.exitcode == 0, Path(f"{out}.log").read_text()
    return hits


def losses(out):
    keep = ("step", "loss", "val_loss", "lr", "tokens")
    return [{k: v for k, v in line.items() if k in keep} for line in results.read_lines(out / "metrics.jsonl")]


def check(context, corpus_file, tmp_path, method, kills, compiled):
    config = None if method == "plain" else PRESETS[method].replace(T1=4, T2=4)
    options = Options(
        method=method, config=config, model="llama-tiny", data=str(corpus_file), tokenizer="bpe:300", steps=STEPS,
        batch_size=10, seq_len=32, lr=1e-3, warmup=0.25, eval_every=10, save_every=3,
    )  # fmt: skip
    whole = start(context, options, tmp_path / "whole", compiled)
    whole.join()
    assert whole.exitcode == 0, (tmp_path / "whole.log").read_text()
    hits = killed(context, options, tmp_path / "killed", compiled, kills, seed=kills)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    old, new = (load_file(tmp_path / out / f"checkpoint-{STEPS}" / "model.safetensors") for out in ("whole", "killed"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    ends = [results.read(tmp_path / out / "result.json")["rows"][0]["val_loss"] for out in ("whole", "killed")]
    assert ends[0] == ends[1]
    print(f"{method}: killed at steps {hits}, then the same {len(losses(tmp_path / 'whole'))} lines and weights")


@pytest.mark.parametrize("method", ["paper"])
def test_killed_twice(context, corpus_file, tmp_path, method):
    check(context, corpus_file, tmp_path, method, 2, compiled=False)


@pytest.mark.long
@pytest.mark.parametrize(
    "method", ["plain", "lean", "fast", "small", "paper", "pac", "rac", "finetune", "loract", "rso"]
)
def test_killed_twenty_times(context, corpus_file, tmp_path, method):
    check(context, corpus_file, tmp_path, method, 20, compiled=True)

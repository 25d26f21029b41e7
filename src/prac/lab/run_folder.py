"""What lies in the folder of a run: whether it is complete, of the same options, free to use."""

from __future__ import annotations

import shutil
from pathlib import Path

from prac import files
from prac.config import Config
from prac.lab import checkpoints, results
from prac.lab.options import Options, differences

# What may differ between a run and its resumption.
FREE = ("eval_every", "eval_blocks", "save_every")
LAYERS = "layers.jsonl"
OWNED = ("config.json", "metrics.jsonl", LAYERS, "spectrum.json", "result.json", "tensorboard", "report.html", "model")


def finished(options: Options, out: Path) -> results.Row | None:
    """The row of a run that is complete in ``out``; ``None`` if there is none.

    Raises:
        ValueError: if the run there, complete or not, is of other options.
    """
    complete = (out / "result.json").exists()
    if complete or checkpoints.newest(out) is not None:
        _check_same(options, out)
    if not complete:
        return None
    row: results.Row = results.read(out / "result.json")["rows"][0]
    return row


def clear(out: Path) -> None:
    """Delete what a run left in ``out``, and nothing else."""
    for path in [*(out / name for name in OWNED), *out.glob("checkpoint-*")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def check_free(out: Path) -> None:
    """Refuse to run over another run.

    Raises:
        ValueError: if ``out`` holds results or checkpoints.
    """
    if (out / "result.json").exists() or checkpoints.newest(out) is not None:
        raise ValueError(f"{out} already holds a run: choose another --out, or give --resume or --overwrite.")


def claim(out: Path, options: Options) -> None:
    """Write down what is going to run, where nothing but the traces of a failed start may lie."""
    if checkpoints.newest(out) is None:
        check_free(out)
        clear(out)
    files.write_json(out / "config.json", {"options": options.to_dict(), "versions": results.versions()})


def _check_same(options: Options, out: Path) -> None:
    old = results.read(out / "config.json")["options"]
    # What there was before there was a choice.
    old.setdefault("loss", "plain")
    old.setdefault("fsdp", False)
    if old["config"] is not None:  # one written before some field existed has that field's default
        old["config"] = Config.from_dict(old["config"]).to_dict()
    if changed := differences(old, options.to_dict(), ignore=FREE):
        raise ValueError(f"cannot resume {out}, it was run with other options ({'; '.join(changed)}).")

"""What lies in the folder of a run: whether it is complete, of the same options and data, free to use."""

from __future__ import annotations

from pathlib import Path

from prac.config import Config
from prac.lab.materials.weights import MODEL
from prac.lab.report import results
from prac.lab.runs import checkpoints
from prac.lab.runs.options import Options, differences
from prac.runtime import files

# What may differ between a run and its resumption.
FREE = ("eval_every", "eval_blocks", "save_every")
LAYERS = "layers.jsonl"
OWNED = ("config.json", "metrics.jsonl", LAYERS, "spectrum.json", "result.json", "tensorboard", "report.html", MODEL)


def finished(options: Options, out: Path, read: dict[str, str]) -> results.Row | None:
    """The row of a run that is complete in ``out``; ``None`` if there is none.

    Args:
        options: of the run that is asked for.
        out: the run folder.
        read: digests of what it is made from (:class:`prac.lab.materials.tokens.Blocks`).

    Raises:
        ValueError: if the run there, complete or not, is of other options or of other data.
    """
    complete = (out / "result.json").exists()
    if complete or checkpoints.newest(out) is not None:
        _check_same(options, read, out)
    if not complete:
        return None
    row: results.Row = results.read(out / "result.json")["rows"][0]
    return row | {"out": str(out)}  # it may have been moved


def clear(out: Path) -> None:
    """Delete what a run left in ``out``, and nothing else."""
    unfinished = out.glob(f".{MODEL}.*")  # of a process that was killed
    for path in [*(out / name for name in OWNED), *checkpoints.all_in(out), *unfinished]:
        files.remove(path)


def check_free(out: Path) -> None:
    """Refuse to run over another run.

    Raises:
        ValueError: if ``out`` holds results or checkpoints.
    """
    if (out / "result.json").exists() or checkpoints.newest(out) is not None:
        raise ValueError(f"{out} already holds a run: choose another --out, or give --resume or --overwrite.")


def claim(out: Path, options: Options, read: dict[str, str], fresh: bool) -> None:
    """Write down what is going to run; a ``fresh`` run clears what another one left."""
    if fresh:
        clear(out)
    document = {"options": options.to_dict(), "read": read, "versions": results.versions()}
    files.write_json(out / "config.json", document)


def _check_same(options: Options, read: dict[str, str], out: Path) -> None:
    try:
        document = results.read(out / "config.json")
        old, old_read = dict(document["options"]), dict(document["read"])
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(
            f"cannot resume {out}: its config.json does not say what was run; restore it, or give --overwrite."
        ) from error
    if old["config"] is not None:  # one written before some field existed has that field's default
        old["config"] = Config.from_dict(old["config"]).to_dict()
    if changed := differences(old, options.to_dict(), ignore=FREE):
        further = f" To train its model further, give --model {out / MODEL}." if (out / MODEL).exists() else ""
        raise ValueError(
            f"cannot resume {out}, it was run with other options ({'; '.join(changed)}). Give those, another --out, or "
            f"--overwrite.{further}"
        )
    if changed := [name for name, digest in read.items() if old_read.get(name) != digest]:
        raise ValueError(
            f"cannot resume {out}, the {' and the '.join(changed)} changed since it was run (--data {options.data}, "
            f"--tokenizer {options.tokenizer}). Put back what it was run with, or start over with --overwrite."
        )

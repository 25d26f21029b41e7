"""Ranks and policies: what is accepted, what is refused and how."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from prac import PRESETS, Config, Rank
from prac.lab.methods.keeps import parse_keep
from prac.presets import as_config


@pytest.mark.parametrize(
    ("rank", "width", "expected"),
    [
        (Rank(0.3, 0.3), 768, (230, 234)),  # 464 is a multiple of 8
        (Rank(0.6, 0.0), 768, (464, 0)),
        (Rank(0.3, 0.3), 200, (60, 60)),  # below 128 in all
        (Rank(0.5, 0.5), 133, (66, 67)),  # no more than there are
        (Rank(230, 230), 768, (230, 230)),
        (Rank(0.29, 0.0), 100, (29, 0)),
        (Rank(2, 2), 768, (2, 2)),
        (Rank(1.0, 0.0), 7, (7, 0)),
        (Rank(0, 0.6), 10, (0, 6)),
        (Rank(0.5, 0.5), 7, (3, 3)),
    ],
)
def test_resolve(rank: Rank, width: int, expected: tuple[int, int]) -> None:
    assert rank.resolve(width) == expected


def test_a_rank_of_the_hidden_size() -> None:
    """Of the width that the linear layer before reads; of its own where none did."""
    rank = Rank(0.2, 0.2, of="hidden")
    assert rank.resolve(3072, hidden=768) == (153, 159)
    assert rank.resolve(3072) == (614, 618)
    assert rank.resolve(100, hidden=768) == (20, 20)  # narrower than what was read before
    assert Rank(0.2, 0.2).resolve(3072, hidden=768) == (614, 618)


@pytest.mark.parametrize(
    "text",
    [
        "0.2,0.2/hidden",
        "0.3,0.1,0.5/hidden@8bits",
        "64,0.2@4bits",
        "0.3,0.3",
        "8bits",
        "rotated4bits",
        "companded4bits",
    ],
)
def test_text_and_back(text: str) -> None:
    assert str(parse_keep(text)) == text


def test_text_that_is_none_of_these() -> None:
    with pytest.raises(ValueError, match='of must be "width" or "hidden"'):
        parse_keep("0.2,0.2/hiden")
    for text in ("0.2/hidden", "", "@8bits", "0.2,0.2@", "0.2,0.2/hidden@"):
        with pytest.raises(ValueError, match="is not R1,R2"):
            parse_keep(text)
    with pytest.raises(ValueError, match='of must be "width" or "hidden"'):
        parse_keep("0.2,0.2/")


def test_what_is_kept_in_bits_besides() -> None:
    for name, bits in (("paper-8bits", 8), ("paper-4bits", 4)):
        config = PRESETS[name]
        for kind in ("linear", "norm", "activation"):
            keep, plain = getattr(config, kind), getattr(PRESETS["paper"], kind)
            assert (keep.bits.bits, keep.r1, keep.r2, keep.of) == (bits, plain.r1, plain.r2, plain.of)


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        (dict(of="depth"), 'of must be "width" or "hidden"'),
        (dict(r1=0, r2=0), "rank 0"),
        (dict(r1=-1), "not be negative|not negative"),
        (dict(r1=1.5), "fraction of the width"),
        (dict(r1=float("nan")), "finite"),
        (dict(r1="0.3"), "fraction .* or a count"),
        (dict(r1=True), "fraction .* or a count"),
        (dict(k=0.0), "k must be"),
    ],
)
def test_rank_refuses(kwargs: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Rank(**kwargs)


@pytest.mark.parametrize(
    ("rank", "width", "word"),
    [
        (Rank(65, 0), 64, "layer: r1 \\+ r2 = 65 \\+ 0 = 65 exceeds the width 64"),
        (Rank(40, 40), 64, "exceeds the width 64. Lower the rank, or exclude"),
        (Rank(0.1, 0.1), 3, "0 directions. Raise the rank"),
    ],
)
def test_resolve_refuses(rank: Rank, width: int, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        rank.resolve(width, "layer")


@pytest.mark.parametrize("field", ["T1", "T2", "min_width"])
@pytest.mark.parametrize("value", [0, -5, 1.5, True])
def test_config_refuses(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} must be a whole number of at least 1"):
        Config(**{field: value})


@pytest.mark.parametrize("growth", [-0.1, 1.5, float("nan"), float("inf"), "0.1"])
def test_growth_refuses(growth: object) -> None:
    with pytest.raises(ValueError, match="growth must be a number from 0"):
        Config(growth=growth)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Rank(0.2, 0.2, bits=8), "bits must be a Bits without compand, or None, got 8: write"),  # type: ignore[arg-type]
        (lambda: Rank(0.2, 0.2, k="1"), "k must be a finite number above 0"),  # type: ignore[arg-type]
        (lambda: Rank(0.4, 0.0, k=2.0), "k scales the random directions, and r2 = 0 has none"),
        (lambda: Rank(0.2, 0.2, orthonormal="no"), "orthonormal must be True or False"),  # type: ignore[arg-type]
        (lambda: Config(seed=1.5), "seed must be a whole number"),  # type: ignore[arg-type]
        *(
            (lambda field=field: Config(**{field: "False"}), f"{field} must be True or False, got 'False'")
            for field in ("product", "last_norm", "renormalise", "factored")
        ),
    ],
)
def test_what_would_be_taken_for_something_else(make: Callable[[], object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        make()


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ValueError, match="unknown preset 'papr'; choose one of lean, fast, small, paper, pac"):
        as_config("papr")


@pytest.mark.parametrize("name", PRESETS)
def test_config_survives_json(name: str) -> None:
    config = PRESETS[name].replace(T1=7, seed=3)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_number_in_place_of_bits_is_told() -> None:
    with pytest.raises(ValueError, match=r"group must be .* got 4: write group=Bits\(4\)"):
        Config(group=4)
    with pytest.raises(ValueError, match=r"norm must be .* got 0.5"):
        Config(norm=0.5)

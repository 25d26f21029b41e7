"""What the page of a run says and shows: on a phone too, and of one seed no more than one seed can tell."""

import re
import statistics
from pathlib import Path

import pytest
from recorded import folder, measured

from prac.lab.report import noise, overview, results, table
from prac.lab.report.page import render

COMPARED = Path(__file__).parent.parent.parent / "benchmarks" / "results" / "compare.json"


@pytest.fixture
def page(tmp_path):
    """The page of these rows."""

    def rendered(rows):
        return render([folder(tmp_path, row) for row in rows], ["train"])

    return rendered


def test_the_noise_of_one_seed_is_that_of_the_committed_benchmark():
    grouped = results.by_method(results.read(COMPARED)["rows"])
    gaps = {method: table.above(grouped[method], grouped["plain"]) for method in noise.PRESETS}
    assert all(len(each) == 3 for each in gaps.values())
    squares = statistics.fmean(statistics.variance(each) for each in gaps.values())
    assert pytest.approx(squares**0.5, abs=5e-4) == noise.ONE_SEED
    run = grouped["plain"][0]
    assert f"{run['steps']} steps of {run['tokens'] // run['steps']:,} tokens" in noise.MEASURED_ON
    assert COMPARED.parts[-3:] == Path(noise.MEASURED_BY).parts


def test_a_difference_has_its_own_spread_or_one_that_is_said_to_be_borrowed():
    assert noise.difference([0.02, 0.04]) == "+0.030 ± 0.014"
    assert noise.difference([-0.02]) == "−0.020 (± 0.015)"
    assert noise.difference([-0.0001]) == "+0.000 (± 0.015)"
    assert noise.deviation([0.1]) == noise.ONE_SEED and noise.deviation([0.1, 0.1]) == 0


ONE = [measured("plain", 0, 5.309), measured("lean", 0, 5.336), measured("paper", 0, 5.303)]
THREE = ONE + [measured(m, s, loss) for s in (1, 2) for m, loss in (("plain", 5.4), ("lean", 5.4 + s / 100))]


def test_one_seed_is_shown_with_the_noise_of_three(page):
    text = page(ONE)
    assert "+0.027 (±\u00a00.015)" in text and "−0.006 (±\u00a00.015)" in text
    assert text.count("validation loss of one seed; under about 0.03 is noise") == 2
    assert noise.remark() in table.reference(ONE) and "three seeds of llama-tiny" in text
    # No difference of losses stands alone, in a card, a cell or a sentence.
    for found in re.finditer(r"[+−]0\.0\d\d", text):
        assert re.match(r"(</b>validation loss of one seed| \(±)", text[found.end() :]), text[found.start() :][:60]


def test_several_seeds_have_their_own(page):
    text = page([row for row in THREE if row["method"] != "paper"])
    assert "validation loss, ±\u00a00.009 over 3 seeds" in text and "+0.019 ±\u00a00.009" in text
    assert "one seed" not in text


def test_a_seed_beside_several_is_marked(page):
    assert "−0.006 (±\u00a00.015)" in page(THREE)
    assert noise.remark() in table.reference(THREE)


def test_one_seed_is_not_seen_to_lose_what_noise_explains():
    rows = results.against_plain([*ONE, measured("pac", 0, 5.309 + 0.031)])
    points = overview.against_baseline(rows)
    assert points["lean"]["harmless"] and not points["pac"]["harmless"]


def test_a_method_without_a_seed_in_common_is_no_crash(page):
    """One seed of plain failed, and the only seed of another method is that one."""
    rows = [measured(m, 0, 5.3) for m in ("plain", "lean", "paper", "small")] + [measured("pac", 1, 5.5)]
    text = page(rows)
    assert "Least memory at all" in text and "pac" in text
    line = next(line for line in table.cells(rows) if line.method == "pac")
    assert line.above == "–"
    assert "no seed in common" in page([measured("plain", 2, 5.3), measured("lean", 3, 5.5)])


def test_a_phone_shows_loss_memory_and_speed_first(page):
    text = page(ONE)
    assert 'name="viewport" content="width=device-width' in text
    assert "@media (max-width: 40rem)" in text
    start = text.index('<table class="side">')
    headings = re.findall(r"<th( class=\"further\")?>([^<]*)</th>", text[start:])
    assert [name for further, name in headings if not further] == [
        "method", "val loss", "above plain", "kept for backward", "peak memory", "speed",
    ]  # fmt: skip
    assert [name for further, name in headings if further] == ["less kept", "perplexity", "tokens/s"]
    assert headings == sorted(headings, key=lambda each: bool(each[0]))  # the others come after

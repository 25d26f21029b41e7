"""How far a difference of losses may be off: by its own seeds, or by those of a benchmark where it has but one."""

from __future__ import annotations

from prac.lab.report.results import summary

# Three seeds scatter by so many nats about their mean difference to plain training: the standard deviation, as root
# mean square over these presets, in the benchmark that MEASURED_BY names. Other models and lengths have another.
ONE_SEED = 0.015
PRESETS = ("pac", "paper", "lean", "fast", "small")
MEASURED_BY = "benchmarks/results/compare.json"
MEASURED_ON = "llama-tiny in 260 steps of 2,048 tokens"


def deviation(gaps: list[float]) -> float:
    """The standard deviation of differences seed by seed; of a single one, :data:`ONE_SEED`."""
    return summary(gaps)[1] if len(gaps) > 1 else ONE_SEED


def difference(gaps: list[float]) -> str:
    """``+0.027 ± 0.018`` of several seeds; of one ``+0.027 (± 0.015)``, with a spread that is not its own."""
    spread = f"± {deviation(gaps):.3f}"
    return f"{centre(gaps)} {spread if len(gaps) > 1 else f'({spread})'}"


def centre(gaps: list[float]) -> str:
    """``+0.027``, the mean; what rounds to nothing has no minus."""
    return signed(f"{round(summary(gaps)[0], 3) + 0.0:+.3f}")


def signed(number: str) -> str:
    """With a minus sign as long as the plus."""
    return number.replace("-", "−")


def remark() -> str:
    """What a spread in brackets is, and what it makes of a difference."""
    return (
        f"(± {ONE_SEED}): one seed has no spread of its own; prac's presets scatter by this over three seeds of "
        f"{MEASURED_ON} ({MEASURED_BY}), other methods, models and lengths by less or more. Of one seed, differences "
        f"under about {2 * ONE_SEED:.2f} are noise."
    )

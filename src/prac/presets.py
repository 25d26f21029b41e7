"""Configs by name."""

from __future__ import annotations

import dataclasses

from prac.config import Bits, Config, Factors, Rank

# r1 = r2 = 0.3n for linear layers, 0.2n for norms and activations, n being "the hidden dimension" (Section 6.1).
HIDDEN = Rank(0.2, 0.2, of="hidden")
PAPER = Config(
    linear=Rank(0.3, 0.3),
    norm=Rank(0.2, 0.2),
    activation=Rank(0.4, 0.0, of="hidden"),
    product=False,
    last_norm=False,
    renormalise=True,
    growth=0.1,
)


def in_bits(config: Config, bits: Bits) -> Config:
    """The same ranks with Z in few bits, where ``config`` has ranks."""
    kinds = {kind: getattr(config, kind) for kind in ("linear", "norm", "activation", "group")}
    return config.replace(
        **{kind: dataclasses.replace(keep, bits=bits) for kind, keep in kinds.items() if isinstance(keep, Rank)}
    )


# On trained weights half the error of codes as they are, for as many bytes (docs/algorithm.md, "Rotated codes").
ROTATED = Bits(4, group=32, rotate=True)

PRESETS: dict[str, Config] = {
    # No loss that we could measure (docs/results.md), at plain training's speed within some 7%. 4 bits for what enters
    # weight gradients, where rounding is unbiased and averages out; 8 for what a nonlinearity follows.
    "lean": Config(linear=Bits(8), norm=Bits(8), activation=Bits(8), group=ROTATED),
    # The fewest operations: thin products for the weights of every norm group, at the price of noisy gradients. Its
    # intervals grow from the first step on: with a stale basis at so low a rank, early training stands still.
    "fast": Config(linear=Bits(8), norm=Bits(8), activation=Bits(8), group=Rank(0.1, 0.1, bits=Bits(8)), growth=0.1),
    # The fewest bytes that still train like plain: everything in 4 bits, attention too. What GELU and SiLU read, in
    # codes that are finest around 0, where they bend; rotated ones would be as coarse there as anywhere.
    "small": Config(linear=ROTATED, norm=ROTATED, activation=Bits(4, compand=True), group=ROTATED, attention_bits=4),
    # Section 5.1 as its tables have it, and so that it trains from the first step on (docs/algorithm.md, "How `paper`
    # reads the paper").
    "paper": PAPER,
    # The two limits of Table 1 and Figure 5, at the same total rank.
    "pac": PAPER.replace(linear=Rank(0.6, 0.0), norm=Rank(0.4, 0.0)),
    "rac": PAPER.replace(linear=Rank(0.0, 0.6), norm=Rank(0.0, 0.4), activation=Rank(0.0, 0.4, of="hidden")),
    # By the letter: every norm, fixed intervals. With it training stands still at first, and recovers late.
    "paper-as-printed": Config(activation=HIDDEN, product=False),
    # Both factors of a gated product too, as Section 5.1 suggests and Table 2 does not bear out.
    "paper-product": PAPER.replace(activation=Rank(0.2, 0.2), product=True),
    # What is projected in few bits besides.
    "paper-8bits": in_bits(PAPER, Bits(8)),
    "paper-4bits": in_bits(PAPER, Bits(4)),
    # Table 8: r1 = r2 = 2 (Section 6.2), interval 200. The paper does not say which
    # layers; its 38% less activation memory (Table 5) is what the linear inputs alone
    # give (7 of RoBERTa's 18 units), and at rank 2 + 2 the tail of a norm or a GELU would
    # be scaled by k = 383 before a nonlinearity.
    "finetune": Config(linear=Rank(2, 2), norm=None, activation=None, T1=200, T2=200),
    # Others' methods, by their own rules; docs/methods.md has the sources.
    "loract": Config(linear=Factors(0.125), norm=Factors(0.125), activation=Factors(0.125), group=Factors(0.125)),
    # Linear layers alone ("safe for linear operators", "problematic for nonlinear ones"), factors of each step's own.
    "co-compression": Config(linear=Factors(0.25, sketch="gaussian"), norm=None, activation=None, factored=True),
    # The same from random projections, one for all micro-batches of a step.
    "co-compression-rp": Config(linear=Rank(0, 0.25), norm=None, activation=None, factored=True, T1=1, T2=1),
    # These two go with prac.optim.SubspaceAdamW, at_refresh="reproject" and "reset".
    "compact": Config(linear=Rank(0, 0.25, orthonormal=False), norm=None, activation=None, factored=True, T1=50, T2=50),
    "rso": Config(linear=Rank(0, 0.25, orthonormal=False), norm=None, activation=None, factored=True, T1=200, T2=200),
    # LANCE's idea: a principal basis made once, on calibration batches (handle.calibrate).
    "one-shot": Config(linear=Rank(0.6, 0.0), norm=None, activation=None, T1=None, T2=None),
}


def as_config(config: Config | str) -> Config:
    """A preset by name, or the config itself.

    Raises:
        TypeError: for anything else.
        ValueError: for an unknown preset; the message lists the known ones.
    """
    if isinstance(config, Config):
        return config
    if not isinstance(config, str):
        raise TypeError(f"config must be a prac.Config or a preset's name, got {type(config).__name__}.")
    if config not in PRESETS:
        raise ValueError(f"unknown preset {config!r}; choose one of {', '.join(PRESETS)}, or pass a prac.Config.")
    return PRESETS[config]

"""How a tensor is kept, as text: the inverse of ``str`` of a Rank or Bits."""

from __future__ import annotations

from prac.config import Bits, Rank


def parse_keep(text: str) -> Rank | Bits | None:
    """The inverse of ``str``: ``4bits``, ``0.3,0.3`` or ``64,64``; with a k (``0.3,0.3,1.2``), ``/hidden``, ``@8bits``.

    ``none`` is None. Bits have their default group; ``rotated4bits`` are in groups of 32, ``companded4bits`` in 64.

    Raises:
        ValueError: for anything else.

    >>> parse_keep("0.3,0.3@8bits") == Rank(0.3, 0.3, bits=Bits(8)), str(parse_keep("64,64,1.2"))
    (True, '64,64,1.2')
    """
    if text == "none":
        return None
    rank, at, bits = text.partition("@") if not text.endswith("bits") or "@" in text else ("", "", text)
    try:
        rotated, companded = bits.startswith("rotated"), bits.startswith("companded")
        count = bits.removesuffix("bits").removeprefix("rotated").removeprefix("companded")
        stored = Bits(int(count), 32 if rotated else 64, rotated, companded) if bits or at else None
        if not rank and not at and stored is not None:
            return stored
        rank, of_what, of = rank.partition("/")
        numbers = [int(part) if part.strip().isdecimal() else float(part) for part in rank.split(",")]
        if len(numbers) in (2, 3):
            return Rank(numbers[0], numbers[1], float((*numbers, 1.0)[2]), stored, of=of if of_what else "width")  # type: ignore[arg-type]
    except ValueError as error:
        if not str(error).startswith(("invalid literal", "could not convert")):
            raise
    raise ValueError(f"{text!r} is not R1,R2 or R1,R2,K (perhaps with /hidden, @8bits), nor 4bits, nor none")

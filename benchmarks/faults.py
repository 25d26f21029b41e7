"""What is wrong with one way to train an architecture, by the numbers of `architectures.py`."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def faults(row: Row, plain: Row, without: Row | None) -> list[str]:
    """In words; ``without`` is the same without an example, where the row has one."""
    if row["error"]:
        return [row["error"]]
    if row is plain or plain["error"]:
        return []
    wrong = []
    # What is saved and not live belongs to a branch that the loss does not need; that is so in plain training as well.
    hidden = row["live_bytes"] - row["kept_bytes"] - max(0, plain["live_bytes"] - plain["kept_bytes"])
    if hidden > 0.01 * plain["live_bytes"]:
        wrong.append(f"live {row['live_bytes']:,} bytes, track_kept says {row['kept_bytes']:,}")
    if row["live_bytes"] > 1.005 * plain["live_bytes"] and row["setting"] != "exact":
        wrong.append(f"{row['live_bytes']:,} bytes are live, more than plain's {plain['live_bytes']:,}")
    if row["setting"] != "exact" and row["promise_broken"]:
        name, (promised, alone, together) = max(
            row["promise_broken"].items(), key=lambda item: abs(item[1][1] - item[1][0])
        )
        of = f"{len(row['promise_broken'])} layers, most of all {name}"
        wrong.append(
            f"summary promises other bytes than are kept in {of}: {promised:,}, kept {alone:,} to {together:,}"
        )
    if row["setting"] == "exact" and row["largest_error"] > 2e-3:
        wrong.append(f"gradients off by {row['largest_error']:.1e} in 32 bits")
    if row["whole_error"] > 0.5:  # of one draw; the rounding of so few tokens explains up to a third
        wrong.append(f"gradients off by {row['whole_error']:.0%}")
    if row["none_differs"]:
        wrong.append(f"None differs: {', '.join(row['none_differs'][:3])} ({len(row['none_differs'])})")
    for name, what in (("alive_at_once", "before"), ("alive", "after")):
        if row[name] > plain[name]:
            wrong.append(f"{row[name]} of {row['parameters']} parameters alive {what} collection")
    for name in ("batch_alive_at_once", "bytes_alive"):
        if row[name] > plain[name]:
            wrong.append(f"{name.replace('_', ' ')}: {row[name]:,}")
    if without and not without["error"] and without["live_bytes"] > 1.02 * row["live_bytes"]:
        wrong.append(f"without an example {without['live_bytes']:,} bytes, with one {row['live_bytes']:,}")
    return wrong

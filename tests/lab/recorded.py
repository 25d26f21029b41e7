"""Run folders as `prac train` leaves them, without a run."""

import json


def measured(method, seed, loss, **more):
    """A row as a run writes it."""
    row = {
        "method": method, "seed": seed, "model": "llama-tiny", "data": "sotu", "parameters": 3_300_000, "steps": 260,
        "tokens": 532_480, "val_loss": loss, "val_ppl": 2.718**loss, "unigram_entropy": 6.527, "device": "cpu",
        "kept_tokens": 2048, "kept_bytes": 138_000_000 // (1 + len(method)), "peak_step_bytes": 210_000_000,
        "peak_bytes": 210_000_000 // (1 + len(method) % 3), "tokens_per_s": 9000.0 - 100 * len(method),
    }  # fmt: skip
    return row | more


def folder(out, row):
    """A run folder with that row, and curves that end at its loss."""
    path = out / f"{row['method']}-seed{row['seed']}"
    path.mkdir()
    kept = [
        {"kind": kind, "block": block, "bytes": row["kept_bytes"] // 16}
        for kind in ("linear", "norm", "activation", "attention")
        for block in range(4)
    ]
    options = {"method": row["method"], "seed": row["seed"], "config": None, "model": row["model"], "lr": 1e-3}
    result = {"rows": [row], "options": options, "summary": "", "versions": {"torch": "2"}, "kept_by_layer": kept}
    (path / "result.json").write_text(json.dumps(result))
    curve = [
        {"step": step, "loss": row["val_loss"] + 200 / (step + 80)}
        | ({"val_loss": row["val_loss"] + 3 / step} if step % 50 == 0 else {})
        for step in range(10, 260, 10)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curve))
    return path

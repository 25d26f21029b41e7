"""Tables 3 and 6: what each operation of a block keeps, by the paper's formulas and measured to the byte.

    python benchmarks/paper/tables3_6.py
    python benchmarks/paper/tables3_6.py --hidden 768 --tokens 1024    # the width of GPT-2-124M and LLaMA-130M

One block of GPT-2 and one of LLaMA, as transformers writes them, in float32: plain, with the ranks of `paper`, and with
`lean`. The formulas are those of Appendix B with the ranks of Section 5.1, r1 + r2 of an operation's own width; for
LLaMA, which the paper does not write out, the same rule is applied: what an operation reads is kept, and of a product
both factors. Attention keeps q, k, v, its output and a number for each head. Table 3 is the rows of GELU and W_down
together. `paper` keeps less of GELU and SiLU than Table 6: docs/algorithm.md says why.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import common
import torch
from claims import Claim, Gap
from matplotlib.figure import Figure

import prac
from prac.lab.materials import blocks, models
from prac.memory import track_kept

FLOAT = 4
METHODS = ("plain", "paper", "lean")


@dataclass(frozen=True)
class Operation:
    """A row: numbers for each token by the formulas; ``modules`` of the block keep them."""

    name: str
    modules: tuple[str, ...]
    plain: int
    prac: int


def operations(family: str, n: int, m: int, heads: int, tables: int) -> list[Operation]:
    """Every operation of a block that keeps anything; ``tables`` are what rotary positions add, for each token."""

    def linear(width: int) -> int:
        return sum(prac.Rank(0.3, 0.3).resolve(width))

    def norm(width: int) -> int:
        return sum(prac.Rank(0.2, 0.2).resolve(width))

    activation = norm

    attention = 4 * n + heads + tables
    if family == "gpt2":
        return [
            Operation("LayerNorm", ("ln_1",), n + 2, norm(n) + 2),
            Operation("q, k, v", ("attn.c_attn",), n, linear(n)),
            Operation("attention", ("attn",), attention, attention),
            Operation("W_o", ("attn.c_proj",), n, linear(n)),
            Operation("LayerNorm 2", ("ln_2",), n + 2, norm(n) + 2),
            Operation("W_up", ("mlp.c_fc",), n, linear(n)),
            Operation("GELU", ("mlp.act",), m, activation(m)),
            Operation("W_down", ("mlp.c_proj", "mlp"), m, linear(m)),
        ]
    return [
        Operation("RMSNorm", ("input_layernorm",), n + 1, norm(n) + 1),
        Operation("q, k, v", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), n, linear(n)),
        Operation("attention", ("self_attn",), attention, attention),
        Operation("W_o", ("self_attn.o_proj",), n, linear(n)),
        Operation("RMSNorm 2", ("post_attention_layernorm",), n + 1, norm(n) + 1),
        Operation("W_gate, W_up", ("mlp.gate_proj", "mlp.up_proj"), n, linear(n)),
        Operation("SiLU and product", ("mlp.act_fn", "mlp"), 3 * m, activation(m) + 2 * m),
        Operation("W_down", ("mlp.down_proj",), m, linear(m)),
    ]


def kept(size: models.Size, batch: int, length: int, method: str) -> dict[str, float]:
    """Numbers for each token that the modules of the block keep, by their names in it."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = models.architecture(size, 100, length, bos_token_id=0, eos_token_id=1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    model.config.use_cache = False
    ids = torch.randint(100, (batch, length))
    inputs = {"input_ids": ids, "labels": ids}
    if method != "plain":
        prac.compress(model, method)
        model(**inputs).loss.backward()
    with track_kept(model, inputs) as found:
        model(**inputs)
    block = "transformer.h.0." if size.family == "gpt2" else "model.layers.0."
    inside = {name: count for name, count in found.by_module.items() if name.startswith(block)}
    return {name.removeprefix(block): count / (FLOAT * batch * length) for name, count in inside.items()}


def measured(family: str, hidden: int, tokens: int) -> list[dict[str, Any]]:
    """A row for each operation of one family."""
    shape = blocks.shape(family, hidden=hidden, tokens=tokens)
    batch, length = 4, tokens // 4
    heads, intermediate = shape.heads, shape.intermediate
    size = replace(models.SIZES["gpt2-124m" if family == "gpt2" else "llama-tiny"], layers=1)
    size = replace(size, hidden=hidden, intermediate=intermediate, heads=heads)
    # cos and sin, shared by the sequences of a batch
    tables = 2 * (hidden // heads) // batch if family == "llama" else 0
    found = {method: kept(size, batch, length, method) for method in METHODS}
    rows = []
    for operation in operations(family, hidden, intermediate, heads, tables):
        row = {"family": family, "operation": operation.name, "plain_formula": operation.plain}
        row |= {"paper_formula": operation.prac, "hidden": hidden, "tokens": tokens}
        row |= {method: sum(found[method].get(name, 0.0) for name in operation.modules) for method in METHODS}
        rows.append(row)
    return rows


def total(rows: list[dict[str, Any]], family: str, column: str) -> float:
    return sum(row[column] for row in rows if row["family"] == family)


def draw(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(8.6, 4.2), layout="constrained")
    for axes, family in zip(figure.subplots(1, 2), ("gpt2", "llama"), strict=True):
        group = [row for row in rows if row["family"] == family]
        n = group[0]["hidden"]
        for index, method in enumerate(METHODS):
            places = [place + (index - 1) * 0.27 for place in range(len(group))]
            axes.barh(places, [r[method] / n for r in group], 0.25, color=common.COLOURS[index], label=method)
            if (formula := f"{method}_formula") in group[0]:
                theirs = [row[formula] / n for row in group]
                axes.plot(theirs, places, "|", color="#1b1f24", markersize=9, label="formula" if not index else None)
        axes.set_yticks(range(len(group)), [row["operation"] for row in group])
        axes.invert_yaxis()
        axes.set(xlabel="tokens × hidden kept", title={"gpt2": "GPT-2 block", "llama": "LLaMA block"}[family])
        axes.grid(visible=False, axis="y")
    axes.legend(fontsize=8.5)
    return figure


def main() -> None:
    parser = common.options(__doc__)
    parser.add_argument("--hidden", type=int, default=256, help="width (default: 256)")
    parser.add_argument("--tokens", type=int, default=1024, help="of four sequences together (default: 1024)")
    arguments = parser.parse_args()
    rows = [row for family in ("gpt2", "llama") for row in measured(family, arguments.hidden, arguments.tokens)]

    claims, said = [], []
    for family, name in (("gpt2", "GPT-2"), ("llama", "LLaMA")):
        group = [row for row in rows if row["family"] == family]
        for column, title in (("paper", "PRAC"), ("plain", "plain training")):
            off = [row["operation"] for row in group if abs(row[column] - row[f"{column}_formula"]) > 1e-6]
            what = f"{name}, {title}: operations off the formula" + (f" ({', '.join(off)})" if off else "")
            claims.append(Claim(what, Gap.exact(len(off)), 0.5, f"{{:.0f}} of {len(group)}"))
        saved = 1 - total(rows, family, "paper") / total(rows, family, "plain")
        lean = 1 - total(rows, family, "lean") / total(rows, family, "plain")
        said.append(f"{name} {saved:.0%} less with PRAC, {lean:.0%} with lean")
        if family == "gpt2":
            claims.append(Claim("GPT-2: less than 40% saved, by", Gap.exact(0.40 - saved), unit="{:+.3f}"))
            # GELU as Table 6 has it, all else as measured.
            more = next(row["paper_formula"] - row["paper"] for row in group if row["operation"] == "GELU")
            as_table_6 = 1 - (total(rows, family, "paper") + more) / total(rows, family, "plain")
            claims.append(Claim("the same with GELU as in Table 6", Gap.exact(0.40 - as_table_6), unit="{:+.3f}"))
    both = [row for row in rows if row["family"] == "gpt2" and row["operation"] in ("GELU", "W_down")]
    third = {key: sum(row[key] for row in both) for key in (*METHODS, "plain_formula", "paper_formula")}

    heading = f"Numbers kept for each token, in units of hidden = {arguments.hidden}"
    table = common.table(heading, "operation", "plain: formula", "measured", "PRAC: formula", "measured", "lean")

    def add(name: str, row: dict[str, Any]) -> None:
        cells = [row["plain_formula"], row["plain"], row["paper_formula"], row["paper"], row["lean"]]
        table.add_row(name, *(f"{cell / arguments.hidden:.3f}" for cell in cells))

    for family, name in (("gpt2", "GPT-2"), ("llama", "LLaMA")):
        for row in (row for row in rows if row["family"] == family):
            add(f"{name}: {row['operation']}", row)
        add(f"{name}: all", {key: total(rows, family, key) for key in third})
        table.add_section()
    add("Table 3: GELU and W_down", third)
    common.save(
        "tables3_6", arguments.out, rows, claims=claims, table=table, figure=lambda: draw(rows), table3=third,
        paper="2bsn against 2bs(r1 + r2) for GELU and W_down (Table 3); over 40% less in a GPT block (Table 6)",
        ours="; ".join(said),
    )  # fmt: skip


if __name__ == "__main__":
    main()

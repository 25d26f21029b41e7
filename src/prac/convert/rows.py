"""What ``handle.summary()`` says of each module: how it keeps what it reads, or why it was left alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from prac.convert.conversion import Conversion
from prac.convert.plan import INSIDE
from prac.convert.summary import Row, is_leaf, why_left
from prac.estimators.base import Estimator
from prac.layers import Compressed, Match, Source, layers_of, recognise
from prac.layers.linear import Linear

ADDED = "added or changed since: stays in full"


def rows_of(model: nn.Module, conversion: Conversion) -> list[Row]:
    """Every module with parameters of its own or of a known kind."""
    return _Rows(model).all({} if conversion.is_undone else conversion.notes, conversion.is_undone)


def remarks_on(rows: Sequence[Row], model: nn.Module, conversion: Conversion) -> Iterator[str]:
    """What is to be said of them together."""
    layers = list(layers_of(model).values())
    if layers and not model.training:
        yield "The model is in eval mode now: nothing is compressed until model.train(), as trainers call it."
    if not conversion.is_final:
        yield (
            "The model has no example: the first batch that it trains on shows which layers share an input, and its "
            "attention. This table changes then."
        )
    has_trained = any(layer._prac.reads is not None or layer._prac.departs for layer in layers)
    if layers and not has_trained and not all(p.requires_grad for p in model.parameters()):
        yield "Parts are frozen: the first step shows which layers no gradient reaches. They keep nothing."
    if added := sum(row.note == ADDED for row in rows):
        yield (
            f"{added} modules were added or changed since prac.compress. handle.restore(), then prac.compress again, "
            "compresses them too."
        )
    if uncounted := sum(row.rank == "in full" and row.after is None for row in rows):
        yield f"{uncounted} layers go their own way: what their code keeps in full is not counted."


def maker_of(layers: Mapping[str, Compressed], name: str) -> str:
    """The name of the layer that keeps what ``name`` reads, itself or another; "" where torch's attention does."""
    record = layers[name]._prac
    if record.source is None:
        return name
    if record.source.is_there_anyway:
        while name:
            name = name.rpartition(".")[0]
            if name in layers and layers[name].kind == "attention":
                return name
        return ""
    # By the name that it had, in the copy of the block that is nearest.
    made = [other for other, layer in layers.items() if layer._prac.name == record.source.name]
    return max(made, key=lambda other: _shared_length(other, name), default="")


def _shared_length(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class _Rows:
    """The rows of one model, made in order, since what is shared counts for the first that has it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.device = next((p.device for p in model.parameters()), None)
        self.layers = layers_of(model)
        self.described: dict[Estimator | Source, str] = {}  # who first keeps it

    def all(self, notes: Mapping[nn.Module, str], is_undone: bool) -> list[Row]:
        rows: list[Row] = []
        for name, module in self.model.named_modules():
            if isinstance(module, Compressed):
                rows.append(dataclasses.replace(self.compressed(name, module), calls=module._prac.calls))
            elif notes.get(module) or is_leaf(module):
                note = notes.get(module)
                if note == INSIDE and any(name.startswith(f"{row.name}.") and row.rank == "in full" for row in rows):
                    note = "stays in full, as its MLP does"
                if note is None and isinstance(recognise(module), Match):
                    note = "restored" if is_undone else ADDED
                note = note or why_left(module)
                rows.append(Row(name, type(module).__name__, "-", "", None, None, note))
        return rows

    def compressed(self, name: str, layer: Compressed) -> Row:
        record = layer._prac
        weight = _weight(layer)
        of = next(self.model.parameters(), None) if weight is None else weight
        dtype = record.reads or (torch.get_default_dtype() if of is None else of.dtype)
        row: dict[str, Any] = {"name": name, "module": record.original.__name__, "what": layer.kind}
        if self.model.training and not layer.training:
            return Row(**row, rank="", before=None, after=None, note="in eval mode, where everything stays in full")
        replaced = "its forward was replaced after compress" if "forward" in vars(layer) else layer.differs(self.device)
        if replaced or record.keeps in ("nothing", "in full"):
            note = f"{replaced}: {layer.in_full}" if replaced else record.departs
            if record.keeps == "nothing" and not replaced:
                return Row(**row, rank="", before=0, after=0, note=note)
            # Torch's linear layer keeps its input; what the code of others keeps is not known.
            width = layer.estimators["x"].width if layer.kind == "linear" else None
            full = None if width is None else width * dtype.itemsize
            return Row(**row, rank="in full", before=full, after=full, note=note)
        if layer.kind == "linear" and weight is not None and not weight.requires_grad:
            reads = record.source is not None and not record.source.is_there_anyway and "y" in layer.estimators
            if not reads:
                return Row(**row, rank="", before=0, after=0, note="frozen weight: nothing is kept")
        if record.source is not None and not record.departs:
            return self.reader(row, layer, dtype)
        estimators = [e for tensor, e in layer.estimators.items() if tensor != "y"]
        if any(e.width is None for e in estimators):
            return Row(**row, rank="as its input", before=None, after=None, note="width known after the first step")
        label = " / ".join(dict.fromkeys(e.label() for e in estimators))
        if estimators[0] in self.described:
            other = _short(self.described[estimators[0]], name)
            return Row(**row, rank=label, before=0, after=0, note=f"shares the Z of {other}")
        self.described.update(dict.fromkeys(estimators, name))
        statistics = layer.statistics * torch.promote_types(dtype, torch.float32).itemsize
        # Per token that the module reads: of attention that is a query.
        share = {"k": record.keys_per_query, "v": record.keys_per_query}
        unused = {"y", *record.unused}
        kept = {e: share.get(tensor, 1.0) for tensor, e in layer.estimators.items() if tensor not in unused}
        before = round(sum(s * (e.width or 0) * dtype.itemsize for e, s in kept.items())) + statistics
        note = record.departs or "; ".join(filter(None, (e.remark for e in estimators)))
        if layer.kind == "linear" and record.kept_anyway:
            before, note = 0, note or "others keep its input in full anyway: this comes on top"
        after = sum(s * e.bytes_per_token((e.kept_in or dtype).itemsize) for e, s in kept.items())
        after = round(after) + statistics
        return Row(**row, rank=label, before=before, after=after, note=note)

    def reader(self, row: dict[str, Any], layer: Compressed, dtype: torch.dtype) -> Row:
        """A layer that has its input from what others keep."""
        name, source = row["name"], layer._prac.source
        assert source is not None
        maker_name = maker_of(self.layers, name)
        maker = self.layers.get(maker_name)
        if source.is_there_anyway:
            if maker is None or maker._prac.departs:
                return Row(**row, rank="in full", before=0, after=0, note=f"{source.what} keeps it anyway")
            note = f"from the output of {maker_name.rpartition('.')[2]}"
            return Row(**row, rank=maker.estimators["out"].label(), before=0, after=0, note=note)
        if maker is None:
            return Row(**row, rank="", before=None, after=None, note=f"the {source.name} that it read from is gone")
        # The tensor itself was kept once, by the first that reads it.
        first = source not in self.described
        self.described[source] = name
        weight = _weight(layer)
        assert weight is not None
        assert isinstance(layer, Linear)
        width, width_out = layer.widths(weight)
        outputs, after = layer.estimators.get("y"), 0
        if outputs is not None and outputs.bits is not None:
            outputs.width = width_out
            after = outputs.bytes_per_token(dtype.itemsize)
        # A module is called by its own name where it is the parent, as an MLP is of its down projection.
        short = maker_name.rpartition(".")[2] if name.startswith(f"{maker_name}.") else _short(maker_name, name)
        label = next(iter(maker.estimators.values())).label()
        before = width * dtype.itemsize if first else 0
        return Row(**row, rank=label, before=before, after=after, note=f"from {source.what} of {short}")


def _weight(layer: nn.Module) -> torch.Tensor | None:
    """Its weight; of one that is parametrised what it is computed from, since computing it may change the layer."""
    made = getattr(layer, "parametrizations", {})
    if "weight" in made:
        return max(made["weight"].parameters(), key=torch.Tensor.numel)
    own = layer._parameters.get("weight")
    return vars(layer).get("weight") if own is None else own  # a pruned one is an attribute


def _short(name: str, neighbour: str) -> str:
    """A module's name, seen from a neighbour in the same block."""
    ours, theirs = name.split("."), neighbour.split(".")
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
    return ".".join(ours[same:])

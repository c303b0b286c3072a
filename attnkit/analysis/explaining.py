"""explain: which backend every attention call of a module gets, why not the others, and whether dense were faster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attnkit.analysis.tables import html_table, percent, plain_table
from attnkit.analysis.tracing import (
    ImageSize,
    Visit,
    described,
    example_inputs,
    prepared,
    reported,
    sizes_of,
    unit_of,
    unmarked,
    visits,
)
from attnkit.analysis.turning import BesideDense, beside_dense
from attnkit.errors import ConfigError, shown
from attnkit.kernels.costs import measured_on, written
from attnkit.kernels.dispatch import backend_named

HEADERS = ("layer", "primitive", "heads", "queries", "keys", "density", "layout", "backend", "ms")


@dataclass(frozen=True)
class Explained:
    """One attention call.

    Attributes:
        path: name of the layer inside the module, e.g. `"blocks.0.mix.groups.1"`.
        kind: name of the primitive, or of the class of a layer that calls `attend` itself.
        heads: heads of the call (a learned query counts as a head).
        queries: number of queries, Nq.
        keys: number of keys, Nk.
        density: share of the query-key pairs that are visible, 0..1.
        layout: kind of the layout.
        backend: name of the backend that computes the call.
        milliseconds: what it is predicted to take for one image, without what comes before and after attention; None
            where no times were measured: off the CPU, in float16 and float64, and by interpreted kernels.
        reasons: for every other backend, why it does not.
        how: how the backend computes it, where there is more to say than its name.
    """

    path: str
    kind: str
    heads: int
    queries: int
    keys: int
    density: float
    layout: str
    backend: str
    milliseconds: float | None
    reasons: Mapping[str, tuple[str, ...]]
    how: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of the table's columns."""
        sizes = (str(self.heads), str(self.queries), str(self.keys))
        return (
            self.path or "(itself)",
            self.kind,
            *sizes,
            percent(self.density),
            self.layout,
            self.backend,
            "" if self.milliseconds is None else written(self.milliseconds),
        )


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; `print` shows it as a table.

    Attributes:
        title: what was run.
        rows: one entry per attention call, in the order of the run.
        others: path and primitive of the head groups that call no attention, such as convolutions.
        beside: every head group that is not dense beside dense heads, in the order of the run; nothing where no times
            were measured.
    """

    title: str
    rows: tuple[Explained, ...]
    others: tuple[tuple[str, str], ...] = ()
    beside: tuple[BesideDense, ...] = ()

    def __str__(self) -> str:
        parts = [self.title]
        if self.rows:
            numbered = [(str(number), *row.cells) for number, row in enumerate(self.rows, start=1)]
            parts.append(plain_table(("#", *HEADERS), numbered, left=3))
            if any(row.how for row in self.rows):
                parts.append("How\n" + "\n".join(self._ways()))
            parts.append("Why not the others\n" + "\n".join(self._refusals()))
        if self.beside:
            title = f"Beside dense heads, predicted for one image as measured on {measured_on()}"
            parts.append("\n".join([title, *self._comparisons()]))
        if self.others:
            named = ", ".join(f"{path} ({kind})" for path, kind in self.others)
            parts.append(f"Head groups without softmax: {named}")
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        return html_table(HEADERS, [row.cells for row in self.rows], caption=self.title)

    def _comparisons(self) -> list[str]:
        alike: dict[tuple[str, str], list[str]] = {}
        for one in self.beside:
            alike.setdefault((one.kind, str(one)), []).append(one.path or "(itself)")
        lines = []
        for (kind, text), paths in alike.items():
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            lines += [f"  {paths[0]}{more} ({kind})", f"      {text}"]
        return lines

    def _ways(self) -> list[str]:
        alike: dict[tuple[str, str], list[int]] = {}
        for number, row in enumerate(self.rows, start=1):
            if row.how:
                alike.setdefault((row.backend, row.how), []).append(number)
        return [f"  # {_ranges(numbers)}\n      {name}  {how}" for (name, how), numbers in alike.items()]

    def _refusals(self) -> list[str]:
        alike: dict[tuple[tuple[str, str], ...], list[int]] = {}
        for number, row in enumerate(self.rows, start=1):
            reasons = tuple((name, "; ".join(texts)) for name, texts in row.reasons.items())
            alike.setdefault(reasons, []).append(number)
        lines = []
        for reasons, numbers in alike.items():
            lines.append(f"  # {_ranges(numbers)}")
            width = max(len(name) for name, _ in reasons)
            lines += [f"      {name.ljust(width)}  {text}" for name, text in reasons]
        return lines


def explain(
    model_or_layer: nn.Module,
    image_size: ImageSize,
    *,
    training: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Explanation:
    """Runs a module once and tells which backend each attention call got, and why the others did not.

    Args:
        model_or_layer: a model, a `HeadMix` or a `Block`. It is left as it was, and so is the global random state.
        image_size: pixels of the image, a number or (height, width); for a layer the tokens of its map, or a
            `Grid` with prefix tokens.
        training: explain a training pass instead of an evaluation: gradients are needed, and random windows are drawn.
        device: explain a copy of the module on this device.
        dtype: explain a copy of the module in this dtype.

    Returns:
        An `Explanation` with one row per call.

    Raises:
        ConfigError: if `model_or_layer` is no module, the device is not there, or the dtype is no floating one.
        ShapeError: if the module cannot take images of that size.
        BackendError: if a backend was asked for that cannot run a call.
    """
    if not isinstance(training, bool):
        raise ConfigError(f"explain(training=...) must be true or false, but got {shown(training)}")
    module = prepared(model_or_layer, "explain", device, dtype)
    # Batch statistics of a single image can be undefined, so a training pass gets two.
    inputs = example_inputs(module, image_size, batch=2 if training else 1)
    with reported("explain", module, inputs), unmarked(module, training=training):
        found = visits(module, inputs)
        rows = tuple(row for visit in found for row in _rows(visit))
    like = inputs[0]
    mode = "training" if training else "evaluation"
    dtype_name = str(like.dtype).removeprefix("torch.")
    title = f"{described(module, image_size)}, {mode}, {dtype_name} on {like.device.type}"
    calls = f"{len(rows)} attention call{'' if len(rows) == 1 else 's'}"
    others = tuple((visit.path, visit.kind) for visit in found if not visit.choices)
    known: dict[object, BesideDense | None] = {}
    with unmarked(module, training=training):
        compared = [beside_dense(visit, sizes_of(image_size)[0], unit_of(module), known) for visit in found]
    return Explanation(f"{title}: {calls}", rows, others, tuple(one for one in compared if one is not None))


def _rows(visit: Visit) -> list[Explained]:
    rows = []
    for choice in visit.choices:
        call = choice.call
        rows.append(
            Explained(
                path=visit.path,
                kind=visit.kind,
                heads=call.q.shape[1],
                queries=call.q.shape[2],
                keys=call.k.shape[2],
                density=call.layout.density(),
                layout=call.layout.kind,
                backend=choice.backend,
                milliseconds=backend_named(choice.backend).known_cost(call),
                reasons=dict(choice.reasons),
                how=backend_named(choice.backend).how(call),
            )
        )
    return rows


def _ranges(numbers: list[int]) -> str:
    """1, 2, 3, 7 -> "1-3, 7"."""
    runs: list[list[Any]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}-{last}" if first != last else f"{first}" for first, last in runs)

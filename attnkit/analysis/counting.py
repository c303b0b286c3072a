"""flops: multiply-accumulates of a module for one image, attention counted from its layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from attnkit.analysis import formulas  # noqa: F401 - what the counter lacks
from attnkit.analysis.tables import html_table, metric, percent, plain_table
from attnkit.analysis.tracing import ImageSize, described, example_inputs, hooked, prepared, reported, unmarked
from attnkit.blocks import MLP
from attnkit.heads import HeadMix
from attnkit.kernels import use_backend
from attnkit.kernels.call import AttendCall, AttendResult
from attnkit.kernels.dispatch import wrapping
from attnkit.primitives import HeadGroup

HEADERS = ("layer", "kind", "attention", "linear", "conv", "total", "density")


@dataclass(frozen=True)
class LayerCount:
    """Multiply-accumulates of one layer.

    Attributes:
        path: name of the layer, e.g. `"blocks.0.mix.groups.1"`.
        kind: name of the primitive for a head group; `"mix"` for the projections around the groups; else the class.
        attention: q.k and weights.v over the visible pairs.
        linear: matrix products outside attention: projections, MLPs, routing, prediction of masks.
        conv: convolutions.
        dense: what `attention` would be if every query saw every key.
    """

    path: str
    kind: str
    attention: int = 0
    linear: int = 0
    conv: int = 0
    dense: int = 0

    @property
    def total(self) -> int:
        """All multiply-accumulates of the layer."""
        return self.attention + self.linear + self.conv

    @property
    def density(self) -> float | None:
        """Share of the query-key pairs that are visible, 0..1; None for a layer without attention."""
        return self.attention / self.dense if self.dense else None

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of the table's columns."""
        counts = [metric(one) if one else "" for one in (self.attention, self.linear, self.conv, self.total)]
        return (self.path or "(itself)", self.kind, *counts, "" if self.density is None else percent(self.density))


@dataclass(frozen=True)
class FlopCount:
    """What `flops` counted; `print` shows it as a table.

    Attributes:
        title: what was run.
        rows: one entry per layer that computes anything, in the order of the run.
    """

    title: str
    rows: tuple[LayerCount, ...]

    @property
    def attention(self) -> int:
        """Multiply-accumulates of attention."""
        return sum(row.attention for row in self.rows)

    @property
    def linear(self) -> int:
        """Multiply-accumulates of matrix products outside attention."""
        return sum(row.linear for row in self.rows)

    @property
    def conv(self) -> int:
        """Multiply-accumulates of convolutions."""
        return sum(row.conv for row in self.rows)

    @property
    def total(self) -> int:
        """All multiply-accumulates (MACs); papers call the same number FLOPs."""
        return self.attention + self.linear + self.conv

    def __str__(self) -> str:
        return f"{self.title}\n\n{plain_table(HEADERS, [*(row.cells for row in self.rows), self._sum()])}"

    def _repr_html_(self) -> str:
        return html_table(HEADERS, [*(row.cells for row in self.rows), self._sum()], caption=self.title)

    def _sum(self) -> tuple[str, ...]:
        dense = sum(row.dense for row in self.rows)
        return LayerCount("total", "", self.attention, self.linear, self.conv, dense).cells


def flops(
    model: nn.Module,
    image_size: ImageSize,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> FlopCount:
    """Counts the multiply-accumulates (MACs) of one image.

    Attention costs `visible pairs * (D + Dv)` per head, counted from the layouts, so the number does not depend on the
    backend. Matrix products and convolutions are counted from their shapes. What grows no faster than the tokens
    (norms, activations, softmax, additions) is left out, as in papers.

    Args:
        model: a model, a `HeadMix` or a `Block`. It is left as it was, and so is the global random state.
        image_size: pixels of the image, a number or (height, width); for a layer the tokens of its map, or a
            `Grid` with prefix tokens.
        device: count on a copy of the module on this device.
        dtype: count on a copy of the module in this dtype.

    Returns:
        A `FlopCount`: `.total` in MACs and one row per layer.

    Raises:
        ConfigError: if `model` is no module, the device is not there, or the dtype is no floating one.
        ShapeError: if the module cannot take images of that size.
    """
    module = prepared(model, "flops", device, dtype)
    inputs = example_inputs(module, image_size)
    with unmarked(module), use_backend(None), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        ledger = _Ledger(module, counter)
        with reported("flops", module, inputs), hooked(module, ledger.enter, ledger.leave), wrapping(ledger.attend):
            module(*inputs)
    rows = tuple(row for row in ledger.rows.values() if row.total or row.dense)
    return FlopCount(f"{described(module, image_size)}: {metric(sum(row.total for row in rows))}MACs", rows)


class _Ledger:
    """Books what the counter shows to the layer that ran since the last look at it."""

    def __init__(self, module: nn.Module, counter: FlopCounterMode) -> None:
        self.module = module
        self.counter = counter
        self.rows: dict[str, LayerCount] = {}
        self.running: list[str] = []
        self.seen = (0, 0)
        self.owners = {name: _owner(module, name) for name, _ in module.named_modules()}

    def enter(self, path: str, module: nn.Module, given: tuple[Any, ...]) -> None:
        self._book()
        self.running.append(path)

    def leave(self, path: str, module: nn.Module, output: Any) -> None:
        self._book()
        self.running.pop()

    def attend(self, call: AttendCall, compute: Callable[[], AttendResult]) -> AttendResult:
        self._book()
        result = compute()
        # What the backend did is counted from the layout instead.
        self.seen = self._shown()
        batch, heads, queries, width = call.q.shape
        per_pair = width + call.v.shape[3]
        attention = call.layout.flops(width, call.v.shape[3], batch=batch, heads=heads)
        self._add(attention=attention, dense=batch * heads * queries * call.k.shape[2] * per_pair)
        return result

    def _book(self) -> None:
        linear, conv = (now - before for now, before in zip(self._shown(), self.seen, strict=True))
        if linear or conv:
            self._add(linear=linear, conv=conv)
        self.seen = self._shown()

    def _shown(self) -> tuple[int, int]:
        """MACs of matrix products and of convolutions so far."""
        counts = self.counter.flop_counts["Global"]
        conv = sum(count for op, count in counts.items() if "conv" in str(op))
        return (sum(counts.values()) - conv) // 2, conv // 2

    def _add(self, **counts: int) -> None:
        path = self.owners[self.running[-1]] if self.running else ""
        row = self.rows.get(path) or LayerCount(path, _kind(self.module.get_submodule(path)))
        added = {name: getattr(row, name) + count for name, count in counts.items()}
        self.rows[path] = replace(row, **added)


def _owner(module: nn.Module, path: str) -> str:
    """The head group, mix or MLP a submodule is part of, else itself."""
    parts = path.split(".")
    for count in range(len(parts), -1, -1):
        above = ".".join(parts[:count])
        if isinstance(module.get_submodule(above), (HeadGroup, HeadMix, MLP)):
            return above
    return path


def _kind(module: nn.Module) -> str:
    if isinstance(module, HeadMix):
        return "mix"
    return getattr(getattr(module, "options", None), "kind", "") or type(module).__name__

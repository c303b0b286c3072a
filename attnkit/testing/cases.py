"""Cases: everything a law tries, as plain numbers from which tensors are made, and written as code."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnkit.grid import Grid, Sizes
from attnkit.kernels.call import AttendCall
from attnkit.layouts import Layout, RelativeTable, Stencil
from attnkit.primitives import PrimitiveOptions
from attnkit.testing.layouts import random_layout
from attnkit.testing.tensors import random_tensor

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# The form of a bias or gain that is a relative table.
TABLE = 16
MEMORY = ("contiguous", "heads_last", "width_first", "every_other")


@dataclass(frozen=True)
class PrimitiveCase:
    """A head group and its inputs.

    Args:
        options: the primitive's options.
        grid: how the tokens lie.
        batch: number of items, >= 0.
        head_dim: width of a head, D.
        seed: of weights and inputs.
        extra: channels by which the layer is wider than its heads together, >= 0.
        masked: whether some tokens are masked.
        training: whether it is in training mode, in draw number `seed % 7`.
        dtype: name of the dtype of weights and inputs.
        memory: how q, k and v lie in memory.
        backend: what `use_backend` asks for, or None for the automatic choice: on small maps that rarely takes kernels
            made for large ones, which `"chunked,auto"` does wherever they can run.
    """

    options: PrimitiveOptions
    grid: Grid
    batch: int = 1
    head_dim: int = 1
    seed: int = 0
    extra: int = 0
    masked: bool = False
    training: bool = False
    dtype: str = "float64"
    memory: str = "contiguous"
    backend: str | None = None

    def __repr__(self) -> str:
        return as_code(self)


@dataclass(frozen=True)
class AttentionCase:
    """Attention over a random layout on one backend.

    Args:
        kind: kind of the layout, as in `random_layout`.
        grid: how the keys lie.
        backend: name of the backend.
        batch: number of items, >= 0.
        heads: number of heads, >= 1.
        head_dim: width of queries and keys, D.
        value_dim: width of values.
        seed: of the layout and the numbers.
        bias: sum of 1, 2, 4 and 8 for the dimensions (B, heads, Nq, Nk) over which a bias varies, 16 for a relative
            table (one number where queries and keys do not lie on one grid), or None for no bias.
        gain: the same for a gain.
        lse: whether the lse is asked for.
        dtype: name of the dtype of q, k and v.
        memory: how q, k and v lie in memory.
    """

    kind: str
    grid: Grid
    backend: str = "reference"
    batch: int = 1
    heads: int = 1
    head_dim: int = 1
    value_dim: int = 1
    seed: int = 0
    bias: int | None = None
    gain: int | None = None
    lse: bool = False
    dtype: str = "float64"
    memory: str = "contiguous"

    def __repr__(self) -> str:
        return as_code(self)

    def layout(self) -> Layout:
        """The layout."""
        return random_layout(self.kind, self.grid, batch=max(self.batch, 1), heads=self.heads, seed=self.seed)[0]

    def call(self, *, grad: bool = False, dtype: torch.dtype | None = None) -> AttendCall:
        """The call, whose tensors ask for gradients if `grad`; in another dtype they hold the same rounded numbers."""
        layout = self.layout()
        own = DTYPES[self.dtype]
        queries, keys = layout.num_queries, layout.num_keys
        shapes = [(queries, self.head_dim), (keys, self.head_dim), (keys, self.value_dim)]
        rows = [
            arranged(random_tensor(self.batch, self.heads, *shape, seed=5 * self.seed + at, dtype=own), self.memory)
            for at, shape in enumerate(shapes)
        ]
        full = (self.batch, self.heads, queries, keys)
        stride = _stride(layout, self.grid)
        tables = [form == TABLE and stride is not None for form in (self.bias, self.gain)]
        extents = (self.heads, *(1 + 2 * (self.seed // 4**axis % 4) for axis in range(self.grid.ndim)))
        pairs = [
            None
            if form is None
            else random_tensor(
                *(extents if table else (size if form >> axis & 1 else 1 for axis, size in enumerate(full))),
                seed=5 * self.seed + at,
                dtype=own,
            )
            for at, form, table in zip((3, 4), (self.bias, self.gain), tables, strict=True)
        ]
        leaves = [None if one is None else one.to(dtype or own) for one in (*rows, *pairs)]
        for one in leaves:
            if one is not None and grad:
                one.requires_grad_()
        q, k, v, *values = leaves
        assert q is not None and k is not None and v is not None
        fill = self.seed % 3 / 2
        bias, gain = (
            RelativeTable(one, self.grid, stride or 1, fill) if table and one is not None else one
            for one, table in zip(values, tables, strict=True)
        )
        return AttendCall(q, k, v, layout, 0.2 + self.seed % 7 / 5, bias, gain, self.lse)


def _stride(layout: Layout, grid: Grid) -> Sizes | None:
    """The step between queries where queries and keys lie on one grid, else None."""
    if isinstance(layout, Stencil):
        return layout.stride
    return 1 if layout.num_queries == layout.num_keys == grid.tokens else None


def arranged(rows: Tensor, memory: str) -> Tensor:
    """The same numbers (B, heads, N, D), lying in memory in another order."""
    if memory == "heads_last":
        return rows.transpose(1, 2).contiguous().transpose(1, 2)
    if memory == "width_first":
        return rows.mT.contiguous().mT
    if memory == "every_other":
        return rows.repeat_interleave(2, dim=2)[:, :, ::2]
    return rows


def as_code(value: Any) -> str:
    """A dataclass as the code that makes it, without the fields that hold their default."""
    if isinstance(value, Grid) or not dataclasses.is_dataclass(value):
        return repr(value)
    fields = []
    for field in dataclasses.fields(value):
        own = getattr(value, field.name)
        if field.default is dataclasses.MISSING or own != field.default:
            fields.append(f"{field.name}={as_code(own)}")
    return f"{type(value).__name__}({', '.join(fields)})"

"""A call of the operators of stencils as kernels take it, on three axes; from shapes, strides and dtypes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnkit.kernels.triton.devices import device_class as device_class_of
from attnkit.kernels.triton.launch import precision, with_strides
from attnkit.kernels.triton.stencil import configs
from attnkit.kernels.triton.stencil.configs import AXES, Config, Direction, padded_dim

# Programs that keep a large GPU busy: into so many shares at most is a sum cut that all queries contribute to.
PROGRAMS = 4096


class Windows(NamedTuple):
    """The operator's arguments behind q, k and v."""

    bias: Tensor | None
    gain: Tensor | None
    seen: Tensor | None
    sizes: list[int]
    prefix: int
    kernels: list[int]
    strides: list[int]
    dilations: list[int]
    clamped: bool
    scale: float


class Call:
    """One call's tensors and windows as kernels take them, on three axes.

    Args:
        q: queries (B, heads, N, D), or (B, heads, 1, D) for all.
        k: keys (B, heads, Nk, D).
        v: values (B, heads, Nk, Dv).
        windows: the rest of the operator's arguments.
        device_class: which line of the table of configurations holds; that of q's device where not given.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, windows: Windows, device_class: str | None) -> None:
        self.q, self.k, self.v, self.windows = q, k, v, windows
        self.batch, self.heads, _, self.value_width = v.shape
        self.width = q.shape[3]
        self.device_class = device_class or (device_class_of(q.device) if q.is_cuda else "sm_90")
        line = (1,) * (AXES - len(windows.sizes))
        self.sizes, self.kernels = (*line, *windows.sizes), (*line, *windows.kernels)
        self.strides, self.dilations = (*line, *windows.strides), (*line, *windows.dilations)
        self.query_sizes = [(size - 1) // step + 1 for size, step in zip(self.sizes, self.strides, strict=True)]
        common = [math.gcd(step, far) for step, far in zip(self.strides, self.dilations, strict=True)]
        # How far queries lie apart that see keys of one class.
        self.steps = [far // one for far, one in zip(self.dilations, common, strict=True)]
        self.inverses = [
            pow(step // one, -1, apart) if apart > 1 else 0
            for step, one, apart in zip(self.strides, common, self.steps, strict=True)
        ]
        self.queries = math.prod(self.query_sizes)
        self.axes = max([at for at in range(1, AXES + 1) if self.sizes[AXES - at] > 1], default=1)
        self.precision = precision(torch.promote_types(q.dtype, v.dtype))
        # Triton reads bytes.
        seen = windows.seen
        self.seen = None if seen is None else seen.contiguous().view(torch.uint8)
        # Queries that are all the same have kernels of their own where windows are not moved.
        self.learned = q.shape[2] == 1 and not windows.clamped

    def config(self, direction: Direction) -> Config:
        width, dtype = self.value_width, self.v.dtype
        if not self.learned:
            width, dtype = max(self.width, width), torch.promote_types(self.q.dtype, dtype)
        tables = self.windows.bias is not None or self.windows.gain is not None
        rounded = self.precision == "tf32"
        return configs.configuration(direction, max(self.kernels), width, dtype, self.device_class, tables, rounded)

    def patch(self, rows: int) -> dict[str, int]:
        """Sides of a patch of so many tokens, powers of two: square or twice as wide as high."""
        across = rows if self.axes == 1 else 1 << (rows.bit_length() // 2)
        return {"ROWS1": rows // across, "ROWS2": across}

    def inputs(self) -> dict[str, Any]:
        """Queries, keys, values, tables and windows."""
        return {
            **with_strides("q", self.q, "bhnd"),
            **with_strides("k", self.k, "bhnd"),
            **with_strides("v", self.v, "bhnd"),
            **self.tables(),
            "scale": self.windows.scale,
            **self.grid(),
        }

    def tables(self) -> dict[str, Any]:
        windows = self.windows
        found: dict[str, Any] = {}
        for name, table in (("bias", windows.bias), ("gain", windows.gain)):
            found |= with_strides(name, None if table is None else on_three_axes(table), "bhp012")
        return {**found, **with_strides("seen", self.seen, "bh")}

    def grid(self) -> dict[str, Any]:
        """What every kernel takes of the windows."""
        return {
            "heads": self.heads,
            "prefix": self.windows.prefix,
            **numbered("size", self.sizes),
            **numbered("queries", self.query_sizes),
            **numbered("kernel", self.kernels),
            **numbered("stride", self.strides),
            **numbered("dilation", self.dilations),
        }

    def varying(self) -> dict[str, bool]:
        tables = (("BIAS_VARIES", self.windows.bias), ("GAIN_VARIES", self.windows.gain))
        return {name: table is not None and math.prod(table.shape[3:]) > 1 for name, table in tables}

    def widths(self) -> dict[str, int]:
        return {
            "WIDTH": self.width,
            "VALUE_WIDTH": self.value_width,
            "BLOCK_D": padded_dim(self.width),
            "BLOCK_V": padded_dim(self.value_width),
        }

    def scored(self) -> tuple[Tensor, Tensor, float]:
        """Query, keys and scale of a learned query, the keys one number wide."""
        if self.width == 1:
            return self.q, self.k, self.windows.scale
        scores = (self.k.float() * self.q.float()).sum(3, keepdim=True)
        return self.q.new_ones(1, 1, 1, 1, dtype=torch.float32), scores, self.windows.scale

    def shares_of(self, programs: int, rows: int) -> tuple[int, int]:
        """Into how many shares the queries of a sum are cut, and how many rows of tiles a share has.

        Args:
            programs: that work at the sum of a share.
            rows: queries of a tile.
        """
        pieces = -(-self.queries // rows)
        shares = max(1, min(pieces, PROGRAMS // max(programs, 1)))
        share = -(-pieces // shares) * rows
        return -(-self.queries // share), share

    def heads_of(self, columns: int) -> dict[str, int]:
        """How many heads a program has, and how wide they are, for so many numbers of a token."""
        width = power_of_two(self.value_width)
        # Heads that do not lie beside each other would be read from as many places.
        beside = self.v.stride(1) == self.value_width and self.v.stride(3) == 1
        heads = max(1, min(columns // width, power_of_two(self.heads))) if beside else 1
        return {"BLOCK_H": heads, "BLOCK_V": width}


def on_three_axes(table: Tensor) -> Tensor:
    """A view (B or 1, heads or 1, places, sizes or 1s along three axes) of a bias or gain."""
    return table.view(*table.shape[:3], *(1,) * (AXES + 3 - table.ndim), *table.shape[3:])


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below a number."""
    return 1 << (number - 1).bit_length()


def numbered(name: str, numbers: Any) -> dict[str, int]:
    return {f"{name}{axis}": int(number) for axis, number in enumerate(numbers)}


def tiles_of(lengths: Sequence[int], patch: dict[str, int]) -> list[int]:
    return [lengths[0], -(-lengths[1] // patch["ROWS1"]), -(-lengths[2] // patch["ROWS2"])]

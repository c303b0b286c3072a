"""One call of the operators of blocks, as its kernels take it: tables side by side, strides, and constants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit.kernels.ops.blocks import BlockTables
from attnkit.kernels.triton.blocks import configs
from attnkit.kernels.triton.blocks.configs import Config, Direction, Stepping, padded_dim
from attnkit.kernels.triton.devices import device_class as device_class_of
from attnkit.kernels.triton.launch import precision, with_strides

# Columns at most where they are a list of tokens, of which threads hold as many as there are columns: with 64 of them
# kernels take a third more registers. So they do where a prefix is walked over before whole tiles are.
LISTED = 32


class Call:
    """One call's tensors as kernels take them.

    Args:
        q: queries (B, heads, N, D).
        k: keys (B, heads, N, D).
        v: values (B, heads, N, Dv).
        tables: the rest of the operator's arguments.
        device_class: which line of the table of configurations holds; that of q's device where not given.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, tables: BlockTables, device_class: str | None) -> None:
        self.q, self.k, self.v, self.tables = q, k, v, tables
        self.batch, self.heads, _, self.width = q.shape
        self.value_width = v.shape[3]
        self.precision = precision(q.dtype)
        self.query_blocks, self.query_slots = tables.query_token.shape[2:]
        self.key_blocks, self.key_slots = tables.key_token.shape[2:]
        self.topk = 1 if tables.routes is None else tables.routes.shape[3]
        self.queries = tables.query_slot.shape[2]
        self.listed = tables.prefix + self.topk * self.key_slots
        self.device_class = device_class or (device_class_of(q.device) if q.is_cuda else "sm_90")
        self.query_token, self.key_token, self.index = (
            None if one is None else packed(one) for one in (tables.query_token, tables.key_token, tables.routes)
        )
        # Triton reads bytes.
        self.key_mask = None if tables.key_mask is None else packed(tables.key_mask).view(torch.uint8)

    def config(self, direction: Direction, region: int) -> Config:
        width = max(self.width, self.value_width)
        biased, rounded = self.tables.bias is not None, self.precision == "tf32"
        return configs.configuration(direction, region, width, self.q.dtype, self.device_class, biased, rounded)

    def widths(self) -> dict[str, Any]:
        return {
            "WIDTH": self.width,
            "VALUE_WIDTH": self.value_width,
            "BLOCK_D": padded_dim(self.width),
            "BLOCK_V": padded_dim(self.value_width),
        }

    def depth(self, kernel: Stepping) -> int | None:
        """The constant DEPTH of a kernel."""
        width, biased = max(self.width, self.value_width), self.tables.bias is not None
        return configs.depth(kernel, width, self.q.dtype, self.device_class, biased, self.precision == "tf32")

    def inputs(self) -> dict[str, Any]:
        """What every kernel takes but the sums'."""
        tables = self.tables
        return {
            **with_strides("q", self.q, "bhnd"),
            **with_strides("k", self.k, "bhnd"),
            **with_strides("v", self.v, "bhnd"),
            **with_strides("key_mask", self.key_mask, "bh"),
            **with_strides("bias", tables.bias, "bhrtc"),
            "scale": tables.scale,
            "heads": self.heads,
            "queries": self.queries,
            "query_slots": self.query_slots,
            "prefix": tables.prefix,
        }

    def cuts(self) -> dict[str, Any]:
        """What kernels take that walk over the list of keys of a block of queries."""
        return {
            **with_strides("query_token", self.query_token, "bh"),
            **with_strides("key_token", self.key_token, "bh"),
            **with_strides("index", self.index, "bh"),
            "key_slots": self.key_slots,
            "topk": self.topk,
        }

    def walk(self, direction: Direction) -> tuple[dict[str, Any], Config]:
        """Constants and configuration of a kernel that makes queries' rows."""
        rows, columns, warps, stages = self.config(direction, self.query_slots)
        columns = min(columns, tile(self.listed))
        gaps = self.tables.padded[1] or self.key_mask is not None
        if gaps or self.key_slots % columns or self.tables.prefix:
            columns = min(columns, LISTED)
        constants = {
            **self.widths(),
            "BLOCK_M": rows,
            "BLOCK_N": columns,
            "GAPS": self.tables.padded[0] or self.query_slots % rows > 0,
            "DIRECT": not (gaps or self.key_slots % columns),
            "PREFIX": self.tables.prefix > 0,
            "PRECISION": self.precision,
        }
        return constants, Config(rows, columns, warps, stages)

    def programs(self, slots: int, rows: int, blocks: int) -> int:
        return -(-slots // rows) * blocks * self.batch * self.heads


def packed(table: Tensor) -> Tensor:
    """A table whose parts for an item and head lie beside each other, (B or 1, heads or 1, ...)."""
    wanted = 1
    for size, step in zip(table.shape[:1:-1], table.stride()[:1:-1], strict=True):
        if size > 1 and step != wanted:
            return table.contiguous()
        wanted *= size
    return table


def tile(slots: int) -> int:
    """The smallest tile that holds some slots, a power of two of at least 16."""
    return max(16, 1 << (slots - 1).bit_length())

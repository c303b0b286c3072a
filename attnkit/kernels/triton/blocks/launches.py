"""Launches of the kernels of blocks: what they are started with, from shapes, strides and dtypes alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnkit.kernels.ops.blocks import BlockTables
from attnkit.kernels.triton.blocks import configs
from attnkit.kernels.triton.blocks.configs import Config, Direction, padded_dim
from attnkit.kernels.triton.blocks.forward import blocks_forward
from attnkit.kernels.triton.blocks.inverse import inverse_of
from attnkit.kernels.triton.blocks.key_gradient import blocks_key_gradient, blocks_key_parts
from attnkit.kernels.triton.blocks.query_gradient import blocks_query_gradient
from attnkit.kernels.triton.blocks.shared_gradient import blocks_bias_gradient, blocks_prefix_gradient
from attnkit.kernels.triton.blocks.window_gradient import blocks_window_gradient
from attnkit.kernels.triton.devices import device_class as device_class_of
from attnkit.kernels.triton.launch import Launch

# Programs that keep a large GPU busy: into so many shares at most is a sum cut that all blocks contribute to.
PROGRAMS = 1024
# Columns at most where they are a list of tokens, of which threads hold as many as there are columns: with 64 of them
# kernels take a third more registers.
LISTED = 32


class Forward(NamedTuple):
    """The launch of the forward pass and what it writes."""

    launch: Launch
    out: Tensor
    total: Tensor
    peak: Tensor


class Backward(NamedTuple):
    """The launches of the backward pass, in order, and what they write.

    Attributes:
        launches: to be run one after another.
        sums: (shares, target): `target` is the sum of `shares` over the first dimension once the launches have run.
        gradients: those of q, k, v and the bias; None for what was not asked for.
    """

    launches: list[Launch]
    sums: list[tuple[Tensor, Tensor]]
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class _Call:
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
        self.query_blocks, self.query_slots = tables.query_token.shape[2:]
        self.key_blocks, self.key_slots = tables.key_token.shape[2:]
        self.topk = 1 if tables.routes is None else tables.routes.shape[3]
        self.queries = tables.query_slot.shape[2]
        self.listed = tables.prefix + self.topk * self.key_slots
        self.device_class = device_class or (device_class_of(q.device) if q.is_cuda else "sm_90")
        self.query_token, self.key_token, self.index = (
            None if one is None else _packed(one) for one in (tables.query_token, tables.key_token, tables.routes)
        )
        # Triton reads bytes.
        self.key_mask = None if tables.key_mask is None else _packed(tables.key_mask).view(torch.uint8)

    def config(self, direction: Direction, region: int) -> Config:
        width = max(self.width, self.value_width)
        biased, rounded = self.tables.bias is not None, precision() == "tf32"
        return configs.configuration(direction, region, width, self.q.dtype, self.device_class, biased, rounded)

    def widths(self) -> dict[str, Any]:
        return {
            "WIDTH": self.width,
            "VALUE_WIDTH": self.value_width,
            "BLOCK_D": padded_dim(self.width),
            "BLOCK_V": padded_dim(self.value_width),
        }

    def inputs(self) -> dict[str, Any]:
        """What every kernel takes but the sums'."""
        tables = self.tables
        return {
            **_with_strides("q", self.q, "bhnd"),
            **_with_strides("k", self.k, "bhnd"),
            **_with_strides("v", self.v, "bhnd"),
            **_with_strides("key_mask", self.key_mask, "bh"),
            **_with_strides("bias", tables.bias, "bhrtc"),
            "scale": tables.scale,
            "heads": self.heads,
            "queries": self.queries,
            "query_slots": self.query_slots,
            "prefix": tables.prefix,
        }

    def cuts(self) -> dict[str, Any]:
        """What kernels take that walk over the list of keys of a block of queries."""
        return {
            **_with_strides("query_token", self.query_token, "bh"),
            **_with_strides("key_token", self.key_token, "bh"),
            **_with_strides("index", self.index, "bh"),
            "key_slots": self.key_slots,
            "topk": self.topk,
        }

    def walk(self, direction: Direction) -> tuple[dict[str, Any], Config]:
        """Constants and configuration of a kernel that makes queries' rows."""
        rows, columns, warps, stages = self.config(direction, self.query_slots)
        columns = min(columns, _tile(self.listed))
        gaps = self.tables.padded[1] or self.key_mask is not None
        if gaps or self.key_slots % columns:
            columns = min(columns, LISTED)
        constants = {
            **self.widths(),
            "BLOCK_M": rows,
            "BLOCK_N": columns,
            "GAPS": self.tables.padded[0] or self.query_slots % rows > 0,
            "DIRECT": not (gaps or self.key_slots % columns),
            "PREFIX": self.tables.prefix > 0,
            "PRECISION": precision(),
        }
        return constants, Config(rows, columns, warps, stages)

    def programs(self, slots: int, rows: int, blocks: int) -> int:
        return -(-slots // rows) * blocks * self.batch * self.heads


def forward_of(q: Tensor, k: Tensor, v: Tensor, tables: BlockTables, device_class: str | None = None) -> Forward:
    """The forward pass of `attnkit::blocks`, with its arguments.

    Args:
        q: queries (B, heads, N, D).
        k: keys (B, heads, N, D).
        v: values (B, heads, N, Dv).
        tables: the operator's other arguments.
        device_class: one of `attnkit.kernels.triton.devices.DEVICE_CLASSES`; that of q's device where not given.
    """
    call = _Call(q, k, v, tables, device_class)
    out = v.new_empty(call.batch, call.queries, call.heads, call.value_width).transpose(1, 2)
    total, peak = (q.new_empty(call.batch, call.heads, call.queries, dtype=torch.float32) for _ in range(2))
    constants, config = call.walk("forward")
    arguments = {
        **call.inputs(),
        **call.cuts(),
        **_with_strides("out", out, "bhnd"),
        "total": total,
        "peak": peak,
        "query_blocks": call.query_blocks,
    }
    grid = (call.programs(call.query_slots, config.rows, call.query_blocks),)
    return Forward(Launch(blocks_forward, grid, arguments, constants, config.warps, config.stages), out, total, peak)


def backward_of(
    grad_out: Tensor | None,
    grad_total: Tensor | None,
    out: Tensor,
    total: Tensor,
    peak: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: BlockTables,
    needs: list[bool],
    device_class: str | None = None,
) -> Backward:
    """The backward pass of `attnkit::blocks`, with the arguments of its operator; see `forward_of`."""
    call = _Call(q, k, v, tables, device_class)
    if grad_out is None:
        grad_out = v.new_zeros(()).expand(out.shape)
    given = {**_with_strides("grad_out", grad_out, "bhnd"), "peak": peak.contiguous()}
    # Without a bias it is 1.
    given["total"] = None if tables.bias is None else total.contiguous()
    given["delta"] = torch.empty_like(given["peak"])
    grad_q = torch.empty_like(q)
    grad_q[:, :, : tables.prefix].zero_()
    answers = {**given, **_with_strides("out", out, "bhnd")}
    sums, grad_bias = [], None
    grad_k, grad_v = torch.empty_like(k), torch.empty_like(v)
    if (launch := _window_gradients(call, answers, grad_total, grad_q, grad_k, grad_v)) is not None:
        launches = [launch]
    else:
        launches = [_query_gradient(call, answers, grad_total, grad_q)]
        if needs[1] or needs[2]:
            launches += _key_gradients(call, given, grad_k, grad_v)
    if tables.prefix and (needs[1] or needs[2]):
        launch, shares = _prefix_gradients(call, given)
        launches.append(launch)
        sums += [(share, one[:, :, : tables.prefix]) for share, one in zip(shares, (grad_k, grad_v), strict=True)]
    if needs[3]:
        assert tables.bias is not None
        grad_bias = torch.empty_like(tables.bias)
        launch, share = _bias_gradient(call, given)
        launches.append(launch)
        sums.append((share, grad_bias))
    found = (grad_q, grad_k, grad_v, grad_bias)
    asked = [one if need else None for one, need in zip(found, needs, strict=True)]
    return Backward(launches, sums, (asked[0], asked[1], asked[2], asked[3]))


def precision() -> str:
    """How float32 numbers are multiplied, as PyTorch is told to: `"tf32"` where that is allowed, else `"ieee"`."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _window_gradients(
    call: _Call, given: dict[str, Any], grad_total: Tensor | None, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
) -> Launch | None:
    """The one launch for all of q, k and v where every block sees itself and fits into a tile; else None."""
    rows, columns = _tile(call.query_slots), _tile(call.key_slots)
    widths = call.widths()
    tokens, width = configs.WINDOW[call.q.dtype.itemsize]
    if call.index is not None or max(rows, columns) > tokens or max(widths["BLOCK_D"], widths["BLOCK_V"]) > width:
        return None
    tables = call.tables
    arguments = {
        **call.inputs(),
        **_with_strides("query_token", call.query_token, "bh"),
        **_with_strides("key_token", call.key_token, "bh"),
        **given,
        **_with_strides("grad_q", grad_q, "bhnd"),
        **_with_strides("grad_k", grad_k, "bhnd"),
        **_with_strides("grad_v", grad_v, "bhnd"),
        **_with_strides("grad_total", grad_total, "bhn"),
        "query_blocks": call.query_blocks,
        "key_slots": call.key_slots,
    }
    constants = {
        **widths,
        "BLOCK_M": rows,
        "BLOCK_N": columns,
        "GAPS": tables.padded[0] or call.query_slots < rows,
        "KEY_GAPS": tables.padded[1] or call.key_slots < columns or call.key_mask is not None,
        "PREFIX": tables.prefix > 0,
        "PRECISION": precision(),
    }
    grid = (call.programs(1, 1, call.query_blocks),)
    # A bias is a tile of registers more, and float32 is multiplied without tensor cores, by operands in registers.
    warps = max(rows, columns) // 16 * (2 if tables.bias is not None and max(rows, columns) > 32 else 1)
    warps = 4 if call.q.dtype.itemsize == 4 else warps
    return Launch(blocks_window_gradient, grid, arguments, constants, warps, 1)


def _query_gradient(call: _Call, given: dict[str, Any], grad_total: Tensor | None, grad_q: Tensor) -> Launch:
    constants, config = call.walk("query_gradient")
    arguments = {
        **call.inputs(),
        **call.cuts(),
        **given,
        **_with_strides("grad_q", grad_q, "bhnd"),
        **_with_strides("grad_total", grad_total, "bhn"),
        "query_blocks": call.query_blocks,
    }
    grid = (call.programs(call.query_slots, config.rows, call.query_blocks),)
    return Launch(blocks_query_gradient, grid, arguments, constants, config.warps, config.stages)


def _key_gradients(call: _Call, given: dict[str, Any], grad_k: Tensor, grad_v: Tensor) -> list[Launch]:
    rows, columns, warps, stages = call.config("key_gradient", call.key_slots)
    tables, heads = call.tables, call.heads
    names = ("entry", "start", "piece_block", "first_piece", "first_part")
    own: dict[str, Any] = {**dict.fromkeys(names), "part_k": None, "part_v": None}
    own |= {"table_b": 0, "table_h": 0, "entries": 0, "pieces": call.key_blocks, "parts": 0, "share": 1}
    inverse = None
    if call.index is None:
        columns = min(columns, _tile(call.query_slots))
    if tables.padded[0] or call.query_slots % columns:
        columns = min(columns, LISTED)
    if call.index is not None:
        # A piece of small blocks fills a tile.
        inverse = inverse_of(call.index, call.key_blocks, -(-columns // call.query_slots))
        own |= {name: getattr(inverse, name) for name in (*names, "pieces", "parts", "share")}
        items, tables_of_item = call.index.shape[:2]
        own["table_b"] = tables_of_item if items > 1 else 0
        own["table_h"] = 1 if tables_of_item > 1 else 0
        own["entries"] = call.query_blocks * call.topk
        room = (call.batch, heads, inverse.parts, call.key_slots)
        own["part_k"] = call.q.new_empty(*room, call.width, dtype=torch.float32)
        own["part_v"] = call.q.new_empty(*room, call.value_width, dtype=torch.float32)
    targets = {
        **_with_strides("grad_k", grad_k, "bhnd"),
        **_with_strides("grad_v", grad_v, "bhnd"),
        **_with_strides("key_token", call.key_token, "bh"),
        "heads": heads,
        "key_blocks": call.key_blocks,
        "key_slots": call.key_slots,
    }
    arguments = {
        **call.inputs(),
        **_with_strides("query_token", call.query_token, "bh"),
        **given,
        **targets,
        **own,
        "topk": call.topk,
    }
    tiles = {**call.widths(), "BLOCK_N": rows}
    constants = {
        **tiles,
        "BLOCK_M": columns,
        "GAPS": tables.padded[1] or call.key_slots % rows > 0 or call.key_mask is not None,
        "DIRECT": not (tables.padded[0] or call.query_slots % columns),
        "PRECISION": precision(),
    }
    grid = (call.programs(call.key_slots, rows, own["pieces"]),)
    launches = [Launch(blocks_key_gradient, grid, arguments, constants, warps, stages)]
    if inverse is not None and inverse.parts > 1:
        taken = ("part_k", "part_v", "start", "first_part", "table_b", "table_h", "parts", "share")
        arguments = {**targets, **{name: own[name] for name in taken}}
        grid = (call.programs(call.key_slots, rows, call.key_blocks),)
        launches.append(Launch(blocks_key_parts, grid, arguments, tiles, warps, 1))
    return launches


def _prefix_gradients(call: _Call, given: dict[str, Any]) -> tuple[Launch, tuple[Tensor, Tensor]]:
    rows, columns, warps, stages = call.config("key_gradient", 1)
    prefix, pairs = call.tables.prefix, call.batch * call.heads
    share = columns * max(256 // columns, -(-call.queries // (64 * columns)))
    shares = -(-call.queries // share)
    room = (shares, call.batch, call.heads, prefix)
    sums = tuple(call.q.new_empty(*room, one, dtype=torch.float32) for one in (call.width, call.value_width))
    arguments = {
        **call.inputs(),
        **given,
        **_with_strides("query_slot", _packed(call.tables.query_slot), "bh"),
        "sum_k": sums[0],
        "sum_v": sums[1],
        "pairs": pairs,
        "share": share,
        "shares": shares,
    }
    constants = {**call.widths(), "BLOCK_M": columns, "BLOCK_N": rows, "PRECISION": precision()}
    grid = (call.programs(prefix, rows, shares),)
    return Launch(blocks_prefix_gradient, grid, arguments, constants, warps, stages), (sums[0], sums[1])


def _bias_gradient(call: _Call, given: dict[str, Any]) -> tuple[Launch, Tensor]:
    bias = call.tables.bias
    assert bias is not None
    constants, config = call.walk("query_gradient")
    for name in ("GAPS", "DIRECT", "PREFIX"):
        del constants[name]
    config = config._replace(columns=min(config.columns, LISTED))
    constants["BLOCK_N"] = config.columns
    items, heads, blocks = bias.shape[:3]
    parts = items * heads * blocks
    shared_heads, shared_blocks = call.heads // heads, call.query_blocks // blocks
    shared = call.batch // max(items, 1) * shared_heads * shared_blocks
    tiles = -(-call.query_slots // config.rows) * -(-call.listed // config.columns)
    share = -(-shared // max(1, min(shared, PROGRAMS // max(tiles * parts, 1))))
    shares = -(-shared // max(share, 1))
    sums = bias.new_empty(shares, *bias.shape, dtype=torch.float32)
    arguments = {
        **call.inputs(),
        **call.cuts(),
        **given,
        "sums": sums,
        "bias_heads": heads,
        "bias_blocks": blocks,
        "rows_of_bias": parts,
        "shared_heads": shared_heads,
        "shared_blocks": shared_blocks,
        "shared": shared,
        "share": share,
    }
    grid = (tiles * parts * shares,)
    return Launch(blocks_bias_gradient, grid, arguments, constants, config.warps, config.stages), sums


def _packed(table: Tensor) -> Tensor:
    """A table whose parts for an item and head lie beside each other, (B or 1, heads or 1, ...)."""
    beside = table[0, 0].is_contiguous() if table.shape[0] else True
    return table if beside else table.contiguous()


def _with_strides(name: str, tensor: Tensor | None, axes: str) -> dict[str, Any]:
    """A tensor and its first strides, 0 where it broadcasts."""
    found: dict[str, Any] = {name: tensor}
    for axis, letter in enumerate(axes):
        found[f"{name}_{letter}"] = 0 if tensor is None or tensor.shape[axis] == 1 else tensor.stride(axis)
    return found


def _tile(slots: int) -> int:
    """The smallest tile that holds some slots, a power of two of at least 16."""
    return max(16, 1 << (slots - 1).bit_length())

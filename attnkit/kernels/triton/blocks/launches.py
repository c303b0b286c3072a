"""Launches of the kernels of blocks: what they are started with, from shapes, strides and dtypes alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnkit.kernels.ops.blocks import BlockTables, output_of
from attnkit.kernels.triton.blocks import configs
from attnkit.kernels.triton.blocks.forward import blocks_forward
from attnkit.kernels.triton.blocks.inverse import inverse_of
from attnkit.kernels.triton.blocks.key_gradient import blocks_key_gradient, blocks_key_parts
from attnkit.kernels.triton.blocks.operands import LISTED, Call, packed, tile
from attnkit.kernels.triton.blocks.query_gradient import blocks_query_gradient
from attnkit.kernels.triton.blocks.shared_gradient import blocks_bias_gradient, blocks_prefix_gradient
from attnkit.kernels.triton.blocks.window_gradient import blocks_window_gradient
from attnkit.kernels.triton.launch import Launch, with_strides

# Programs that keep a large GPU busy: into so many shares at most is a sum cut that all blocks contribute to.
PROGRAMS = 1024


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


def forward_of(q: Tensor, k: Tensor, v: Tensor, tables: BlockTables, device_class: str | None = None) -> Forward:
    """The forward pass of `attnkit::blocks`, with its arguments.

    Args:
        q: queries (B, heads, N, D).
        k: keys (B, heads, N, D).
        v: values (B, heads, N, Dv).
        tables: the operator's other arguments.
        device_class: one of `attnkit.kernels.triton.devices.DEVICE_CLASSES`; that of q's device where not given.
    """
    call = Call(q, k, v, tables, device_class)
    out, rows = output_of(v, tables)
    total, peak = (q.new_empty(call.batch, call.heads, call.queries, dtype=torch.float32) for _ in range(2))
    constants, config = call.walk("forward")
    arguments = {
        **call.inputs(),
        **call.cuts(),
        **with_strides("out", rows, "bhnd"),
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
    """The backward pass of `attnkit::blocks`, with the arguments of its operator; see `forward_of`.

    `out`, its gradient and `needs` are those of the image's queries, without `first`.
    """
    call = Call(q, k, v, tables, device_class)
    if grad_out is None:
        grad_out = v.new_zeros(()).expand(out.shape)
    given = {**with_strides("grad_out", grad_out, "bhnd"), "peak": peak.contiguous()}
    # Without a bias it is 1.
    given["total"] = None if tables.bias is None else total.contiguous()
    given["delta"] = torch.empty_like(given["peak"])
    grad_q = torch.empty_like(q)
    grad_q[:, :, : tables.prefix].zero_()
    answers = {**given, **with_strides("out", out, "bhnd")}
    sums, grad_bias = [], None
    grad_k, grad_v = torch.empty_like(k), torch.empty_like(v)
    if (launch := _window_gradients(call, answers, grad_total, grad_q, grad_k, grad_v)) is not None:
        launches = [launch]
    else:
        if needs[0]:
            launches = [_query_gradient(call, answers, grad_total, grad_q)]
        else:
            launches, given["delta"] = [], _delta(grad_out, grad_total, out, total, peak)
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


def _window_gradients(
    call: Call, given: dict[str, Any], grad_total: Tensor | None, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
) -> Launch | None:
    """The one launch for all of q, k and v where every block sees itself and fits into a tile; else None."""
    rows, columns = tile(call.query_slots), tile(call.key_slots)
    widths = call.widths()
    tokens, width = configs.WINDOW[call.q.dtype.itemsize]
    if call.index is not None or max(rows, columns) > tokens or max(widths["BLOCK_D"], widths["BLOCK_V"]) > width:
        return None
    tables = call.tables
    arguments = {
        **call.inputs(),
        **with_strides("query_token", call.query_token, "bh"),
        **with_strides("key_token", call.key_token, "bh"),
        **given,
        **with_strides("grad_q", grad_q, "bhnd"),
        **with_strides("grad_k", grad_k, "bhnd"),
        **with_strides("grad_v", grad_v, "bhnd"),
        **with_strides("grad_total", grad_total, "bhn"),
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
        "PRECISION": call.precision,
    }
    grid = (call.programs(1, 1, call.query_blocks),)
    # Rows narrower than their tiles take masks, a bias is a tile of registers more, and float32 is multiplied without
    # tensor cores, by operands in registers.
    narrow = call.width < widths["BLOCK_D"] or call.value_width < widths["BLOCK_V"]
    crowded = narrow or (tables.bias is not None and max(rows, columns) > 32)
    warps = max(rows, columns) // 16 * (2 if crowded else 1)
    warps = 4 if call.q.dtype.itemsize == 4 else warps
    return Launch(blocks_window_gradient, grid, arguments, constants, warps, 1)


def _query_gradient(call: Call, given: dict[str, Any], grad_total: Tensor | None, grad_q: Tensor) -> Launch:
    constants, config = call.walk("query_gradient")
    constants["DEPTH"] = call.depth("query_gradient")
    arguments = {
        **call.inputs(),
        **call.cuts(),
        **given,
        **with_strides("grad_q", grad_q, "bhnd"),
        **with_strides("grad_total", grad_total, "bhn"),
        "query_blocks": call.query_blocks,
    }
    grid = (call.programs(call.query_slots, config.rows, call.query_blocks),)
    return Launch(blocks_query_gradient, grid, arguments, constants, config.warps, config.stages)


def _delta(grad_out: Tensor, grad_total: Tensor | None, out: Tensor, total: Tensor, peak: Tensor) -> Tensor:
    """What the kernel of the queries' gradient makes for the others, where that gradient is not asked for."""
    found = (grad_out.float() * out.float()).sum(3)
    if grad_total is not None:
        found = found - (grad_total * total).masked_fill(peak == -torch.inf, 0.0)
    return found.contiguous()


def _key_gradients(call: Call, given: dict[str, Any], grad_k: Tensor, grad_v: Tensor) -> list[Launch]:
    rows, columns, warps, stages = call.config("key_gradient", call.key_slots)
    tables, heads = call.tables, call.heads
    names = ("entry", "start", "piece_block")
    own: dict[str, Any] = {**dict.fromkeys(names), "part_k": None, "part_v": None}
    own |= {"table_b": 0, "table_h": 0, "entries": 0, "pieces": call.key_blocks, "parts": 0, "share": 1}
    inverse = None
    if call.index is None:
        columns = min(columns, tile(call.query_slots))
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
        **with_strides("grad_k", grad_k, "bhnd"),
        **with_strides("grad_v", grad_v, "bhnd"),
        **with_strides("key_token", call.key_token, "bh"),
        "heads": heads,
        "key_blocks": call.key_blocks,
        "key_slots": call.key_slots,
    }
    arguments = {
        **call.inputs(),
        **with_strides("query_token", call.query_token, "bh"),
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
        "DEPTH": call.depth("key_gradient"),
        "PRECISION": call.precision,
    }
    grid = (call.programs(call.key_slots, rows, own["pieces"]),)
    launches = [Launch(blocks_key_gradient, grid, arguments, constants, warps, stages)]
    if inverse is not None and inverse.parts > 1:
        taken = ("part_k", "part_v", "start", "table_b", "table_h", "parts", "share")
        arguments = {**targets, **{name: own[name] for name in taken}}
        grid = (call.programs(call.key_slots, rows, call.key_blocks),)
        launches.append(Launch(blocks_key_parts, grid, arguments, tiles, warps, 1))
    return launches


def _prefix_gradients(call: Call, given: dict[str, Any]) -> tuple[Launch, tuple[Tensor, Tensor]]:
    rows, columns, warps, stages = call.config("key_gradient", 1)
    prefix, pairs = call.tables.prefix, call.batch * call.heads
    share = columns * max(256 // columns, -(-call.queries // (64 * columns)))
    shares = -(-call.queries // share)
    room = (shares, call.batch, call.heads, prefix)
    sums = tuple(call.q.new_empty(*room, one, dtype=torch.float32) for one in (call.width, call.value_width))
    arguments = {
        **call.inputs(),
        **given,
        **with_strides("query_slot", packed(call.tables.query_slot), "bh"),
        "sum_k": sums[0],
        "sum_v": sums[1],
        "pairs": pairs,
        "share": share,
        "shares": shares,
    }
    constants = {**call.widths(), "BLOCK_M": columns, "BLOCK_N": rows, "PRECISION": call.precision}
    grid = (call.programs(prefix, rows, shares),)
    return Launch(blocks_prefix_gradient, grid, arguments, constants, warps, stages), (sums[0], sums[1])


def _bias_gradient(call: Call, given: dict[str, Any]) -> tuple[Launch, Tensor]:
    bias = call.tables.bias
    assert bias is not None
    constants, config = call.walk("query_gradient")
    for name in ("GAPS", "DIRECT", "PREFIX"):
        del constants[name]
    config = config._replace(columns=min(config.columns, LISTED))
    constants["BLOCK_N"] = config.columns
    constants["DEPTH"] = call.depth("bias_gradient")
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

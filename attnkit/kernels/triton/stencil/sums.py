"""Launches of the kernels that sum over queries, for queries of both kinds: deltas, prefix tokens, bias and gain."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from attnkit.kernels.triton.launch import Launch, with_strides
from attnkit.kernels.triton.stencil.call import Call, numbered, power_of_two
from attnkit.kernels.triton.stencil.configs import AXES, padded_dim
from attnkit.kernels.triton.stencil.key_gradient import stencil_prefix_gradient
from attnkit.kernels.triton.stencil.pair_gradient import stencil_pair_gradient
from attnkit.kernels.triton.stencil.shared_gradient import stencil_delta
from attnkit.kernels.triton.stencil.table_gradient import stencil_table_gradient

# Numbers that a program sums over at once, and those of them that are one token's, of heads beside each other; tokens.
NUMBERS, SUMMED, ROWS = 4096, 64, 64
# Warps that sum tokens of several heads. For Blackwell, NVIDIA's assembler would put registers of four of them aside.
SUMMING, SUMMING_ON = 4, {"sm_100": 8}
# Queries and prefix tokens of a tile, and of one whose rows have more than 64 numbers of float32.
PREFIXED, PREFIXED_WIDE = (32, 16), (16, 16)

# Launches, and what is to be called in order once they have run.
Found: TypeAlias = "tuple[list[Launch], list[Callable[[], Any]]]"


def delta_of(call: Call, given: dict[str, Any], grad_total: Tensor | None, out: Tensor) -> Launch:
    heads = call.heads_of(SUMMED)
    arguments = {
        "delta": given["delta"],
        **{name: one for name, one in given.items() if name.startswith("grad_out")},
        **with_strides("grad_total", grad_total, "bhn"),
        **with_strides("out", out, "bhnd"),
        "total": given["total"],
        "heads": call.heads,
        "queries": call.queries,
    }
    rows = _rows(heads["BLOCK_H"] * heads["BLOCK_V"])
    constants = {"VALUE_WIDTH": call.value_width, **heads, "BLOCK_M": rows}
    grid = (-(-call.queries // rows) * -(-call.heads // heads["BLOCK_H"]) * call.batch,)
    return Launch(stencil_delta, grid, arguments, constants, _summing(call), 1)


def _summing(call: Call) -> int:
    return SUMMING_ON.get(call.device_class, SUMMING)


def _rows(numbers: int) -> int:
    """Queries of a tile whose heads have so many numbers, a power of two."""
    return max(1, min(NUMBERS // numbers, ROWS))


def prefix_gradient(
    call: Call, given: dict[str, Any], grad_k: Tensor, grad_v: Tensor, q: Tensor, k: Tensor, scale: float
) -> tuple[Launch, Callable[[], Any]]:
    """What all queries give to the prefix, and what adds their shares up."""
    prefix, width = call.windows.prefix, k.shape[3]
    wide = any(one.shape[3] > 64 and one.dtype == torch.float32 for one in (k, call.v))
    rows, columns = PREFIXED_WIDE if wide else PREFIXED
    tiles = -(-prefix // columns)
    shares, share = call.shares_of(call.batch * call.heads * tiles, rows)
    room = (shares, call.batch, call.heads, prefix)
    sum_k, sum_v = (call.v.new_empty(*room, one, dtype=torch.float32) for one in (width, call.value_width))
    arguments = {
        "sum_k": sum_k,
        "sum_v": sum_v,
        **given,
        **with_strides("q", q, "bhnd"),
        **with_strides("k", k, "bhnd"),
        **with_strides("v", call.v, "bhnd"),
        **call.tables(),
        "scale": scale,
        "batch": call.batch,
        "heads": call.heads,
        "prefix": prefix,
        **numbered("queries", call.query_sizes),
        "share": share,
        "shares": shares,
    }
    constants = {
        **call.widths(),
        "WIDTH": width,
        "BLOCK_D": padded_dim(width),
        "BLOCK_M": rows,
        "BLOCK_N": columns,
        "PRECISION": call.precision,
    }
    grid = (tiles * shares * call.batch * call.heads,)

    def add_up() -> None:
        grad_k[:, :, :prefix].copy_(sum_k.sum(0))
        grad_v[:, :, :prefix].copy_(sum_v.sum(0))

    # AMD's warps have twice as many threads.
    warps = 4 if max(width, call.value_width) <= 64 or call.device_class == "gfx942" else 8
    # Without tensor cores a thread has whole rows in registers, unless they come through shared memory, as they do
    # where loads of several tiles are under way.
    stages = 2 if wide and call.precision == "ieee" else 1
    return Launch(stencil_prefix_gradient, grid, arguments, constants, warps, stages), add_up


def table_gradients(call: Call, given: dict[str, Any], gradients: list[Tensor | None]) -> Found:
    """Gradients of bias and gain."""
    names, varying = ("bias", "gain"), call.varying()
    launches, after = [], []
    tables: dict[str, Tensor] = {}
    for name, target in zip(names, gradients, strict=True):
        if target is None:
            continue
        if not varying[f"{name.upper()}_VARIES"]:
            tables[name] = target
            continue
        launch, found = _pair_gradient(call, given, name, target)
        launches.append(launch)
        after.append(partial(_fill, target, found))
    if tables:
        launch, sums = _table_gradient(call, given, list(tables))
        launches.append(launch)
        after += [partial(_fill, target, sums[name]) for name, target in tables.items()]
    return launches, after


def _fill(target: Tensor, found: Tensor) -> None:
    """Adds up shares (shares, B, heads, places, ...), and what the target broadcasts over."""
    found = found.sum(0)
    if found.ndim < target.ndim:
        found = found[(..., *(None,) * (target.ndim - found.ndim))]
    target.copy_(found.sum_to_size(target.shape))


def _at_places(call: Call) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and constants of kernels that take queries place by place."""
    width, value_width = call.width, call.value_width
    constants = {
        "WIDTH": width,
        "VALUE_WIDTH": value_width,
        "BLOCK_D": power_of_two(width),
        "BLOCK_V": power_of_two(value_width),
        **call.varying(),
        "PREFIX": call.windows.prefix > 0,
        "CLAMPED": call.windows.clamped,
    }
    return call.inputs(), constants


def _table_gradient(call: Call, given: dict[str, Any], names: list[str]) -> tuple[Launch, dict[str, Tensor]]:
    inputs, constants = _at_places(call)
    heads = call.heads_of(SUMMED)["BLOCK_H"]
    rows = _rows(heads * max(constants["BLOCK_D"], constants["BLOCK_V"]))
    places = call.windows.prefix + math.prod(call.kernels)
    groups = -(-call.heads // heads)
    shares, share = call.shares_of(places * groups * call.batch, rows)
    sums = {name: call.v.new_empty(shares, call.batch, call.heads, places, dtype=torch.float32) for name in names}
    arguments = {
        "sum_bias": sums.get("bias"),
        "sum_gain": sums.get("gain"),
        **given,
        **inputs,
        "batch": call.batch,
        "share": share,
        "shares": shares,
    }
    grid = (places * shares * groups * call.batch,)
    constants |= {"BLOCK_M": rows, "BLOCK_H": heads}
    return Launch(stencil_table_gradient, grid, arguments, constants, _summing(call), 1), sums


def _pair_gradient(call: Call, given: dict[str, Any], name: str, target: Tensor) -> tuple[Launch, Tensor]:
    inputs, constants = _at_places(call)
    rows = _rows(max(constants["BLOCK_D"], constants["BLOCK_V"]))
    places = call.windows.prefix + math.prod(call.kernels)
    items, heads = target.shape[:2]
    found = call.v.new_empty(1, items, heads, places, *call.query_sizes[AXES + 3 - target.ndim :], dtype=torch.float32)
    arguments = {
        "grad_bias": found if name == "bias" else None,
        "grad_gain": found if name == "gain" else None,
        **given,
        **inputs,
        "own_items": items,
        "own_heads": heads,
        "shared_items": call.batch // max(items, 1),
        "shared_heads": call.heads // heads,
    }
    grid = (-(-call.queries // rows) * places * items * heads,)
    return Launch(stencil_pair_gradient, grid, arguments, {**constants, "BLOCK_M": rows}, 4, 1), found

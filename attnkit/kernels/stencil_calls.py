"""Calls of the operators of stencils: what every backend does that has kernels for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from attnkit.kernels.call import AttendCall, AttendResult, PairValues
from attnkit.kernels.softmax import global_rows, visible_values
from attnkit.kernels.transforms import transforming
from attnkit.layouts import RelativeTable, Stencil
from attnkit.layouts.cache import cached, device_key


def computed_by_stencil(call: AttendCall, compute: Callable[..., Any]) -> AttendResult:
    """Computes a call under `Stencil`: the operator's rows, and those of prefix queries before them.

    Args:
        call: the call.
        compute: `STENCIL.op`, or what takes its arguments.
    """
    layout = cast("Stencil", call.layout)
    seen = seen_by_some(layout, call.q.device)
    # Kernels multiply whole boxes of keys, with weights of 0 where windows leave holes: NaN there would spread.
    k, v = visible_values(call if seen is None else call.replace(layout=layout.restrict(seen)))
    image = _image(call.replace(k=k, v=v), layout, compute)
    prefix = call.layout.global_queries
    if not prefix:
        return image
    row = global_rows(call, prefix)
    lse = None if image.lse is None or row.lse is None else torch.cat([row.lse, image.lse], dim=2)
    return AttendResult(torch.cat([row.out, image.out], dim=2), lse)


def seen_by_some(layout: Stencil, device: torch.device) -> Tensor | None:
    """Which keys any query sees, but for the layout's key mask: bool (Nk,), or None where that is all of them.

    In a graph it may be a mask of all keys: whether windows leave holes would tie the graph to its sizes.
    """
    # Up to half a window and one token, steps leave no hole, whatever the grid's sizes.
    steps = zip(layout.kernels, layout.strides, layout.dilations, strict=True)
    if layout.grid.prefix or all(step == 1 or (apart == 1 and step - 1 <= size // 2) for size, step, apart in steps):
        return None
    clamped = layout.border == "clamp"
    if not torch.compiler.is_compiling():
        axes = zip(layout.grid.sizes, layout.kernels, layout.strides, layout.dilations, strict=True)
        if not any(_leaves_holes(*axis, clamped) for axis in axes):
            return None

    def make() -> tuple[Tensor]:
        seen = torch.ones(1, dtype=torch.bool, device=device)
        for axis, size in enumerate(layout.grid.sizes):
            taps = layout.axis_taps(axis, device).flatten()
            taps = torch.where((taps >= 0) & (taps < size), taps, size)
            along = torch.zeros(size + 1, dtype=torch.bool, device=device).index_fill(0, taps, True)[:size]
            seen = (seen[:, None] & along).flatten()
        return (seen,)

    return cached(("seen by some", layout.own_form(), device_key(device)), make)[0]


@lru_cache(maxsize=1024)
def _leaves_holes(size: int, kernel: int, stride: int, dilation: int, clamped: bool) -> bool:
    """Whether some key along an axis lies in no query's window."""
    seen: set[int] = set()
    for centre in range(0, size, stride):
        first = centre - kernel // 2 * dilation
        if clamped:
            # As in `Stencil.axis_taps`: windows move among the tokens of equal remainder.
            length = -(-(size - centre % dilation) // dilation)
            first = max(min(centre // dilation - kernel // 2, length - kernel), 0) * dilation + centre % dilation
        seen.update(range(first, first + kernel * dilation, dilation))
    return not seen.issuperset(range(size))


def _image(call: AttendCall, layout: Stencil, compute: Callable[..., Any]) -> AttendResult:
    """Attention of the image's queries, without the prefix.

    Args:
        call: a call whose keys and values are finite also where `layout` masks them.
        layout: its layout.
        compute: as above.
    """
    clamped = layout.border == "clamp"
    if not clamped:
        # Places that lie outside the grid for every query are left out.
        reach = [(size - 1) // step for size, step in zip(layout.grid.sizes, layout.dilations, strict=True)]
        kernel = tuple(min(size, 2 * far + 1) for size, far in zip(layout.kernels, reach, strict=True))
        layout = replace(layout, kernel=kernel)
    bias, gain = (_by_place(call, layout, values) for values in (call.bias, call.gain))
    first = layout.global_queries
    q = call.q[:, :, first : first + 1] if _shared(call) else call.q[:, :, first:]
    window = (layout.grid.sizes, layout.grid.prefix, layout.kernels, layout.strides, layout.dilations, clamped)
    out, total, peak = compute(q, call.k, call.v, bias, gain, layout.key_mask, *window, float(call.scale))
    return AttendResult(out.to(call.v.dtype), total.log() + peak if call.return_lse else None)


def _shared(call: AttendCall) -> bool:
    """Whether all queries are one, repeated without a copy, as learned queries are.

    Not where q has a gradient: each of its rows must get its own, even if whoever made q adds them up.
    """
    tracked = torch.is_grad_enabled() and (call.q.requires_grad or transforming())
    return call.q.stride(2) == 0 and not tracked


def _by_place(call: AttendCall, layout: Stencil, values: PairValues | None) -> Tensor | None:
    """Bias or gain by place: (B or 1, heads or 1, places, *query sizes or 1s)."""
    if values is None:
        return None
    grid = layout.grid
    centred = layout.border == "mask"
    if centred and isinstance(values, RelativeTable) and values.fits(grid, layout.strides):
        near = values.window(layout.kernels, layout.dilations)
        first = near.new_full((near.shape[0], grid.prefix), values.fill)
        return torch.cat([first, near], dim=1)[(None, ..., *(None,) * grid.ndim)]
    taps = layout.taps(call.q.device)
    shared = torch.arange(grid.prefix, device=taps.device).expand(taps.shape[0], -1)
    keys = torch.cat([shared, taps], dim=1)[None, None]
    queries = torch.arange(grid.prefix, layout.num_queries, device=taps.device)[None, None, :, None]
    found = call.pairs_at(values, queries, keys)
    assert found is not None
    return found.transpose(2, 3).unflatten(3, layout.query_grid.sizes)

"""Stencils whose border is masked: the call of the operator, and which of the kernels computes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from attnkit.kernels.call import AttendCall, AttendResult, PairValues
from attnkit.kernels.chunked import stencil_convolved, stencil_shifted
from attnkit.kernels.chunked.family import Family
from attnkit.kernels.costs import Work, pairs, share
from attnkit.kernels.ops.registering import exporting
from attnkit.kernels.ops.stencil import STENCIL
from attnkit.kernels.softmax import global_rows, visible_values
from attnkit.kernels.transforms import transforming
from attnkit.layouts import RelativeTable, Stencil


def _why_not(call: AttendCall) -> tuple[str, ...]:
    if cast("Stencil", call.layout).border == "mask":
        return ()
    return ("a stencil with border='clamp' has windows that are not centred; gather fetches their keys",)


def _work(call: AttendCall) -> Work:
    # Keys one number wide are those of learned queries; strides may not be looked at here.
    convolved = call.q.shape[3] == 1 and call.q.device.type == "cpu"
    slots = call.layout.key_slots
    return Work(
        "chunked convolution" if convolved else "chunked shifts", {**pairs(call, slots), "places": share(call) * slots}
    )


def _run(call: AttendCall) -> AttendResult:
    k, v = visible_values(call)
    image = _image(call.replace(k=k, v=v), cast("Stencil", call.layout))
    prefix = call.layout.global_queries
    if not prefix:
        return image
    row = global_rows(call, prefix)
    lse = None if image.lse is None or row.lse is None else torch.cat([row.lse, image.lse], dim=2)
    return AttendResult(torch.cat([row.out, image.out], dim=2), lse)


STENCILS = Family(_why_not, _work, _run)


def _image(call: AttendCall, layout: Stencil) -> AttendResult:
    """Attention of the image's queries, without the prefix.

    Args:
        call: a call whose keys and values are finite also where `layout` masks them.
        layout: its layout.
    """
    # Places that lie outside the grid for every query are left out.
    reach = [(size - 1) // step for size, step in zip(layout.grid.sizes, layout.dilations, strict=True)]
    kernel = tuple(min(size, 2 * far + 1) for size, far in zip(layout.kernels, reach, strict=True))
    layout = replace(layout, kernel=kernel)
    bias, gain = (_by_place(call, layout, values) for values in (call.bias, call.gain))
    first = layout.global_queries
    q = call.q[:, :, first : first + 1] if _shared(call) else call.q[:, :, first:]
    window = (layout.grid.sizes, layout.grid.prefix, layout.kernels, layout.strides, layout.dilations)
    compute = stencil_shifted.forward if exporting() else STENCIL.op
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
    if isinstance(values, RelativeTable) and values.fits(grid, layout.strides):
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


def _convolved(given: Sequence[Any]) -> stencil_convolved.Windows | None:
    """The convolutions of `attnkit::stencil`'s arguments, or None where they are none or would not be exact."""
    q, _, v, bias, gain, _, sizes = given[:7]
    by_place = all(one is None or (one.shape[0] == 1 and one[0, 0, 0].numel() == 1) for one in (bias, gain))
    if q.shape[2] > 1 or len(sizes) > 2 or v.device.type != "cpu" or not v.numel() or not by_place:
        return None
    windows = stencil_convolved.Windows(*given)
    return windows if windows.fits else None


def _forward(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    windows = _convolved(given)
    return stencil_shifted.forward(*given) if windows is None else stencil_convolved.forward(windows)


def _backward(*given: Any) -> list[Tensor]:
    arguments, needs = given[6:-1], given[-1]
    q, k, v, bias, gain = arguments[:5]
    windows = _convolved(arguments)
    if windows is None:
        found = stencil_shifted.backward(*given)
    else:
        grad_out, grad_total, _, out, total = given[:5]
        found = stencil_convolved.backward(windows, grad_out, grad_total, out, total, q, k, arguments[-1], needs)
    return [_like(one, grad) for one, grad, need in zip((q, k, v, bias, gain), found, needs, strict=True) if need]


def _like(one: Tensor, grad: Tensor | None) -> Tensor:
    """A gradient in the dtype and strides of what it belongs to, added up over what that is repeated along."""
    assert grad is not None
    if grad.ndim == 2:
        # Of a table: (heads, places).
        grad = grad[(None, ..., *(None,) * (one.ndim - 3))]
    empty = torch.empty_like(one)
    if (grad.shape, grad.dtype, grad.stride()) == (empty.shape, empty.dtype, empty.stride()):
        return grad
    return empty.copy_(grad.sum_to_size(one.shape))


STENCIL.kernels("CompositeExplicitAutograd", _forward, _backward)

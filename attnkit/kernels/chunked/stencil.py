"""Stencils: which of the kernels computes a call of the operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from attnkit.kernels.call import AttendCall, AttendResult
from attnkit.kernels.chunked import stencil_convolved, stencil_shifted, stencil_tiles
from attnkit.kernels.chunked.family import Family
from attnkit.kernels.chunked.stencil_halos import extent
from attnkit.kernels.costs import Work, measured, pairs, share
from attnkit.kernels.ops.registering import exporting
from attnkit.kernels.ops.stencil import STENCIL
from attnkit.kernels.stencil_calls import computed_by_stencil
from attnkit.layouts import Stencil


def _why_not(call: AttendCall) -> tuple[str, ...]:
    device = call.q.device
    if device.type == "cuda":
        return (f"q lies on {device}, where the operators of stencils are the triton backend's",)
    if cast("Stencil", call.layout).border == "mask":
        return ()
    reasons = []
    if not measured(device):
        reasons.append(f"q lies on {device}, and its kernels for border='clamp' are for the CPU")
    if exporting():
        reasons.append("torch.export writes PyTorch's own operators, so that what it writes needs no attnkit")
    return tuple(reasons)


def _work(call: AttendCall) -> Work:
    layout, on_cpu = cast("Stencil", call.layout), measured(call.q.device)
    # Keys one number wide are those of learned queries; strides may not be looked at here.
    learned = call.q.shape[3] == 1
    if on_cpu and (layout.border == "clamp" or not learned):
        tiles, keys = extent(layout)
        heads, width = call.q.shape[1], call.k.shape[3] + call.v.shape[3]
        problems = float(heads * tiles)
        counts = pairs(call, layout.global_keys + keys)
        return Work("chunked tiles", {**counts, "problems": problems, "moved": problems * keys * width})
    counts = pairs(call, layout.key_slots)
    name = "chunked convolution" if on_cpu and learned else "chunked shifts"
    return Work(name, {**counts, "places": share(call) * layout.key_slots})


def _run(call: AttendCall) -> AttendResult:
    return computed_by_stencil(call, stencil_shifted.forward if exporting() else STENCIL.op)


STENCILS = Family(_why_not, _work, _run)


def _convolved(given: Sequence[Any]) -> stencil_convolved.Windows | None:
    """The convolutions of `attnkit::stencil`'s arguments, or None where they are none or would not be exact."""
    q, _, v, bias, gain, _, sizes = given[:7]
    clamped = given[-2]
    by_place = all(one is None or (one.shape[0] == 1 and one[0, 0, 0].numel() == 1) for one in (bias, gain))
    if q.shape[2] > 1 or clamped or len(sizes) > 2 or v.device.type != "cpu" or not v.numel() or not by_place:
        return None
    windows = stencil_convolved.Windows(*given)
    return windows if windows.fits else None


def _tiled(given: Sequence[Any]) -> bool:
    """Whether queries are taken in tiles: where each has numbers of its own, and where windows are moved inside."""
    q, v, clamped = given[0], given[2], given[-2]
    return v.device.type == "cpu" and v.numel() > 0 and (q.shape[2] > 1 or clamped)


def _forward(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    if _tiled(given):
        return stencil_tiles.forward(*given)
    windows = _convolved(given)
    return stencil_shifted.forward(*given) if windows is None else stencil_convolved.forward(windows)


def _backward(*given: Any) -> list[Tensor]:
    arguments, needs = given[6:-1], given[-1]
    q, k, v, bias, gain = arguments[:5]
    found: list[Tensor | None]
    if _tiled(arguments):
        found = stencil_tiles.backward(*given)
    elif (windows := _convolved(arguments)) is None:
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

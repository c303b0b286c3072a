"""Launches of the kernels of stencils: what they are started with, from shapes, strides and dtypes alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnkit.kernels.triton.launch import Launch, with_strides
from attnkit.kernels.triton.stencil.call import Call, Windows, numbered, tiles_of
from attnkit.kernels.triton.stencil.forward import stencil_forward
from attnkit.kernels.triton.stencil.key_gradient import stencil_key_gradient
from attnkit.kernels.triton.stencil.learned_forward import learned_forward
from attnkit.kernels.triton.stencil.learned_gradient import learned_gradient
from attnkit.kernels.triton.stencil.query_gradient import stencil_query_gradient
from attnkit.kernels.triton.stencil.sums import Found, delta_of, prefix_gradient, table_gradients


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
        after: to be called in order once they have run; they fill gradients from sums that the launches left.
        gradients: those of q, k, v, bias and gain; None for what was not asked for.
    """

    launches: list[Launch]
    after: list[Callable[[], Any]]
    gradients: list[Tensor | None]


def forward_of(q: Tensor, k: Tensor, v: Tensor, windows: Windows, device_class: str | None = None) -> Forward:
    """The forward pass of `attnkit::stencil`, with its arguments.

    Args:
        q: queries (B, heads, N, D) or (B, heads, 1, D).
        k: keys (B, heads, Nk, D).
        v: values (B, heads, Nk, Dv).
        windows: the operator's other arguments.
        device_class: one of `attnkit.kernels.triton.devices.DEVICE_CLASSES`; that of q's device where not given.
    """
    call = Call(q, k, v, windows, device_class)
    out = v.new_empty(call.batch, call.queries, call.heads, call.value_width).transpose(1, 2)
    total, peak = (v.new_empty(call.batch, call.heads, call.queries, dtype=torch.float32) for _ in range(2))
    make = _learned_forward if call.learned else _forward
    return Forward(make(call, {**with_strides("out", out, "bhnd"), "total": total, "peak": peak}), out, total, peak)


def backward_of(
    grad_out: Tensor | None,
    grad_total: Tensor | None,
    out: Tensor,
    total: Tensor,
    peak: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: Windows,
    needs: Sequence[bool],
    device_class: str | None = None,
) -> Backward:
    """The backward pass of `attnkit::stencil`, with the arguments of its operator; see `forward_of`."""
    call = Call(q, k, v, windows, device_class)
    if grad_out is None:
        grad_out = v.new_zeros(()).expand(out.shape)
    delta = torch.empty_like(total)
    given = {"delta": delta, **with_strides("grad_out", grad_out, "bhnd"), "total": total, "peak": peak}
    launches, after = [delta_of(call, given, grad_total, out)], []
    gradients = [
        torch.empty_like(one) if need and one is not None else None
        for one, need in zip((q, k, v, windows.bias, windows.gain), needs, strict=True)
    ]
    pairs = _learned_gradients if call.learned else _gradients
    found = pairs(call, given, gradients)
    launches += found[0]
    after += found[1]
    found = table_gradients(call, given, gradients[3:])
    return Backward([*launches, *found[0]], [*after, *found[1]], gradients)


def _forward(call: Call, answers: dict[str, Any]) -> Launch:
    config = call.config("forward")
    patch = call.patch(config.rows)
    # Of each class; there are as many as steps.
    lengths = [-(-size // step) for size, step in zip(call.query_sizes, call.steps, strict=True)]
    tiles = tiles_of(lengths, patch)
    arguments = {
        **answers,
        **call.inputs(),
        **numbered("step", call.steps),
        **numbered("tiles", tiles),
    }
    constants = {
        **call.widths(),
        **patch,
        "BLOCK_N": config.columns,
        "AXES": call.axes,
        "CLAMPED": call.windows.clamped,
        "PREFIX": call.windows.prefix > 0,
        "PRECISION": call.precision,
    }
    grid = (math.prod(tiles) * math.prod(call.steps) * call.batch * call.heads,)
    return Launch(stencil_forward, grid, arguments, constants, config.warps, config.stages)


def _learned_forward(call: Call, answers: dict[str, Any]) -> Launch:
    config = call.config("learned_forward")
    patch, heads = call.patch(config.rows), call.heads_of(config.columns)
    tiles = tiles_of(call.query_sizes, patch)
    q, k, scale = call.scored()
    arguments = {
        **with_strides("q", q, "bh"),
        **with_strides("k", k, "bhn"),
        **with_strides("v", call.v, "bhnd"),
        **answers,
        **call.tables(),
        "scale": scale,
        **call.grid(),
        **numbered("tiles", tiles),
    }
    constants = {
        "VALUE_WIDTH": call.value_width,
        **patch,
        **heads,
        **call.varying(),
        "PREFIX": call.windows.prefix > 0,
    }
    grid = (math.prod(tiles) * -(-call.heads // heads["BLOCK_H"]) * call.batch,)
    return Launch(learned_forward, grid, arguments, constants, config.warps, config.stages)


def _gradients(call: Call, given: dict[str, Any], gradients: list[Tensor | None]) -> Found:
    """Gradients of q, k and v where every place has its query."""
    launches, after = [], []
    grad_q, grad_k, grad_v = gradients[:3]
    if grad_q is not None:
        target = grad_q
        if call.q.shape[2] < call.queries:
            target = call.q.new_empty(call.batch, call.heads, call.queries, call.width, dtype=torch.float32)
            after.append(lambda: grad_q.copy_(target.sum(2, keepdim=True)))
        launches.append(_query_gradient(call, given, target))
    if grad_k is not None or grad_v is not None:
        grad_k = torch.empty_like(call.k) if grad_k is None else grad_k
        grad_v = torch.empty_like(call.v) if grad_v is None else grad_v
        launches.append(_key_gradient(call, given, grad_k, grad_v))
        if call.windows.prefix:
            prefixed = prefix_gradient(call, given, grad_k, grad_v, call.q, call.k, call.windows.scale)
            launches.append(prefixed[0])
            after.append(prefixed[1])
    return launches, after


def _learned_gradients(call: Call, given: dict[str, Any], gradients: list[Tensor | None]) -> Found:
    """Gradients of q, k and v where all queries are one."""
    grad_q, grad_k, grad_v = gradients[:3]
    if grad_q is None and grad_k is None and grad_v is None:
        return [], []
    q, k, scale = call.scored()
    grad_v = torch.empty_like(call.v) if grad_v is None else grad_v
    after: list[Callable[[], Any]] = []
    if grad_q is None and k is call.k:
        scores = torch.empty_like(k) if grad_k is None else grad_k
    else:
        # Of the scores, which are numbers of q and k.
        if k is call.k:
            k, q = k.float() * q.float(), q.new_ones(1, 1, 1, 1, dtype=torch.float32)
        scores = torch.empty_like(k)
    config = call.config("learned_gradient")
    patch, heads = call.patch(config.rows), call.heads_of(config.columns)
    tiles = tiles_of(call.sizes, patch)
    arguments = {
        **with_strides("grad_k", scores, "bhn"),
        **with_strides("grad_v", grad_v, "bhnd"),
        **given,
        **with_strides("q", q, "bh"),
        **with_strides("k", k, "bhn"),
        **with_strides("v", call.v, "bhnd"),
        **call.tables(),
        "scale": scale,
        **call.grid(),
        **numbered("tiles", tiles),
    }
    constants = {"VALUE_WIDTH": call.value_width, **patch, **heads, **call.varying()}
    grid = (math.prod(tiles) * -(-call.heads // heads["BLOCK_H"]) * call.batch,)
    launches = [Launch(learned_gradient, grid, arguments, constants, config.warps, config.stages)]
    if call.windows.prefix:
        launch, last = prefix_gradient(call, given, scores, grad_v, q, k, scale)
        launches.append(launch)
        after.append(last)
    if scores is not grad_k:
        if grad_k is not None:
            after.append(lambda: grad_k.copy_(scores * call.q))
        if grad_q is not None:
            after.append(lambda: grad_q.copy_((scores * call.k).sum(2, keepdim=True)))
    return launches, after


def _query_gradient(call: Call, given: dict[str, Any], grad_q: Tensor) -> Launch:
    config = call.config("query_gradient")
    patch = call.patch(config.rows)
    lengths = [-(-size // step) for size, step in zip(call.query_sizes, call.steps, strict=True)]
    tiles = tiles_of(lengths, patch)
    arguments = {
        **with_strides("grad_q", grad_q, "bhnd"),
        **given,
        **call.inputs(),
        **numbered("step", call.steps),
        **numbered("tiles", tiles),
    }
    constants = {
        **call.widths(),
        **patch,
        "BLOCK_N": config.columns,
        "AXES": call.axes,
        "CLAMPED": call.windows.clamped,
        "PREFIX": call.windows.prefix > 0,
        "PRECISION": call.precision,
    }
    grid = (math.prod(tiles) * math.prod(call.steps) * call.batch * call.heads,)
    return Launch(stencil_query_gradient, grid, arguments, constants, config.warps, config.stages)


def _key_gradient(call: Call, given: dict[str, Any], grad_k: Tensor, grad_v: Tensor) -> Launch:
    config = call.config("key_gradient")
    patch = call.patch(config.rows)
    # Of each class; there are as many as the dilation has remainders.
    lengths = [-(-size // far) for size, far in zip(call.sizes, call.dilations, strict=True)]
    tiles = tiles_of(lengths, patch)
    arguments = {
        **with_strides("grad_k", grad_k, "bhnd"),
        **with_strides("grad_v", grad_v, "bhnd"),
        **given,
        **call.inputs(),
        **numbered("step", call.steps),
        **numbered("inverse", call.inverses),
        **numbered("tiles", tiles),
    }
    constants = {
        **call.widths(),
        **patch,
        "BLOCK_N": config.columns,
        "AXES": call.axes,
        "CLAMPED": call.windows.clamped,
        "PRECISION": call.precision,
    }
    grid = (math.prod(tiles) * math.prod(call.dilations) * call.batch * call.heads,)
    return Launch(stencil_key_gradient, grid, arguments, constants, config.warps, config.stages)

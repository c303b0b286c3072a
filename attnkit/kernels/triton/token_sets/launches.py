"""Launches of the kernels of token sets: what they are started with, from shapes, strides and dtypes alone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnkit.kernels.ops.token_sets import SetTables
from attnkit.kernels.triton.devices import device_class as device_class_of
from attnkit.kernels.triton.launch import Launch, precision, with_strides
from attnkit.kernels.triton.token_sets import configs
from attnkit.kernels.triton.token_sets.bias_gradient import token_sets_bias_gradient
from attnkit.kernels.triton.token_sets.configs import Config, Direction, padded_dim
from attnkit.kernels.triton.token_sets.forward import token_sets_forward
from attnkit.kernels.triton.token_sets.key_gradient import token_sets_key_gradient
from attnkit.kernels.triton.token_sets.listing import Cleared, Listing, Lists, Step
from attnkit.kernels.triton.token_sets.query_gradient import token_sets_query_gradient


class Forward(NamedTuple):
    """The steps of the forward pass, in order, and what they write."""

    steps: list[Step]
    out: Tensor
    total: Tensor
    peak: Tensor


class Backward(NamedTuple):
    """The steps of the backward pass, in order, and what they write.

    Attributes:
        steps: to be run one after another.
        gradients: those of q, k and v; None for what was not asked for.
        bias: what adds up to the gradient of the bias once the steps have run, or None.
    """

    steps: list[Step]
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None]
    bias: Tensor | None


class _Call:
    """One call's tensors as kernels take them.

    Args:
        q: queries (B, heads, Nq, D).
        k: keys (B, heads, Nk, D).
        v: values (B, heads, Nk, Dv).
        tables: the rest of the operator's arguments.
        device_class: which line of the table of configurations holds; that of q's device where not given.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, tables: SetTables, device_class: str | None) -> None:
        self.q, self.k, self.v, self.tables = q, k, v, tables
        self.batch, self.heads, self.queries, self.width = q.shape
        self.keys, self.value_width = v.shape[2:]
        self.device_class = device_class or (device_class_of(q.device) if q.is_cuda else "sm_90")
        self.lists = Listing(tables, self.queries, self.keys)

    def config(self, direction: Direction) -> Config:
        width = max(self.width, self.value_width)
        biased, rounded = self.tables.bias is not None, precision(self.q.dtype) == "tf32"
        return configs.configuration(direction, width, self.q.dtype, self.device_class, biased, rounded)

    def widths(self) -> dict[str, Any]:
        return {
            "WIDTH": self.width,
            "VALUE_WIDTH": self.value_width,
            "BLOCK_D": padded_dim(self.width),
            "BLOCK_V": padded_dim(self.value_width),
        }

    def inputs(self, near: Lists) -> dict[str, Any]:
        """What every kernel takes that makes logits."""
        return {
            **with_strides("q", self.q, "bhnd"),
            **with_strides("k", self.k, "bhnd"),
            **with_strides("v", self.v, "bhnd"),
            **with_strides("bias", self.tables.bias, "bhnk"),
            "lists": near.lists,
            "words": near.words,
            "counts": near.counts,
            **with_strides("order", near.order, "bh"),
            "set_b": self.lists.heads if self.lists.items > 1 else 0,
            "set_h": 1 if self.lists.heads > 1 else 0,
            "scale": self.tables.scale,
            "heads": self.heads,
            "tiles": near.tiles,
            "queries": self.queries,
            "keys": self.keys,
        }


def forward_of(q: Tensor, k: Tensor, v: Tensor, tables: SetTables, device_class: str | None = None) -> Forward:
    """The forward pass of `attnkit::token_sets`, with its arguments.

    Args:
        q: queries (B, heads, Nq, D).
        k: keys (B, heads, Nk, D).
        v: values (B, heads, Nk, Dv).
        tables: the operator's other arguments.
        device_class: one of `attnkit.kernels.triton.devices.DEVICE_CLASSES`; that of q's device where not given.
    """
    call = _Call(q, k, v, tables, device_class)
    out = v.new_empty(call.batch, call.queries, call.heads, call.value_width).transpose(1, 2)
    total, peak = (q.new_empty(call.batch, call.heads, call.queries, dtype=torch.float32) for _ in range(2))
    config = call.config("forward")
    near, steps = call.lists.of_queries(config.rows)
    arguments = {
        **call.inputs(near),
        **with_strides("out", out, "bhnd"),
        "total": total,
        "peak": peak,
        "queries_all": tables.queries_all,
    }
    launch = _launch(token_sets_forward, call, near, arguments, config)
    return Forward([*steps, launch], out, total, peak)


def backward_of(
    grad_out: Tensor | None,
    grad_total: Tensor | None,
    out: Tensor,
    total: Tensor,
    peak: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: SetTables,
    needs: list[bool],
    device_class: str | None = None,
) -> Backward:
    """The backward pass of `attnkit::token_sets`, with the arguments of its operator; see `forward_of`."""
    if needs[3] and _differs(tables):
        tables = tables._replace(order=None)
    call = _Call(q, k, v, tables, device_class)
    if grad_out is None:
        grad_out = v.new_zeros(()).expand(out.shape)
    given = {**with_strides("grad_out", grad_out, "bhnd"), "peak": peak.contiguous()}
    # Without a bias it is 1.
    given["total"] = None if tables.bias is None else total.contiguous()
    given["delta"] = torch.empty_like(given["peak"])
    grad_q, grad_k, grad_v = (torch.empty_like(one) for one in (q, k, v))
    rows, columns, pairs = _bias_sums(call) if needs[3] else (None, None, None)
    config = call.config("query_gradient")
    to_keys = needs[1] or needs[2] or columns is not None
    seers = None
    if to_keys:
        seers = call.lists.seers(config.rows)
    near, steps = call.lists.of_queries(config.rows, seers)
    arguments = {
        **call.inputs(near),
        **given,
        **with_strides("out", out, "bhnd"),
        **with_strides("grad_q", grad_q, "bhnd"),
        **with_strides("grad_total", grad_total, "bhn"),
        "row_sums": rows,
        "queries_all": tables.queries_all,
    }
    steps = [*steps, _launch(token_sets_query_gradient, call, near, arguments, config)]
    if pairs is not None:
        steps += [Cleared(pairs), _bias_gradient(call, near, given, pairs, config)]
    if seers is not None:
        config = call.config("key_gradient")
        seeing, more = call.lists.of_keys(config.rows, seers)
        arguments = {
            **call.inputs(seeing),
            **given,
            **with_strides("grad_k", grad_k, "bhnd"),
            **with_strides("grad_v", grad_v, "bhnd"),
            "column_sums": columns,
            "keys_all": tables.keys_all,
        }
        steps += [*more, _launch(token_sets_key_gradient, call, seeing, arguments, config)]
    asked = [one if need else None for one, need in zip((grad_q, grad_k, grad_v), needs[:3], strict=True)]
    sums = next((one for one in (rows, columns, pairs) if one is not None), None)
    return Backward(steps, (asked[0], asked[1], asked[2]), sums)


def _differs(tables: SetTables) -> bool:
    """Whether items or heads that share a bias of pairs have orders of their own: a program that adds up its gradient
    would then find other queries in the next of them, which another program adds to as well."""
    bias, order = tables.bias, tables.order
    if bias is None or order is None or 1 in bias.shape[2:]:
        return False
    return any(varies > own for own, varies in zip(bias.shape[:2], order.shape[:2], strict=True))


def _bias_sums(call: _Call) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Room for what the logits get, added up as far as one program does: of queries, of keys, or of pairs.

    Shaped so that it adds up to the bias's shape: (B, heads, Nq, 1), (B, heads, 1, Nk) or the bias's own.
    """
    bias = call.tables.bias
    assert bias is not None
    made = partial(call.q.new_empty, dtype=torch.float32)
    if bias.shape[3] == 1:
        return made(call.batch, call.heads, call.queries, 1), None, None
    if bias.shape[2] == 1:
        return None, made(call.batch, call.heads, 1, call.keys), None
    return None, None, made(bias.shape)


def _bias_gradient(call: _Call, near: Lists, given: dict[str, Any], grad_bias: Tensor, config: Config) -> Launch:
    items, heads = grad_bias.shape[:2]
    arguments = {
        **call.inputs(near),
        **given,
        **with_strides("grad_bias", grad_bias, "bh"),
        "queries_all": call.tables.queries_all,
        "own_heads": heads,
        "shared_items": call.batch // max(items, 1),
        "shared_heads": call.heads // heads,
    }
    # Beside the addresses of all that it reads for each item and head, registers have room for narrow tiles only.
    wide = max(call.width, call.value_width) > 128
    config = config._replace(columns=16, warps=config.warps if wide else min(config.warps, 4))
    launch = _launch(token_sets_bias_gradient, call, near, arguments, config)
    return replace(launch, grid=(near.tiles * items * heads,))


def _launch(kernel: Any, call: _Call, near: Lists, arguments: dict[str, Any], config: Config) -> Launch:
    """A kernel with a program for each tile, item and head."""
    constants = {
        **call.widths(),
        "BLOCK_M": config.rows,
        "BLOCK_N": config.columns,
        "PRECISION": precision(call.q.dtype),
    }
    grid = (near.tiles * call.batch * call.heads,)
    return Launch(kernel, grid, arguments, constants, config.warps, config.stages)

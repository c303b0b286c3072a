"""Launches of the kernels of token sets: what they are started with, from shapes, strides and dtypes alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias

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
from attnkit.kernels.triton.token_sets.query_gradient import token_sets_query_gradient
from attnkit.kernels.triton.token_sets.unions import token_set_marks, token_set_unions

# Bytes of marks at one time, but for one item and head at least.
MARKS = 1 << 26
# Queries and slots that a program marks at once, and columns that one looks for in a tile at once.
MARKED, MET = (16, 64), 64
# Warps of a program that lists a tile, whose bytes its threads hold in registers.
LISTING = 4


@dataclass(frozen=True, eq=False)
class Cleared:
    """Memory that is set to 0 between launches."""

    memory: Tensor

    def run(self) -> None:
        """Sets it to 0 on the current stream."""
        self.memory.zero_()


@dataclass(frozen=True, eq=False)
class Ranked:
    """An order of the keys: those that many queries see come first, so that few tiles of keys are seen by nearly all
    queries, and the others by few.

    Attributes:
        order: int32 (items or 1, heads or 1, keys - first), written here.
        seers: bytes (sets, tiles, keys), how many queries of a tile see a key.
        first: keys before those that have a place in it.
    """

    order: Tensor
    seers: Tensor
    first: int

    def run(self) -> None:
        """Writes the order on the current stream."""
        seen_by = self.seers[..., self.first :].sum(1, dtype=torch.int32)
        self.order.copy_(seen_by.argsort(dim=-1, descending=True, stable=True).view_as(self.order))


Step: TypeAlias = "Launch | Cleared | Ranked"


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


class Lists(NamedTuple):
    """The lists of all tiles of one side, and where an item and head find theirs; see `unions`.

    Attributes:
        lists: int32 (sets, tiles, columns).
        words: int32 or int64 (sets, tiles, columns).
        counts: int32 (sets, tiles).
        order: int32 (items or 1, heads or 1, tokens), the order of the rows that do not stand apart, or None.
    """

    lists: Tensor
    words: Tensor
    counts: Tensor
    order: Tensor | None

    @property
    def tiles(self) -> int:
        return self.counts.shape[1]


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
        # Triton reads bytes.
        self.key_mask = None if tables.key_mask is None else tables.key_mask.contiguous().view(torch.uint8)
        # Kernels count along it in steps of one.
        self.order = tables.order
        if self.order is not None and self.order.stride(-1) != 1:
            self.order = self.order.contiguous()
        leads = [one.shape[:2] for one in (tables.table, tables.key_mask, tables.order) if one is not None]
        self.set_items, self.set_heads = torch.broadcast_shapes(*leads)
        self.sets = self.set_items * self.set_heads

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
            "set_b": self.set_heads if self.set_items > 1 else 0,
            "set_h": 1 if self.set_heads > 1 else 0,
            "scale": self.tables.scale,
            "heads": self.heads,
            "tiles": near.tiles,
            "queries": self.queries,
            "keys": self.keys,
        }

    def tiles(self, rows: int) -> int:
        """Tiles of so many queries."""
        return _tiles(self.queries, self.tables.queries_all, rows)

    def lists(self, rows: int, seers: Tensor | None = None) -> tuple[Lists, list[Step]]:
        """The lists of tiles of so many queries, and the steps that write them.

        Args:
            rows: queries of a tile.
            seers: bytes (sets, tiles, keys) for how many of them see a key, or None.
        """
        return self._lists(rows, self.order, seers, turned=False)

    def lists_of_keys(self, rows: int, order: Tensor) -> tuple[Lists, list[Step]]:
        """The lists of tiles of so many keys in some order, see `Ranked`, and the steps that write them."""
        return self._lists(rows, order, None, turned=True)

    def _lists(
        self, rows: int, order: Tensor | None, seers: Tensor | None, *, turned: bool
    ) -> tuple[Lists, list[Step]]:
        tables = self.tables
        tokens, columns, apart = self.queries, self.keys, tables.queries_all
        if turned:
            tokens, columns, apart = self.keys, self.queries, tables.keys_all
        tiles = _tiles(tokens, apart, rows)
        made = self.q.new_empty
        found = Lists(
            made(self.sets, tiles, columns, dtype=torch.int32),
            made(self.sets, tiles, columns, dtype=torch.int64 if rows > 32 else torch.int32),
            made(self.sets, tiles, dtype=torch.int32),
            order,
        )
        common = {
            "lists": found.lists,
            "words": found.words,
            "counts": found.counts,
            "seers": seers,
            **with_strides("key_mask", self.key_mask, "bh"),
            **with_strides("order", order, "bh"),
            "set_heads": self.set_heads,
            "tiles": tiles,
            "queries": self.queries,
            "keys": self.keys,
            "queries_all": tables.queries_all,
            "keys_all": tables.keys_all,
        }
        constants = {"BLOCK_M": rows, "BLOCK_N": MET, "TURNED": turned}

        def union(first: int, sets: int, seen: dict[str, Any]) -> Launch:
            arguments = {**common, **seen, "first": first}
            return Launch(token_set_unions, (tiles * sets,), arguments, constants, LISTING, 1)

        if tables.table.dtype == torch.bool:
            seen = with_strides("seen", tables.table.view(torch.uint8), "bhnk")
            return found, [union(0, self.sets, {**seen, "seen_s": 0})]
        steps: list[Step] = []
        lines = self.queries - tables.queries_all
        together = max(min(MARKS // max(lines * self.keys, 1), self.sets), 1)
        marks = made(together, lines, self.keys, dtype=torch.uint8)
        seen = {"seen": marks, "seen_s": lines * self.keys, "seen_b": 0, "seen_h": 0, "seen_n": self.keys, "seen_k": 1}
        for first in range(0, self.sets, together):
            sets = min(together, self.sets - first)
            steps += [Cleared(marks), self._marks(marks, first, sets), union(first, sets, seen)]
        return found, steps

    def _marks(self, marks: Tensor, first: int, sets: int) -> Launch:
        _, lines, keys = marks.shape
        arguments = {
            "marks": marks,
            **with_strides("index", self.tables.table, "bhnk"),
            "first": first,
            "set_heads": self.set_heads,
            "rows": lines,
            "slots": self.tables.table.shape[3],
            "keys": keys,
        }
        grid = (-(-lines // MARKED[0]) * sets,)
        return Launch(token_set_marks, grid, arguments, {"BLOCK_M": MARKED[0], "BLOCK_N": MARKED[1]}, 4, 1)


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
    near, steps = call.lists(config.rows)
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
        seers = q.new_empty(call.sets, call.tiles(config.rows), call.keys, dtype=torch.uint8)
    near, steps = call.lists(config.rows, seers)
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
        order = q.new_empty(call.set_items, call.set_heads, call.keys - tables.keys_all, dtype=torch.int32)
        seeing, more = call.lists_of_keys(config.rows, order)
        arguments = {
            **call.inputs(seeing),
            **given,
            **with_strides("grad_k", grad_k, "bhnd"),
            **with_strides("grad_v", grad_v, "bhnd"),
            "column_sums": columns,
            "keys_all": tables.keys_all,
        }
        ranked = Ranked(order, seers, tables.keys_all)
        steps += [ranked, *more, _launch(token_sets_key_gradient, call, seeing, arguments, config)]
    asked = [one if need else None for one, need in zip((grad_q, grad_k, grad_v), needs[:3], strict=True)]
    sums = next((one for one in (rows, columns, pairs) if one is not None), None)
    return Backward(steps, (asked[0], asked[1], asked[2]), sums)


def _tiles(tokens: int, apart: int, rows: int) -> int:
    return -(-apart // rows) + -(-(tokens - apart) // rows)


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

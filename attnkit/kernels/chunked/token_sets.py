"""Token sets and token masks: dense products for a few queries at a time, hidden keys at -inf.

A query's keys lie anywhere, so that fetching them costs more than multiplying with all of them unless they are very
few. Beside the tables of the layout nothing of size Nq x Nk is held, forward and backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnkit.kernels.call import AttendCall, AttendResult
from attnkit.kernels.chunked.family import Family
from attnkit.kernels.costs import Work, pairs
from attnkit.kernels.ops.registering import exporting
from attnkit.kernels.ops.token_sets import TOKEN_SETS, SetTables
from attnkit.kernels.token_set_calls import computed_by_token_sets

# Logits that are made at one time; two or three arrays of as many numbers are at work.
LOGITS = 1 << 19


class _Chunk(NamedTuple):
    """Some heads of an item, and some of their queries."""

    item: int
    heads: slice
    rows: slice

    def of(self, values: Tensor) -> Tensor:
        """The part of (B or 1, heads or 1, Nq or 1, ...) that it needs: (heads or 1, queries or 1, ...)."""
        part = values[self.item if values.shape[0] > 1 else 0]
        part = part[self.heads] if part.shape[0] > 1 else part
        return part[:, self.rows] if part.shape[1] > 1 else part

    def of_keys(self, values: Tensor) -> Tensor:
        """The part of (B or 1, heads or 1, Nk, ...) that it needs."""
        part = values[self.item if values.shape[0] > 1 else 0]
        return part[self.heads] if part.shape[0] > 1 else part


class _Problem:
    """The arguments of the operators, and what forward and backward make of them in the same way."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tables: SetTables,
    ) -> None:
        table, key_mask, bias, queries_all, keys_all, scale, _ = tables
        self.q, self.k, self.v, self.table, self.bias = q, k, v, table, bias
        self.queries_all, self.keys_all, self.scale = queries_all, keys_all, scale
        self.dtype = torch.float64 if torch.float64 in (q.dtype, v.dtype) else torch.float32
        self.keys = k.shape[2]
        self.shut = None
        if key_mask is not None:
            self.shut = torch.zeros(key_mask.shape, dtype=self.dtype, device=q.device).masked_fill_(
                ~key_mask, -torch.inf
            )
        self.lists = table.dtype != torch.bool
        # Whether a hidden key could spoil a sum: -inf + inf, or 0 * inf.
        self.careful = bias is not None or q.device.type != "cpu" or not self._moderate(q, k, v)
        heads, queries = q.shape[1:3]
        self.heads = min(max(LOGITS // max(queries * self.keys, 1), 1), heads)
        self.rows = min(max(LOGITS // (self.heads * self.keys), 1), max(queries, 1))
        count = self.heads * self.rows
        self._hidden, self._logits, self._weights = (
            torch.empty(count * (self.keys + 1), dtype=self.dtype, device=q.device) for _ in range(3)
        )
        if self.lists:
            self._spots = torch.empty(count * table.shape[3], dtype=torch.int64, device=q.device)
            self._starts = torch.arange(1, count * (self.keys + 1) + 1, self.keys + 1, device=q.device)

    def _moderate(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether all numbers are finite, and logits surely are."""
        if not q.numel() or not k.numel():
            return True
        largest = [float(torch.linalg.vector_norm(one, torch.inf)) for one in (q, k, v)]
        # Sums of products, with the scale; NaN fails every comparison.
        return largest[0] * largest[1] * q.shape[3] * max(abs(self.scale), 1.0) < 1e37 and largest[2] < 1e37

    def groups(self) -> Iterator[list[_Chunk]]:
        """All chunks, those together that share their keys."""
        batch, heads, queries = self.q.shape[:3]
        for item in range(batch):
            for first in range(0, heads, self.heads):
                some = slice(first, min(first + self.heads, heads))
                starts = range(0, max(queries, 1), self.rows)
                yield [_Chunk(item, some, slice(at, min(at + self.rows, queries))) for at in starts]

    def keys_of(self, chunks: list[_Chunk]) -> tuple[Tensor, Tensor]:
        """Keys and values (heads, Nk, D) of a group of chunks; zeros where no query sees them."""
        k, v = (chunks[0].of_keys(one).to(self.dtype) for one in (self.k, self.v))
        if not self.careful:
            return k, v
        seen = torch.zeros(1, dtype=torch.bool, device=k.device)
        for chunk in chunks:
            seen = seen | (self.hidden(chunk) == 0).any(1)
        return k.where(seen[..., None], 0.0), v.where(seen[..., None], 0.0)

    def hidden(self, chunk: _Chunk) -> Tensor:
        """0 where a query sees a key, -inf elsewhere: (heads or 1, queries, Nk), until the next chunk's is made."""
        heads = chunk.heads.stop - chunk.heads.start
        if self.table.shape[1] == 1 and (self.shut is None or self.shut.shape[1] == 1):
            heads = 1
        rows, keys = chunk.rows.stop - chunk.rows.start, self.keys
        first = min(max(self.queries_all - chunk.rows.start, 0), rows)
        below = slice(chunk.rows.start + first - self.queries_all, chunk.rows.stop - self.queries_all)
        table = chunk._replace(rows=below).of(self.table) if rows > first else None
        if self.lists:
            # One number more, in front, for those slots that hold no key.
            flat = self._hidden[: heads * rows * (keys + 1)].fill_(-torch.inf)
            found = flat.view(heads, rows, keys + 1)
            if table is not None:
                starts = self._starts[: heads * rows].view(heads, rows, 1)[:, first:]
                spots = self._spots[: heads * (rows - first) * table.shape[2]]
                torch.add(table, starts, out=spots.view(heads, rows - first, table.shape[2]))
                flat.index_fill_(0, spots, 0.0)
            found = found[..., 1:]
        else:
            found = self._hidden[: heads * rows * keys].view(heads, rows, keys)
            if table is not None:
                # 1 - 1/1 and 1 - 1/0; a masked fill takes ten times as long.
                found[:, first:].copy_(table.view(torch.int8)).reciprocal_().neg_().add_(1.0)
        found[:, :first], found[..., : self.keys_all] = 0.0, 0.0
        if self.shut is not None:
            found += chunk.of_keys(self.shut)[:, None]
        return found

    def weights(self, chunk: _Chunk, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries (heads, queries, D), softmax weights (heads, queries, Nk), the largest logits, and what is hidden."""
        q, hidden = chunk.of(self.q).to(self.dtype), self.hidden(chunk)
        shape = (q.shape[0], q.shape[1], self.keys)
        logits, weights = (flat[: math.prod(shape)].view(shape) for flat in (self._logits, self._weights))
        if self.careful:
            torch.bmm(q, k.mT, out=logits).mul_(self.scale)
            if self.bias is not None:
                logits += chunk.of(self.bias)
            logits.masked_fill_(hidden != 0, -torch.inf)
        else:
            torch.baddbmm(hidden, q, k.mT, alpha=self.scale, out=logits)
        peak = logits.amax(-1, keepdim=True)
        torch.softmax(logits, -1, out=weights)
        empty = peak == -torch.inf
        if self.careful or bool(empty.any()):
            weights.masked_fill_(empty, 0.0)
        return q, weights, peak, hidden

    def scratch(self, like: Tensor) -> Tensor:
        """The memory of the logits, which are not needed any more once there are weights."""
        return self._logits[: like.numel()].view(like.shape)


def _forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    problem = _Problem(q, k, v, SetTables(*rest))
    batch, heads, queries = q.shape[:3]
    out = v.new_empty(batch, queries, heads, v.shape[3]).transpose(1, 2)
    lse = q.new_empty(batch, heads, queries, dtype=problem.dtype)
    for chunks in problem.groups():
        near_k, near_v = problem.keys_of(chunks)
        for chunk in chunks:
            _, weights, peak, _ = problem.weights(chunk, near_k)
            chunk.of(out).copy_(torch.bmm(weights, near_v))
            # The largest weight is one over the denominator.
            total = peak - weights.amax(-1, keepdim=True).log()
            chunk.of(lse).copy_(torch.where(peak == -torch.inf, peak, total)[..., 0])
    # Weights are made anew for the backward pass.
    return out, torch.ones_like(lse), lse


def _backward(
    grad_out: Tensor | None,
    grad_total: Tensor | None,
    grad_peak: None,
    out: Tensor,
    total: Tensor,
    peak: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *rest: Any,
) -> list[Tensor]:
    problem = _Problem(q, k, v, SetTables(*rest[:-1]))
    needs: list[bool] = rest[-1]
    bias, dtype = problem.bias, problem.dtype
    grads = [torch.empty_like(one) if need else None for one, need in zip((q, k, v), needs[:3], strict=True)]
    grad_bias = torch.zeros(bias.shape, dtype=dtype, device=q.device) if bias is not None and needs[3] else None
    grad_q, grad_k, grad_v = grads
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    # With a sum of 1, what arrives at it arrives at the lse.
    if grad_total is not None:
        grad_total = grad_total.masked_fill(peak == -torch.inf, 0.0)
    for chunks in problem.groups():
        near_k, near_v = problem.keys_of(chunks)
        sum_k, sum_v = torch.zeros_like(near_k), torch.zeros_like(near_v)
        for chunk in chunks:
            near_q, weights, _, hidden = problem.weights(chunk, near_k)
            grad = chunk.of(grad_out).to(dtype)
            if grad_v is not None:
                sum_v.baddbmm_(weights.mT, grad)
            reached = torch.bmm(grad, near_v.mT, out=problem.scratch(weights))
            if problem.careful:
                reached.masked_fill_(hidden != 0, 0.0)
            pull = torch.ops.aten._softmax_backward_data.out(reached, weights, -1, dtype, grad_input=reached)
            if grad_total is not None:
                pull.addcmul_(weights, chunk.of(grad_total)[..., None])
            if grad_bias is not None:
                part = chunk.of(grad_bias)
                part += pull.sum_to_size(part.shape)
            if grad_q is not None:
                chunk.of(grad_q).copy_(torch.bmm(pull, near_k).mul_(problem.scale))
            if grad_k is not None:
                sum_k.baddbmm_(pull.mT, near_q, alpha=problem.scale)
        if grad_k is not None:
            chunks[0].of_keys(grad_k).copy_(sum_k)
        if grad_v is not None:
            chunks[0].of_keys(grad_v).copy_(sum_v)
    found = [grad_q, grad_k, grad_v]
    if grad_bias is not None and bias is not None:
        found.append(torch.empty_like(bias).copy_(grad_bias))
    return [one for one in found if one is not None]


TOKEN_SETS.kernels("CompositeExplicitAutograd", _forward, _backward)


def _why_not(call: AttendCall) -> tuple[str, ...]:
    reasons = []
    if call.q.is_cuda:
        reasons.append(f"q lies on {call.q.device}, where the operators of token sets are the triton backend's")
    if call.gain is not None:
        reasons.append("a gain multiplies the weights after the softmax, which these kernels do not do")
    if not call.k.shape[2]:
        reasons.append("there are no keys")
    if exporting():
        reasons.append("torch.export writes PyTorch's own operators, so that what it writes needs no attnkit")
    return tuple(reasons)


def _work(call: AttendCall) -> Work:
    keys = call.k.shape[2]
    chunks = math.ceil(call.q.shape[1] * call.q.shape[2] * keys / LOGITS)
    listed = float(call.q.shape[1] * call.q.shape[2] * call.layout.key_slots)
    return Work("chunked tokens", {**pairs(call, keys), "chunks": chunks, "listed": listed})


def _run(call: AttendCall) -> AttendResult:
    return computed_by_token_sets(call, TOKEN_SETS)


TOKEN_LISTS = Family(_why_not, _work, _run)

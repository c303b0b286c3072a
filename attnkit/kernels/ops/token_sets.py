"""Operators of token sets and token masks: queries with keys of their own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnkit.kernels.ops.registering import OpPair


class SetTables(NamedTuple):
    """What the operator takes beside q, k and v, in its order."""

    table: Tensor
    key_mask: Tensor | None
    bias: Tensor | None
    queries_all: int
    keys_all: int
    scale: float
    order: Tensor | None = None


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, ...]:
    """The output lies in memory as (B, Nq, heads, Dv), in which order a projection reads it."""
    batch, heads, queries = q.shape[:3]
    dtype = torch.float64 if torch.float64 in (q.dtype, v.dtype) else torch.float32
    out = v.new_empty(batch, queries, heads, v.shape[3]).transpose(1, 2)
    return out, *(q.new_empty(batch, heads, queries, dtype=dtype) for _ in range(2))


def _work(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    key_mask: Tensor | None,
    bias: Tensor | None,
    queries_all: int,
    keys_all: int,
    scale: float,
    order: Tensor | None,
) -> tuple[int, int]:
    """Multiply-adds over the keys that a list has room for, or over all where there is a mask."""
    batch, heads, queries, width = q.shape
    keys = k.shape[2] if table.dtype == torch.bool else min(keys_all + table.shape[3], k.shape[2])
    pairs = batch * heads * (queries_all * k.shape[2] + (queries - queries_all) * keys)
    # Backward makes the weights once more.
    return pairs * (width + v.shape[3]), pairs * (3 * width + 2 * v.shape[3])


def token_sets_pair(name: str) -> OpPair:
    """The pair of operators of token sets under a name."""
    return OpPair(
        name,
        # Table, of all queries but the first `queries_all`, which see every key: their keys (B or 1, heads or 1,
        # Nq - queries_all, K), or a bool mask (B or 1, heads or 1, Nq - queries_all, Nk). All queries see the first
        # `keys_all` keys, whatever it says. Order, int32 (B or 1, heads or 1, Nq - queries_all) or None: the numbers
        # of the table's rows, those beside each other that see the same keys. It changes no result, and kernels that
        # take queries one by one do not read it.
        arguments="Tensor q, Tensor k, Tensor v, Tensor table, Tensor? key_mask, Tensor? bias, int queries_all, "
        "int keys_all, float scale, Tensor? order",
        # log(total) + peak: (B, heads, Nq) in float32, or float64 for it, the lse. `peak` is -inf where no key is seen,
        # and `total` 1. Under a bias a kernel that needs them for its backward pass keeps them apart, since beside -1e9
        # their sum has lost the denominator; elsewhere `total` may be 1 and `peak` the lse.
        outputs=("out", "total", "peak"),
        gradients=("q", "k", "v", "bias"),
        constants=("peak",),
        lowered=("q", "k", "v"),
        fake=_fake,
        work=_work,
    )


TOKEN_SETS = token_sets_pair("token_sets")

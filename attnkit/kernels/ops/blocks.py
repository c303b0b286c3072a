"""`attnkit::blocks` and `attnkit::blocks_backward`: the image's queries over blocks of keys."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnkit.kernels.ops.registering import OpPair
from attnkit.layouts import Blocks
from attnkit.layouts.orders import Order


class BlockTables(NamedTuple):
    """What the operator takes beside q, k and v, in its order; `routes` is its index, a name that tuples have."""

    query_token: Tensor
    query_slot: Tensor
    key_token: Tensor
    key_slot: Tensor
    routes: Tensor | None
    key_mask: Tensor | None
    bias: Tensor | None
    prefix: int
    padded: list[bool]
    scale: float
    first: Tensor | None = None


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the computation: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def output_of(v: Tensor, tables: BlockTables) -> tuple[Tensor, Tensor]:
    """The operator's output, which begins with `first`, and the part of it that is the image's queries'."""
    before = 0 if tables.first is None else tables.first.shape[2]
    rows = before + tables.query_slot.shape[2]
    out = v.new_empty(v.shape[0], rows, v.shape[1], v.shape[3]).transpose(1, 2)
    if tables.first is None:
        return out, out
    out[:, :, :before] = tables.first
    return out, out[:, :, before:]


def gradient_of_first(
    grad_out: Tensor | None, out: Tensor, tables: BlockTables
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """The part of `grad_out` and `out` that is the image's queries', and the gradient of `first`."""
    if tables.first is None:
        return grad_out, out, None
    before = tables.first.shape[2]
    grad = torch.empty_like(tables.first)
    if grad_out is None:
        return None, out[:, :, before:], grad.zero_()
    return grad_out[:, :, before:], out[:, :, before:], grad.copy_(grad_out[:, :, :before])


def _fake(q: Tensor, k: Tensor, v: Tensor, query_token: Tensor, query_slot: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    batch, heads = q.shape[:2]
    count, first = query_slot.shape[2], rest[-1]
    rows = count if first is None else count + first.shape[2]
    out = v.new_empty(batch, rows, heads, v.shape[3]).transpose(1, 2)
    return out, *(q.new_empty(batch, heads, count, dtype=wide(q.dtype)) for _ in range(2))


def _work(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_token: Tensor,
    query_slot: Tensor,
    key_token: Tensor,
    key_slot: Tensor,
    index: Tensor | None,
    key_mask: Tensor | None,
    bias: Tensor | None,
    prefix: int,
    padded: list[bool],
    scale: float,
    first: Tensor | None,
) -> tuple[int, int]:
    cuts = Order(query_token, query_slot, padded[0]), Order(key_token, key_slot, padded[1])
    layout = Blocks(cuts[0], index, prefix=prefix, key_order=cuts[1], unique=True, key_mask=key_mask)
    if type(q) is Tensor and not q.is_meta:
        seen = layout.visible()[..., prefix:]
        pairs = int(seen.sum()) * (q.shape[0] // seen.shape[0]) * (q.shape[1] // seen.shape[1])
    else:
        pairs = q.shape[0] * q.shape[1] * query_slot.shape[2] * layout.key_slots
    # Backward makes the logits once more, and four products of a pair's numbers with rows of one width.
    return pairs * (q.shape[3] + v.shape[3]), pairs * (3 * q.shape[3] + 2 * v.shape[3])


def blocks_pair(name: str) -> OpPair:
    """The pair of operators of blocks under a name."""
    return OpPair(
        name,
        # q, k, v: (B, heads, N, D), (B, heads, N, D), (B, heads, N, Dv), the first `prefix` of each being prefix
        # tokens.
        # query_token, query_slot, key_token, key_slot: the two cuts, an `Order`'s tables (B or 1, heads or 1, R, T) and
        # (B or 1, heads or 1, N - prefix). padded: of queries and of keys, whether any slot is empty.
        # index: (B or 1, heads or 1, R, K), -1 for none, no block twice in a row; None: every block sees its own.
        # key_mask: bool (B or 1, heads or 1, N).
        # bias: (B or 1, heads or 1, R or 1, T, prefix + K * T), any values at empty slots.
        # first: (B, heads, prefix, Dv), what the prefix queries get, computed by who calls; None without a prefix, or
        # where nobody asks for them.
        # out: (B, heads, N - prefix, Dv), the queries outside the prefix, with `first` before them.
        # log(total) + peak: (B, heads, N - prefix) in `wide(q.dtype)`, the lse. `peak` is -inf where no key is seen,
        # and `total` 1. Under a bias a kernel that needs them for its backward pass keeps them apart, since beside -1e9
        # their sum has lost the denominator; elsewhere `total` may be 1 and `peak` the lse.
        arguments="Tensor q, Tensor k, Tensor v, Tensor query_token, Tensor query_slot, Tensor key_token, "
        "Tensor key_slot, Tensor? index, Tensor? key_mask, Tensor? bias, SymInt prefix, bool[] padded, float scale, "
        "Tensor? first",
        outputs=("out", "total", "peak"),
        gradients=("q", "k", "v", "bias", "first"),
        constants=("peak",),
        lowered=("q", "k", "v", "first"),
        fake=_fake,
        work=_work,
    )


BLOCKS = blocks_pair("blocks")

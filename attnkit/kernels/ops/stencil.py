"""`attnkit::stencil` and `attnkit::stencil_backward`: the image's queries over a stencil."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnkit.kernels.ops.registering import OpPair


def wide(q: Tensor, v: Tensor) -> torch.dtype:
    """The dtype of the computation and of its sums."""
    return torch.float64 if torch.float64 in (q.dtype, v.dtype) else torch.float32


def places(kernels: list[int], prefix: int) -> int:
    """How many keys a query may see."""
    return prefix + math.prod(kernels)


def _queries(sizes: list[int], strides: list[int]) -> int:
    return math.prod((size - 1) // step + 1 for size, step in zip(sizes, strides, strict=True))


def _work(q: Tensor, k: Tensor, v: Tensor, bias: Any, gain: Any, seen: Any, *window: Any) -> tuple[int, int]:
    sizes, prefix, kernels, strides = window[:4]
    pairs = v.shape[0] * v.shape[1] * _queries(sizes, strides) * places(kernels, prefix)
    # Backward makes the logits once more, and four products of a pair's numbers with rows of one width.
    return pairs * (q.shape[3] + v.shape[3]), pairs * (3 * q.shape[3] + 2 * v.shape[3])


def stencil_pair(name: str, *, narrow: bool = False) -> OpPair:
    """The pair of operators of stencils under a name.

    Args:
        name: name of the forward operator.
        narrow: whether `out` has the dtype of v on every device, as it has on GPUs.
    """

    def fake(q: Tensor, k: Tensor, v: Tensor, bias: Any, gain: Any, seen: Any, *window: Any) -> tuple[Tensor, ...]:
        queries = _queries(window[0], window[3])
        batch, heads, _, width = v.shape
        dtype = v.dtype if narrow or v.is_cuda else wide(q, v)
        out = v.new_empty(batch, queries, heads, width, dtype=dtype).transpose(1, 2)
        return out, *(v.new_empty(batch, heads, queries, dtype=wide(q, v)) for _ in range(2))

    return OpPair(
        name,
        # q: (B, heads, queries, D) without the prefix, or (B, heads, 1, D) for all queries.
        # k, v: (B, heads, Nk, D), (B, heads, Nk, Dv), finite also where `seen` hides them.
        # bias, gain: (B or 1, heads or 1, places, *query sizes or 1s); places are the prefix tokens and then the
        # window's.
        # seen: bool (B or 1, heads or 1, Nk).
        # clamped: whether windows are moved inside the grid, instead of losing what lies outside.
        # out: (B, heads, queries, Dv) in `wide(q, v)`, on GPUs in the dtype of v: half of what they do is to write it.
        # log(total) + peak: (B, heads, queries), the lse; apart, they keep the digits that their sum loses where
        # logits are large. `peak` is -inf where no key is seen, and `total` 1.
        arguments="Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? gain, Tensor? seen, int[] sizes, int prefix, "
        "int[] kernels, int[] strides, int[] dilations, bool clamped, float scale",
        outputs=("out", "total", "peak"),
        gradients=("q", "k", "v", "bias", "gain"),
        constants=("peak",),
        # `attend` has left autocast; scores of learned queries stay float32 in it.
        lowered=(),
        fake=fake,
        work=_work,
    )


STENCIL = stencil_pair("stencil")

"""`attnkit::stencil` and `attnkit::stencil_backward`: the image's queries over a stencil whose border is masked."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnkit.kernels.ops.registering import OpPair


def wide(q: Tensor, v: Tensor) -> torch.dtype:
    """The dtype of the computation and of all outputs."""
    return torch.float64 if torch.float64 in (q.dtype, v.dtype) else torch.float32


def places(kernels: list[int], prefix: int) -> int:
    """How many keys a query may see."""
    return prefix + math.prod(kernels)


def _fake(q: Tensor, k: Tensor, v: Tensor, bias: Any, gain: Any, seen: Any, *window: Any) -> tuple[Tensor, ...]:
    sizes, _, _, strides = window[:4]
    queries = math.prod((size - 1) // step + 1 for size, step in zip(sizes, strides, strict=True))
    dtype = wide(q, v)
    batch, heads, _, width = v.shape
    out = v.new_empty(batch, queries, heads, width, dtype=dtype).transpose(1, 2)
    return out, *(v.new_empty(batch, heads, queries, dtype=dtype) for _ in range(2))


def _work(q: Tensor, k: Tensor, v: Tensor, bias: Any, gain: Any, seen: Any, *window: Any) -> tuple[int, int]:
    sizes, prefix, kernels, strides = window[:4]
    queries = math.prod((size - 1) // step + 1 for size, step in zip(sizes, strides, strict=True))
    pairs = v.shape[0] * v.shape[1] * queries * places(kernels, prefix)
    # Backward makes the logits once more, and four products of a pair's numbers with rows of one width.
    return pairs * (q.shape[3] + v.shape[3]), pairs * (3 * q.shape[3] + 2 * v.shape[3])


STENCIL = OpPair(
    "stencil",
    # q: (B, heads, queries, D) without the prefix, or (B, heads, 1, D) for all queries.
    # k, v: (B, heads, Nk, D), (B, heads, Nk, Dv), finite also where `seen` hides them.
    # bias, gain: (B or 1, heads or 1, places, *query sizes or 1s); places are the prefix tokens and then the window's.
    # seen: bool (B or 1, heads or 1, Nk).
    # out: (B, heads, queries, Dv). log(total) + peak: (B, heads, queries), the lse; apart, they keep the digits that
    # their sum loses where logits are large. `peak` is -inf where no key is seen, and `total` 1.
    arguments="Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? gain, Tensor? seen, int[] sizes, int prefix, "
    "int[] kernels, int[] strides, int[] dilations, float scale",
    outputs=("out", "total", "peak"),
    gradients=("q", "k", "v", "bias", "gain"),
    constants=("peak",),
    # `attend` has left autocast; scores of learned queries stay float32 in it.
    lowered=(),
    fake=_fake,
    work=_work,
)

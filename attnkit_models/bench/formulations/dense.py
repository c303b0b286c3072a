"""Dense attention: PyTorch's fused kernel, called in every way that may be the fastest."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def dense_variants(q: Tensor, k: Tensor, v: Tensor, rows: int | None = None) -> dict[str, Callable[[], Tensor]]:
    """Ways to compute dense attention of (B, heads, N, D), of the first `rows` queries only where given.

    On the CPU: the projection's views as they are, or made contiguous first. On CUDA: each of PyTorch's kernels.
    """
    count = q.shape[2] if rows is None else rows

    def as_they_are() -> Tensor:
        return scaled_dot_product_attention(q[:, :, :count], k, v)

    def contiguous() -> Tensor:
        return scaled_dot_product_attention(q[:, :, :count].contiguous(), k.contiguous(), v.contiguous())

    if q.device.type == "cpu":
        return {"views": as_they_are, "contiguous": contiguous}
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def on(backend: SDPBackend) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return as_they_are()

        return run

    kinds = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)
    return {"any": as_they_are, **{kind.name.lower(): on(kind) for kind in kinds}}


def exact_attention(leaves: tuple[Tensor, Tensor, Tensor], rows: Tensor, visible: Tensor | None) -> Tensor:
    """Attention of some queries over all keys, written out.

    Args:
        leaves: q, k and v (B, heads, N, D).
        rows: numbers of the queries, (rows,).
        visible: bool (B or 1, heads or 1, rows, N), or None for all.
    """
    q, k, v = leaves
    logits = q[:, :, rows] @ k.mT * q.shape[-1] ** -0.5
    if visible is not None:
        logits = logits.masked_fill(~visible, -torch.inf)
    return logits.softmax(-1) @ v

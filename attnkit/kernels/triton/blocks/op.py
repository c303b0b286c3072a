"""Blocks on the GPU: the operators' kernels for CUDA."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnkit.kernels.ops.blocks import BLOCKS, BlockTables, blocks_pair, gradient_of_first
from attnkit.kernels.triton.launch import laid_out_as, within_reach
from attnkit.kernels.triton.version import INTERPRETING


def _forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    # Imported here, because it takes half a second, and a machine without a GPU may have no Triton.
    from attnkit.kernels.triton.blocks.launches import forward_of

    reached = (within_reach(one) for one in (q, k, v))
    found = forward_of(*reached, _reached(BlockTables(*rest)))
    found.launch.run()
    return found.out, found.total, found.peak


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
    from attnkit.kernels.triton.blocks.launches import backward_of

    tables, needs = BlockTables(*rest[:-1]), rest[-1]
    grad_out, out, grad_first = gradient_of_first(grad_out, out, tables)
    reached, near = [within_reach(one) for one in (q, k, v)], _reached(tables)
    if grad_out is not None:
        grad_out = within_reach(grad_out)
    found = backward_of(grad_out, grad_total, out, total, peak, *reached, near, needs[:4])
    for launch in found.launches:
        launch.run()
    for shares, target in found.sums:
        target.copy_(shares.sum(0))
    gradients = [
        laid_out_as(gradient, one, other)  # type: ignore[arg-type]
        for gradient, one, other in zip(found.gradients, (q, k, v, tables.bias), (*reached, near.bias), strict=True)
        if gradient is not None
    ]
    return [*gradients, grad_first] if needs[4] and grad_first is not None else gradients


def _reached(tables: BlockTables) -> BlockTables:
    return tables if tables.bias is None else tables._replace(bias=within_reach(tables.bias, 2))


BLOCKS.kernels("CUDA", _forward, _backward)

# Where Triton interprets its kernels, they also take tensors of the CPU, under a name of their own: there, the operator
# itself has the kernels of the chunked backend.
PAIR = BLOCKS
if INTERPRETING:
    PAIR = blocks_pair("blocks_interpreted")
    PAIR.kernels("CPU", _forward, _backward)

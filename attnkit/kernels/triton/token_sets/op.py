"""Token sets on the GPU: the operators' kernels for CUDA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit.kernels.ops.token_sets import TOKEN_SETS, SetTables, token_sets_pair
from attnkit.kernels.triton.launch import laid_out_as, within_reach
from attnkit.kernels.triton.version import INTERPRETING


def _forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    # Imported here, because it takes half a second, and a machine without a GPU may have no Triton.
    from attnkit.kernels.triton.token_sets.launches import forward_of

    found = forward_of(*(within_reach(one) for one in (q, k, v)), SetTables(*rest))
    for step in found.steps:
        step.run()
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
    from attnkit.kernels.triton.token_sets.launches import backward_of

    tables = SetTables(*rest[:-1])
    reached = [within_reach(one) for one in (q, k, v)]
    if grad_out is not None:
        grad_out = within_reach(grad_out)
    found = backward_of(grad_out, grad_total, out, total, peak, *reached, tables, rest[-1])
    for step in found.steps:
        step.run()
    gradients = [
        laid_out_as(gradient, one, other)
        for gradient, one, other in zip(found.gradients, (q, k, v), reached, strict=True)
        if gradient is not None
    ]
    if found.bias is not None:
        assert tables.bias is not None
        gradients.append(torch.empty_like(tables.bias).copy_(found.bias.sum_to_size(tables.bias.shape)))
    return gradients


TOKEN_SETS.kernels("CUDA", _forward, _backward)

# Where Triton interprets its kernels, they also take tensors of the CPU, under a name of their own.
PAIR = TOKEN_SETS
if INTERPRETING:
    PAIR = token_sets_pair("token_sets_interpreted")
    PAIR.kernels("CPU", _forward, _backward)

"""Stencils on the GPU: the operators' kernels for CUDA."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnkit.kernels.ops.stencil import STENCIL, stencil_pair
from attnkit.kernels.triton.launch import laid_out_as, within_reach
from attnkit.kernels.triton.version import INTERPRETING


def _forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    # Imported here, because it takes half a second, and a machine without a GPU may have no Triton.
    from attnkit.kernels.triton.stencil.call import Windows
    from attnkit.kernels.triton.stencil.launches import forward_of

    found = forward_of(*(within_reach(one) for one in (q, k, v)), Windows(*rest))
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
    from attnkit.kernels.triton.stencil.call import Windows
    from attnkit.kernels.triton.stencil.launches import backward_of

    reached = [within_reach(one) for one in (q, k, v)]
    if grad_out is not None:
        grad_out = within_reach(grad_out)
    found = backward_of(grad_out, grad_total, out, total, peak, *reached, Windows(*rest[:-1]), rest[-1])
    for launch in found.launches:
        launch.run()
    for fill in found.after:
        fill()
    of_inputs = zip(found.gradients[:3], (q, k, v), reached, strict=True)
    gradients = [laid_out_as(gradient, one, other) for gradient, one, other in of_inputs if gradient is not None]
    return [*gradients, *(one for one in found.gradients[3:] if one is not None)]


STENCIL.kernels("CUDA", _forward, _backward)

# Where Triton interprets its kernels, they also take tensors of the CPU, under a name of their own: there, the operator
# itself has the kernels of the chunked backend.
PAIR = STENCIL
if INTERPRETING:
    PAIR = stencil_pair("stencil_interpreted", narrow=True)
    PAIR.kernels("CPU", _forward, _backward)

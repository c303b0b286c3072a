"""Stencils on the GPU: the operators' kernels for CUDA."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnkit.errors import BackendError
from attnkit.kernels.ops.stencil import STENCIL, stencil_pair
from attnkit.kernels.triton.version import INTERPRETING


def _forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    # Imported here, because it takes half a second, and a machine without a GPU may have no Triton.
    from attnkit.kernels.triton.stencil.launches import Windows, forward_of

    found = forward_of(q, k, v, Windows(*rest))
    found.launch.run()
    return found.out, found.total, found.peak


def _backward(*given: Any) -> list[Tensor]:
    raise BackendError("the Triton kernels of stencils have no backward pass yet; backend='gather' has one")


STENCIL.kernels("CUDA", _forward, _backward)

# Where Triton interprets its kernels, they also take tensors of the CPU, under a name of their own: there, the operator
# itself has the kernels of the chunked backend.
PAIR = STENCIL
if INTERPRETING:
    PAIR = stencil_pair("stencil_interpreted", narrow=True)
    PAIR.kernels("CPU", _forward, _backward)

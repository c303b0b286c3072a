"""The triton backend: kernels for GPUs that read and write tokens where they stand."""

from __future__ import annotations

from typing import ClassVar, cast

import torch

from attnkit.kernels.backend import MeasuredBackend
from attnkit.kernels.block_calls import computed_by_blocks
from attnkit.kernels.call import AttendCall, AttendResult
from attnkit.kernels.costs import Work, fetched, pairs
from attnkit.kernels.ops.registering import exporting
from attnkit.kernels.stencil_calls import computed_by_stencil
from attnkit.kernels.token_set_calls import computed_by_token_sets
from attnkit.kernels.transforms import assume_constant_result, differentiating
from attnkit.kernels.triton.blocks.configs import HEAD_DIMS
from attnkit.kernels.triton.blocks.op import PAIR
from attnkit.kernels.triton.packing import computed_packed, shares_tiles
from attnkit.kernels.triton.stencil.configs import AXES
from attnkit.kernels.triton.stencil.op import PAIR as STENCIL_PAIR
from attnkit.kernels.triton.token_sets.op import PAIR as TOKEN_PAIR
from attnkit.kernels.triton.token_sets.shares import dense_instead
from attnkit.kernels.triton.version import INTERPRETING, missing
from attnkit.layouts import Blocks, Layout, Stencil, TokenMask, TokenSets

KINDS: tuple[type[Layout], ...] = (Blocks, Stencil, TokenMask, TokenSets)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_GPU = (8, 0)
# Looked up at import: the first call may already be one that is being compiled.
_MISSING = missing()
_INTERPRETED = "" if _MISSING else ", or set TRITON_INTERPRET=1 before Python starts and Triton interprets them, slowly"


class TritonBackend(MeasuredBackend):
    """Hand-written Triton kernels, which read and write tokens where they stand and keep the output and two
    numbers a query."""

    name: ClassVar[str] = "triton"
    on_demand: ClassVar[str] = "Triton interprets its kernels, on demand of TRITON_INTERPRET" if INTERPRETING else ""

    def why_not(self, call: AttendCall) -> tuple[str, ...]:
        reasons = _device_reasons(call.q.device)
        if not isinstance(call.layout, KINDS):
            kinds = ", ".join(kind.kind for kind in KINDS)
            return (*reasons, f"a {call.layout.kind} layout has no kernels here; it takes {kinds}")
        if call.q.dtype not in DTYPES:
            reasons.append(f"q is {call.q.dtype}; its kernels take float32, bfloat16 and float16")
        if isinstance(call.layout, Stencil):
            reasons += _stencil_reasons(call, call.layout)
        elif call.q.dtype != call.v.dtype:
            reasons.append(f"q and k are {call.q.dtype} but v is {call.v.dtype}; it needs one dtype")
        if max(call.q.shape[3], call.v.shape[3]) > HEAD_DIMS[-1]:
            widest = max(call.q.shape[3], call.v.shape[3])
            reasons.append(f"a head is {widest} wide, and its kernels have room for {HEAD_DIMS[-1]}")
        if call.gain is not None and not isinstance(call.layout, Stencil):
            reasons.append("a gain multiplies the weights after the softmax, which its kernels do not do")
        if not call.layout.key_slots:
            reasons.append("there are no keys to fetch")
        if differentiating():
            reasons.append(
                "its backward passes are written by hand, which forward mode and torch.func's derivatives cannot use"
            )
        if exporting():
            reasons.append("torch.export writes PyTorch's own operators, so that what it writes needs no attnkit")
        return tuple(reasons)

    def dense_instead(self, call: AttendCall) -> str:
        return dense_instead(call) if isinstance(call.layout, (TokenMask, TokenSets)) else ""

    def work(self, call: AttendCall) -> Work:
        if isinstance(call.layout, Stencil):
            return Work("triton stencil", pairs(call, call.layout.key_slots))
        if isinstance(call.layout, (TokenMask, TokenSets)):
            return Work("triton tokens", pairs(call, call.layout.key_slots))
        if shares_tiles(call):
            return Work("triton tokens", pairs(call, call.layout.num_keys))
        return Work("triton blocks", fetched(call, cast("Blocks", call.layout)))

    def run(self, call: AttendCall) -> AttendResult:
        if isinstance(call.layout, Stencil):
            return computed_by_stencil(call, STENCIL_PAIR.op)
        if isinstance(call.layout, (TokenMask, TokenSets)):
            return computed_by_token_sets(call, TOKEN_PAIR, ordered=True)
        if shares_tiles(call):
            return computed_packed(call, TOKEN_PAIR)
        return computed_by_blocks(call, PAIR)

    def how(self, call: AttendCall) -> str:
        if isinstance(call.layout, (TokenMask, TokenSets)) and call.layout.query_groups is not None:
            return "tiles take queries of a group together"
        if not shares_tiles(call):
            return ""
        tokens = cast("Blocks", call.layout).order.token.shape[3]
        return f"regions of {tokens} token{'s' if tokens > 1 else ''} share tiles, by a mask over all pairs of tokens"


def _stencil_reasons(call: AttendCall, layout: Stencil) -> list[str]:
    reasons = []
    if call.v.dtype not in DTYPES:
        reasons.append(f"v is {call.v.dtype}; its kernels take float32, bfloat16 and float16")
    if layout.grid.ndim > AXES:
        reasons.append(f"the grid has {layout.grid.ndim} axes, and its kernels have addresses for {AXES}")
    return reasons


def _device_reasons(device: torch.device) -> list[str]:
    if device.type != "cuda" and not (INTERPRETING and device.type == "cpu"):
        return [f"q lies on {device}, and its kernels are for GPUs; move q, k and v to one{_INTERPRETED}"]
    if _MISSING:
        return [_MISSING]
    if device.type == "cuda" and (capability := _capability(device.index)) < OLDEST_GPU:
        return [f"the GPU has compute capability {capability[0]}.{capability[1]}; its kernels need 8.0"]
    return []


@assume_constant_result
def _capability(index: int | None) -> tuple[int, int]:
    # Fake tensors may lie on a GPU that is not there.
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else OLDEST_GPU

"""The sdpa backend: PyTorch's fused dense attention, with the layout as a mask where it is not dense."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from attnkit.kernels.backend import MeasuredBackend
from attnkit.kernels.call import AttendCall, AttendResult
from attnkit.kernels.costs import Work, pairs, whole_mask
from attnkit.kernels.softmax import fused_attention
from attnkit.layouts import Layout
from attnkit.layouts.cache import cached
from attnkit.layouts.token_sets import may_look

# Pairs beyond which making a mask is little beside the attention under it.
LARGEST = 2**22


class SdpaBackend(MeasuredBackend):
    """`torch.nn.functional.scaled_dot_product_attention` over all pairs."""

    name: ClassVar[str] = "sdpa"

    def why_not(self, call: AttendCall) -> tuple[str, ...]:
        reasons = []
        if call.gain is not None:
            reasons.append("a gain multiplies the weights after the softmax, which the fused kernel does not do")
        if call.return_lse:
            reasons.append("return_lse=True, and PyTorch's fused attention does not return the lse")
        if call.q.dtype != call.v.dtype:
            reasons.append(f"q and k are {call.q.dtype} but v is {call.v.dtype}; it needs one dtype")
        return tuple(reasons)

    def work(self, call: AttendCall) -> Work:
        mask = whole_mask(call)
        # Where there is a mask, whoever made it, the fused kernel reads it for every head.
        kernel = "sdpa masked" if mask else "sdpa"
        return Work(kernel, {**pairs(call, call.k.shape[2]), "mask": mask})

    def run(self, call: AttendCall) -> AttendResult:
        layout, k, v = call.layout, call.k, call.v
        mask = None
        if not layout.full:
            mask, seen = _visible(layout, call.q.device)
            if seen is not None:
                # As in the reference: values nobody sees must not reach the output as zero times NaN.
                k, v = k.where(seen, 0.0), v.where(seen, 0.0)
        return AttendResult(fused_attention(call.q, k, v, mask, call.scale, call.pair_values(call.bias)), None)


def _visible(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """A layout's mask; and which keys are seen at all, (B or 1, heads or 1, Nk, 1), None where all are known to be."""

    def make() -> tuple[Tensor, ...]:
        mask = layout.to_mask(device)
        seen = mask.any(dim=-2)[..., None]
        # Looked at where it is made once.
        return (mask,) if lasting and may_look(seen) and bool(seen.all()) else (mask, seen)

    key = None if torch.compiler.is_compiling() else layout.made_of
    lasting = key is not None and layout.num_queries * layout.num_keys <= LARGEST
    mask, *seen = cached(("seen", key, str(device)), make) if lasting else make()
    return mask, seen[0] if seen else None

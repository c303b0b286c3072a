"""The sdpa backend: PyTorch's fused dense attention, with the layout as a mask where it is not dense."""

from __future__ import annotations

from typing import ClassVar

from attnkit.kernels.backend import Backend, size_of
from attnkit.kernels.call import AttendCall, AttendResult
from attnkit.kernels.softmax import fused_attention


class SdpaBackend(Backend):
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

    def cost(self, call: AttendCall) -> float:
        masked = not call.layout.full or call.bias is not None
        return (2.2 if masked else 1.0) * size_of(call, call.k.shape[2])

    def run(self, call: AttendCall) -> AttendResult:
        layout, k, v = call.layout, call.k, call.v
        mask = None
        if not layout.full:
            mask = layout.to_mask(call.q.device)
            # As in the reference: values nobody sees must not reach the output as zero times NaN.
            seen = mask.any(dim=-2)[..., None]
            k, v = k.where(seen, 0.0), v.where(seen, 0.0)
        return AttendResult(fused_attention(call.q, k, v, mask, call.scale, call.pair_values(call.bias)), None)

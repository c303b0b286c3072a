"""The reference backend: any layout, by its mask. It defines what every other backend must give."""

from __future__ import annotations

from typing import ClassVar

from attnkit.kernels.backend import MeasuredBackend
from attnkit.kernels.call import AttendCall, AttendResult
from attnkit.kernels.costs import Work, pairs, whole_mask
from attnkit.kernels.softmax import plain_attention


class ReferenceBackend(MeasuredBackend):
    """Two matrix products with a masked softmax between them, in float32 or float64."""

    name: ClassVar[str] = "reference"

    def why_not(self, call: AttendCall) -> tuple[str, ...]:
        return ()

    def work(self, call: AttendCall) -> Work:
        return Work("reference", {**pairs(call, call.k.shape[2]), "mask": whole_mask(call)})

    def run(self, call: AttendCall) -> AttendResult:
        mask = call.layout.to_mask(call.q.device)
        # What no query sees may hold anything, NaN included: zero times NaN would still reach the output.
        seen = mask.any(dim=-2)[..., None]
        return plain_attention(
            call.q,
            call.k.where(seen, 0.0),
            call.v.where(seen, 0.0),
            mask,
            call.scale,
            call.pair_values(call.bias),
            call.pair_values(call.gain),
            call.compute_dtype,
        )

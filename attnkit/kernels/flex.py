"""The flex backend: PyTorch's FlexAttention, which compiles a kernel for the layout."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from attnkit.kernels.backend import MeasuredBackend
from attnkit.kernels.call import AttendCall, AttendResult
from attnkit.kernels.costs import Work, pairs, whole_mask

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class FlexBackend(MeasuredBackend):
    """Whole tiles of 128 x 128 pairs are skipped where the mask leaves them empty; the rest is masked pair by pair."""

    name: ClassVar[str] = "flex"
    on_demand: ClassVar[str] = "a first call compiles for seconds"

    def why_not(self, call: AttendCall) -> tuple[str, ...]:
        reasons = []
        device = call.q.device.type
        if device not in ("cpu", "cuda"):
            reasons.append(f"FlexAttention has no kernel for {device}; it runs on cpu and cuda")
        if device == "cpu" and call.needs_grad:
            reasons.append("FlexAttention has no backward pass on the CPU; use torch.no_grad() or another backend")
        if device == "cpu" and call.q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            reasons.append(f"FlexAttention on the CPU takes float32, bfloat16 and float16, not {call.q.dtype}")
        if device == "cuda" and call.q.dtype == torch.float64:
            reasons.append("FlexAttention on CUDA does not take float64")
        if call.q.dtype != call.v.dtype:
            reasons.append(f"q and k are {call.q.dtype} but v is {call.v.dtype}; it needs one dtype")
        if call.gain is not None:
            reasons.append("a gain multiplies the weights after the softmax, which FlexAttention cannot express")
        if device == "cpu" and call.return_lse:
            reasons.append("return_lse=True, which FlexAttention does not support on the CPU")
        if device == "cuda" and min(call.q.shape[3], call.v.shape[3]) < 16:
            reasons.append(
                f"head width {min(call.q.shape[3], call.v.shape[3])} is below the 16 that its CUDA kernel needs"
            )
        if not call.q.numel() or not call.k.numel():
            reasons.append("FlexAttention does not take empty tensors")
        return tuple(reasons)

    def work(self, call: AttendCall) -> Work:
        # Tiles of 128 tokens are rarely empty in an image's row order. The seconds a first call compiles do not count.
        return Work("flex", {**pairs(call, call.k.shape[2]), "mask": whole_mask(call)})

    def run(self, call: AttendCall) -> AttendResult:
        layout, block_mask = call.layout, None
        q, k, v = call.q, call.k, call.v
        if not torch.is_grad_enabled():
            # On the CPU it refuses tensors that require a gradient even where none will be asked for.
            q, k, v = q.detach(), k.detach(), v.detach()
        if not layout.full:
            mask = layout.to_mask(call.q.device)
            # As in the reference: values nobody sees must not reach the output as zero times NaN.
            seen = mask.any(dim=-2)[..., None]
            k, v = k.where(seen, 0.0), v.where(seen, 0.0)
            block_mask = _block_mask(mask)
        found = _kernel()(
            q,
            k,
            v,
            score_mod=_score_mod(call.pair_values(call.bias)),
            block_mask=block_mask,
            scale=call.scale,
            return_lse=call.return_lse,
        )
        return AttendResult(*found) if call.return_lse else AttendResult(found, None)


def _block_mask(mask: Tensor) -> BlockMask:
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask[batch % mask.shape[0], head % mask.shape[1], query, key]

    batch, heads, queries, keys = mask.shape
    return create_block_mask(visible, batch, heads, queries, keys, device=str(mask.device))


def _score_mod(bias: Tensor | None) -> Callable[..., Tensor] | None:
    if bias is None:
        return None

    def biased(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        sizes = bias.shape
        return score + bias[batch % sizes[0], head % sizes[1], query % sizes[2], key % sizes[3]]

    return biased


def _kernel() -> Callable[..., Any]:
    """FlexAttention itself inside a graph that is being compiled, else a compiled copy of it."""
    # Imported here, because it takes half a second and most calls run elsewhere.
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if torch.compiler.is_compiling() else _compiled()


@functools.cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)

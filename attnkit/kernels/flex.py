"""The flex backend: PyTorch's FlexAttention, which compiles a kernel for the layout."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from attnkit.kernels.backend import MeasuredBackend
from attnkit.kernels.call import AttendCall, AttendResult
from attnkit.kernels.costs import Work, pairs, whole_mask
from attnkit.layouts import Layout, RelativeTable
from attnkit.layouts.cache import cached

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Tokens of a tile that is left out where nobody sees it.
TILE = 128
# Pairs of tokens in a mask, or in a bias that is looked up for each: a gigabyte of a mask.
MOST = 2**30


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
        largest = _largest(call)
        if largest > MOST:
            reasons.append(
                f"it would make a tensor of {largest:,} pairs of tokens, and makes none of more than {MOST:,}; "
                "use a backend that makes none, such as gather"
            )
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
            mask, seen, *tiles = _remembered(layout, call.q.device)
            # As in the reference: values nobody sees must not reach the output as zero times NaN.
            k, v = k.where(seen, 0.0), v.where(seen, 0.0)
            block_mask = _block_mask(mask, *tiles)
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


def _tables(layout: Layout, device: torch.device) -> tuple[Tensor, ...]:
    """The mask of all pairs, bool (B or 1, heads or 1, Nq, Nk); which keys somebody sees, (B or 1, heads or 1, Nk, 1);
    and the tiles that are seen in part and whole, each as how many a row of tiles has and which."""
    mask = layout.to_mask(device)
    missing = (-mask.shape[3] % TILE, -mask.shape[2] % TILE)
    tiles = F.pad(mask, (0, missing[0], 0, missing[1])).unflatten(3, (-1, TILE)).unflatten(2, (-1, TILE))
    # Tokens that fill up the last tile are no pairs, so that it is seen in part at most.
    some, every = tiles.any(5).any(3), tiles.all(5).all(3)
    return (mask, mask.any(dim=-2)[..., None], *_listed(some & ~every), *_listed(every))


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    order = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.to(torch.int32)


def _remembered(layout: Layout, device: torch.device) -> tuple[Tensor, ...]:
    """The same, made once for layouts that depend on sizes only."""
    key = layout.made_of
    if key is None:
        return _tables(layout, device)
    return cached(("flex", key, str(device)), lambda: _tables(layout, device))


def _block_mask(mask: Tensor, *tiles: Tensor) -> BlockMask:
    from torch.nn.attention.flex_attention import BlockMask

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask[batch % mask.shape[0], head % mask.shape[1], query, key]

    sizes = (mask.shape[2], mask.shape[3])
    return BlockMask.from_kv_blocks(*tiles, BLOCK_SIZE=TILE, mask_mod=visible, seq_lengths=sizes)


def _largest(call: AttendCall) -> int:
    """Pairs in the largest tensor that is made of them; 0 where none is, or while sizes are symbolic."""
    if torch.compiler.is_compiling():
        return 0
    pairs = call.q.shape[2] * call.k.shape[2]
    masks = 0 if call.layout.full else call.layout.lead[0] * call.layout.lead[1]
    biases = call.bias.table.shape[0] if isinstance(call.bias, RelativeTable) else 0
    return max(masks, biases) * pairs


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

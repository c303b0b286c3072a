"""Other libraries: FlexAttention, NATTEN and xformers, each where it is installed and runs."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from attnkit_models.bench.case import Contender, refused


@functools.cache
def _flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_regions(
    leaves: tuple[Tensor, Tensor, Tensor], index: Tensor, sizes: tuple[int, int], regions: int
) -> Contender:
    """FlexAttention on tokens that are brought into the order of regions, so that whole tiles can be left out."""
    from torch.nn.attention.flex_attention import create_block_mask

    q = leaves[0]
    tokens = q.shape[2] // regions**2
    if q.device.type == "cpu" and q.shape[2] % 128:
        return refused(f"FlexAttention's CPU kernel needs tiles of 128 tokens, not {q.shape[2]} tokens")
    routed = torch.zeros(index.shape[0], regions**2, regions**2, dtype=torch.bool, device=q.device)
    routed.scatter_(2, index, True)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return routed[batch % routed.shape[0], query // tokens, key // tokens]

    mask = create_block_mask(visible, index.shape[0], None, q.shape[2], q.shape[2], device=q.device.type)
    cut = {"y": regions, "x": regions, "h": sizes[0] // regions, "w": sizes[1] // regions}

    def forward() -> Tensor:
        parts = [rearrange(one, "b m (y h x w) d -> b m (y x h w) d", **cut).contiguous() for one in leaves]
        if q.device.type == "cpu":
            parts = [one.detach() for one in parts]
        return rearrange(_flex()(*parts, block_mask=mask), "b m (y x h w) d -> b m (y h x w) d", **cut)

    return Contender(forward, leaves, trains=q.device.type != "cpu")


def natten_windows(leaves: tuple[Tensor, Tensor, Tensor], sizes: tuple[int, int], kernel: int) -> Contender:
    """NATTEN's neighborhood attention, whose windows move inside at the border: another function there."""
    try:
        natten = importlib.import_module("natten")
    except Exception as error:
        return refused(f"NATTEN does not import: {_first_line(error)}")

    def forward() -> Tensor:
        maps = [one.transpose(1, 2).unflatten(1, sizes) for one in leaves]
        return natten.na2d(*maps, kernel_size=kernel).flatten(1, 2).transpose(1, 2)

    return _tried(Contender(forward, leaves, same=False))


def xformers_windows(leaves: tuple[Tensor, Tensor, Tensor], permutation: Tensor, window: int) -> Contender:
    """xformers' memory-efficient attention under a block-diagonal mask, on permuted tokens."""
    try:
        ops = importlib.import_module("xformers.ops")
    except Exception as error:
        return refused(f"xformers does not import: {_first_line(error)}")
    batch, _, tokens, _ = leaves[0].shape
    whole, rest = divmod(tokens, window)
    lengths = ([window] * whole + [rest] * (rest > 0)) * batch
    mask = ops.fmha.BlockDiagonalMask.from_seqlens(lengths)
    back = permutation.argsort()

    def forward() -> Tensor:
        parts = [one.transpose(1, 2)[:, permutation].flatten(0, 1)[None] for one in leaves]
        out = ops.memory_efficient_attention(*parts, attn_bias=mask)
        return out[0].unflatten(0, (batch, tokens))[:, back].transpose(1, 2)

    return _tried(Contender(forward, leaves))


def _tried(contender: Contender) -> Contender:
    """The contender if its passes run on these inputs, else why not."""
    try:
        with torch.no_grad():
            contender.forward()
    except Exception as error:
        return refused(_first_line(error))
    try:
        torch.autograd.grad(contender.forward().sum(), list(contender.leaves))
    except Exception:
        contender.trains = False
    return contender


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"

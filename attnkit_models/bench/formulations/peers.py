"""Other libraries: NATTEN and xformers, each where it is installed and runs."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from attnkit_models.bench.case import Contender, refused


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

"""Scenes: calls of blocks on which configurations of Triton's kernels are timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import attnkit
from attnkit.kernels.ops.blocks import BLOCKS
from attnkit.kernels.triton.blocks import configs
from attnkit.layouts import Blocks

if TYPE_CHECKING:
    from attnkit_models.bench.tuning import Kernel

# Tokens along a side of the square regions that stand for each line of the table, and of windows that leave gaps.
SIDES = {16: 4, 32: 5, 64: 8, 128: 16}
RAGGED = {16: 3, 32: 5, 64: 7, 128: 10}
# Tokens along a side of the map that these windows do not divide, behind a class token.
RAGGED_MAP, PREFIX = 59, 1

Run = Callable[[], Sequence[Tensor]]


def routed(kernel: Kernel, device: torch.device, batch: int) -> Run:
    """Routed regions that fill their tiles, of whose operator or backward pass the kernel is a great part.

    Args:
        kernel: what is measured.
        device: where.
        batch: images at a time.
    """
    side = SIDES[kernel.tile]
    across = 64 // side * side
    regions, generator = across // side, torch.Generator(device).manual_seed(0)
    drawn = torch.rand(batch, regions**2, regions**2, generator=generator, device=device)
    index = drawn.topk(max(256 // side**2, 4)).indices
    layout = Blocks.from_regions(attnkit.Grid(across, across), regions, index, unique=True)
    return _run(kernel, layout, kernel.dtype, batch, generator)


def windows(kernel: Kernel, device: torch.device, batch: int) -> Run:
    """Windows that leave gaps in their tiles and at the edges of the map, beside a class token; a bias in float32, as
    models in half precision have it, gets its gradient too unless an index is needed. Arguments as for `routed`."""
    grid = attnkit.Grid(RAGGED_MAP, RAGGED_MAP, prefix=PREFIX)
    layout = Blocks.windows(grid, RAGGED[kernel.tile], device=device)
    if in_one_program(kernel):
        # By an index every window sees itself as well, and its gradients are those of the kernel that is tuned.
        count = layout.order.token.shape[2]
        layout = replace(layout, index=torch.arange(count, device=device).view(1, 1, count, 1))
    return _run(kernel, layout, torch.float32, batch, torch.Generator(device).manual_seed(0))


def in_one_program(kernel: Kernel) -> bool:
    """Whether windows of a line would get their gradients from another kernel, which the table has nothing for."""
    tokens, width = configs.WINDOW[kernel.dtype.itemsize]
    return kernel.direction != "forward" and kernel.tile <= tokens and kernel.head_dim <= width


SCENES = (routed, windows)


def _run(kernel: Kernel, layout: Blocks, bias_dtype: torch.dtype, batch: int, generator: torch.Generator) -> Run:
    """The operator, or its backward pass, on q, k and v as a fused projection leaves them."""
    device, backward, width = generator.device, kernel.direction != "forward", kernel.head_dim
    shape = (batch, layout.num_queries, 3, 8, width)
    made = torch.randn(shape, generator=generator, device=device, dtype=kernel.dtype).permute(2, 0, 3, 1, 4)
    leaves = [one.requires_grad_(backward) for one in made]
    order, bias = layout.order, None
    if kernel.bias:
        pairs = (1, 8, 1, order.token.shape[3], layout.key_slots)
        bias = torch.randn(pairs, generator=generator, device=device, dtype=bias_dtype)
        if layout.index is None:
            leaves.append(bias.requires_grad_(backward))
    padded = [order.padded, order.padded]
    cuts = (order.token, order.slot, order.token, order.slot, layout.index, None)
    tables = (*cuts, bias, layout.prefix, padded, width**-0.5, None)
    if not backward:
        return lambda: [BLOCKS.op(*leaves[:3], *tables)[0]]
    out = BLOCKS.op(*leaves[:3], *tables)[0]
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

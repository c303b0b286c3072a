"""Rows whose channels lie farther apart than kernels count in 32 bits."""

from __future__ import annotations

import pytest
import torch

from attnkit import Grid, attend
from attnkit.kernels.triton import launch
from attnkit.kernels.triton.blocks import op as blocks
from attnkit.kernels.triton.stencil import op as stencil
from attnkit.kernels.triton.token_sets import op as token_sets
from attnkit.layouts import Blocks, Stencil, TokenSets
from attnkit.testing import random_qkv, random_tensor

LAYOUTS = {
    "blocks": Blocks.windows(Grid(4, 4), 2),
    "stencil": Stencil(Grid(4, 4), 3, border="clamp"),
    "token sets": TokenSets(torch.arange(16).view(1, 1, 16, 1) // torch.tensor([1, 2]), 16),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_they_are_put_in_order_and_their_gradients_lie_as_they_do(name, monkeypatch):
    given = [one.transpose(2, 3).contiguous().transpose(2, 3) for one in random_qkv((16, 16), dtype=torch.float32)]
    bias = random_tensor(1, 1, 16, 16, seed=3, dtype=torch.float32)
    found, copied = [], []

    def watched(tensor, axes=1):
        near = launch.within_reach(tensor, axes)
        copied.append(near is not tensor)
        return near

    for one in (blocks, stencil, token_sets):
        monkeypatch.setattr(one, "within_reach", watched)
    for reach in (2**31, 8):
        monkeypatch.setattr(launch, "REACH", reach)
        copied.clear()
        tensors = [one.detach().requires_grad_() for one in (*given, bias)]
        q, k, v, added = tensors
        out = attend(q, k, v, LAYOUTS[name], bias=added, backend="triton")
        found.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
        # q, k and v, forward and backward.
        assert sum(copied) >= 6 if reach == 8 else not any(copied)
    assert given[0].stride(3) == 16
    assert all(torch.equal(one, other) and one.stride() == other.stride() for one, other in zip(*found, strict=True))

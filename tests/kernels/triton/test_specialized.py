"""Kernels of blocks are compiled once for images and batches of any size."""

from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch

from attnkit.kernels.ops.blocks import BlockTables

compiles = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def launches(side, batch, routed):
    """Forward and backward of an image cut into windows of 7 x 7 tokens, from tensors without data."""
    from attnkit.kernels.triton.blocks.launches import backward_of, forward_of

    def made(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    tokens, count = side * side, (side // 7) ** 2
    q, k, v = made(batch, tokens, 3, 4, 32).permute(2, 0, 3, 1, 4)
    token, slot = made(1, 1, count, 49, dtype=torch.int64), made(1, 1, tokens, dtype=torch.int64)
    index = made(batch, 1, count, 4, dtype=torch.int64) if routed else None
    bias = None if routed else made(1, 4, 1, 49, 49, dtype=torch.float32)
    tables = BlockTables(token, slot, token, slot, index, None, bias, 0, [False, False], 0.1)
    first = forward_of(q, k, v, tables, "sm_90")
    given = (torch.empty_like(first.out), None, first.out, first.total, first.peak, q, k, v)
    return [first.launch, *backward_of(*given, tables, [True, True, True, not routed], "sm_90").launches]


@compiles
@pytest.mark.parametrize("routed", [False, True])
def test_compiled_once_for_all_sizes(routed):
    from attnkit.kernels.triton import ahead

    found: dict[str, set[str]] = {}
    for side, batch in itertools.product((28, 35, 42, 56, 63, 70, 112), (1, 2, 3, 8)):
        for launch in launches(side, batch, routed):
            source, _, options = ahead._source(launch, ahead.TARGETS["sm_90"])
            special = str((source.signature, source.constants, source.attrs, options))
            found.setdefault(launch.kernel.__name__, set()).add(special)
    assert len(found) == (4 if routed else 3)
    assert {name: len(ways) for name, ways in found.items()} == dict.fromkeys(found, 1)

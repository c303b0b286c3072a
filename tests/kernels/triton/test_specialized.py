"""Kernels of blocks and token sets are compiled once for images and batches of any size."""

from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch

from attnkit.kernels.ops.blocks import BlockTables
from attnkit.kernels.ops.token_sets import SetTables

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


def launches_of_sets(side, batch, masked):
    """Forward and backward under a mask of each head, or behind a class token under lists of every eighth key."""
    from attnkit.kernels.triton.launch import Launch
    from attnkit.kernels.triton.token_sets.launches import backward_of, forward_of

    def made(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    prefix, rows = (0 if masked else 1), side * side
    tokens = prefix + rows
    q, k, v = made(batch, tokens, 3, 4, 32).permute(2, 0, 3, 1, 4)
    columns, dtype = (tokens, torch.bool) if masked else (rows // 8, torch.int32)
    table, order = made(batch, 4, rows, columns, dtype=dtype), made(batch, 4, rows, dtype=torch.int32)
    tables = SetTables(table, None, None, prefix, prefix, 0.1, order)
    first = forward_of(q, k, v, tables, "sm_90")
    given = (torch.empty_like(first.out), None, first.out, first.total, first.peak, q, k, v, tables)
    steps = [*first.steps, *backward_of(*given, [True, True, True, False], "sm_90").steps]
    return [step for step in steps if isinstance(step, Launch)]


def variants(made, *rest):
    """How often each kernel would be compiled for images and batches of many sizes, by name, and for lists by whose."""
    from attnkit.kernels.triton import ahead

    found: dict[str, set[str]] = {}
    for side, batch in itertools.product((28, 35, 42, 56, 63, 70, 112), (1, 2, 3, 8)):
        for launch in made(side, batch, *rest):
            source, _, options = ahead._source(launch, ahead.TARGETS["sm_90"])
            name = launch.kernel.__name__ + " of keys" * bool(launch.constants.get("TURNED"))
            # The backward pass has lists made with another result.
            name += " and seers" * (launch.arguments.get("seers") is not None)
            special = str((source.signature, source.constants, source.attrs, options))
            found.setdefault(name, set()).add(special)
    return {name: len(ways) for name, ways in found.items()}


@compiles
@pytest.mark.parametrize("routed", [False, True])
def test_compiled_once_for_all_sizes(routed):
    found = variants(launches, routed)
    assert len(found) == (4 if routed else 3)
    assert found == dict.fromkeys(found, 1)


@compiles
@pytest.mark.parametrize("masked", [False, True])
def test_token_sets_too(masked):
    """But that what reads bytes of a mask, or writes them, takes 16 at a time where rows are as long."""
    found = variants(launches_of_sets, masked)
    lists = [f"token_set_unions{whose}" for whose in ("", " and seers", " of keys")]
    others = [f"token_sets_{name}" for name in ("forward", "query_gradient", "key_gradient")]
    marks = {} if masked else {"token_set_marks": 2}
    assert found == {**marks, **dict.fromkeys(lists, 2 if masked else 1), **dict.fromkeys(others, 1)}

"""Calls that cannot be: one sentence each, before anything is computed."""

from __future__ import annotations

import pytest
import torch

from attnkit import AttnkitError, Conv, Grid, HeadMix, attend
from attnkit.errors import ShapeError
from attnkit.layouts import Blocks, Dense, RelativeTable, Stencil, TokenMask

GRID = Grid(2, 2)


def qkv(shape=(2, 2, 4, 3), dtype=torch.float32, device="cpu"):
    return [torch.ones(shape, dtype=dtype, device=device) for _ in range(3)]


def called(*changed, layout=None, **extra):
    """attend on good tensors of which some are replaced, None standing for the good one."""
    good = qkv()
    tensors = [
        one if other is None else other for one, other in zip(good, [*changed, None, None, None][:3], strict=True)
    ]
    return lambda: attend(*tensors, Dense(4) if layout is None else layout, **extra)


def ones(*shape, **kind):
    return torch.ones(shape, **kind)


BOOL = {"dtype": torch.bool}

MISTAKES = {
    "no tensor": (called(3.0), r"as tensors, but got 3\.0 as q"),
    "a list": (called(None, [1, 2]), r"as tensors, but got \[1, 2\] as k"),
    "three axes": (called(ones(2, 4, 3)), r"shape \(B, heads, N, D\), but got q \(2, 4, 3\)"),
    "a scalar": (called(ones()), r"shape \(B, heads, N, D\), but got q \(\)"),
    "another batch": (called(ones(1, 2, 4, 3)), r"to agree, but got q \(1, 2, 4, 3\)"),
    "other heads": (called(None, ones(2, 1, 4, 3)), r"to agree, but got .* k \(2, 1, 4, 3\)"),
    "fewer values than keys": (called(None, None, ones(2, 2, 3, 3)), r"to agree, but got .* v \(2, 2, 3, 3\)"),
    "other widths": (called(ones(2, 2, 4, 5)), r"to agree, but got q \(2, 2, 4, 5\)"),
    "no heads": (called(*qkv((2, 0, 4, 3))), r"at least one head and widths >= 1"),
    "no width": (called(*qkv((2, 2, 4, 0))), r"at least one head and widths >= 1"),
    "values without width": (called(None, None, ones(2, 2, 4, 0)), r"at least one head and widths >= 1"),
    "integers": (called(*qkv(dtype=torch.int64)), r"floating q and k of one dtype .* torch\.int64"),
    "integer values": (called(None, None, ones(2, 2, 4, 3, dtype=torch.int32)), r"floating v, .* torch\.int32"),
    "two dtypes": (called(ones(2, 2, 4, 3, dtype=torch.float64)), r"of one dtype .* torch\.float64, torch\.float32"),
    "two devices": (called(ones(2, 2, 4, 3, device="meta")), r"on one device, but got meta, cpu and cpu"),
    "more queries than the layout": (
        called(layout=Dense(3, 4)),
        r"is for 3 queries and 4 keys, but got q \(2, 2, 4, 3\)",
    ),
    "a grid of other tokens": (called(layout=Stencil(Grid(3, 3), 3)), r"stencil layout is for 9 queries and 9 keys"),
    "no layout": (
        called(layout=ones(4, 4, **BOOL)),
        r"needs a layout such as attnkit\.layouts\.TokenMask\(mask\), but got torch\.bool \(4, 4\)",
    ),
    "layout of another batch": (
        called(layout=TokenMask(ones(3, 1, 4, 4, **BOOL))),
        r"varies over 3 items, but got .* of 2",
    ),
    "layout of other heads": (
        called(layout=Blocks.from_regions(GRID, 2, torch.zeros(1, 3, 4, 1, dtype=torch.int64))),
        r"blocks layout varies over 3 heads, but got .* of 2",
    ),
    "key mask of another batch": (called(layout=Dense(4).restrict(ones(3, 4, **BOOL))), r"varies over 3 items"),
    "layout elsewhere": (called(layout=Dense(4).restrict(ones(4, device="meta", **BOOL))), r"lies on meta, but .* cpu"),
    "windows elsewhere": (called(layout=Blocks.windows(GRID, 2, device="meta")), r"blocks layout lies on meta"),
    "scale by name": (called(scale="head"), r"finite number as scale, .* but got 'head'"),
    "scale as a truth value": (called(scale=True), r"finite number as scale, .* but got True"),
    "scale as a tensor": (called(scale=ones(2, 2)), r"finite number as scale, .* but got torch\.float32 \(2, 2\)"),
    "an array": (called(ones(2, 2, 4, 3).numpy()), r"as tensors, but got ndarray float32 \(2, 2, 4, 3\) as q"),
    "scale of more digits than fit": (called(scale=10**30), r"finite number as scale, .* but got 1000000"),
    "infinite scale": (called(scale=float("inf")), r"finite number as scale"),
    "scale that is no number": (called(scale=float("nan")), r"finite number as scale"),
    "bias of another size": (called(bias=ones(1, 2, 4, 5)), r"bias must be floating and broadcast .* \(1, 2, 4, 5\)"),
    "bias of two axes": (called(bias=ones(4, 4)), r"bias must be floating and broadcast .* \(4, 4\)"),
    "bias of bools": (called(bias=ones(1, 1, 4, 4, **BOOL)), r"bias must be floating .* torch\.bool"),
    "bias elsewhere": (called(bias=ones(1, 1, 4, 4, device="meta")), r"bias lies on meta, but q, k and v lie on cpu"),
    "bias as a number": (called(bias=1.0), r"bias must be a tensor or a RelativeTable, but got 1\.0"),
    "gain of another batch": (called(gain=ones(3, 1, 1, 1)), r"gain must be floating and broadcast .* \(3, 1, 1, 1\)"),
    "gain of integers": (called(gain=ones(1, 1, 1, 1, dtype=torch.int64)), r"gain must be floating .* torch\.int64"),
    "table of other heads": (called(bias=RelativeTable(ones(3, 3, 3), GRID)), r"relative table for 3 heads, 4 queries"),
    "table of another grid": (
        called(gain=RelativeTable(ones(2, 3, 3), Grid(3, 3))),
        r"gain is a relative table .* 9 keys",
    ),
    "table of another stride": (
        called(bias=RelativeTable(ones(2, 3, 3), GRID, 2)),
        r"1 queries and 4 keys, but the call",
    ),
    "table elsewhere": (called(bias=RelativeTable(ones(2, 3, 3, device="meta"), GRID)), r"bias lies on meta"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence(mistake):
    call, message = MISTAKES[mistake]
    with pytest.raises(AttnkitError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


WRONG = [True, float("nan"), "x", [], [[1.0]], (3,), {"a": 1}, object(), GRID, ones(2, 2), Dense(3), Dense]


@pytest.mark.parametrize("at", [0, 1, 2, 3, "scale", "bias", "gain", "backend"])
def test_a_wrong_value_is_answered_by_a_sentence(at):
    for wrong in WRONG:
        args, extra = [*qkv(), Dense(4)], {}
        if isinstance(at, int):
            args[at] = wrong
        else:
            extra[at] = wrong
        with pytest.raises(AttnkitError) as caught:
            attend(*args, **extra)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_swapped_axes_are_told_beside_the_way_back():
    swapped = torch.ones(1, 16, 2, 4)
    with pytest.raises(ShapeError, match=r"becomes \(B, heads, N, D\) by transpose\(1, 2\)"):
        attend(swapped, swapped, swapped, Dense(16))
    other = torch.ones(1, 2, 9, 4)
    with pytest.raises(ShapeError) as told:
        attend(other, other, other, Dense(16))
    assert "transpose" not in str(told.value)


@pytest.mark.parametrize(("tokens", "shown"), [(196, "attnkit.Grid(14, 14)"), (200, "attnkit.Grid(height, width)")])
def test_tokens_without_a_grid_are_told_how_to_pass_one(tokens, shown):
    mix = HeadMix(8, [Conv(heads=1)])
    with pytest.raises(ShapeError) as told:
        mix(torch.ones(1, tokens, 8))
    assert f"`layer(x, {shown})`" in str(told.value)


def test_shape_errors_are_shape_errors():
    with pytest.raises(ShapeError):
        called(ones(2, 4, 3))()


def test_the_good_call_is_good():
    assert called()().shape == (2, 2, 4, 3)
    assert called(bias=ones(1, 1, 1, 1), gain=RelativeTable(ones(2, 3, 3), GRID))().shape == (2, 2, 4, 3)

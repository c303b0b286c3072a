"""Law 7: moved by a period the image gives the moved output, and what is padded and cropped again is unchanged."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from attnkit.grid import Grid
from attnkit.kernels.call import AttendCall
from attnkit.layouts import TokenMask
from attnkit.testing.cases import AttentionCase, PrimitiveCase
from attnkit.testing.laws.equals_dense import answer
from attnkit.testing.laws.law import Law, NothingToSay, agree, agree_all
from attnkit.testing.oracle import pair_values
from attnkit.testing.subject import Subject
from attnkit.testing.tensors import random_tensor


def primitive(case: PrimitiveCase) -> None:
    """An image in a larger canvas of masked tokens, one to two periods away from its corner, gives what it gives alone.

    So pad, run, crop is run, and translation by the period is an equivariance.
    """
    case = dataclasses.replace(case, dtype="float64", masked=False, batch=max(case.batch, 1))
    grid = case.grid
    period = case.options.period(grid)
    if period is None:
        raise NothingToSay("promises no period")
    times = [case.seed // 3**axis % 3 for axis in range(grid.ndim)]
    start = tuple(step * one for step, one in zip(period, times, strict=True))
    room = tuple(case.seed // 5**axis % 4 for axis in range(grid.ndim))
    canvas = Grid(*(sum(one) for one in zip(start, grid.sizes, room, strict=True)), prefix=grid.prefix)
    inside = _spots(canvas, start, grid.sizes)
    subject = Subject(case)
    moved = {}
    for at, (name, one) in enumerate(subject.leaves.items()):
        larger = random_tensor(*one.shape[:-2], canvas.tokens, one.shape[-1], seed=case.seed + at + 50)
        larger[..., inside, :] = one.detach()
        moved[name] = larger
    mask = torch.zeros(case.batch, canvas.tokens, dtype=torch.bool)
    mask[:, inside] = True
    inputs = dataclasses.replace(subject.inputs(**moved), grid=canvas, token_mask=mask)
    found, alone = subject.run(inputs), subject.run()
    stride, scale = case.options.output_stride(), case.options.output_scale()
    outside = tuple(one // stride * scale for one in start)
    rows = _spots(found.grid, outside, alone.grid.sizes)
    agree(found.out[:, :, rows], alone.out, f"in a canvas {canvas} at {start}, the output")


def _spots(canvas: Grid, start: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    """Numbers of the canvas' tokens in the prefix and in a part of the image."""
    spots = torch.arange(canvas.prefix, canvas.tokens).view(canvas.sizes)
    for axis, (first, size) in enumerate(zip(start, sizes, strict=True)):
        spots = spots.narrow(axis, first, size)
    return torch.cat([torch.arange(canvas.prefix), spots.flatten()])


def attention(case: AttentionCase) -> None:
    """Masked keys might as well not be there."""
    case = dataclasses.replace(case, dtype="float64")
    call = case.call()
    keys = call.layout.num_keys
    kept = random_tensor(keys, seed=case.seed + 3) < 0.6
    kept[case.seed % keys] = True
    masked = answer(call.replace(layout=call.layout.restrict(kept)), case.backend)
    cropped_mask = TokenMask(call.layout.to_mask()[..., kept])
    layout = cropped_mask.lower("token_sets" if case.backend == "gather" else "token_mask")
    bias, gain = (_columns(pair_values(one), kept) for one in (call.bias, call.gain))
    cropped = AttendCall(
        call.q, call.k[:, :, kept], call.v[:, :, kept], layout, call.scale, bias, gain, call.return_lse
    )
    right = answer(cropped, case.backend)
    agree_all(masked, right, ["the output with keys masked", "its lse"][: len(right)])


def _columns(pairs: Tensor | None, kept: Tensor) -> Tensor | None:
    return None if pairs is None else pairs if pairs.shape[-1] == 1 and len(kept) != 1 else pairs[..., kept]


LAW = Law(
    7,
    "translation",
    "Where a period is promised, moving the image moves the output; padding a call and cropping it changes nothing.",
    primitive,
    attention,
)

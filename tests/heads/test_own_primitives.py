"""Primitives of others: what they may leave out, and one sentence that names the primitive for each mistake in them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch

from attnkit import AttnkitError, Conv, Grid, HeadMix
from attnkit.layouts import Dense
from attnkit.primitives import (
    Columns,
    HeadGroup,
    HeadOutput,
    Plan,
    PrimitiveOptions,
    SoftmaxHeads,
    SoftmaxOptions,
)
from attnkit.testing import random_tensor

GRID = Grid(3, 4, prefix=1)


class OwnHeads(HeadGroup):
    def __init__(self, give):
        super().__init__()
        self.give = give

    def forward(self, inputs):
        return self.give(inputs)


@dataclass(frozen=True)
class Own(PrimitiveOptions):
    """Gives its values, unless told to give something else."""

    kind: ClassVar[str] = "own"

    give: Any = field(default=lambda inputs: HeadOutput(inputs.v, inputs.grid))
    has: Any = None
    makes: Any = OwnHeads
    stride: int = 1

    def columns(self, context):
        return Columns(v=2 * context.head_dim) if self.has is None else self.has(context)

    def output_stride(self):
        return self.stride

    def build(self, context):
        return self.makes(self.give)


class OwnSoftmaxHeads(SoftmaxHeads):
    def plan(self, inputs):
        return self.options.give(inputs)


@dataclass(frozen=True)
class OwnSoftmax(SoftmaxOptions):
    """Full attention, unless told to plan something else."""

    kind: ClassVar[str] = "own_softmax"

    give: Any = field(default=lambda inputs: Plan(Dense(inputs.grid.tokens)))
    has: Any = None

    def columns(self, context):
        return super().columns(context) if self.has is None else self.has(context)

    def build(self, context):
        return OwnSoftmaxHeads(self, context)


class Nameless(Own):
    kind: ClassVar[str] = ""


def rows(seed=0, grad=False):
    return random_tensor(2, 13, 12, seed=seed, dtype=torch.float32, grad=grad)


def test_without_mistakes_they_run():
    x = rows()
    mix = HeadMix(12, [Own(2), OwnSoftmax(1), Conv(3)])
    assert mix(x, GRID).shape == x.shape
    assert HeadMix(12, [Own(2, has=lambda _: Columns())], head_dim=3).qkv is None


def test_without_mistakes_they_compile_to_one_graph():
    torch.compiler.reset()
    mix = HeadMix(12, [Own(2), OwnSoftmax(1), Conv(3)])
    compiled = torch.compile(lambda x: mix(x, GRID), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rows()), mix(rows(), GRID))


def columns(returned):
    return lambda: HeadMix(12, [Own(2, has=lambda _: returned)])


BUILD = {
    "columns of nothing": (columns(None), r"primitive 'own': columns\(\) must return Columns .* but returned None"),
    "columns as numbers": (columns((0, 0, 4)), r"primitive 'own': columns\(\) .* but returned \(0, 0, 4\)"),
    "columns that make no heads": (
        columns(Columns(v=5)),
        r"divide into 2 heads, but returned Columns\(q=0, k=0, v=5\)",
    ),
    "fewer columns than none": (columns(Columns(q=-2)), r"numbers >= 0 .* but returned Columns\(q=-2"),
    "a fraction of columns": (columns(Columns(v=4.0)), r"but returned Columns\(q=0, k=0, v=4\.0\)"),
    "a group of nothing": (
        lambda: HeadMix(12, [Own(2, makes=lambda _: None)]),
        r"primitive 'own': build\(\) must return a HeadGroup, but returned None",
    ),
    "a module that is no group": (
        lambda: HeadMix(12, [Own(2, makes=lambda _: torch.nn.Linear(2, 2))]),
        r"build\(\) must return a HeadGroup, but returned a Linear",
    ),
    "a class instead of a group": (
        lambda: HeadMix(12, [Own(2, makes=lambda _: OwnHeads)]),
        r"but returned the class OwnHeads",
    ),
    "softmax without queries": (
        lambda: HeadMix(12, [OwnSoftmax(2, has=lambda _: Columns(v=4))]),
        r"primitive 'own_softmax': softmax needs queries, but columns\(\) asked for Columns\(q=0",
    ),
    "one without a kind": (lambda: HeadMix(12, [Nameless(2, has=lambda _: 0)]), r"primitive 'Nameless': columns"),
}


@pytest.mark.parametrize("mistake", BUILD)
def test_building(mistake):
    make, message = BUILD[mistake]
    with pytest.raises(AttnkitError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def gives(give, **more):
    return Own(2, give=give, **more)


def plans(give, **more):
    return OwnSoftmax(2, give=give, **more)


RUN = {
    "nothing": (gives(lambda _: None), r"primitive 'own': forward\(\) must return a HeadOutput, but returned None"),
    "a bare tensor": (gives(lambda inputs: inputs.v), r"must return a HeadOutput, but returned a Tensor"),
    "an output of nothing": (
        gives(lambda inputs: HeadOutput(None, inputs.grid)),
        r"must return HeadOutput\(out, grid\), but out is None",
    ),
    "heads behind tokens": (
        gives(lambda inputs: HeadOutput(inputs.v.transpose(1, 2), inputs.grid)),
        r"primitive 'own': .* \(B, heads, N', D\) = \(2, 2, 13, 6\), but returned \(2, 13, 2, 6\)",
    ),
    "no prefix": (
        gives(lambda inputs: HeadOutput(inputs.v[:, :, 1:], inputs.grid)),
        r"= \(2, 2, 13, 6\), but returned \(2, 2, 12, 6\)",
    ),
    "another grid": (
        gives(lambda inputs: HeadOutput(inputs.v[:, :, 1:], Grid(3, 4))),
        r"'own': forward\(\) returned the grid Grid\(3, 4\), "
        r"but output_stride\(\) and output_scale\(\) promise Grid\(3, 4, prefix=1\)",
    ),
    "a promised stride that is not kept": (
        gives(lambda inputs: HeadOutput(inputs.v, inputs.grid), stride=2),
        r"returned the grid Grid\(3, 4, prefix=1\), "
        r"but output_stride\(\) and output_scale\(\) promise Grid\(2, 2, prefix=1\)",
    ),
    "keys nobody asked for": (
        gives(lambda inputs: HeadOutput(inputs.qkv[0], inputs.grid)),
        r"columns\(\) did not ask for q, k$",
    ),
    "a plan of nothing": (
        plans(lambda _: None),
        r"primitive 'own_softmax': plan\(\) must return a Plan, but returned None",
    ),
    "a layout instead of a plan": (plans(lambda _: Dense(13)), r"must return a Plan, but returned a Dense"),
    "a mask instead of a layout": (plans(lambda _: Plan(torch.ones(13, 13) > 0)), r"but its layout is a Tensor"),
    "a layout without prefix": (
        plans(lambda _: Plan(Dense(12))),
        r"'own_softmax': plan\(\) returned a dense layout for 12 queries and 12 keys, but there are 13 and 13",
    ),
    "no keys": (
        plans(lambda _: Plan(Dense(13)), has=lambda context: Columns(q=2 * context.head_dim)),
        r"primitive 'own_softmax': softmax needs q, k and v, from columns\(\) or",
    ),
    "no values to enhance": (
        plans(
            lambda inputs: Plan(Dense(13), keys=(inputs.q, inputs.q)),
            has=lambda context: Columns(q=2 * context.head_dim),
            lepe=3,
        ),
        r"primitive 'own_softmax': lepe_on='v' needs values, but columns\(\) asked for none",
    ),
}


@pytest.mark.parametrize("mistake", RUN)
def test_running(mistake):
    options, message = RUN[mistake]
    mix = HeadMix(12, [options])
    with pytest.raises(AttnkitError, match=message) as caught:
        mix(rows(), GRID)
    assert str(caught.value).count("\n") == 0 or "tensor(" in str(caught.value)

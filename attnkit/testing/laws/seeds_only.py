"""Law 12: the same seed gives the same result, whatever ran before; the global random state is left alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from attnkit.errors import AttnkitError
from attnkit.grid import Grid
from attnkit.heads import HeadMix
from attnkit.kernels.dispatch import recording, use_backend
from attnkit.layouts import Stencil
from attnkit.layouts.cache import forget
from attnkit.primitives import SoftmaxOptions
from attnkit.testing.cases import AttentionCase, PrimitiveCase
from attnkit.testing.laws.equals_dense import answer
from attnkit.testing.laws.law import Law, require
from attnkit.testing.subject import Subject

# Chance patterns differ between any two of this many draws, but two alone may happen to be equal on small grids.
DRAWS = 12


def primitive(case: PrimitiveCase) -> None:
    """Bit for bit the same under any global seed; what is random differs from draw to draw and layer to layer."""
    found = []
    for seed in (1, 2):
        subject = Subject(case)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(subject.run().out)
        require(torch.equal(torch.get_rng_state(), before), "a run changes the global random state")
        found.append(subject.run().out)
    for one in found[1:]:
        require(torch.equal(one, found[0]) or _both_nan(one, found[0]), "two runs on the same inputs differ")
    _remembered(case)
    _remembered_by_itself(case)
    if subject.group.stochastic:
        _random(case)


def _remembered(case: PrimitiveCase) -> None:
    """Tables that are kept between calls are those of their own call."""
    subject = Subject(case)
    grid = case.grid
    others = [Grid(*grid.sizes, prefix=max(grid.prefix - 1, 0)), Grid(*reversed(grid.sizes), prefix=grid.prefix)]
    for backend in ("reference", "gather,reference"):
        outs = []
        for before in ([], others):
            forget()
            with use_backend(backend):
                for one in before:
                    try:
                        Subject(dataclasses.replace(case, grid=one)).run()
                    except AttnkitError:
                        # Not every primitive takes every grid.
                        continue
                outs.append(subject.run().out)
        forget()
        same = torch.equal(outs[1], outs[0]) or _both_nan(outs[1], outs[0])
        require(same, f"on {backend}, a run on {others[0]} or {others[1]} changes the next one on {grid}")


def _remembered_by_itself(case: PrimitiveCase) -> None:
    """A group that has run on other grids and numbers gives what one gives that has never run."""
    grid = case.grid
    ones = (1,) * (grid.ndim - 1)
    others = [
        # As many tokens, but they lie in another way; with and without as many of them in front.
        Grid(*reversed(grid.sizes), prefix=grid.prefix),
        Grid(*ones, grid.image_tokens, prefix=grid.prefix),
        Grid(grid.image_tokens, *ones, prefix=grid.prefix),
        Grid(*ones, grid.tokens),
        # Another size; and the very grid, but other numbers.
        Grid(grid.sizes[0] + 1, *grid.sizes[1:], prefix=grid.prefix),
        grid,
    ]
    fresh, worn = Subject(case), Subject(case)
    forget()
    out = fresh.run().out
    for other in dict.fromkeys(others):
        before = Subject(dataclasses.replace(case, grid=other, seed=case.seed + 1, masked=not case.masked))
        before.group = worn.group
        try:
            before.run()
        except AttnkitError:
            continue
        forget()
        found = worn.run().out
        same = torch.equal(found, out) or _both_nan(found, out)
        require(same, f"after a run of the same heads on {other}, the one on {grid} is another")


def _random(case: PrimitiveCase) -> None:
    subject = Subject(dataclasses.replace(case, training=True, masked=False, dtype="float64", batch=1))

    def pattern(subject: Subject, draw: int | None) -> Tensor:
        inputs = dataclasses.replace(subject.inputs(), draw=None if draw is None else torch.tensor(draw))
        return torch.cat([call.layout.to_mask().flatten() for call, _ in subject.calls(inputs)])

    calls = subject.calls()
    if not calls:
        return
    fixed = pattern(subject, None)
    require(torch.equal(pattern(subject, None), fixed), "evaluation is random")
    layouts = [call.layout for call, _ in calls]
    counts = [one.visible()[..., one.global_queries :] - one.global_keys for one in layouts]
    if fixed.all() or case.grid.image_tokens < 4 or all(int(one.max()) <= 1 for one in counts):
        # There is nothing to choose from.
        return
    # A primitive may keep its draw for some passes, or for ever.
    often = int(getattr(case.options, "resample", 1))
    draws = [pattern(subject, draw * max(often, 1)) for draw in range(DRAWS)]
    require(_some_differ(draws) or not often, f"{DRAWS} training draws are the same")
    require(bool(often) or not _some_differ(draws), "training draws, though nothing is to be resampled")
    forget()
    again = [pattern(subject, draw) for draw in (3 * often, 3 * often + max(often - 1, 0), None)]
    require(torch.equal(again[0], draws[3]), "what training draws depends on what ran before")
    require(torch.equal(again[1], draws[3]), f"training draws anew before {often} passes are over")
    require(torch.equal(again[2], fixed), "what evaluation sees depends on what training drew before")
    for what, layers, groups in (("layer", DRAWS, 1), ("group", 1, DRAWS)):
        numbered = [one for layer in range(layers) for one in _in_a_mix(case, layer, groups)]
        require(_some_differ(numbered), f"{DRAWS} {what}s draw the same")
    if any(field.name == "seed" for field in dataclasses.fields(case.options)):
        for step in (1, 2**31):
            seeds = [dataclasses.replace(case.options, seed=step * number) for number in range(DRAWS)]
            patterns = []
            for options in seeds:
                subject.group = options.build(subject.context).double()
                patterns.append(pattern(subject, None))
            require(_some_differ(patterns), f"{DRAWS} seeds, {step} apart, draw the same")


def _in_a_mix(case: PrimitiveCase, layer: int, groups: int) -> list[Tensor]:
    """What the first attention of each of several like groups sees in a layer of a model."""
    options = case.options
    if isinstance(options, SoftmaxOptions):
        # One that convolves all channels of the input would fit one group only.
        options = dataclasses.replace(options, lepe=0)
    mix = HeadMix(options.heads * groups, [options] * groups, layer=layer).eval()
    with recording() as choices:
        mix(torch.zeros(1, case.grid.tokens, mix.dim), case.grid)
    return [choice.call.layout.to_mask() for choice in choices[:: len(choices) // groups]]


def _some_differ(patterns: Sequence[Tensor]) -> bool:
    return any(not torch.equal(one, patterns[0]) for one in patterns[1:])


def _both_nan(one: Tensor, other: Tensor) -> bool:
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def attention(case: AttentionCase) -> None:
    """Attention itself knows no chance, and layouts remember only what is their own."""
    before = torch.get_rng_state()
    first, second = (answer(case.call(), case.backend) for _ in range(2))
    require(torch.equal(torch.get_rng_state(), before), "attention changes the global random state")
    require(all(map(torch.equal, first, second)), "two runs on the same inputs differ")
    layout = case.layout()
    if isinstance(layout, Stencil):
        right = layout.to_mask()
        for other in _stencils(layout):
            forget()
            other.to_mask()
            require(torch.equal(layout.to_mask(), right), f"the mask of {other} changes that of {layout}")
        forget()


def _stencils(layout: Stencil) -> list[Stencil]:
    """Others that differ in one thing."""
    grid = Grid(*layout.grid.sizes, prefix=layout.grid.prefix + 1)
    border = "mask" if layout.border == "clamp" else "clamp"
    wider, steps, gaps = (
        tuple(one + 2 for one in layout.kernels),
        tuple(one + 1 for one in layout.strides),
        tuple(one + 1 for one in layout.dilations),
    )
    return [
        dataclasses.replace(layout, key_mask=None, **change)
        for change in ({"border": border}, {"kernel": wider}, {"stride": steps}, {"dilation": gaps}, {"grid": grid})
    ]


LAW = Law(
    12,
    "seeds_only",
    "The same seed gives the same result, whatever ran before, and the global random state is left alone.",
    primitive,
    attention,
)

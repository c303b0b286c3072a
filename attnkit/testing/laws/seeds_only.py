"""Law 12: the same seed gives the same result, other seeds another, and the global random state is left alone."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

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
    if subject.group.stochastic:
        _random(case)


def _random(case: PrimitiveCase) -> None:
    subject = Subject(dataclasses.replace(case, training=True, masked=False, dtype="float64", batch=1))

    def pattern(subject: Subject, draw: int | None) -> Tensor:
        inputs = dataclasses.replace(subject.inputs(), draw=None if draw is None else torch.tensor(draw))
        return torch.cat([call.layout.to_mask().flatten() for call, _ in subject.calls(inputs)])

    fixed = pattern(subject, None)
    require(torch.equal(pattern(subject, None), fixed), "evaluation is random")
    layouts = [call.layout for call, _ in subject.calls()]
    counts = [one.visible()[..., one.global_queries :] - one.global_keys for one in layouts]
    if fixed.all() or case.grid.image_tokens < 4 or all(int(one.max()) <= 1 for one in counts):
        # There is nothing to choose from.
        return
    # A primitive may keep its draw for some passes, or for ever.
    often = getattr(case.options, "resample", 1)
    draws = [pattern(subject, draw * often) for draw in range(DRAWS)]
    differ = any(not torch.equal(one, draws[0]) for one in draws[1:])
    require(differ or not often, f"{DRAWS} training draws are the same")
    for what in ("layer", "group"):
        others = []
        for number in range(DRAWS):
            context = dataclasses.replace(subject.context, **{what: number})
            subject.group = case.options.build(context).double()
            others.append(pattern(subject, None))
        require(any(not torch.equal(one, others[0]) for one in others[1:]), f"{DRAWS} {what}s draw the same")
    if any(field.name == "seed" for field in dataclasses.fields(case.options)):
        seeds = []
        for seed in range(DRAWS):
            subject.group = dataclasses.replace(case.options, seed=seed).build(subject.context).double()
            seeds.append(pattern(subject, None))
        require(any(not torch.equal(one, seeds[0]) for one in seeds[1:]), f"{DRAWS} seeds draw the same")


def _both_nan(one: Tensor, other: Tensor) -> bool:
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def attention(case: AttentionCase) -> None:
    """Attention itself knows no chance."""
    before = torch.get_rng_state()
    first, second = (answer(case.call(), case.backend) for _ in range(2))
    require(torch.equal(torch.get_rng_state(), before), "attention changes the global random state")
    require(all(map(torch.equal, first, second)), "two runs on the same inputs differ")


LAW = Law(
    12,
    "seeds_only",
    "The same seed gives the same result, and the global random state is left alone.",
    primitive,
    attention,
)

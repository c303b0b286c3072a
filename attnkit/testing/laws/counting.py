"""Law 13: counted multiply-adds are what the mask says, never more than dense, and grow with the budget."""

from __future__ import annotations

import dataclasses

from attnkit.kernels.call import AttendCall
from attnkit.layouts import Layout
from attnkit.testing.cases import AttentionCase, PrimitiveCase
from attnkit.testing.laws.law import NO_ATTENTION, Law, NothingToSay, require
from attnkit.testing.subject import Subject


def primitive(case: PrimitiveCase) -> None:
    """Every call of the primitive, and the same with the full budget."""
    case = dataclasses.replace(case, dtype="float64", masked=False)
    calls = [call for call, _ in Subject(case).calls()]
    if not calls:
        raise NothingToSay(NO_ATTENTION)
    for call in calls:
        _counts(call.layout)
    full = case.options.full_budget(case.grid)
    if full is not None:
        widest = [call for call, _ in Subject(dataclasses.replace(case, options=full)).calls()]
        require(_pairs(calls) <= _pairs(widest), "a full budget costs less than a smaller one")


def _pairs(calls: list[AttendCall]) -> int:
    return sum(call.layout.pairs(*call.layout.lead) * (call.q.shape[1] // call.layout.lead[1]) for call in calls)


def attention(case: AttentionCase) -> None:
    """Random layouts."""
    _counts(case.layout())


def _counts(layout: Layout) -> None:
    mask = layout.to_mask()
    # What does not vary over items or heads is counted for all of them.
    batch, heads = (2 if one == 1 else one for one in layout.lead)
    seen = int(mask.expand(batch, heads, -1, -1).sum())
    dense = batch * heads * layout.num_queries * layout.num_keys
    require(layout.pairs(batch, heads) == seen, f"pairs() gives {layout.pairs(batch, heads)}, but the mask has {seen}")
    visible, counted = layout.visible().expand(batch, heads, -1), mask.expand(batch, heads, -1, -1).sum(-1)
    require((visible == counted).all(), "visible() is not what the mask has per query")
    macs = layout.flops(3, 5, batch=batch, heads=heads)
    require(macs == seen * 8, f"flops(3, 5) gives {macs} multiply-adds, but the mask says {seen * 8}")
    require(macs <= dense * 8, "more multiply-adds are counted than dense attention takes")
    share = seen / dense if dense else 1.0
    require(abs(layout.density() - share) < 1e-9, f"density() gives {layout.density()}, but the mask says {share}")
    image = visible[..., layout.global_queries :]
    slots = layout.key_slots
    most = int(image.max()) if image.numel() else 0
    require(most <= slots, f"key_slots is {slots}, but a query sees {most} keys")


LAW = Law(
    13,
    "counting",
    "Counted multiply-adds are what the mask says, never more than dense, and grow with the budget.",
    primitive,
    attention,
)

"""Law 9: layout algebra agrees with boolean algebra on masks, and lowering keeps the mask."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from attnkit.layouts import Blocks, Layout, TokenMask, concat_heads, intersect, restrict, union
from attnkit.testing.cases import AttentionCase, PrimitiveCase
from attnkit.testing.laws.law import NO_ATTENTION, Law, NothingToSay, require
from attnkit.testing.subject import Subject
from attnkit.testing.tensors import random_tensor


def primitive(case: PrimitiveCase) -> None:
    """The layouts that the primitive makes."""
    subject = Subject(dataclasses.replace(case, dtype="float64"))
    calls = subject.calls()
    if not calls:
        raise NothingToSay(NO_ATTENTION)
    for call, _ in calls:
        _lowered(call.layout)
        _restricted(call.layout, case.seed)


def attention(case: AttentionCase) -> None:
    """Random layouts, with one of the same kind and with a token mask."""
    layout = case.layout()
    _lowered(layout)
    _restricted(layout, case.seed)
    same = dataclasses.replace(case, seed=case.seed + 1).layout()
    chances = random_tensor(case.heads, layout.num_queries, layout.num_keys, seed=case.seed)
    others = [same, layout, TokenMask(chances < 0.3)]
    if isinstance(layout, Blocks) and layout.index is not None and layout.key_order is None:
        others.append(dataclasses.replace(layout, index=None, unique=False))
    for other in others:
        if (other.num_queries, other.num_keys) != (layout.num_queries, layout.num_keys):
            continue
        one, two = layout.to_mask(), other.to_mask()
        _equal(union(layout, other), one | two, "a union")
        _equal(intersect(layout, other), one & two, "an intersection")
        wide = (max(one.shape[0], two.shape[0]), case.heads, -1, -1)
        _equal(
            concat_heads([(layout, case.heads), (other, case.heads)]),
            torch.cat([one.expand(wide), two.expand(wide)], dim=1),
            "heads side by side",
        )


def _lowered(layout: Layout) -> None:
    mask = layout.to_mask()
    require(mask.dtype == torch.bool and mask.ndim == 4, f"to_mask() gives {mask.dtype} {tuple(mask.shape)}")
    for kind in ("token_sets", "token_mask", layout.kind):
        _equal(layout.lower(kind), mask, f"a {layout.kind} layout lowered to {kind}")


def _restricted(layout: Layout, seed: int) -> None:
    keys = random_tensor(layout.num_keys, seed=seed + 7) < 0.5
    queries = random_tensor(layout.num_queries, seed=seed + 8) < 0.5
    mask = layout.to_mask()
    _equal(layout.restrict(keys), mask & keys, "a layout restricted to some keys")
    _equal(layout.restrict(keys).restrict(~keys), mask & False, "a layout restricted twice")
    both = mask & keys & queries[:, None]
    _equal(restrict(layout, keys=keys, queries=queries), both, "a layout restricted to some queries and keys")


def _equal(layout: Layout, mask: Tensor, what: str) -> None:
    found = layout.to_mask()
    shape = torch.broadcast_shapes(found.shape, mask.shape)
    require(torch.equal(found.expand(shape), mask.expand(shape)), f"{what} has another mask")


LAW = Law(
    9,
    "algebra",
    "Layout algebra agrees with boolean algebra on masks; lowering keeps the mask.",
    primitive,
    attention,
)

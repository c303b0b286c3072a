"""Random layouts, what algebra makes of two that fit or do not, attention over them, and wrong tables."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnkit import Grid, attend, layouts
from attnkit.layouts import Blocks, Dense, Layout, RelativeTable, Stencil, TokenMask, TokenSets
from attnkit.registry import BACKENDS
from attnkit.testing import KINDS, dense_attention, random_layout, random_qkv, random_tensor
from tests.fuzz.case import agree, must_work
from tests.fuzz.mutation import ODDITIES, any_of

# Layouts of more pairs are made, but their masks are not.
MOST_PAIRS = 10**6


def case(dice: random.Random, folder: Path) -> None:
    grid = _grid(dice)
    batch, heads = dice.randint(1, 3), dice.randint(1, 3)
    if dice.random() < 0.35:
        layout = _made_by_hand(dice, grid)
    else:
        layout, _ = random_layout(dice.choice(KINDS), grid, batch=batch, heads=heads, seed=dice.randrange(10**6))
    check_layout(layout)
    way = dice.choice(("combine", "combine", "restrict", "attend", "attend", "lower"))
    if way == "combine":
        _combine(dice, layout, grid, batch, heads)
    elif way == "restrict":
        _restrict(dice, layout)
    elif way == "attend":
        _attend(dice, layout, grid, batch, heads)
    else:
        lowered = layout.lower(dice.choice((*("token_sets", "token_mask", layout.kind) * 3, "blocks", "", None, 3)))
        agree(_equal(lowered.to_mask(), layout.to_mask()), "lowering changed what is seen")


def check_layout(layout: Layout) -> None:
    """What holds for every layout that could be made."""
    if layout.num_queries * layout.num_keys > MOST_PAIRS:
        return
    with must_work("looking at a layout that could be made"):
        mask = layout.to_mask()
        agree(mask.dtype == torch.bool and mask.ndim == 4, "a mask is no bool tensor of four dimensions")
        agree(tuple(mask.shape[2:]) == (layout.num_queries, layout.num_keys), "a mask of other sizes than the layout's")
        agree(_equal(mask.sum(-1), layout.visible()), "visible() counts other keys than the mask holds")
        agree(0 <= layout.density() <= 1, "a density outside 0..1")
        lead = layout.lead
        agree(layout.flops(3, batch=lead[0], heads=lead[1]) >= 0, "negative multiply-adds")
        slots = layout.visible()[..., layout.global_queries :]
        agree(not slots.numel() or int(slots.max()) <= layout.key_slots, "more keys are seen than there are slots")
    agree(bool(repr(layout)), "a layout without a repr")


def _grid(dice: random.Random) -> Grid:
    axes = dice.choice((1, 2, 2, 2, 3))
    return Grid(*(dice.randint(1, 6) for _ in range(axes)), prefix=dice.choice((0, 0, 1, 3)))


def _made_by_hand(dice: random.Random, grid: Grid) -> Layout:
    """A layout from arguments some of which are wrong."""
    count = grid.tokens
    index = torch.randint(-1, count, (1, dice.randint(1, 2), grid.image_tokens, dice.randint(0, 4)))

    def number() -> Any:
        return any_of(dice, (*[1, 2, 3, 5] * 15, (3, 3), [3, 5], *ODDITIES))

    tables: tuple[Any, ...] = (index, index, index.int(), index[0], index[0, 0], index + 1, index.float(), index > 0)
    some_grid: Any = grid if dice.random() < 0.95 else any_of(dice, ODDITIES)
    makers: tuple[Callable[[], Layout], ...] = (
        lambda: Dense(number(), number()),
        lambda: Dense(count, dice.choice((None, count, number()))),
        lambda: Stencil(some_grid, 3, stride=number(), border=dice.choice(("mask", "clamp", "clmap", None))),
        lambda: Stencil(some_grid, number(), dilation=dice.choice((1, 2, number()))),
        lambda: TokenSets(any_of(dice, tables), count, queries_all=grid.prefix),
        lambda: TokenSets(index, dice.choice((count, number())), queries_all=dice.choice((0, number()))),
        lambda: TokenSets(any_of(dice, ODDITIES), count),
        lambda: TokenMask(any_of(dice, (index > 0, index[0] > 0, index, None, *ODDITIES))),
        lambda: Blocks.windows(some_grid, number(), dilated=dice.random() < 0.3),
        lambda: Blocks.windows(some_grid, 2, shift=dice.choice((None, 1, number()))),
        lambda: Blocks.permuted(torch.randperm(count - grid.prefix), number(), prefix=grid.prefix),
        lambda: Blocks.permuted(any_of(dice, (index[0, 0].flatten(), torch.randperm(7) + 1, *ODDITIES)), 2),
        lambda: Blocks.from_regions(some_grid, number(), torch.randint(-1, 4, (1, 4, 2))),
        lambda: Blocks.from_regions(some_grid, 2, any_of(dice, (index, index[0], *ODDITIES))),
        lambda: Blocks.from_regions(some_grid, 1, torch.randint(-1, 1 + dice.randint(0, 1), (1, 1, 2))),
    )
    return dice.choice(makers)()


def _combine(dice: random.Random, layout: Layout, grid: Grid, batch: int, heads: int) -> None:
    # Mostly a partner of the same sizes; else of other tokens, items or heads, or no layout at all.
    other = grid if dice.random() < 0.9 else Grid(dice.randint(1, 6), 2)
    sizes = {"batch": batch, "heads": heads} if dice.random() < 0.8 else {"batch": 4, "heads": 5}
    partner: Any = random_layout(dice.choice(KINDS), other, **sizes, seed=dice.randrange(10**6))[0]
    if dice.random() < 0.05:
        partner = any_of(dice, ODDITIES)
    way = dice.choice(("union", "intersect", "concat"))
    if way == "concat":
        counts: list[Any] = [layout.lead[1], partner.lead[1] if isinstance(partner, Layout) else 1]
        if dice.random() < 0.1:
            counts[1] = any_of(dice, ODDITIES)
        found = layouts.concat_heads([(layout, counts[0]), (partner, counts[1])])
        parts = [one.to_mask().expand(-1, n, -1, -1) for one, n in zip((layout, partner), counts, strict=True)]
        lead = max(part.shape[0] for part in parts)
        right = torch.cat([part.expand(lead, -1, -1, -1) for part in parts], dim=1)
    else:
        found = getattr(layouts, way)(layout, partner)
        first, second = layout.to_mask(), partner.to_mask()
        right = first | second if way == "union" else first & second
    check_layout(found)
    agree(_equal(found.to_mask(), right), f"{way} disagrees with the masks")


def _restrict(dice: random.Random, layout: Layout) -> None:
    keys: Any = _mask_of(dice, layout, layout.num_keys)
    queries: Any = _mask_of(dice, layout, layout.num_queries) if dice.random() < 0.5 else None
    if dice.random() < 0.1:
        keys = any_of(dice, ODDITIES)
    found = layouts.restrict(layout, keys, queries)
    check_layout(found)
    right = layout.to_mask()
    if keys is not None:
        right = right & _four(keys)[:, :, None, :]
    if queries is not None:
        right = right & _four(queries)[..., None]
    agree(_equal(found.to_mask(), right), "restrict disagrees with the masks")


def _mask_of(dice: random.Random, layout: Layout, count: int) -> Tensor:
    batch, heads = layout.lead
    lead = dice.choice(((), (1,), (batch,), (1, 1), (batch, heads), (batch + 1, heads)))
    mask = torch.rand(*lead, count + dice.choice((0, 0, 0, 0, 1))) < 0.6
    return mask if dice.random() < 0.95 else mask.float()


def _four(mask: Tensor) -> Tensor:
    return mask.view(1, 1, -1) if mask.ndim == 1 else mask[:, None] if mask.ndim == 2 else mask


def _attend(dice: random.Random, layout: Layout, grid: Grid, batch: int, heads: int) -> None:
    sizes = (layout.num_queries, layout.num_keys)
    lead = [one if one > 1 else mine for one, mine in zip(layout.lead, (batch, heads), strict=True)]
    if dice.random() < 0.08:
        sizes = (sizes[0] + 1, sizes[1])
    if dice.random() < 0.08:
        lead = [lead[0] + 1, lead[1] + 1]
    seed = dice.randrange(10_000)
    width = {"head_dim": dice.randint(1, 5), "value_dim": dice.randint(1, 5)}
    q, k, v = random_qkv(sizes, batch=lead[0], heads=lead[1], seed=seed, **width)
    extra: dict[str, Any] = {}
    if dice.random() < 0.3:
        shape = [dice.choice((1, size)) for size in (*lead, *sizes)]
        extra[dice.choice(("bias", "gain"))] = random_tensor(*shape, seed=seed + 1)
    if dice.random() < 0.1:
        table = random_tensor(lead[1], *(dice.choice((1, 3, 5)) for _ in grid.sizes), seed=seed + 2)
        extra["bias"] = RelativeTable(table, grid)
    if dice.random() < 0.1:
        extra[dice.choice(("bias", "gain", "scale", "backend"))] = any_of(dice, ODDITIES)
    if dice.random() < 0.1:
        extra["backend"] = dice.choice([*(name for name in BACKENDS if name != "flex"), "refrence"])
    if dice.random() < 0.05:
        q = any_of(dice, (q.float(), q[0], q.long(), q.to("meta"), *ODDITIES))
    out, lse = attend(q, k, v, layout, return_lse=True, **extra)
    bias = extra.get("bias")
    bias = bias.dense(layout.num_queries) if isinstance(bias, RelativeTable) else bias
    right, right_lse = dense_attention(q, k, v, layout.to_mask(), extra.get("scale"), bias, extra.get("gain"))
    agree(torch.allclose(out, right, rtol=1e-9, atol=1e-9), "attention differs from dense attention under the mask")
    agree(torch.allclose(lse, right_lse, rtol=1e-9, atol=1e-9), "the log-sum-exp differs from dense attention's")


def _equal(found: Tensor, right: Tensor) -> bool:
    return torch.equal(*torch.broadcast_tensors(found, right))

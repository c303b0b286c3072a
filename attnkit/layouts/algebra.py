"""Algebra on layouts that agrees with boolean algebra on their masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnkit.arguments import is_count
from attnkit.errors import LayoutError, shown
from attnkit.layouts.base import Layout, common_lead
from attnkit.layouts.blocks import Blocks
from attnkit.layouts.dense import Dense
from attnkit.layouts.lowering import to_token_sets
from attnkit.layouts.token_mask import TokenMask
from attnkit.layouts.token_sets import TokenSets


def union(first: Layout, second: Layout) -> Layout:
    """A layout whose mask is `first.to_mask() | second.to_mask()`.

    Outputs of two attentions over overlapping key sets cannot be merged afterwards (keys in both would count twice),
    so unions are formed here, on the plan. Blocks over one order and token sets keep their kind; the rest becomes a
    token mask.

    Args:
        first: a layout over Nq queries and Nk keys, for B items or 1 and H heads or 1.
        second: one over the same queries and keys; where one has 1 item or head, it counts for all of the other.

    Returns:
        A layout over the same queries and keys.

    Raises:
        LayoutError: if the layouts have other numbers of queries, keys, items or heads.
    """
    _check_layouts("union", first, second)
    _same_sizes("union", first, second)
    _same_lead("union", first, second)
    for one in (first, second):
        if isinstance(one, Dense) and one.key_mask is None:
            return one
    if first.key_mask is None and second.key_mask is None:
        if isinstance(first, Blocks) and isinstance(second, Blocks) and _same_order(first, second):
            index = torch.cat(_broadcast(_own_or_routed(first), _own_or_routed(second)), dim=-1)
            return Blocks(first.order, index, prefix=first.prefix, key_order=first.key_order)
        if _small(first) and _small(second):
            one, other = to_token_sets(first), to_token_sets(second)
            if (one.queries_all, one.keys_all) == (other.queries_all, other.keys_all):
                index = torch.cat(_broadcast(*_one_device(one.index, other.index)), dim=-1)
                return TokenSets(index, one.keys, queries_all=one.queries_all, keys_all=one.keys_all)
    return TokenMask(torch.logical_or(*_one_device(first.to_mask(), second.to_mask())))


def intersect(first: Layout, second: Layout) -> Layout:
    """A layout whose mask is `first.to_mask() & second.to_mask()`.

    Blocks over one order keep their kind; the rest becomes a token mask.

    Args:
        first: a layout over Nq queries and Nk keys, for B items or 1 and H heads or 1.
        second: one over the same queries and keys; where one has 1 item or head, it counts for all of the other.

    Returns:
        A layout over the same queries and keys; queries may be left that see nothing.

    Raises:
        LayoutError: if the layouts have other numbers of queries, keys, items or heads.
    """
    _check_layouts("intersect", first, second)
    _same_sizes("intersect", first, second)
    _same_lead("intersect", first, second)
    for one, other in ((first, second), (second, first)):
        if isinstance(one, Dense):
            return other if one.key_mask is None else other.restrict(one.key_mask)
    plain = first.key_mask is None and second.key_mask is None
    if plain and isinstance(first, Blocks) and isinstance(second, Blocks) and _same_order(first, second):
        mine, theirs = _broadcast(_own_or_routed(first), _own_or_routed(second))
        both = (mine[..., :, None] == theirs[..., None, :]).any(-1)
        index = torch.where(both, mine, -1)
        return Blocks(first.order, index, prefix=first.prefix, key_order=first.key_order)
    return TokenMask(torch.logical_and(*_one_device(first.to_mask(), second.to_mask())))


def restrict(layout: Layout, keys: Tensor | None = None, queries: Tensor | None = None) -> Layout:
    """A layout in which masked keys are seen by nobody and masked queries see nothing.

    Args:
        layout: any layout.
        keys: bool (Nk,), (B, Nk) or (B or 1, heads or 1, Nk), or None.
        queries: bool (Nq,), (B, Nq) or (B or 1, heads or 1, Nq), or None; gives a token mask.

    Returns:
        A layout over the same queries and keys.

    Raises:
        LayoutError: if a mask is not of bools, or not of the layout's keys, queries, items or heads.
    """
    _check_layouts("restrict", layout)
    if keys is not None:
        layout = layout.restrict(keys)
    if queries is None:
        return layout
    shaped = isinstance(queries, Tensor) and queries.ndim in (1, 2, 3) and queries.shape[-1] == layout.num_queries
    if not shaped or queries.dtype != torch.bool:
        raise LayoutError(
            f"restrict needs queries as a bool tensor (Nq,), (B, Nq) or (B, heads, Nq) with Nq = {layout.num_queries}, "
            f"but got {shown(queries)}"
        )
    rows = queries.view(1, 1, -1) if queries.ndim == 1 else queries[:, None] if queries.ndim == 2 else queries
    common_lead(f"a {layout.kind} layout and the queries left of it", layout.lead, tuple(rows.shape[:2]))
    return TokenMask(torch.logical_and(*_one_device(layout.to_mask(), rows[..., None])))


def concat_heads(parts: Sequence[tuple[Layout, int]]) -> Layout:
    """One layout for several groups of heads, whose mask is theirs, one behind the other.

    Blocks over one order keep their kind; the rest becomes a token mask.

    Args:
        parts: (layout, number of heads >= 1) of each group, in the order of the heads. All layouts have the same
            queries and keys; one has as many heads as its number says, or 1 that counts for all of them.

    Returns:
        A layout for the sum of the heads; a single part's own layout as it is.

    Raises:
        LayoutError: for no parts, no layout or number in one, other numbers of queries, keys or items, or a layout that
            varies over other heads.
    """
    paired = isinstance(parts, Sequence) and all(isinstance(one, (tuple, list)) and len(one) == 2 for one in parts)
    if not paired or not parts:
        raise LayoutError(f"concat_heads needs a list of (layout, number of heads), but got {shown(parts)}")
    layouts = [layout for layout, _ in parts]
    _check_layouts("concat_heads", *layouts)
    for layout, heads in parts:
        _same_sizes("concat_heads", layouts[0], layout)
        if not is_count(heads, 1):
            raise LayoutError(f"concat_heads needs a number of heads >= 1 for every layout, but got {shown(heads)}")
        if layout.lead[1] not in (1, heads):
            raise LayoutError(f"a layout in concat_heads varies over {layout.lead[1]} heads but {heads} were asked for")
    common_lead("the layouts of concat_heads", *((layout.lead[0], 1) for layout in layouts))
    if len(parts) == 1:
        return layouts[0]
    first = layouts[0]
    # One order serves all heads, so it must not itself be different from head to head.
    plain = all(
        isinstance(layout, Blocks) and layout.key_mask is None and _order_lead(layout)[1] == 1 for layout in layouts
    )
    if isinstance(first, Blocks) and plain and all(_same_order(first, other) for other in layouts[1:]):  # type: ignore[arg-type]
        rows = [_own_or_routed(layout) for layout in layouts if isinstance(layout, Blocks)]
        widest = max(row.shape[-1] for row in rows)
        padded = [torch.nn.functional.pad(row, (0, widest - row.shape[-1]), value=-1) for row in rows]
        index = torch.cat(_per_head(padded, [heads for _, heads in parts]), dim=1)
        return Blocks(first.order, index, prefix=first.prefix, key_order=first.key_order)
    masks = _one_device(*(layout.to_mask() for layout in layouts))
    return TokenMask(torch.cat(_per_head(masks, [heads for _, heads in parts]), dim=1))


def _check_layouts(what: str, *layouts: Layout) -> None:
    for one in layouts:
        if not isinstance(one, Layout):
            raise LayoutError(f"{what} needs layouts, such as attnkit.layouts.Dense(Nq, Nk), but got {shown(one)}")


def _same_sizes(what: str, first: Layout, second: Layout) -> None:
    one, other = (first.num_queries, first.num_keys), (second.num_queries, second.num_keys)
    if one != other:
        raise LayoutError(f"{what} needs layouts over the same queries and keys, but got {one} and {other}")


def _same_lead(what: str, first: Layout, second: Layout) -> None:
    common_lead(f"the layouts of {what}", first.lead, second.lead)


def _same_order(first: Blocks, second: Blocks) -> bool:
    return first.prefix == second.prefix and all(
        one is other or (one.token is other.token and one.slot is other.slot)
        for one, other in ((first.order, second.order), (first.keys_cut, second.keys_cut))
    )


def _own_or_routed(layout: Blocks) -> Tensor:
    if layout.index is not None:
        return layout.index
    return torch.arange(layout.num_blocks, device=layout.order.token.device)[None, None, :, None]


def _order_lead(layout: Blocks) -> tuple[int, int]:
    return common_lead("an order", tuple(layout.order.token.shape[:2]), tuple(layout.keys_cut.token.shape[:2]))


def _small(layout: Layout) -> bool:
    return not isinstance(layout, (Dense, TokenMask)) and 2 * layout.key_slots < layout.num_keys


def _broadcast(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    shape = torch.broadcast_shapes(first.shape[:2], second.shape[:2])
    return first.expand(*shape, -1, -1), second.expand(*shape, -1, -1)


def _one_device(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Layouts without tensors make their masks on the CPU; those follow the others."""
    device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), tensors[0].device)
    return tuple(tensor.to(device) for tensor in tensors)


def _per_head(tensors: Sequence[Tensor], heads: Sequence[int]) -> list[Tensor]:
    batch = max(tensor.shape[0] for tensor in tensors)
    return [tensor.expand(batch, count, -1, -1) for tensor, count in zip(tensors, heads, strict=True)]

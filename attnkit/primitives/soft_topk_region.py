"""soft_topk_region: keys and values of routed regions weighted by how well they match (BiFormer's soft routing)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnkit.kernels.precision import without_autocast
from attnkit.layouts import Blocks
from attnkit.layouts.orders import Order
from attnkit.primitives.base import BuildContext, HeadInputs
from attnkit.primitives.plain import merged, softmax_heads
from attnkit.primitives.plain_regions import cells_of, in_cells, region_numbers, with_prefix
from attnkit.primitives.regions import PooledRegionOptions, Regions, best_regions
from attnkit.primitives.softmax import Plan, SoftmaxHeads


@dataclass(frozen=True)
class SoftTopKRegion(PooledRegionOptions):
    """Bi-level routing attention in which a softmax over the matches of the chosen regions weights what they hold.

    Chosen as `topk_region` chooses. The weight of a region then multiplies its keys and its values, so that with
    `router="means"` or `"linear"` the choice gets a gradient. All heads route together. Prefix tokens see all tokens as
    they are, and are seen by all as they are.

    Args:
        heads: number of heads, >= 1.
        regions: regions per side, >= 1 (their number is regions ** axes).
        topk: regions each region sees, >= 1; more than there are means all.
        router: where matches come from: `"means"` of q and k in the regions; `"linear"`, a learned linear map of those
            means, one for both; or `"detached"`, the means without a gradient, so that weights are constants.
    """

    kind: ClassVar[str] = "soft_topk_region"
    paper: ClassVar[str] = (
        "Zhu et al. 2023, BiFormer: Vision Transformer with Bi-Level Routing Attention, arXiv 2303.08810 (an option of "
        "the authors' code)"
    )
    formula: ClassVar[str] = (
        "w_rr' = softmax over topk_r' of s mean(q in r) . mean(k in r'); "
        "out_i = sum_j softmax_j(s q_i.(w_rr' k_j)) w_rr' v_j, j over the regions r' chosen by i's region r"
    )
    cost: ClassVar[str] = "2 N (k N / S^2) C + S^4 C"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"regions": 7, "topk": 8},)

    _: KW_ONLY
    router: Literal["means", "linear", "detached"] = "means"

    def build(self, context: BuildContext) -> SoftTopKRegionHeads:
        return SoftTopKRegionHeads(self, context)


class SoftTopKRegionHeads(SoftmaxHeads):
    """Heads of soft bi-level routing attention: every region gets its own weighted copies of keys and values."""

    def __init__(self, options: SoftTopKRegion, context: BuildContext) -> None:
        super().__init__(options, context)
        self.region = options
        width = options.columns(context).q
        self.router = nn.Linear(width, width) if options.router == "linear" else None

    def plan(self, inputs: HeadInputs) -> Plan:
        q, k, v = inputs.qkv
        grid, mask = inputs.grid, inputs.token_mask
        regions = Regions.at_most(grid, self.region.regions)
        weights, index = self.weigh(q, k, inputs, regions)
        present = regions.present(mask, q.device)
        copies, seen = [], None
        for rows in (k, v):
            image = regions.filled(rows)
            if present is not None:
                # Weights get a gradient from here, in which NaN of a masked token would spread.
                image = image.where(present, 0.0)
            cells, seen = self._cells(image, present, regions)
            near = _gathered(cells, index) * weights.to(rows.dtype)[..., None, None]
            prefix = rows[:, :, None, : grid.prefix].expand(-1, -1, regions.count, -1, -1)
            copies.append(torch.cat([prefix, near.flatten(3, 4)], dim=3))
        slots = copies[0].shape[3]
        # Keys are the copies of all regions and, for the prefix tokens as queries, the tokens themselves.
        originals = grid.tokens if grid.prefix else 0
        keys, values = (
            torch.cat([copy.flatten(2, 3), rows[:, :, :originals]], dim=2)
            for copy, rows in zip(copies, (k, v), strict=True)
        )
        layout = _copied_layout(regions, slots, q.device)
        if seen is not None:
            near = (_gathered(seen[:, None, ..., None], index)[:, 0, ..., 0] & (index[:, 0] >= 0)[..., None]).flatten(2)
            whole = near.new_ones(1, grid.tokens) if mask is None else mask
            prefix = whole[:, None, : grid.prefix].expand(near.shape[0], regions.count, -1)
            held = torch.cat([prefix, near], dim=2).flatten(1)
            layout = layout.restrict(torch.cat([held, whole[:, :originals].expand(held.shape[0], -1)], dim=1))
        return Plan(layout, keys=(keys, values), restricted=True)

    def weigh(self, q: Tensor, k: Tensor, inputs: HeadInputs, regions: Regions) -> tuple[Tensor, Tensor]:
        """Chooses and weights the regions each region sees: weights and int64 regions, both (B, 1, R, topk).

        Weights of a row add up to 1; where there are fewer regions than asked for, the regions are -1 and their weights
        mean nothing.
        """
        # Half precision would round the matches, and with them the choice.
        rows = [one.to(torch.promote_types(one.dtype, torch.float32)) for one in (q, k)]
        if self.region.router == "detached":
            rows = [one.detach() for one in rows]
        (queries, _), (keys, counts) = (regions.means(one, inputs.token_mask) for one in rows)
        with without_autocast(q.device):
            if self.router is not None:
                weight, bias = (one.to(queries.dtype) for one in (self.router.weight, self.router.bias))
                queries, keys = F.linear(queries, weight, bias), F.linear(keys, weight, bias)
            match, index = best_regions((queries * self.scale) @ keys.mT, counts, self.region.topk)
            weights = match.masked_fill(index < 0, torch.finfo(match.dtype).min).softmax(-1)
        return weights, index

    def written_out(self, inputs: HeadInputs, attention: Callable[..., Tensor]) -> Tensor:
        """Attention of each region's queries to everything weighted for that region."""
        options, grid, prefix = self.region, inputs.grid, inputs.grid.prefix
        lengths = [-(-size // options.regions) for size in grid.sizes]
        region, count = region_numbers(grid, lengths, options.regions), options.regions**grid.ndim
        tokens = region == torch.arange(count)[:, None]
        weights = self._weights_written_out(inputs, tokens)
        number, inside = cells_of(grid, lengths, options)

        def routed(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
            everything = torch.ones(len(q), grid.tokens, dtype=torch.bool)
            kept = everything if inputs.token_mask is None else inputs.token_mask
            out = torch.zeros(*q.shape[:3], v.shape[3], dtype=v.dtype)
            out[:, :, :prefix] = attention(q[:, :, :prefix], k, v, scale=scale, sees=kept[:, None, None])
            (keys, held), (values, _) = (in_cells(one, inside, inputs, options.pool) for one in (k, v))
            for at in region.unique().tolist():
                factor = torch.cat([weights.new_ones(len(q), prefix), weights[:, at, number]], dim=1)[:, None, :, None]
                sees = with_prefix((weights[:, at, number] > 0)[:, None, None], inputs, held)[:, :, prefix:]
                rows = torch.cat([torch.zeros(prefix, dtype=torch.bool), region == at])
                out[:, :, rows] = attention(q[:, :, rows], keys * factor, values * factor, scale=scale, sees=sees)
            return out

        return softmax_heads(self, inputs, routed)

    def _weights_written_out(self, inputs: HeadInputs, tokens: Tensor) -> Tensor:
        """The weight of every region for every region, 0 where it is not chosen: (B, R, R)."""
        means, held = [], torch.zeros(())
        for rows in inputs.qkv[:2]:
            mean, held = in_cells(rows, tokens, inputs, "mean")
            mean = merged(mean[:, :, inputs.grid.prefix :])
            mean = mean.detach() if self.region.router == "detached" else mean
            means.append(mean if self.router is None else mean @ self.router.weight.t() + self.router.bias)
        match = (means[0] @ means[1].mT * self.scale).masked_fill(~held[:, None], -torch.inf)
        last = match.sort(-1, descending=True).values[..., : self.region.topk][..., -1:]
        chosen = (match >= last) & held[:, None]
        return match.masked_fill(~chosen, -1e30).softmax(-1) * chosen

    def _cells(self, image: Tensor, present: Tensor | None, regions: Regions) -> tuple[Tensor, Tensor | None]:
        if self.region.pool != "none":
            return regions.pooled(image, present, self.region)
        return regions.parts(image), None if present is None else regions.parts(present)[:, 0, ..., 0]


def _gathered(cells: Tensor, index: Tensor) -> Tensor:
    """What the chosen regions hold: (B or 1, heads, R, M, D) -> (B, heads, R, topk, M, D)."""
    batch, (heads, _, *shape) = index.shape[0], cells.shape[1:]
    spots = index.clamp(min=0).flatten(2)[..., None, None].expand(-1, heads, -1, *shape)
    return cells.expand(batch, -1, -1, -1, -1).gather(2, spots).unflatten(2, index.shape[2:])


def _copied_layout(regions: Regions, slots: int, device: torch.device) -> Blocks:
    """Every region sees its own row of `slots` keys, prefix tokens see the tokens that lie behind all rows."""
    count, grid = regions.count, regions.grid
    order = regions.order(device)
    own = torch.arange(count * slots, device=device)
    if not grid.prefix:
        return Blocks(order, key_order=Order(own.view(1, 1, count, slots), own.view(1, 1, -1), padded=False))
    # Prefix tokens are queries in blocks of their own, and the tokens are keys in as many blocks as they fill.
    length = order.token.shape[3]
    query_blocks, key_blocks = -(-grid.prefix // length), -(-grid.tokens // slots)
    first = torch.arange(grid.prefix, device=device)
    query = F.pad(first, (0, query_blocks * length - grid.prefix), value=-1).view(1, 1, query_blocks, length)
    slot = torch.cat([(count * length + first).view(1, 1, -1), order.slot], dim=2)
    empty = key_blocks * slots - grid.tokens
    key_slot = torch.arange(count * slots + grid.tokens, device=device)
    key = F.pad(key_slot, (0, empty), value=-1).view(1, 1, count + key_blocks, slots)
    index = torch.full((count + query_blocks, key_blocks), -1, dtype=torch.int64, device=device)
    index[:count, 0] = torch.arange(count, device=device)
    index[count:] = torch.arange(count, count + key_blocks, device=device)
    return Blocks(
        Order(torch.cat([order.token, query], dim=2), slot, padded=True),
        index[None, None],
        key_order=Order(key, key_slot.view(1, 1, -1), padded=empty > 0),
        unique=True,
    )

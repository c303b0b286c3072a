"""padded_topk_region: regions filled up with zeros that take part in the softmax (BiFormer's second code)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnkit.grid import Grid
from attnkit.kernels.precision import without_autocast
from attnkit.layouts import Blocks
from attnkit.primitives.base import BuildContext, HeadInputs
from attnkit.primitives.plain import softmax_heads
from attnkit.primitives.plain_regions import region_numbers, seen_regions, with_prefix
from attnkit.primitives.regions import RegionOptions, Regions, best_regions
from attnkit.primitives.softmax import Plan, SoftmaxHeads


@dataclass(frozen=True)
class PaddedTopKRegion(RegionOptions):
    """Bi-level routing attention with the padding of its authors' second code, for weights that were trained with it.

    A region holds floor(size / regions) tokens per axis, at least 1, so there may be more regions than asked for. Where
    they do not divide the grid, the last ones are filled up with zero keys and values, which every query that sees the
    region also sees: they take softmax weight and add nothing. Region means leave them out. On grids that divide it is
    `topk_region`, which is the better choice for anything new.

    Args:
        heads: number of heads, >= 1.
        regions: regions per side, >= 1; on grids that do not divide, at least so many.
        topk: regions each region sees, >= 1; more than there are means all.
    """

    kind: ClassVar[str] = "padded_topk_region"
    paper: ClassVar[str] = (
        "Zhu et al. 2023, BiFormer: Vision Transformer with Bi-Level Routing Attention, arXiv 2303.08810 (the "
        "layer for channels-first maps in the authors' code)"
    )
    formula: ClassVar[str] = (
        "I_r = topk_r'(mean(q in r) . mean(k in r')); out_i = sum_j softmax_j(s q_i.k_j) v_j, "
        "j over the regions I_r of i's region r, k_j = v_j = 0 behind the edge"
    )
    cost: ClassVar[str] = "2 N (k N / S^2) C + S^4 C"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"regions": 4, "topk": 6},)

    def full_budget(self, grid: Grid) -> PaddedTopKRegion:
        return replace(self, topk=grid.image_tokens)

    def build(self, context: BuildContext) -> PaddedTopKRegionHeads:
        return PaddedTopKRegionHeads(self, context)


class PaddedTopKRegionHeads(SoftmaxHeads):
    """Heads of bi-level routing attention over regions that are filled up with zeros."""

    def __init__(self, options: PaddedTopKRegion, context: BuildContext) -> None:
        super().__init__(options, context)
        self.region = options

    def plan(self, inputs: HeadInputs) -> Plan:
        q, k, v = inputs.qkv
        regions, mask = Regions.at_least(inputs.grid, self.region.regions), inputs.token_mask
        index = self.route(q, k, inputs, regions)
        prefix, order, padded = inputs.grid.prefix, regions.order(q.device), regions.padded
        if padded == inputs.grid:
            return Plan(Blocks(order, index, prefix=prefix, unique=True))
        keys, values = (
            torch.cat([one[:, :, :prefix], regions.filled(one).flatten(2, 1 + padded.ndim)], dim=2) for one in (k, v)
        )
        layout = Blocks(order, index, prefix=prefix, key_order=regions.order(q.device, padded), unique=True)
        if mask is not None:
            # What is filled up is seen whatever is masked.
            hidden = regions.filled(~mask[:, None, :, None]).flatten(1)
            layout = layout.restrict(torch.cat([mask[:, :prefix], ~hidden], dim=1))
        return Plan(layout, keys=(keys, values), restricted=True)

    @torch.no_grad()
    def route(self, q: Tensor, k: Tensor, inputs: HeadInputs, regions: Regions) -> Tensor:
        """Chooses the regions each region sees, in float32: int64 (B, 1, R, topk), -1 for none."""
        queries, _ = regions.means(q.detach().float(), inputs.token_mask)
        keys, counts = regions.means(k.detach().float(), inputs.token_mask)
        # Autocast would round the products, and with them the choice, to half precision.
        with without_autocast(q.device):
            match = queries @ keys.mT
        return best_regions(match, counts, self.region.topk)[1]

    def definition(self, inputs: HeadInputs) -> Tensor:
        grid = inputs.grid
        lengths = [max(size // self.region.regions, 1) for size in grid.sizes]
        sides = [-(-size // length) for size, length in zip(grid.sizes, lengths, strict=True)]
        whole = Grid(*(side * length for side, length in zip(sides, lengths, strict=True)))
        sees = seen_regions(inputs, lengths, sides, self.region.topk)
        return sees[..., region_numbers(whole, lengths, sides)]

    def written_out(self, inputs: HeadInputs, attention: Callable[..., Tensor]) -> Tensor:
        grid, mask = inputs.grid, inputs.token_mask
        lengths = [max(size // self.region.regions, 1) for size in grid.sizes]
        sizes = [-(-size // length) * length for size, length in zip(grid.sizes, lengths, strict=True)]
        numbers = {place: at for at, place in enumerate(itertools.product(*map(range, grid.sizes)))}
        # Token behind all others: zeros that are never masked.
        places = [numbers.get(place, len(numbers)) for place in itertools.product(*map(range, sizes))]
        filled = []
        for rows in inputs.qkv[1:]:
            image = torch.cat([rows[:, :, grid.prefix :], torch.zeros_like(rows[:, :, :1])], dim=2)
            filled.append(torch.cat([rows[:, :, : grid.prefix], image[:, :, places]], dim=2))
        kept = torch.ones(len(inputs.x), grid.tokens, dtype=torch.bool) if mask is None else mask
        held = torch.cat([kept[:, grid.prefix :], torch.ones_like(kept[:, :1])], dim=1)[:, places]
        sees = with_prefix(self.definition(inputs), inputs, held)
        return softmax_heads(self, inputs, attention, (filled[0], filled[1]), sees=sees)

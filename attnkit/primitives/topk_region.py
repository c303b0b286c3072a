"""topk_region: every region attends to the few regions it matches best (BiFormer)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from attnkit.grid import Grid
from attnkit.kernels.precision import without_autocast
from attnkit.layouts import Blocks
from attnkit.primitives.base import BuildContext, HeadInputs
from attnkit.primitives.plain import softmax_heads
from attnkit.primitives.plain_regions import cells_of, in_cells, region_numbers, seen_regions, with_prefix
from attnkit.primitives.regions import PooledRegionOptions, Regions, best_regions, rows_order
from attnkit.primitives.softmax import Plan, SoftmaxHeads


@dataclass(frozen=True)
class TopKRegion(PooledRegionOptions):
    """Bi-level routing attention: region means of q and k are matched, and each region sees the topk best regions.

    A region holds ceil(size / regions) tokens per axis. Where that does not divide the grid, late regions are smaller
    or empty; what does not exist takes part neither in means nor in attention.

    Args:
        heads: number of heads, >= 1.
        regions: regions per side, >= 1 (their number is regions ** axes).
        topk: regions each region sees, >= 1; more than there are means all.
        routing: `"shared"`, one choice for all heads of the group, as in the paper; or `"per_head"`.
    """

    kind: ClassVar[str] = "topk_region"
    paper: ClassVar[str] = (
        "Zhu et al. 2023, BiFormer: Vision Transformer with Bi-Level Routing Attention, arXiv 2303.08810"
    )
    formula: ClassVar[str] = (
        "I_r = topk_r'(mean(q in r) . mean(k in r')); out_i = sum_j softmax_j(s q_i.k_j) v_j, "
        "j over the regions I_r of i's region r"
    )
    cost: ClassVar[str] = "2 N (k N / S^2) C + S^4 C"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"regions": 7, "topk": 8},)

    _: KW_ONLY
    routing: Literal["shared", "per_head"] = "shared"

    def full_budget(self, grid: Grid) -> TopKRegion | None:
        if self.pool != "none" and Regions.at_most(grid, self.regions).padded != grid:
            # Cells without a token are keys that nobody sees.
            return None
        return replace(self, topk=self.regions**grid.ndim)

    def build(self, context: BuildContext) -> TopKRegionHeads:
        return TopKRegionHeads(self, context)


class TopKRegionHeads(SoftmaxHeads):
    """Heads of bi-level routing attention."""

    def __init__(self, options: TopKRegion, context: BuildContext) -> None:
        super().__init__(options, context)
        self.region = options

    def plan(self, inputs: HeadInputs) -> Plan:
        q, k, v = inputs.qkv
        options, grid = self.region, inputs.grid
        index = self.route(q, k, inputs)
        if options.pool == "none":
            return Plan(Blocks.from_regions(grid, options.regions, index, unique=True))
        regions, device = Regions.at_most(grid, options.regions), q.device
        present = regions.present(inputs.token_mask, device)
        keys, held = _pooled(k, regions, present, options)
        values, _ = _pooled(v, regions, present, options)
        order = rows_order(regions.count, (keys.shape[2] - grid.prefix) // regions.count, grid.prefix, device)
        layout = Blocks(regions.order(device), index, prefix=grid.prefix, key_order=order, unique=True)
        if held is not None:
            prefix = held.new_ones(1, grid.prefix) if inputs.token_mask is None else inputs.token_mask[:, : grid.prefix]
            layout = layout.restrict(torch.cat([prefix, held.flatten(1)], dim=1))
        return Plan(layout, keys=(keys, values), restricted=True)

    @torch.no_grad()
    def route(self, q: Tensor, k: Tensor, inputs: HeadInputs) -> Tensor:
        """Chooses the regions each region sees, in float32: int64 (B, heads or 1, R, topk), -1 for none."""
        options = self.region
        regions = Regions.at_most(inputs.grid, options.regions)
        groups = options.heads if options.routing == "per_head" else 1
        queries, _ = regions.means(q.detach().float(), inputs.token_mask, groups)
        keys, counts = regions.means(k.detach().float(), inputs.token_mask, groups)
        # Autocast would round the products, and with them the choice, to half precision.
        with without_autocast(q.device):
            match = queries @ keys.mT
        return best_regions(match, counts, options.topk)[1]

    def definition(self, inputs: HeadInputs) -> Tensor | None:
        options, grid = self.region, inputs.grid
        whole = Regions.at_most(grid, options.regions).padded == grid
        if options.pool != "none" and (inputs.token_mask is not None or (grid.prefix and not whole)):
            # Not even prefix tokens see cells without a token.
            return None
        lengths = [-(-size // options.regions) for size in grid.sizes]
        sees = seen_regions(inputs, lengths, options.regions, options.topk, per_head=options.routing == "per_head")
        if options.pool == "none":
            return sees[..., region_numbers(grid, lengths, options.regions)]
        keys = []
        for region in range(options.regions**grid.ndim):
            for cell in itertools.product(*map(options.spans, lengths)):
                corner = [region // options.regions**axis % options.regions for axis in range(grid.ndim)][::-1]
                starts = [at * length + first for at, length, (first, _) in zip(corner, lengths, cell, strict=True)]
                held = all(start < size for start, size in zip(starts, grid.sizes, strict=True))
                keys.append(sees[..., region] & held)
        return torch.stack(keys, dim=-1)

    def written_out(self, inputs: HeadInputs, attention: Callable[..., Tensor]) -> Tensor:
        options, grid = self.region, inputs.grid
        if options.pool == "none":
            return softmax_heads(self, inputs, attention)
        lengths = [-(-size // options.regions) for size in grid.sizes]
        number, inside = cells_of(grid, lengths, options)
        routed = seen_regions(inputs, lengths, options.regions, options.topk, per_head=options.routing == "per_head")
        (keys, held), (values, _) = (in_cells(rows, inside, inputs, options.pool) for rows in inputs.qkv[1:])
        sees = with_prefix(routed[..., number], inputs, held)
        return softmax_heads(self, inputs, attention, (keys, values), sees=sees)


def _pooled(
    rows: Tensor, regions: Regions, present: Tensor | None, options: TopKRegion
) -> tuple[Tensor, Tensor | None]:
    """Prefix tokens and cells as keys, (B, heads, prefix + R * cells, D); which cells hold a token."""
    image = regions.filled(rows)
    if present is not None:
        image = image.where(present, 0.0)
    cells, held = regions.pooled(image, present, options)
    return torch.cat([rows[:, :, : regions.grid.prefix], cells.flatten(2, 3)], dim=2), held

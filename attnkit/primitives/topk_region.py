"""topk_region: every region attends to the few regions it matches best (BiFormer)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from attnkit.grid import Grid
from attnkit.kernels.precision import without_autocast
from attnkit.layouts import Blocks
from attnkit.options import positive
from attnkit.primitives.base import BuildContext, HeadInputs, Plan, SoftmaxHeads, SoftmaxOptions
from attnkit.primitives.pooling import cell_means


@dataclass(frozen=True)
class TopKRegion(SoftmaxOptions):
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

    regions: int
    topk: int
    _: KW_ONLY
    routing: Literal["shared", "per_head"] = "shared"

    def problems(self) -> list[str]:
        return super().problems() + positive(regions=self.regions, topk=self.topk)

    def full_budget(self, grid: Grid) -> TopKRegion:
        return replace(self, topk=self.regions**grid.ndim)

    def build(self, context: BuildContext) -> TopKRegionHeads:
        return TopKRegionHeads(self, context)


class TopKRegionHeads(SoftmaxHeads):
    """Heads of bi-level routing attention."""

    def __init__(self, options: TopKRegion, context: BuildContext) -> None:
        super().__init__(options, context)
        self.region = options

    def plan(self, inputs: HeadInputs) -> Plan:
        q, k, _ = inputs.qkv
        index = self.route(q, k, inputs)
        return Plan(Blocks.from_regions(inputs.grid, self.region.regions, index, unique=True))

    @torch.no_grad()
    def route(self, q: Tensor, k: Tensor, inputs: HeadInputs) -> Tensor:
        """Chooses the regions each region sees, in float32: int64 (B, heads or 1, R, topk), -1 for none."""
        grid, options = inputs.grid, self.region
        sides = grid.per_axis(options.regions, "regions")
        lengths = tuple(-(-size // side) for size, side in zip(grid.sizes, sides, strict=True))
        means = []
        for one in (q, k):
            rows = one.detach().transpose(1, 2).flatten(2).float()
            mean, counts = cell_means(rows, grid, sides, lengths, inputs.token_mask)
            groups = options.heads if options.routing == "per_head" else 1
            means.append(mean.unflatten(2, (groups, -1)).transpose(1, 2))
        # Autocast would round the products, and with them the choice, to half precision.
        with without_autocast(q.device):
            match = means[0] @ means[1].transpose(-2, -1)
        match = match.masked_fill((counts == 0)[:, None, None, :], -torch.inf)
        best = match.topk(min(options.topk, match.shape[-1]), dim=-1)
        return torch.where(best.values == -torch.inf, -1, best.indices)

    def definition(self, inputs: HeadInputs) -> Tensor:
        options, grid = self.region, inputs.grid
        q, k, _ = (one[:, :, grid.prefix :].detach().float() for one in inputs.qkv)
        side = torch.tensor([-(-size // options.regions) for size in grid.sizes])
        region = (grid.coords() // side) @ torch.tensor([options.regions**axis for axis in range(grid.ndim)][::-1])
        present = torch.ones(len(q), grid.image_tokens, dtype=torch.bool)
        if inputs.token_mask is not None:
            present = inputs.token_mask[:, grid.prefix :]
        sees = torch.zeros(len(q), options.heads, grid.image_tokens, grid.image_tokens, dtype=torch.bool)
        for item, here in enumerate(present):
            filled = region[here].unique().tolist()
            for mine in region.unique().tolist():
                rows = here & (region == mine)
                query = q[item, :, rows].mean(1) if rows.any() else torch.zeros_like(q[item, :, 0])
                scores = [(query * k[item, :, here & (region == one)].mean(1)).sum(-1) for one in filled]
                for head in range(options.heads):
                    each = [float(one[head] if options.routing == "per_head" else one.sum()) for one in scores]
                    best = sorted(filled, key=lambda one, each=each: -each[filled.index(one)])[: options.topk]
                    chosen = torch.tensor([one in best for one in region.tolist()])
                    sees[item, head] |= (region == mine)[:, None] & chosen
        return sees

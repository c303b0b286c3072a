"""learned_upsample: a finer map, each of its tokens what one learned query sees of a window (QnA's upsampling)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from attnkit.errors import ShapeError
from attnkit.grid import Grid
from attnkit.options import positive
from attnkit.primitives.base import BuildContext, HeadInputs, HeadOutput
from attnkit.primitives.learned_query import SummaryHeads, SummaryOptions


@dataclass(frozen=True)
class LearnedUpsample(SummaryOptions):
    """scale x scale tokens out of every token, each by a learned query of its own on one and the same window.

    Values, keys and the output projection are shared by all queries. Prefix tokens stay as many as they were; each
    gets the mean of what the queries see of everything. Needs a grid of two axes. The paper speaks of upsampling but
    there is no code of its authors; the order of the queries is ours.

    Args:
        heads: number of heads, >= 1.
        kernel: tokens per side of the window, odd, >= 1; places outside the image are left out.
        scale: outputs along each axis for one token, >= 1; 2 doubles the map.
        query_norm: as in `LearnedQuery`.
        relative_bias: learn a bias per query, head and place in the window.
        scaled_bias: divide that bias by the square root of the head's width.
        key_bias: as in `LearnedQuery`.
        gain: a factor of the weights after the softmax: `"window"` or `"window_ones"`, learned per query, head and
            place, beginning near 0 or at 1; `"query"`, learned per query and head; or `"none"`.
    """

    kind: ClassVar[str] = "learned_upsample"
    paper: ClassVar[str] = "Arar et al. 2022, Learned Queries for Efficient Local Attention, arXiv 2112.11435"
    formula: ClassVar[str] = (
        "out[s i + a, s i' + b] = sum_j g_q[j - (i, i')] softmax_j(q.K x_j + b_q[j - (i, i')]) v_j, q = q_{a s + b}"
    )
    cost: ClassVar[str] = "N s^2 (k^2 (C + h) + h C)"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"kernel": 3}, {"kernel": 5})

    _: KW_ONLY
    scale: int = 2
    gain: Literal["window", "window_ones", "query", "none"] = "window"

    @property
    def count(self) -> int:
        return self.scale**2

    def problems(self) -> list[str]:
        return super().problems() + positive(scale=self.scale)

    def output_scale(self) -> int:
        return self.scale

    def period(self, grid: Grid) -> tuple[int, ...]:
        return (1,) * grid.ndim

    def build(self, context: BuildContext) -> LearnedUpsampleHeads:
        return LearnedUpsampleHeads(self, context, self.scale)


class LearnedUpsampleHeads(SummaryHeads):
    """Heads whose queries give a token of a finer map each."""

    def __init__(self, options: LearnedUpsample, context: BuildContext, scale: int) -> None:
        super().__init__(options, context)
        self.scale = scale

    def forward(self, inputs: HeadInputs) -> HeadOutput:
        grid, scale = inputs.grid, self.scale
        if grid.ndim != 2:
            raise ShapeError(f"learned_upsample needs a grid of height and width, but got {grid}")
        found = self.summaries(inputs)
        image = found[..., grid.prefix :, :].unflatten(1, (scale, scale)).unflatten(4, grid.sizes)
        # (B, down, right, heads, H, W, D) -> (B, heads, H, down, W, right, D)
        out = image.permute(0, 3, 4, 1, 5, 2, 6).flatten(2, 5)
        if grid.prefix:
            out = torch.cat([found[..., : grid.prefix, :].mean(1), out], dim=2)
        return HeadOutput(out, grid.refined(scale))

    def written_out(self, inputs: HeadInputs, attention: Callable[..., Tensor]) -> Tensor:
        (height, width), prefix = inputs.grid.sizes, inputs.grid.prefix
        found = [self.seen_by(query, inputs, attention) for query in range(self.scale**2)]
        tokens = [torch.stack([one[:, :, at] for one in found]).mean(0) for at in range(prefix)]
        for row, column in itertools.product(range(height * self.scale), range(width * self.scale)):
            query = row % self.scale * self.scale + column % self.scale
            tokens.append(found[query][:, :, prefix + row // self.scale * width + column // self.scale])
        return torch.stack(tokens, dim=2)

"""random_window: attention inside windows of tokens drawn at random from the whole image (Vision Big Bird)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from attnkit.grid import Grid
from attnkit.layouts import Blocks
from attnkit.layouts.cache import cached_layout
from attnkit.layouts.orders import permuted_order
from attnkit.options import positive
from attnkit.primitives.base import BuildContext, HeadInputs
from attnkit.primitives.permutation import random_permutation
from attnkit.primitives.plain import softmax_heads
from attnkit.primitives.softmax import Plan, SoftmaxHeads, SoftmaxOptions


@dataclass(frozen=True)
class RandomWindow(SoftmaxOptions):
    """Attention inside windows of a randomly permuted image; every token is in exactly one window.

    In training a forward pass draws a new permutation, shared by the batch and the group's heads; in evaluation it
    is a function of (seed, layer, group, height, width) only: `layer` is that of `HeadMix` or `Block`, `group` counts
    the groups of the mix. The number of draws made lies in the state dict, so training
    resumed from it goes on with the very same draws. A window as large as the image is full attention.

    Args:
        heads: number of heads, >= 1.
        window: tokens per window, >= 1; the last window may hold fewer.
        seed: seed of the permutations, 0..2 ** 62 - 1.
        resample: training passes between new permutations, >= 0: 1 draws in every pass, 10 in every tenth, and 0 trains
            with evaluation's permutation.
    """

    kind: ClassVar[str] = "random_window"
    paper: ClassVar[str] = (
        "Zhang and Gong 2023, Vision Big Bird, arXiv 2311.05988; random sampling windows: arXiv 2304.06250"
    )
    formula: ClassVar[str] = "out_i = sum_j softmax_j(s q_i.k_j) v_j, j over i's window of a random permutation"
    cost: ClassVar[str] = "2 N M C"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"window": 49},)

    window: int
    _: KW_ONLY
    seed: int = 0
    resample: int = 1

    def problems(self) -> list[str]:
        found = super().problems() + positive(window=self.window)
        if self.seed < 0:
            found.append(f"seed={self.seed}: must be >= 0")
        elif self.seed >= 2**62:
            found.append(f"seed={self.seed}: must be less than 2 ** 62")
        if self.resample < 0:
            found.append(f"resample={self.resample}: must be >= 0 training passes, 0 for never")
        return found

    def full_budget(self, grid: Grid) -> RandomWindow:
        return replace(self, window=grid.image_tokens)

    def build(self, context: BuildContext) -> RandomWindowHeads:
        return RandomWindowHeads(self, context)


class RandomWindowHeads(SoftmaxHeads):
    """Heads of random window attention."""

    stochastic: ClassVar[bool] = True

    def __init__(self, options: RandomWindow, context: BuildContext) -> None:
        super().__init__(options, context)
        self.random = options
        self.place = (context.layer, context.group)

    def plan(self, inputs: HeadInputs) -> Plan:
        grid, window = inputs.grid, self.random.window

        def make() -> Blocks:
            return Blocks(permuted_order(self.permutation(inputs), window, grid.prefix), prefix=grid.prefix)

        if inputs.draw is not None and self.random.resample:
            return Plan(make())
        key = ("random windows", self.random.seed, self.place, window, grid, str(inputs.x.device))
        return Plan(cached_layout(key, make))

    def definition(self, inputs: HeadInputs) -> Tensor:
        place = self.permutation(inputs).argsort()
        window = place // self.random.window
        return window[:, None] == window

    def written_out(self, inputs: HeadInputs, attention: Callable[..., Tensor]) -> Tensor:
        return softmax_heads(self, inputs, attention)

    def permutation(self, inputs: HeadInputs) -> Tensor:
        """The permutation of the image tokens that this pass uses: int64 (image tokens,)."""
        grid, device = inputs.grid, inputs.x.device
        draw: int | Tensor = 0
        if inputs.draw is not None and self.random.resample:
            # Several draws may be asked for in evaluation too; only training counts passes.
            passes = self.random.resample if self.training else 1
            draw = inputs.draw.to(device).div(passes, rounding_mode="floor") + 1
        return random_permutation(grid.image_tokens, (self.random.seed, *self.place, *grid.sizes, draw), device)

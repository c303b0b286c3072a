"""conv: a head group without softmax, a small convolution (Vision Big Bird's local heads)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from attnkit.grid import Grid
from attnkit.options import odd, positive
from attnkit.primitives.base import BuildContext, Columns, HeadGroup, HeadInputs, HeadOutput, PrimitiveOptions
from attnkit.primitives.convolving import narrow, on_map
from attnkit.primitives.plain import depthwise, merged, split


@dataclass(frozen=True)
class Conv(PrimitiveOptions):
    """A depthwise convolution of the values, a GELU, and a pointwise convolution that mixes the group's channels.

    Zero padding at the border tells the network where a token lies. Prefix tokens pass through unchanged.

    Args:
        heads: number of heads whose channels the group takes, >= 1.
        kernel: side of the depthwise convolution in tokens, odd, >= 1.
        stride: step between outputs in tokens, >= 1.
        pointwise: add the GELU and the pointwise convolution; without them the group is linear.
    """

    kind: ClassVar[str] = "conv"
    paper: ClassVar[str] = "Zhang and Gong 2023, Vision Big Bird, arXiv 2311.05988 (the convolution's form is ours)"
    formula: ClassVar[str] = "out = W GELU(depthwise_k(v))"
    cost: ClassVar[str] = "N (k^2 C + C^2)"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"kernel": 3}, {"kernel": 7})

    _: KW_ONLY
    kernel: int = 3
    stride: int = 1
    pointwise: bool = True

    def problems(self) -> list[str]:
        return super().problems() + odd(kernel=self.kernel) + positive(stride=self.stride)

    def columns(self, context: BuildContext) -> Columns:
        return Columns(v=self.heads * context.head_dim)

    def output_stride(self) -> int:
        return self.stride

    def period(self, grid: Grid) -> tuple[int, ...]:
        return (self.stride,) * grid.ndim

    def build(self, context: BuildContext) -> ConvHeads:
        return ConvHeads(self, context)


class ConvHeads(HeadGroup):
    """Heads of convolution."""

    def __init__(self, options: Conv, context: BuildContext) -> None:
        super().__init__()
        self.options = options
        width = options.heads * context.head_dim
        self.depthwise = nn.Conv2d(
            width, width, options.kernel, stride=options.stride, padding=options.kernel // 2, groups=width
        )
        self.pointwise: nn.Module | None = nn.Conv2d(width, width, 1) if options.pointwise else None

    def forward(self, inputs: HeadInputs) -> HeadOutput:
        assert inputs.v is not None
        heads, grid = self.options.heads, inputs.grid
        tokens = inputs.v.transpose(1, 2).flatten(2)
        out = on_map(self._convolve, tokens, grid, inputs.token_mask)
        if grid.prefix:
            out = torch.cat([tokens[:, : grid.prefix], out], dim=1)
        return HeadOutput(out.unflatten(2, (heads, -1)).transpose(1, 2), grid.strided(self.options.stride))

    def written_out(self, inputs: HeadInputs, attention: Callable[..., torch.Tensor]) -> torch.Tensor:
        assert inputs.v is not None
        tokens, prefix = merged(inputs.v), inputs.grid.prefix
        image = depthwise(self.depthwise, tokens, inputs.grid, inputs.token_mask)
        if isinstance(self.pointwise, nn.Conv2d):
            image = nn.functional.linear(
                nn.functional.gelu(image), self.pointwise.weight[..., 0, 0], self.pointwise.bias
            )
        return split(torch.cat([tokens[:, :prefix], image], dim=1), self.options.heads)

    def _convolve(self, image: torch.Tensor) -> torch.Tensor:
        image = self.depthwise(narrow(image, self.options.stride))
        return image if self.pointwise is None else self.pointwise(nn.functional.gelu(image))

    def extra_repr(self) -> str:
        return repr(self.options)

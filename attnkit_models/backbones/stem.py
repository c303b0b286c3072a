"""ConvNorm: the unit of stems and of the merges between stages."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from attnkit.errors import ShapeError
from attnkit.options import Options, positive
from attnkit.primitives.convolving import narrow
from attnkit.primitives.learned_query import lecun_normal


@dataclass(frozen=True)
class ConvNorm(Options):
    """A convolution with a norm and an activation around it, as data.

    Args:
        dim: output channels, >= 1.
        kernel: side of the convolution in pixels, >= 1.
        stride: step between outputs in pixels, >= 1.
        padding: zeros around the image in pixels; `None` takes kernel // 2 for kernels larger than the stride, and
            otherwise pads right and bottom only as far as the stride needs, so that sizes are ceil(size / stride).
        bias: whether the convolution has a bias.
        norm: `"layer"`, `"batch"` or `"none"`.
        norm_eps: epsilon of the norm, > 0.
        norm_first: norm before the convolution instead of behind it.
        activation: `"gelu"`, `"relu"` or `"none"`, behind everything.
    """

    kind: ClassVar[str] = "conv_norm"

    dim: int
    kernel: int
    stride: int
    _: KW_ONLY
    padding: int | None = None
    bias: bool = True
    norm: Literal["layer", "batch", "none"] = "layer"
    norm_eps: float = 1e-6
    norm_first: bool = False
    activation: Literal["gelu", "relu", "none"] = "none"

    def problems(self) -> list[str]:
        found = positive(dim=self.dim, kernel=self.kernel, stride=self.stride)
        if self.padding is not None and self.padding < 0:
            found.append(f"padding={self.padding}: must be >= 0 pixels or None")
        if not 0 < self.norm_eps < float("inf"):
            found.append(f"norm_eps={self.norm_eps}: must be a finite number > 0")
        return found

    def build(self, in_dim: int) -> ConvNormLayer:
        """Makes the module for `in_dim` input channels."""
        return ConvNormLayer(in_dim, self)


class ConvNormLayer(nn.Module):
    """(B, C, H, W) -> (B, C', H', W')."""

    def __init__(self, in_dim: int, config: ConvNorm) -> None:
        super().__init__()
        self.config = config
        padding = config.padding
        if padding is None:
            padding = config.kernel // 2 if config.kernel > config.stride else 0
        self.fits = config.padding is None and config.kernel <= config.stride
        self.conv = nn.Conv2d(in_dim, config.dim, config.kernel, config.stride, padding, bias=config.bias)
        self.norm = make_norm(config.norm, in_dim if config.norm_first else config.dim, config.norm_eps)
        activations = {"gelu": nn.GELU, "relu": nn.ReLU, "none": nn.Identity}
        self.act = activations[config.activation]()

    def forward(self, x: Tensor) -> Tensor:
        if self.config.norm_first:
            x = self.norm(x)
        if self.fits:
            stride = self.config.stride
            missing = [-size % stride for size in x.shape[-2:]]
            if any(missing):
                x = F.pad(x, (0, missing[1], 0, missing[0]))
        x = self.conv(narrow(x, self.config.stride))
        return self.act(x if self.config.norm_first else self.norm(x))


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MapBatchNorm(nn.BatchNorm2d):
    """Batch norm that says in which training it cannot work."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.shape[0] * input.shape[2] * input.shape[3] == 1:
            raise ShapeError(
                f"batch norm cannot train on one image that has shrunk to one token, {tuple(input.shape)}; take more "
                "images a batch or larger ones"
            )
        return super().forward(input)


def make_norm(kind: str, dim: int, eps: float) -> nn.Module:
    """The norm of a name for (B, C, H, W); batch norms keep PyTorch's epsilon of 1e-5."""
    if kind == "none":
        return nn.Identity()
    return MapBatchNorm(dim) if kind == "batch" else ChannelNorm(dim, eps=eps)


def init_weights(module: nn.Module, start: str = "trunc_normal") -> None:
    """Fresh weights for a linear layer, zero bias included; what is neither linear nor named here keeps its own start.

    Args:
        module: the layer.
        start: `"trunc_normal"`, a normal of standard deviation 0.02 for linear layers; or `"lecun_normal"`, one of
            variance 1 / inputs for linear layers and ungrouped convolutions. Both are cut at two deviations or more.
    """
    lecun = start == "lecun_normal"
    if lecun and isinstance(module, (nn.Linear, nn.Conv2d)) and getattr(module, "groups", 1) == 1:
        lecun_normal(module.weight.detach().flatten(1))
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)

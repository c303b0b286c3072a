"""Block: norm, head mix, residual, norm, MLP, residual."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from attnkit.arguments import LARGEST, is_count
from attnkit.checks import check_keywords, check_tokens, tokens_of_map
from attnkit.errors import ConfigError
from attnkit.grid import Grid
from attnkit.heads import MIX_KEYWORDS, MixOutput
from attnkit.mixes import GroupLike, Mix, read_groups
from attnkit.options import Options, odd, positive
from attnkit.primitives.convolving import on_map

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


@dataclass(frozen=True)
class BlockStyle(Options):
    """Everything about a block but its mix.

    Args:
        mlp_ratio: hidden width of the MLP over the block's width, > 0.
        norm: `"pre"`, x + f(norm(x)); or `"post"`, norm(x + f(x)).
        norm_eps: epsilon of the layer norms, > 0.
        activation: `"gelu"`, `"gelu_tanh"`, `"relu"` or `"silu"`.
        drop_path: probability of dropping a residual branch per sample, in [0, 1).
        layer_scale: initial value of a learned factor per channel on each branch, or None for no factor.
        residual_scale: number by which each branch is divided (LV-ViT's `skip_lam`), > 0.
        position_conv: kernel of a depthwise convolution added before everything (conditional position encoding), odd,
            0 for none.
        mlp_conv: kernel of a depthwise convolution inside the MLP, odd, 0 for none.
    """

    kind: ClassVar[str] = "block_style"

    _: KW_ONLY
    mlp_ratio: float = 4.0
    norm: Literal["pre", "post"] = "pre"
    norm_eps: float = 1e-6
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = "gelu"
    drop_path: float = 0.0
    layer_scale: float | None = None
    residual_scale: float = 1.0
    position_conv: int = 0
    mlp_conv: int = 0

    def problems(self) -> list[str]:
        found = []
        for name in ("position_conv", "mlp_conv"):
            if getattr(self, name):
                found += odd(**{name: getattr(self, name)})
        for name in ("mlp_ratio", "norm_eps", "residual_scale"):
            if not 0 < getattr(self, name) < float("inf"):
                found.append(f"{name}={getattr(self, name)}: must be a finite number > 0")
        if not 0 <= self.drop_path < 1:
            found.append(f"drop_path={self.drop_path}: must be a probability in [0, 1)")
        return found


@dataclass(frozen=True)
class BlockConfig(BlockStyle):
    """A block as data: a mix, and what `BlockStyle` holds.

    Args:
        mix: the head mix.
        dim: width of the input; needed only where nothing around the block says it.
    """

    kind: ClassVar[str] = "block"

    mix: Mix
    _: KW_ONLY
    dim: int | None = None

    def problems(self) -> list[str]:
        return super().problems() + positive(dim=self.dim)

    def build(self, layer: int = 0) -> Block:
        """Makes the module.

        Raises:
            ConfigError: if neither the block nor its mix says how wide it is.
        """
        width = self.dim or self.mix.dim
        if width is None:
            raise ConfigError("a block on its own needs its width: {'kind': 'block', 'dim': 96, 'mix': {...}}")
        style = {field.name: getattr(self, field.name) for field in dataclasses.fields(BlockStyle)}
        return Block(width, self.mix, layer=layer, **style)


class Block(nn.Module):
    """A transformer block around a head mix.

    `y = x + mix(norm(x)); z = y + mlp(norm(y))`. Where the mix has a stride, a scale or another output width, the
    shortcut is a linear map of every stride-th token of x, or of x with each token repeated; z keeps the mix's grid.

    Args:
        dim: width of the input, C.
        groups: the mix's groups, as for `HeadMix`, or a whole `Mix`.
        mlp_ratio: hidden width of the MLP over the block's width, > 0.
        layer: number of this layer in its model, as for `HeadMix`: blocks of a stack that all leave it out see the same
            random windows.
        **style: the other options of `BlockStyle`, such as `drop_path=0.1` or `layer_scale=1e-5`.

    Raises:
        ConfigError: for options with mistakes, each named with the nearest right one.
    """

    def __init__(
        self,
        dim: int,
        groups: Mix | Sequence[GroupLike],
        mlp_ratio: float = 4.0,
        *,
        layer: int = 0,
        **style: Any,
    ) -> None:
        super().__init__()
        hint = ""
        if any(name in MIX_KEYWORDS for name in style):
            hint = "; options of the mix go into a Mix, such as Mix([Dense(heads=4)], qkv_bias=False) for the groups"
        known = [field.name for field in dataclasses.fields(BlockStyle)]
        check_keywords("Block", style, [*known, "layer"], hint)
        mix = groups if isinstance(groups, Mix) else Mix(read_groups(groups))
        self.config = BlockConfig.from_dict({"mix": mix, "mlp_ratio": mlp_ratio, "dim": dim, **style})
        norm, norm_eps = self.config.norm, self.config.norm_eps
        position_conv, layer_scale = self.config.position_conv, self.config.layer_scale
        self.position_conv: nn.Conv2d | None = None
        if position_conv:
            self.position_conv = nn.Conv2d(dim, dim, position_conv, padding=position_conv // 2, groups=dim)
        self.mix = mix.build(dim, layer)
        width = self.mix.out_dim
        self.stride, self.scale = mix.output_stride, mix.output_scale
        reshaping = (self.stride, self.scale, width) != (1, 1, dim)
        if reshaping and norm == "post":
            raise ConfigError("a block whose mix has a stride, a scale or another output width needs norm='pre'")
        self.shortcut: nn.Linear | None = nn.Linear(dim, width, bias=False) if reshaping else None
        self.norm1 = nn.LayerNorm(width if norm == "post" else dim, eps=norm_eps)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(
            width,
            int(min(width * mlp_ratio, LARGEST + 1)),
            activation=self.config.activation,
            conv=self.config.mlp_conv,
        )
        self.drop_path = DropPath(self.config.drop_path)
        self.scale1 = self.scale2 = None
        if layer_scale is not None:
            self.scale1 = nn.Parameter(torch.full((width,), float(layer_scale)))
            self.scale2 = nn.Parameter(torch.full((width,), float(layer_scale)))

    def forward(
        self, x: Tensor, grid: Grid | None = None, *, token_mask: Tensor | None = None, draw: Tensor | None = None
    ) -> Tensor:
        """Runs the block on a map (B, H, W, C) or on tokens (B, N, C) with their grid; arguments as in `HeadMix`."""
        if grid is not None:
            return self.run(x, grid, token_mask=token_mask, draw=draw).x
        tokens, grid = tokens_of_map(type(self).__name__, self.mix.dim, x, token_mask)
        out = self.run(tokens, grid, draw=draw)
        return out.x.unflatten(1, out.grid.sizes)

    def run(
        self,
        x: Tensor,
        grid: Grid,
        *,
        token_mask: Tensor | None = None,
        draw: Tensor | None = None,
        places: Tensor | None = None,
        prefix_weights: bool = False,
    ) -> MixOutput:
        """Runs the block on tokens and also returns the grid they lie on afterwards, and what its mix has to say.

        Arguments as in `HeadMix.run`; a block with convolutions accepts no places.
        """
        check_tokens(type(self).__name__, self.mix.dim, self.mix.weight, x, grid, token_mask, draw, places)
        if places is not None and not self.accepts_places():
            raise ConfigError("a block with a convolution, or whose mix needs all tokens of its grid, takes no places")
        if self.position_conv is not None:
            local = on_map(self.position_conv, x, grid, token_mask)
            x = x + nn.functional.pad(local, (0, 0, grid.prefix, 0))
        post = self.config.norm == "post"
        mixed = self.mix.run(
            x if post else self.norm1(x),
            grid,
            token_mask=token_mask,
            draw=draw,
            places=places,
            prefix_weights=prefix_weights,
        )
        if post:
            x = self.norm1(x + self._branch(mixed.x, self.scale1))
            x = self.norm2(x + self._branch(self.mlp(x, grid, token_mask), self.scale2))
            return MixOutput(x, grid, mixed.aux)
        if self.shortcut is not None:
            # Dropping the only branch that was computed on the new grid would leave a plain resampling.
            x = self.shortcut(self._resampled(x, grid)) + self._scaled(mixed.x, self.scale1)
        else:
            x = x + self._branch(mixed.x, self.scale1)
        if token_mask is not None:
            token_mask = self._resampled(token_mask[..., None], grid)[..., 0]
        x = x + self._branch(self.mlp(self.norm2(x), mixed.grid, token_mask), self.scale2)
        return MixOutput(x, mixed.grid, mixed.aux)

    def accepts_places(self) -> bool:
        """Whether tokens may be dropped before the block, so that it gets some of a grid's tokens and their places."""
        return self.position_conv is None and self.mlp.conv is None and self.mix.accepts_places()

    def _resampled(self, x: Tensor, grid: Grid) -> Tensor:
        """Every stride-th image token along each axis, or each of them repeated, behind all prefix tokens."""
        if self.stride == self.scale == 1:
            return x
        map_ = x[:, grid.prefix :].unflatten(1, grid.sizes)
        map_ = map_[(slice(None), *(slice(None, None, self.stride),) * grid.ndim)]
        for axis in range(1, grid.ndim + 1 if self.scale > 1 else 1):
            map_ = map_.repeat_interleave(self.scale, axis)
        return torch.cat([x[:, : grid.prefix], map_.flatten(1, grid.ndim)], dim=1)

    def _scaled(self, branch: Tensor, scale: nn.Parameter | None) -> Tensor:
        branch = branch if scale is None else branch * scale
        return branch if self.config.residual_scale == 1.0 else branch / self.config.residual_scale

    def _branch(self, branch: Tensor, scale: nn.Parameter | None) -> Tensor:
        return self.drop_path(self._scaled(branch, scale))


class MLP(nn.Module):
    """Two linear layers with an activation between them: (B, N, C) -> (B, N, C).

    Args:
        dim: width of input and output.
        hidden: width between the layers, >= 1.
        activation: one of `ACTIVATIONS`.
        conv: kernel of a depthwise convolution before the activation, odd, 0 for none.
    """

    def __init__(self, dim: int, hidden: int, *, activation: str = "gelu", conv: int = 0) -> None:
        super().__init__()
        if hidden < 1:
            raise ConfigError(f"an MLP of width {dim} with hidden width {hidden} has no units; raise mlp_ratio")
        if not is_count(hidden):
            raise ConfigError(f"an MLP of width {dim} cannot have {hidden} hidden units or more; lower mlp_ratio")
        self.fc1 = nn.Linear(dim, hidden)
        self.conv = nn.Conv2d(hidden, hidden, conv, padding=conv // 2, groups=hidden) if conv else None
        self.act = ACTIVATIONS[activation]()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, grid: Grid, token_mask: Tensor | None = None) -> Tensor:
        x = self.fc1(x)
        if self.conv is not None:
            image = on_map(self.conv, x, grid, token_mask)
            x = torch.cat([x[:, : grid.prefix], image], dim=1) if grid.prefix else image
        return self.fc2(self.act(x))


class DropPath(nn.Module):
    """Drops a residual branch per sample with probability `rate` in training and scales the rest by 1 / (1 - rate)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.rate or not self.training:
            return x
        keep = 1.0 - self.rate
        return x * x.new_empty(x.shape[0], *(1,) * (x.ndim - 1)).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"

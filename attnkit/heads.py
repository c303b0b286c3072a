"""HeadMix: groups of heads of different primitives on one fused projection."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn, TypeAlias

import torch
from torch import Tensor, nn

from attnkit.arguments import is_count
from attnkit.checks import (
    check_columns,
    check_flags,
    check_group,
    check_keywords,
    check_output,
    check_tokens,
    check_widths,
    tokens_of_map,
)
from attnkit.errors import ConfigError, shown
from attnkit.grid import Grid
from attnkit.mixes import GroupLike, read_groups
from attnkit.padding import cropped, padded
from attnkit.primitives.base import BuildContext, Columns, HeadGroup, HeadInputs
from attnkit.primitives.draws import DrawCounter

Parts: TypeAlias = "tuple[Tensor | None, Tensor | None, Tensor | None]"


@dataclass(frozen=True, eq=False)
class MixOutput:
    """What `HeadMix.run` returns.

    Attributes:
        x: (B, N', C').
        grid: how the N' tokens lie.
        aux: what the groups gave beside their output, under "group number.name".
    """

    x: Tensor
    grid: Grid
    aux: Mapping[str, Tensor]


class HeadMix(nn.Module):
    """Groups of heads, each of its own primitive, side by side: one projection in, one out.

    `out = W_o concat(group_1(x), ..., group_n(x))`, the groups' channels in the order given. One fused linear makes
    exactly the columns the groups need, q then k then v inside a group, so a single dense group has the weights of a
    standard attention layer (`qkv.weight`, `proj.weight`).

    Args:
        dim: width of the input, C.
        groups: option objects or plain dicts, e.g. `[Conv(heads=2), RandomWindow(heads=2, window=49)]`.
        head_dim: width of one head; dim / (number of all heads) where not given.
        out_dim: width of the output; `dim` where not given.
        qkv_bias: whether the fused projection has a bias.
        proj_bias: whether the output projection has a bias.
        projection: as in `Mix`.
        pad_multiple: as in `Mix`.
        layer: number of this layer in its model. Random windows differ from layer to layer by it alone: in a stack of
            your own count it up, or all layers with the same seed see the same windows.

    Raises:
        ConfigError: for an empty mix, heads that do not divide `dim`, unknown keywords, or options with mistakes.
    """

    def __init__(
        self,
        dim: int,
        groups: Sequence[GroupLike],
        *,
        head_dim: int | None = None,
        out_dim: int | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        projection: Literal["linear", "none"] = "linear",
        pad_multiple: int | None = None,
        layer: int = 0,
        **unknown: NoReturn,
    ) -> None:
        super().__init__()
        check_keywords("HeadMix", unknown, MIX_KEYWORDS)
        self.options = read_groups(groups, projection=projection, pad_multiple=pad_multiple)
        check_widths("HeadMix", dim, head_dim=head_dim, out_dim=out_dim)
        check_flags("HeadMix", qkv_bias=qkv_bias, proj_bias=proj_bias)
        if not is_count(layer):
            raise ConfigError(f"HeadMix(layer=...) is the number of a layer, an integer >= 0, but got {shown(layer)}")
        heads = sum(group.heads for group in self.options)
        if head_dim is None and dim % heads:
            each = " + ".join(str(group.heads) for group in self.options)
            split = f"{each} = {heads}" if len(self.options) > 1 else f"{heads}"
            raise ConfigError(
                f"dim={dim} does not divide into {split} heads; choose heads that divide it or give head_dim"
            )
        # `read_groups` made sure that it is the same for all.
        self.stride, self.scale = self.options[0].output_stride(), self.options[0].output_scale()
        self.dim = dim
        self.out_dim = dim if out_dim is None else out_dim
        self.head_dim = dim // heads if head_dim is None else head_dim
        contexts = [BuildContext(dim, self.head_dim, layer, index) for index in range(len(self.options))]
        self.columns: list[Columns] = [
            check_columns(group, group.columns(context)) for group, context in zip(self.options, contexts, strict=True)
        ]
        width = sum(columns.q + columns.k + columns.v for columns in self.columns)
        self.qkv = nn.Linear(dim, width, bias=qkv_bias) if width else None
        self.groups = nn.ModuleList(
            check_group(group, group.build(context)) for group, context in zip(self.options, contexts, strict=True)
        )
        width = heads * self.head_dim
        if projection == "none" and width != self.out_dim:
            raise ConfigError(f"projection='none' leaves the heads' {width} channels, but out_dim={self.out_dim}")
        self.proj = nn.Linear(width, self.out_dim, bias=proj_bias) if projection == "linear" else nn.Identity()
        self.pad_multiple = pad_multiple
        self.draws: Tensor
        self.stochastic = any(group.stochastic for group in self._groups())
        if self.stochastic:
            self.register_buffer("draws", torch.zeros((), dtype=torch.int64))
        self._draws = DrawCounter()

    def forward(
        self, x: Tensor, grid: Grid | None = None, *, token_mask: Tensor | None = None, draw: Tensor | None = None
    ) -> Tensor:
        """Runs the mix.

        Args:
            x: feature map (B, H, W, C), or tokens (B, N, C) with N = prefix + H * W in the order of `grid`.
            grid: how the tokens lie; needed for tokens, left out for a map.
            token_mask: bool (B, N); tokens where it is False are seen by no query. Tokens only.
            draw: number of the random draw, from `next_draw`; needed only where this call may be run a second time, as
                activation checkpointing does.

        Returns:
            (B, H', W', C') or (B, N', C').
        """
        if grid is not None:
            return self.run(x, grid, token_mask=token_mask, draw=draw).x
        tokens, grid = tokens_of_map(type(self).__name__, self.dim, x, token_mask)
        found = self.run(tokens, grid, draw=draw)
        return found.x.unflatten(1, found.grid.sizes)

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
        """Runs the mix on tokens and also returns the new grid and what the groups have to say beside their output.

        Args:
            x: (B, N, C).
            grid: how the tokens lie.
            token_mask: as in `forward`.
            draw: as in `forward`.
            places: int64 (B, N), the numbers of the tokens x holds where some of the grid's have been dropped: rising,
                with all prefix tokens. Only mixes that say so by `accepts_places` take any.
            prefix_weights: also give what prefix tokens attend to, as "group number.prefix_weights" of (B, heads,
                prefix, N) for each group with softmax.

        Raises:
            ConfigError: for places or prefix weights that the groups cannot deal with.
        """
        check_tokens(type(self).__name__, self.dim, self.weight, x, grid, token_mask, draw, places)
        if places is not None and not self.accepts_places():
            raise ConfigError(
                f"{', '.join(group.kind for group in self.options)}: this mix needs all tokens of its grid; mask those "
                f"that no query may see (token_mask=...) instead of dropping them"
            )
        if draw is None:
            draw = self.next_draw()
        whole = grid
        if self.pad_multiple is not None:
            x, grid, token_mask = padded(x, grid, self.pad_multiple, token_mask)
        qkv = self.qkv
        columns = x[..., :0] if qkv is None else qkv(x)
        parts = _heads(columns, self.columns, [options.heads for options in self.options])
        out_grid = grid.strided(self.stride).refined(self.scale)
        batch, tokens = x.shape[0], out_grid.tokens if places is None else x.shape[1]
        joining: list[Tensor] = []
        aux: dict[str, Tensor] = {}
        for index, (group, options, (q, k, v)) in enumerate(zip(self.groups, self.options, parts, strict=True)):
            output = group(HeadInputs(x, q, k, v, grid, token_mask, draw, places, prefix_weights))
            check_output(options, output, (batch, options.heads, tokens, self.head_dim), out_grid)
            joining.append(output.out.transpose(1, 2).flatten(2))
            for name, one in output.aux.items():
                aux[f"{index}.{name}"] = one
        joined = joining[0] if len(joining) == 1 else torch.cat(joining, dim=-1)
        if self.pad_multiple is not None:
            joined, out_grid = cropped(joined, grid, whole), whole
        return MixOutput(self.proj(joined), out_grid, aux)

    def accepts_places(self) -> bool:
        """Whether tokens may be dropped before the mix, so that it gets some of a grid's tokens and their places."""
        return self.pad_multiple is None and all(group.accepts_places() for group in self._groups())

    @property
    def weight(self) -> Tensor:
        """One of the parameters, whose dtype and device inputs must have."""
        linear = self.proj
        if not isinstance(linear, nn.Linear):
            linear = self.qkv
        return next(self.parameters()) if linear is None else linear.weight

    def next_draw(self) -> Tensor | None:
        """Counts one more training pass and returns its number; None in evaluation or where nothing is random.

        A region that activation checkpointing runs a second time must see the same windows again. A model therefore
        calls this outside the region and passes the number in. Where that was not done, a second run takes the number
        of the first as long as only one is pending. Compiled code cannot tell a second run: there, always pass it in.

        Raises:
            AttnkitError: if a region is run again and it is not one single pass that this may be.
        """
        return self._draws.next(self.draws) if self.stochastic and self.training else None

    def extra_repr(self) -> str:
        return f"dim={self.dim}, head_dim={self.head_dim}, out_dim={self.out_dim}"

    def _groups(self) -> list[HeadGroup]:
        return typing.cast("list[HeadGroup]", list(self.groups))


MIX_KEYWORDS = tuple(HeadMix.__init__.__kwdefaults__ or ())


def _heads(columns: Tensor, widths: list[Columns], heads: list[int]) -> list[Parts]:
    """q, k and v of every group, views (B, heads, N, D) of the columns (B, N, all widths), None where it has none."""
    batch, tokens, _ = columns.shape
    first = widths[0]
    if len(widths) == 1 and first.q == first.k == first.v and first.q:
        q, k, v = columns.view(batch, tokens, 3, heads[0], first.q // heads[0]).unbind(2)
        return [(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))]
    each = [width for one in widths for width in (one.q, one.k, one.v) if width]
    # One split for all groups is one copy in the backward pass.
    pieces = iter(columns.split(each, dim=-1) if len(each) > 1 else (columns,))

    def part(width: int, count: int) -> Tensor | None:
        return next(pieces).view(batch, tokens, count, width // count).transpose(1, 2) if width else None

    return [
        (part(one.q, count), part(one.k, count), part(one.v, count)) for one, count in zip(widths, heads, strict=True)
    ]

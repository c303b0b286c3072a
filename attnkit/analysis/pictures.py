"""draw: pictures of which tokens a few queries see."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from attnkit.analysis.canvas import PictureRow, Tile, draw_rows, picture_file, save
from attnkit.analysis.palette import BY_CONTENT, GROUND, OWN, SKY, THING, channels, colour_of
from attnkit.analysis.scene import scene_mix, scene_parts, scene_tokens
from attnkit.analysis.sight import Sight
from attnkit.analysis.tracing import ImageSize, sizes_of, unmarked, visits
from attnkit.arguments import is_count
from attnkit.blocks import Block, BlockConfig
from attnkit.errors import ConfigError, ShapeError, shown
from attnkit.grid import Grid
from attnkit.heads import HeadMix
from attnkit.layouts import Layout
from attnkit.mixes import Mix
from attnkit.options import Options
from attnkit.primitives import PrimitiveOptions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# 256 x 256; the mask of a layout has as many entries as this squared.
MOST_TOKENS = 2**16

Drawable: TypeAlias = "Options | Layout | nn.Module | Mapping[str, Any] | Sequence[Any]"
Query: TypeAlias = "int | tuple[int, int] | Sequence[int | tuple[int, int]] | None"


def draw(
    what: Drawable,
    grid: ImageSize | None = None,
    path: str | Path | None = None,
    query: Query = None,
    *,
    matrix: bool = False,
    scene: bool | None = None,
) -> Figure:
    """Draws which tokens a few queries see: a row of tiles per head group, one tile per query.

    A coloured token is seen, paler if only some of the group's heads see it; the dark square is the query. Tokens that
    share a key run together. A convolution shows the tokens its output depends on. Where the choice
    depends on the content, a made-up picture with two like things stands for an image, and like attends to like.

    Args:
        what: options of a primitive, a list of them, a `Mix`, `HeadMix` or `Block`, a plain dict, or a layout.
        grid: the tokens' grid: a number, (height, width), or a `Grid` with one or two axes; 14 x 14 where not given,
            or for a layout what fits it.
        path: where to write the picture, ending in .png, .svg or .pdf.
        query: the image token to look from, as its number or (row, column), or a list of them; four spread over the
            grid where not given.
        matrix: add the mask of all queries and tokens to each row.
        scene: show the made-up picture as first tile; by default only where a group's keys depend on content.

    Returns:
        A matplotlib `Figure`, drawn without a display and without pyplot.

    Raises:
        ConfigError: for something that has no pattern, a query outside the grid, or a path that cannot be written.
        MissingExtraError: if matplotlib is not installed.
    """
    file = picture_file(path)
    rows = picture_rows(what, grid, query, matrix=matrix)
    on = _grid_for(what, grid)
    by_content = any(row.colour == BY_CONTENT for row in rows)
    first = scene_colours(on) if (by_content if scene is None else scene) else None
    figure = draw_rows(rows, (on.height, on.width), first)
    save(figure, file)
    return figure


def picture_rows(
    what: Drawable, grid: ImageSize | None = None, query: Query = None, *, matrix: bool = False
) -> list[PictureRow]:
    """What `draw` shows, as data; arguments as there."""
    on = _grid_for(what, grid)
    if isinstance(what, Layout):
        return [_layout_row(what, on, _spots(query, on), matrix)]
    mix = scene_mix_of(what, on)
    tokens = scene_tokens(on, mix.dim).to(mix.weight)
    with unmarked(mix):
        sights = [Sight(visit) for visit in visits(mix, (tokens, on)) if visit.inputs is not None]
        return [_group_row(sight, _spots(query, on), matrix) for sight in sights]


def scene_mix_of(what: Any, grid: Grid) -> HeadMix:
    """The module to draw: a given one as it is, else one made for the made-up picture."""
    if isinstance(what, Block):
        return what.mix
    if isinstance(what, HeadMix):
        return what
    if isinstance(what, Mapping):
        from attnkit import factory

        what = factory.config(what)
    if isinstance(what, BlockConfig):
        what = what.mix
    if isinstance(what, PrimitiveOptions):
        what = [what]
    if isinstance(what, Mix) or (isinstance(what, Sequence) and not isinstance(what, str)):
        return scene_mix(what, grid)
    raise ConfigError(
        f"draw takes options such as attnkit.Window(heads=2, window=7), a list of them, a HeadMix, a Block "
        f"or a layout, but got {shown(what)}"
    )


def describe_options(options: PrimitiveOptions) -> str:
    """Options as they are written, without defaults: `Window(heads=2, window=7)`."""
    plain = {name: value for name, value in options.to_dict().items() if name != "kind"}
    return f"{type(options).__name__}({', '.join(f'{name}={value!r}' for name, value in plain.items())})"


def _group_row(sight: Sight, spots: list[tuple[int, int]], matrix: bool) -> PictureRow:
    options = getattr(sight.visit.module, "options", None)
    title = describe_options(options) if isinstance(options, PrimitiveOptions) else sight.visit.kind
    tiles, queries = [], []
    cells = sight.cells()
    for spot in spots:
        query, place = sight.nearest_query(spot[-sight.grid.ndim :])
        queries.append(query)
        tiles.append(_tile(sight.seen(query), sight.grid, (0, *place)[-2:], cells))  # type: ignore[arg-type]
    mask = None
    if matrix:
        mask = torch.stack([sight.seen(query) for query in range(sight.query_grid.tokens)])
    return PictureRow(title, note_of(sight, queries), colour_of(sight.visit.kind), tuple(tiles), mask)


def note_of(sight: Sight, queries: Sequence[int]) -> str:
    """How many keys the queries see, in words."""
    tokens = sight.grid.tokens
    counts = [count for query in queries for count in sight.key_counts(query)]
    seen = torch.stack([sight.seen(query) for query in queries]) > 0
    if not counts:
        return f"no softmax; {int(seen.sum(1).max())} of {tokens} tokens"
    made, padding = (_from_to(numbers) for numbers in zip(*counts, strict=True))
    note, what = f"{made} of {tokens} tokens", sight.keys_are()
    if what != "tokens":
        note = f"{made} {what} of {'all' if seen.all() else _from_to(seen.sum(1).tolist()) + ' of'} {tokens} tokens"
    return note if padding == "0" else f"{note} and {padding} padding zeros"


def _from_to(numbers: Sequence[float]) -> str:
    low, high = round(min(numbers)), round(max(numbers))
    return f"{low}" if low == high else f"{low} to {high}"


def _layout_row(layout: Layout, grid: Grid, spots: list[tuple[int, int]], matrix: bool) -> PictureRow:
    mask = layout.to_mask().float().mean((0, 1))
    tiles = []
    for spot in spots:
        query, place = _layout_query(layout, grid, spot)
        tiles.append(_tile(mask[query], grid, place, None))
    note = f"{100 * layout.density():.3g} % of {layout.num_queries} x {layout.num_keys} pairs"
    return PictureRow(f"{type(layout).__name__} layout", note, OWN, tuple(tiles), mask if matrix else None)


def _layout_query(layout: Layout, grid: Grid, spot: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """The layout's query nearest to a token: its number, and the token it stands on."""
    stride = getattr(layout, "stride", None)
    if stride is None:
        # A layout that does not say so may still have been made with a stride.
        stride = max(round(math.sqrt(layout.num_keys / max(layout.num_queries, 1))), 1)
    steps = grid.per_axis(stride, "stride")
    sizes = grid.strided(steps).sizes
    if grid.prefix + math.prod(sizes) != layout.num_queries:
        raise ShapeError(
            f"draw cannot place the {layout.num_queries} queries of this layout on {grid}; draw the mix instead"
        )
    query, place = 0, []
    for at, step, size in zip(spot[-grid.ndim :], steps, sizes, strict=True):
        index = min(at // step, size - 1)
        query = query * size + index
        place.append(index * step)
    return grid.prefix + query, (0, *place)[-2:]  # type: ignore[return-value]


def _tile(shares: Tensor, grid: Grid, spot: tuple[int, int], cells: Tensor | None) -> Tile:
    sizes = (grid.height, grid.width)
    framed = None if cells is None else cells[grid.prefix :].view(sizes)
    shares = shares.detach().float().cpu()
    return Tile(shares[grid.prefix :].view(sizes), shares[: grid.prefix], spot, framed)


def _grid_for(what: Drawable, size: ImageSize | None) -> Grid:
    """The grid that was given, else what fits a layout, else 14 x 14."""
    grid = None if size is None else size if isinstance(size, Grid) else Grid(*sizes_of(size))
    if isinstance(what, Layout):
        tokens = what.num_keys - what.global_keys
        side = math.isqrt(tokens)
        guess = (side, side) if side * side == tokens and side else (max(tokens, 1),)
        grid = grid or getattr(what, "grid", None) or Grid(*guess, prefix=what.global_keys)
        if grid.tokens != what.num_keys:
            raise ShapeError(f"the layout has {what.num_keys} keys, which do not lie on {grid}; give draw their grid")
    grid = grid or Grid(14, 14)
    if grid.ndim > 2:
        raise ShapeError(f"draw shows grids with one or two axes, but got {grid}")
    if grid.tokens > MOST_TOKENS:
        raise ShapeError(f"draw shows up to {MOST_TOKENS} tokens, but got {grid}")
    return grid


def _spots(query: Query, grid: Grid) -> list[tuple[int, int]]:
    """Row and column of the queries to show."""
    height, width = grid.height, grid.width
    if query is None:
        shares = ((0.0, 0.0), (0.32, 0.27), (0.6, 0.77), (0.93, 0.45))
        return list(dict.fromkeys((int(y * height), int(x * width)) for y, x in shares))
    several = isinstance(query, Sequence) and not isinstance(query, str) and query and not _is_place(query, tuple)
    given: list[Any] = list(query) if several else [query]  # type: ignore[arg-type]
    spots = []
    for one in given:
        place: Any = divmod(one, width) if is_count(one) else one
        if not _is_place(place, (tuple, list)) or place[0] >= height or place[1] >= width:
            raise ConfigError(
                f"query={shown(one)} is no token of {grid}; give its number or (row, column), counted from 0"
            )
        spots.append((place[0], place[1]))
    return spots


def _is_place(value: Any, kinds: type | tuple[type, ...]) -> bool:
    """Whether a value is (row, column)."""
    return isinstance(value, kinds) and len(value) == 2 and all(map(is_count, value))  # type: ignore[arg-type]


def scene_colours(grid: Grid) -> Tensor:
    """The made-up picture in colour: (H, W, 3)."""
    parts = scene_parts(grid).view(grid.height, grid.width, 3)
    return parts @ torch.tensor([channels(colour) for colour in (SKY, GROUND, THING)])

"""draw_attention: what each head group of a model looks at on a real image."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnkit.analysis.canvas import label, new_figure, picture_file, save
from attnkit.analysis.palette import INK, MUTED, PAPER, channels, colour_of
from attnkit.analysis.sight import Sight
from attnkit.analysis.tables import percent
from attnkit.analysis.tracing import image_channels, prepared, reported, unmarked, visits
from attnkit.arguments import is_count
from attnkit.errors import ConfigError, ShapeError, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_ROWS = 6
TILE, GAP, MARGIN, TITLE = 1.75, 0.16, 0.12, 0.34


@dataclass(frozen=True, eq=False)
class Glance:
    """What one head group looks at.

    Attributes:
        kind: name of the primitive.
        heat: weight of every image token, scaled so that the largest is 1: (h, w).
        prefix: share of all weight that lies on prefix tokens, 0..1.
        box: top, bottom, left and right of the query token in pixels.
    """

    kind: str
    heat: Tensor
    prefix: float
    box: tuple[float, float, float, float]


def draw_attention(
    model: nn.Module,
    image: Tensor,
    path: str | Path | None = None,
    *,
    picture: Tensor | None = None,
    layers: Sequence[str] | None = None,
    query: tuple[int, int] | None = None,
    title: str = "",
) -> Figure:
    """Draws what the head groups of a model look at on an image, from one place of it.

    One row per layer: the image with the query token framed, then one picture per head group. The stronger the colour,
    the larger the token's weight in the output of the query, mean over the group's heads; keys that were averaged from
    several tokens spread their weight over them. For groups without softmax, such as convolutions, it is the size of
    the derivative of the query's output by the token. Every picture is scaled to its own largest weight.

    Args:
        model: a model whose layers are built from `HeadMix`; evaluated as it is, and left as it was.
        image: one normalised image as the model takes it, (C, H, W) or (1, C, H, W).
        path: where to write the picture, ending in .png, .svg or .pdf.
        picture: what to show instead of `image`: (H', W'), (1 or 3, H', W') in 0..1 or 0..255.
        layers: names of the mixes to show, with `*` for any letters, e.g. `["stages.*.blocks.1.mix"]`; the last of
            each stage where not given, or up to six spread over a model of one stage.
        query: row and column of the place to look from in pixels of `image`; the place with most contrast near the
            middle where not given.
        title: a line above everything, such as the true and the predicted class.

    Returns:
        A matplotlib `Figure`, drawn without a display and without pyplot.

    Raises:
        ConfigError: for something that is no model of head groups, names that fit no layer, or a path that cannot be
            written.
        ShapeError: for an image the model cannot take, or a query outside of it.
        MissingExtraError: if matplotlib is not installed.
    """
    module = prepared(model, "draw_attention")
    file, patterns = picture_file(path), _patterns(layers)
    image = _single(module, image)
    ground = _light(image if picture is None else picture)
    pixels = (int(image.shape[2]), int(image.shape[3]))
    place = _lively_place(image[0]) if query is None else query
    pair = isinstance(place, (tuple, list)) and len(place) == 2 and all(map(is_count, place))
    if not pair or place[0] >= pixels[0] or place[1] >= pixels[1]:
        raise ShapeError(f"query={shown(query)} is no (row, column) of an image of {pixels[0]} x {pixels[1]} pixels")
    with reported("draw_attention", module, (image,)), unmarked(module):
        rows: dict[str, list[Sight]] = {}
        for visit in visits(module, (image,)):
            if visit.inputs is not None and visit.inputs.grid.ndim == 2:
                rows.setdefault(visit.path.rpartition(".groups.")[0] or visit.path, []).append(Sight(visit))
        if not rows:
            raise ConfigError(f"draw_attention needs a model with head mixes, but {type(module).__name__} runs none")
        glances = {name: [_glance(one, place, pixels) for one in rows[name]] for name in _chosen(rows, patterns)}
    figure = _figure(glances, ground, pixels, title)
    save(figure, file)
    return figure


def _single(module: nn.Module, image: Tensor) -> Tensor:
    channel_count = image_channels(module)
    full = image[None] if isinstance(image, Tensor) and image.ndim == 3 else image
    if not isinstance(full, Tensor) or full.ndim != 4 or full.shape[0] != 1 or full.shape[1] != channel_count:
        raise ShapeError(
            f"draw_attention takes one image ({channel_count}, H, W) or with a 1 before, but got {shown(image)}"
        )
    like = next((one for one in module.parameters() if one.is_floating_point()), full)
    return full.detach().to(like)


def _light(picture: Tensor) -> Tensor:
    """The picture as light colours (H, W, 3), so that what lies on it stands out."""
    if not isinstance(picture, Tensor) or picture.ndim not in (2, 3, 4) or not picture.numel():
        raise ShapeError(f"picture is a tensor (H, W), (1, H, W) or (3, H, W), but got {shown(picture)}")
    image = picture.detach().float().cpu()
    image = image[0] if image.ndim == 4 else image[None] if image.ndim == 2 else image
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        image = image.flatten(0, -3).mean(0, keepdim=True)
    low, high = image.amin(), image.amax()
    image = (image - low) / (high - low).clamp(min=1e-6)
    return image.expand(3, -1, -1).permute(1, 2, 0)


def _lively_place(image: Tensor) -> tuple[int, int]:
    """The pixel around which the image differs most from its average and varies most, with a liking for the middle."""
    grey = image.float().mean(0)[None, None]
    height, width = grey.shape[2:]
    side = max(min(height, width) // 16 * 2 + 1, 3)
    mean, square = (F.avg_pool2d(one, side, 1, side // 2) for one in (grey, grey.square()))
    spread = (square - mean.square()).clamp(min=0).sqrt()
    rows, columns = (torch.linspace(-1, 1, size, device=grey.device) for size in (height, width))
    liking = torch.exp(-(rows[:, None] ** 2 + columns[None] ** 2))
    score = (mean - grey.mean()).abs() * (spread + 1e-3) + 1e-9
    return divmod(int((score[0, 0] * liking).argmax()), width)


def _patterns(layers: Sequence[str] | None) -> list[str] | None:
    names = [layers] if isinstance(layers, str) else layers
    if names is not None and not (isinstance(names, (list, tuple)) and all(isinstance(one, str) for one in names)):
        raise ConfigError(f"layers is a list of names such as ['blocks.*.mix'], but got {shown(layers)}")
    return None if names is None else list(names)


def _chosen(rows: dict[str, list[Sight]], patterns: list[str] | None) -> list[str]:
    names = list(rows)
    if patterns is not None:
        found = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
        if not found:
            raise ConfigError(f"layers={shown(patterns)} fits none of the mixes, which are {', '.join(names)}")
        return found
    stages: dict[tuple[int, ...], list[str]] = {}
    for name in names:
        stages.setdefault(rows[name][0].grid.sizes, []).append(name)
    if len(stages) > 1:
        return [stage[-1] for stage in stages.values()][:MOST_ROWS]
    count = min(MOST_ROWS, len(names))
    return [names[round(at * (len(names) - 1) / max(count - 1, 1))] for at in range(count)]


def _glance(sight: Sight, place: tuple[int, int], pixels: tuple[int, int]) -> Glance:
    grid = sight.grid
    steps = [size / count for size, count in zip(pixels, grid.sizes, strict=True)]
    tokens = [(at + 0.5) / step - 0.5 for at, step in zip(place, steps, strict=True)]
    query, (row, column) = sight.nearest_query(tokens)
    weights = sight.weights(query).detach().float().cpu()
    heat = weights[grid.prefix :].view(grid.sizes)
    total = weights.sum().clamp(min=1e-30)
    box = (row * steps[0], (row + 1) * steps[0], column * steps[1], (column + 1) * steps[1])
    return Glance(
        sight.visit.kind, heat / heat.max().clamp(min=1e-30), float(weights[: grid.prefix].sum() / total), box
    )


def _lines(glances: dict[str, list[Glance]]) -> list[tuple[str, list[tuple[str, Glance]]]]:
    """Title and labelled pictures of every row; layers of one group on one grid share a row."""
    groups = list(glances.values())
    if all(len(one) == 1 and one[0].heat.shape == groups[0][0].heat.shape for one in groups):
        return [("", [(f"{_short(name)} {one[0].kind}", one[0]) for name, one in glances.items()])]
    return [(_short(name), [(one.kind, one) for one in group]) for name, group in glances.items()]


def _short(name: str) -> str:
    return name.removesuffix(".mix") or "mix"


def _figure(glances: dict[str, list[Glance]], ground: Tensor, pixels: tuple[int, int], heading: str) -> Any:
    lines = _lines(glances)
    columns = 1 + max(len(row) for _, row in lines)
    tall = min(max(TILE * pixels[0] / pixels[1], 0.6), 5.0)
    head = 0.5 if lines[0][0] else 0.26
    foot = 0.3 if any(one.prefix for group in glances.values() for one in group) else 0.12
    row_height = tall + head + foot
    above = TITLE if heading else 0.0
    total = (MARGIN + (TILE + GAP) * columns, above + row_height * len(lines))
    figure = new_figure(*total)
    if heading:
        figure.text(MARGIN / total[0], 1 - 0.26 / total[1], heading, fontsize=10.5, fontweight="bold", color=INK)
    for at, (title, row) in enumerate(lines):
        top = above + at * row_height + head
        x, y = MARGIN / total[0], 1 - (top - 0.27) / total[1]
        figure.text(x, y, title, fontsize=9.5, family="monospace", color=INK)
        first = row[0][1]
        for column, (text, glance) in enumerate([("", first), *row]):
            left = MARGIN + column * (TILE + GAP)
            axes = figure.add_axes((left / total[0], 1 - (top + tall) / total[1], TILE / total[0], tall / total[1]))
            _panel(axes, ground, glance if column else None, glance.box, pixels)
            if not column:
                sizes = " x ".join(map(str, first.heat.shape))
                label(axes, f"query, of {sizes} tokens", size=8.5, muted=True, pad=3)
            else:
                label(axes, text, size=9, pad=3)
                if glance.prefix:
                    axes.set_xlabel(f"{percent(glance.prefix)} on prefix tokens", fontsize=8, color=MUTED, labelpad=3)
    return figure


def _panel(axes: Any, ground: Tensor, glance: Glance | None, box: Sequence[float], pixels: tuple[int, int]) -> None:
    from matplotlib.patches import Rectangle

    extent = (0, pixels[1], pixels[0], 0)
    # Under the heat a grey picture behind a veil: its shapes stay visible, its colours do not compete.
    under = ground if glance is None else ground.mean(-1, keepdim=True).expand(-1, -1, 3)
    axes.imshow(under.numpy(), extent=extent, interpolation="nearest")
    if glance is not None:
        axes.imshow(torch.ones(1, 1, 3).numpy(), extent=extent, alpha=0.6)
        colour = torch.tensor(channels(colour_of(glance.kind))).expand(*glance.heat.shape, 3)
        heat = torch.cat([colour, 0.95 * glance.heat.clamp(0, 1)[..., None]], dim=-1)
        axes.imshow(heat.numpy(), extent=extent, interpolation="nearest")
    top, bottom, left, right = box
    for line, width in ((PAPER, 3.0), (INK, 1.4)):
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=line, linewidth=width))
    axes.set_xlim(0, pixels[1])
    axes.set_ylim(pixels[0], 0)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(MUTED)
        spine.set_linewidth(0.6)

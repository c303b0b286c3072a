"""Draws docs/pictures/patterns.png and mix.png, the pictures of the README, from the registry.

Run it from the repository root: python docs/generate/patterns.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import attnkit
from attnkit.analysis.canvas import Tile, draw_tile, new_figure, save
from attnkit.analysis.palette import INK, MEANINGS, MUTED
from attnkit.analysis.pictures import picture_rows, scene_colours
from attnkit.registry import PRIMITIVES, primitive_class

PICTURES = Path(__file__).parents[1] / "pictures"
FIRST = ("conv", "random_window", "pooled_global", "topk_region", "mask_predictor", "learned_query")
# Not drawn: they look like what they are variants of.
VARIANTS = (
    "learned_upsample",
    "soft_topk_region",
    "padded_topk_region",
    "threshold_mask_predictor",
    "competing_mask_predictor",
    "mask_reconstruction",
)
GRID = attnkit.Grid(14, 14)
QUERY = (4, 3)
TILE, GAP, LINE = 1.5, 0.17, 0.52


def note_of(text: str) -> str:
    """The note of a picture row without the grid's size, which the caption tells once."""
    return text.replace(" of 196 tokens", " tokens").replace(" of all 196 tokens", "").replace("no softmax; ", "")


def draw_patterns() -> Any:
    """The registered primitives from one query, the six of the four papers first, without variants of those shown."""
    names = [*FIRST, *(name for name in PRIMITIVES if name not in (*FIRST, *VARIANTS))]
    columns = len(FIRST)
    lines = -(-(len(names) + 1) // columns)
    width = columns * (TILE + GAP) + GAP + 0.1
    height = lines * (TILE + LINE) + 0.1
    figure = new_figure(width, height)

    def place(number: int) -> tuple[float, float]:
        line, column = divmod(number, columns)
        return GAP + column * (TILE + GAP), line * (TILE + LINE) + LINE - 0.06

    def axes_at(left: float, top: float, side: float = TILE) -> Any:
        return figure.add_axes((left / width, 1 - (top + side) / height, side / width, side / height))

    def text_at(left: float, top: float, text: str, **style: Any) -> None:
        figure.text(left / width, 1 - top / height, text, va="baseline", **style)

    for number, name in enumerate(names):
        cls = primitive_class(name)
        options = cls(**{"heads": 2, **cls.examples[0]})  # type: ignore[attr-defined]
        row = picture_rows(options, GRID, [QUERY])[0]
        left, top = place(number)
        text_at(left, top - 0.23, name, fontsize=10.5, family="monospace", color=INK)
        text_at(left, top - 0.06, note_of(row.note), fontsize=8.5, color=MUTED)
        draw_tile(axes_at(left, top), row.tiles[0], row.colour)
    left, top = place(len(names))
    side = 0.66
    blank = Tile(torch.zeros(14, 14), torch.zeros(0), spot=QUERY)
    draw_tile(axes_at(left, top, side), blank, INK, image=scene_colours(GRID), gap=0.7)
    for number, text in enumerate(("the picture,", "14 x 14 tokens,", "and the query")):
        text_at(left + side + 0.08, top + 0.2 + 0.15 * number, text, fontsize=8.5, color=MUTED)
    text_at(left, top + side + 0.24, "Keys are", fontsize=8.5, color=MUTED)
    for number, (colour, meaning) in enumerate(MEANINGS.items()):
        at = top + side + 0.42 + 0.165 * number
        text_at(left, at, "■", fontsize=10, color=colour)
        text_at(left + 0.15, at, meaning, fontsize=8.5, color=INK)
    return figure


def draw_mix() -> Any:
    """The README's mix of three primitives."""
    groups = [
        attnkit.Conv(heads=2),
        attnkit.RandomWindow(heads=2, window=49),
        attnkit.PooledGlobal(heads=2, pool=4),
    ]
    return attnkit.draw(groups, GRID)


if __name__ == "__main__":
    save(draw_patterns(), PICTURES / "patterns.png")
    save(draw_mix(), PICTURES / "mix.png")

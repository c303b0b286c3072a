"""Draws docs/pictures/reach.png and renews the table of docs/reach.md: who can hear of whom, measured and predicted.

Run it from the repository root: python docs/generate/reach.py

It takes about a minute on one core. `predicted` holds the formulas that the page derives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnkit import Conv, Grid, PooledGlobal, RandomWindow
from attnkit.analysis import reach
from attnkit.analysis.canvas import Tile, draw_tile, label, new_figure, save
from attnkit.analysis.palette import BY_CHANCE, BY_PLACE, EVERYTHING, INK, MUTED, UNSEEN

PAGE = Path(__file__).parents[1] / "reach.md"
PICTURE = Path(__file__).parents[1] / "pictures" / "reach.png"
BEGIN, END = "<!-- table: docs/generate/reach.py -->", "<!-- end of the table -->"

KINDS = ("random windows", "convolution and random windows", "all three")
COLOURS = dict(zip(KINDS, (BY_CHANCE, BY_PLACE, EVERYTHING), strict=True))
LAYERS = (1, 2, 3)
# Sides of the map, tokens a window and tokens a side of a cell: the first three stages of `bigbird_vit` at 224 x 224
# pixels, and two with windows so small that a third layer shows.
CASES = ((56, 49, 8), (28, 49, 4), (14, 49, 2), (28, 16, 4), (14, 7, 2))
DRAWN = (CASES[0], CASES[3])
SHOWN = (28, 16, 4)
# Row and column of the output whose reach is shown.
OUTPUT = (12, 9)
DRAWS = 4
# Outputs that are asked about per draw; all of a smaller map.
MOST_OUTPUTS = 196


def groups(kind: str, window: int, pool: int, seed: int = 0) -> list[Any]:
    """The head groups of a layer."""
    random = RandomWindow(1, window, seed=seed)
    return {KINDS[0]: [random], KINDS[1]: [Conv(1), random], KINDS[2]: [Conv(1), random, PooledGlobal(1, pool)]}[kind]


def measured(kind: str, side: int, window: int, pool: int, layers: int, draws: int = DRAWS) -> float:
    """Share of the tokens that can influence an output token, by gradients; mean over outputs and draws."""
    step = max(side * side // MOST_OUTPUTS, 1)
    shares = []
    for seed in range(draws):
        # Every step-th token, from another one on in every draw.
        outputs = range(seed % step, side * side, step)
        found = reach(groups(kind, window, pool, seed), side, layers, outputs=outputs)
        shares.append(found.double().mean().item())
    return sum(shares) / len(shares)


def missed(tokens: int, window: int, size: int) -> float:
    """Probability that a token outside a set of `size` tokens has none of it in its window."""
    if size >= tokens:
        return 0.0
    return math.comb(tokens - 1 - size, window - 1) / math.comb(tokens - 1, window - 1)


def windows_hit(tokens: int, window: int, size: int) -> Iterator[tuple[int, float]]:
    """How many windows hold some of a set of `size` tokens: numbers and their probabilities."""
    count, ways = tokens // window, math.comb(tokens, size)
    for hit in range(1, min(count, size) + 1):
        # Inclusion and exclusion: the set lies in some `hit` windows, and in no fewer.
        within = sum((-1) ** out * math.comb(hit, out) * math.comb((hit - out) * window, size) for out in range(hit))
        yield hit, math.comb(count, hit) * within / ways


def random_windows(tokens: int, window: int, layers: int) -> float:
    """Expected share after some layers of random windows, exact where windows divide the tokens."""
    sizes = {1: 1.0}
    for _ in range(layers - 1):
        after: dict[int, float] = {}
        for size, chance in sizes.items():
            for hit, share in windows_hit(tokens, window, size):
                after[hit * window] = after.get(hit * window, 0.0) + chance * share
        sizes = after
    rest = sum(chance * (1 - size / tokens) * missed(tokens, window, size) for size, chance in sizes.items())
    return 1 - rest


def near(side: int, distance: int) -> Tensor:
    """Number of tokens within a distance of every token, itself included: (side,) per axis; the product counts both."""
    place = torch.arange(side)
    return (place + distance).clamp(max=side - 1) - (place - distance).clamp(min=0) + 1


def with_convolution(side: int, window: int, layers: int) -> float:
    """Expected share where a 3 x 3 convolution stands beside the windows; exact up to two layers."""
    tokens = side * side
    axis = near(side, 1).tolist()
    around = [[down * right for right in axis] for down in axis]
    counts = [count for row in around for count in row]
    if layers == 1:
        return sum(count + (tokens - count) * (window - 1) / (tokens - 1) for count in counts) / tokens**2
    if layers == 2:
        pairs = far_pairs(side)
        rest = sum(number * both_miss(tokens, window, *sizes) for sizes, number in pairs.items())
        return 1 - rest / tokens**2
    before = with_convolution(side, window, layers - 1)
    size = round(before * tokens)
    mean = sum(counts) / tokens
    return 1 - (1 - before) ** mean * missed(tokens, window, size)


def far_pairs(side: int) -> dict[tuple[int, int], int]:
    """Ordered pairs of tokens more than two apart, by how many tokens lie around each of the two."""
    axis = near(side, 1).tolist()
    close: dict[tuple[int, int, bool], int] = {}
    for one in range(side):
        for other in range(side):
            key = (axis[one], axis[other], abs(one - other) <= 2)
            close[key] = close.get(key, 0) + 1
    pairs: dict[tuple[int, int], int] = {}
    for (one, other, down), number in close.items():
        for (left, right, across), times in close.items():
            if not (down and across):
                key = (one * left, other * right)
                pairs[key] = pairs.get(key, 0) + number * times
    return pairs


def both_miss(tokens: int, window: int, mine: int, yours: int) -> float:
    """Probability that two layers leave a token out that has `yours` tokens around it, the output having `mine`."""
    total = 0.0
    for both in range(min(mine, window)):
        # Window mates of the output: `both` of them lie around it, none around the other token.
        elsewhere = tokens - mine - yours
        ways = math.comb(mine - 1, both) * math.comb(elsewhere, window - 1 - both)
        size = mine + window - 1 - both
        total += ways / math.comb(tokens - 1, window - 1) * missed(tokens, window, size)
    return total


def predicted(kind: str, side: int, window: int, layers: int) -> float:
    """Share of the tokens that can influence an output token, by the formulas of the page."""
    if kind == KINDS[0]:
        return random_windows(side * side, window, layers)
    return with_convolution(side, window, layers) if kind == KINDS[1] else 1.0


def percent(share: float) -> str:
    """A share with as many digits as tell it from 0 and 1."""
    if share > 0.9995:
        return "100 %" if share == 1 else "> 99.9 %"
    return f"{100 * share:.1f} %"


def table(numbers: dict[tuple[Any, ...], float]) -> str:
    """Measured and predicted shares: a row per map and kind of heads, a column per layer."""
    head = "| map | window | heads | " + " | ".join(f"{n} layer{'s' * (n > 1)}" for n in LAYERS) + " |"
    lines = [head, "|---|--:|---|" + "--:|" * len(LAYERS)]
    for side, window, pool in CASES:
        for kind in KINDS:
            cells = []
            for layers in LAYERS:
                found = numbers[side, window, pool, kind, layers]
                cells.append(f"{percent(found)} ({percent(predicted(kind, side, window, layers))})")
            lines.append(f"| {side} x {side} | {window} | {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(numbers: dict[tuple[Any, ...], float]) -> Any:
    """Whom one output token hears of, and the share of all tokens it hears of, over layers."""
    side, gap, margin, wide, high = 1.32, 0.12, 0.38, 9.6, 5.0
    figure = new_figure(wide, high)

    def axes_at(left: float, top: float, width: float, height: float) -> Any:
        return figure.add_axes((left / wide, 1 - (top + height) / high, width / wide, height / high))

    size, window, pool = SHOWN
    grid = Grid(size, size)
    number = OUTPUT[0] * size + OUTPUT[1]
    for line, kind in enumerate(KINDS):
        for column, layers in enumerate(LAYERS):
            seen = reach(groups(kind, window, pool), grid, layers, outputs=[number])[0].view(size, size)
            top = 0.55 + line * (side + gap)
            axes = axes_at(margin + column * (side + gap), top, side, side)
            draw_tile(axes, Tile(seen.float(), torch.zeros(0), OUTPUT), COLOURS[kind], gap=0.4)
            if not line:
                label(axes, f"{layers} layer{'s' * (layers > 1)}", muted=True)
        style = {"rotation": 90, "ha": "center", "va": "center", "fontsize": 8, "color": COLOURS[kind]}
        figure.text(0.17 / wide, 1 - (top + side / 2) / high, kind.replace(" and", "\nand"), **style)
    figure.text(
        margin / wide, 1 - 0.2 / high, f"One output token, {size} x {size} tokens, windows of {window}", color=INK
    )
    left = margin + 3 * (side + gap) + 0.75
    for at, case in enumerate(DRAWN):
        axes = axes_at(left, 0.55 + at * 2.25, wide - left - 0.25, 1.62)
        for kind in KINDS:
            expected = [predicted(kind, case[0], case[1], layers) for layers in LAYERS]
            axes.plot((0, *LAYERS), (1 / case[0] ** 2, *expected), color=COLOURS[kind], linewidth=1.4)
            found = [numbers[(*case, kind, layers)] for layers in LAYERS]
            axes.plot(LAYERS, found, "o", color=COLOURS[kind], markersize=5)
        axes.set_title(f"{case[0]} x {case[0]} tokens, windows of {case[1]}", fontsize=9, color=INK, loc="left")
        axes.set_ylim(-0.03, 1.05)
        axes.set_xticks((0, *LAYERS))
        axes.set_yticks((0, 0.5, 1), ("0 %", "50 %", "100 %"))
        axes.tick_params(colors=MUTED, labelsize=8, length=0)
        axes.grid(color=UNSEEN, linewidth=0.8)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_visible(False)
        if at:
            axes.set_xlabel("layers", fontsize=9, color=MUTED)
    return figure


def measure() -> dict[tuple[Any, ...], float]:
    """All measured shares."""
    torch.set_num_threads(1)
    return {
        (*case, kind, layers): measured(kind, *case, layers) for case in CASES for kind in KINDS for layers in LAYERS
    }


if __name__ == "__main__":
    shares = measure()
    save(draw(shares), PICTURE)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(shares)}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    print(table(shares))

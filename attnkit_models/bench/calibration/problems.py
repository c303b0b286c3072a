"""Problems of the calibration as data: a head group and a square map each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import attnkit
from attnkit.layouts import Stencil
from attnkit.primitives import BuildContext, HeadInputs, Plan, PrimitiveOptions
from attnkit.primitives.neighborhood import NeighborhoodHeads


@dataclass(frozen=True)
class Problem:
    """One head group on one map.

    Attributes:
        name: what it is called in the results.
        options: the head group.
        side: tokens on each side of the map.
        width: channels of a head.
        flex: whether FlexAttention is timed too, which compiles for seconds each time.
    """

    name: str
    options: PrimitiveOptions
    side: int
    width: int = 32
    flex: bool = False


@dataclass(frozen=True)
class Centered(attnkit.Neighborhood):
    """A neighborhood that sticks out at the border: of the library's primitives only learned queries have such ones."""

    kind: ClassVar[str] = "centered"

    def build(self, context: BuildContext) -> CenteredHeads:
        return CenteredHeads(self, context)


class CenteredHeads(NeighborhoodHeads):
    """Its heads."""

    def plan(self, inputs: HeadInputs) -> Plan:
        return Plan(Stencil(inputs.grid, self.neighborhood.kernel))


def _all() -> list[Problem]:
    found = []

    def add(kind: str, side: int, options: PrimitiveOptions, flex: bool = False) -> None:
        # Other widths too, or a logit could not be told from the multiply-adds that make it.
        width = (32, 64, 32, 16)[len(found) % 4]
        found.append(Problem(f"{kind}, {side}x{side}, {width} channels", options, side, width, flex))

    for side, heads in ((7, 2), (14, 6), (28, 4), (56, 2), (80, 2)):
        add("dense", side, attnkit.Dense(heads), flex=side in (14, 56))
    for side, heads in ((14, 2), (14, 12), (28, 4), (56, 2), (112, 2)):
        add(f"windows of 7x7, {heads} heads", side, attnkit.Window(heads, 7), flex=side in (28, 56))
    for side, window in ((32, 16), (64, 16), (96, 32), (96, 4)):
        add(f"windows of {window}x{window}", side, attnkit.Window(2, window))
    for side, regions, topk in (
        (14, 7, 4),
        (28, 7, 1),
        (28, 7, 16),
        (56, 7, 1),
        (56, 7, 4),
        (56, 7, 16),
        (64, 8, 32),
        (112, 7, 4),
        (112, 28, 16),
        (96, 8, 4),
    ):
        flex = side == 56 and topk == 4
        add(
            f"{topk} of {regions}x{regions} regions", side, attnkit.TopKRegion(2, regions=regions, topk=topk), flex=flex
        )
    for side, window in ((14, 49), (28, 49), (56, 16), (56, 49), (56, 196), (96, 49)):
        add(f"random windows of {window}", side, attnkit.RandomWindow(2, window=window))
    for side, stripe in ((14, 7), (28, 2), (56, 1), (56, 7)):
        add(f"stripes of {stripe}", side, attnkit.CrossShaped(4, stripe=stripe))
    for side, kernel in ((14, 3), (14, 7), (28, 7), (28, 13), (56, 3), (56, 7), (56, 13), (96, 7)):
        add(f"neighborhoods of {kernel}x{kernel}", side, attnkit.Neighborhood(2, kernel))
    for side, kernel in ((14, 3), (14, 7), (28, 3), (28, 7), (56, 3), (56, 7), (56, 13), (96, 7)):
        add(f"centered neighborhoods of {kernel}x{kernel}", side, Centered(2, kernel))
    for side, kernel in ((7, 3), (14, 3), (14, 7), (28, 3), (28, 7), (56, 3), (56, 7), (56, 15), (96, 5)):
        add(f"learned queries, {kernel}x{kernel}", side, attnkit.LearnedQuery(2, kernel))
    for side, keep in (
        (7, 0.25),
        (14, 0.1),
        (14, 0.5),
        (28, 0.05),
        (28, 0.25),
        (28, 0.75),
        (40, 0.1),
        (56, 0.02),
        (56, 0.25),
    ):
        flex = side == 28 and keep == 0.25
        add(f"{keep:.0%} of the keys", side, attnkit.MaskPredictor(3, (side, side), keep=keep), flex=flex)
    for side in (14, 28, 40):
        add("keys above a threshold", side, attnkit.ThresholdMaskPredictor(3, (side, side)))
    for side in (28, 56):
        add("pooled keys", side, attnkit.PooledGlobal(2, 7))
    return found


PROBLEMS: tuple[Problem, ...] = tuple(_all())

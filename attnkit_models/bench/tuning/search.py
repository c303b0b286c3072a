"""Search: which configurations are tried, which one wins, and by how much."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from attnkit_models.bench.timing import Times

# Below this share of the time before, a neighbour is better; anything above may be chance.
BETTER = 0.97
ROUNDS = 4
# Standard errors that a mean may be off by chance.
SIGMAS = 2.0


class Cut(NamedTuple):
    """A configuration, as every table has it: how a kernel is cut and started."""

    rows: int
    columns: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}, {self.warps} w, {self.stages} s"


class Limits(NamedTuple):
    """The configurations that kernels take: from the least to the most of each number."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    warps: tuple[int, int] = (1, 8)
    stages: tuple[int, int] = (1, 4)


class Lead(NamedTuple):
    """How a configuration compares with another.

    Attributes:
        ratio: its time divided by the other's.
        noise: what that may be off by chance, as a share of it; infinite where there was too little to tell.
    """

    ratio: float
    noise: float

    @property
    def sure(self) -> bool:
        """Whether it is faster by more than chance explains."""
        return self.ratio * (1.0 + self.noise) < BETTER


def neighbours(cut: Cut, limits: Limits) -> list[Cut]:
    """Configurations that differ in one number: half or twice the rows, columns or warps, one stage more or less."""
    rows, columns, warps, stages = cut
    found = [
        *(cut._replace(rows=one) for one in (rows // 2, 2 * rows)),
        *(cut._replace(columns=one) for one in (columns // 2, 2 * columns)),
        *(cut._replace(warps=one) for one in (warps // 2, 2 * warps)),
        *(cut._replace(stages=one) for one in (stages - 1, stages + 1)),
    ]
    return [
        one for one in found if all(least <= number <= most for number, (least, most) in zip(one, limits, strict=True))
    ]


def climbed(
    start: Cut,
    limits: Limits,
    seconds: Callable[[Sequence[Cut]], Mapping[Cut, float]],
    fits: Callable[[Cut], bool],
    also: Sequence[Cut] = (),
) -> Cut:
    """The configuration that no neighbour is faster than, found by going to the fastest one.

    Args:
        start: what the table has.
        limits: which configurations kernels take.
        seconds: measures some configurations side by side, without those that do not run or are wrong.
        fits: whether a configuration may stand in the table; asked of the few that are faster.
        also: others to try beside the first neighbours.
    """
    best, tried = start, {start}
    for _ in range(ROUNDS):
        new = [one for one in dict.fromkeys([*also, *neighbours(best, limits)]) if one not in tried]
        if not new:
            return best
        also = ()
        tried.update(new)
        found = seconds([best, *new])
        # Where what the table has does not run here, anything that does is better.
        bound = BETTER * found[best] if best in found else math.inf
        faster = sorted((one for one in new if found.get(one, math.inf) < bound), key=found.__getitem__)
        ahead = next((one for one in faster if fits(one)), None)
        if ahead is None:
            return best
        best = ahead
    return best


def lead(ours: Sequence[Times], theirs: Sequence[Times]) -> Lead:
    """How a configuration compares with another that was timed in turns with it.

    Rounds are compared in pairs, so that what disturbs both does not count.

    Args:
        ours: of the configuration, in each scene.
        theirs: of the other.
    """
    means, squares = [], []
    for one, other in zip(ours, theirs, strict=True):
        pairs = [math.log(a / b) for a, b in zip(one.samples, other.samples, strict=False)]
        if len(pairs) < 2:
            return Lead(1.0, math.inf)
        means.append(statistics.fmean(pairs))
        squares.append(statistics.variance(pairs) / len(pairs))
    error = math.sqrt(sum(squares)) / len(means)
    return Lead(math.exp(statistics.fmean(means)), math.expm1(SIGMAS * error))

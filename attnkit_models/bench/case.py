"""Case: what is measured, as data; Problem: a case made ready to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

OURS = "attnkit"
DENSE = "dense SDPA"


@dataclass(frozen=True)
class Target:
    """A ratio that attnkit should reach in a case.

    Attributes:
        measure: `"forward"` or `"training"` for time, `"memory forward"` or `"memory training"`, each the other's
            number divided by attnkit's; or `"efficiency forward"`, `"efficiency training"`: density times that ratio.
        against: name of the contender.
        at_least: the ratio; 0 for one that is reported only.
        case: name of another case whose attnkit number is the other's; `against` is then attnkit itself.
        aim: a higher ratio to strive for, 0 for none.
    """

    measure: str
    against: str
    at_least: float
    case: str = ""
    aim: float = 0.0


@dataclass(frozen=True)
class Case:
    """One row of a table: a problem of given sizes, and what attnkit should reach in it.

    Attributes:
        name: `"regions/128x128"`; what `--only` matches.
        problem: name of the function in `PROBLEMS` that makes it ready.
        sizes: that function's arguments.
        targets: ratios to reach.
        seconds: time to spend on measuring, over all contenders.
        title: the row in words.
        bound: what holds attnkit back there, in words; shown where a target is missed.
        device: the kind of device that its targets are for, `"cpu"` or `"cuda"`; a batch of `"cuda"` is a GPU's as it
            stands.
        small: sizes in place of its own in a quick run on the CPU, for a case that only a GPU has room and time for.
    """

    name: str
    problem: str
    sizes: Mapping[str, Any]
    targets: tuple[Target, ...] = ()
    seconds: float = 10.0
    title: str = ""
    bound: str = ""
    device: str = "cpu"
    small: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """Where and how cases run.

    Attributes:
        device: `"cpu"` or `"cuda"`.
        dtype: of inputs and weights.
        seed: of inputs and weights.
        images: how many images a GPU gets for each that a CPU gets.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    seed: int = 0
    images: int = 8

    def batch(self, given: int) -> int:
        """A GPU is only busy with more images at a time."""
        return given if self.device.type == "cpu" else self.images * given


Check = Callable[["Contender"], Mapping[str, float]]


@dataclass(eq=False)
class Contender:
    """Someone's way to compute a problem.

    Attributes:
        forward: computes the output from `leaves`.
        leaves: what gradients are asked for.
        check: compares with float64 and returns relative errors by name; None where nothing can be compared.
        wide: whether `check` computes in float64 itself, so that errors are those of float64.
        same: whether it computes the case's own function; dense attention does not.
        trains: whether it has a backward pass.
        why_not: why it does not run here; empty where it does.
        times: the measured part of the work, as a divisor: 16 where one sixteenth of the queries is computed.
        step: a training step; the gradients of all leaves where not given.
        prepare: makes what a first training step would make and later ones keep.
        variants: other ways to call `forward`, of which the fastest counts.
        compiles: whether a first call of a pass compiles.
        keeps: whether it holds its memory between passes, as CUDA graphs do, so that none can be counted in one.
        limits: the largest errors allowed, by the names that `check` gives them, where they are not those of the dtype.
    """

    forward: Callable[[], Any]
    leaves: Sequence[Tensor] = ()
    check: Check | None = None
    wide: bool = False
    same: bool = True
    trains: bool = True
    why_not: str = ""
    times: int = 1
    step: Callable[[], object] | None = None
    prepare: Callable[[], object] | None = None
    variants: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    compiles: bool = False
    keeps: bool = False
    limits: Mapping[str, float] = field(default_factory=dict)


@dataclass(eq=False)
class Problem:
    """A case made ready to run.

    Attributes:
        contenders: by name; attnkit's is `OURS` where there is one.
        density: share of all pairs of tokens that is computed, 1 for dense; None where that says nothing.
        facts: further numbers for the report, such as tokens or images.
    """

    contenders: dict[str, Contender]
    density: float | None = None
    facts: dict[str, float] = field(default_factory=dict)


def refused(why: str) -> Contender:
    """A contender that does not run here, and why."""
    return Contender(forward=lambda: torch.empty(0), trains=False, why_not=why)

"""Measures calibration problems: every backend that can compute a call, in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from attnkit.kernels import AttendCall
from attnkit.kernels.backend import MeasuredBackend
from attnkit.kernels.costs import mode_of
from attnkit.kernels.dispatch import backend_named
from attnkit.registry import BACKENDS
from attnkit_models.bench.calibration.calls import ready
from attnkit_models.bench.calibration.problems import PROBLEMS, Problem
from attnkit_models.bench.timing import interleaved

MODES = (
    (torch.float32, False),
    (torch.float32, True),
    (torch.bfloat16, False),
    (torch.bfloat16, True),
)
SECONDS = 0.25
# Logits above which all pairs at once are neither fast nor small.
MOST_PAIRS = 9e7

Point = dict[str, Any]


def measure(tell: Callable[[str], object], seconds: float = SECONDS) -> Iterator[Point]:
    """Yields a point for each problem, mode and call: `{"problem", "mode", "call", "seconds": {backend: seconds}}`.

    The group without its attention is the call `"around"`.
    """
    for number, problem in enumerate(PROBLEMS, start=1):
        tell(f"{number}/{len(PROBLEMS)} {problem.name}")
        for dtype, grad in MODES:
            yield from points(problem, dtype, grad=grad, seconds=seconds)


def points(problem: Problem, dtype: torch.dtype, *, grad: bool, seconds: float) -> Iterator[Point]:
    """The points of one problem in one mode."""
    made, mode = ready(problem, dtype, grad=grad), mode_of(dtype, grad=grad)
    for number, call in enumerate(made.calls):
        runs = {name: _run(name, call) for name in contenders(call, problem)}
        yield {"problem": problem.name, "mode": mode, "call": number, "seconds": _times(runs, seconds, grad=grad)}
    found = _times({"around": made.around}, seconds / 2, grad=grad)
    yield {"problem": problem.name, "mode": mode, "call": "around", "seconds": found}


def contenders(call: AttendCall, problem: Problem) -> list[str]:
    """Backends whose time for a call is worth taking."""
    found = []
    for name, target in BACKENDS.items():
        if not target or (name == "flex" and not problem.flex) or not isinstance(backend_named(name), MeasuredBackend):
            continue
        all_pairs = call.q.shape[1] * call.q.shape[2] * call.k.shape[2] > MOST_PAIRS and name in ("sdpa", "reference")
        masked = name == "reference" or not call.layout.full
        if not backend_named(name).why_not(call) and not (all_pairs and masked):
            found.append(name)
    return found


def _run(name: str, call: AttendCall) -> Callable[[], Tensor]:
    backend = backend_named(name)
    return lambda: backend.run(call).out


def _times(runs: dict[str, Callable[[], Tensor]], seconds: float, *, grad: bool) -> dict[str, float]:
    steps = {name: _step(run) if grad else run for name, run in runs.items()}
    with torch.set_grad_enabled(grad):
        if "flex" in steps:
            # It compiles for seconds, and after eight sizes no more.
            torch.compiler.reset()
            steps["flex"]()
        times = interleaved(steps, seconds, torch.device("cpu"))
    return {name: round(min(one.samples), 8) for name, one in times.items()}


def _step(run: Callable[[], Tensor]) -> Callable[[], object]:
    def step() -> None:
        out = run()
        if out.requires_grad:
            # The graph below the leaves of a call, or below a group's inputs, is used again.
            out.backward(torch.ones_like(out), retain_graph=True)

    return step

"""From measurements to constants: seconds a count, none below zero, so that relative errors are smallest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from attnkit.kernels.backend import MeasuredBackend
from attnkit.kernels.costs import Work, mode_of
from attnkit.kernels.dispatch import backend_named
from attnkit_models.bench.calibration.calls import Ready, ready
from attnkit_models.bench.calibration.measure import MODES, Point
from attnkit_models.bench.calibration.problems import PROBLEMS, Problem

# More change no third digit.
STEPS = 30

Constants = dict[str, dict[str, dict[str, float]]]


def counted(points: Iterable[Point], problems: Iterable[Problem] = PROBLEMS) -> list[Point]:
    """The points of some problems, with what each backend has to do as it is counted now: `"work": {backend: ...}`."""
    found, made = [], {}
    for problem in problems:
        for dtype, grad in MODES:
            made[problem.name, mode_of(dtype, grad=grad)] = ready(problem, dtype, grad=grad)
    for point in points:
        if (point["problem"], point["mode"]) in made:
            ready_made, number = made[point["problem"], point["mode"]], point["call"]
            work = {name: _work(name, number, ready_made) for name in point["seconds"]}
            found.append({**point, "work": {name: [one.kernel, dict(one.counts)] for name, one in work.items()}})
    return found


def _work(name: str, number: int | str, made: Ready) -> Work:
    if not isinstance(number, int):
        return made.work
    backend = backend_named(name)
    assert isinstance(backend, MeasuredBackend)
    return backend.work(made.calls[number])


def fit(points: Iterable[Point]) -> Constants:
    """Constants by mode, kernel and count, none below zero, so that the ratios of predicted to measured are near 1."""
    rows: dict[tuple[str, str], list[tuple[dict[str, float], float]]] = defaultdict(list)
    for point in points:
        for name, seconds in point["seconds"].items():
            kernel, counts = point["work"][name]
            rows[point["mode"], kernel].append((counts, seconds))
    found: Constants = defaultdict(dict)
    for (mode, kernel), given in rows.items():
        names = list(given[0][0])
        counts = torch.tensor([[counts[name] for name in names] for counts, _ in given], dtype=torch.float64)
        rates = _rates(counts, torch.tensor([seconds for _, seconds in given], dtype=torch.float64))
        found[mode][kernel] = {name: float(f"{rate:.3g}") for name, rate in zip(names, rates.tolist(), strict=True)}
    return dict(found)


def _rates(counts: Tensor, seconds: Tensor) -> Tensor:
    """Rates >= 0 by nonnegative least squares of `(predicted - seconds) / sqrt(predicted * seconds)`.

    Relative to what was measured alone, half as long would be half as bad as twice as long, and most predictions would
    be too low. The prediction in the denominator is that of the step before.
    """
    from scipy.optimize import nnls

    scale, rates = seconds.clone(), torch.zeros(counts.shape[1], dtype=torch.float64)
    for _ in range(STEPS):
        matrix = counts / scale[:, None]
        norms = matrix.norm(dim=0).clamp(min=1e-300)
        rates = torch.from_numpy(nnls((matrix / norms).numpy(), (seconds / scale).numpy())[0]) / norms
        scale = (seconds * (counts @ rates).clamp(min=1e-12)).sqrt()
    return rates

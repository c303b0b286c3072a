"""Timing: contenders one after the other, round after round, so that all meet the same disturbances."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

# A shorter measurement says more about the clock than about the work.
SHORTEST = 0.004


@dataclass
class Times:
    """Seconds a call, one number a round."""

    samples: list[float] = field(default_factory=list)

    def record(self, factor: float = 1.0, rounds: int | None = None) -> dict[str, float]:
        """Minimum and median in milliseconds, and how many rounds.

        Args:
            factor: of all times.
            rounds: the minimum is that of so many rounds, as typical among all rounds taken so many at a time; of all
                rounds if None.
        """
        return {
            "min": round(1e3 * factor * fastest_of(self.samples, rounds or len(self.samples)), 4),
            "median": round(1e3 * factor * statistics.median(self.samples), 4),
            "rounds": len(self.samples),
        }


def fastest_of(samples: Sequence[float], rounds: int) -> float:
    """The fastest of so many samples, where there are more: the median over groups of so many."""
    groups = max(len(samples) // rounds, 1)
    return statistics.median_low(min(samples[at::groups][:rounds]) for at in range(groups))


def seconds_a_call(run: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds a call over some calls in a row."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3 / calls
    began = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - began) / calls


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    seconds: float,
    device: torch.device,
    least: int = 3,
) -> dict[str, Times]:
    """Times several computations in turns.

    Every one is called once to see how long it takes; where that alone is more than half its share, the call is its
    first round and few follow.

    Args:
        runs: the computations by name, each of which was called before: what a first call compiles would count.
        seconds: time to spend, about.
        device: where they compute.
        least: rounds that each gets in any case, unless it takes longer than its share.
    """
    share = seconds / max(len(runs), 1)
    times = {name: Times() for name in runs}
    calls, wanted, spent = {}, {}, dict.fromkeys(runs, 0.0)
    for name, run in runs.items():
        first = max(seconds_a_call(run, 1, device), 1e-7)
        calls[name] = max(math.ceil(SHORTEST / first), 1)
        wanted[name] = min(least, max(math.ceil(share / first), 1))
        if first > share / 2:
            times[name].samples.append(first)
            spent[name] += first
    end = time.perf_counter() + seconds
    while True:
        ended = time.perf_counter() > end
        todo = [name for name in runs if len(times[name].samples) < wanted[name] or (not ended and spent[name] < share)]
        if not todo:
            return times
        for name in todo:
            one = seconds_a_call(runs[name], calls[name], device)
            times[name].samples.append(one)
            spent[name] += one * calls[name]

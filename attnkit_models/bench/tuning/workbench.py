"""Workbench: one line of a table, its calls made ready, and configurations checked and timed on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnkit.kernels.triton import sweeping
from attnkit_models.bench.gate import difference
from attnkit_models.bench.timing import Times, interleaved
from attnkit_models.bench.tuning.lines import Family, Given, Line, Started, configs_of, family_of, table_of
from attnkit_models.bench.tuning.room import Room
from attnkit_models.bench.tuning.search import Cut, Lead, lead

# Relative to the largest exact number. A mistake is off by about 1; sums of rounded products in any order are not.
TOLERANCE = {"bfloat16": 6e-2, "float32": 2e-4, "tf32": 1e-2}
# Images of the calls whose numbers are compared.
CHECKED = 2
# Seconds for all configurations of a round, and rounds at least in which the last one and the table's are compared.
SECONDS, LEAST = 1.0, 10


class Made(NamedTuple):
    """A call with what its passes begin from."""

    given: Given
    outputs: Sequence[Tensor]
    grad: Tensor


class Workbench:
    """Where the configurations of one line are tried.

    Args:
        line: the line.
        device: where to compute.
        device_class: whose line it is.
        images: images at a time of the calls that are timed.
        room: makes rooms for so many images.
        tell: gets lines for the terminal.

    Attributes:
        scenes: words of the calls, in order.
        times: what was measured last of every configuration, by scene.
        dropped: why the others were not timed, or may not stand in the table.
    """

    def __init__(
        self,
        line: Line,
        device: torch.device,
        device_class: str,
        images: int,
        tell: Callable[[str], object],
        room: Callable[[torch.device, int], Room] = Room,
    ) -> None:
        self.line, self.device, self.device_class, self._tell = line, device, device_class, tell
        self.family: Family = family_of(line.family)
        self.times: dict[Cut, dict[str, Times]] = {}
        self.dropped: dict[Cut, str] = {}
        made = self.family.scenes(line)
        self.scenes = list(made)
        with torch.no_grad():
            self._checked = [self._made(make(room(device, CHECKED))) for make in made.values()]
            self._timed = [self._made(make(room(device, images))) for make in made.values()]
            self._exact = [exact(self.family, line, call) for call in self._checked]

    def seconds(self, some: Sequence[Cut]) -> dict[Cut, float]:
        """Seconds of every configuration that runs and computes what the operator's kernels for the CPU do in every
        scene: the geometric mean of the scenes, so that each counts alike."""
        found = self._compared(some, SECONDS, 3)
        self.times.update(found)
        return {cut: _mean([min(times.samples) for times in scenes.values()]) for cut, scenes in found.items()}

    def duel(self, best: Cut, other: Cut) -> Lead | None:
        """How a configuration compares with another, over more rounds; None where the other does not run, which makes
        any that does better."""
        found = self._compared([best, other], 2 * SECONDS, LEAST)
        self.times.update(found)
        if other not in found or best not in found:
            return None if best in found else Lead(1.0, float("inf"))
        return lead(*([found[cut][scene] for scene in self.scenes] for cut in (best, other)))

    def fits(self, cut: Cut) -> bool:
        """Whether every kernel of the line compiles with it for every kind of call that the page on kernels has, within
        registers and shared memory, and multiplies where it should."""
        with self._configured(cut):
            try:
                fault = next(faults(self.line, self.device_class), "")
            except Exception as error:
                # Triton's compilers raise what they like.
                fault = _first(error)
        if fault:
            self._drop(cut, f"does not fit: {fault}")
        return not fault

    def _compared(self, some: Sequence[Cut], seconds: float, least: int) -> dict[Cut, dict[str, Times]]:
        ready: dict[Cut, list[Callable[[], None]]] = {}
        for cut in some:
            try:
                with torch.no_grad(), self._configured(cut):
                    wrong = self._wrong()
                    if not wrong:
                        ready[cut] = [self._again(call) for call in self._timed]
                self._synchronize()
            except Exception as error:
                # Triton has several classes of errors for what does not fit a GPU, and attnkit_models imports none.
                ready.pop(cut, None)
                self._drop(cut, f"does not run: {_first(error)}")
                continue
            if wrong:
                self._drop(cut, f"is WRONG: {wrong}")
        found: dict[Cut, dict[str, Times]] = {cut: {} for cut in ready}
        for at, scene in enumerate(self.scenes):
            turns = {str(cut): runs[at] for cut, runs in ready.items()}
            times = interleaved(turns, seconds / len(self.scenes), self.device, least)
            for cut in ready:
                found[cut][scene] = times[str(cut)]
        return found

    def _wrong(self) -> str:
        """What is wrong with the numbers that the table now gives; empty where nothing is."""
        for scene, call, right in zip(self.scenes, self._checked, self._exact, strict=True):
            started = self._started(call)
            _run(started.steps)
            results = compared(self.line, started.results())
            error = max(difference(one.cpu(), other) for one, other in zip(results, right, strict=True))
            if error > TOLERANCE[self.line.numbers]:
                return f"{scene}, off by {error:.2g}"
        return ""

    def _again(self, call: Made) -> Callable[[], None]:
        """Runs a pass, and returns what runs the line's part of it again."""
        started = self._started(call)
        _run(started.steps)
        timed = self.family.timed(self.line, started.steps)
        assert timed, self.line
        return partial(_run, timed)

    def _started(self, call: Made) -> Started:
        if not self.line.backward:
            return self.family.forward(call.given, self.device_class)
        return self.family.backward(call.given, call.outputs, call.grad, self.device_class)

    def _made(self, given: Given) -> Made:
        started = self.family.forward(given, self.device_class)
        if self.line.backward:
            _run(started.steps)
        outputs = started.results()
        generator = torch.Generator(self.device).manual_seed(1)
        grad = torch.empty_like(outputs[0]).normal_(generator=generator)
        return Made(given, outputs, grad)

    @contextmanager
    def _configured(self, cut: Cut) -> Iterator[None]:
        """Has a configuration in the table for this class of devices."""
        before = table_of(self.line.family).own(self.device_class, self.line.spot)
        put(self.line, self.device_class, cut)
        try:
            yield
        finally:
            put(self.line, self.device_class, before)

    def _drop(self, cut: Cut, why: str) -> None:
        self.dropped[cut] = why
        self._tell(f"    {cut} {why}")

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def put(line: Line, device_class: str, cut: Sequence[int] | None) -> None:
    """Gives a class of devices a line of its own in this process's table, or with None takes it away."""
    table_of(line.family).put(device_class, line.spot, cut)
    configs_of(line.family).configuration.cache_clear()


def faults(line: Line, device_class: str) -> Iterator[str]:
    """What is wrong with the kernels of a line for a class of devices, compiled ahead of time."""
    sweep = sweeping.families()[line.family]
    name = line.name.replace(line.family, device_class, 1)
    for one in sweep.lines():
        if sweep.name(one) == name:
            for needed in sweep.needs(one):
                yield from (f"{needed.launch.kernel.__name__}, {fault}" for fault in needed.faults)


def exact(family: Family, line: Line, call: Made) -> list[Tensor]:
    """The results of a call by the operator's kernels for the CPU, in float32."""
    given = [_widened(one) for one in call.given.arguments]
    outputs = family.PAIR.op(*given)
    if not line.backward:
        return compared(line, outputs)
    grads = [_widened(call.grad), *[None] * (len(outputs) - 1)]
    return family.PAIR.backward_op(*grads, *outputs, *given, call.given.needs)


def compared(line: Line, results: Sequence[Tensor]) -> list[Tensor]:
    """Gradients as they are; of a forward pass output and lse, which kernels cut into two numbers each in their way."""
    if line.backward:
        return list(results)
    out, total, peak = results
    return [out, total.log() + peak]


def _widened(one: Any) -> Any:
    if not isinstance(one, Tensor):
        return one
    return one.cpu().float() if one.is_floating_point() else one.cpu()


def _run(steps: Sequence[Any]) -> None:
    for step in steps:
        step.run()


def _mean(numbers: Sequence[float]) -> float:
    """The geometric mean."""
    found = 1.0
    for one in numbers:
        found *= one ** (1 / len(numbers))
    return found


def _first(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""Runner: gate first, then memory, then time, of all contenders of a case."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from attnkit.kernels.dispatch import recording
from attnkit.registry import load
from attnkit.testing import peak_memory
from attnkit_models.bench.case import OURS, Case, Contender, Problem, Setting
from attnkit_models.bench.gate import passes
from attnkit_models.bench.machine import now
from attnkit_models.bench.timing import interleaved

PROBLEMS = {
    "regions": "attnkit_models.bench.problems:regions",
    "windows": "attnkit_models.bench.problems:windows",
    "stencil": "attnkit_models.bench.problems:stencil",
    "learned_query": "attnkit_models.bench.layer_problems:learned_query",
    "predicted_keys": "attnkit_models.bench.layer_problems:predicted_keys",
    "recipe_step": "attnkit_models.bench.model_problems:recipe_step",
    "models": "attnkit_models.bench.model_problems:models",
}

# Seconds after which warming up no longer matters.
SLOW = 0.5

Record = dict[str, Any]


def make(case: Case, setting: Setting) -> Problem:
    """Makes a case ready."""
    return load(PROBLEMS[case.problem])(setting, **case.sizes)


def run_case(case: Case, setting: Setting, share: float = 1.0) -> Record:
    """Measures a case.

    Args:
        case: what to measure.
        setting: where and how.
        share: of the case's time to spend.

    Returns:
        Plain data for a results file: what was measured when, and a record per contender.
    """
    began = time.perf_counter()
    record: Record = {"name": case.name, "problem": case.problem, "title": case.title, "sizes": _plain(case.sizes)}
    record |= now()
    problem = make(case, setting)
    record |= {"density": problem.density, "facts": problem.facts}
    found = {name: _checked(one, setting) for name, one in problem.contenders.items()}
    sound = {name: one for name, one in problem.contenders.items() if found[name].get("passed")}
    for name, one in sound.items():
        found[name] |= _memory(one, setting, backends=name == OURS)
    for what, grad in (("forward", False), ("training", True)):
        _time(sound, found, what, share * case.seconds / 2, setting, grad=grad)
    record["contenders"] = found
    record["seconds"] = round(time.perf_counter() - began, 1)
    del problem, sound
    gc.collect()
    return record


def training_step(one: Contender) -> Callable[[], object]:
    """A forward and backward pass, or the step that the contender brings."""
    if one.step is not None:
        return one.step
    arriving: list[Tensor] = []

    def both() -> object:
        out = one.forward()
        if not arriving:
            arriving.append(torch.ones_like(out))
        return torch.autograd.grad(out, list(one.leaves), arriving[0])

    return both


def _checked(one: Contender, setting: Setting) -> Record:
    """The errors of a contender, or why it does not run."""
    if one.why_not:
        return {"why_not": one.why_not}
    if one.check is None:
        return {"passed": True, "errors": {}}
    try:
        errors = dict(one.check(one))
    except (RuntimeError, MemoryError) as error:
        return {"why_not": _short(error)}
    dtype = torch.float64 if one.step is not None else setting.dtype
    rounded = {name: float(f"{error:.2e}") for name, error in errors.items()}
    return {"passed": passes(errors, dtype), "errors": _plain(rounded)}


@contextmanager
def _grad(enabled: bool) -> Iterator[None]:
    with torch.set_grad_enabled(enabled):
        yield


def _memory(one: Contender, setting: Setting, *, backends: bool) -> Record:
    """Peaks in bytes, and the backends attnkit chose."""
    found: Record = {}
    with _grad(False):
        found["memory forward"] = _attempt(lambda: peak_memory(one.forward, setting.device))
        if backends:
            with recording() as choices:
                one.forward()
            found["backends"] = sorted({choice.backend for choice in choices})
    if one.trains:
        step = training_step(one)
        if one.step is not None:
            # An optimizer makes its state in the first step.
            _attempt(step)
        found["memory training"] = _attempt(lambda: peak_memory(step, setting.device))
    if one.times > 1:
        # On a share of the queries memory says nothing about all of them.
        found = {"times": one.times}
    return {name: value for name, value in found.items() if value is not None}


def _time(
    sound: dict[str, Contender], found: dict[str, Record], what: str, seconds: float, setting: Setting, *, grad: bool
) -> None:
    """Times all contenders in turns and writes what was found into their records."""
    runs: dict[str, Callable[[], object]] = {}
    for name, one in sound.items():
        if grad and not one.trains:
            continue
        if grad and f"memory {what}" not in found[name] and one.times == 1:
            continue
        call, variant = _fastest(one, setting, grad=grad)
        if call is not None:
            runs[name] = call
            if variant:
                found[name].setdefault("variant", {})[what] = variant
    with _grad(grad):
        times = interleaved(runs, seconds, setting.device)
    for name, one in times.items():
        found[name][what] = one.record(sound[name].times)


def _fastest(one: Contender, setting: Setting, *, grad: bool) -> tuple[Callable[[], object] | None, str]:
    """The call to time: of several variants, the one that was the fastest once it was warm."""
    if not one.variants:
        return (training_step(one) if grad else one.forward), ""
    timed: dict[str, tuple[float, Callable[[], object]]] = {}
    for variant, forward in one.variants.items():
        call = training_step(Contender(forward, one.leaves)) if grad else forward
        with _grad(grad):
            seconds = _attempt(lambda call=call: _seconds(call, setting))
            if seconds is not None and seconds < SLOW:
                # The first call may have had to warm up.
                seconds = _attempt(lambda call=call: _seconds(call, setting))
        if seconds is not None:
            timed[variant] = (seconds, call)
    if not timed:
        return None, ""
    best = min(timed, key=lambda variant: timed[variant][0])
    return timed[best][1], best


def _seconds(call: Callable[[], object], setting: Setting) -> float:
    began = time.perf_counter()
    call()
    if setting.device.type == "cuda":
        torch.cuda.synchronize(setting.device)
    return time.perf_counter() - began


def _attempt(call: Callable[[], Any]) -> Any:
    """What the call returns, or None where there is no kernel or no memory for it."""
    try:
        return call()
    except (RuntimeError, MemoryError, NotImplementedError):
        return None


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def _plain(values: Any) -> Any:
    """As JSON holds it; infinite errors as text."""
    return {
        name: "inf" if one == float("inf") else "nan" if one != one else list(one) if isinstance(one, tuple) else one
        for name, one in values.items()
    }

"""Runner: gate first, then memory, then time, of all contenders of a case."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from attnkit.kernels.dispatch import recording
from attnkit.registry import load
from attnkit.testing import peak_memory
from attnkit_models.bench.case import OURS, Case, Contender, Problem, Setting
from attnkit_models.bench.gate import passes
from attnkit_models.bench.machine import now
from attnkit_models.bench.profiled import profiled
from attnkit_models.bench.timing import interleaved
from attnkit_models.bench.warm import SLOW, attempt, fastest_variant, synced, training_step

PROBLEMS = {
    "regions": "attnkit_models.bench.problems:regions",
    "windows": "attnkit_models.bench.problems:windows",
    "shifted": "attnkit_models.bench.problems:shifted",
    "stencil": "attnkit_models.bench.problems:stencil",
    "neighborhood": "attnkit_models.bench.problems:neighborhood",
    "mix": "attnkit_models.bench.mix_problems:mix",
    "learned_query": "attnkit_models.bench.layer_problems:learned_query",
    "learned_heads": "attnkit_models.bench.layer_problems:learned_heads",
    "predicted_keys": "attnkit_models.bench.layer_problems:predicted_keys",
    "recipe_step": "attnkit_models.bench.model_problems:recipe_step",
    "models": "attnkit_models.bench.model_problems:models",
}

# Seconds of a pass from which on it is not timed at another time again: it has lasted through better and worse ones.
AGAIN = 2.0
# Names of passes, and whether they need gradients.
PASSES = (("forward", False), ("training", True))

Record = dict[str, Any]


def make(case: Case, setting: Setting) -> Problem:
    """Makes a case ready."""
    if "torch._dynamo" in sys.modules:
        # A function is compiled for a few shapes only, and beyond them runs as it is.
        torch.compiler.reset()
    if case.device == "cuda":
        setting = replace(setting, images=1)
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
    for what, grad in PASSES:
        _time(sound, found, what, share * case.seconds / 2, setting, grad=grad)
    record["contenders"] = found
    if case.targets and OURS in sound:
        record["profile"] = _profile(sound[OURS], found[OURS], setting)
    record["seconds"] = round(time.perf_counter() - began, 1)
    del problem, sound
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    return record


def time_again(case: Case, setting: Setting, record: Record, share: float = 1.0) -> Record:
    """Times the contenders of a record once more, at another time, and keeps the faster of both for each.

    What else runs on a machine, or beside a virtual one on its host, slows contenders for minutes, and those that
    compute more than those that wait for memory. Cases with passes that take long are left as they are, for all.

    Args:
        case: what was measured.
        setting: where and how.
        record: what was found; it is changed.
        share: of the case's time to spend.

    Returns:
        The record.
    """
    began = time.perf_counter()
    contenders = record["contenders"]
    timed = [one[what]["min"] / one.get("times", 1) for one in contenders.values() for what, _ in PASSES if what in one]
    if not timed or max(timed) > 1e3 * AGAIN:
        return record
    problem = make(case, setting)
    for what, grad in PASSES:
        sound = {name: one for name, one in problem.contenders.items() if what in contenders.get(name, {})}
        found: dict[str, Record] = {name: {} for name in sound}
        with torch.set_grad_enabled(grad):
            for one in sound.values():
                attempt(training_step(one) if grad else one.forward)
        _time(sound, found, what, share * case.seconds / 2, setting, grad=grad)
        for name, fresh in found.items():
            if what in fresh:
                contenders[name] = _faster(contenders[name], fresh, what)
    record["visits"] = record.get("visits", 1) + 1
    record["seconds"] = round(record["seconds"] + time.perf_counter() - began, 1)
    return record


def _faster(one: Record, fresh: Record, what: str) -> Record:
    """A contender's record with the faster of two times of a pass."""
    best = min(one, fresh, key=lambda record: record[what]["min"])
    both = {**best[what], "rounds": one[what]["rounds"] + fresh[what]["rounds"]}
    variants = {**one.get("variant", {}), **(best.get("variant", {}) if best is fresh else {})}
    return {**one, what: both, **({"variant": variants} if variants else {})}


def _checked(one: Contender, setting: Setting) -> Record:
    """The errors of a contender, or why it does not run."""
    if one.why_not:
        return {"why_not": one.why_not}
    if one.check is None:
        return {"passed": True, "errors": {}}
    try:
        errors = dict(one.check(one))
    except Exception as error:  # Compilers and libraries have errors of their own.
        return {"why_not": short(error)}
    dtype = torch.float64 if one.wide else setting.dtype
    rounded = {name: float(f"{error:.2e}") for name, error in errors.items()}
    return {"passed": passes(errors, dtype, one.limits), "errors": _plain(rounded)}


def _memory(one: Contender, setting: Setting, *, backends: bool) -> Record:
    """Peaks in bytes and the backends attnkit chose. Afterwards each pass is warm."""
    found: Record = {}

    def count(what: str, call: Callable[[], object]) -> None:
        try:
            if one.compiles or setting.device.type == "cuda":
                # Kernels are compiled, tried out and captured in a first call, which holds what later ones do not.
                synced(call, setting.device)
            found[f"memory {what}"] = peak_memory(call, setting.device)
        except Exception as error:
            found[f"failed {what}"] = short(error)
            if setting.device.type == "cuda":
                torch.cuda.empty_cache()

    with torch.set_grad_enabled(False):
        count("forward", one.forward)
        if backends and "memory forward" in found:
            with recording() as choices:
                one.forward()
            found["backends"] = sorted({choice.backend for choice in choices})
    if one.trains:
        if one.prepare is not None:
            attempt(one.prepare)
        count("training", training_step(one))
    if one.times > 1 or one.keeps:
        # On a share of the queries memory says nothing about all of them.
        found = {name: value for name, value in found.items() if not name.startswith("memory")}
    return found | ({"times": one.times} if one.times > 1 else {})


def _profile(one: Contender, record: Record, setting: Setting) -> Record:
    """Where the time of attnkit's passes goes."""
    found: Record = {}
    for what, grad in PASSES:
        if what in record:
            call = training_step(one) if grad else one.forward
            rounds = 1 if record[what]["min"] > 1e3 * SLOW else 3
            with torch.set_grad_enabled(grad):
                found[what] = attempt(lambda call=call, rounds=rounds: profiled(call, setting.device, rounds))
    return {what: shares for what, shares in found.items() if shares is not None}


def _time(
    sound: dict[str, Contender],
    found: dict[str, Record],
    what: str,
    seconds: float,
    setting: Setting,
    *,
    grad: bool,
) -> None:
    """Times all contenders, whose passes are warm, in turns, and writes what was found into their records."""
    runs: dict[str, Callable[[], object]] = {}
    for name, one in sound.items():
        if (grad and not one.trains) or f"failed {what}" in found[name]:
            continue
        call, variant = fastest_variant(one, setting.device, grad=grad)
        if call is not None:
            runs[name] = call
            if variant:
                found[name].setdefault("variant", {})[what] = variant
    with torch.set_grad_enabled(grad):
        times = interleaved(runs, seconds, setting.device)
    # Of many rounds one is faster than of few, by chance alone.
    fewest = min((len(one.samples) for one in times.values()), default=1)
    for name, one in times.items():
        found[name][what] = one.record(sound[name].times, fewest)


def short(error: BaseException) -> str:
    """An error's class and first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def _plain(values: Any) -> Any:
    """As JSON holds it; infinite errors as text."""
    return {
        name: "inf" if one == float("inf") else "nan" if one != one else list(one) if isinstance(one, tuple) else one
        for name, one in values.items()
    }

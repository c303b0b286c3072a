"""Dispatch: which backend computes a call, and why the others do not."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from attnkit.errors import BackendError, did_you_mean, shown
from attnkit.kernels.backend import Backend
from attnkit.kernels.call import AttendCall, AttendResult, PairValues, signature_of
from attnkit.kernels.costs import measured, written
from attnkit.layouts import Dense, Layout
from attnkit.registry import BACKENDS, load


@dataclass(frozen=True)
class Choice:
    """What dispatch decided for one call.

    Attributes:
        call: the call.
        backend: the name of the backend that runs it.
        reasons: for every other backend, why it does not run.
    """

    call: AttendCall
    backend: str
    reasons: dict[str, tuple[str, ...]]


# A plain list, not a context variable: torch.compile guards it and recompiles when it changes. The environment is read
# once, here, because a read inside a compiled forward would go stale. The last entry is in force; None means automatic.
_preferences: list[str | None] = [os.environ.get("ATTNKIT_BACKEND") or None]
_backends: dict[str, Backend] = {}
_recorders: list[list[Choice]] = []

# Off the CPU no times were measured: the first of these that can run a call does. `chunked` is not among them, since
# loops over pieces that fit a CPU's cache keep a GPU waiting, nor are backends of others; `use_backend` takes them.
DENSE_ORDER = ("sdpa", "reference")
SPARSE_ORDER = ("triton", "gather", "sdpa", "reference")
# Where a mask over all pairs is expected to be faster than sparse kernels.
MASKED_ORDER = ("sdpa", "triton", "gather", "reference")

CAPACITY = 1024
# What a call looks like and which backends were asked for.
Key: TypeAlias = "tuple[Hashable, str]"
_chosen: dict[Key, str] = {}
# What the backends were when choices were last made.
_tables: list[dict[str, Any]] = [{}, {}]

Wrapper: TypeAlias = "Callable[[AttendCall, Callable[[], AttendResult]], AttendResult]"
_wrappers: list[Wrapper] = []


class use_backend:
    """Context manager: every call inside runs on one backend, or raises if it cannot.

    Args:
        name: `"reference"`, `"sdpa"`, `"chunked"`, `"gather"`, `"flex"`, `"triton"`, `"xformers"`, or several separated
            by commas, the first that can run a call being used; `None` or `"auto"` returns to the automatic choice,
            `"flex,auto"` to it where flex refuses.

    Raises:
        BackendError: for an unknown name, at once.

    The setting is process-wide, not per thread.
    """

    def __init__(self, name: str | None) -> None:
        if name is not None:
            _names(name)
        self.name = name

    def __enter__(self) -> use_backend:
        _preferences.append(self.name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _preferences.pop()


@contextmanager
def recording() -> Iterator[list[Choice]]:
    """Collects a `Choice` for every call made inside the `with` block."""
    choices: list[Choice] = []
    _recorders.append(choices)
    try:
        yield choices
    finally:
        # By identity: two nested recordings may hold equal lists.
        _recorders[:] = [one for one in _recorders if one is not choices]


@contextmanager
def wrapping(wrapper: Wrapper) -> Iterator[None]:
    """Runs `wrapper(call, compute)` for every call made inside the `with` block; it returns what `compute()` gives."""
    _wrappers.append(wrapper)
    try:
        yield
    finally:
        _wrappers.remove(wrapper)


def recalled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    bias: PairValues | None,
    gain: PairValues | None,
    return_lse: bool,
    scale: float | None,
    backend: str | None,
) -> tuple[Key | None, str | None]:
    """What a call that is alike was found to be: no mistake, and one for the backend named.

    Returns:
        What to remember this call by, None where it cannot be; the name, None for the first call of its kind.
    """
    if torch.compiler.is_compiling():
        return None, None
    if _tables[0] != BACKENDS or _tables[1] != _backends:
        forget()
    try:
        form = signature_of(q, k, v, layout, bias, gain, return_lse, scale)
        if form is None:
            return None, None
        asked = _preferences[-1] if backend is None else backend
        key = (form, "auto" if asked is None else asked)
        return key, _chosen.get(key)
    except TypeError:
        # Symbolic sizes have no hash.
        return None, None


def decided(call: AttendCall, backend: str | None, key: Key | None) -> str:
    """`choose`, remembered under a key from `recalled`."""
    if key is None:
        return choose(call, backend)
    # What the key says was asked for: another thread may have entered or left a `use_backend` since.
    name = choose(call, key[1])
    if len(_chosen) >= CAPACITY:
        _chosen.clear()
    _chosen[key] = name
    return name


def forget() -> None:
    """Forgets which backends were chosen."""
    _chosen.clear()
    _tables[:] = dict(BACKENDS), dict(_backends)


def run(call: AttendCall, name: str, backend: str | None) -> AttendResult:
    """Computes a call on the backend of a name, which was chosen when `backend` was asked for."""
    if _recorders:
        reasons = why_not_others(call, name, backend)
        for recorder in _recorders:
            recorder.append(Choice(call, name, reasons))
    if _wrappers:
        return _wrapped(call, name)
    return _computed(call, name)


def _computed(call: AttendCall, name: str) -> AttendResult:
    result = backend_named(name).run(call)
    if not isinstance(result, AttendResult):
        raise BackendError(f"backend {name!r}: run must return an AttendResult, but it returned {shown(result)}")
    if call.return_lse and result.lse is None:
        raise BackendError(
            f"backend {name!r} accepted a call with return_lse=True and returned no lse; its why_not must refuse it"
        )
    return result


def _wrapped(call: AttendCall, name: str) -> AttendResult:
    compute = functools.partial(_computed, call, name)
    for wrapper in _wrappers:
        compute = functools.partial(wrapper, call, compute)
    return compute()


def choose(call: AttendCall, backend: str | None = None) -> str:
    """Name of the backend that will run a call.

    Raises:
        BackendError: if the backends asked for cannot run it, with all their reasons.
    """
    asked = backend if backend is not None else _preferences[-1]
    refusals = []
    for name in _names("auto" if asked is None else asked):
        if name == "auto":
            return _automatic(call)
        reasons = why_not(name, call)
        if not reasons:
            return name
        refusals.append(f"backend {name!r} cannot run this call: {'; '.join(reasons)}")
    raise BackendError(f"{' | '.join(refusals)} ({describe(call)})")


def _automatic(call: AttendCall) -> str:
    """The backend predicted to be the fastest; off the CPU, where nothing was measured, the first in order."""
    if not measured(call.q.device):
        return next(name for name in order(call) if BACKENDS.get(name) and not why_not(name, call))
    ready = [name for name, target in BACKENDS.items() if target and not backend_named(name).on_demand]
    able = [name for name in ready if not why_not(name, call)]
    costs = [backend_named(name).cost(call) for name in able]
    return able[costs.index(min(costs))]


def order(call: AttendCall) -> tuple[str, ...]:
    """Names of the backends that the automatic choice tries for a call off the CPU, in this order."""
    if isinstance(call.layout, Dense):
        return DENSE_ORDER
    first = SPARSE_ORDER[0]
    return MASKED_ORDER if BACKENDS.get(first) and backend_named(first).dense_instead(call) else SPARSE_ORDER


def why_not(name: str, call: AttendCall) -> tuple[str, ...]:
    """The reasons why the backend of a name cannot run a call; empty where it can.

    Raises:
        BackendError: for an unknown name, and for a backend whose `why_not` returns anything but a tuple of strings.
    """
    if name in BACKENDS and not BACKENDS[name]:
        return ("it is planned but not part of this version",)
    reasons = backend_named(name).why_not(call)
    if not isinstance(reasons, tuple) or not all(isinstance(one, str) for one in reasons):
        raise BackendError(
            f"backend {name!r}: why_not must return a tuple of strings, empty where it can run the call, "
            f"but it returned {shown(reasons)}"
        )
    return reasons


def why_not_others(call: AttendCall, chosen: str, backend: str | None = None) -> dict[str, tuple[str, ...]]:
    """For every backend but the chosen one, the reasons why it does not run a call."""
    found = {}
    asked = backend if backend is not None else _preferences[-1]
    for name in BACKENDS:
        if name == chosen:
            continue
        reasons = why_not(name, call)
        if not reasons:
            instead = "" if asked in (None, "auto") else f", but {asked!r} was asked for"
            reasons = (_compared(call, name, chosen) + (instead or _on_demand(call, name)),)
        found[name] = reasons
    return found


def _compared(call: AttendCall, name: str, chosen: str) -> str:
    """A backend that could run a call beside the one that does."""
    if not measured(call.q.device):
        return "it could run"
    cost, price = (backend_named(one).known_cost(call) for one in (name, chosen))
    if cost is None or price is None:
        return "it could run; no times were measured to compare it by"
    return f"it could run, in about {written(cost)} ms, {cost / price if price else 1.0:.1f} times as long"


def _on_demand(call: AttendCall, name: str) -> str:
    """Why the automatic choice passes over a backend that could run a call; empty where it weighed it."""
    why = backend_named(name).on_demand
    if not measured(call.q.device):
        names = order(call)
        if name in names:
            why = backend_named(name).dense_instead(call)
            return f"; on {call.q.device.type} the first of {', '.join(names)} that can does{f'. {why}' if why else ''}"
        why = why or f"it is none of {', '.join(names)}, which are tried in this order on {call.q.device.type}"
    return f"; it runs on demand only, because {why}" if why else ""


def describe(call: AttendCall) -> str:
    """One line about a call for messages."""
    q, v = call.q, call.v
    return (
        f"q {tuple(q.shape)}, v {tuple(v.shape)}, {q.dtype}, {q.device}, {call.layout.kind} layout"
        f"{', with grad' if call.needs_grad else ''}"
    )


def backend_named(name: str) -> Backend:
    """The backend of a name.

    Raises:
        BackendError: if there is none, naming the nearest.
    """
    if name not in BACKENDS:
        near = did_you_mean(name, BACKENDS)
        raise BackendError(f"unknown backend {shown(name)}{near} (backends: {', '.join(BACKENDS)})")
    if not BACKENDS[name]:
        raise BackendError(f"backend {name!r} is planned but not part of this version")
    if name not in _backends:
        _backends[name] = load(BACKENDS[name])()
    return _backends[name]


def _names(text: str) -> list[str]:
    names = [part.strip() for part in str(text).split(",")]
    for name in names:
        if name not in BACKENDS and name != "auto":
            raise BackendError(
                f"unknown backend {shown(name)}{did_you_mean(name, BACKENDS)} (backends: auto, {', '.join(BACKENDS)})"
            )
    return names


# At import and not on use: the first call may already be one that is being compiled, where nothing can be imported.
for _name in filter(BACKENDS.get, BACKENDS):
    backend_named(_name)

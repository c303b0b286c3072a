"""Kinds of runs, and the cases in each."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator

from attnkit.errors import ConfigError, did_you_mean, nearest
from attnkit.kernels.triton import sweeping
from attnkit_models.bench.case import Case
from attnkit_models.bench.gpu import GPU
from attnkit_models.bench.headline import HEADLINE
from attnkit_models.bench.sweeps import MODELS, SWEEPS

KINDS: dict[str, tuple[Case, ...]] = {
    "headline": HEADLINE,
    "sweeps": tuple(case for sweep in SWEEPS for case in sweep.cases),
    "models": MODELS,
    "gpu": GPU,
}
# The kind of run whose cases only a GPU has room and time for.
ON_GPU = "gpu"
# Of the command, which somebody may take for kinds.
OPTIONS = ("list", "quick", "report", "resume", "tune")


def chosen(what: str | None, only: str | None, *, gpu: bool = False) -> dict[str, list[Case]]:
    """The cases to run, by kind.

    Args:
        what: a kind, `"all"`, or None for the headline, or with `only` for all.
        only: shell-style pattern of case names; without special characters also the first part of names.
        gpu: whether `"all"` has the GPU's cases too.

    Raises:
        ConfigError: for names of nothing, naming the nearest.
    """
    if what not in (None, "all", *KINDS):
        near = did_you_mean(what, ["all", *KINDS])
        near = f"; did you mean --{what}?" if what in OPTIONS else near
        ways = []
        if not near and (family := nearest(what, sweeping.families())) is not None:
            ways.append(f"`attnkit bench --tune {family}` times the configurations of those kernels")
        if any(fnmatch.fnmatchcase(case.name, one) for case in _every() for one in (what, f"{what}/*")):
            ways.append(f"`attnkit bench --only {what!r}` runs the cases of that name")
        near = f"; {', and '.join(ways)}" if ways else near
        raise ConfigError(f"cannot run {what!r}{near} (known: all, {', '.join(KINDS)})")
    every = [kind for kind in KINDS if gpu or kind != ON_GPU]
    kinds = every if what == "all" or (what is None and only) else [what or "headline"]
    if only is None:
        return {kind: list(KINDS[kind]) for kind in kinds}
    patterns = (only, f"{only}/*")
    everywhere = {
        kind: [case for case in cases if any(fnmatch.fnmatchcase(case.name, one) for one in patterns)]
        for kind, cases in KINDS.items()
    }
    found = {kind: everywhere[kind] for kind in kinds}
    if not any(found.values()):
        for kind, cases in everywhere.items():
            if cases:
                raise ConfigError(
                    f"{only!r} names no case of {' or '.join(kinds)} but {len(cases)} of {kind}: "
                    f"`attnkit bench {kind} --only {only!r}` runs {'it' if len(cases) == 1 else 'them'}"
                )
        names = [case.name for kind in kinds for case in KINDS[kind]]
        raise ConfigError(
            f"no case is named {only!r}{did_you_mean(only, [*names, *{name.partition('/')[0] for name in names}])} "
            f"(`attnkit bench {kinds[0] if len(kinds) == 1 else 'all'} --list` prints all {len(names)})"
        )
    return {kind: cases for kind, cases in found.items() if cases}


def titled(case: Case) -> str:
    """A case in words: what changes in a sweep, after what stays."""
    sweep = next((one.title for one in SWEEPS if case in one.cases), "")
    return f"{sweep}: {case.title}" if sweep else case.title


def _every() -> Iterator[Case]:
    """The cases of all kinds."""
    for cases in KINDS.values():
        yield from cases

"""Checking: the laws tried on a primitive or a backend with Hypothesis, and the smallest case that breaks one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from attnkit.errors import AttnkitError, BackendError, ConfigError, PrimitiveError, did_you_mean, load_extra, shown
from attnkit.options import Options
from attnkit.primitives import PrimitiveOptions
from attnkit.registry import primitive_class
from attnkit.testing.cases import AttentionCase, PrimitiveCase, as_code
from attnkit.testing.laws import Breach, Law, LawBroken, law_named, laws_named
from attnkit.testing.layouts import KINDS

# A primitive may refuse grids that it cannot serve, but not nearly all of them.
FEWEST = 0.1
# Nor all grids with prefix tokens, or all without; so many refusals are no chance.
ONE_SIDED = 5


@dataclass(frozen=True)
class Checked:
    """What `check_primitive` and `check_backend` return when every law holds.

    Attributes:
        subject: what was checked, as code or as a name.
        tried: number of cases in which something was compared, per law.
        refused: number of further cases that were refused with an error of `attnkit.errors`, per law.
        silent: number of further cases about which a law says nothing, per law and reason, such as
            `{"translation": {"promises no period": 50}}`.
    """

    subject: str
    tried: Mapping[str, int]
    refused: Mapping[str, int]
    silent: Mapping[str, Mapping[str, int]]

    def __str__(self) -> str:
        kept = [name for name, count in self.tried.items() if count]
        lines = [f"{self.subject} keeps {len(kept)} law{'s' * (len(kept) != 1)}"]
        for name, count in self.tried.items():
            why = ", ".join(self.silent[name])
            if count:
                said = f"{count:5} cases"
                said += f", {self.refused[name]} refused" if self.refused[name] else ""
                said += f", nothing to say in {sum(self.silent[name].values())}: {why}" if why else ""
            else:
                said = f"    - says nothing here: {why}"
            lines.append(f"{law_named(name).number:3}  {name:20}{said}")
        return "\n".join(lines)


def check_primitive(
    options: PrimitiveOptions | Mapping[str, Any] | str,
    *,
    laws: Iterable[str | int] | None = None,
    max_examples: int = 50,
    seed: int = 0,
    shrink: bool = True,
) -> Checked:
    """Holds a primitive to the laws of attention; needs Hypothesis.

    Each law is tried on random grids, prefix tokens, batch sizes, head widths, dtypes, memory layouts and masks. A
    case that the primitive refuses with an error of `attnkit.errors` does not count, as long as not nearly all are
    refused, nor all with prefix tokens or all without. A `PrimitiveError` is no refusal but a mistake.
    A law may have nothing to say: those about attention where there is none, those about promises where none is made.
    Such cases are counted apart, with the reason.

    Args:
        options: the primitive's options, or a plain dict of them; or the name of a registered primitive, whose options
            are then drawn as well.
        laws: names or numbers of laws (see `attnkit.testing.LAWS`); all of them where not given.
        max_examples: number of cases per law, >= 1.
        seed: of the cases; equal seeds try equal cases.
        shrink: whether to look for the smallest case that breaks a law, instead of stopping at the first one.

    Returns:
        How many cases were tried, which prints as a table.

    Raises:
        LawBroken: for the first law that does not hold, with the smallest case found and a line that shows it again.
        ConfigError: for unknown laws or primitives.
    """
    target = _target(options)
    name = target if isinstance(target, str) else as_code(target)
    wanted = [law for law in laws_named(laws) if law.primitive is not None]
    strategies = load_extra("attnkit.testing.strategies", extra="testing", purpose="check_primitive")
    return _checked(name, wanted, strategies.primitive_cases(target), max_examples, seed, shrink)


def check_backend(
    name: str,
    *,
    kinds: str | Iterable[str] | None = None,
    laws: Iterable[str | int] | None = None,
    max_examples: int = 50,
    seed: int = 0,
    shrink: bool = True,
) -> Checked:
    """Holds a backend to the laws of attention, over random layouts of every kind it accepts; needs Hypothesis.

    Args:
        name: the backend.
        kinds: kinds of layouts, as in `random_layout`, or one of them; all where not given.
        laws: as in `check_primitive`.
        max_examples: as in `check_primitive`.
        seed: as in `check_primitive`.
        shrink: as in `check_primitive`.

    Returns:
        As `check_primitive`.

    Raises:
        LawBroken: as `check_primitive`.
        BackendError: for an unknown backend, or one whose `why_not` returns anything but a tuple of strings.
        ConfigError: for unknown laws or kinds, or no kinds.
    """
    from attnkit.kernels.dispatch import backend_named

    backend_named(name)
    wanted = [law for law in laws_named(laws) if law.attention is not None]
    strategies = load_extra("attnkit.testing.strategies", extra="testing", purpose="check_backend")
    cases = strategies.attention_cases(kinds=_kinds(kinds), backends=(name,))
    try:
        return _checked(f"the backend {name!r}", wanted, cases, max_examples, seed, shrink)
    except BackendError as error:
        # From drawing a case, for a `why_not` that breaks its contract; Hypothesis has added notes about itself.
        raise BackendError(str(error)) from None


def check_case(law: str | int, case: PrimitiveCase | AttentionCase) -> str | None:
    """Tries one law on one case; this is what the message of a broken law tells to run.

    Returns:
        Why the law says nothing about the case, such as "promises no period", or None where it holds.

    Raises:
        Breach: if the law does not hold.
    """
    return law_named(law).check(case)


def _kinds(kinds: str | Iterable[str] | None) -> tuple[str, ...]:
    if kinds is None:
        return KINDS
    if not isinstance(kinds, Iterable):
        raise ConfigError(f"kinds is a list of kinds of layouts, such as ['blocks'], but got {shown(kinds)}")
    chosen = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    for one in chosen:
        if one not in KINDS:
            near = did_you_mean(one, KINDS)
            raise ConfigError(f"unknown kind of layout {shown(one)}{near} (kinds: {', '.join(KINDS)})")
    if not chosen:
        raise ConfigError(f"check_backend needs at least one kind of layout, or None for all: {', '.join(KINDS)}")
    return chosen


def _target(options: PrimitiveOptions | Mapping[str, Any] | str) -> PrimitiveOptions | str:
    if isinstance(options, str):
        primitive_class(options)
        return options
    if isinstance(options, Mapping):
        kind = options.get("kind")
        if not isinstance(kind, str):
            raise ConfigError(f"the dict needs the primitive's 'kind', such as 'window', but got {dict(options)!r}")
        return primitive_class(kind).from_dict(options)  # type: ignore[return-value]
    if not isinstance(options, PrimitiveOptions):
        what = type(options).__name__ if isinstance(options, Options) else repr(options)
        raise ConfigError(f"check_primitive needs a primitive's options or its name, but got {what}")
    return options


def _checked(subject: str, laws: list[Law], cases: Any, max_examples: int, seed: int, shrink: bool) -> Checked:
    if not isinstance(max_examples, int) or isinstance(max_examples, bool) or max_examples < 1:
        raise ConfigError(f"max_examples is a number of cases, an integer >= 1, but got {max_examples!r}")
    counts: dict[str, _Counts] = {}
    with torch.random.fork_rng(devices=[]):
        for law in laws:
            counts[law.name] = _try(subject, law, cases, max_examples, seed, shrink)
    return Checked(
        subject,
        {name: one.tried for name, one in counts.items()},
        {name: one.refused for name, one in counts.items()},
        {name: dict(one.silent) for name, one in counts.items()},
    )


@dataclass
class _Counts:
    """Numbers of cases of one law: tried, refused, and by the reason those about which it says nothing."""

    tried: int = 0
    refused: int = 0
    silent: Counter[str] = field(default_factory=Counter)


def _try(subject: str, law: Law, cases: Any, max_examples: int, seed: int, shrink: bool) -> _Counts:
    import hypothesis
    from hypothesis.errors import Unsatisfiable

    counts = _Counts()
    refusals: list[str] = []
    # Counted apart with prefix tokens and without: neither kind of grid may be refused altogether.
    taken_with, refused_with = Counter[bool](), Counter[bool]()
    broken: list[tuple[PrimitiveCase | AttentionCase, Exception]] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=max_examples,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=tuple(hypothesis.HealthCheck),  # type: ignore[arg-type]
        verbosity=hypothesis.Verbosity.quiet,
        phases=[hypothesis.Phase.generate, *([hypothesis.Phase.shrink] if shrink else [])],
    )
    @hypothesis.given(case=cases)
    def attempt(case: PrimitiveCase | AttentionCase) -> None:
        try:
            reason = law.check(case)
        except (Breach, PrimitiveError) as error:
            broken.append((case, error))
            raise
        except AttnkitError as error:
            counts.refused += 1
            refused_with[case.grid.prefix > 0] += isinstance(case, PrimitiveCase)
            refusals.append(f"{case!r}: {error}")
            hypothesis.reject()
        except Exception as error:
            broken.append((case, error))
            raise
        taken_with[case.grid.prefix > 0] += 1
        if reason is None:
            counts.tried += 1
        else:
            counts.silent[reason] += 1

    try:
        attempt()
    except Unsatisfiable:
        pass
    except Exception as error:
        if not broken:
            raise
        # Hypothesis ends with the smallest case it found.
        case, cause = broken[-1]
        raise _verdict(subject, law, case, cause) from error
    taken = counts.tried + counts.silent.total()
    if taken < FEWEST * (taken + counts.refused) or not taken:
        example = f", such as {refusals[-1]}" if refusals else ""
        raise LawBroken(
            f"law {law.number} ({law.name}) could not be tried on {subject}: "
            f"{counts.refused} cases were refused{example}",
            law.name,
            None,
        )
    for prefix, times in refused_with.items():
        if times >= ONE_SIDED and not taken_with[prefix]:
            raise LawBroken(
                f"law {law.number} ({law.name}) could not be tried on {subject} "
                f"{'with' if prefix else 'without'} prefix tokens: all {times} cases were refused",
                law.name,
                None,
            )
    return counts


def _verdict(subject: str, law: Law, case: PrimitiveCase | AttentionCase, cause: Exception) -> LawBroken:
    crashed = not isinstance(cause, Breach)
    seen = f"{type(cause).__name__}: {cause}" if crashed else str(cause)
    return LawBroken(
        f"{subject} breaks law {law.number}, {law.name}: {law.sentence}\n"
        f"  seen:      {seen}\n"
        f"  smallest:  {case!r}\n"
        f"  try again: attnkit.testing.check_case({law.name!r}, {case!r})",
        law.name,
        case,
        crashed,
    )

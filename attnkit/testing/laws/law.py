"""Law: one promise of attention as a sentence and a check, and what a check says when it fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from attnkit.errors import AttnkitError
from attnkit.kernels.dispatch import use_backend
from attnkit.testing.cases import AttentionCase, PrimitiveCase


@dataclass(frozen=True)
class Law:
    """One promise.

    Attributes:
        number: its number in the documentation.
        name: its name, as in `check_primitive(options, laws=["no_leak"])`.
        sentence: what it promises.
        primitive: checks one case of a primitive, or None if it says nothing about primitives.
        attention: checks one case of attention over a random layout on a backend, or None alike.
    """

    number: int
    name: str
    sentence: str
    primitive: Callable[[PrimitiveCase], None] | None = None
    attention: Callable[[AttentionCase], None] | None = None

    def check(self, case: PrimitiveCase | AttentionCase) -> str | None:
        """Checks one case.

        Returns:
            Why the law says nothing about the case, such as "promises no period", or None where it holds.

        Raises:
            Breach: if the law does not hold.
        """
        try:
            if isinstance(case, PrimitiveCase):
                assert self.primitive is not None
                with nullcontext() if case.backend is None else use_backend(case.backend):
                    self.primitive(case)
            else:
                assert self.attention is not None
                self.attention(case)
        except NothingToSay as reason:
            return str(reason)
        return None


NO_ATTENTION = "makes no attention call"


class NothingToSay(Exception):
    """Raised by a check that compares nothing in a case; the message says why: "promises no period"."""


class Breach(AssertionError):
    """A law that does not hold in one case; the message is a sentence about what was seen."""


class LawBroken(AttnkitError, AssertionError):
    """A law that something breaks, with the smallest case found and a line of code that shows it again.

    Attributes:
        law: the law's name.
        case: the smallest case found, or None if there was no case that could be tried.
        crashed: whether the case ended in an exception instead of a wrong result.
    """

    def __init__(self, message: str, law: str, case: object, crashed: bool = False) -> None:
        super().__init__(message)
        self.law = law
        self.case = case
        self.crashed = crashed

    def __reduce__(self) -> tuple[Callable[..., LawBroken], tuple[object, ...]]:
        return type(self), (str(self), self.law, self.case, self.crashed)


def require(holds: bool | Tensor, sentence: str) -> None:
    """Raises `Breach` with a sentence unless something holds."""
    if not bool(holds):
        raise Breach(sentence)


def agree(actual: Tensor, expected: Tensor, what: str, *, relative: float = 1e-9, size: float = 1.0) -> None:
    """Raises `Breach` unless two tensors are equal up to `relative` times the largest number that is expected.

    Where one is infinite or NaN the other must be so too. `size` is that of the numbers that were added up, where it
    may be larger: terms that cancel leave their own rounding behind.
    """
    require(
        actual.shape == expected.shape, f"{what} has shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    )
    actual, expected = actual.detach().double(), expected.detach().double()
    special = ~expected.isfinite()
    same = torch.where(special, expected, 0.0).eq(torch.where(special, actual, 0.0)) | (
        expected.isnan() & actual.isnan()
    )
    require(same.all(), f"{what} is not infinite where it should be")
    off = (actual - expected).masked_fill(special, 0.0).abs()
    allowed = relative * max(size, _largest(expected.masked_fill(special, 0.0)))
    # Written so that a NaN fails.
    good = off <= allowed
    if not bool(good.all()):
        spot = tuple(int(one) for one in (~good).nonzero()[0])
        raise Breach(
            f"{what} is {float(actual[spot]):.6g} instead of {float(expected[spot]):.6g} at {list(spot)} "
            f"({int((~good).sum())} of {off.numel()} numbers are off)"
        )


def agree_all(actual: Sequence[Tensor], expected: Sequence[Tensor], names: Sequence[str], **how: float) -> None:
    """`agree` for several tensors."""
    for one, other, name in zip(actual, expected, names, strict=True):
        agree(one, other, name, **how)


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def largest(tensors: Sequence[Tensor]) -> float:
    """The size of the largest finite number in any of the tensors, at least 1."""
    return max([1.0, *(_largest(one.detach().nan_to_num(0.0, 0.0, 0.0)) for one in tensors)])


def within(call: Callable[[], None]) -> None:
    """Runs a check that raises `AssertionError`, so that it raises `Breach`."""
    try:
        call()
    except Breach:
        raise
    except AssertionError as error:
        raise Breach(str(error)) from None

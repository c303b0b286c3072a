"""One case: a kind and a seed in, worked, refused or a finding out."""

from __future__ import annotations

import contextlib
import importlib
import random
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from attnkit.errors import AttnkitError
from tests.fuzz.limits import limited

# Each is a module beside this one with `case(dice, folder)`: it returns if all worked and agreed, raises an
# `AttnkitError` where something was refused, and anything else is a finding. The numbers share out a sweep.
KINDS: dict[str, int] = {
    "mixes": 5,
    "recipes": 3,
    "options": 3,
    "layouts": 3,
    "configs": 2,
    "checkpoints": 2,
    "official": 1,
    "files": 1,
    "images": 1,
    "calls": 2,
    "commands": 1,
}

# A sentence a mistake; a wall of text is none.
LONGEST = 5_000


class Disagreement(AssertionError):
    """Something worked but does not agree with itself, or was accepted first and refused later."""


@dataclass(frozen=True)
class Result:
    """What became of a case.

    Attributes:
        kind: the kind of case.
        seed: its seed.
        outcome: `"worked"`, `"refused"` or `"finding"`.
        detail: the error's type and message, and for a finding where it came from.
    """

    kind: str
    seed: int
    outcome: str
    detail: str = ""

    @property
    def command(self) -> str:
        """The line that runs this case alone."""
        return f"python -m tests.fuzz {self.kind} --seed {self.seed}"


def run_case(kind: str, seed: int) -> Result:
    """Runs the case of a kind and a seed, under limits, with every warning an error."""
    module = importlib.import_module(f"tests.fuzz.{kind}")
    dice = random.Random(f"{kind} {seed}")
    torch.manual_seed(dice.randrange(2**31))
    try:
        with tempfile.TemporaryDirectory() as folder, _strict_warnings(), limited():
            module.case(dice, Path(folder))
    except KeyboardInterrupt:
        raise
    except AttnkitError as error:
        text = str(error)
        sentence = bool(text.strip()) and "\n" not in text and len(text) <= LONGEST
        return Result(kind, seed, "refused" if sentence else "finding", f"{type(error).__name__}: {text[:LONGEST]}")
    except BaseException as error:
        return Result(kind, seed, "finding", _described(error))
    return Result(kind, seed, "worked")


@contextlib.contextmanager
def must_work(what: str) -> Iterator[None]:
    """Makes a finding of a refusal that comes after the same thing had been accepted."""
    try:
        yield
    except AttnkitError as error:
        raise Disagreement(f"{what} was refused after all else had worked: {error}") from error


def agree(same: bool, what: str) -> None:
    """Makes a finding of what does not hold."""
    if not same:
        raise Disagreement(what)


def _described(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    root = Path(__file__).parents[2]
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(root)]
    places = [f"  {Path(frame.filename).relative_to(root)}:{frame.lineno} {frame.line}" for frame in own[-6:]]
    text = str(error)
    text = text if len(text) < 2000 else f"{text[:1000]} ... {text[-500:]}"
    return "\n".join([f"{type(error).__name__}: {text}", *places])


@contextlib.contextmanager
def _strict_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # torch 2.10's own compiler calls what torch 2.10 deprecates.
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
        yield

"""Lines: what the tables of configurations hold, and what a family of kernels tells so that they can be timed."""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import torch

from attnkit.errors import ConfigError, did_you_mean
from attnkit.kernels.triton import sweeping
from attnkit.kernels.triton.sweeping import Numbers
from attnkit.kernels.triton.table import Table

if TYPE_CHECKING:
    from torch import Tensor

    from attnkit.kernels.ops.registering import OpPair
    from attnkit_models.bench.tuning.room import Room
    from attnkit_models.bench.tuning.search import Limits

# Numbers as the tables name them: those of 16 bits are timed in bfloat16.
NUMBERS: dict[str, Numbers] = {"16 bit": "bfloat16", "32 bit": "float32", "tf32": "tf32"}
AND = " and "
ALL = "all"


class Line(NamedTuple):
    """A line of a family's table.

    Attributes:
        family: the folder of its kernels.
        spot: where the table has it: direction, numbers, sizes of what queries see if the table tells them apart, and
            head dim.
    """

    family: str
    spot: tuple[str, ...]

    @property
    def name(self) -> str:
        """`"blocks/forward/bfloat16 and bias/32/64"`: as the page on kernels has it, without the class of devices."""
        direction, _, *sizes, head_dim = self.spot
        numbers = self.numbers + self.tables * (AND + self.spot[1].partition(AND)[2])
        return "/".join((self.family, direction, numbers, head_dim, *sizes))

    @property
    def direction(self) -> str:
        """Which result."""
        return self.spot[0]

    @property
    def numbers(self) -> Numbers:
        """How numbers are multiplied."""
        return NUMBERS[self.spot[1].partition(AND)[0]]

    @property
    def tables(self) -> bool:
        """Whether it is for calls with a bias or a gain."""
        return AND in self.spot[1]

    @property
    def size(self) -> int:
        """The size of what queries see, where the table tells sizes apart."""
        return int(self.spot[2])

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        return int(self.spot[-1])

    @property
    def dtype(self) -> torch.dtype:
        """What is multiplied."""
        return sweeping.dtype_of(self.numbers)

    @property
    def backward(self) -> bool:
        """Whether the result is one of the backward pass."""
        return self.direction.endswith("gradient")


class Given(NamedTuple):
    """A call of a family's operator.

    Attributes:
        arguments: the operator's.
        needs: which gradients are asked for, in the operator's order.
    """

    arguments: tuple[Any, ...]
    needs: list[bool]


class Started(NamedTuple):
    """A pass made ready.

    Attributes:
        steps: what is run, in order; launches are `attnkit.kernels.triton.launch.Launch`.
        results: what they wrote: the operator's outputs, or the gradients asked for.
    """

    steps: Sequence[Any]
    results: Callable[[], Sequence[Tensor]]


Scene: TypeAlias = "Callable[[Room], Given]"


class Family(Protocol):
    """A module beside this one, named as the folder of its kernels.

    Attributes:
        PAIR: its operators, whose kernels for the CPU tell what is right.
    """

    PAIR: OpPair

    def title(self, line: Line) -> str:
        """What is made, in words: `"output"`."""
        ...

    def scenes(self, line: Line) -> Mapping[str, Scene]:
        """The calls that stand for a line, by their words; each counts alike."""
        ...

    def limits(self, line: Line) -> Limits:
        """Which configurations its kernels take."""
        ...

    def forward(self, given: Given, device_class: str) -> Started:
        """The forward pass, which is run as it is made ready, with the configurations that are now in the table."""
        ...

    def backward(self, given: Given, outputs: Sequence[Tensor], grad: Tensor, device_class: str) -> Started:
        """The backward pass from the outputs of the forward pass and the gradient of the first."""
        ...

    def timed(self, line: Line, steps: Sequence[Any]) -> list[Any]:
        """Those steps of its pass that depend on the line, in order."""
        ...


def family_of(name: str) -> Family:
    """What is known of a family of kernels."""
    return importlib.import_module(f"{__package__}.{name}")  # type: ignore[return-value]


def configs_of(family: str) -> Any:
    """The module `configs` of a family of kernels."""
    return importlib.import_module(f"{sweeping.__package__}.{family}.configs")


def table_of(family: str) -> Table:
    """The table that the kernels of a family read in this process."""
    return Table.of(configs_of(family).PATH)


def lines(what: str | None = None, only: str | None = None) -> list[Line]:
    """Lines of all tables.

    Args:
        what: a family of kernels; all where it is None or `"all"`.
        only: shell-style pattern of names; without special characters also the first part of names.

    Raises:
        ConfigError: for names of nothing, naming the nearest.
    """
    families = list(sweeping.families())
    if what not in (None, ALL, *families):
        near = did_you_mean(what, [ALL, *families])
        raise ConfigError(f"cannot tune {what!r}{near} (known: {', '.join((ALL, *families))})")
    found = [Line(one, spot) for one in families if what in (None, ALL, one) for spot in table_of(one).spots()]
    patterns = ("*",) if only is None else (only, f"{only}/*")
    chosen = [line for line in found if any(fnmatch.fnmatchcase(line.name, one) for one in patterns)]
    if not chosen:
        near = did_you_mean(only, [line.name for line in found])
        raise ConfigError(
            f"no line is named {only!r}{near} (names are like {found[0].name!r} and "
            f"'{found[-1].family}/key_gradient/*'; `attnkit bench {what or ALL} --tune --list` prints all {len(found)})"
        )
    return chosen

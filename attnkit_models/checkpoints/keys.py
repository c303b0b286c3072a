"""Key tables: the names and shapes of an authors' state dict and ours, readable in both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

Change: TypeAlias = "Callable[[Tensor], Tensor]"
Resize: TypeAlias = "Callable[[Tensor], Tensor | None]"


@dataclass(frozen=True)
class Transform:
    """How a tensor changes on its way in, and back on its way out.

    Attributes:
        inward: from the authors' tensor to ours.
        outward: its inverse.
    """

    inward: Change
    outward: Change


SAME = Transform(lambda tensor: tensor, lambda tensor: tensor)
# A linear layer's weight, (out, in), written as a convolution of one pixel, (out, in, 1, 1).
POINTWISE = Transform(lambda tensor: tensor[:, :, 0, 0], lambda tensor: tensor[:, :, None, None])
# flax's order of a linear layer, (in, out), and of a convolution, (height, width, in, out).
TRANSPOSED = Transform(lambda tensor: tensor.t(), lambda tensor: tensor.t())
CHANNELS_FIRST = Transform(lambda tensor: tensor.permute(3, 2, 0, 1), lambda tensor: tensor.permute(2, 3, 1, 0))


@dataclass(frozen=True)
class Rule:
    """One name, or with `*` at its end every name with that beginning.

    Attributes:
        theirs: the authors' name; `*` at its end stands for what it stands for in `ours`.
        ours: our name.
        transform: how the tensor changes.
        resize: brings a tensor of ours that was made for another image size to this one; None of what it cannot.
    """

    theirs: str
    ours: str
    transform: Transform = SAME
    resize: Resize | None = None


@dataclass(frozen=True)
class Section:
    """Rules that hold below a place of the model, such as one block.

    Attributes:
        theirs: the authors' prefix, such as `"stages.0.1."`.
        ours: our prefix, such as `"stages.0.blocks.1."`.
        rules: the rules below it, the first that fits counting.
    """

    theirs: str
    ours: str
    rules: tuple[Rule, ...]


@dataclass(frozen=True)
class Pair:
    """One tensor under both names."""

    theirs: str
    ours: str
    transform: Transform
    resize: Resize | None = None


class KeyTable:
    """All names of a model.

    Args:
        sections: its sections, the first that fits a name counting.
    """

    def __init__(self, sections: Iterable[Section]) -> None:
        self.sections = tuple(sections)

    def pairs(self, ours: Iterable[str]) -> list[Pair]:
        """The pair of each of our names.

        Raises:
            KeyError: for a name that no rule covers, which is a hole in the table.
        """
        return [self._pair(name) for name in ours]

    def _pair(self, name: str) -> Pair:
        for section in self.sections:
            if name.startswith(section.ours):
                rest = name[len(section.ours) :]
                for rule in section.rules:
                    if rule.ours == rest:
                        return Pair(section.theirs + rule.theirs, name, rule.transform, rule.resize)
                    if rule.ours.endswith("*") and rest.startswith(rule.ours[:-1]):
                        tail = rest[len(rule.ours) - 1 :]
                        return Pair(section.theirs + rule.theirs[:-1] + tail, name, rule.transform)
        raise KeyError(f"no rule for {name!r}")


def outward(pairs: Iterable[Pair], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the authors' names and in their shapes."""
    return {pair.theirs: pair.transform.outward(ours[pair.ours]).contiguous() for pair in pairs}


def inward(pairs: Iterable[Pair], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' tensors under our names and in our shapes."""
    return {pair.ours: pair.transform.inward(theirs[pair.theirs]).contiguous() for pair in pairs}

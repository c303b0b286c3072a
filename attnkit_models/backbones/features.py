"""Feature levels: what a model says about them, and how they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attnkit.errors import ConfigError, shown


class FeatureInfo(list[dict[str, Any]]):
    """One dict per feature level: `num_chs`, `reduction` (pixels per token side) and `module`."""

    def channels(self) -> list[int]:
        """Channels of every level."""
        return [level["num_chs"] for level in self]

    def reduction(self) -> list[int]:
        """Pixels per token side of every level."""
        return [level["reduction"] for level in self]


def take_indices(levels: int, indices: int | Sequence[int] | None) -> list[int]:
    """Level numbers from a list, a count of last levels, or None for all; negative ones count from the end."""
    if indices is None:
        return list(range(levels))
    if type(indices) is int:
        if not 1 <= indices <= levels:
            raise ConfigError(f"there are {levels} feature levels, so the last {indices} cannot be taken")
        return list(range(levels - indices, levels))
    if not isinstance(indices, (list, tuple, range)):
        raise ConfigError(
            f"feature levels are a list such as [0, -1], or a number for the last ones; got {shown(indices)}"
        )
    bad = [index for index in indices if type(index) is not int or not -levels <= index < levels]
    if bad or not indices:
        raise ConfigError(f"feature levels must be numbers in {-levels}..{levels - 1}, but got {shown(list(indices))}")
    return sorted({index % levels for index in indices})

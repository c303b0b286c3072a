"""What the chunked backend knows of one kind of layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from attnkit.kernels.call import AttendCall, AttendResult


class Family(NamedTuple):
    """A kind's share in the three methods of `attnkit.kernels.Backend`."""

    why_not: Callable[[AttendCall], tuple[str, ...]]
    cost: Callable[[AttendCall], float]
    run: Callable[[AttendCall], AttendResult]

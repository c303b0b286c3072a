"""What the chunked backend knows of one kind of layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from attnkit.kernels.call import AttendCall, AttendResult
from attnkit.kernels.costs import Work


class Family(NamedTuple):
    """A kind's share in the three methods of `attnkit.kernels.backend.MeasuredBackend`."""

    why_not: Callable[[AttendCall], tuple[str, ...]]
    work: Callable[[AttendCall], Work]
    run: Callable[[AttendCall], AttendResult]

"""Backend: the interface of everything that computes softmax over a layout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from attnkit.kernels.call import AttendCall, AttendResult
from attnkit.kernels.costs import Work, measured, milliseconds, timed


class Backend(ABC):
    """Computes attention calls; says beforehand, from metadata only, which it cannot."""

    name: ClassVar[str]
    on_demand: ClassVar[str] = ""
    """Why the automatic choice passes it over although it can run a call; empty for backends it may choose."""

    @abstractmethod
    def why_not(self, call: AttendCall) -> tuple[str, ...]:
        """Reasons why this backend cannot run a call, in plain words; empty when it can.

        Looks at shapes, dtypes, devices, gradients, the scale, kinds and versions only, never at the values in a tensor
        nor at strides: for a second call that agrees in all of these it is not asked again, nor is `cost`.
        """

    @abstractmethod
    def cost(self, call: AttendCall) -> float:
        """Predicted milliseconds for one image of a call that `why_not` has no reason against, from metadata only."""

    def known_cost(self, call: AttendCall) -> float | None:
        """`cost` where it is a time that may be shown; None where it rests on other devices' or dtypes' times."""
        return self.cost(call) if measured(call.q.device) else None

    def dense_instead(self, call: AttendCall) -> str:
        """Why dense attention under a mask is expected to be faster than this backend; empty where it is not.

        For devices on which nothing was measured, from metadata only.
        """
        return ""

    def how(self, call: AttendCall) -> str:
        """How this backend computes a call, where `explain` should say more than its name; from metadata only."""
        return ""

    @abstractmethod
    def run(self, call: AttendCall) -> AttendResult:
        """Computes a call that `why_not` has no reason against."""


class MeasuredBackend(Backend):
    """A backend whose work is counted, and predicted by what its kernels took in measurements."""

    @abstractmethod
    def work(self, call: AttendCall) -> Work:
        """Which kernel computes a call, and what it has to do, from metadata only."""

    def cost(self, call: AttendCall) -> float:
        return milliseconds(call, self.work(call))

    def known_cost(self, call: AttendCall) -> float | None:
        work = self.work(call)
        return milliseconds(call, work) if timed(call, work) else None

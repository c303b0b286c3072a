"""Backend: the interface of everything that computes softmax over a layout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from attnkit.kernels.call import AttendCall, AttendResult


class Backend(ABC):
    """Computes attention calls; says beforehand, from metadata only, which it cannot."""

    name: ClassVar[str]

    @abstractmethod
    def why_not(self, call: AttendCall) -> tuple[str, ...]:
        """Reasons why this backend cannot run a call, in plain words; empty when it can.

        Looks at shapes, dtypes, devices, gradients, the scale, kinds and versions only, never at the values in a tensor
        nor at strides: for a second call that agrees in all of these it is not asked again, nor is `cost`.
        """

    @abstractmethod
    def cost(self, call: AttendCall) -> float:
        """Rough cost per image, in multiply-adds of a dense matrix product; only comparisons between backends count."""

    @abstractmethod
    def run(self, call: AttendCall) -> AttendResult:
        """Computes a call that `why_not` has no reason against."""


def size_of(call: AttendCall, keys: int) -> float:
    """Multiply-adds per image of a call in which every query meets `keys` keys; the batch is left out, since it is the
    same for every backend and may be symbolic in an exported graph."""
    _, heads, queries, width = call.q.shape
    return float(heads * queries * keys * (width + call.v.shape[3]))

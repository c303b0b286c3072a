"""The chunked backend: which kernels compute which kind of layout."""

from __future__ import annotations

from typing import ClassVar

from attnkit.kernels.backend import MeasuredBackend
from attnkit.kernels.call import AttendCall, AttendResult
from attnkit.kernels.chunked.blocks import BLOCKED
from attnkit.kernels.chunked.family import Family
from attnkit.kernels.chunked.stencil import STENCILS
from attnkit.kernels.chunked.token_sets import TOKEN_LISTS
from attnkit.kernels.costs import Work
from attnkit.kernels.transforms import differentiating
from attnkit.layouts import Blocks, Layout, Stencil, TokenMask, TokenSets

FAMILIES: dict[type[Layout], Family] = {
    Blocks: BLOCKED,
    Stencil: STENCILS,
    TokenMask: TOKEN_LISTS,
    TokenSets: TOKEN_LISTS,
}


class ChunkedBackend(MeasuredBackend):
    """Hand-written passes over pieces that fit the cache, which keep nothing but the output and two numbers a query."""

    name: ClassVar[str] = "chunked"

    def why_not(self, call: AttendCall) -> tuple[str, ...]:
        family = FAMILIES.get(type(call.layout))
        if family is None:
            kinds = ", ".join(sorted(layout.kind for layout in FAMILIES))
            return (f"a {call.layout.kind} layout has no kernels here; it takes {kinds}",)
        reasons = family.why_not(call)
        if differentiating():
            more = "its backward passes are written by hand, which forward mode and torch.func's derivatives cannot use"
            reasons = (*reasons, more)
        return reasons

    def work(self, call: AttendCall) -> Work:
        return FAMILIES[type(call.layout)].work(call)

    def run(self, call: AttendCall) -> AttendResult:
        return FAMILIES[type(call.layout)].run(call)

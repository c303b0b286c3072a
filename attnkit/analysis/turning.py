"""Beside dense: whether dense heads would be faster than a head group, and at which image size that turns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from attnkit.analysis.surroundings import sketched
from attnkit.analysis.tracing import Visit
from attnkit.grid import Grid
from attnkit.kernels import AttendCall
from attnkit.kernels.costs import mode_of, predicted, written
from attnkit.kernels.dispatch import backend_named
from attnkit.layouts import Dense
from attnkit.primitives import HeadInputs

# Maps are tried from an eighth to eight times as high and wide, as long as they have no more tokens than this.
STEPS = (-3, -2, -1, 0, 1, 2, 3)
MOST_TOKENS = 2**17


@dataclass(frozen=True)
class BesideDense:
    """A head group beside as many dense heads on the same map, predicted for one image.

    Attributes:
        path: name of the group inside the module.
        kind: name of its primitive.
        milliseconds: its attention and what it does to choose its keys, without the mix's projections.
        dense_milliseconds: attention of as many dense heads.
        tried: smallest and largest height of an image that was tried, in `unit`.
        faster_from: the height from which on the group is predicted to be the faster one, up to the largest that was
            tried; None if it is not the faster one there.
        unit: `"pixels"`, or `"tokens"` for a layer.
    """

    path: str
    kind: str
    milliseconds: float
    dense_milliseconds: float
    tried: tuple[int, int]
    faster_from: int | None
    unit: str

    def __str__(self) -> str:
        sides = f"{written(self.milliseconds)} ms beside {written(self.dense_milliseconds)} ms of dense heads"
        low, high = self.tried
        slow = self.milliseconds > self.dense_milliseconds
        if low == high:
            turn = "it takes no other size"
        elif self.faster_from is None:
            turn = f"slower at {high} x {high} {self.unit}{' too' if slow else ''}"
        elif self.faster_from == low:
            turn = f"faster at every size from {low} x {low} to {high} x {high} {self.unit}"
        else:
            turn = f"sparse is faster from {self.faster_from} x {self.faster_from} {self.unit} on"
        dense = "dense heads would be faster; " if slow else ""
        return f"{sides}: {dense}{turn}"


def beside_dense(visit: Visit, height: int, unit: str, known: dict[object, BesideDense | None]) -> BesideDense | None:
    """Compares a visited head group with dense heads; None for what is no head group, makes no attention, is dense,
    runs where no times were measured, or must know what stands in a tensor before it knows what it attends to.

    Args:
        visit: a run of the group.
        height: height of the image that led to it.
        unit: of what that is.
        known: answers so far, by what they depend on; added to.
    """
    inputs = visit.inputs
    if inputs is None or not visit.choices or all(isinstance(one.call.layout, Dense) for one in visit.choices):
        return None
    if any(backend_named(one.backend).known_cost(one.call) is None for one in visit.choices):
        return None
    grad = visit.choices[0].call.needs_grad
    options = repr(getattr(visit.module, "options", None))
    widths = tuple(None if one is None else one.shape[1:] for one in (inputs.x, inputs.q, inputs.k, inputs.v))
    key = (visit.kind, options, inputs.grid, widths, inputs.x.dtype, grad)
    if key not in known:
        known[key] = _compare(visit, inputs, height, unit, grad=grad)
    found = known[key]
    return None if found is None else replace(found, path=visit.path)


def _compare(visit: Visit, inputs: HeadInputs, height: int, unit: str, *, grad: bool) -> BesideDense | None:
    first = inputs.grid.sizes[0]
    found: dict[int, tuple[float, float]] = {}

    def faster(side: int) -> bool | None:
        """Whether the group is the faster one on a map so high; None where it does not take such a map."""
        if side not in found:
            sizes = tuple(max(1, round(size * side / first)) for size in inputs.grid.sizes)
            pair = predict(visit, inputs, sizes, grad=grad)
            if pair is None:
                return None
            found[side] = pair
        return found[side][0] < found[side][1]

    here = predict(visit, inputs, inputs.grid.sizes, grad=grad)
    if here is None:
        return None
    found[first] = here
    sides = sorted({max(2, round(first * 2.0**step)) for step in STEPS})
    tried = [side for side in sides if side * side <= MOST_TOKENS and faster(side) is not None] or [first]
    slow = [side for side in tried if not faster(side)]
    fast = [side for side in tried if faster(side) and (not slow or side > slow[-1])]
    turn = fast[0] if fast else None
    if slow and fast:
        low, high = slow[-1], fast[0]
        while high - low > max(1, high // 16):
            middle = (low + high) // 2
            verdict = faster(middle)
            if verdict is None:
                break
            low, high = (low, middle) if verdict else (middle, high)
        turn = high

    def image(side: int) -> int:
        return round(side * height / first)

    lowest, highest = image(tried[0]), image(tried[-1])
    return BesideDense(visit.path, visit.kind, *here, (lowest, highest), None if turn is None else image(turn), unit)


def predict(visit: Visit, inputs: HeadInputs, sizes: tuple[int, ...], *, grad: bool) -> tuple[float, float] | None:
    """Predicted milliseconds of a head group, and of as many dense heads, for one image on a map of other sizes.

    None where it cannot run on such a map, or must know what stands in a tensor.
    """
    try:
        sketch = sketched(visit.module, inputs, sizes, grad=grad)
    except Exception:
        # Whatever it says: a size that cannot be tried is no answer, and none that a user asked for.
        return None
    own = sum(backend_named(one.backend).cost(one.call) for one in sketch.choices)
    out, grid = sketch.output.out, Grid(*sizes, prefix=inputs.grid.prefix)
    _, heads, queries, width = out.shape
    with torch.set_grad_enabled(grad):
        q, k = (torch.empty(1, heads, count, width, dtype=out.dtype, device="meta") for count in (queries, grid.tokens))
        dense = AttendCall(q.requires_grad_(grad), k, k, Dense(queries, grid.tokens), 1.0)
        own += predicted(sketch.around, mode_of(out.dtype, grad=grad))
        return own, backend_named("sdpa").cost(dense)

"""Roofline: the shortest times that memory, tensor cores and the exponential unit of a GPU allow for blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from attnkit_models.bench.case import OURS, Case
from attnkit_models.bench.gpu import GPU
from attnkit_models.bench.headline import HEADLINE
from attnkit_models.bench.report import markdown, milliseconds, number, percent

Record = dict[str, Any]


@dataclass(frozen=True)
class Device:
    """What a GPU can do at most, from its maker's data sheet.

    Attributes:
        name: what it is called for short.
        products: multiplications and additions of tensor cores in 16 bits, a second, without sparsity.
        bytes: bytes of its memory a second.
        exponentials: 16 a clock of every multiprocessor, at the clock that `products` are told for.
        own_name: the whole name that the device gives itself.
    """

    name: str
    products: float
    bytes: float
    exponentials: float
    own_name: str = ""


def _nvidia(name: str, own_name: str, teraflops: float, terabytes: float, a_clock: int) -> Device:
    """A device of whose multiprocessors each does `a_clock` multiplications and additions a clock."""
    per_second = 1e12 * teraflops
    return Device(name, per_second, 1e12 * terabytes, per_second * 16 / a_clock, f"NVIDIA {own_name}")


# PCIe and NVL cards of the same generation, and those beside a Grace CPU, have other clocks and memories.
DEVICES = (
    _nvidia("A100 SXM 80 GB", "A100-SXM4-80GB", 312.0, 2.039, 2048),
    _nvidia("H100 SXM", "H100 80GB HBM3", 989.0, 3.35, 4096),
    _nvidia("H200 SXM", "H200", 989.0, 4.8, 4096),
    _nvidia("B200", "B200", 2250.0, 8.0, 8192),
)


class Passes(NamedTuple):
    """How much a pass does, in units of the call.

    Attributes:
        products: matrix products over all visible pairs.
        exponentials: of every visible pair.
        rows: tensors of (B, heads, N, D) that are read or written.
    """

    products: int
    exponentials: int
    rows: int


# Forward: q.k and the weights times v; q, k, v in, out out. Backward at least: the weights once more, so q.k and one
# exponential, grad.v, and three gradients; q, k, v, out and grad in, three gradients out. Kernels that make the weights
# twice, one for q and one for k and v, as those of regions do, stay below their roof for it.
PASSES = {"forward": Passes(2, 1, 4), "training": Passes(2 + 5, 1 + 1, 4 + 8)}


class Roof(NamedTuple):
    """Milliseconds that a call takes at least, by what it needs."""

    memory: float
    products: float
    exponentials: float

    @property
    def least(self) -> float:
        """The longest of the three: nothing can be faster."""
        return max(self)

    @property
    def bound(self) -> str:
        """What that is."""
        names = ("memory", "tensor cores", "exponentials")
        return names[self.index(self.least)]


def roof(
    device: Device, what: str, *, batch: int, heads: int, tokens: int, keys: float, width: int, itemsize: int = 2
) -> Roof:
    """The limits of a call of blocks.

    A product over the visible pairs is 2 B h N K d multiplications and additions, a tensor is B h N d numbers and every
    visible pair has one exponential: B h N K.

    Args:
        device: the GPU.
        what: `"forward"`, or `"training"` for forward and backward.
        batch: images, B.
        heads: heads, h.
        tokens: tokens of an image, N.
        keys: keys that a query sees, K.
        width: channels of a head, d.
        itemsize: bytes of a number.
    """
    passes = PASSES[what]
    pairs = float(batch * heads * tokens) * keys
    return Roof(
        1e3 * passes.rows * itemsize * batch * heads * tokens * width / device.bytes,
        1e3 * passes.products * 2 * pairs * width / device.products,
        1e3 * passes.exponentials * pairs / device.exponentials,
    )


def device_of(name: str) -> Device | None:
    """The device of a name as PyTorch tells it, such as `"NVIDIA H100 80GB HBM3"`; None for one without numbers."""
    return next((one for one in DEVICES if one.own_name == name.strip()), None)


def routed(cases: Iterable[Case]) -> list[Case]:
    """The cases that are one call of blocks."""
    return [case for case in cases if case.problem in ("regions", "windows", "shifted")]


def roof_of(device: Device, case: Case, what: str, batch: int) -> Roof:
    """The limits of a case.

    Args:
        device: the GPU.
        case: one of `routed`.
        what: `"forward"` or `"training"`.
        batch: images at a time.
    """
    sizes = case.sizes
    tokens = sizes["side"] ** 2
    seen = {
        "windows": lambda: sizes["window"],
        "shifted": lambda: sizes["window"] ** 2,
        "regions": lambda: sizes["topk"] * tokens / sizes["regions"] ** 2,
    }
    keys = seen[case.problem]()
    shape = {"batch": batch, "heads": sizes["heads"], "tokens": tokens, "keys": keys, "width": sizes["width"]}
    return roof(device, what, **shape)


def table(results: Record) -> str:
    """Limits of the cases that were measured on a GPU, beside what was measured; empty for others."""
    device = device_of(results["machine"].get("gpu", ""))
    if device is None or results["machine"]["dtype"] not in ("bfloat16", "float16"):
        return ""
    found = {one["name"]: one for one in results["cases"]}
    rows = []
    for case in routed((*HEADLINE, *GPU)):
        record = found.get(case.name)
        for what in PASSES if record is not None and "batch" in record["facts"] else ():
            assert record is not None
            limit = roof_of(device, case, what, int(record["facts"]["batch"]))
            ours = number(record, OURS, what)
            share = "" if not ours else percent(limit.least / ours)
            rows.append([*_cells(case, what, limit), milliseconds(ours), share])
    return markdown([*HEAD, "measured", "of the limit"], rows, left=2) if rows else ""


def limits(device: Device) -> str:
    """Limits of the cases of `attnkit bench gpu`, measured or not."""
    rows = [
        _cells(case, what, roof_of(device, case, what, case.sizes["batch"])) for case in routed(GPU) for what in PASSES
    ]
    return markdown(HEAD, rows, left=2)


HEAD = ["case", "", "memory", "tensor cores", "exponentials", "bound by"]


def _cells(case: Case, what: str, limit: Roof) -> list[str]:
    label = case.title if what == "forward" else ""
    name = {"forward": "forward", "training": "forward and backward"}[what]
    return [label, name, *(milliseconds(one) for one in limit), limit.bound]

"""What a call costs: counts of the work a kernel does, times the seconds that measurements gave for each of them.

`costs.json` holds those numbers. They are fitted to the measurements in `benchmarks/calibration.json`, and `python
benchmarks/calibrate.py` makes both anew; `docs/concepts/dispatch.md` says how well they tell.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from attnkit.kernels.call import AttendCall
from attnkit.layouts import Blocks

# Where nothing was measured, a float16 or float64 call is judged as a float32 one.
MEASURED_DTYPES = ("float32", "bfloat16")
# Tensors on "meta" have no device; what is predicted of them is what it takes on a CPU.
MEASURED_DEVICES = ("cpu", "meta")

# Read at import: the first call may already be one that is being compiled, where nothing can be read.
_FILE: dict[str, Any] = json.loads(Path(__file__).with_name("costs.json").read_text(encoding="utf-8"))

Counts = Mapping[str, float]


class Work(NamedTuple):
    """What a kernel has to do for one image.

    Attributes:
        kernel: its name in `costs.json`.
        counts: how much of it by name, such as `{"calls": 1, "pairs": 6272, "products": 401408}`.
    """

    kernel: str
    counts: Counts


def milliseconds(call: AttendCall, work: Work) -> float:
    """Predicted time of some work for one image, in a call's precision and with a backward pass where it needs one."""
    return predicted(work, mode_of(call.q.dtype, grad=call.needs_grad))


def measured(device: torch.device) -> bool:
    """Whether predictions say anything about a device."""
    return device.type in MEASURED_DEVICES


def timed(call: AttendCall, work: Work) -> bool:
    """Whether the kernel was measured on the call's device and in its precision, so that its time may be shown."""
    name = str(call.q.dtype).removeprefix("torch.")
    return (
        measured(call.q.device)
        and name in MEASURED_DTYPES
        and work.kernel in constants()[mode_of(call.q.dtype, grad=call.needs_grad)]
    )


def predicted(work: Work, mode: str) -> float:
    """The same under a name of `mode_of`."""
    # A kernel without a backward pass, or one that was not measured in this precision, is judged in float32. A new one,
    # or a new count, has no constants until they are fitted again, for which calls must be judged.
    rates = constants()[mode].get(work.kernel) or constants()["float32 inference"].get(work.kernel, {})
    return 1e3 * sum(rates.get(name, 0.0) * count for name, count in work.counts.items())


def mode_of(dtype: torch.dtype, *, grad: bool) -> str:
    """Name of the constants for a dtype, with or without a backward pass: `"bfloat16 training"`."""
    name = str(dtype).removeprefix("torch.")
    return f"{name if name in MEASURED_DTYPES else MEASURED_DTYPES[0]} {'training' if grad else 'inference'}"


def constants() -> dict[str, dict[str, dict[str, float]]]:
    """Seconds a count, by mode, kernel and name of the count."""
    return _FILE["seconds"]


def measured_on() -> str:
    """The machine that the constants were measured on, in a few words."""
    machine = _FILE["machine"]
    return f"{machine['processor']}, {machine['threads']} threads"


def written(milliseconds: float) -> str:
    """A number of milliseconds with two digits, or as many as are whole: 0.034, 1.2, 340."""
    return f"{milliseconds:.2g}" if milliseconds < 10 else f"{milliseconds:.0f}"


def pairs(call: AttendCall, keys: int) -> dict[str, float]:
    """Counts of a kernel in which each query meets `keys` keys.

    `pairs` are the logits of all heads, whose exponentials are taken, and `products` the multiply-adds over them. All
    counts are those of one image, which has its share of the call.
    """
    _, heads, queries, width = call.q.shape
    logits = float(heads * queries * keys)
    return {"calls": share(call), "pairs": logits, "products": logits * float(width + call.v.shape[3])}


def share(call: AttendCall) -> float:
    """One image's share of what is done once for all; 1 while compiling, where the batch may be symbolic."""
    return 1.0 if torch.compiler.is_compiling() else 1.0 / max(int(call.q.shape[0]), 1)


def whole_mask(call: AttendCall) -> float:
    """Entries of the layout's mask, and of a bias, that a kernel over all pairs has to make."""
    once = share(call) if call.layout.lead[0] == 1 else 1.0
    entries = 0.0 if call.layout.full else once * float(call.layout.lead[1] * call.q.shape[2] * call.k.shape[2])
    return entries + (0.0 if call.bias is None else float(call.q.shape[1] * call.q.shape[2] * call.k.shape[2]))


def fetched(call: AttendCall, layout: Blocks) -> dict[str, float]:
    """Counts of a kernel that computes a small problem for each block, with the keys and values it sees moved to it."""
    heads, width = call.q.shape[1], call.k.shape[3] + call.v.shape[3]
    problems = float(heads * layout.num_blocks)
    return {**pairs(call, layout.key_slots), "problems": problems, "moved": problems * layout.key_slots * width}

"""Profiled: where the time of a pass through attnkit goes, operator by operator."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.profiler import ProfilerActivity, profile, record_function

from attnkit.kernels import AttendCall, AttendResult
from attnkit.kernels.dispatch import wrapping
from attnkit.primitives import HeadGroup

FUSED, PRODUCTS, COPIES, OTHER = "fused attention", "products", "copies", "other arithmetic"
AROUND, PROJECTIONS, REST, BETWEEN = "around attention", "projections", "the rest", "between operators"
# In the order of the tables.
PARTS = {
    FUSED: "PyTorch's fused attention, called by attnkit's kernels; on a GPU attnkit's own kernels",
    PRODUCTS: "matrix products and convolutions of attnkit's kernels",
    COPIES: "what attnkit's kernels copy, fetch, scatter and fill",
    OTHER: "softmax, masks and sums in attnkit's kernels",
    AROUND: "what a head group does beside its attention, choosing keys above all",
    PROJECTIONS: "linear maps outside head groups",
    REST: "everything else in a layer or model, the optimizer too",
    BETWEEN: "Python, dispatch and views: time in no operator that computes",
}

PASS, ATTEND, GROUP, LINEAR = "bench pass", "bench attend", "bench group", "bench linear"
OPERATORS = "attnkit::"
_BACKWARD = "autograd::engine::evaluate_function"

_FUSED = re.compile(r"scaled_dot_product|flash_attention|efficient_attention")
_PRODUCTS = re.compile(r"mm(_out)?$|bmm|matmul|linear|conv")
_COPIES = re.compile(r"copy|index|gather|scatter|clone|contiguous|::cat$|stack|fill|zero|ones|pad|roll|repeat")
_VIEWS = re.compile(
    r"::(view|reshape|transpose|permute|select|slice|unsqueeze|squeeze|expand|as_strided|empty|narrow|split|chunk|unbind"
    r"|t|unflatten|flatten|_unsafe_view|detach|alias|resize|unfold|is_|result_type|to|_reshape|lift|item|_local_scalar)"
    r"(_[a-z_]*)?$"
)


def profiled(call: Callable[[], object], device: torch.device, rounds: int = 3) -> dict[str, Any]:
    """Milliseconds of a pass under the profiler, and the share of each of `PARTS` in them.

    Args:
        call: a forward pass, or one with its backward pass, that is warm.
        device: where it computes. On a GPU the time of its kernels counts, and none lies between operators.
        rounds: how often it is called.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with _spans(), profile(activities=activities, acc_events=True) as found:
        for _ in range(rounds):
            with record_function(PASS):
                call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    spent = shared_out(found.events() or [], cuda=device.type == "cuda")
    whole = sum(spent.values())
    shares = {part: round(spent[part] / whole, 4) if whole else 0.0 for part in PARTS}
    return {"milliseconds": round(whole / 1e3 / rounds, 3), "shares": shares}


def shared_out(events: Iterable[Any], *, cuda: bool = False) -> dict[str, float]:
    """Microseconds of each of `PARTS` in the events of a profiler."""
    # A GPU's trace has spans of the same names on the device. What they last counts already, at the operators.
    on_cpu = [one for one in events if one.device_type == DeviceType.CPU]
    passes = [one.time_range for one in on_cpu if one.name == PASS]
    # By time: a backward pass on a GPU runs on a thread of its own, where nothing lies in the span of the pass.
    inside = [one for one in on_cpu if any(span.start <= one.time_range.start <= span.end for span in passes)]
    made = _makers(inside)
    spent = dict.fromkeys(PARTS, 0.0)
    for one in inside:
        own = one.self_device_time_total if cuda else one.self_cpu_time_total
        # On a GPU the time of what is written in Triton is that of the operator which starts it.
        ours = cuda and one.name.startswith(OPERATORS)
        spent[FUSED if ours else part_of(one.name, _stage(one, made))] += own
    return spent


def part_of(name: str, stage: str) -> str:
    """Which of `PARTS` an operator of a name belongs to, in a stage: `ATTEND`, `GROUP`, `LINEAR`, or neither."""
    if "::" not in name or name.startswith((_BACKWARD, OPERATORS, "profiler::")) or _VIEWS.search(name):
        # A span of Python, an operator that calls others, or one that computes nothing.
        return BETWEEN
    if stage != ATTEND:
        return {GROUP: AROUND, LINEAR: PROJECTIONS}.get(stage, REST)
    for part, pattern in ((FUSED, _FUSED), (PRODUCTS, _PRODUCTS), (COPIES, _COPIES)):
        if pattern.search(name):
            return part
    return OTHER


def _line(event: Any) -> Iterator[Any]:
    """An event and all it lies in, from the inside out."""
    while event is not None:
        yield event
        event = event.cpu_parent


def _makers(events: Iterable[Any]) -> dict[int, Any]:
    """By number in the graph: the operator that made a node, which is the last one seen with its number."""
    forward = [one for one in events if one.sequence_nr >= 0 and not _backward(one)]
    return {one.sequence_nr: one for one in sorted(forward, key=lambda one: one.time_range.start)}


def _backward(event: Any) -> Any:
    """The node of the graph whose backward pass an event lies in; None in a forward pass."""
    return next((one for one in _line(event) if one.name.startswith(_BACKWARD)), None)


def _stage(event: Any, made: dict[int, Any]) -> str:
    """The stage an event lies in; in a backward pass that of the operator whose gradient it is."""
    node = _backward(event)
    if node is not None:
        event = made.get(node.sequence_nr)
    names = {one.name for one in _line(event)}
    return next((stage for stage in (ATTEND, GROUP, LINEAR) if stage in names), "")


@contextmanager
def _spans() -> Iterator[None]:
    """Marks attention calls, head groups and linear maps for the profiler."""
    open_spans: list[Any] = []

    def name_of(module: nn.Module) -> str:
        return GROUP if isinstance(module, HeadGroup) else LINEAR if isinstance(module, nn.Linear) else ""

    def enter(module: nn.Module, _: Any) -> None:
        if name_of(module):
            span = record_function(name_of(module))
            span.__enter__()
            open_spans.append(span)

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        if name_of(module):
            open_spans.pop().__exit__(None, None, None)

    def watched(call: AttendCall, compute: Callable[[], AttendResult]) -> AttendResult:
        with record_function(ATTEND):
            return compute()

    hooks = [
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave),
    ]
    try:
        with wrapping(watched):
            yield
    finally:
        for hook in hooks:
            hook.remove()

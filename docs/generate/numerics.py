"""Measures the errors of every backend on hard inputs, and renews the tables of docs/numerics.md.

Run it from the repository root: python docs/generate/numerics.py

It takes half a minute on one core, most of it for compiling FlexAttention, and prints the tables. The numbers behind
them go to docs/tables/numerics.json.
"""

from __future__ import annotations

import copy
import datetime
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

import attnkit
from attnkit.kernels import AttendCall
from attnkit.kernels.dispatch import backend_named
from attnkit.layouts import RelativeTable, Stencil
from attnkit.primitives import BuildContext, HeadInputs
from attnkit.primitives.learned_query import LearnedQueryHeads
from attnkit.registry import BACKENDS
from attnkit.testing import (
    HARD_INPUTS,
    HardInput,
    dense_attention,
    expected,
    naive_attention,
    peak_memory,
    random_tensor,
    randomize_parameters,
)
from attnkit_models.bench.machine import processor

PAGE = Path(__file__).parents[1] / "numerics.md"
NUMBERS = Path(__file__).parents[1] / "tables" / "numerics.json"
BEGIN, END = "<!-- tables: docs/generate/numerics.py -->", "<!-- end of the tables -->"

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Their kernels are for GPUs, and the page is measured without one.
ON_GPUS = ("triton", "xformers")
COMPUTED = sorted(
    (name for name, target in BACKENDS.items() if target and name not in ON_GPUS), key=lambda name: name != "reference"
)
# From here on a result has nothing to do with the right one.
WRONG = 0.05

KERNELS = (3, 7, 15)
SIZES = (10, 30, 100, 300, 1000)
QUERIES, LEARNED_HEADS, LEARNED_WIDTH = 2, 4, 8
LEARNED_GRID = attnkit.Grid(16, 16)

Record = dict[str, Any]


def difference(actual: Tensor, exact: Tensor) -> float:
    """max|actual - exact| / max|exact|; NaN or infinite where a number is."""
    error, size = (float(one.detach().abs().max()) for one in (actual.double() - exact, exact))
    return error / size if size else error


def worst(errors: Sequence[float]) -> float:
    """The largest, or NaN where one is."""
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)


def wide(call: AttendCall) -> AttendCall:
    """The same numbers in float64."""
    rows = [one.detach().double().requires_grad_() for one in (call.q, call.k, call.v)]
    bias = cast("Tensor | None", call.bias)
    if bias is not None:
        bias = bias.detach().double().requires_grad_(bias.requires_grad)
    return call.replace(q=rows[0], k=rows[1], v=rows[2], bias=bias)


def answers(call: AttendCall, compute: Callable[[AttendCall], Tensor], step: float | None) -> list[Tensor]:
    """Output, and the gradients of what asks for one where a gradient of size `step` arrives."""
    if step is None:
        with torch.no_grad():
            return [compute(call)]
    out = compute(call)
    leaves = [one for one in (call.q, call.k, call.v, call.bias) if isinstance(one, Tensor) and one.requires_grad]
    arriving = step * random_tensor(*out.shape, seed=99).to(call.v.dtype)
    return [out, *torch.autograd.grad(out, leaves, arriving.to(out.dtype))]


def by_hand(call: AttendCall) -> Tensor:
    """Plain attention in the dtype of the inputs."""
    bias = cast("Tensor | None", call.bias)
    return naive_attention(call.q, call.k, call.v, call.layout.to_mask(), call.scale, bias)


def on(backend: str) -> Callable[[AttendCall], Tensor]:
    """Attention on a backend."""
    return lambda call: attnkit.attend(
        call.q, call.k, call.v, call.layout, scale=call.scale, bias=call.bias, backend=backend
    )


def for_flex(call: AttendCall) -> AttendCall:
    """The same problem with a bias and a key mask in any case: FlexAttention compiles for seconds per combination."""
    bias = call.q.new_zeros(1, *call.q.shape[1:3], call.k.shape[2]) if call.bias is None else call.bias
    keys = torch.ones(call.q.shape[0], call.k.shape[2], dtype=torch.bool)
    return call.replace(bias=cast("Tensor", bias).detach().float(), layout=call.layout.restrict(keys))


def runs(call: AttendCall, layout: str) -> Iterator[tuple[str, AttendCall, Callable[[AttendCall], Tensor], bool]]:
    """Who computes a call: the name, the call, the function, and whether it has a backward pass."""
    yield "by hand", call, by_hand, True
    for backend in COMPUTED:
        if backend == "flex":
            if layout == "blocks" and call.k.shape[2] < 100 and call.q.dtype != torch.float64:
                yield backend, for_flex(call), on(backend), False
        elif not backend_named(backend).why_not(call):
            yield backend, call, on(backend), True


def measure_input(hard: HardInput, dtype: torch.dtype) -> list[Record]:
    """The worst errors of everyone over the layouts of an input."""
    errors: dict[str, dict[str, list[tuple[float, str]]]] = {}
    for layout_name, layout in hard.layouts().items():
        call = hard.call(layout, dtype)
        exact = answers(wide(call), lambda one: expected(one)[0], hard.step)
        rounded = [one.to(dtype) for one in exact]
        found = [("rounded", rounded)]
        for who, own, compute, backward in runs(call, layout_name):
            found.append((who, answers(own, compute, hard.step if backward else None)))
        for who, results in found:
            off = [difference(one, other) for one, other in zip(results, exact, strict=False)]
            mine = errors.setdefault(who, {"out": [], "gradient": []})
            mine["out"].append((off[0], layout_name))
            if off[1:]:
                mine["gradient"].append((worst(off[1:]), layout_name))
    records = []
    for who, mine in errors.items():
        record: Record = {"input": hard.name, "dtype": short(dtype), "by": who}
        for what, pairs in mine.items():
            if pairs:
                size = worst([error for error, _ in pairs])
                record[what] = plain(size)
                record[f"{what} under"] = next(name for error, name in pairs if plain(error) == plain(size))
        records.append(record)
    return records


def learned_query(size: float, dtype: torch.dtype) -> tuple[LearnedQueryHeads, HeadInputs]:
    """Heads of learned queries whose scores reach ±size, with inputs, in a dtype."""
    channels = LEARNED_HEADS * LEARNED_WIDTH
    options = attnkit.LearnedQuery(LEARNED_HEADS, 3, queries=QUERIES)
    group = randomize_parameters(options.build(BuildContext(channels, LEARNED_WIDTH)).double(), seed=5)
    x = random_tensor(1, LEARNED_GRID.tokens, channels, seed=6)
    v = random_tensor(1, LEARNED_HEADS, LEARNED_GRID.tokens, LEARNED_WIDTH, seed=7)
    with torch.no_grad():
        group.key.mul_(size / (x @ group.score_weight().T).abs().max())
    return group.to(dtype).requires_grad_(False), HeadInputs(x.to(dtype), None, None, v.to(dtype), LEARNED_GRID)


def tables(group: LearnedQueryHeads) -> tuple[Tensor, Tensor]:
    """Bias and gain of heads of learned queries, (queries * heads, 3, 3)."""
    assert group.relative_bias is not None and group.gain is not None
    return group.relative_bias, group.gain


def exact_learned_query(group: LearnedQueryHeads, inputs: HeadInputs) -> Tensor:
    """The same in float64 by dense attention over all tokens, from the group's weights."""
    group, v = copy.deepcopy(group).double(), cast("Tensor", inputs.v).double().repeat(1, QUERIES, 1, 1)
    scores = (inputs.x.double() @ group.score_weight().T).transpose(1, 2)[..., None]
    bias, gain = (
        RelativeTable(table, inputs.grid, fill=fill).dense(inputs.grid.tokens)
        for table, fill in zip(tables(group), (0.0, 1.0), strict=True)
    )
    mask = Stencil(inputs.grid, 3).to_mask()
    out = dense_attention(torch.ones_like(scores), scores, v, mask, 1.0, bias, gain)[0]
    return out.unflatten(1, (QUERIES, -1)).sum(1)


def published_learned_query(group: LearnedQueryHeads, inputs: HeadInputs, *, shifted: bool) -> Tensor:
    """The method as it was published: two sums over windows of exp(score), divided by each other.

    Args:
        group: the heads, whose dtype is computed in.
        inputs: their inputs.
        shifted: whether the largest score of the whole image is subtracted first, as a port of it does.
    """
    v = cast("Tensor", inputs.v)
    sizes = inputs.grid.sizes
    query = group.query / (group.query.norm(dim=2, keepdim=True) + 1e-6) * LEARNED_WIDTH**-0.5
    weight = torch.einsum("lhd,hdc->lhc", query, group.key.unflatten(0, (LEARNED_HEADS, -1))).flatten(0, 1)
    scores = (inputs.x @ weight.T).transpose(1, 2).unflatten(2, sizes)
    bias, gain = tables(group)
    if shifted:
        scores, bias = scores - scores.max(), bias - bias.max()
    raised, place = scores.exp(), bias.exp()

    def windows(maps: Tensor, kernel: Tensor) -> Tensor:
        return F.conv2d(maps, kernel[:, None], padding=1, groups=maps.shape[1])

    values = v.transpose(2, 3).unflatten(3, sizes).repeat(1, QUERIES, 1, 1, 1)
    top = windows((raised[:, :, None] * values).flatten(1, 2), (place * gain).repeat_interleave(LEARNED_WIDTH, 0))
    out = top.unflatten(1, (-1, LEARNED_WIDTH)) / windows(raised, place)[:, :, None]
    return out.unflatten(1, (QUERIES, -1)).sum(1).flatten(3).transpose(2, 3)


def measure_learned_query(size: float, dtype: torch.dtype) -> list[Record]:
    """Errors where the result is finite, and the share of numbers that are not."""
    group, inputs = learned_query(size, dtype)
    exact = exact_learned_query(group, inputs)
    found = {
        "attnkit": group(inputs).out,
        "exp": published_learned_query(group, inputs, shifted=False),
        "exp, shifted": published_learned_query(group, inputs, shifted=True),
    }
    records = []
    for who, out in found.items():
        finite = out.isfinite()
        error = difference(out.where(finite, 0.0), exact.where(finite, 0.0)) if finite.any() else None
        lost = 1 - float(finite.double().mean())
        records.append({"size": size, "dtype": short(dtype), "by": who, "out": plain(error), "lost": round(lost, 4)})
    return records


def measure_memory(kernel: int) -> Record:
    """Bytes of a pass of learned queries, in units of the N L C numbers of its values."""
    grid = attnkit.Grid(32, 32)
    channels = LEARNED_HEADS * LEARNED_WIDTH
    options = attnkit.LearnedQuery(LEARNED_HEADS, kernel, queries=QUERIES)
    group = options.build(BuildContext(channels, LEARNED_WIDTH))
    x = random_tensor(1, grid.tokens, channels, seed=1, dtype=torch.float32)
    v = random_tensor(1, LEARNED_HEADS, grid.tokens, LEARNED_WIDTH, seed=2, dtype=torch.float32)
    unit = 4 * grid.tokens * QUERIES * channels
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.no_grad():
        forward = peak_memory(lambda: group(HeadInputs(x, None, None, v, grid)))
    leaves = [v.requires_grad_(), *group.parameters()]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        group(HeadInputs(x, None, None, v, grid))
    training = peak_memory(lambda: torch.autograd.grad(group(HeadInputs(x, None, None, v, grid)).out.sum(), leaves))
    sizes = {
        "forward": forward,
        "kept": sum(kept.values()),
        "training": training,
        "logits": 4 * grid.tokens * QUERIES * LEARNED_HEADS * kernel**2,
    }
    return {"kernel": kernel, **{name: round(size / unit, 1) for name, size in sizes.items()}}


def short(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def plain(error: float | None) -> float | str | None:
    """An error as JSON can hold it, in two digits."""
    if error is None:
        return None
    return float(f"{error:.1e}") if math.isfinite(error) else str(error)


def cell(error: float | str | None) -> str:
    """An error in a table, bold where the result has nothing to do with the right one."""
    if error is None:
        return ""
    if isinstance(error, str):
        return "**NaN**" if error == "nan" else "**inf**"
    text = "0" if error == 0 else f"{error:.0e}".replace("e-0", "e-").replace("e+0", "e+")
    return f"**{text}**" if error > WRONG else text


def lost_share(lost: float) -> str:
    """How much of a result is not finite."""
    if lost in (0.0, 1.0):
        return "**nothing finite**" if lost else ""
    return f"**{min(max(round(100 * lost), 1), 99)} % not finite**"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table in Markdown whose first columns are text and whose others are numbers."""
    lines = [head, ["---"] * left + ["--:"] * (len(head) - left), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def error_table(records: list[Record], dtype: torch.dtype, what: str) -> str:
    """The table of one dtype: a row per input, a column per backend."""
    columns = ["rounded", "by hand", *COMPUTED]
    if what == "gradient" or dtype == torch.float64:
        columns.remove("flex")
    found = {(one["input"], one["by"]): one.get(what) for one in records if one["dtype"] == short(dtype)}
    rows = [[hard.name, *(cell(found.get((hard.name, who))) for who in columns)] for hard in HARD_INPUTS]
    return markdown(["input", *columns], rows)


def learned_table(records: list[Record]) -> str:
    """The table of learned queries: a row per size of the scores and dtype."""
    rows = []
    for dtype in DTYPES[:3]:
        for size in SIZES:
            cells = []
            for one in records:
                if (one["dtype"], one["size"]) == (short(dtype), size):
                    cells.append(", ".join(filter(None, [cell(one["out"]), lost_share(one["lost"])])))
            rows.append([short(dtype), f"±{size}", *cells])
    return markdown(["dtype", "scores", "attnkit", "exp", "exp, shifted by the largest"], rows, left=2)


def memory_table(records: list[Record]) -> str:
    """The table of memory: a row per kernel."""
    names = ["forward", "kept", "training", "logits"]
    rows = [[f"{one['kernel']} x {one['kernel']}", *(f"{one[name]:g}" for name in names)] for one in records]
    head = ["window", "forward pass", "kept for backward", "forward and backward", "all logits"]
    return markdown(head, rows)


def page(numbers: Record) -> str:
    """What stands between the marks of the page."""
    parts = [
        f"Measured on {numbers['date']} with torch {numbers['torch']} on one thread of a processor that calls itself "
        f"{numbers['processor']} ({numbers['instructions']}).",
        "### The inputs",
        markdown(["input", "what is hard about it"], [[hard.name, hard.sentence] for hard in HARD_INPUTS], left=2),
    ]
    for dtype in DTYPES:
        for what, title in (("out", "outputs"), ("gradient", "gradients")):
            parts += [f"### {short(dtype)}: {title}", error_table(numbers["errors"], dtype, what)]
    parts += ["### Learned queries: errors", learned_table(numbers["learned queries"])]
    parts += ["### Learned queries: memory", memory_table(numbers["memory"])]
    return "\n\n".join(parts)


def measure() -> Record:
    """Everything the page shows."""
    torch.set_num_threads(1)
    errors = [record for hard in HARD_INPUTS for dtype in DTYPES for record in measure_input(hard, dtype)]
    learned = [record for dtype in DTYPES[:3] for size in SIZES for record in measure_learned_query(size, dtype)]
    return {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__.partition("+")[0],
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "errors": errors,
        "learned queries": learned,
        "memory": [measure_memory(kernel) for kernel in KERNELS],
    }


def as_lines(numbers: Record) -> str:
    """JSON with one record a line, so that changes can be read."""
    fields = []
    for name, value in numbers.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[\n" + ",\n".join(f"    {json.dumps(one)}" for one in value) + "\n  ]"
        fields.append(f"  {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(fields) + "\n}\n"


if __name__ == "__main__":
    measured = measure()
    NUMBERS.parent.mkdir(exist_ok=True)
    NUMBERS.write_text(as_lines(measured), encoding="utf-8")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{page(measured)}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    print(page(measured))

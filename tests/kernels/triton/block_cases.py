"""Calls over blocks that every kernel has to get right, by the interpreter and on a GPU, and how they are judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnkit import Grid, attend
from attnkit.kernels.ops.blocks import BLOCKS
from attnkit.kernels.ops.registering import OpPair
from attnkit.layouts import Blocks
from attnkit.testing import random_layout, random_qkv, random_tensor
from attnkit.testing.oracle import dense_attention
from attnkit.testing.tolerance import assert_within_budget, naive_attention, naive_lse

ITEMS, HEADS = 2, 2


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        layout: makes the layout.
        widths: D and Dv.
        options: `dtype`, `scale`, `bias` (its first two dimensions), `items`, as many as the layout varies over
            where not given, and `heads`, two where not given.
        tiles: whether tiles are as the table of configurations has them; else they are of 16 x 16, so that a small
            problem has several.
    """

    layout: Callable[[], Blocks]
    widths: tuple[int, int] = (16, 16)
    options: dict[str, Any] = field(default_factory=dict)
    tiles: bool = False


def routes(rows: int, *lead: int, keep: int = 2, seed: int = 0, blocks: int | None = None) -> Tensor:
    """Tables in which the first block sees one block less than the others."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(*lead, rows, blocks or rows, generator=generator).topk(keep, -1).indices
    index[..., 0, -1] = -1
    return index


def some(*shape: int, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6


def permuted(length: int, window: int, prefix: int, *lead: int) -> Blocks:
    order = torch.rand(*lead, length, generator=torch.Generator().manual_seed(2)).argsort(-1)
    return Blocks.permuted(order, window, prefix=prefix)


def regions(grid: Grid, sides: int | tuple[int, int], *lead: int, **more: Any) -> Blocks:
    rows = sides * sides if isinstance(sides, int) else sides[0] * sides[1]
    return Blocks.from_regions(grid, sides, routes(rows, *lead, **more))


def popular() -> Blocks:
    """Two blocks that all see, and fourteen that few do."""
    index = routes(16, 1, 1, keep=3)
    index[..., 0], index[..., 1] = 3, 11
    index[..., 2] = index[..., 2].masked_fill((index[..., 2] == 3) | (index[..., 2] == 11), -1)
    return Blocks.from_regions(Grid(8, 8), 4, index)


def unseeing() -> Blocks:
    """Blocks that see nothing, one whose first entries are -1, and one that nobody sees."""
    return Blocks.from_regions(Grid(8, 8), 2, torch.tensor([[[-1, -1], [-1, 2], [2, 0], [-1, -1]]]))


def other_keys() -> Blocks:
    """Routed blocks whose keys are cut otherwise than the queries."""
    queries, keys = Blocks.windows(Grid(6, 6, prefix=1), 2), Blocks.windows(Grid(6, 6, prefix=1), 3)
    index = routes(9, 1, HEADS, blocks=4)
    return Blocks(queries.order, index, prefix=1, key_order=keys.order)


def masked(layout: Blocks, *lead: int, seed: int = 1) -> Blocks:
    return layout.restrict(some(*lead, layout.num_keys, seed=seed))


EVEN, UNEVEN, FRAMED = Grid(8, 8), Grid(5, 7), Grid(5, 7, prefix=2)
BIAS = {"bias": (1, HEADS)}

CASES: dict[str, Case] = {
    "regions of 16": Case(lambda: regions(EVEN, 2, 1, 1), options={"items": 2}),
    "regions of 16, a bias and a prefix": Case(lambda: regions(Grid(4, 8, prefix=3), (1, 2), 1, 1), (16, 32), BIAS),
    "regions of 4": Case(lambda: regions(Grid(4, 6), (2, 3), 1, 1)),
    "regions of 4, a prefix": Case(lambda: regions(Grid(4, 4, prefix=1), 2, ITEMS, 1), options={"scale": -0.3}),
    "regions of 49": Case(lambda: regions(Grid(14, 14), 2, 1, 1), options={"heads": 1}, tiles=True),
    "regions of 64": Case(lambda: regions(Grid(16, 16), 2, 1, 1), (32, 32), {"heads": 2}, tiles=True),
    "regions of 256": Case(lambda: regions(Grid(16, 32), (1, 2), 1, 1), (16, 16), {"heads": 1}, tiles=True),
    "regions of 36 in tiles of 16": Case(lambda: regions(Grid(12, 12), 2, 1, 1)),
    "regions of 32 in tiles of 16, a bias": Case(lambda: regions(Grid(8, 16), 2, 1, 1), options={**BIAS}),
    "regions that do not divide": Case(lambda: regions(UNEVEN, (4, 3), 1, 1), (24, 40)),
    "regions that do not divide, a bias": Case(lambda: regions(FRAMED, (2, 3), 1, 1), (8, 16), {**BIAS}),
    "a table per item": Case(lambda: regions(EVEN, 2, ITEMS, 1)),
    "a table per head, a prefix": Case(lambda: regions(Grid(8, 8, prefix=1), 2, 1, HEADS)),
    "a table per item and head, masked": Case(lambda: masked(regions(FRAMED, 3, ITEMS, HEADS), ITEMS)),
    "a mask per item and head": Case(lambda: masked(regions(Grid(4, 8), (1, 2), 1, 1), ITEMS, HEADS)),
    "popular regions": Case(popular, options={"heads": 1}),
    "regions that see nothing": Case(unseeing),
    "keys cut otherwise": Case(other_keys),
    "windows of 5": Case(lambda: Blocks.windows(UNEVEN, (5, 1)), options={"items": 2}),
    "windows of 16": Case(lambda: Blocks.windows(Grid(4, 8), 4), options=BIAS),
    "windows of 16, a prefix": Case(lambda: Blocks.windows(Grid(8, 8, prefix=1), 4), options={"items": 2}),
    "windows of 64": Case(lambda: Blocks.windows(Grid(16, 8), 8), (32, 16), {**BIAS}, tiles=True),
    "shifted windows that do not divide": Case(lambda: Blocks.windows(FRAMED, 3, shift=1)),
    "dilated windows": Case(lambda: Blocks.windows(UNEVEN, 2, dilated=True)),
    "windows of 36, masked, a prefix": Case(lambda: masked(Blocks.windows(Grid(6, 12, prefix=1), 6), 1)),
    "permuted windows, masked": Case(lambda: masked(permuted(35, 8, 0, ITEMS, HEADS), 1, HEADS, seed=3)),
    "permuted windows of 16, a prefix": Case(lambda: permuted(48, 16, 1, 1, HEADS)),
    "heads of 80": Case(lambda: regions(EVEN, 2, 1, 1), (80, 48), {"heads": 1}),
    "heads of 256": Case(lambda: regions(Grid(8, 4), (2, 1), 1, 1), (256, 256), {"heads": 1}),
    # Float32 so wide is multiplied a few channels at a time where it is exact.
    "heads of 200": Case(lambda: masked(regions(Grid(8, 4), (2, 1), 1, 1), 1), (200, 140), {"heads": 1}),
    "heads of 256, a bias": Case(lambda: regions(FRAMED, (2, 3), 1, 1), (256, 16), {"heads": 1, "bias": (1, 1)}),
    "narrow heads": Case(lambda: regions(EVEN, 2, 1, 1), (3, 1)),
    "float16": Case(lambda: regions(EVEN, 2, 1, 1), options={"dtype": torch.float16, **BIAS}),
    "bfloat16": Case(lambda: regions(Grid(8, 8, prefix=1), 2, 1, 1), options={"dtype": torch.bfloat16}),
    "bfloat16, regions of 49": Case(
        lambda: regions(Grid(14, 14), 2, 1, 1), (32, 32), {"dtype": torch.bfloat16, "heads": 1}, tiles=True
    ),
    "float16, windows of 49": Case(
        lambda: permuted(90, 49, 1, 1, HEADS), (32, 16), {"dtype": torch.float16, **BIAS}, tiles=True
    ),
    "bfloat16, shifted windows": Case(
        lambda: Blocks.windows(UNEVEN, 3, shift=1), (8, 8), {"dtype": torch.bfloat16, **BIAS}
    ),
}

# Layouts with anything in them: repeated entries, masks, tables of all forms.
for _seed in range(4):
    CASES[f"any blocks, {_seed}"] = Case(
        lambda seed=_seed: random_layout("blocks", Grid(5, 4, prefix=seed % 2), batch=ITEMS, heads=HEADS, seed=seed)[0],
        options=BIAS if _seed % 2 else {},
    )


# Those that are also held to the oracle with products made a few channels at a time, wherever kernels can do that:
# heads of whole steps and of less than one, tiles with gaps and without, prefixes, entries of -1, masks, biases.
STEPPED = (
    "regions of 16",
    "regions of 16, a bias and a prefix",
    "regions of 32 in tiles of 16, a bias",
    "regions that do not divide",
    "regions that do not divide, a bias",
    "a table per head, a prefix",
    "a table per item and head, masked",
    "popular regions",
    "regions that see nothing",
    "heads of 80",
    "narrow heads",
)

# Layouts for biases that hide keys by a large number.
HIDDEN: dict[str, Callable[[], Blocks]] = {
    "windows": lambda: Blocks.windows(Grid(4, 8, prefix=1), 4),
    "windows that do not divide": lambda: Blocks.windows(UNEVEN, 3, shift=1),
    "windows of 36": lambda: Blocks.windows(Grid(6, 12), 6),
    "regions of 16, a prefix": lambda: regions(Grid(8, 8, prefix=2), 2, 1, 1),
    "regions of 4": lambda: regions(Grid(4, 6), (2, 3), 1, 1),
}


# What nobody sees, and queries that see nothing: masked keys, empty slots, blocks that no index names, and blocks that
# only a block without queries sees.
POISONED: dict[str, Callable[[], Blocks]] = {
    "masked keys": lambda: masked(Blocks.windows(Grid(4, 8, prefix=2), 4), 1),
    "a window of masked keys": lambda: Blocks.windows(Grid(4, 8), 4).restrict(torch.arange(32) % 8 < 4),
    "regions of masked keys": lambda: regions(Grid(2, 8), (1, 4), 1, 1).restrict(torch.arange(16) % 8 < 2),
    "a block that no index names": unseeing,
    "a block seen by a block without queries": lambda: Blocks.from_regions(
        Grid(1, 4), (1, 3), torch.tensor([[[0], [0], [1]]])
    ),
    "windows without queries": lambda: Blocks(
        Blocks.from_regions(Grid(1, 4), (1, 3), torch.zeros(3, 1, dtype=torch.int64)).order,
        key_order=Blocks.windows(Grid(1, 6), (1, 2)).order,
    ),
    "blocks of 16 seen by blocks with empty slots only": lambda: Blocks(
        Blocks.from_regions(Grid(1, 16), (1, 3), torch.zeros(3, 1, dtype=torch.int64)).order,
        torch.tensor([[0], [0], [0]]),
        key_order=Blocks.windows(Grid(8, 8), 4).order,
    ),
}


@dataclass(frozen=True)
class Operands:
    """A call of the operator itself.

    Attributes:
        layout: makes the layout.
        bias: the first three dimensions of a bias, or None.
        reached: which outputs have a gradient: out, total.
        needs: which gradients are asked for: q, k, v, bias.
    """

    layout: Callable[[], Blocks]
    bias: tuple[int, int, int] | None = None
    reached: tuple[bool, bool] = (True, False)
    needs: tuple[bool, bool, bool, bool] = (True, True, True, False)


OPERATORS: dict[str, Operands] = {
    "gradients of the sum of powers only": Operands(lambda: regions(Grid(4, 6), (2, 3), 1, 1), reached=(False, True)),
    "the gradient of q only": Operands(lambda: Blocks.windows(Grid(4, 8), 4), needs=(True, False, False, False)),
    "the gradient of v only": Operands(lambda: Blocks.windows(Grid(4, 8), 4), needs=(False, False, True, False)),
    "the gradients of k and v only": Operands(
        lambda: regions(Grid(4, 6), (2, 3), 1, 1), reached=(True, True), needs=(False, True, True, False)
    ),
    "the gradient of k and of a bias, where some see nothing": Operands(
        unseeing, (1, 1, 1), (True, True), (False, True, False, True)
    ),
    "a bias for all items, heads and blocks": Operands(
        lambda: Blocks.windows(Grid(4, 8, prefix=1), 4), (1, 1, 1), (True, True), (True, True, True, True)
    ),
    "a bias per item and block": Operands(
        lambda: regions(Grid(4, 8), (1, 2), 1, HEADS), (ITEMS, 1, 2), needs=(False, False, False, True)
    ),
    "a bias per item and head": Operands(
        lambda: regions(Grid(3, 5), (1, 2), 1, 1), (ITEMS, HEADS, 1), needs=(True, True, True, True)
    ),
}


def inputs_of(case: Case, layout: Blocks, device: str) -> list[Tensor]:
    """q, k, v and, where the case has one, a bias for every pair."""
    options = case.options
    items, heads = options.get("items", layout.lead[0]), options.get("heads", HEADS)
    dtype = options.get("dtype", torch.float32)
    sizes = (layout.num_queries, layout.num_keys)
    found = list(
        random_qkv(sizes, batch=items, heads=heads, head_dim=case.widths[0], value_dim=case.widths[1], dtype=dtype)
    )
    if "bias" in options:
        found.append(random_tensor(*options["bias"], *sizes, seed=9, dtype=torch.float32))
    return [one.to(device) for one in found]


def answers(layout: Blocks, given: list[Tensor], scale: float | None, compute: str) -> list[Tensor]:
    """Output, lse and gradients of a sum over both, from a backend, plain attention or the oracle."""
    leaves = [one.detach().clone().requires_grad_() for one in given]
    q, k, v, bias = (*leaves, None)[:4]
    if compute in ("oracle", "plain", "rounded"):
        mask = layout.to_mask(q.device)
        if compute == "oracle":
            out, lse = dense_attention(q, k, v, mask, scale, bias)
        elif compute == "rounded":
            out, lse = rounded_attention(q, k, v, mask, bias)
        else:
            out, lse = naive_attention(q, k, v, mask, scale, bias), naive_lse(q, k, mask, scale, bias)
    else:
        out, lse = attend(q, k, v, layout, scale=scale, bias=bias, return_lse=True, backend=compute)
    weights = random_tensor(*out.shape, seed=5, dtype=torch.float64).to(out.device)
    seen = lse.double().masked_fill(lse == -torch.inf, 0.0)
    ((out.double() * weights).sum() + (seen * weights[..., 0]).sum()).backward()
    return [out.detach(), lse.detach(), *(one.grad for one in leaves)]  # type: ignore[list-item]


def check(case: Case, device: str) -> None:
    """Holds output, lse and all gradients of a case to the oracle."""
    layout = case.layout()
    layout = layout if device == "cpu" else moved(layout, device)
    given, scale = inputs_of(case, layout, device), case.options.get("scale")
    found = answers(layout, given, scale, "triton")
    plain = answers(layout, given, scale, "plain")
    exact = answers(layout, [one.double() for one in given], scale, "oracle")
    assert [one.dtype for one in found] == [given[0].dtype, torch.float32, *(one.dtype for one in given)]
    largest = max(float(one.abs().max()) for one in [exact[0], *exact[2:]])
    names = ["output", "lse", "gradient of q", "gradient of k", "gradient of v", "gradient of the bias"]
    for one, right, naive, name in zip(found, exact, plain, names, strict=False):
        seeing = right != -torch.inf
        assert torch.equal(one != -torch.inf, seeing), name
        # What plain attention gets wrong by chance may be nothing; then it is the size of the terms that counts.
        size = max(1.0, float(right[seeing].abs().max())) if name in ("output", "lse") and seeing.any() else largest
        assert_within_budget(
            one.where(seeing, 0), right.where(seeing, 0), naive.where(seeing, 0), scale=size, multiple=6.0, what=name
        )


def check_operator(case: Operands, pair: OpPair, device: str) -> None:
    """Holds the operators of a pair, forward and backward, to those of the CPU in float64."""
    layout = case.layout()
    order, keys = layout.order, layout.keys_cut
    given = list(random_qkv((layout.num_queries, layout.num_keys), batch=ITEMS, heads=HEADS, head_dim=16, value_dim=8))
    bias = None
    if case.bias is not None:
        bias = random_tensor(*case.bias, order.token.shape[3], layout.key_slots, seed=3)
    tables = [order.token, order.slot, keys.token, keys.slot, layout.index, layout.key_mask, bias]
    rest = [layout.prefix, [order.padded, keys.padded], 0.3, None]
    found = []
    for one, dtype, where in ((pair, torch.float32, device), (BLOCKS, torch.float64, "cpu")):
        place = [
            None if table is None else table.to(where, dtype if table.is_floating_point() else None)
            for table in [*given, *tables]
        ]
        out, total, peak = one.op(*place, *rest)
        # Any two numbers stand for the lse, so that only a gradient of its own can be the same.
        factors = (1.0, 1.0 / total)
        grads = [
            random_tensor(*output.shape, seed=at).to(where, dtype) * factor if reached else None
            for at, (output, reached, factor) in enumerate(zip((out, total), case.reached, factors, strict=True))
        ]
        gradients = one.backward_op(*grads, None, out, total, peak, *place, *rest, [*case.needs, False])
        found.append([out, total.log() + peak, *gradients])
    assert len(found[0]) == 2 + sum(case.needs)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.cpu().double(), other, rtol=2e-5, atol=2e-5)


def check_autocast(pair: OpPair, device: str) -> None:
    """Holds a pair under autocast to that of the CPU: products of bfloat16, a bias and gradients of float32."""
    layout = regions(Grid(4, 8, prefix=1), (1, 2), 1, 1)
    order = layout.order
    sizes = (layout.num_queries, layout.num_keys)
    given = random_qkv(sizes, batch=ITEMS, heads=HEADS, head_dim=16, dtype=torch.float32)
    bias = random_tensor(1, HEADS, 1, order.token.shape[3], layout.key_slots, seed=3, dtype=torch.float32)
    found = []
    for one, where in ((pair, device), (BLOCKS, "cpu")):
        q, k, v, added = (tensor.to(where, copy=True).requires_grad_() for tensor in (*given, bias))
        tables = [tensor.to(where) for tensor in (order.token, order.slot, order.token, order.slot, layout.index)]
        with torch.autocast(where, torch.bfloat16):
            out, total, peak = one.op(q, k, v, *tables, None, added, layout.prefix, [order.padded] * 2, 0.3, None)
        lse = total.log() + peak
        grads = torch.autograd.grad(out.float().square().sum() + lse.sum(), (q, k, v, added))
        found.append([tensor.detach().cpu() for tensor in (out, lse, *grads)])
    assert [tensor.dtype for tensor in found[0]] == [torch.bfloat16, *[torch.float32] * 5]
    for tensor, right in zip(*found, strict=True):
        torch.testing.assert_close(tensor, right, rtol=3e-2, atol=3e-2)


HIDING = (-1e5, -1e7, -1e9, torch.finfo(torch.float32).min, -torch.inf, 1e9)


def rounded_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and lse in float64, but of logits that have room for no more digits than in float32."""
    assert bias is not None
    seen = mask & (bias != -torch.inf)
    exact = q.shape[3] ** -0.5 * q @ k.transpose(2, 3) + bias.where(seen, 0.0)
    logits = exact + (exact.float().double() - exact).detach()
    blind = ~seen.any(-1, keepdim=True)
    logits = logits.masked_fill(~seen, -torch.inf).masked_fill(blind, 0.0)
    weights = logits.softmax(-1).masked_fill(~seen, 0.0)
    # The gradient of `logsumexp` loses digits as well.
    peak = logits.detach().amax(-1, keepdim=True)
    lse = (logits - peak).exp().sum(-1).log() + peak[..., 0]
    return weights @ v, lse.masked_fill(blind[..., 0], -torch.inf)


def check_hidden(layout: Blocks, hidden: float, dtype: torch.dtype, device: str) -> None:
    """Holds a call whose bias hides some keys, and all keys of some queries, by a large number to float64."""
    sizes = (layout.num_queries, layout.num_keys)
    q, k, v = random_qkv(sizes, batch=1, heads=HEADS, head_dim=16, dtype=dtype)
    bias = random_tensor(1, HEADS, *sizes, seed=9, dtype=torch.float32)
    bias = bias.masked_fill(~some(sizes[1], seed=1) | ~some(sizes[0], 1, seed=2), hidden)
    layout, given = moved(layout, device), [one.to(device) for one in (q, k, v, bias)]
    found = answers(layout, given, None, "triton")
    exact = answers(layout, [one.double() for one in given], None, "rounded")
    # The numbers of a half are rounded on the way.
    room = 2e-5 if dtype == torch.float32 else 3e-2
    for one, right in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), right, rtol=room, atol=room)


def check_poisoned(layout: Blocks, poison: float, with_bias: bool, device: str) -> None:
    """Holds a call whose unseen keys and unseeing queries are NaN or infinite to the one in which they are 0."""
    hidden, blind = (~layout.to_mask().any(axis)[..., None] for axis in (-2, -1))
    q, k, v = random_qkv((layout.num_queries, layout.num_keys), batch=1, heads=1, head_dim=16, dtype=torch.float32)
    bias = random_tensor(1, 1, layout.num_queries, layout.num_keys, seed=9, dtype=torch.float32)
    assert hidden.any()
    layout = moved(layout, device)
    found = []
    for filling in (0.0, poison):
        given = [q.masked_fill(blind, filling), k.masked_fill(hidden, filling), v.masked_fill(hidden, filling)]
        given += [bias] if with_bias else []
        found.append(answers(layout, [one.to(device) for one in given], None, "triton"))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other) and not one.isnan().any()


def moved(layout: Blocks, device: str) -> Blocks:
    """The layout with its tables on another device."""

    def put(one: Any) -> Any:
        return None if one is None else one.to(device)

    def order(one: Any) -> Any:
        return None if one is None else type(one)(put(one.token), put(one.slot), one.padded)

    return Blocks(
        order(layout.order),
        put(layout.index),
        prefix=layout.prefix,
        key_order=order(layout.key_order),
        unique=True,
        key_mask=put(layout.key_mask),
    )

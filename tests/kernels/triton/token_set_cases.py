"""Calls over token sets and masks that kernels have to get right, and how they are judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attnkit import attend
from attnkit.kernels.ops.registering import OpPair
from attnkit.kernels.ops.token_sets import TOKEN_SETS
from attnkit.layouts import TokenMask, TokenSets
from attnkit.testing import random_qkv, random_tensor
from attnkit.testing.oracle import dense_attention
from attnkit.testing.tolerance import assert_within_budget, naive_attention, naive_lse

ITEMS, HEADS = 2, 2
QUERIES, KEYS = 19, 21
NAMES = ("output", "lse", "gradient of q", "gradient of k", "gradient of v", "gradient of the bias")


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        layout: makes the layout.
        widths: D and Dv.
        options: `dtype`, `scale`, and `bias`, its shape, with a 0 for a size that it has in full.
        tiles: whether tiles are as the table of configurations has them; else they are of 16 x 16, so that a small
            problem has several.
    """

    layout: Callable[[], TokenSets | TokenMask]
    widths: tuple[int, int] = (16, 16)
    options: dict[str, Any] = field(default_factory=dict)
    tiles: bool = False


def some(*shape: int, share: float = 0.6, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def lists(*lead: int, rows: int = QUERIES, keys: int = KEYS, slots: int = 5, seed: int = 0, **more: int) -> TokenSets:
    """Random lists; one query sees nothing, one a single key, and entries repeat."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, keys, (*lead, rows, slots), generator=generator)
    index[..., 1, :], index[..., 3, 1:] = -1, -1
    return TokenSets(index, keys, **more)


def mask(*lead: int, rows: int = QUERIES, keys: int = KEYS, share: float = 0.2, seed: int = 0) -> TokenMask:
    """Random pairs; one query sees nothing, and nobody sees one key."""
    seen = some(*lead, rows, keys, share=share, seed=seed)
    seen[..., 2, :], seen[..., :, 4] = False, False
    return TokenMask(seen)


def grouped(layout: TokenSets | TokenMask, *lead: int, turned: bool = False) -> TokenSets | TokenMask:
    """The same layout with random groups of queries, heads next to each other in memory where they are turned."""
    rows = layout.num_queries - layout.global_queries
    groups = torch.randint(-1, 4, (*lead, rows), generator=torch.Generator().manual_seed(7))
    return replace(layout, query_groups=groups.mT.contiguous().mT if turned else groups)


def of_int32(layout: TokenSets) -> TokenSets:
    return TokenSets(layout.index.int(), layout.keys, unique=True)


def far_sharing(groups: bool) -> TokenSets:
    """Queries that share all keys with others far away, so that tiles of neighbours see everything."""
    rows = torch.arange(32)[:, None] % 4
    return TokenSets(rows * 5 + torch.arange(5), KEYS, query_groups=rows[:, 0] if groups else None)


CASES: dict[str, Case] = {
    "lists per item and head": Case(lambda: lists(ITEMS, HEADS)),
    "lists for all": Case(lambda: lists(1, 1)),
    "lists per head, of int32": Case(lambda: of_int32(lists(1, HEADS))),
    "lists, a query that all see and sees all": Case(lambda: lists(ITEMS, 1, queries_all=1, keys_all=1)),
    "lists, some queries and keys for all": Case(lambda: lists(1, HEADS, queries_all=3, keys_all=18), (24, 40)),
    "lists, keys hidden per item": Case(lambda: lists(1, 1, queries_all=1, keys_all=2).restrict(some(ITEMS, 1, KEYS))),
    "lists, keys hidden per head, a bias": Case(
        lambda: lists(ITEMS, 1, keys_all=1).restrict(some(1, HEADS, KEYS)), options={"bias": (1, 0, 0, 0)}
    ),
    "lists, a bias for all items and heads": Case(lambda: lists(ITEMS, HEADS), (8, 16), {"bias": (1, 1, 0, 0)}),
    "lists, a bias per item": Case(lambda: lists(1, HEADS), options={"bias": (0, 1, 0, 0)}),
    "lists, a bias per item and head": Case(lambda: lists(1, HEADS, queries_all=1), options={"bias": (0, 0, 0, 0)}),
    "lists, a bias per key": Case(lambda: lists(1, 1, queries_all=1), options={"bias": (1, 0, 1, 0)}),
    "lists, a bias per query": Case(lambda: lists(1, HEADS), options={"bias": (0, 1, 0, 1)}),
    "lists, one number for each head": Case(lambda: lists(ITEMS, 1), options={"bias": (1, 0, 1, 1)}),
    "long lists": Case(lambda: lists(1, HEADS, rows=5, keys=150, slots=70, keys_all=1)),
    "lists of one key": Case(lambda: lists(1, HEADS, slots=1), (3, 1)),
    "lists that far queries share": Case(lambda: far_sharing(False), options={"scale": -0.4}),
    "lists that a group shares": Case(lambda: far_sharing(True), options={"scale": -0.4}),
    "groups per item and head": Case(lambda: grouped(lists(ITEMS, HEADS, queries_all=1, keys_all=2), ITEMS, HEADS)),
    "groups per head of lists for all": Case(lambda: grouped(lists(1, 1), HEADS)),
    "groups per item, keys hidden per head, a bias per item and head": Case(
        lambda: grouped(lists(1, 1, keys_all=1).restrict(some(1, HEADS, KEYS)), ITEMS, 1),
        options={"bias": (0, 0, 0, 0)},
    ),
    "groups for all, a bias for all items and heads": Case(
        lambda: grouped(mask(ITEMS, 1)), (8, 16), {"bias": (1, 1, 0, 0)}
    ),
    "groups per item, a bias per head": Case(
        lambda: grouped(mask(1, HEADS), ITEMS, 1), (16, 16), {"bias": (1, 0, 0, 0)}
    ),
    "groups per head, a bias per item": Case(
        lambda: grouped(lists(1, 1, queries_all=3), HEADS), options={"bias": (0, 1, 0, 0)}
    ),
    "groups per head, a bias per key": Case(lambda: grouped(mask(ITEMS, 1), HEADS), options={"bias": (1, 0, 1, 0)}),
    "groups that are turned": Case(lambda: grouped(mask(1, 1), ITEMS, HEADS, turned=True)),
    "groups of a mask, tiles of the table": Case(
        lambda: grouped(mask(1, HEADS, rows=70, keys=130), HEADS), (32, 32), tiles=True
    ),
    "a mask per item and head": Case(lambda: mask(ITEMS, HEADS)),
    "a mask for all": Case(lambda: mask(1, 1), (32, 16)),
    "a mask per head, a bias": Case(lambda: mask(1, HEADS), options={"bias": (1, 0, 0, 0)}),
    "a mask per item, keys hidden": Case(lambda: mask(ITEMS, 1).restrict(some(1, HEADS, KEYS))),
    "a mask of everything": Case(lambda: TokenMask(torch.ones(33, 17, dtype=torch.bool))),
    "a mask of nothing": Case(lambda: TokenMask(torch.zeros(2, 1, 17, 33, dtype=torch.bool))),
    "a mask that is turned": Case(lambda: TokenMask(mask(1, HEADS).mask.mT.contiguous().mT)),
    "three queries": Case(lambda: mask(ITEMS, HEADS, rows=3, keys=16)),
    "tiles of the table": Case(
        lambda: lists(1, HEADS, rows=129, keys=130, slots=9, queries_all=1), (32, 32), tiles=True
    ),
    "tiles of the table, a bias": Case(
        lambda: mask(1, HEADS, rows=40, keys=70), (32, 32), {"bias": (1, 0, 0, 0)}, tiles=True
    ),
    "heads of 80": Case(lambda: lists(1, 1), (80, 48)),
    "float16": Case(lambda: lists(1, HEADS), options={"dtype": torch.float16, "bias": (1, 0, 0, 0)}),
    "bfloat16": Case(lambda: lists(ITEMS, HEADS, queries_all=1, keys_all=1), options={"dtype": torch.bfloat16}),
    "bfloat16, tiles of the table": Case(
        lambda: mask(1, HEADS, rows=70, keys=130), (32, 32), {"dtype": torch.bfloat16}, tiles=True
    ),
}


def inputs_of(case: Case, layout: TokenSets | TokenMask, device: str) -> list[Tensor]:
    """q, k, v and, where the case has one, a bias."""
    sizes = (layout.num_queries, layout.num_keys)
    width, value_width = case.widths
    dtype = case.options.get("dtype", torch.float32)
    found = list(random_qkv(sizes, batch=ITEMS, heads=HEADS, head_dim=width, value_dim=value_width, dtype=dtype))
    if "bias" in case.options:
        full = (ITEMS, HEADS, *sizes)
        shape = [size or own for size, own in zip(case.options["bias"], full, strict=True)]
        found.append(random_tensor(*shape, seed=9, dtype=torch.float32))
    return [one.to(device) for one in found]


def answers(layout: TokenSets | TokenMask, given: list[Tensor], scale: float | None, compute: str) -> list[Tensor]:
    """Output, lse and gradients of a sum over both, from a backend, plain attention or the oracle."""
    leaves = [one.detach().clone().requires_grad_() for one in given]
    q, k, v, bias = (*leaves, None)[:4]
    seen = layout.to_mask(q.device)
    if compute == "oracle":
        out, lse = dense_attention(q, k, v, seen, scale, bias)
    elif compute == "plain":
        out, lse = naive_attention(q, k, v, seen, scale, bias), naive_lse(q, k, seen, scale, bias)
    else:
        out, lse = attend(q, k, v, layout, scale=scale, bias=bias, return_lse=True, backend=compute)
    weights = random_tensor(*out.shape, seed=5, dtype=torch.float64).to(out.device)
    finite = lse.double().masked_fill(lse == -torch.inf, 0.0)
    ((out.double() * weights).sum() + (finite * weights[..., 0]).sum()).backward()
    return [out.detach(), lse.detach(), *(one.grad for one in leaves)]  # type: ignore[list-item]


def check(case: Case, device: str) -> None:
    """Holds output, lse and all gradients of a case to the oracle."""
    layout = moved(case.layout(), device)
    given, scale = inputs_of(case, layout, device), case.options.get("scale")
    found = answers(layout, given, scale, "triton")
    plain = answers(layout, given, scale, "plain")
    exact = answers(layout, [one.double() for one in given], scale, "oracle")
    assert [one.dtype for one in found] == [given[0].dtype, torch.float32, *(one.dtype for one in given)]
    largest = max(float(one.abs().max()) for one in [exact[0], *exact[2:]])
    for one, right, naive, name in zip(found, exact, plain, NAMES, strict=False):
        seeing = right != -torch.inf
        assert torch.equal(one != -torch.inf, seeing), name
        # What plain attention gets wrong by chance may be nothing; then it is the size of the terms that counts.
        size = max(1.0, float(right[seeing].abs().max())) if name in NAMES[:2] and seeing.any() else largest
        assert_within_budget(
            one.where(seeing, 0), right.where(seeing, 0), naive.where(seeing, 0), scale=size, multiple=6.0, what=name
        )


# Which gradients arrive, of the output and of the lse, and which are asked for: of q, k, v and the bias.
ASKED: dict[str, tuple[tuple[bool, bool], tuple[bool, bool, bool, bool]]] = {
    "everything": ((True, True), (True, True, True, True)),
    "the lse only": ((False, True), (True, True, True, False)),
    "the gradient of q only": ((True, False), (True, False, False, False)),
    "the gradient of v only": ((True, False), (False, False, True, False)),
    "the gradient of the bias only": ((True, True), (False, False, False, True)),
}


# The table of a call in which one query sees all keys and one key is seen by all.
TABLES: dict[str, Callable[[], Tensor]] = {
    "lists": lambda: lists(1, HEADS, queries_all=1, keys_all=1).index,
    "a mask": lambda: mask(1, HEADS).mask,
}


def check_operator(name: str, table: str, pair: OpPair, device: str) -> None:
    """Holds the operators of a pair, forward and backward, to those of the CPU in float64."""
    reached, needs = ASKED[name]
    sizes = (QUERIES + 1, KEYS)
    given = list(random_qkv(sizes, batch=ITEMS, heads=HEADS, head_dim=16, value_dim=8))
    tables = [TABLES[table](), some(1, 1, sizes[1]), random_tensor(1, HEADS, *sizes, seed=3)]
    found = []
    for one, dtype, where in ((pair, torch.float32, device), (TOKEN_SETS, torch.float64, "cpu")):
        place = [table.to(where, dtype if table.is_floating_point() else None) for table in [*given, *tables]]
        rest = [*place, 1, 1, 0.3, None]
        out, total, peak = one.op(*rest)
        grads = [
            random_tensor(*output.shape, seed=at).to(where, dtype) if arrives else None
            for at, (output, arrives) in enumerate(zip((out, total), reached, strict=True))
        ]
        # What arrives at the lse, the sum's logarithm and the largest logit.
        grads[1] = None if grads[1] is None else grads[1] / total
        gradients = one.backward_op(*grads, None, out, total, peak, *rest, list(needs))
        found.append([out, total.log() + peak, *gradients])
    assert len(found[0]) == 2 + sum(needs)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.cpu().double(), other, rtol=2e-5, atol=2e-5)


POISONED: dict[str, Callable[[], TokenSets | TokenMask]] = {
    "keys in no list": lambda: lists(1, 1, slots=1),
    "keys that are hidden": lambda: lists(1, 1, queries_all=1, keys_all=2).restrict(some(KEYS)),
    "a mask": lambda: mask(1, 1, share=0.05),
}


def check_poisoned(layout: TokenSets | TokenMask, poison: float, with_bias: bool, device: str) -> None:
    """Holds a call whose unseen keys and unseeing queries are NaN or infinite to the one in which they are 0."""
    hidden, blind = (~layout.to_mask().any(axis)[..., None] for axis in (-2, -1))
    sizes = (layout.num_queries, layout.num_keys)
    q, k, v = random_qkv(sizes, batch=1, heads=1, head_dim=16, dtype=torch.float32)
    bias = random_tensor(1, 1, *sizes, seed=9, dtype=torch.float32)
    assert hidden.any()
    layout = moved(layout, device)
    found = []
    for filling in (0.0, poison):
        given = [q.masked_fill(blind, filling), k.masked_fill(hidden, filling), v.masked_fill(hidden, filling)]
        given += [bias] if with_bias else []
        found.append(answers(layout, [one.to(device) for one in given], None, "triton"))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other) and not one.isnan().any()


def check_large_bias(size: float, device: str) -> None:
    """A bias that is the same for all keys of a query moves the lse only, however large it is."""
    layout = moved(lists(1, 1), device)
    q, k, v = (0.1 * one for one in random_qkv((QUERIES, KEYS), batch=1, heads=2, head_dim=16, dtype=torch.float32))
    # Beside the bias a logit has no digits left: all keys of a list weigh the same.
    given = [q, torch.zeros_like(k), v, torch.full((1, 1, QUERIES, KEYS), size)]
    found = answers_of_output(layout, [one.to(device) for one in given], "triton")
    exact = answers_of_output(layout, [one.to(device).double() for one in given[:3]], "oracle")
    for one, other, name in zip(found, exact, ("output", *NAMES[2:]), strict=False):
        assert one.isfinite().all(), name
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


def answers_of_output(layout: TokenSets | TokenMask, given: list[Tensor], compute: str) -> list[Tensor]:
    """The output and the gradients of a sum over it."""
    leaves = [one.detach().clone().requires_grad_() for one in given]
    q, k, v, bias = (*leaves, None)[:4]
    if compute == "oracle":
        out = dense_attention(q, k, v, layout.to_mask(q.device), None, bias)[0]
    else:
        out = attend(q, k, v, layout, bias=bias, backend=compute)
    weights = random_tensor(*out.shape, seed=5, dtype=torch.float64).to(out.device)
    (out.double() * weights).sum().backward()
    return [out.detach(), *(one.grad for one in leaves)]  # type: ignore[list-item]


def moved(layout: TokenSets | TokenMask, device: str) -> TokenSets | TokenMask:
    """The layout with its tables on another device."""
    tables = {"index": None, "mask": None, "query_groups": None, "key_mask": None}
    tables = {name: getattr(layout, name) for name in tables if getattr(layout, name, None) is not None}
    return replace(layout, **{name: table.to(device) for name, table in tables.items()})

"""Calls over stencils that every kernel has to get right, by the interpreter and on a GPU, and how they are judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnkit import Grid, attend
from attnkit.kernels.ops.registering import OpPair
from attnkit.kernels.ops.stencil import STENCIL
from attnkit.layouts import RelativeTable, Stencil
from attnkit.testing import random_layout, random_qkv, random_tensor
from attnkit.testing.oracle import dense_attention
from attnkit.testing.tolerance import assert_within_budget, naive_attention, naive_lse

ITEMS, HEADS = 2, 2


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        layout: makes the layout.
        learned: whether all queries are one number, as those of learned queries are.
        tables: what bias and gain are: `"table"`, relative, the first two dimensions of a tensor for every pair, or
            None.
        options: `items`, as many as layout and tables vary over where not given, `heads`, one
            or, of learned queries, two where not given, `widths` (D and Dv), `dtype`, `scores`, the dtype of q and k
            where it is another, and `size` of the largest logit.
    """

    layout: Callable[[], Stencil]
    learned: bool = False
    tables: tuple[Any, Any] = (None, None)
    options: dict[str, Any] = field(default_factory=dict)


def some(*shape: int, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6


def masked(layout: Stencil, *lead: int) -> Stencil:
    return layout.restrict(some(*lead, layout.num_keys, seed=1))


# What a window is, for queries of both kinds.
WINDOWS: dict[str, tuple[Callable[[], Stencil], tuple[Any, Any]]] = {
    "3 x 3": (lambda: Stencil(Grid(6, 7), 3), ("table", "table")),
    "1 x 1": (lambda: Stencil(Grid(3, 5), 1), ("table", None)),
    "1 x 5, a prefix": (lambda: Stencil(Grid(3, 9, prefix=2), (1, 5)), ("table", "table")),
    "7 x 7 on a small grid": (lambda: Stencil(Grid(2, 5), 7), (None, "table")),
    "15": (lambda: Stencil(Grid(17), 15), ("table", None)),
    "stride 2": (lambda: Stencil(Grid(7, 9), 3, stride=2), ("table", "table")),
    "stride 2, a prefix, masked": (
        lambda: masked(Stencil(Grid(8, 6, prefix=1), 3, stride=2), ITEMS),
        ("table", "table"),
    ),
    "strides 1 and 3, a bias per pair": (lambda: Stencil(Grid(6, 11), 3, stride=(1, 3)), ((ITEMS, HEADS), None)),
    "dilation 2, a gain per pair": (lambda: Stencil(Grid(9, 8), 3, dilation=2), (None, (1, 1))),
    "dilations 2 and 3, stride 2": (lambda: Stencil(Grid(7, 8), 3, stride=2, dilation=(2, 3)), ("table", (1, 1))),
    "dilation 4, stride 2": (lambda: Stencil(Grid(13), 5, stride=2, dilation=4), ("table", "table")),
    "stride 6, dilation 4": (lambda: Stencil(Grid(31, prefix=1), 3, stride=6, dilation=4), (None, None)),
    "a sequence": (lambda: Stencil(Grid(37), 5), ("table", "table")),
    "a video": (lambda: Stencil(Grid(3, 3, 4), (3, 1, 3)), ("table", None)),
    "a video, strides": (lambda: Stencil(Grid(4, 4, 5, prefix=1), (3, 3, 1), stride=(2, 1, 2)), ("table", "table")),
    "masked": (lambda: masked(Stencil(Grid(6, 7), 3), 1), (None, None)),
    "masked per item and head": (lambda: masked(Stencil(Grid(5, 6), 3), ITEMS, HEADS), ("table", (ITEMS, 1))),
}
CLAMPED: dict[str, tuple[Callable[[], Stencil], tuple[Any, Any]]] = {
    "clamped": (lambda: Stencil(Grid(6, 7), 3, border="clamp"), ("table", None)),
    "clamped, a prefix": (lambda: Stencil(Grid(7, 7, prefix=1), 5, border="clamp"), (None, "table")),
    "clamped, dilated": (lambda: Stencil(Grid(9, 11), 3, dilation=(2, 3), border="clamp"), (None, None)),
    "clamped, stride 3, dilation 2": (
        lambda: masked(Stencil(Grid(9, 13), 3, stride=3, dilation=2, border="clamp"), 1),
        ((1, HEADS), None),
    ),
    "clamped on a small grid": (lambda: Stencil(Grid(2, 7), 5, dilation=(1, 2), border="clamp"), (None, None)),
}

CASES: dict[str, Case] = {}
for _name, (_layout, _tables) in {**WINDOWS, **CLAMPED}.items():
    CASES[f"projected, {_name}"] = Case(_layout, False, _tables, {"widths": (16, 8)})
    if _name in WINDOWS or _name == "clamped":
        CASES[f"learned, {_name}"] = Case(_layout, True, _tables, {"widths": (1, 8)})
_SMALL = Grid(6, 7, prefix=1)
CASES |= {
    "projected, narrow heads": Case(lambda: Stencil(_SMALL, 3), options={"widths": (3, 1)}),
    "projected, heads of 80, a prefix": Case(lambda: Stencil(Grid(5, 5, prefix=2), 3), options={"widths": (80, 40)}),
    "projected, three heads of two items": Case(
        lambda: Stencil(_SMALL, 3), False, ("table", (1, 1)), {"widths": (16, 16), "items": 2, "heads": 3}
    ),
    "learned, three heads of two items": Case(
        lambda: Stencil(_SMALL, 3), True, ("table", (1, 1)), {"widths": (1, 8), "items": 2, "heads": 3}
    ),
    "learned, heads of 24": Case(lambda: Stencil(_SMALL, 3), True, ("table", None), {"widths": (1, 24)}),
    "learned, heads of 100": Case(lambda: Stencil(Grid(5, 5), 3), True, (None, None), {"widths": (1, 100)}),
    "learned, queries of four numbers": Case(lambda: Stencil(_SMALL, 3), True, ("table", None), {"widths": (4, 8)}),
}
for _dtype in (torch.bfloat16, torch.float16):
    _word = str(_dtype).removeprefix("torch.")
    _options = {"widths": (16, 16), "dtype": _dtype}
    CASES[f"projected, {_word}"] = Case(lambda: Stencil(_SMALL, 3), False, ("table", "table"), _options)
    CASES[f"learned, {_word}"] = Case(
        lambda: Stencil(_SMALL, 3), True, ("table", "table"), {**_options, "widths": (1, 8)}
    )
    # As autocast leaves them: scores keep their digits.
    _options = {"widths": (1, 8), "dtype": _dtype, "scores": torch.float32}
    CASES[f"learned, scores in float32, {_word}"] = Case(
        lambda: Stencil(_SMALL, 3, stride=2), True, ("table", "table"), _options
    )
for _size in (100.0, 1e4):
    # Windows far below the largest logit of all keep their weights.
    CASES[f"projected, logits of {_size:g}"] = Case(
        lambda: Stencil(_SMALL, 3), options={"widths": (4, 8), "size": _size}
    )
    CASES[f"learned, logits of {_size:g}"] = Case(lambda: Stencil(_SMALL, 3), True, ("table", None), {"size": _size})


def _random(seed: int) -> Stencil:
    layout, _ = random_layout("stencil", Grid(5, 4, prefix=seed % 2), batch=ITEMS, heads=HEADS, seed=seed)
    assert isinstance(layout, Stencil)
    return layout


# Stencils with anything in them: strides, dilations, both borders, masks.
for _seed in range(4):
    CASES[f"any stencil, {_seed}"] = Case(
        partial(_random, _seed), _seed % 2 == 1, ((1, HEADS), None), {"widths": (1, 8) if _seed % 2 else (16, 8)}
    )


def inputs_of(case: Case, layout: Stencil, device: str) -> list[Tensor]:
    """q, k, v, and tensors of bias and gain, where the case has them; q has one row where it is learned."""
    options = case.options
    dtype, widths = options.get("dtype", torch.float32), options.get("widths", (1, 8))
    sizes = (1 if case.learned else layout.num_queries, layout.num_keys)
    forms = [form[0] for form in case.tables if isinstance(form, tuple)]
    own = [HEADS if case.learned else 1, layout.lead[1], *(form[1] for form in case.tables if isinstance(form, tuple))]
    items, heads = options.get("items", max([layout.lead[0], *forms])), options.get("heads", max(own))
    q, k, v = random_qkv(sizes, batch=items, heads=heads, head_dim=widths[0], value_dim=widths[1], dtype=torch.float32)
    scores = options.get("scores", dtype)
    size = options.get("size")
    if size is not None:
        k = k * (size / (q @ k.transpose(2, 3)).abs().max())
    found = [q.to(scores), k.to(scores), v.to(dtype)]
    for seed, form in enumerate(case.tables):
        if form == "table":
            found.append(random_tensor(heads, *(5,) * layout.grid.ndim, seed=seed, dtype=torch.float32))
        elif form is not None:
            found.append(random_tensor(*form, layout.num_queries, layout.num_keys, seed=seed, dtype=torch.float32))
    return [one.to(device) for one in found]


def answers(case: Case, layout: Stencil, given: list[Tensor], compute: str, grad: bool = True) -> list[Tensor]:
    """Output, lse and, where asked for, gradients of a sum over both, from a backend, plain attention or the oracle."""
    leaves = [one.detach().clone().requires_grad_(grad) for one in given]
    if case.learned:
        leaves[0].requires_grad_(False)
    q = leaves[0].expand(-1, -1, layout.num_queries, -1)
    rest = iter(leaves[3:])
    extra: dict[str, Any] = {}
    for name, fill, form in zip(("bias", "gain"), (0.0, 1.0), case.tables, strict=True):
        if form == "table":
            extra[name] = RelativeTable(next(rest), layout.grid, layout.strides, fill)
        elif form is not None:
            extra[name] = next(rest)
    scale = 1.0 if case.options.get("size") else 0.6
    if compute in ("oracle", "plain"):
        mask = layout.to_mask(q.device)
        dense = {
            name: one.dense(layout.num_queries) if isinstance(one, RelativeTable) else one
            for name, one in extra.items()
        }
        if compute == "oracle":
            out, lse = dense_attention(q, leaves[1], leaves[2], mask, scale, **dense)
        else:
            out = naive_attention(q, leaves[1], leaves[2], mask, scale, **dense)
            lse = naive_lse(q, leaves[1], mask, scale, dense.get("bias"))
    else:
        out, lse = attend(q, leaves[1], leaves[2], layout, scale=scale, return_lse=True, backend=compute, **extra)
    if not grad:
        return [out, lse]
    weights = random_tensor(*out.shape, seed=5, dtype=torch.float64).to(out.device)
    seen = lse.double().masked_fill(lse == -torch.inf, 0.0)
    ((out.double() * weights).sum() + (seen * weights[..., 0]).sum()).backward()
    return [out.detach(), lse.detach(), *(one.grad for one in leaves if one.requires_grad)]  # type: ignore[list-item]


def check(case: Case, device: str, grad: bool = True) -> None:
    """Holds output, lse and all gradients of a case to the oracle."""
    layout = case.layout()
    if layout.key_mask is not None:
        layout = replace(layout, key_mask=layout.key_mask.to(device))
    given = inputs_of(case, layout, device)
    found = answers(case, layout, given, "triton", grad)
    plain = answers(case, layout, given, "plain", grad)
    exact = answers(case, layout, [one.double() for one in given], "oracle", grad)
    assert [one.dtype for one in found[:2]] == [given[2].dtype, torch.float32]
    largest = max(float(one.abs().max()) for one in [exact[0], *exact[2:]])
    names = ["output", "lse", *(f"gradient {at}" for at in range(len(exact) - 2))]
    for one, right, naive, name in zip(found, exact, plain, names, strict=True):
        seeing = right != -torch.inf
        assert torch.equal(one != -torch.inf, seeing), name
        # What plain attention gets wrong by chance may be nothing; then it is the size of the terms that counts.
        size = max(1.0, float(right[seeing].abs().max())) if name in ("output", "lse") and seeing.any() else largest
        assert_within_budget(
            one.where(seeing, 0), right.where(seeing, 0), naive.where(seeing, 0), scale=size, multiple=6.0, what=name
        )


@dataclass(frozen=True)
class Operands:
    """A call of the operator itself, on a grid of 5 x 6 tokens beside a prefix token.

    Attributes:
        shared: whether there is one query for all.
        widths: D and Dv.
        bias, gain: their first two dimensions and their query sizes, or None.
        clamped: whether windows are moved inside the grid.
        reached: which outputs have a gradient: out, lse.
        needs: which gradients are asked for: q, k, v, bias, gain.
    """

    shared: bool
    widths: tuple[int, int] = (4, 8)
    bias: tuple[int, int, int, int] | None = None
    gain: tuple[int, int, int, int] | None = None
    clamped: bool = False
    reached: tuple[bool, bool] = (True, True)
    needs: tuple[bool, bool, bool, bool, bool] = (True, True, True, False, False)


ALL = (True, True, True, True, True)
OPERATORS: dict[str, Operands] = {
    "one query, with its gradient": Operands(True, (1, 8)),
    "one query of four numbers, with its gradient": Operands(True),
    "one query, the gradient of q only": Operands(True, (1, 8), needs=(True, False, False, False, False)),
    "one query, clamped": Operands(True, clamped=True),
    "gradients of the lse only": Operands(False, reached=(False, True)),
    "the gradient of q only": Operands(False, needs=(True, False, False, False, False)),
    "the gradient of v only": Operands(False, needs=(False, False, True, False, False)),
    "one query, the gradient of v only": Operands(True, (1, 8), needs=(False, False, True, False, False)),
    "tables for all items and heads": Operands(False, bias=(1, 1, 1, 1), gain=(1, 1, 1, 1), needs=ALL),
    "one query, tables for all items and heads": Operands(True, (1, 8), (1, 1, 1, 1), (1, 1, 1, 1), needs=ALL),
    "a bias per item and row, a gain per head and column": Operands(
        False, bias=(ITEMS, 1, 5, 1), gain=(1, HEADS, 1, 6), needs=ALL
    ),
    "one query, a bias per row, a gain per pair": Operands(
        True, (1, 8), (1, 1, 5, 1), (ITEMS, HEADS, 5, 6), needs=(False, False, False, True, True)
    ),
    "clamped, a bias per pair, a gain per head": Operands(
        False, bias=(ITEMS, HEADS, 5, 6), gain=(1, HEADS, 1, 1), clamped=True, needs=ALL
    ),
}


def check_operator(case: Operands, pair: OpPair, device: str) -> None:
    """Holds the operators of a pair, forward and backward, to those of the CPU in float64."""
    q, k, v = random_qkv(
        (1 if case.shared else 30, 31), batch=ITEMS, heads=HEADS, head_dim=case.widths[0], value_dim=case.widths[1]
    )
    tables = [
        None if form is None else random_tensor(*form[:2], 10, *form[2:], seed=seed)
        for seed, form in enumerate((case.bias, case.gain))
    ]
    window = ([5, 6], 1, [3, 3], [1, 1], [1, 1], case.clamped, 0.4)
    found = []
    for one, dtype, where in ((pair, torch.float32, device), (STENCIL, torch.float64, "cpu")):
        place = [None if tensor is None else tensor.to(where, dtype) for tensor in (q, k, v, *tables)]
        if one is STENCIL:
            # The oracle gets tables without broadcasts, whose gradients are added up here.
            place[3:] = [None if table is None else table.expand(ITEMS, HEADS, 10, 5, 6).clone() for table in place[3:]]
        out, total, peak = outputs = one.op(*place, None, *window)
        # Kernels may subtract another number than the largest logit; what arrives at the lse is the same.
        grads = [
            random_tensor(*out.shape, seed=0).to(where, dtype) if case.reached[0] else None,
            random_tensor(*total.shape, seed=1).to(where, dtype) / total if case.reached[1] else None,
        ]
        grads = one.backward_op(*grads, None, *outputs, *place, None, *window, list(case.needs))
        wanted = [tensor for tensor, need in zip((q, k, v, *tables), case.needs, strict=True) if need]
        summed = [grad.sum_to_size(like.shape) for grad, like in zip(grads, wanted, strict=True)]
        found.append([out, total.log() + peak, *summed])
    assert len(found[0]) == 2 + sum(case.needs)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.cpu().double(), other, rtol=2e-5, atol=2e-5)

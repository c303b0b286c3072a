"""Law 1: attention is dense attention under the layout's mask; mask and output are as the primitive defines them."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from attnkit.grid import Grid
from attnkit.kernels.attend import attend
from attnkit.kernels.call import AttendCall, AttendResult, PairValues
from attnkit.layouts import RelativeTable
from attnkit.primitives import HeadGroup, SoftmaxHeads
from attnkit.testing.cases import AttentionCase, PrimitiveCase
from attnkit.testing.laws.law import NO_ATTENTION, Law, NothingToSay, agree, agree_all, largest, require, within
from attnkit.testing.laws.sizes import largest_logit, logit_steps, pull, reach
from attnkit.testing.oracle import dense_attention, expected, pair_values
from attnkit.testing.subject import Subject
from attnkit.testing.tensors import outputs_and_gradients
from attnkit.testing.tolerance import assert_within_budget, naive_attention, naive_lse


def primitive(case: PrimitiveCase) -> None:
    """The layouts are as defined; outputs and gradients are those that the oracle gives in place of the backends, and
    those of the primitive's formula."""
    subject = Subject(case)
    calls = subject.calls()
    for call, result in calls:
        _call(call, result)
    mask = _defined(subject)
    if mask is not None and calls:
        _definition(subject, mask, [call for call, _ in calls])
    if case.dtype == "float64":
        outputs, gradients, names = subject.gradients()
        right, right_gradients, _ = subject.gradients(lambda: subject.run(answer=oracle).out)
        agree_all(outputs, right, ["the output"])
        agree_all(gradients, right_gradients, [f"the gradient of {name}" for name in names], relative=1e-8)
        written = _formula(subject, mask)
    else:
        _rounded(subject, [call for call, _ in calls])
        written = type(subject.group).written_out is not HeadGroup.written_out
    if not written:
        _told_by_calls(subject, bool(calls))


def _told_by_calls(subject: Subject, called: bool) -> None:
    """Raises `NothingToSay` unless attention calls alone tell what the output should be.

    They do where `forward` is that of `SoftmaxHeads`, which does nothing to them that is not in the options. What a
    `forward` of its own makes of them, or computes without any, only a formula can tell.
    """
    if not called:
        raise NothingToSay(f"{NO_ATTENTION} and gives no written_out()")
    if getattr(type(subject.group), "forward", None) is not SoftmaxHeads.forward:
        raise NothingToSay("its attention calls are right, but forward() is its own and gives no written_out()")


def _rounded(subject: Subject, calls: list[AttendCall]) -> None:
    """In lower precision: output and gradients are those of float64 on the same numbers, up to rounding."""
    wide = Subject(dataclasses.replace(subject.case, memory="contiguous"), dtype=torch.float64)
    # Where only rounding decides a choice of keys, the two compute different things.
    pairs = zip(calls, (call for call, _ in wide.calls()), strict=True)
    if not all(
        torch.equal(*torch.broadcast_tensors(one.layout.to_mask(), other.layout.to_mask())) for one, other in pairs
    ):
        return
    rows = subject.promised(subject.run().out)[:, None, :, None]
    [found], gradients, names = subject.gradients(lambda: subject.run().out.where(rows, 0.0))
    [right], right_gradients, _ = wide.gradients(lambda: wide.run(answer=oracle).out.where(rows, 0.0))
    require(found.dtype == subject.leaves["x"].dtype, f"the output is {found.dtype}, but x is {subject.case.dtype}")
    # Products of numbers as large as these are added up, and the logits' own rounding moves the weights.
    terms = largest([*wide.leaves.values(), *wide.group.parameters()])
    step = 16 * torch.finfo(found.dtype).eps * max([1.0, *map(logit_steps, calls)])
    allowed = step * max(terms, largest([right]))
    _near(found, right, allowed, f"in {subject.case.dtype} the output")
    # Gradients pass two products more, each a sum over a head's width or over the keys.
    allowed = 4 * step * max(terms, largest([right]), largest(right_gradients))
    for one, other, name in zip(gradients, right_gradients, names, strict=True):
        _near(one, other, allowed, f"in {subject.case.dtype} the gradient of {name}")


def _near(found: Tensor, right: Tensor, allowed: float, what: str) -> None:
    if right.numel():
        error = float((found.double() - right).abs().max())
        require(error <= allowed, f"{what} is off by {error:.3g}, allowed are {allowed:.3g}")


def oracle(call: AttendCall) -> AttendResult:
    """The answer of dense attention in float64."""
    out, lse = expected(call)
    return AttendResult(out.to(call.v.dtype), lse if call.return_lse else None)


def _call(call: AttendCall, result: AttendResult) -> None:
    exact = expected(call)[0]
    bias, gain = pair_values(call.bias), pair_values(call.gain)
    plain = naive_attention(call.q, call.k, call.v, call.layout.to_mask(), call.scale, bias, gain)
    # Logits are rounded by their own size, in the dtype that they are computed in, and the weights with them.
    scale = reach(call) * logit_steps(call)
    within(
        lambda: assert_within_budget(
            result.out.detach(), exact.detach(), plain.detach(), multiple=4.0, scale=scale, what="attention"
        )
    )


def _defined(subject: Subject) -> Tensor | None:
    """The definition for all tokens: bool (B, heads or 1, Nq, Nk)."""
    defined = subject.group.definition(subject.inputs())
    if defined is None:
        return None
    while defined.ndim < 4:
        defined = defined[None]
    prefix = subject.case.grid.prefix
    mask = F.pad(defined, (prefix, 0, prefix, 0), value=True).expand(subject.case.batch, -1, -1, -1)
    if mask.shape[-1] == subject.case.grid.tokens:
        return mask & subject.kept[:, None, None, :]
    # Keys that are no tokens: nobody knows which of them are masked.
    return mask if subject.token_mask is None else None


def _formula(subject: Subject, mask: Tensor | None) -> bool:
    """Compares the output as the primitive writes it out, under the mask as it is defined; whether it does."""

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        bias: PairValues | None = None,
        gain: PairValues | None = None,
        sees: Tensor | None = None,
    ) -> Tensor:
        seen = mask if sees is None else sees
        require(seen is not None, "what is written out needs a definition, or the mask as sees=")
        assert seen is not None
        return dense_attention(q, k, v, seen, scale, pair_values(bias), pair_values(gain))[0]

    formula = subject.group.written_out(subject.inputs(), attention)
    if formula is None:
        return False
    output = subject.run()
    found, grid = output.out, output.grid
    require(found.shape[2] == grid.tokens, f"the output has {found.shape[2]} tokens, but its grid is {grid}")
    require(found.shape == formula.shape, f"the output has shape {tuple(found.shape)}, not {tuple(formula.shape)}")
    rows = subject.promised(found)[:, None, :, None]
    outputs, gradients, names = subject.gradients(lambda: found.where(rows, 0.0))
    right, right_gradients, _ = subject.gradients(lambda: formula.where(rows, 0.0))
    agree(outputs[0], right[0], "by its formula, the output")
    labels = [f"by its formula, the gradient of {name}" for name in names]
    agree_all(gradients, right_gradients, labels, relative=1e-8)
    return True


def _definition(subject: Subject, mask: Tensor, calls: list[AttendCall]) -> None:
    grid, batch = subject.case.grid, subject.case.batch
    found = torch.cat([call.layout.to_mask().expand(batch, call.q.shape[1], -1, -1) for call in calls], dim=1)
    require(
        found.shape[2:] == mask.shape[2:],
        f"the layout is for {tuple(found.shape[2:])} queries and keys, but its definition for {tuple(mask.shape[2:])}",
    )
    differs = found != mask
    if found.shape[2] == grid.tokens:
        # A masked token's own row may hold anything.
        differs = differs & subject.kept[:, None, :, None]
    wrong = differs.nonzero()
    if len(wrong):
        item, head, query, key = (int(one) for one in wrong[0])
        sees = "sees" if found[item, head, query, key] else "does not see"
        require(
            False,
            f"by definition it is the other way round, but token {query} {sees} token {key} "
            f"in head {head} of item {item} ({len(wrong)} pairs are wrong)",
        )


def attention(case: AttentionCase) -> None:
    """Output, lse and gradients against the oracle: exact in float64, else within a multiple of plain attention's."""
    names = ["q", "k", "v", "bias", "gain"]

    def run(dtype: torch.dtype | None, compute: str) -> tuple[list[Tensor], list[Tensor], list[str]]:
        call = case.call(grad=True, dtype=dtype)
        pairs = [(name, one) for name, one in zip(names, tensors(call), strict=True) if one is not None]

        def forward(*_: Tensor) -> tuple[Tensor, ...]:
            if compute == "backend":
                return answer(call, case.backend)
            mask, bias, gain = call.layout.to_mask(), pair_values(call.bias), pair_values(call.gain)
            if compute == "naive":
                out = naive_attention(call.q, call.k, call.v, mask, call.scale, bias, gain)
                return (out, naive_lse(call.q, call.k, mask, call.scale, bias)) if case.lse else (out,)
            out, lse = dense_attention(call.q, call.k, call.v, mask, call.scale, bias, gain)
            return (out, lse) if case.lse else (out,)

        outputs, gradients = outputs_and_gradients(forward, [one for _, one in pairs], seed=case.seed)
        return outputs, gradients, [name for name, _ in pairs]

    _default_scale(case)
    if case.dtype == "bfloat16":
        _read_by_many(case)
    outputs, gradients, inputs = run(None, "backend")
    right, right_gradients, _ = run(torch.float64, "oracle")
    require(outputs[0].dtype == case.call().v.dtype, f"the output is {outputs[0].dtype}, but v is {case.dtype}")
    named = [f"the gradient of {name}" for name in inputs]
    if case.dtype == "float64":
        agree_all(outputs, right, ["the output", "lse"][: len(right)])
        agree_all(gradients, right_gradients, named, relative=1e-8)
    else:
        plain, plain_gradients, _ = run(None, "naive")
        call = case.call()
        narrow = {"the output": reach(call) * logit_steps(call), "lse": max(1.0, largest_logit(call))}
        terms = [*right, *right_gradients, *(one for one in tensors(case.call()) if one is not None)]
        scale = max((float(one.abs().max()) for one in terms if one.numel()), default=0.0)
        scales = {f"the gradient of {name}": max(scale, pull(case.call())) for name in ("q", "k", "bias")}
        for one, other, naive, name in zip(
            [*outputs, *gradients],
            [*right, *right_gradients],
            [*plain, *plain_gradients],
            [*["the output", "lse"][: len(right)], *named],
            strict=True,
        ):
            # Sums of gradients may cancel; outputs and lse are as large as what they are made of.
            size, multiple = (narrow[name], 4.0) if name in narrow else (scales.get(name, scale), 16.0)
            if name == "lse":
                empty = other == -torch.inf
                require(torch.equal(one == -torch.inf, empty), "lse is not -inf where, and only where, nothing is seen")
                one, other, naive = (each.masked_fill(empty, 0.0) for each in (one, other, naive))  # noqa: PLW2901
            within(
                lambda one=one, other=other, naive=naive, name=name, size=size, multiple=multiple: assert_within_budget(
                    one, other.double(), naive, multiple=multiple, scale=size, what=name
                )
            )


def _default_scale(case: AttentionCase) -> None:
    call = case.call(dtype=torch.float64)
    out = attend(call.q, call.k, call.v, call.layout, backend=case.backend)
    right = dense_attention(call.q, call.k, call.v, call.layout.to_mask(), case.head_dim**-0.5)[0]
    agree(out, right, "with no scale given, the output")


def _read_by_many(case: AttentionCase) -> None:
    """What hundreds of queries read gets the sum of their gradients, though ones of bfloat16 add up to 256 at most."""
    case = dataclasses.replace(case, grid=Grid(1, 600, prefix=1), batch=1, heads=1, head_dim=1, value_dim=1)
    case = dataclasses.replace(case, bias=None, gain=None, lse=False)
    call = case.call(grad=True)
    # All keys weigh the same, so that no sum is small by luck.
    call = call.replace(q=torch.zeros_like(call.q))
    out = answer(call, case.backend)[0]
    if not out.requires_grad:
        return
    found = torch.autograd.grad(out.sum(), call.v)[0]
    right = torch.autograd.grad(expected(call)[0].sum(), call.v)[0]
    agree(found, right, "what values of bfloat16 get from hundreds of queries", relative=0.03)


def tensors(call: AttendCall) -> tuple[Tensor | None, ...]:
    """The call's tensors, those of relative tables too."""
    pairs = [one.table if isinstance(one, RelativeTable) else one for one in (call.bias, call.gain)]
    return (call.q, call.k, call.v, *pairs)


def answer(call: AttendCall, backend: str | None) -> tuple[Tensor, ...]:
    """Out, and lse where it is asked for, from a backend."""
    if call.return_lse:
        return attend(
            call.q, call.k, call.v, call.layout, scale=call.scale, bias=call.bias, gain=call.gain, backend=backend,
            return_lse=True,
        )  # fmt: skip
    return (
        attend(call.q, call.k, call.v, call.layout, scale=call.scale, bias=call.bias, gain=call.gain, backend=backend),
    )


LAW = Law(
    1,
    "equals_dense",
    "Output and gradients are those of dense attention under the layout's mask; mask and output are as defined.",
    primitive,
    attention,
)

"""Law 6: outputs are averages of visible values, and only differences of logits count."""

from __future__ import annotations

import dataclasses

import torch

from attnkit.kernels.call import AttendCall, AttendResult
from attnkit.kernels.dispatch import why_not
from attnkit.testing.cases import AttentionCase, PrimitiveCase
from attnkit.testing.laws.equals_dense import answer
from attnkit.testing.laws.law import NO_ATTENTION, Law, NothingToSay, agree, require
from attnkit.testing.oracle import pair_values
from attnkit.testing.subject import Subject
from attnkit.testing.tensors import random_tensor


def primitive(case: PrimitiveCase) -> None:
    """Every attention of the primitive, as it was computed."""
    subject = Subject(dataclasses.replace(case, dtype="float64", batch=max(case.batch, 1)))
    calls = subject.calls()
    if not calls:
        raise NothingToSay(NO_ATTENTION)
    for call, result in calls:
        _inside(call, result.out)

    def constant(call: AttendCall) -> AttendResult:
        return AttendResult(torch.full_like(call.q[..., :1], 0.5).expand(*call.q.shape[:3], call.v.shape[3]), None)

    if not any(call.return_lse for call, _ in calls):
        out = subject.run(answer=constant).out
        require(out.isfinite().all(), "the output is not finite where every attention gives 0.5")


def _inside(call: AttendCall, out: torch.Tensor) -> None:
    """Between the smallest and the largest visible value, channel by channel; 0 where nothing is seen."""
    if call.gain is not None or not out.numel():
        return
    seen = call.layout.to_mask().expand(*out.shape[:3], -1)[..., None]
    values = call.v.detach()[:, :, None]
    none = ~seen.any(-2)
    low = values.masked_fill(~seen, torch.inf).amin(-2).masked_fill(none, 0.0)
    high = values.masked_fill(~seen, -torch.inf).amax(-2).masked_fill(none, 0.0)
    slack = 1e-9 * max(1.0, float(values.abs().max()))
    out = out.detach()
    require(
        ((out >= low - slack) & (out <= high + slack)).all(), "an output lies outside the values that its query sees"
    )


def attention(case: AttentionCase) -> None:
    """Random values, constant values, and logits shifted row by row."""
    case = dataclasses.replace(case, dtype="float64")
    call = case.call()
    found = answer(call, case.backend)
    _inside(call, found[0])
    if call.gain is None:
        constant = answer(call.replace(v=torch.full_like(call.v, -2.5)), case.backend)[0]
        seeing = call.layout.to_mask().any(-1).expand(constant.shape[:3])
        agree(constant, -2.5 * seeing[..., None].expand_as(constant).double(), "the output for values of -2.5")
    shift = random_tensor(case.batch, case.heads, call.layout.num_queries, 1, seed=case.seed + 5)
    own = pair_values(call.bias)
    moved = call.replace(bias=shift if own is None else own + shift)
    if why_not(case.backend, moved):
        # It takes no such bias, so nothing can shift its logits.
        return
    shifted = answer(moved, case.backend)
    agree(shifted[0], found[0], "the output with all logits of a row shifted")
    if call.return_lse:
        agree(shifted[1], found[1] + shift[..., 0], "the lse with all logits of a row shifted")


LAW = Law(
    6,
    "convex_hull",
    "Outputs lie among the visible values, constant values pass through, and shifted logits change nothing.",
    primitive,
    attention,
)

"""Law 1: attention is dense attention under the layout's mask, and the mask is the primitive's definition."""

from __future__ import annotations

import torch

from attnkit.kernels.attend import attend
from attnkit.kernels.call import AttendCall, AttendResult
from attnkit.layouts.base import framed
from attnkit.testing.cases import AttentionCase, PrimitiveCase
from attnkit.testing.laws.law import Law, agree_all, require, within
from attnkit.testing.oracle import dense_attention, expected
from attnkit.testing.subject import Subject
from attnkit.testing.tensors import outputs_and_gradients
from attnkit.testing.tolerance import assert_within_budget, naive_attention


def primitive(case: PrimitiveCase) -> None:
    """The layouts are as defined; outputs and gradients are those that the oracle gives in place of the backends."""
    subject = Subject(case)
    calls = subject.calls()
    for call, result in calls:
        _call(call, result)
    _definition(subject, [call for call, _ in calls])
    if case.dtype == "float64":
        outputs, gradients, names = subject.gradients()
        right, right_gradients, _ = subject.gradients(answer=oracle)
        agree_all(outputs, right, ["the output"])
        agree_all(gradients, right_gradients, [f"the gradient of {name}" for name in names], relative=1e-8)


def oracle(call: AttendCall) -> AttendResult:
    """The answer of dense attention in float64."""
    out, lse = expected(call)
    return AttendResult(out.to(call.v.dtype), lse if call.return_lse else None)


def _call(call: AttendCall, result: AttendResult) -> None:
    exact = expected(call)[0]
    bias, gain = call.pair_values(call.bias), call.pair_values(call.gain)
    plain = naive_attention(call.q, call.k, call.v, call.layout.to_mask(), call.scale, bias, gain)
    terms = [one for one in (exact, call.q, call.k, call.v) if one.numel()]
    scale = max((float(one.detach().abs().max()) for one in terms), default=0.0)
    within(
        lambda: assert_within_budget(
            result.out.detach(), exact.detach(), plain.detach(), multiple=16.0, scale=scale, what="attention"
        )
    )


def _definition(subject: Subject, calls: list[AttendCall]) -> None:
    inputs = subject.inputs()
    defined = subject.group.definition(inputs)
    if defined is None:
        return
    while defined.ndim < 4:
        defined = defined[None]
    grid, batch = subject.case.grid, subject.case.batch
    mask = framed(defined, grid.prefix, grid.prefix).expand(batch, -1, -1, -1)
    if mask.shape[-1] == grid.tokens:
        mask = mask & subject.kept[:, None, None, :]
    elif subject.token_mask is not None:
        return
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

    def run(dtype: torch.dtype | None, compute: str) -> tuple[list[torch.Tensor], list[torch.Tensor], list[str]]:
        call = case.call(grad=True, dtype=dtype)
        pairs = [(name, one) for name, one in zip(names, tensors(call), strict=True) if one is not None]

        def forward(*_: torch.Tensor) -> tuple[torch.Tensor, ...]:
            if compute == "backend":
                return answer(call, case.backend)
            mask = call.layout.to_mask()
            if compute == "naive":
                return (naive_attention(call.q, call.k, call.v, mask, call.scale, call.bias, call.gain),)  # type: ignore[arg-type]
            out, lse = dense_attention(call.q, call.k, call.v, mask, call.scale, call.bias, call.gain)  # type: ignore[arg-type]
            return (out, lse) if case.lse else (out,)

        outputs, gradients = outputs_and_gradients(forward, [one for _, one in pairs], seed=case.seed)
        return outputs, gradients, [name for name, _ in pairs]

    outputs, gradients, inputs = run(None, "backend")
    right, right_gradients, _ = run(torch.float64, "oracle")
    require(outputs[0].dtype == case.call().v.dtype, f"the output is {outputs[0].dtype}, but v is {case.dtype}")
    named = [f"the gradient of {name}" for name in inputs]
    if case.dtype == "float64":
        agree_all(outputs, right, ["the output", "lse"][: len(right)])
        agree_all(gradients, right_gradients, named, relative=1e-8)
    elif not case.lse:
        plain, plain_gradients, _ = run(None, "naive")
        terms = [*right, *right_gradients, *(one for one in tensors(case.call()) if one is not None)]
        scale = max((float(one.abs().max()) for one in terms if one.numel()), default=0.0)
        for one, other, naive, name in zip(
            [outputs[0], *gradients],
            [right[0], *right_gradients],
            [plain[0], *plain_gradients],
            ["the output", *named],
            strict=True,
        ):
            within(
                lambda one=one, other=other, naive=naive, name=name: assert_within_budget(
                    one, other.double(), naive, multiple=16.0, scale=scale, what=name
                )
            )


def tensors(call: AttendCall) -> tuple[torch.Tensor | None, ...]:
    """The call's tensors that are not RelativeTables."""
    pairs = [one if isinstance(one, torch.Tensor) else None for one in (call.bias, call.gain)]
    return (call.q, call.k, call.v, *pairs)


def answer(call: AttendCall, backend: str | None) -> tuple[torch.Tensor, ...]:
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
    "Output and gradients are those of dense attention under the layout's mask, and the mask is as defined.",
    primitive,
    attention,
)

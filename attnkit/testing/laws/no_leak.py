"""Law 3: what a query does not see has no influence on it; what it sees has some."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from attnkit.primitives import SoftmaxHeads
from attnkit.testing.cases import AttentionCase, PrimitiveCase
from attnkit.testing.laws.equals_dense import answer
from attnkit.testing.laws.law import NO_ATTENTION, Law, NothingToSay, agree, require
from attnkit.testing.laws.visibility import require_attention, require_global_prefix
from attnkit.testing.oracle import pair_values
from attnkit.testing.subject import Subject
from attnkit.testing.tensors import random_tensor


def primitive(case: PrimitiveCase) -> None:
    """The values have no say in which keys are seen, and a value moves only the queries that see it."""
    subject = Subject(dataclasses.replace(case, dtype="float64"))
    inputs, calls = subject.inputs(), [call for call, _ in subject.calls()]
    require_attention(subject, calls)
    require_global_prefix(subject, calls)
    if not calls:
        raise NothingToSay(NO_ATTENTION)
    if inputs.v is None:
        raise NothingToSay("takes no values")
    masks = [call.layout.to_mask() for call in calls]
    other = subject.inputs(v=random_tensor(*inputs.v.shape, seed=case.seed + 91))
    for at, (mask, (call, _)) in enumerate(zip(masks, subject.calls(other), strict=True)):
        require(
            torch.equal(mask, call.layout.to_mask()),
            f"other values change which keys are seen (attention {at} of {len(masks)})",
        )
    if not isinstance(subject.group, SoftmaxHeads) or subject.group.lepe is not None or len(masks) != 1:
        return
    own = torch.equal(calls[0].v, inputs.v)
    if own and masks[0].shape[-2] == case.grid.tokens and case.batch:
        query = case.seed % case.grid.tokens
        hidden = ~masks[0][..., query, :].expand(*inputs.v.shape[:2], -1)
        changed = inputs.v.detach().where(~hidden[..., None], 5.0)
        before, after = (subject.run(one).out[:, :, query] for one in (inputs, subject.inputs(v=changed)))
        agree(after, before, f"after a change of values that query {query} does not see, its output")


def attention(case: AttentionCase) -> None:
    """Row by row: other queries, and keys and values outside the visible set, change nothing; a visible value does."""
    case = dataclasses.replace(case, dtype="float64")
    call = case.call(grad=True)
    if not case.batch:
        return
    query = case.seed % call.layout.num_queries
    sees = call.layout.to_mask().expand(case.batch, case.heads, -1, -1)[:, :, query]

    def row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return answer(call.replace(q=q, k=k, v=v), case.backend)[0][:, :, query]

    before = row(call.q, call.k, call.v)
    q, k, v = (random_tensor(*one.shape, seed=case.seed + 83 + at) for at, one in enumerate((call.q, call.k, call.v)))
    q[:, :, query] = call.q[:, :, query].detach()
    changed = row(q, k.where(~sees[..., None], call.k.detach()), v.where(~sees[..., None], call.v.detach()))
    agree(changed, before, f"after a change of everything that query {query} does not see, its output")

    gradients = torch.autograd.grad(before.sum(), [call.k, call.v], allow_unused=True)
    for name, one in zip(("keys", "values"), gradients, strict=True):
        if one is not None:
            require((one[~sees] == 0).all(), f"{name} that query {query} does not see get a gradient from it")

    if case.gain is None:
        logits = (call.k.detach() @ call.q.detach()[:, :, query, :, None])[..., 0] * call.scale
        if call.bias is not None:
            bias = pair_values(call.bias)
            assert bias is not None
            logits = logits + bias.detach().expand(-1, -1, call.layout.num_queries, -1)[:, :, query]
        # The weights of the other keys may round to nothing.
        most = logits.masked_fill(~sees, -torch.inf).argmax(-1, keepdim=True)
        some = torch.zeros_like(sees).scatter(-1, most, True)
        moved = row(call.q, call.k, call.v.detach() + 3.0 * some[..., None])
        changes = (moved != before).any(-1) == sees.any(-1)
        require(changes.all(), f"a change of the value that query {query} sees best does nothing")


LAW = Law(
    3,
    "no_leak",
    "Changing what a query does not see changes nothing for it; changing what it sees changes something.",
    primitive,
    attention,
)

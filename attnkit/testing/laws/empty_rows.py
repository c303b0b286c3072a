"""Law 8: a query that sees nothing gives 0 with gradient 0, and what nobody sees may hold anything."""

from __future__ import annotations

import dataclasses

import torch

from attnkit.testing.cases import AttentionCase, PrimitiveCase
from attnkit.testing.laws.equals_dense import answer, tensors
from attnkit.testing.laws.law import Law, agree, agree_all, require
from attnkit.testing.subject import Subject
from attnkit.testing.tensors import outputs_and_gradients

POISON = (torch.nan, torch.inf, -torch.inf)


def primitive(case: PrimitiveCase) -> None:
    """Masked tokens may hold NaN or infinity, and an item may have no token at all."""
    case = dataclasses.replace(case, dtype="float64", masked=True, batch=max(case.batch, 1))
    subject = Subject(case)
    kept = subject.kept
    everyone, nobody = (subject.inputs(token_mask=one) for one in (torch.ones_like(kept), None))
    agree(subject.run(everyone).out, subject.run(nobody).out, "under a mask that keeps all tokens, the output")
    poison = POISON[case.seed % len(POISON)]
    spoiled = {
        name: one.detach().where((kept if name == "x" else kept[:, None])[..., None], poison)
        for name, one in subject.leaves.items()
    }
    clean, other = (subject.run(one).out for one in (subject.inputs(), subject.inputs(**spoiled)))
    rows = subject.promised(clean)
    clean, other = (one.transpose(1, 2)[rows] for one in (clean, other))
    require(other.isfinite().all(), f"{poison} in a masked token reaches the output")
    agree(other, clean, f"with {poison} in masked tokens, the output of the others")

    subject.token_mask = torch.zeros_like(kept)
    outputs, gradients, names = subject.gradients()
    require(outputs[0].isfinite().all(), "the output is not finite where all tokens are masked")
    for name, one in zip(names, gradients, strict=True):
        require(one.isfinite().all(), f"the gradient of {name} is not finite where all tokens are masked")


def attention(case: AttentionCase) -> None:
    """One item, or one item's head, loses all its keys; keys that nobody sees are poisoned."""
    case = dataclasses.replace(case, dtype="float64")
    if not case.batch:
        return
    keys = torch.ones(case.batch, case.heads, case.call().layout.num_keys, dtype=torch.bool)
    keys[case.seed % case.batch, slice(None) if case.seed % 2 else 0] = False
    results = []
    for poison in (0.0, POISON[case.seed % len(POISON)]):
        call = case.call(grad=True)
        call = call.replace(layout=call.layout.restrict(keys))
        mask = call.layout.to_mask().expand(case.batch, case.heads, -1, -1)
        unseen = ~mask.any(-2)[..., None]
        with torch.no_grad():
            for one in (call.k, call.v):
                one.masked_fill_(unseen, poison)
        inputs = [one for one in tensors(call) if one is not None]
        outputs, gradients = outputs_and_gradients(
            lambda *_, call=call: answer(call, case.backend), inputs, seed=case.seed
        )
        empty = ~mask.any(-1)
        require((outputs[0][empty] == 0).all(), "the output of a query that sees nothing is not 0")
        require((gradients[0][empty] == 0).all(), "the gradient of a query that sees nothing is not 0")
        if case.lse:
            require((outputs[1][empty] == -torch.inf).all(), "the lse of a query that sees nothing is not -inf")
        for one in gradients:
            require(one.isfinite().all(), "a gradient is not finite beside a query that sees nothing")
        require((gradients[1].where(unseen, 0.0) == 0).all(), "a key that nobody sees gets a gradient")
        results.append(outputs + gradients)
    names = [f"with poison in keys that nobody sees, result {at}" for at in range(len(results[0]))]
    agree_all(results[1], results[0], names)


LAW = Law(
    8,
    "empty_rows",
    "A query that sees nothing gives 0 with gradient 0; NaN and infinity in padding never reach an output.",
    primitive,
    attention,
)

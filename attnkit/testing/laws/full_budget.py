"""Law 4: with the full budget a primitive is dense attention."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from attnkit.kernels.call import AttendCall
from attnkit.primitives import SoftmaxOptions
from attnkit.testing.cases import PrimitiveCase
from attnkit.testing.laws.law import NO_ATTENTION, Law, NothingToSay, agree, agree_all, require
from attnkit.testing.oracle import dense_attention
from attnkit.testing.subject import Subject
from attnkit.testing.tensors import outputs_and_gradients


def primitive(case: PrimitiveCase) -> None:
    """Under its `full_budget`, or wherever all keys happen to be seen, with the primitive's own scale."""
    options = case.options
    promised = options.full_budget(case.grid)
    full = options if promised is None else promised
    if isinstance(full, SoftmaxOptions):
        full = dataclasses.replace(full, lepe=0)
    subject = Subject(dataclasses.replace(case, options=full, masked=False, dtype="float64"))
    calls = [call for call, _ in subject.calls()]
    everything = all(bool(call.layout.to_mask().all()) for call in calls)
    if promised is not None:
        require(calls != [] and everything, f"full_budget({case.grid}) leaves out keys")
        require(all(call.layout.density() == 1.0 for call in calls), "density() of a full layout is not 1")
    if not calls:
        raise NothingToSay(NO_ATTENTION)
    if not everything:
        raise NothingToSay("promises no full_budget")
    if any(call.bias is not None or call.gain is not None for call in calls):
        raise NothingToSay("has a bias or a gain")
    if "q" not in subject.leaves:
        _one_summary(subject)
    else:
        _dense(subject, calls)


def _one_summary(subject: Subject) -> None:
    """Queries that do not depend on the input see the same from every place, where there is no bias nor gain."""
    for _, result in subject.calls():
        agree(result.out, result.out[:, :, :1].expand_as(result.out), "what a learned query sees of everything")


def _dense(subject: Subject, calls: list[AttendCall]) -> None:
    options, names = subject.case.options, ["q", "k", "v"]
    width = subject.leaves["q"].shape[-1]
    scale = width**-0.5
    if isinstance(options, SoftmaxOptions) and options.scale != "head":
        scale = (options.heads * width) ** -0.5 if options.scale == "group" else float(options.scale)
    if not _own_keys(subject, calls):
        # Keys and values of the primitive's own making: the softmax over them is what can be known from outside.
        if len(calls) == 1:
            q, k, v = subject.leaves["q"], calls[0].k, calls[0].v
            mask = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool)
            agree(subject.run().out, dense_attention(q, k, v, mask, scale)[0], "the output of the full budget")
        return
    q, k, v = (subject.leaves[name].detach().requires_grad_() for name in names)
    mask = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense_attention(q, k, v, mask, scale)[0]

    right, right_gradients = outputs_and_gradients(dense, (q, k, v), seed=subject.case.seed)
    outputs, gradients, found = subject.gradients()
    agree(outputs[0], right[0], "the output of the full budget")
    labels = [f"the gradient of {name} under the full budget" for name in names]
    agree_all([gradients[found.index(name)] for name in names], right_gradients, labels, relative=1e-8)


def _own_keys(subject: Subject, calls: list[AttendCall]) -> bool:
    """Whether the keys are the tokens' own."""
    if not {"k", "v"} <= set(subject.leaves):
        return False
    keys, own = torch.cat([call.k for call in calls], dim=1), subject.leaves["k"]
    return keys.shape == own.shape and torch.equal(keys, own)


LAW = Law(4, "full_budget", "With the full budget a primitive equals dense attention.", primitive)

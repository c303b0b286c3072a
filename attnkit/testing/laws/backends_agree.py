"""Law 2: every backend that accepts a call gives what every other gives."""

from __future__ import annotations

import dataclasses

from attnkit.kernels.dispatch import backend_named, recording, use_backend
from attnkit.testing.cases import AttentionCase, PrimitiveCase
from attnkit.testing.laws.equals_dense import answer, tensors
from attnkit.testing.laws.law import NO_ATTENTION, Law, NothingToSay, agree_all, require
from attnkit.testing.subject import Subject
from attnkit.testing.tensors import outputs_and_gradients

# Those that run on any machine without compiling; FlexAttention compiles for seconds for every new shape.
QUICK = ("reference", "sdpa", "chunked", "gather")


def primitive(case: PrimitiveCase) -> None:
    """Outputs and gradients do not depend on the backend; those that cannot run a call leave it to the reference."""
    case = dataclasses.replace(case, dtype="float64")
    subject = Subject(case)
    first, made = None, 0
    for name in QUICK:
        with use_backend(f"{name},reference"), recording() as choices:
            outputs, gradients, names = subject.gradients()
        made += len(choices)
        for choice in choices:
            able = "reference" if backend_named(name).why_not(choice.call) else name
            require(choice.backend == able, f"use_backend({name!r}) is in force, but {choice.backend} ran")
        if first is None:
            first = outputs + gradients
        labels = [f"on {name}, {what}" for what in ("the output", *(f"the gradient of {one}" for one in names))]
        agree_all(outputs + gradients, first, labels, relative=1e-8)
    if not made:
        raise NothingToSay(NO_ATTENTION)


def attention(case: AttentionCase) -> None:
    """The case's backend against all others that accept the call."""
    case = dataclasses.replace(case, dtype="float64")
    found = {}
    for name in dict.fromkeys((case.backend, *QUICK)):
        call = case.call(grad=True)
        if backend_named(name).why_not(call):
            continue
        inputs = [one for one in tensors(call) if one is not None]
        with recording() as choices:
            outputs, gradients = outputs_and_gradients(
                lambda *_, call=call, name=name: answer(call, name), inputs, seed=case.seed
            )
        ran = [choice.backend for choice in choices]
        require(ran == [name], f"backend={name!r} was asked for, but {ran} ran")
        found[name] = outputs + gradients
    for name, one in found.items():
        labels = [f"on {name} against {case.backend}, result {at}" for at in range(len(one))]
        agree_all(one, found[case.backend], labels, relative=1e-8)


LAW = Law(2, "backends_agree", "Every backend that accepts a call gives what every other gives.", primitive, attention)

"""Law 14: every parameter gets a finite gradient."""

from __future__ import annotations

import dataclasses

from attnkit.testing.cases import AttentionCase, PrimitiveCase
from attnkit.testing.laws.equals_dense import answer, tensors
from attnkit.testing.laws.law import Law, require
from attnkit.testing.subject import Subject
from attnkit.testing.tensors import outputs_and_gradients


def primitive(case: PrimitiveCase) -> None:
    """All parameters but those that only make a hard choice (`choosers`), and all inputs that the output depends on."""
    case = dataclasses.replace(case, dtype="float32", batch=max(case.batch, 1))
    subject = Subject(case)
    out = subject.run().out
    require(out.isfinite().all(), "the output is not finite")
    out.square().sum().backward()
    choosers = subject.group.choosers
    for name, parameter in subject.group.named_parameters():
        chooses = any(name == one or name.startswith(f"{one}.") for one in choosers)
        if not parameter.requires_grad or chooses:
            continue
        require(parameter.grad is not None, f"the parameter {name} gets no gradient")
        assert parameter.grad is not None
        require(parameter.grad.isfinite().all(), f"the gradient of the parameter {name} is not finite")
    for name, leaf in subject.leaves.items():
        require(leaf.grad is None or leaf.grad.isfinite().all(), f"the gradient of {name} is not finite")


def attention(case: AttentionCase) -> None:
    """Logits up to some thousands, where exp alone would overflow."""
    call = case.call(grad=True)
    # No half-precision number is as large as some of these logits.
    outputs = answer(call.replace(scale=1e4), case.backend)
    require(outputs[0].isfinite().all(), "the output is not finite for logits beyond half precision")
    hot = call.replace(scale=1000.0 if case.dtype != "float16" else 100.0)
    inputs = [one for one in tensors(hot) if one is not None]
    outputs, gradients = outputs_and_gradients(lambda *_: answer(hot, case.backend), inputs, seed=case.seed)
    require(outputs[0].isfinite().all(), "the output is not finite for large logits")
    for one in gradients:
        require(one.isfinite().all(), "a gradient is not finite for large logits")


LAW = Law(14, "finite_gradients", "Every parameter gets a finite gradient.", primitive, attention)

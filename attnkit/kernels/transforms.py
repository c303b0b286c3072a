"""Ways of differentiating that know nothing of hand-written backward passes: forward-mode and torch.func's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch._C._functorch import TransformType, get_interpreter_stack, peek_interpreter_stack
from torch.autograd import forward_ad

Constant = TypeVar("Constant", bound=Callable[..., object])
_DERIVATIVES = (TransformType.Grad, TransformType.Jvp)


def assume_constant_result(function: Constant) -> Constant:
    """What `torch.compiler.assume_constant_result` makes of a function, without importing the compiler for that, which
    takes longer than importing all of attnkit."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def forward_mode() -> bool:
    """Whether tensors may have tangents, of torch.func.jvp too."""
    return forward_ad._current_level >= 0


def differentiating() -> bool:
    """Whether a function is being differentiated in forward mode or by torch.func: grad, vjp, jvp, jacrev..."""
    # Here, since Dynamo guards what it reads, and not what a constant result was made of.
    if forward_mode():
        return True
    return _constant_differentiated() if torch.compiler.is_compiling() else _differentiated()


def transforming() -> bool:
    """Whether any transform of torch.func is at work, vmap too: its tensors do not tell that they have a gradient."""
    return _constant_transformed() if torch.compiler.is_compiling() else _transformed()


def _transformed() -> bool:
    return peek_interpreter_stack() is not None


def _differentiated() -> bool:
    return _transformed() and any(one.key() in _DERIVATIVES for one in get_interpreter_stack() or ())


# Dynamo guards which transforms are at work where it starts, and knows those that it enters.
_constant_transformed = assume_constant_result(_transformed)
_constant_differentiated = assume_constant_result(_differentiated)

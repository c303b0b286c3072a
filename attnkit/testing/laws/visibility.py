"""What can be known of any softmax primitive from its attention calls, without a definition of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.kernels.call import AttendCall
from attnkit.primitives import SoftmaxHeads, SoftmaxOptions
from attnkit.testing.laws.law import Breach
from attnkit.testing.oracle import dense_attention
from attnkit.testing.subject import Subject


def require_attention(subject: Subject, calls: list[AttendCall]) -> None:
    """Raises `Breach` for a softmax primitive whose attention nobody can look at.

    The laws look at calls of `attend`. Without any, only a formula says what the output should be.
    """
    softmax = isinstance(subject.group, SoftmaxHeads) or isinstance(subject.case.options, SoftmaxOptions)
    if calls or not softmax:
        return

    def attention(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
        return dense_attention(q, k, v, torch.ones((), dtype=torch.bool))[0]

    # Law 1 compares the output with it; here it is only asked for.
    if subject.group.written_out(subject.inputs(), attention) is None:
        raise Breach(
            f"{type(subject.group).__name__} is a softmax primitive, but its forward() makes no attention call, so "
            f"that nobody can tell what a query sees; call attnkit.attend, or give its formula as written_out()"
        )

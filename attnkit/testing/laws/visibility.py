"""What can be known of any softmax primitive from its attention calls, without a definition of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.kernels.call import AttendCall
from attnkit.primitives import SoftmaxHeads, SoftmaxOptions
from attnkit.testing.laws.law import Breach, require
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


def require_global_prefix(subject: Subject, calls: list[AttendCall]) -> None:
    """Raises `Breach` unless prefix tokens see and are seen by everything that is not masked, definition or not.

    Where heads opt out by `global_prefix = False`, or keys are not the tokens' own, nothing is known.
    """
    prefix, keys = subject.case.grid.prefix, subject.leaves.get("k")
    group, kept = subject.group, subject.kept[:, None]
    if not (isinstance(group, SoftmaxHeads) and group.global_prefix and prefix and subject.case.batch and calls):
        return
    if keys is None or any(call.layout.num_queries != call.layout.num_keys for call in calls):
        return
    if not _equal(torch.cat([call.k for call in calls], dim=1), keys):
        return
    for call in calls:
        sees = call.layout.to_mask()
        # A masked token's own row may hold anything.
        out = (sees[:, :, :prefix] == kept[:, :, None]) | ~kept[..., :prefix, None]
        require(out.all(), "a prefix token does not see just what is not masked; global_prefix says that it does")
        back = (sees[..., :prefix] == kept[:, :, None, :prefix]) | ~kept[..., None]
        require(
            back.all(),
            "a prefix token is hidden from a query, or seen though it is masked; global_prefix says otherwise",
        )


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)

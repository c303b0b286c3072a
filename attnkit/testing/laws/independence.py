"""Law 5: relabelling tokens, items or heads only relabels the output; items and head groups are independent."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from attnkit.heads import HeadMix
from attnkit.kernels.call import AttendCall
from attnkit.layouts import TokenMask
from attnkit.primitives import Conv, Dense, LearnedUpsample
from attnkit.testing.cases import AttentionCase, PrimitiveCase
from attnkit.testing.laws.equals_dense import answer
from attnkit.testing.laws.law import Law, agree, agree_all
from attnkit.testing.subject import Subject
from attnkit.testing.tensors import random_tensor, randomize_parameters


def primitive(case: PrimitiveCase) -> None:
    """Items alone or in another order give what they give together; a neighbour in the mix has no influence."""
    case = dataclasses.replace(case, dtype="float64")
    subject = Subject(case)
    together = subject.run().out
    if case.batch:
        backwards = {name: one.flip(0) for name, one in subject.leaves.items()}
        mask = None if subject.token_mask is None else subject.token_mask.flip(0)
        reverse = subject.run(subject.inputs(**backwards, token_mask=mask)).out
        agree(reverse, together.flip(0), "the output of a batch in reverse order")
        first = {name: one[:1] for name, one in subject.leaves.items()}
        mask = None if subject.token_mask is None else subject.token_mask[:1]
        alone = subject.run(subject.inputs(**first, token_mask=mask)).out
        agree(alone, together[:1], "the output of the first item alone")
    _neighbour(case)


def _neighbour(case: PrimitiveCase) -> None:
    # The outputs are told apart by an identity as wide as the layer, which need not be wide.
    case = dataclasses.replace(case, head_dim=min(case.head_dim, 4))
    options = case.options
    stride, scale = options.output_stride(), options.output_scale()
    other = Dense(1) if stride == 1 else Conv(1, stride=stride)
    other = other if scale == 1 else LearnedUpsample(1, 1, scale=scale)
    dim = case.head_dim * (options.heads + 1)
    if getattr(options, "lepe_on", "v") == "x":
        return
    outs = []
    for seed in (1, 2):
        mix = randomize_parameters(HeadMix(dim, [options, other], layer=case.seed % 5).double(), seed=case.seed)
        columns = mix.columns[0]
        own = columns.q + columns.k + columns.v
        with torch.no_grad():
            assert mix.qkv is not None and isinstance(mix.proj, torch.nn.Linear)
            mix.proj.weight.copy_(torch.eye(dim))
            # The neighbour's columns and all that lies behind them get other weights.
            mix.qkv.weight[own:] = random_tensor(*mix.qkv.weight[own:].shape, seed=seed)
        randomize_parameters(mix.groups[1], seed=seed)
        mix.train(case.training)
        x = random_tensor(case.batch, case.grid.tokens, dim, seed=case.seed)
        outs.append(mix(x, case.grid)[..., : dim - case.head_dim])
    agree(outs[1], outs[0], "with other weights in a neighbouring group, the group's output")


def attention(case: AttentionCase) -> None:
    """Queries, keys, items and heads in another order, the plan with them."""
    case = dataclasses.replace(case, dtype="float64")
    call = case.call()
    sizes = (case.batch, case.heads, call.layout.num_queries, call.layout.num_keys)
    dice = torch.Generator().manual_seed(case.seed)
    item, head, query, key = (torch.randperm(size, generator=dice) for size in sizes)

    def relabelled(tensor: Tensor, rows: Tensor) -> Tensor:
        return tensor[item][:, head][:, :, rows]

    def pairs(tensor: Tensor) -> Tensor:
        return relabelled(tensor.expand(sizes), query)[..., key]

    mask = pairs(call.layout.to_mask()) if case.batch else call.layout.to_mask()[:, :, query][..., key]
    # Only a kind that can hold any pattern can hold the relabelled one.
    layout = TokenMask(mask).lower("token_sets" if case.backend == "gather" else "token_mask")
    bias, gain = (None if one is None else pairs(one) for one in (call.bias, call.gain))  # type: ignore[arg-type]
    other = AttendCall(
        relabelled(call.q, query), relabelled(call.k, key), relabelled(call.v, key), layout, call.scale, bias, gain,
        call.return_lse,
    )  # fmt: skip
    right = [relabelled(one, query) for one in answer(call, case.backend)]
    agree_all(answer(other, case.backend), right, ["the output with tokens relabelled", "its lse"][: len(right)])


LAW = Law(
    5,
    "independence",
    "Relabelling tokens, items or heads relabels the output and does no more; items and head groups are independent.",
    primitive,
    attention,
)

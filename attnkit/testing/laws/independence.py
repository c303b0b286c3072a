"""Law 5: relabelling tokens, items or heads only relabels the output; items and head groups are independent."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from attnkit.heads import HeadMix
from attnkit.kernels.call import AttendCall
from attnkit.layouts import TokenMask
from attnkit.primitives import Conv, Dense, HeadInputs, LearnedUpsample
from attnkit.primitives.plain import merged, split
from attnkit.testing.cases import AttentionCase, PrimitiveCase
from attnkit.testing.laws.equals_dense import answer
from attnkit.testing.laws.law import Law, agree, agree_all
from attnkit.testing.oracle import pair_values
from attnkit.testing.subject import Subject
from attnkit.testing.tensors import random_tensor, randomize_parameters


def primitive(case: PrimitiveCase) -> None:
    """Items alone or in another order give what they give together; a mix is its groups side by side."""
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
    _in_a_mix(case)


def _in_a_mix(case: PrimitiveCase) -> None:
    """Beside another group, before or behind it, all on one projection in and one out."""
    # How wide the heads are makes no difference here.
    width = min(case.head_dim, 4)
    options = case.options
    stride, scale = options.output_stride(), options.output_scale()
    other = Dense(1) if stride == 1 else Conv(1, stride=stride)
    other = other if scale == 1 else LearnedUpsample(1, 1, scale=scale)
    groups = [options, other] if case.seed % 2 else [other, options]
    if getattr(options, "lepe_on", "v") == "x":
        groups = [options]
    dim = width * sum(group.heads for group in groups)
    mix = randomize_parameters(HeadMix(dim, groups, layer=case.seed % 5).double(), seed=case.seed).train(case.training)
    x = random_tensor(case.batch, case.grid.tokens, dim, seed=case.seed)
    mask = random_tensor(case.batch, case.grid.tokens, seed=case.seed + 17) < 0.5 if case.masked else None
    draw = torch.tensor(case.seed % 7) if case.training else None
    assert mix.qkv is not None and isinstance(mix.proj, torch.nn.Linear)
    columns = (x @ mix.qkv.weight.t() + mix.qkv.bias).split([1] * mix.qkv.out_features, dim=-1)
    outs, at = [], 0
    for group, one, needs in zip(mix.groups, groups, mix.columns, strict=True):
        rows: dict[str, Tensor | None] = {}
        for name in ("q", "k", "v"):
            count = getattr(needs, name)
            rows[name] = split(torch.cat(columns[at : at + count], dim=-1), one.heads) if count else None
            at += count
        outs.append(merged(group(HeadInputs(x, rows["q"], rows["k"], rows["v"], case.grid, mask, draw)).out))
    right = torch.cat(outs, dim=-1) @ mix.proj.weight.t() + mix.proj.bias
    found = mix(x, case.grid, token_mask=mask, draw=draw)
    agree(found, right, f"the output of a mix of {' and '.join(group.kind for group in groups)}")


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
    bias, gain = (None if one is None else pairs(one) for one in map(pair_values, (call.bias, call.gain)))
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

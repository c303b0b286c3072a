"""Law 11: compiled, exported, checkpointed, pickled, copied and reloaded layers give what the eager one gives."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnkit.grid import Grid
from attnkit.heads import HeadMix
from attnkit.testing.cases import AttentionCase, PrimitiveCase
from attnkit.testing.laws.equals_dense import answer
from attnkit.testing.laws.law import Law, agree, agree_all, largest, require
from attnkit.testing.oracle import expected
from attnkit.testing.subject import Subject
from attnkit.testing.tensors import outputs_and_gradients, random_tensor, randomize_parameters

Run = Callable[[Tensor], Tensor]


def primitive(case: PrimitiveCase) -> None:
    """Every quick way of changing a layer; rarely, by the seed, it is compiled or exported, which takes seconds."""
    case = dataclasses.replace(case, dtype="float64", batch=max(case.batch, 1), masked=False)
    for change in QUICK:
        change(case)
    if case.seed % RARELY in SLOW:
        SLOW[case.seed % RARELY](case)


def _mix(case: PrimitiveCase) -> HeadMix:
    mix = HeadMix(case.options.heads * case.head_dim, [case.options], layer=case.seed % 5).double()
    return randomize_parameters(mix, seed=case.seed).train(case.training)


def _needs_prefix(case: PrimitiveCase) -> bool:
    """Whether the options are made for prefix tokens, which a map does not have."""
    return bool(getattr(case.options, "prefix", 0))


def _tokens(case: PrimitiveCase, mix: HeadMix) -> Tensor:
    return random_tensor(case.batch, case.grid.tokens, mix.dim, seed=case.seed).requires_grad_()


def _compare(case: PrimitiveCase, changed: Callable[[HeadMix], Run], what: str) -> None:
    """The same draw, input and upstream gradient for a layer and a changed copy of it."""
    plain, other = _mix(case), _mix(case)
    run = changed(other)
    results = []
    for layer, function in ((plain, lambda x: plain(x, case.grid)), (other, run)):
        x = _tokens(case, layer)
        inputs = [x, *layer.parameters()]
        results.append(outputs_and_gradients(lambda x, *_, function=function: function(x), inputs, seed=case.seed))
    names = ["x", *(name for name, _ in plain.named_parameters())]
    agree(results[1][0][0], results[0][0][0], f"the output of a layer {what}")
    labels = [f"the gradient of {name} in a layer {what}" for name in names]
    # Where softmax is saturated, large gradients cancel in front of a parameter that hardly matters.
    agree_all(results[1][1], results[0][1], labels, relative=1e-8, size=largest(results[0][1]))


def copied(case: PrimitiveCase) -> None:
    """Deep-copied, after it has run."""

    def changed(mix: HeadMix) -> Run:
        again = copy.deepcopy(_ran(case, mix))
        _own_parameters(mix, again)
        return lambda x: again(x, case.grid)

    _compare(dataclasses.replace(case, training=False), changed, "that was copied")


def pickled(case: PrimitiveCase) -> None:
    """Pickled, after it has run."""

    def changed(mix: HeadMix) -> Run:
        again = pickle.loads(pickle.dumps(_ran(case, mix)))
        _own_parameters(mix, again)
        return lambda x: again(x, case.grid)

    _compare(dataclasses.replace(case, training=False), changed, "that was pickled")


def reloaded(case: PrimitiveCase) -> None:
    """Its state dict saved and loaded into a fresh layer, from which both go on with the same draws."""
    plain = _ran(case, _mix(case))
    fresh = HeadMix(plain.dim, [case.options], layer=case.seed % 5).double().train(case.training)
    file = io.BytesIO()
    torch.save(plain.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    x = _tokens(case, plain)
    agree(fresh(x, case.grid), plain(x, case.grid), "the output of a layer that was saved and loaded")


def checkpointed(case: PrimitiveCase) -> None:
    """Computed a second time for its gradient."""

    def changed(mix: HeadMix) -> Run:
        def run(x: Tensor) -> Tensor:
            draw = mix.next_draw()
            return checkpoint(lambda x: mix(x, case.grid, draw=draw), x, use_reentrant=False)  # type: ignore[return-value]

        return run

    _compare(case, changed, "that was checkpointed")


def checkpointed_whole(case: PrimitiveCase) -> None:
    """Computed a second time together with the count of its draws."""

    def changed(mix: HeadMix) -> Run:
        return lambda x: checkpoint(lambda x: mix(x, case.grid), x, use_reentrant=False)  # type: ignore[return-value]

    _compare(case, changed, "that was checkpointed as a whole")


def as_a_map(case: PrimitiveCase) -> None:
    """Given a map that lies channels first in memory, as a convolution leaves it, instead of tokens."""
    if _needs_prefix(case):
        return
    case = dataclasses.replace(case, grid=Grid(*case.grid.sizes))

    def changed(mix: HeadMix) -> Run:
        def run(x: Tensor) -> Tensor:
            image = x.unflatten(1, case.grid.sizes).movedim(-1, 1).contiguous().movedim(1, -1)
            return mix(image).flatten(1, case.grid.ndim)

        return run

    _compare(case, changed, "given a map")


def autocast(case: PrimitiveCase) -> None:
    """Under autocast every attention is still what the oracle says of the numbers it was given."""
    # In a mix q, k and v come in half precision; outside the same numbers are computed with in float32.
    subject = Subject(dataclasses.replace(case, dtype="bfloat16"), dtype=torch.float32)
    outside = [call.layout.to_mask() for call, _ in subject.calls()]
    halved, others = (
        {name: one(leaf).to(leaf.dtype if name == "x" else torch.bfloat16) for name, leaf in subject.leaves.items()}
        for one in (torch.Tensor.detach, lambda leaf: random_tensor(*leaf.shape, seed=case.seed + 1, dtype=leaf.dtype))
    )
    with torch.autocast("cpu", torch.bfloat16):
        # What other tokens saw is not to be remembered.
        subject.run(subject.inputs(**others))
        calls = subject.calls(subject.inputs(**halved))
        for call, result in calls:
            coarse = 2e-2 if call.v.dtype != torch.float32 else 1e-4
            agree(result.out, expected(call)[0], "under autocast, attention", relative=coarse)
        out = subject.run(subject.inputs(**halved)).out
    require(out.isfinite().all(), "under autocast the output is not finite")
    for one, (call, _) in zip(outside, calls, strict=True):
        require(torch.equal(one, call.layout.to_mask()), "under autocast other keys are seen of the same q and k")


def compiled(case: PrimitiveCase) -> None:
    """Compiled into one graph."""
    torch._dynamo.reset()

    def changed(mix: HeadMix) -> Run:
        whole = torch.compile(mix, fullgraph=True, backend="aot_eager")
        return lambda x: whole(x, case.grid)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        _compare(case, changed, "that was compiled")
    torch._dynamo.reset()


def exported(case: PrimitiveCase) -> None:
    """Exported from a map, which an exported program takes without a grid."""
    if _needs_prefix(case):
        return
    case = dataclasses.replace(case, training=False, grid=Grid(*case.grid.sizes))
    mix = _mix(case).eval()
    x = _tokens(case, mix).detach().unflatten(1, case.grid.sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        program = torch.export.export(mix, (x,))
        found = program.module()(x)
    agree(found, mix(x), "the output of a layer that was exported")
    torch._dynamo.reset()


def _ran(case: PrimitiveCase, mix: HeadMix) -> HeadMix:
    with torch.no_grad():
        mix(_tokens(case, mix), case.grid)
    return mix


def _own_parameters(mix: HeadMix, other: HeadMix) -> None:
    """Lets a copy share the parameters of its original, so that their gradients can be compared."""
    names = [name for name, _ in mix.named_parameters()]
    require(names == [name for name, _ in other.named_parameters()], "a copy has other parameters")
    for (name, one), (_, two) in zip(mix.named_parameters(), other.named_parameters(), strict=True):
        require(torch.equal(one, two), f"a copy has another {name}")
    for name, one in mix.named_parameters():
        owner, _, last = name.rpartition(".")
        setattr(other.get_submodule(owner), last, one)


def attention(case: AttentionCase) -> None:
    """Autocast makes no difference: inside attention, numbers keep the dtype they came in."""
    outside = answer(case.call(), case.backend)
    with torch.autocast("cpu", torch.bfloat16):
        inside = answer(case.call(), case.backend)
    for name, one, other in zip(("the output", "the lse"), inside, outside, strict=False):
        require(one.dtype == other.dtype, f"under autocast {name} is {one.dtype} instead of {other.dtype}")
        require(torch.equal(one, other), f"under autocast {name} is another")


QUICK = (copied, pickled, reloaded, checkpointed, checkpointed_whole, as_a_map, autocast)
# By what is left of the seed divided by a number; small seeds are what Hypothesis tries most.
RARELY = 25
SLOW = {13: compiled, 17: exported}

LAW = Law(
    11,
    "transformed",
    "Compiled, exported, checkpointed, autocast, pickled, copied and reloaded layers give what the eager one gives.",
    primitive,
    attention,
)

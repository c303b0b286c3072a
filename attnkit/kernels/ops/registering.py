"""How the pair of operators of a layout family is made: a forward one and its backward one.

A file of `attnkit.kernels.ops` makes one `OpPair`, which does no arithmetic. Whoever has kernels for a device adds them
in one line:

    BLOCKS.kernels("CPU", forward, backward)
    BLOCKS.kernels("CUDA", forward, backward)
    STENCIL.kernels("CompositeExplicitAutograd", forward, backward)  # every device that has no kernels of its own

`torch.library.custom_op` does the same, and takes 17 microseconds a call (35 with gradients) where this takes 8 (12).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from attnkit.errors import BackendError
from attnkit.kernels.transforms import differentiating, forward_mode

# Devices whose autocast may call an operator.
AUTOCAST = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}

Fake: TypeAlias = "Callable[..., tuple[Tensor, ...]]"
Work: TypeAlias = "Callable[..., tuple[int, int]]"

_library = torch.library.Library("attnkit", "FRAGMENT")


def exporting() -> bool:
    """Whether torch.export traces a graph, which holds PyTorch's own operators, so that what is saved needs no attnkit.

    To Dynamo in torch 2.10 `torch.compiler.is_exporting()` is always true.
    """
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


class OpPair:
    """The operators `attnkit::{name}` and `attnkit::{name}_backward`.

    Forward takes `arguments` and returns `outputs`. Backward takes the gradients of the outputs, the outputs, the
    arguments and `bool[] needs`, which of `gradients` are wanted; it returns those, in order, in a list:

        {name}({arguments}) -> ({outputs})
        {name}_backward(Tensor? per output, Tensor per output, {arguments}, bool[] needs) -> Tensor[]

    A gradient of None belongs to an output that nothing depends on; at least one is there. Kernels run with autograd
    and autocast off. They make each gradient as `torch.empty_like` of its argument would be: that dtype, those strides.
    No output may be a view of an argument. Gradients of gradients raise.

    Args:
        name: name of the forward operator.
        arguments: the forward operator's arguments as in a schema of `torch.library.define`: `"Tensor q, Tensor k,
            Tensor? bias, int[] sizes, float scale"`. No defaults, since PyTorch leaves out arguments equal to them.
        outputs: names of the outputs, tensors all.
        gradients: names of the arguments that have a gradient.
        constants: names of the outputs that have none.
        lowered: names of the arguments that autocast turns into its dtype, as it does for
            `scaled_dot_product_attention`.
        fake: `fake(*arguments)` returns the outputs as empty tensors of the right shape, strides and dtype.
        work: `work(*arguments)` returns the multiply-adds of forward and of backward, for `FlopCounterMode`. Tensors
            may be fake, without values to look at.

    Attributes:
        op: the forward operator; call this, with positional arguments.
        backward_op: the backward operator.
    """

    def __init__(
        self,
        name: str,
        *,
        arguments: str,
        outputs: Sequence[str],
        gradients: Sequence[str],
        lowered: Sequence[str],
        fake: Fake,
        work: Work,
        constants: Sequence[str] = (),
    ) -> None:
        count = len(outputs)
        taken = ", ".join([*(f"Tensor? grad_{one}" for one in outputs), *(f"Tensor {one}" for one in outputs)])
        self._define(f"{name}({arguments}) -> ({', '.join(['Tensor'] * count)})")
        self._define(f"{name}_backward({taken}, {arguments}, bool[] needs) -> Tensor[]")
        self.name = name
        self.op: Any = getattr(torch.ops.attnkit, name).default
        self.backward_op: Any = getattr(torch.ops.attnkit, f"{name}_backward").default
        names = [one.name for one in self.op._schema.arguments]
        spots = [names.index(one) for one in gradients]

        def fake_backward(*taken: Any) -> list[Tensor]:
            given = taken[2 * count : -1]
            return [torch.empty_like(given[at]) for at, need in zip(spots, taken[-1], strict=True) if need]

        torch.library.register_fake(f"attnkit::{name}", fake, lib=_library)
        torch.library.register_fake(f"attnkit::{name}_backward", fake_backward, lib=_library)
        _library.impl(name, _differentiable(self, spots, [outputs.index(one) for one in constants]), "Autograd")
        _library.impl(f"{name}_backward", _once(self), "Autograd")
        for device, key in AUTOCAST.items():
            casts = [names.index(one) for one in lowered]
            _library.impl(name, _outside_autocast(self.op, casts, device, key), key)
            _library.impl(f"{name}_backward", _outside_autocast(self.backward_op, (), device, key), key)

        @register_flop_formula(self.op.overloadpacket, get_raw=True)
        def _(*given: Any, out_val: object) -> int:
            return 2 * work(*given)[0]

        @register_flop_formula(self.backward_op.overloadpacket, get_raw=True)
        def _(*given: Any, out_val: object) -> int:
            return 2 * work(*given[2 * count : -1])[1]

    @staticmethod
    def _define(schema: str) -> None:
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def kernels(self, key: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
        """Makes two functions the operators' kernels for a dispatch key: a device in capitals, such as `"CUDA"`, or
        `"CompositeExplicitAutograd"` for every device without its own."""
        _library.impl(self.name, forward, key)
        _library.impl(f"{self.name}_backward", backward, key)


def _differentiable(pair: OpPair, spots: Sequence[int], constants: Sequence[int]) -> Callable[..., Any]:
    """The forward operator under the Autograd key.

    Args:
        pair: the operators.
        spots: which arguments have a gradient.
        constants: which outputs have none.
    """
    schema = pair.op._schema
    tensors = [at for at, one in enumerate(schema.arguments) if "Tensor" in str(one.type)]
    others = [at for at in range(len(schema.arguments)) if at not in tensors]
    total, outputs = len(schema.arguments), len(schema.returns)

    def forward(ctx: Any, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            found = pair.op(*arguments)
        several = (found,) if outputs == 1 else found
        ctx.save_for_backward(*several, *[arguments[at] for at in tensors])
        ctx.others = [arguments[at] for at in others]
        ctx.set_materialize_grads(False)
        if constants:
            ctx.mark_non_differentiable(*[several[at] for at in constants])
        return found

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # Once: a checkpoint unpacks each tensor a single time.
        saved = ctx.saved_tensors
        arguments: list[Any] = [None] * total
        for at, tensor in zip(tensors, saved[outputs:], strict=True):
            arguments[at] = tensor
        for at, value in zip(others, ctx.others, strict=True):
            arguments[at] = value
        needs = [ctx.needs_input_grad[at] for at in spots]
        rest = iter(pair.backward_op(*grads, *saved[:outputs], *arguments, needs))
        result: list[Tensor | None] = [None] * total
        for at, need in zip(spots, needs, strict=True):
            if need:
                result[at] = next(rest)
        return tuple(result)

    differentiable = _function(pair.name, forward, backward)

    def call(*arguments: Any) -> Any:
        if differentiating() and any(_followed(arguments[at]) for at in spots):
            raise BackendError(
                f"attnkit::{pair.name} has a backward pass only, not forward mode or torch.func's derivatives; "
                f"backend='gather' and backend='reference' have both"
            )
        if torch.is_grad_enabled():
            for at in spots:
                one = arguments[at]
                if one is not None and one.requires_grad:
                    return differentiable.apply(*arguments)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return pair.op(*arguments)

    return call


def _followed(one: Tensor | None) -> bool:
    """Whether derivatives by a tensor are wanted, in whichever way."""
    if one is None:
        return False
    tangent = forward_mode() and forward_ad.unpack_dual(one).tangent is not None
    return tangent or (torch.is_grad_enabled() and one.requires_grad)


def _once(pair: OpPair) -> Callable[..., Any]:
    """The backward operator under the Autograd key: where a gradient of it may follow, that raises."""

    def forward(ctx: Any, *given: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return tuple(pair.backward_op(*given))

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise BackendError(
            f"attnkit::{pair.name} has gradients but no gradients of gradients; backend='reference' has both"
        )

    raising = _function(f"{pair.name}_backward", forward, backward)

    def call(*given: Any) -> list[Tensor]:
        if torch.is_grad_enabled() and any(isinstance(one, Tensor) and one.requires_grad for one in given):
            return list(raising.apply(*given))
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return pair.backward_op(*given)

    return call


def _function(name: str, forward: Any, backward: Any) -> Any:
    """An autograd function of that name; by `type`, because PyTorch names what it makes of it at once. `forward` takes
    the context too: with a `setup_context` beside it, a call takes three times as long."""
    parts = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), parts)


def _outside_autocast(op: Any, lowered: Sequence[int], device: str, key: str) -> Callable[..., Any]:
    """An operator under an autocast key: some arguments in autocast's dtype, and its kernel without autocast."""
    off = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def call(*arguments: Any) -> Any:
        given = list(arguments)
        dtype = torch.get_autocast_dtype(device)
        for at in lowered:
            one = given[at]
            if one is not None and one.device.type == device and one.is_floating_point() and one.dtype != torch.float64:
                given[at] = one.to(dtype)
        with torch._C._ExcludeDispatchKeyGuard(off):
            return op(*given)

    return call

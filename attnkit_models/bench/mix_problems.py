"""Problem of a mix: what several head groups cost in one layer, beside each of them in a layer of its own."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import attnkit
from attnkit_models.bench.case import OURS, Contender, Problem, Setting
from attnkit_models.bench.gate import difference
from attnkit_models.bench.layer_problems import layer, layer_input

Run = Callable[[Tensor], list[Tensor]]


def mix(setting: Setting, *, batch: int, side: int, head_dim: int, groups: Sequence[Mapping[str, Any]]) -> Problem:
    """A mix of head groups, and the same groups in layers of their own: the sum of these layers' outputs is the mix's.

    Both have the projections of the same sizes: from all channels to what the groups need, and back to all channels.
    """
    heads = sum(group["heads"] for group in groups)
    together, grid = layer(heads * head_dim, groups, setting), attnkit.Grid(side, side)
    apart = alone(together, groups, head_dim).to(setting.device, setting.dtype).eval()
    x = layer_input(batch, side, heads * head_dim, setting)
    exact = Exact(together, grid, x)
    runs: dict[str, tuple[nn.Module, Run]] = {
        OURS: (together, lambda x: [together(x, grid)]),
        "its groups alone": (apart, lambda x: [one(x, grid) for one in apart]),
    }
    contenders = {}
    for name, (module, run) in runs.items():
        leaves = (x, *module.parameters())
        contenders[name] = Contender(
            lambda run=run: run(x), leaves, lambda _, run=run: exact.errors(run), step=step(run, leaves)
        )
    return Problem(contenders, None, {"tokens": side**2, "batch": x.shape[0], "heads": heads, "groups": len(groups)})


def alone(together: attnkit.HeadMix, groups: Sequence[Mapping[str, Any]], head_dim: int) -> nn.ModuleList:
    """Each group of a mix in a layer of its own, with its share of the mix's weights."""
    made = nn.ModuleList()
    columns, channels = 0, 0
    for at, options in enumerate(groups):
        one = attnkit.HeadMix(together.dim, [options], head_dim=head_dim)
        # Random windows depend on the number of their group.
        one.groups[0] = together.groups[at]
        width = options["heads"] * head_dim
        with torch.no_grad():
            if one.qkv is not None and together.qkv is not None:
                rows = slice(columns, columns + one.qkv.out_features)
                one.qkv.weight.copy_(together.qkv.weight[rows])
                one.qkv.bias.copy_(together.qkv.bias[rows])
                columns = rows.stop
            own, whole = one.get_submodule("proj"), together.get_submodule("proj")
            assert isinstance(own, nn.Linear) and isinstance(whole, nn.Linear)
            own.weight.copy_(whole.weight[:, channels : channels + width])
            # The sum of all outputs has the bias once.
            own.bias.copy_(whole.bias).mul_(at == 0)
        channels += width
        made.append(one)
    return made


def step(run: Run, leaves: Sequence[Tensor]) -> Callable[[], object]:
    """A forward and backward pass of layers, each of which gets a gradient."""
    arriving: list[Tensor] = []

    def both() -> object:
        outs = run(leaves[0])
        if not arriving:
            arriving.append(torch.ones_like(outs[0]))
        return torch.autograd.grad(outs, list(leaves), arriving * len(outs))

    return both


class Exact:
    """What a mix gives on the backend `reference`, in float64 on one image: its output and the image's gradient."""

    def __init__(self, together: attnkit.HeadMix, grid: attnkit.Grid, x: Tensor) -> None:
        self.together, self.grid = together, grid
        self.image = x.detach()[:1].requires_grad_()

    def errors(self, run: Run) -> Mapping[str, float]:
        """How far the sum of some layers is from it."""
        out = torch.stack(run(self.image)).sum(0)
        right, arriving, expected = self.numbers
        found = torch.autograd.grad(out, self.image, arriving.to(out.dtype))[0]
        return {"output": difference(out, right), "gradients": difference(found, expected)}

    @functools.cached_property
    def numbers(self) -> tuple[Tensor, Tensor, Tensor]:
        """The output, a gradient that arrives there, and that of the image; computed once."""
        wide = copy.deepcopy(self.together).double()
        image = self.image.detach().double().requires_grad_()
        with attnkit.use_backend("reference"):
            right = wide(image, self.grid)
        generator = torch.Generator().manual_seed(1)
        arriving = torch.randn(right.shape, generator=generator, dtype=self.image.dtype).to(image.device)
        expected = torch.autograd.grad(right, image, arriving.double())[0]
        return right.detach(), arriving, expected

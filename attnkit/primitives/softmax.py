"""Softmax primitives: options, the plan of which keys are seen, and the heads that follow it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from attnkit.errors import ConfigError, PrimitiveError
from attnkit.kernels import attend
from attnkit.kernels.call import PairValues
from attnkit.kernels.precision import widened, without_autocast
from attnkit.layouts import Layout
from attnkit.options import odd
from attnkit.primitives.base import BuildContext, HeadGroup, HeadInputs, HeadOutput, PrimitiveOptions, label_of, what
from attnkit.primitives.convolving import on_map


@dataclass(frozen=True)
class SoftmaxOptions(PrimitiveOptions, ABC):
    """Base of the options of softmax primitives.

    Args:
        heads: number of heads, >= 1.
        scale: factor of the logits: `"head"` for head_dim ** -0.5, `"group"` for (heads * head_dim) ** -0.5, or a
            number.
        lepe: kernel size in tokens, odd, of a depthwise convolution added to the output (locally enhanced positional
            encoding, CSWin); 0 for none. Needs a grid of two axes; prefix tokens get none.
        lepe_on: what it convolves, the values `"v"` or the layer's input `"x"`.
    """

    _: KW_ONLY
    scale: float | Literal["head", "group"] = "head"
    lepe: int = 0
    lepe_on: Literal["v", "x"] = "v"

    def problems(self) -> list[str]:
        found = super().problems()
        if self.lepe:
            found += odd(lepe=self.lepe)
        if isinstance(self.scale, (int, float)) and not 0 < self.scale < float("inf"):
            found.append(f"scale={self.scale}: must be a finite number > 0, 'head' or 'group'")
        return found


@dataclass(frozen=True, eq=False)
class Plan:
    """What a softmax primitive decides before attention is computed.

    Attributes:
        layout: which keys each query sees.
        bias: added to the logits, see `attnkit.attend`.
        keys: keys and values, where they are not the tokens' own.
        restricted: whether the layout already leaves out masked tokens.
        aux: further tensors by name.
    """

    layout: Layout
    bias: PairValues | None = None
    keys: tuple[Tensor, Tensor] | None = None
    restricted: bool = False
    aux: Mapping[str, Tensor] = field(default_factory=dict)


class SoftmaxHeads(HeadGroup, ABC):
    """Heads of softmax attention: the subclass plans which keys are seen, `attend` computes."""

    global_prefix: ClassVar[bool] = True
    """Whether prefix tokens see everything and are seen by everything, which the laws hold every plan to whose keys are
    the tokens' own."""

    def __init__(self, options: SoftmaxOptions, context: BuildContext) -> None:
        super().__init__()
        self.options = options
        columns = options.columns(context)
        if not columns.q:
            raise ConfigError(f"{label_of(options)}: softmax needs queries, but columns() asked for {columns}")
        width = columns.q // options.heads
        named = {"head": width**-0.5, "group": columns.q**-0.5}
        self.scale = named[options.scale] if isinstance(options.scale, str) else float(options.scale)
        self.lepe: nn.Conv2d | None = None
        if options.lepe:
            channels = options.heads * context.head_dim
            if options.lepe_on == "x" and channels != context.dim:
                raise ConfigError(
                    f"lepe_on='x' adds all {context.dim} channels of the input to this group's {channels}; "
                    f"give the group all heads or use lepe_on='v'"
                )
            self.lepe = nn.Conv2d(channels, channels, options.lepe, padding=options.lepe // 2, groups=channels)

    @abstractmethod
    def plan(self, inputs: HeadInputs) -> Plan:
        """Decides which keys each query sees."""

    def forward(self, inputs: HeadInputs) -> HeadOutput:
        plan = self.plan(inputs)
        q, k, v = self._checked(plan, inputs)
        layout = plan.layout
        if inputs.token_mask is not None and not plan.restricted:
            layout = layout.restrict(inputs.token_mask)
        out = attend(q, k, v, layout, scale=self.scale, bias=plan.bias)
        if self.lepe is not None:
            out = out + self._local(self.lepe, inputs)
        aux = plan.aux
        if inputs.prefix_weights:
            aux = {**aux, "prefix_weights": self._prefix_weights(q, k, layout, plan.bias, inputs)}
        return HeadOutput(out, inputs.grid, aux)

    def _checked(self, plan: Plan, inputs: HeadInputs) -> tuple[Tensor, Tensor, Tensor]:
        """The q, k and v that a plan is for, or `PrimitiveError` if it is none that fits."""
        if not isinstance(plan, Plan):
            raise PrimitiveError(f"{label_of(self.options)}: plan() must return a Plan, but returned {what(plan)}")
        layout = plan.layout
        if not isinstance(layout, Layout):
            raise PrimitiveError(
                f"{label_of(self.options)}: plan() must return the Plan of a layout, but its layout is {what(layout)}"
            )
        q, (k, v) = inputs.q, plan.keys or (inputs.k, inputs.v)
        if q is None or k is None or v is None:
            raise PrimitiveError(
                f"{label_of(self.options)}: softmax needs q, k and v, from columns() or k and v as "
                f"Plan(layout, keys=(k, v))"
            )
        if (layout.num_queries, layout.num_keys) != (q.shape[2], k.shape[2]):
            raise PrimitiveError(
                f"{label_of(self.options)}: plan() returned a {layout.kind} layout for {layout.num_queries} queries "
                f"and {layout.num_keys} keys, but there are {q.shape[2]} and {k.shape[2]}"
            )
        return q, k, v

    @torch.no_grad()
    def _prefix_weights(
        self, q: Tensor, k: Tensor, layout: Layout, bias: PairValues | None, inputs: HeadInputs
    ) -> Tensor:
        """Softmax weights of the prefix tokens, which see all that is not masked: (B, heads, prefix, N)."""
        prefix = inputs.grid.prefix
        if k.shape[2] != inputs.x.shape[1] or bias is not None:
            raise ConfigError(
                f"{label_of(self.options)}: weights of prefix tokens need the tokens' own keys and no bias; "
                f"choose tokens by another group's"
            )
        with without_autocast(q.device):
            logits = widened(q[:, :, :prefix]) @ widened(k).transpose(-2, -1) * self.scale
            if layout.key_mask is not None:
                logits = logits.masked_fill(~layout.key_mask[:, :, None], -torch.inf)
            # A row without keys has no weights at all.
            return logits.softmax(-1).nan_to_num(0.0)

    def _local(self, conv: nn.Conv2d, inputs: HeadInputs) -> Tensor:
        """The depthwise convolution of values or inputs as (B, heads, N, D), zero for prefix tokens."""
        tokens = inputs.x
        if self.options.lepe_on == "v":
            if inputs.v is None:
                raise ConfigError(f"{label_of(self.options)}: lepe_on='v' needs values, but columns() asked for none")
            tokens = inputs.v.transpose(1, 2).flatten(2)
        local = on_map(conv, tokens, inputs.grid, inputs.token_mask)
        local = nn.functional.pad(local, (0, 0, inputs.grid.prefix, 0))
        return local.unflatten(2, (self.options.heads, -1)).transpose(1, 2)

    def extra_repr(self) -> str:
        return repr(self.options)

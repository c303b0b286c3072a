"""The interface of a primitive: options, the head group they build, and what goes in and out of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from attnkit.errors import ConfigError
from attnkit.grid import Grid
from attnkit.options import Options, positive


@dataclass(frozen=True)
class Columns:
    """How many columns of the fused projection a head group needs for its q, k and v; 0 for none."""

    q: int = 0
    k: int = 0
    v: int = 0


@dataclass(frozen=True)
class BuildContext:
    """What the mix tells a head group when it is built.

    Attributes:
        dim: width of the mix's input, C.
        head_dim: width of one head, D.
        layer: number of the layer in its model; random primitives differ from layer to layer by it.
        group: number of the group in its mix; random primitives differ from group to group by it.
    """

    dim: int
    head_dim: int
    layer: int = 0
    group: int = 0


@dataclass(frozen=True, eq=False)
class HeadInputs:
    """What a head group gets.

    Attributes:
        x: the mix's input (B, N, C).
        q: (B, heads, N, D), or None if no columns were asked for; k and v alike.
        k: see q.
        v: see q.
        grid: how the N tokens lie.
        token_mask: bool (B, N), False for tokens that no query may see, or None.
        draw: int64 scalar, the number of the random draw in training; None asks for the fixed draw of evaluation.
        places: int64 (B, n), the numbers of the tokens that are left of the grid's, rising and with all prefix tokens;
            N is then n. None if all are there. Only groups that say so by `accepts_places` get any.
        prefix_weights: whether softmax heads also give what prefix tokens attend to, as `aux["prefix_weights"]`.
    """

    x: Tensor
    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    grid: Grid
    token_mask: Tensor | None = None
    draw: Tensor | None = None
    places: Tensor | None = None
    prefix_weights: bool = False

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, for groups that asked for all three.

        Raises:
            ConfigError: for others.
        """
        if self.q is None or self.k is None or self.v is None:
            missing = ", ".join(name for name in ("q", "k", "v") if getattr(self, name) is None)
            raise ConfigError(f"inputs.qkv are q, k and v, but the group's columns() did not ask for {missing}")
        return self.q, self.k, self.v


@dataclass(frozen=True, eq=False)
class HeadOutput:
    """What a head group gives back.

    Attributes:
        out: (B, heads, N', D).
        grid: how the N' tokens lie; a stride makes it coarser, a scale finer.
        aux: further tensors by name, such as what a distillation loss needs.
    """

    out: Tensor
    grid: Grid
    aux: Mapping[str, Tensor] = field(default_factory=dict)


class HeadGroup(nn.Module, ABC):
    """A group of heads of one primitive; every primitive has a final subclass."""

    stochastic: ClassVar[bool] = False
    choosers: ClassVar[tuple[str, ...]] = ()
    """Submodules that only make a hard choice, so that a loss on the output does not reach their parameters."""

    @abstractmethod
    def forward(self, inputs: HeadInputs) -> HeadOutput:
        """Runs the group's heads."""

    def accepts_places(self) -> bool:
        """Whether the group can run on some of a grid's tokens, given with their places; not unless it says so."""
        return False

    def definition(self, inputs: HeadInputs) -> Tensor | None:
        """Which image tokens each image token sees, written as plainly as can be, or None where nothing is promised.

        Never runs in a model: the laws of `attnkit.testing` compare the layouts of `forward` with it. Prefix tokens
        and masked tokens are left to the laws.

        Returns:
            bool, broadcastable to (B, heads, image queries, image keys).
        """
        return None

    def written_out(self, inputs: HeadInputs, attention: Callable[..., Tensor]) -> Tensor | None:
        """The output by the primitive's formula, written as plainly as can be, or None where nothing is promised.

        Never runs in a model: the laws of `attnkit.testing` compare outputs and gradients of `forward` with it.

        Args:
            inputs: as in `forward`.
            attention: `attention(q, k, v, scale=, bias=, gain=, sees=)` is dense attention under the mask `sees`, bool
                and broadcastable to (B, heads, Nq, Nk); where not given, under the `definition`.

        Returns:
            (B, heads, N', D).
        """
        return None


@dataclass(frozen=True)
class PrimitiveOptions(Options, ABC):
    """Base of all primitives' options.

    Args:
        heads: number of heads, >= 1.
    """

    paper: ClassVar[str] = ""
    formula: ClassVar[str] = ""
    cost: ClassVar[str] = ""
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ()
    """Options beside `heads` that the gallery draws, one row of pictures each, on a grid of 14 x 14 tokens."""

    heads: int

    def problems(self) -> list[str]:
        return positive(heads=self.heads)

    def columns(self, context: BuildContext) -> Columns:
        """Columns of the fused projection; q, k and v of `heads * head_dim` each unless a primitive says otherwise."""
        width = self.heads * context.head_dim
        return Columns(q=width, k=width, v=width)

    def output_stride(self) -> int:
        """Step between outputs in tokens; 1 unless a primitive says otherwise."""
        return 1

    def output_scale(self) -> int:
        """Outputs along each axis for one token; 1 unless a primitive makes the map finer."""
        return 1

    def full_budget(self, grid: Grid) -> PrimitiveOptions | None:
        """Options of this primitive by which every query sees every key of a grid, or None if there are none.

        A promise that the laws of `attnkit.testing` hold the primitive to: it then equals dense attention.
        """
        return None

    def period(self, grid: Grid) -> tuple[int, ...] | None:
        """Steps in tokens, one per axis, by which an image may move in a larger canvas without any change.

        A promise that the laws of `attnkit.testing` hold the primitive to: around the image all tokens are masked, so
        this also says that padding has no influence. None promises nothing.
        """
        return None

    @abstractmethod
    def build(self, context: BuildContext) -> HeadGroup:
        """Makes the head group."""


def label_of(options: PrimitiveOptions) -> str:
    """What messages call a primitive: its kind, or its class where that has none."""
    return f"primitive {options.kind or type(options).__name__!r}"


def what(value: object) -> str:
    """What messages call a value that should have been another, in a few words."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return "None" if value is None else f"a {type(value).__name__}"

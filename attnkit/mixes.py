"""Mix: a mix of head groups as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from attnkit.errors import ConfigError, shown
from attnkit.options import Options, positive
from attnkit.primitives.base import PrimitiveOptions

if TYPE_CHECKING:
    from attnkit.heads import HeadMix

GroupLike: TypeAlias = "PrimitiveOptions | Mapping[str, Any]"


@dataclass(frozen=True)
class Mix(Options):
    """A mix of head groups as data.

    Args:
        groups: options of the groups, in the order of their channels; at least one.
        dim: width of the input and output; needed only where nothing around the mix says it.
        head_dim: width of one head; dim / heads where not given.
        out_dim: width of the output, where it is not `dim`.
        qkv_bias: whether the fused projection has a bias.
        proj_bias: whether the output projection has a bias.
        projection: what follows the groups, a `"linear"` map or `"none"`.
        pad_multiple: fill the map up with zeros, right and below, to a multiple of so many tokens per side before
            anything else, and cut the output back. Layers and softmax take the zeros for tokens like all others: that
            is how the first code of BiFormer's authors pads, and nothing that other weights need.
    """

    kind: ClassVar[str] = "mix"

    groups: tuple[PrimitiveOptions, ...]
    _: KW_ONLY
    dim: int | None = None
    head_dim: int | None = None
    out_dim: int | None = None
    qkv_bias: bool = True
    proj_bias: bool = True
    projection: Literal["linear", "none"] = "linear"
    pad_multiple: int | None = None

    def problems(self) -> list[str]:
        found = positive(dim=self.dim, head_dim=self.head_dim, out_dim=self.out_dim, pad_multiple=self.pad_multiple)
        if not self.groups:
            found.append("groups=(): a mix needs at least one head group")
        steps = [_step(group) for group in self.groups]
        if len(set(steps)) > 1:
            pairs = ", ".join(f"{group.kind} {step}" for group, step in zip(self.groups, steps, strict=True))
            found.append(f"groups=...: all groups need one stride, but they have {pairs}")
        elif self.pad_multiple is not None and steps and steps[0] != "1":
            found.append(
                f"pad_multiple={self.pad_multiple}: goes with groups that keep the map, not a stride of {steps[0]}"
            )
        return found

    @property
    def output_stride(self) -> int:
        """Step between the mix's outputs in tokens, the same for all groups."""
        return self.groups[0].output_stride()

    @property
    def output_scale(self) -> int:
        """Outputs of the mix along each axis for one token, the same for all groups."""
        return self.groups[0].output_scale()

    @property
    def heads(self) -> int:
        """Number of heads of all groups together."""
        return sum(group.heads for group in self.groups)

    def build(self, dim: int | None = None, layer: int = 0) -> HeadMix:
        """Makes the module, of width `dim` where the mix itself does not say."""
        width = self.dim if dim is None else dim
        if width is None:
            raise ConfigError("a mix on its own needs its width: {'kind': 'mix', 'dim': 96, 'groups': [...]}")
        from attnkit.heads import HeadMix

        return HeadMix(
            width,
            self.groups,
            head_dim=self.head_dim,
            out_dim=self.out_dim,
            qkv_bias=self.qkv_bias,
            proj_bias=self.proj_bias,
            projection=self.projection,
            pad_multiple=self.pad_multiple,
            layer=layer,
        )


def read_groups(groups: Sequence[GroupLike], **more: Any) -> tuple[PrimitiveOptions, ...]:
    """Option objects from a list of option objects and plain dicts, all mistakes reported together.

    Args:
        groups: the list.
        more: further options of a `Mix`, whose mistakes are reported with them.
    """
    if isinstance(groups, (Mapping, PrimitiveOptions, str)) or not isinstance(groups, Sequence):
        raise ConfigError(f"groups must be a list of options, such as [Dense(heads=4)], but got {shown(groups)}")
    plain = {"groups": [group if isinstance(group, Options) else _plain_group(group) for group in groups]}
    return Mix.from_dict({**plain, **more}).groups


def _plain_group(group: Any) -> Any:
    if isinstance(group, Mapping) and "kind" not in group:
        raise ConfigError(f"a head group given as a dict needs a 'kind', such as 'dense', but got {shown(dict(group))}")
    return group


def _step(group: PrimitiveOptions) -> str:
    """Step between a group's outputs in tokens: `"2"`, or `"1/2"` where there are two outputs a token."""
    stride, scale = group.output_stride(), group.output_scale()
    return f"{stride}" if scale == 1 else f"{stride}/{scale}"

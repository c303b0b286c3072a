"""The arguments of BiFormer's authors' constructors, and our options for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from attnkit.blocks import BlockStyle
from attnkit.mixes import Mix
from attnkit.options import Options, odd, positive
from attnkit.primitives import Conv, Dense, PaddedTopKRegion, SoftTopKRegion, TopKRegion
from attnkit_models.biformer import DENSE_HEADS

Scale = float | Literal["head", "group"]
KvMode = Literal["identity", "ada_avgpool", "ada_maxpool", "avgpool", "maxpool"]

# The kernel of the convolution in the dense stage of the second code, whatever its arguments say.
DENSE_LEPE = 5


@dataclass(frozen=True, kw_only=True)
class BiLevelRoutingAttention(Options):
    """The arguments of the authors' first layer."""

    kind: ClassVar[str] = "BiLevelRoutingAttention"

    dim: int
    num_heads: int = 8
    n_win: int = 7
    qk_dim: int | None = None
    qk_scale: float | None = None
    kv_per_win: int | None = 4
    kv_downsample_ratio: int | None = 4
    kv_downsample_mode: KvMode = "identity"
    topk: int = 4
    param_attention: Literal["qkvo", "qkv"] = "qkvo"
    param_routing: bool = False
    diff_routing: bool = False
    soft_routing: bool = False
    side_dwconv: int = 3
    auto_pad: bool = False

    def problems(self) -> list[str]:
        return positive(dim=self.dim, topk=self.topk) + self.routing_problems()

    def routing_problems(self) -> list[str]:
        """Problems of all that only routing needs."""
        found = positive(num_heads=self.num_heads, n_win=self.n_win, qk_dim=self.qk_dim or None)
        found += _divides(self.num_heads, dim=self.dim, qk_dim=self.qk_dim or self.dim)
        found += _sides(self.side_dwconv) + _positive_scale(self.qk_scale)
        if self.kv_downsample_mode.startswith("ada_") and (self.kv_per_win or 0) < 1:
            found.append(f"kv_per_win={self.kv_per_win}: must be >= 1 for {self.kv_downsample_mode!r}")
        if self.kv_downsample_mode in ("avgpool", "maxpool") and self.kv_downsample_ratio is None:
            found.append(f"kv_downsample_ratio=None: {self.kv_downsample_mode!r} needs a number of tokens")
        if self.param_routing and not self.diff_routing:
            found.append("param_routing=True: needs diff_routing=True, or the learned router gets no gradient")
        if self.diff_routing and not self.soft_routing:
            found.append("diff_routing=True: needs soft_routing=True; the authors' code has nothing else for it either")
        return found

    @property
    def routed(self) -> Mix:
        """Our mix."""
        group: dict[str, Any] = {
            "heads": self.num_heads,
            "regions": self.n_win,
            "topk": self.topk,
            "qk_dim": self.qk_dim if self.qk_dim and self.qk_dim != self.dim else None,
            "scale": self.qk_scale or "group",
            "lepe": max(self.side_dwconv, 0),
            **self._pool,
        }
        options = TopKRegion(**group)
        if self.soft_routing:
            router = "linear" if self.param_routing else "means" if self.diff_routing else "detached"
            options = SoftTopKRegion(**group, router=router)
        return Mix(
            (options,),
            projection="linear" if self.param_attention == "qkvo" else "none",
            pad_multiple=self.n_win if self.auto_pad else None,
        )

    @property
    def _pool(self) -> dict[str, Any]:
        mode = self.kv_downsample_mode
        how = {"pool": "max" if mode.endswith("maxpool") else "mean"}
        if mode.startswith("ada_"):
            return {**how, "pool_cells": self.kv_per_win}
        if mode == "identity" or (self.kv_downsample_ratio or 0) <= 1:
            return {}
        return {**how, "pool_size": self.kv_downsample_ratio}


@dataclass(frozen=True, kw_only=True)
class Block(BiLevelRoutingAttention):
    """The arguments of the authors' block, which hands most of them on to its layer."""

    kind: ClassVar[str] = "Block"

    kv_downsample_mode: KvMode = "ada_avgpool"
    side_dwconv: int = 5
    drop_path: float = 0.0
    layer_scale_init_value: float = -1.0
    mlp_ratio: float = 4.0
    mlp_dwconv: bool = False
    before_attn_dwconv: int = 3
    pre_norm: bool = True

    def problems(self) -> list[str]:
        found = positive(dim=self.dim)
        if self.topk < -2:
            found.append(f"topk={self.topk}: must be a number of regions, 0, -1 or -2")
        if self.topk > 0:
            found += self.routing_problems()
        elif self.topk < 0:
            found += _divides(DENSE_HEADS, dim=self.dim)
            found += _sides(self.side_dwconv) if self.topk == -2 else []
        if self.before_attn_dwconv > 0 and self.before_attn_dwconv != 3:
            found.append(
                f"before_attn_dwconv={self.before_attn_dwconv}: must be 3, or 0 for none; the authors' code pads by 1"
            )
        return found

    @property
    def mix(self) -> Mix:
        """Our mix: routed, dense or convolutions alone."""
        if self.topk > 0:
            return self.routed
        if self.topk == 0:
            return Mix((Conv(1, kernel=5, pointwise=False),))
        if self.topk == -1:
            return Attention(dim=self.dim).mix
        return AttentionLePE(dim=self.dim, side_dwconv=self.side_dwconv).mix

    @property
    def style(self) -> BlockStyle:
        """All of our block but its mix."""
        return BlockStyle(
            mlp_ratio=self.mlp_ratio,
            norm="pre" if self.pre_norm else "post",
            drop_path=self.drop_path,
            layer_scale=self.layer_scale_init_value if self.layer_scale_init_value > 0 else None,
            position_conv=max(self.before_attn_dwconv, 0),
            mlp_conv=3 if self.mlp_dwconv else 0,
        )


@dataclass(frozen=True, kw_only=True)
class Attention(Options):
    """The arguments of the authors' dense layer."""

    kind: ClassVar[str] = "Attention"

    dim: int
    num_heads: int = 8
    qkv_bias: bool = False
    qk_scale: float | None = None
    attn_drop: float = 0.0
    proj_drop: float = 0.0

    def problems(self) -> list[str]:
        found = positive(dim=self.dim, num_heads=self.num_heads) + _divides(self.num_heads, dim=self.dim)
        for name in ("attn_drop", "proj_drop"):
            if getattr(self, name):
                found.append(f"{name}={getattr(self, name)}: must be 0; attnkit's attention has no dropout")
        return found + _positive_scale(self.qk_scale)

    @property
    def mix(self) -> Mix:
        """Our mix."""
        return Mix((Dense(self.num_heads, scale=self.qk_scale or "head"),), qkv_bias=self.qkv_bias)


@dataclass(frozen=True, kw_only=True)
class AttentionLePE(Attention):
    """The arguments of the authors' dense layer that adds a convolution of its input."""

    kind: ClassVar[str] = "AttentionLePE"
    lepe_on: ClassVar[Literal["v", "x"]] = "x"

    side_dwconv: int = 5

    def problems(self) -> list[str]:
        return super().problems() + _sides(self.side_dwconv)

    @property
    def mix(self) -> Mix:
        """Our mix."""
        lepe = max(self.side_dwconv, 0)
        group = Dense(self.num_heads, scale=self.qk_scale or "head", lepe=lepe, lepe_on=self.lepe_on if lepe else "v")
        return Mix((group,), qkv_bias=self.qkv_bias)


@dataclass(frozen=True, kw_only=True)
class NchwAttentionLePE(AttentionLePE):
    """The arguments of the dense layer of the second code, which convolves the values."""

    kind: ClassVar[str] = "nchwAttentionLePE"
    lepe_on: ClassVar[Literal["v", "x"]] = "v"


@dataclass(frozen=True, kw_only=True)
class NchwBRA(Options):
    """The arguments of the routed layer of the second code."""

    kind: ClassVar[str] = "nchwBRA"

    dim: int
    num_heads: int = 8
    n_win: int = 7
    qk_scale: float | None = None
    topk: int = 4
    side_dwconv: int = 3

    def problems(self) -> list[str]:
        found = positive(dim=self.dim, num_heads=self.num_heads, n_win=self.n_win, topk=self.topk)
        return (
            found + _divides(self.num_heads, dim=self.dim) + _sides(self.side_dwconv) + _positive_scale(self.qk_scale)
        )

    @property
    def mix(self) -> Mix:
        """Our mix."""
        scale, lepe = self.qk_scale or "group", max(self.side_dwconv, 0)
        return Mix((PaddedTopKRegion(self.num_heads, self.n_win, self.topk, scale=scale, lepe=lepe),))


# What the authors' layers take and do not use.
UNUSED = ("kv_downsample_kernel", "attn_backend")


def without(hparams: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Arguments but for those that change nothing."""
    return {name: value for name, value in hparams.items() if name not in (*UNUSED, *names)}


def _divides(heads: int, **widths: int) -> list[str]:
    return [
        f"{name}={width}: does not divide into {heads} heads"
        for name, width in widths.items()
        if heads >= 1 and width >= 1 and width % heads
    ]


def _sides(side_dwconv: int) -> list[str]:
    return odd(side_dwconv=side_dwconv) if side_dwconv > 0 else []


def _positive_scale(scale: float | None) -> list[str]:
    return [f"qk_scale={scale}: must be a finite number > 0"] if scale and not 0 < scale < float("inf") else []

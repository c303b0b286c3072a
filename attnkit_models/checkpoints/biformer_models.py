"""The arguments of BiFormer's authors' three models, and our configurations for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from attnkit.blocks import BlockStyle
from attnkit.mixes import Mix
from attnkit.options import Options, positive
from attnkit_models.backbones import ConvNorm, PyramidConfig, Stage
from attnkit_models.checkpoints.biformer_arguments import DENSE_LEPE, Block, NchwAttentionLePE, NchwBRA, without

STAGES = 4
Norm = Literal["BatchNorm2d", "LayerNorm2d"]
NORMS: dict[str, Literal["batch", "layer"]] = {"BatchNorm2d": "batch", "LayerNorm2d": "layer"}

# What the authors' models take and do not use; checkpointing saves memory and changes no number.
UNUSED = ("drop_rate", "use_checkpoint_stages", "kv_downsample_kernels", "pe_stages")


@dataclass(frozen=True, kw_only=True)
class _Model(Options):
    """What the authors' models have in common."""

    in_chans: int = 3
    num_classes: int = 1000
    depth: tuple[int, ...]
    embed_dim: tuple[int, ...]
    head_dim: int
    qk_scale: float | None = None
    drop_path_rate: float = 0.0
    mlp_ratios: tuple[float, ...] = (4, 4, 4, 4)
    side_dwconv: int = 5
    per_stage: ClassVar[tuple[str, ...]] = ("depth", "embed_dim", "mlp_ratios")

    def problems(self) -> list[str]:
        found = positive(in_chans=self.in_chans, head_dim=self.head_dim)
        for name in self.per_stage:
            given = getattr(self, name)
            if isinstance(given, tuple) and len(given) != STAGES:
                found.append(f"{name}={list(given)}: needs one entry for each of {STAGES} stages")
        return found

    def stages(self, parts: Iterator[tuple[Mix, BlockStyle]], merges: list[ConvNorm]) -> tuple[Stage, ...]:
        """Our stages from the mix and the style of each."""
        return tuple(
            Stage(self.embed_dim[at], self.depth[at], mix, merge=merges[at] if at else None, block=style)
            for at, (mix, style) in enumerate(parts)
        )

    @property
    def options(self) -> dict[str, Any]:
        """Options of the whole model."""
        return {"in_chans": self.in_chans, "num_classes": self.num_classes, "drop_path": self.drop_path_rate}


@dataclass(frozen=True, kw_only=True)
class BiFormer(_Model):
    """The arguments of the authors' `BiFormer`."""

    kind: ClassVar[str] = "biformer"
    per_stage: ClassVar[tuple[str, ...]] = (
        *_Model.per_stage,
        "topks",
        "qk_dims",
        "kv_per_wins",
        "kv_downsample_ratios",
    )

    depth: tuple[int, ...] = (3, 4, 8, 3)
    embed_dim: tuple[int, ...] = (64, 128, 320, 512)
    head_dim: int = 64
    n_win: int = 7
    kv_downsample_mode: Literal["identity", "ada_avgpool", "ada_maxpool", "avgpool", "maxpool"] = "ada_avgpool"
    kv_per_wins: tuple[int | None, ...] = (2, 2, -1, -1)
    kv_downsample_ratios: tuple[int | None, ...] = (4, 2, 1, 1)
    topks: tuple[int, ...] = (8, 8, -1, -1)
    layer_scale_init_value: float = -1.0
    qk_dims: tuple[int | None, ...] = (None, None, None, None)
    param_routing: bool = False
    diff_routing: bool = False
    soft_routing: bool = False
    pre_norm: bool = True
    pe: None = None
    representation_size: None = None
    before_attn_dwconv: int = 3
    auto_pad: bool = False
    param_attention: Literal["qkvo", "qkv"] = "qkvo"
    mlp_dwconv: bool = False

    def problems(self) -> list[str]:
        found = super().problems()
        for topk, width in zip(self.topks, self._qk_dims, strict=False):
            if topk > 0 and 0 < width < self.head_dim:
                found.append(f"head_dim={self.head_dim}: leaves no head in a stage of {width} channels")
        return found

    @property
    def _qk_dims(self) -> list[int]:
        return [one or width for one, width in zip(self.qk_dims, self.embed_dim, strict=False)]

    def block(self, at: int) -> Block:
        """The arguments of the blocks of a stage."""
        shared = ("n_win", "qk_scale", "kv_downsample_mode", "param_attention", "param_routing", "diff_routing")
        shared += ("soft_routing", "side_dwconv", "auto_pad", "layer_scale_init_value", "mlp_dwconv")
        shared += ("before_attn_dwconv", "pre_norm")
        return Block(
            dim=self.embed_dim[at],
            num_heads=max(self._qk_dims[at] // self.head_dim, 1),
            qk_dim=self._qk_dims[at],
            topk=self.topks[at],
            kv_per_win=self.kv_per_wins[at],
            kv_downsample_ratio=self.kv_downsample_ratios[at],
            mlp_ratio=self.mlp_ratios[at],
            **{name: getattr(self, name) for name in shared},
        )

    @property
    def model(self) -> PyramidConfig:
        """Our configuration."""
        first = self.embed_dim[0]
        stem = (ConvNorm(first // 2, 3, 2, norm="batch", activation="gelu"), ConvNorm(first, 3, 2, norm="batch"))
        merges = [ConvNorm(width, 3, 2, norm="batch") for width in self.embed_dim]
        blocks = [self.block(at) for at in range(STAGES)]
        stages = self.stages(((one.mix, one.style) for one in blocks), merges)
        return PyramidConfig(stem, stages, final_norm="batch", **self.options)


@dataclass(frozen=True, kw_only=True)
class BiFormerSTL(_Model):
    """The arguments of the authors' `BiFormerSTL`; `qk_scale` does not reach its layers."""

    kind: ClassVar[str] = "biformer_stl"
    per_stage: ClassVar[tuple[str, ...]] = (*_Model.per_stage, "n_wins", "topks")

    depth: tuple[int, ...] = (2, 2, 6, 2)
    embed_dim: tuple[int, ...] = (96, 192, 384, 768)
    head_dim: int = 32
    norm_layer: Norm = "LayerNorm2d"
    pre_head_norm_layer: Norm | None = None
    n_wins: int | tuple[int, ...] = (7, 7, 7, 7)
    topks: int | tuple[int, ...] = (1, 4, 16, -2)

    def problems(self) -> list[str]:
        found = super().problems()
        for topk, width in zip(_each(self.topks), self.embed_dim, strict=False):
            if topk > 0 and 0 < width < self.head_dim:
                found.append(f"head_dim={self.head_dim}: leaves no head in a stage of {width} channels")
        return found

    def mix(self, at: int) -> Mix:
        """Our mix of a stage."""
        return Block(**self._layer(at), kv_downsample_mode="identity", before_attn_dwconv=0).mix

    def _layer(self, at: int) -> dict[str, Any]:
        width = self.embed_dim[at]
        heads = max(width // self.head_dim, 1)
        numbers = {"n_win": _each(self.n_wins)[at], "topk": _each(self.topks)[at], "side_dwconv": self.side_dwconv}
        return {"dim": width, "num_heads": heads, **numbers}

    @property
    def model(self) -> PyramidConfig:
        """Our configuration."""
        norm, last = NORMS[self.norm_layer], NORMS[self.pre_head_norm_layer or self.norm_layer]
        # Their convolutions leave out what does not fill a patch.
        stem = (ConvNorm(self.embed_dim[0], 4, 4, padding=0, norm=norm),)
        merges = [ConvNorm(width, 2, 2, padding=0, norm=norm, norm_first=True) for width in self.embed_dim]
        parts = ((self.mix(at), BlockStyle(mlp_ratio=self.mlp_ratios[at])) for at in range(STAGES))
        return PyramidConfig(stem, self.stages(parts, merges), final_norm=last, **self.options)


@dataclass(frozen=True, kw_only=True)
class NchwBiFormerSTL(BiFormerSTL):
    """The arguments of the authors' `nchwBiFormerSTL`, their second code."""

    kind: ClassVar[str] = "biformer_stl_nchw"

    topks: int | tuple[int, ...] = (1, 4, 16, -1)

    def problems(self) -> list[str]:
        wrong = [one for one in _each(self.topks) if one < 1 and one != -1]
        return super().problems() + [f"topks={self.topks}: {one} is neither >= 1 nor -1" for one in wrong[:1]]

    def mix(self, at: int) -> Mix:
        """Our mix of a stage."""
        layer = self._layer(at)
        if layer["topk"] == -1:
            return NchwAttentionLePE(dim=layer["dim"], side_dwconv=DENSE_LEPE).mix
        return NchwBRA(**layer).mix


def _each(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,) * STAGES


def configuration(arguments: type[BiFormer | BiFormerSTL], hparams: Mapping[str, Any]) -> PyramidConfig:
    """Our configuration for the authors' arguments, in which layers may stand for their names."""
    named = {name: value.__name__ if isinstance(value, type) else value for name, value in hparams.items()}
    return arguments.from_dict(without(named, *UNUSED)).model

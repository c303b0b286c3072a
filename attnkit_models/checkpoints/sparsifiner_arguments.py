"""The arguments of Sparsifiner's authors' constructors and their configuration, and our options for them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from attnkit.blocks import BlockStyle
from attnkit.errors import ConfigError
from attnkit.mixes import Mix
from attnkit.options import Options, positive
from attnkit.primitives import CompetingMaskPredictor, MaskReconstruction, PrimitiveOptions
from attnkit_models.backbones import ConvNorm, IsotropicConfig
from attnkit_models.checkpoints.sparsifiner_cfg import Cfg, split
from attnkit_models.sparsifiner import lv_vit_stem


@dataclass(frozen=True, kw_only=True)
class Attention(Options):
    """The arguments of the authors' attention layer."""

    kind: ClassVar[str] = "SparsifinerAttention"

    dim: int
    num_tokens: int = 197
    num_heads: int = 8
    attn_keep_rate: float = 0.25
    token_keep_rate: float = 0.5
    token_pruning_this_layer: bool = False
    reduce_n_factor: int = 8
    reduce_c_factor: int = 2
    share_inout_proj: bool = False
    qkv_bias: bool = False
    qk_scale: float | None = None

    def problems(self) -> list[str]:
        names = ("dim", "num_tokens", "num_heads", "reduce_n_factor", "reduce_c_factor")
        found = positive(**{name: getattr(self, name) for name in names})
        if not found and self.dim % self.num_heads:
            found.append(f"dim={self.dim}: does not divide into num_heads={self.num_heads} heads")
        if self.num_tokens == 1:
            found.append("num_tokens=1: the class token is one of them, so that none are left for the image")
        for name in ("attn_keep_rate", "token_keep_rate"):
            if not 0 < getattr(self, name) <= 1:
                found.append(f"{name}={getattr(self, name)}: must be a share in (0, 1]")
        return found

    def mix(self, cfg: Cfg, image: int | tuple[int, int]) -> Mix:
        """Our mix for a number of image tokens, or their height and width."""
        return Mix((self._group(cfg, image),), qkv_bias=self.qkv_bias)

    def _group(self, cfg: Cfg, image: int | tuple[int, int]) -> PrimitiveOptions:
        rows, few = self.num_tokens // self.reduce_n_factor, cfg.BASIS_COEF
        if rows < (few.TOPK if few.USE_TOPK and not cfg.USE_ATTN_RECON else 1):
            raise ConfigError(
                f"reduce_n_factor={self.reduce_n_factor}: leaves {rows} basis rows of {self.num_tokens} tokens, too "
                f"few for the {few.TOPK} that BASIS_COEF.TOPK takes"
            )
        shared: dict[str, Any] = {
            "scale": self.qk_scale or "head",
            "reduce_dim": self.reduce_c_factor,
            "reduce_tokens": self.reduce_n_factor,
            "coefficients": few.TOPK,
            "least_share": None if few.USE_TOPK else max(few.THRESHOLD, 0.0),
            "threshold": cfg.BASIS_THRESHOLD,
            "tied": self.share_inout_proj,
            "prefix": 1,
        }
        if cfg.USE_ATTN_RECON:
            return MaskReconstruction(self.num_heads, image, **shared)
        return CompetingMaskPredictor(
            self.num_heads,
            image,
            self.attn_keep_rate,
            score=None if cfg.ATTN_SCORE.USE_TOPK else cfg.ATTN_SCORE.THRESHOLD,
            blind=cfg.PRUNE_ATTN_MATRIX_ROW,
            **shared,
        )


@dataclass(frozen=True, kw_only=True)
class _Model(Options):
    """What the authors' two models have in common."""

    img_size: int | tuple[int, int] = 224
    patch_size: int = 16
    in_chans: int = 3
    num_classes: int = 1000
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    qk_scale: float | None = None
    representation_size: None = None
    drop_path_rate: float = 0.0
    hybrid_backbone: None = None
    attn_keep_rate_list: tuple[float, ...] | None = None
    reduce_n_factor: int = 8
    reduce_c_factor: int = 2
    share_inout_proj: bool = False

    def problems(self) -> list[str]:
        found = positive(patch_size=self.patch_size, depth=self.depth)
        for size in self.image:
            if not found and (size < self.patch_size or size % self.patch_size):
                found.append(f"img_size={self.img_size}: must be a multiple of patch_size={self.patch_size}")
        given = self.attn_keep_rate_list
        if given is not None and len(given) < self.depth:
            found.append(f"attn_keep_rate_list={list(given)}: needs one share for each of {self.depth} blocks")
        return found

    @property
    def image(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.img_size if isinstance(self.img_size, tuple) else (self.img_size, self.img_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the images in patches."""
        return self.image[0] // self.patch_size, self.image[1] // self.patch_size

    def model(self, stem: tuple[ConvNorm, ...], cfg: Cfg, block: BlockStyle, **more: Any) -> IsotropicConfig:
        """Our configuration."""
        mixes = []
        names = ("num_heads", "reduce_n_factor", "reduce_c_factor", "share_inout_proj", "qkv_bias", "qk_scale")
        for keep in (self.attn_keep_rate_list or (0.25,) * self.depth)[: self.depth]:
            layer = Attention(
                dim=self.embed_dim,
                num_tokens=math.prod(self.grid) + 1,
                attn_keep_rate=keep,
                **{name: getattr(self, name) for name in names},
            )
            mixes.append(layer.mix(cfg, self.grid))
        return IsotropicConfig(
            stem,
            self.depth,
            mixes[0] if len(set(mixes)) == 1 else tuple(mixes),
            block=block,
            img_size=self.image,
            in_chans=self.in_chans,
            num_classes=self.num_classes,
            drop_path=self.drop_path_rate,
            **more,
        )


@dataclass(frozen=True, kw_only=True)
class Sparsifiner(_Model):
    """The arguments of the authors' `Sparsifiner`, in the shapes of DeiT."""

    kind: ClassVar[str] = "sparsifiner"

    token_keep_rate_list: tuple[float, ...] | None = None
    token_pruning_loc_indicator: tuple[bool, ...] | None = None

    def problems(self) -> list[str]:
        found = super().problems()
        for name in ("token_keep_rate_list", "token_pruning_loc_indicator"):
            given = getattr(self, name)
            if given is not None and len(given) < self.depth:
                found.append(f"{name}={list(given)}: needs one entry for each of {self.depth} blocks")
        if self.token_pruning_loc_indicator and any(self.token_pruning_loc_indicator) and not self.token_keep_rate_list:
            found.append("token_pruning_loc_indicator=...: needs token_keep_rate_list")
        if not found:
            rates = self._rates()
            if not all(0 < rate <= 1 for rate in rates):
                found.append(f"token_keep_rate_list={list(self.token_keep_rate_list or ())}: shares must be in (0, 1]")
            elif any(after > before for before, after in itertools.pairwise(rates)):
                # Their code would take tokens back that are gone, any of them.
                found.append(
                    f"token_keep_rate_list={list(self.token_keep_rate_list or ())}: must not grow where it prunes"
                )
        return found

    def _rates(self) -> list[float]:
        """Shares at the blocks that prune."""
        rates, places = self.token_keep_rate_list or (), self.token_pruning_loc_indicator or ()
        return [rate for rate, here in zip(rates[: self.depth], places, strict=False) if here]

    def keep_tokens(self) -> tuple[float, ...]:
        """Our shares of tokens that each block hands on."""
        count = math.prod(self.grid)
        places, rates = self.token_pruning_loc_indicator or (False,) * self.depth, iter(self._rates())
        kept, shares = count, []
        for here in places[: self.depth]:
            kept = math.ceil(next(rates) * count) if here else kept
            shares.append(kept / count)
        return () if kept == count else tuple(shares)

    def config(self, cfg: Cfg, norm_eps: float | None) -> IsotropicConfig:
        """Our configuration."""
        stem = (ConvNorm(self.embed_dim, self.patch_size, self.patch_size, padding=0, norm="none"),)
        style = BlockStyle(mlp_ratio=self.mlp_ratio, norm_eps=norm_eps or 1e-6)
        return self.model(stem, cfg, style, keep_tokens=() if cfg.USE_ATTN_RECON else self.keep_tokens())


@dataclass(frozen=True, kw_only=True)
class SparsifinerLVViT(_Model):
    """The arguments of the authors' `SparsifinerLVViT`, in the shapes of LV-ViT."""

    kind: ClassVar[str] = "sparsifiner_lvvit"

    qkv_bias: bool = False
    drop_path_decay: Literal["linear"] = "linear"
    p_emb: str = "4_2"
    skip_lam: float = 1.0
    order: tuple[Literal["tr"], ...] | None = None
    return_dense: bool = False

    def problems(self) -> list[str]:
        found = super().problems()
        if not self.return_dense:
            found.append("return_dense=False: their model needs its second classifier; give return_dense=True")
        if self.order is not None and len(self.order) != self.depth:
            found.append(f"order={list(self.order)}: names {len(self.order)} blocks, but depth={self.depth}")
        if self.p_emb in ("4_2", "4_2_128") and self.patch_size % 2:
            found.append(f"patch_size={self.patch_size}: must be even, for the first convolution halves the image")
        return found

    def config(self, cfg: Cfg, norm_eps: float | None) -> IsotropicConfig:
        """Our configuration."""
        stem = (ConvNorm(self.embed_dim, self.patch_size, self.patch_size, padding=0, norm="none"),)
        if self.p_emb in ("4_2", "4_2_128"):
            half = self.patch_size // 2
            patches = ConvNorm(self.embed_dim, half, half, padding=0, norm="none")
            stem = (*lv_vit_stem(64 if self.p_emb == "4_2" else 128), patches)
        style = BlockStyle(mlp_ratio=self.mlp_ratio, norm_eps=norm_eps or 1e-5, residual_scale=self.skip_lam)
        return self.model(stem, cfg, style, aux_head=True)


def configuration(arguments: type[Sparsifiner | SparsifinerLVViT], hparams: Mapping[str, Any]) -> IsotropicConfig:
    """Our configuration for the authors' arguments and configuration."""
    given, cfg, eps = split(hparams)
    return arguments.from_dict(given).config(cfg, eps)

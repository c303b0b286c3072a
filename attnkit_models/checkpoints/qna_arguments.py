"""The arguments of QnA's authors' constructors, and our options for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from attnkit.options import Options, odd, positive
from attnkit.primitives import LearnedQuery, LearnedUpsample, Window
from attnkit_models import qna
from attnkit_models.backbones import PyramidConfig
from attnkit_models.backbones.config import ModelConfig

# The authors' ways of weighing queries, under our names.
GAINS = {
    "normal": "window",
    "normal_elementwise": "query",
    "posneg": "signs",
    "ones": "window_ones",
    "avg": "mean",
    "none": "none",
}
GainName = Literal["normal", "normal_elementwise", "posneg", "ones", "avg", "none"]

# What the authors' code takes and does not use, or uses in training alone.
UNUSED = ("qna_attention_dropout", "mlp_ratio", "mlp_dropout", "activation_fn")
TRAINING = ("lsa_attention_dropout", "drop_path_downsample")
MODULE = ("train", "dtype", "precision", "kernel_init", "bias_init")


@dataclass(frozen=True, kw_only=True)
class Architecture(Options):
    """The `config` of the authors' `QnAViT`, with their defaults."""

    kind: ClassVar[str] = "config"

    n_stages: int = 4
    base_dim: int = 64
    qna_heads: tuple[int, ...] = (8, 16, 32, 64)
    qna_receptive_field: tuple[int, ...] = (3, 3, 3, 3)
    qna_layers: tuple[int, ...] = (1, 1, 1, 1)
    qna_pos_embedding_type: Literal["relative_pos", "none"] = "relative_pos"
    qna_attention_scale: GainName = "normal"
    qna_implementation: Literal["fused_efficient"] = "fused_efficient"
    qna_num_queries: int = 2
    qna_normalize_q: tuple[bool, ...] = (False, False, False, False)
    qna_normalize_stop_grads: bool = False
    qna_down_skip: Literal["conv1x1"] = "conv1x1"
    lsa_layers: tuple[int, ...] = (0, 0, 4, 2)
    lsa_window: tuple[int, ...] = (7, 7, 14, 7)
    lsa_heads: tuple[int, ...] = (2, 4, 8, 16)
    lsa_pos_embedding_type: str = "relative_pos"
    classification_head_type: Literal["gap"] = "gap"
    stem_type: Literal["patch"] = "patch"
    drop_path: float = 0.0
    layer_scale: float | None = None

    def problems(self) -> list[str]:
        found = positive(n_stages=self.n_stages, base_dim=self.base_dim)
        for name in (
            "qna_heads",
            "qna_receptive_field",
            "qna_layers",
            "qna_normalize_q",
            "lsa_layers",
            "lsa_window",
            "lsa_heads",
        ):
            given = getattr(self, name)
            if len(given) < self.n_stages:
                found.append(f"{name}={list(given)}: needs one entry for each of {self.n_stages} stages")
        for name, heads in (("qna_heads", self.qna_heads), ("lsa_heads", self.lsa_heads)):
            for at, one in enumerate(heads[: self.n_stages]):
                if one < 1 or (self.base_dim << at) % one:
                    found.append(f"{name}={list(heads)}: {self.base_dim << at} channels do not divide into {one} heads")
        return found

    def model(self, **options: Any) -> PyramidConfig:
        """Our configuration, with the other options of `PyramidConfig`."""
        stages = []
        for at in range(self.n_stages):
            width, heads = self.base_dim << at, self.qna_heads[at]
            if self.lsa_layers[at]:
                biased = self.lsa_pos_embedding_type == "relative_pos"
                window = Window(self.lsa_heads[at], self.lsa_window[at], relative_bias=biased)
                stages.append(qna.window_stage(width, self.lsa_layers[at], window))
            if self.qna_layers[at]:
                stages.append(qna.query_stage(width, self.qna_layers[at], self._group(at, heads, 1)))
            if at < self.n_stages - 1:
                stages.append(qna.query_stage(width, 1, self._group(at, 2 * heads, 2)))
        return qna.pyramid(stages, drop_path=self.drop_path, layer_scale=self.layer_scale, **options)

    def _group(self, at: int, heads: int, stride: int) -> LearnedQuery:
        return LearnedQuery(
            heads,
            self.qna_receptive_field[at],
            stride=stride,
            queries=self.qna_num_queries,
            query_norm=query_norm(self.qna_normalize_q[at], self.qna_normalize_stop_grads),
            relative_bias=self.qna_pos_embedding_type == "relative_pos",
            gain=GAINS[self.qna_attention_scale],  # type: ignore[arg-type]
        )


def query_norm(normalize: bool, stop_gradients: bool) -> Literal["unit", "unit_detached", "none"]:
    """Our option for two of theirs."""
    if not normalize:
        return "none"
    return "unit_detached" if stop_gradients else "unit"


@dataclass(frozen=True)
class QnAViT(Options):
    """The arguments of the authors' `QnAViT`, and what flax takes from the images."""

    kind: ClassVar[str] = "qna_vit"

    num_classes: int
    config: Architecture
    img_size: int | tuple[int, int] = 224
    in_chans: int = 3


def qna_config(hparams: Mapping[str, Any]) -> ModelConfig:
    """Our configuration for the authors' arguments."""
    given = {name: value for name, value in hparams.items() if name not in MODULE}
    inner = given.get("config")
    if isinstance(inner, Mapping):
        given["config"] = {name: value for name, value in inner.items() if name not in (*UNUSED, *TRAINING)}
    theirs = QnAViT.from_dict(given)
    options: dict[str, Any] = {"num_classes": theirs.num_classes, "img_size": theirs.img_size}
    if not theirs.num_classes:
        # Without classes their model ends with the last stage's map.
        options |= {"final_norm": "none", "global_pool": ""}
    return theirs.config.model(in_chans=theirs.in_chans, **options)


@dataclass(frozen=True, kw_only=True)
class LayerArguments(Options):
    """What the authors' `FusedKQnA` takes and their block hands on to it."""

    features: int
    heads: int
    kernel_size: int
    stride: int = 1
    padding: int | None = None
    n_queries: int = 2
    attn_scale: GainName = "normal"
    pos_embedding_type: Literal["relative_pos", "none"] = "relative_pos"
    scale_rpe_bias: bool = False
    normalize_q: bool = True
    qna_normalize_stop_grads: bool = False

    def problems(self) -> list[str]:
        found = positive(features=self.features, heads=self.heads, stride=self.stride, n_queries=self.n_queries)
        found += odd(kernel_size=self.kernel_size)
        if not found and self.features % self.heads:
            found.append(f"features={self.features}: must divide into heads={self.heads}")
        if self.attn_scale == "posneg" and self.n_queries * self.heads % 2:
            found.append(f"attn_scale='posneg': {self.n_queries} queries of {self.heads} heads have no half")
        if self.padding not in (None, (self.kernel_size - 1) // 2):
            found.append(
                f"padding={self.padding}: attnkit's windows lie around their place, "
                f"so kernel_size={self.kernel_size} needs {(self.kernel_size - 1) // 2}"
            )
        return found

    def group(self, *, key_bias: bool = False) -> LearnedQuery:
        """Our options."""
        biased = self.pos_embedding_type == "relative_pos"
        return LearnedQuery(
            self.heads,
            self.kernel_size,
            stride=self.stride,
            queries=self.n_queries,
            query_norm=query_norm(self.normalize_q, self.qna_normalize_stop_grads),
            relative_bias=biased,
            scaled_bias=biased and self.scale_rpe_bias,
            key_bias=key_bias,
            gain=GAINS[self.attn_scale],  # type: ignore[arg-type]
        )


@dataclass(frozen=True, kw_only=True)
class FusedKQnA(LayerArguments):
    """The arguments of the authors' `FusedKQnA`."""

    kind: ClassVar[str] = "FusedKQnA"

    out_features: int | None = None
    use_bias: bool = False


@dataclass(frozen=True, kw_only=True)
class QnAUpsample(FusedKQnA):
    """The arguments of a `FusedKQnA` whose queries give a finer map, and by how much: `scale` ** 2 queries."""

    kind: ClassVar[str] = "QnAUpsample"

    scale: int = 2

    def problems(self) -> list[str]:
        found = super().problems() + positive(scale=self.scale)
        if self.stride not in (1, self.scale):
            found.append(f"stride={self.stride}: a map that becomes scale={self.scale} times finer has no other stride")
        if self.n_queries not in (1, self.scale**2):
            found.append(f"n_queries={self.n_queries}: every output has one, so there are scale ** 2 = {self.scale**2}")
        if self.attn_scale == "posneg":
            found.append("attn_scale='posneg': nothing is taken away from an output of one query")
        return found

    def upsampling(self) -> LearnedUpsample:
        """Our options."""
        one = dataclasses.replace(self, stride=1, n_queries=1, attn_scale="normal").group(key_bias=self.use_bias)
        shared = {name: getattr(one, name) for name in ("query_norm", "relative_bias", "scaled_bias", "key_bias")}
        # The mean of one query is the query.
        gain = "none" if self.attn_scale == "avg" else GAINS[self.attn_scale]
        return LearnedUpsample(self.heads, self.kernel_size, scale=self.scale, gain=gain, **shared)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class QnABlock(LayerArguments):
    """The arguments of the authors' block around a `FusedKQnA`."""

    kind: ClassVar[str] = "QnABlock"

    in_features: int | None = None
    mlp_ratio: float = 4.0
    layer_scale: float | None = None
    drop_path: float = 0.0


@dataclass(frozen=True, kw_only=True)
class MultiHeadSelfAttention(Options):
    """The arguments of the authors' `MultiHeadSelfAttention`."""

    kind: ClassVar[str] = "MultiHeadSelfAttention"

    features: int
    heads: int
    output_features: int | None = None
    use_bias: bool = False
    use_relative_pe: bool = True
    window_size: int | tuple[int, int] | None = None

    def problems(self) -> list[str]:
        found = positive(features=self.features, heads=self.heads)
        if not found and self.features % self.heads:
            found.append(f"features={self.features}: must divide into heads={self.heads}")
        if self.use_relative_pe and self.window_size is None:
            found.append("use_relative_pe=True: needs window_size, the window's side in tokens")
        return found


def without(hparams: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Arguments but for those that change nothing: what any flax module takes, and some more."""
    return {name: value for name, value in hparams.items() if name not in (*MODULE, *names)}

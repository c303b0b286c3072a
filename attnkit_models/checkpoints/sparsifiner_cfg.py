"""The configuration of Sparsifiner's authors, as far as their layers read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from attnkit.errors import ConfigError, shown
from attnkit.options import Options, positive

# What their constructors take and do not use, or use in training alone.
UNUSED = ("drop_rate", "attn_drop_rate", "attn_drop", "proj_drop", "distill", "mix_token")
# Parts of the configuration that the constructors were already given, that only report, or that nothing reads.
UNREAD = ("REDUCE_N_FACTOR", "REDUCE_C_FACTOR", "SHARE_INOUT_PROJ", "ATTN_KEEP_RATE", "ATTN_KEEP_RATE_LIST")
UNREAD += ("TOKEN_KEEP_RATE_BASE", "TOKEN_PRUNING_LOC", "PRUNE_ATTN_MATRIX_COL", "SLOW_FAST_PATH", "ZERO_OUT_PRUNED")
UNREAD += ("OUT_BASIS_SPARSITY", "OUT_BASIS_COEF_SPARSITY", "OUT_ATTN_MASK_SPARSITY", "ARCH", "ARCH_2", "POST_SOFTMAX")
UNREAD += ("TRAIN_MASK_PREDICTOR_ONLY", "TRAIN_STRATEGY", "TOPK_NUM_SAMPLES", "TOPK_SIGMA_INIT", "TOPK_SIGMA_MAX")
UNREAD += ("TOPK_SIGMA_DECAY",)


@dataclass(frozen=True, kw_only=True)
class Coefficients(Options):
    """Which basis rows count: the `TOPK` with the largest coefficients, or those above a threshold."""

    kind: ClassVar[str] = "BASIS_COEF"

    USE_TOPK: bool = True
    TOPK: int = 8
    THRESHOLD: float = 0.05

    def problems(self) -> list[str]:
        return positive(TOPK=self.TOPK)


@dataclass(frozen=True, kw_only=True)
class Scores(Options):
    """Which keys are seen: a budget of the best, or those above a threshold."""

    kind: ClassVar[str] = "ATTN_SCORE"

    USE_TOPK: bool = True
    THRESHOLD: float = 1e-4

    def problems(self) -> list[str]:
        if not self.USE_TOPK and self.THRESHOLD <= 0:
            return [f"THRESHOLD={self.THRESHOLD}: must be > 0 where USE_TOPK=False; their code stops otherwise"]
        return []


@dataclass(frozen=True, kw_only=True)
class Cfg(Options):
    """What the layers read of the authors' configuration; defaults are those of the one they publish."""

    kind: ClassVar[str] = "cfg"

    BASIS_THRESHOLD: float = 0.02
    BASIS_COEF: Coefficients = field(default_factory=Coefficients)
    ATTN_SCORE: Scores = field(default_factory=Scores)
    PRUNE_ATTN_MATRIX_ROW: bool = False
    USE_ATTN_RECON: bool = False


def split(hparams: Mapping[str, Any]) -> tuple[dict[str, Any], Cfg, float | None]:
    """The constructor's arguments, the configuration, and the epsilon of the norms where one is given.

    Args:
        hparams: `{"ctor": arguments, "cfg": configuration}`, or the arguments with the configuration under `cfg`. That
            may have the parts `SPAR` and `LOSS`, as theirs, or be what `SPAR` holds and `USE_ATTN_RECON`.
    """
    inner = hparams.get("ctor", hparams)
    cfg = hparams.get("cfg", inner.get("cfg") if isinstance(inner, Mapping) else None)
    cfg = {} if cfg is None else cfg
    for name, value in (("ctor", inner), ("cfg", cfg)):
        if not isinstance(value, Mapping):
            raise ConfigError(f"hparams[{name!r}] is a dict of names to values, but got {shown(value)}")
    unknown = [name for name in hparams if name not in ("ctor", "cfg")] if "ctor" in hparams else []
    if unknown:
        raise ConfigError(f"hparams are 'ctor' and 'cfg', but there is {shown(unknown[0])} as well")
    if "SPAR" in cfg:
        loss = cfg.get("LOSS") or {}
        cfg = {**cfg["SPAR"], "USE_ATTN_RECON": loss.get("USE_ATTN_RECON", False)}
    cfg = {name: value for name, value in cfg.items() if name not in UNREAD}
    given = {name: value for name, value in inner.items() if name not in (*UNUSED, "cfg", "norm_layer")}
    return given, Cfg.from_dict(cfg), _epsilon(inner.get("norm_layer"))


def _epsilon(norm_layer: Any) -> float | None:
    if norm_layer is None:
        return None
    if isinstance(norm_layer, str) and norm_layer.rpartition(".")[2] == "LayerNorm":
        return 1e-5
    eps = getattr(norm_layer(1), "eps", None) if callable(norm_layer) else None
    if not isinstance(eps, float):
        raise ConfigError(f"norm_layer={shown(norm_layer)}: must be a layer norm, 'LayerNorm', or None")
    return eps

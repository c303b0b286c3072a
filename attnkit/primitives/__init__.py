"""Primitives: one file per way of choosing keys, with its options, its head group and its paper."""

from attnkit.primitives.base import (
    BuildContext,
    Columns,
    HeadGroup,
    HeadInputs,
    HeadOutput,
    Plan,
    PrimitiveOptions,
    SoftmaxHeads,
    SoftmaxOptions,
)
from attnkit.primitives.conv import Conv
from attnkit.primitives.cross_shaped import CrossShaped
from attnkit.primitives.dense import Dense
from attnkit.primitives.learned_query import LearnedQuery
from attnkit.primitives.learned_upsample import LearnedUpsample
from attnkit.primitives.linformer import Linformer
from attnkit.primitives.mask_predictor import MaskPredictor
from attnkit.primitives.neighborhood import Neighborhood
from attnkit.primitives.pooled_global import PooledGlobal
from attnkit.primitives.random_window import RandomWindow
from attnkit.primitives.topk_region import TopKRegion
from attnkit.primitives.window import Window

__all__ = [
    "BuildContext",
    "Columns",
    "Conv",
    "CrossShaped",
    "Dense",
    "HeadGroup",
    "HeadInputs",
    "HeadOutput",
    "LearnedQuery",
    "LearnedUpsample",
    "Linformer",
    "MaskPredictor",
    "Neighborhood",
    "Plan",
    "PooledGlobal",
    "PrimitiveOptions",
    "RandomWindow",
    "SoftmaxHeads",
    "SoftmaxOptions",
    "TopKRegion",
    "Window",
]

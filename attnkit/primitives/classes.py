"""The primitives by name, for type checkers alone: what runs finds them in the registry's table."""

from attnkit.primitives.competing_mask_predictor import CompetingMaskPredictor
from attnkit.primitives.conv import Conv
from attnkit.primitives.cross_shaped import CrossShaped
from attnkit.primitives.dense import Dense
from attnkit.primitives.learned_query import LearnedQuery
from attnkit.primitives.learned_upsample import LearnedUpsample
from attnkit.primitives.linformer import Linformer
from attnkit.primitives.mask_predictor import MaskPredictor
from attnkit.primitives.mask_reconstruction import MaskReconstruction
from attnkit.primitives.neighborhood import Neighborhood
from attnkit.primitives.padded_topk_region import PaddedTopKRegion
from attnkit.primitives.pooled_global import PooledGlobal
from attnkit.primitives.random_window import RandomWindow
from attnkit.primitives.soft_topk_region import SoftTopKRegion
from attnkit.primitives.threshold_mask_predictor import ThresholdMaskPredictor
from attnkit.primitives.topk_region import TopKRegion
from attnkit.primitives.window import Window

__all__ = [
    "CompetingMaskPredictor",
    "Conv",
    "CrossShaped",
    "Dense",
    "LearnedQuery",
    "LearnedUpsample",
    "Linformer",
    "MaskPredictor",
    "MaskReconstruction",
    "Neighborhood",
    "PaddedTopKRegion",
    "PooledGlobal",
    "RandomWindow",
    "SoftTopKRegion",
    "ThresholdMaskPredictor",
    "TopKRegion",
    "Window",
]

"""Backbones: the two shapes that all recipes have, a row of equal blocks and a pyramid."""

from attnkit_models.backbones.features import FeatureInfo
from attnkit_models.backbones.isotropic import IsotropicConfig, IsotropicModel
from attnkit_models.backbones.pyramid import PyramidConfig, PyramidModel, Stage
from attnkit_models.backbones.stem import ConvNorm
from attnkit_models.backbones.vision_model import FeaturesOnly, VisionModel

__all__ = [
    "ConvNorm",
    "FeatureInfo",
    "FeaturesOnly",
    "IsotropicConfig",
    "IsotropicModel",
    "PyramidConfig",
    "PyramidModel",
    "Stage",
    "VisionModel",
]

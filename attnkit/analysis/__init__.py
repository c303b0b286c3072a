"""Analysis: pictures of patterns and of attention, costs, backends and reach."""

from attnkit.analysis.attention import draw_attention
from attnkit.analysis.counting import FlopCount, LayerCount, flops
from attnkit.analysis.explaining import Explained, Explanation, explain
from attnkit.analysis.influence import reach
from attnkit.analysis.pictures import draw

__all__ = [
    "Explained",
    "Explanation",
    "FlopCount",
    "LayerCount",
    "draw",
    "draw_attention",
    "explain",
    "flops",
    "reach",
]

"""Colours of all pictures: they say how keys are chosen, and can be told apart by eyes that see fewer colours."""

from __future__ import annotations

INK = "#1c2127"
MUTED = "#68707a"
UNSEEN = "#e8ebee"
PAPER = "#ffffff"

BY_PLACE = "#0072b2"
BY_CHANCE = "#d55e00"
BY_CONTENT = "#9a3d86"
EVERYTHING = "#00845f"
OWN = "#4a5a6a"

MEANINGS = {
    BY_PLACE: "chosen by place",
    BY_CHANCE: "chosen by chance",
    BY_CONTENT: "chosen by content",
    EVERYTHING: "all, whole or summarised",
}

_COLOURS = {
    "competing_mask_predictor": BY_CONTENT,
    "conv": BY_PLACE,
    "cross_shaped": BY_PLACE,
    "dense": EVERYTHING,
    "learned_query": BY_PLACE,
    "learned_upsample": BY_PLACE,
    "linformer": EVERYTHING,
    "mask_predictor": BY_CONTENT,
    "mask_reconstruction": EVERYTHING,
    "neighborhood": BY_PLACE,
    "padded_topk_region": BY_CONTENT,
    "pooled_global": EVERYTHING,
    "random_window": BY_CHANCE,
    "soft_topk_region": BY_CONTENT,
    "threshold_mask_predictor": BY_CONTENT,
    "topk_region": BY_CONTENT,
    "window": BY_PLACE,
}

SKY, GROUND, THING = "#cfe3f2", "#b9bfae", "#f0b64a"


def colour_of(kind: str) -> str:
    """The colour of a primitive; a neutral one for other people's."""
    return _COLOURS.get(kind, OWN)


def channels(colour: str) -> tuple[float, float, float]:
    """`"#rrggbb"` as red, green and blue in 0..1."""
    red, green, blue = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return red, green, blue

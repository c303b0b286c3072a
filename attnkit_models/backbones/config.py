"""What the configurations of both backbones have in common."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

from attnkit.blocks import BlockStyle
from attnkit.options import Options, positive

# Deeper than any model there is; a mistyped number would otherwise be built block by block without end.
MOST_BLOCKS = 1000


@dataclass(frozen=True)
class ModelConfig(Options):
    """Options of every model.

    Args:
        num_classes: number of classes, >= 0; 0 leaves the classifier out.
        in_chans: channels of the images, >= 1.
        img_size: size the model is made for in pixels, one number or (height, width); other sizes run as well.
        global_pool: `"avg"`, `"token"` (isotropic models with a class token) or `""` for no pooling.
        drop_path: drop rate of the last block; it rises evenly from 0.
        block: what the blocks are like beside their mixes.
        init: start of the linear layers, `"trunc_normal"` of standard deviation 0.02 or `"lecun_normal"` of variance
            1 / inputs, which also starts the convolutions.
        eval_draws: random draws over which evaluation averages the logits, >= 1; every one costs a whole pass, and they
            differ only in models with random windows.
        features_only: build a backbone that returns a list of feature maps.
        out_indices: the feature levels it returns; all where not given.
    """

    _: KW_ONLY
    num_classes: int = 1000
    in_chans: int = 3
    img_size: int | tuple[int, int] = 224
    global_pool: Literal["avg", "token", ""] = "avg"
    drop_path: float = 0.0
    block: BlockStyle = field(default_factory=BlockStyle)
    init: Literal["trunc_normal", "lecun_normal"] = "trunc_normal"
    eval_draws: int = 1
    features_only: bool = False
    out_indices: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.img_size, int) and not isinstance(self.img_size, bool):
            object.__setattr__(self, "img_size", (self.img_size, self.img_size))
        super().__post_init__()

    def problems(self) -> list[str]:
        found = positive(in_chans=self.in_chans, eval_draws=self.eval_draws)
        if self.num_classes < 0:
            found.append(f"num_classes={self.num_classes}: must be >= 0")
        if isinstance(self.img_size, tuple) and min(self.img_size) < 1:
            found.append(f"img_size={self.img_size}: must be at least 1 x 1 pixels")
        if not 0 <= self.drop_path < 1:
            found.append(f"drop_path={self.drop_path}: must be a probability in [0, 1)")
        if self.num_classes and not self.global_pool and not self.features_only:
            found.append(
                f"global_pool='': num_classes={self.num_classes} need pooled features; use 'avg' or num_classes=0"
            )
        if self.out_indices is not None and not self.features_only:
            found.append(f"out_indices={self.out_indices}: goes with features_only=True")
        return found

    @property
    def image(self) -> tuple[int, int]:
        """`img_size` as (height, width)."""
        size = self.img_size
        return size if isinstance(size, tuple) else (size, size)


def block_count(depth: int) -> list[str]:
    """Problems for a number of blocks."""
    if depth > MOST_BLOCKS:
        return [f"depth={depth}: must be <= {MOST_BLOCKS} blocks"]
    return positive(depth=depth)

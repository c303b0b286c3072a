"""How to train: every hyper-parameter with its default, in one dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from attnkit.cli.sizes import LARGEST
from attnkit.options import Options, positive

# What may differ between a run and its continuation: none of it changes a weight.
FREE_ON_RESUME = ("workers",)


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Options):
    """Options of `attnkit train`; the defaults suit the handwritten digits on a laptop.

    Args:
        epochs: passes over the training images, >= 1.
        batch_size: images in one forward pass over all processes together, >= 1; an optimizer step sees
            `batch_size * grad_accum` images.
        lr: peak learning rate of AdamW, > 0.
        weight_decay: decoupled weight decay, >= 0; vectors and `model.no_weight_decay()` are spared.
        warmup: epochs of linear warm-up before the cosine, >= 0 and < epochs; None takes a tenth of the epochs, but at
            most 2.
        label_smoothing: share of each label spread over all classes, in [0, 1).
        clip_grad: largest gradient norm, >= 0; 0 clips nothing.
        augment: shift, turn, zoom (and mirror, for image folders) the training images.
        seed: fixes initial weights, data order and augmentation.
        img_size: height and width in pixels; None takes 32 for the digits and the model's own for a folder.
        mixed_precision: "auto" follows `accelerate launch`, and is "no" without it.
        grad_accum: forward passes an optimizer step, >= 1.
        workers: processes that load images, >= 0; 0 loads in the training process.
    """

    kind: ClassVar[str] = "train"

    epochs: int = 20
    batch_size: int = 64
    lr: float = 2e-3
    weight_decay: float = 0.05
    warmup: float | None = None
    label_smoothing: float = 0.1
    clip_grad: float = 1.0
    augment: bool = True
    seed: int = 0
    img_size: int | tuple[int, int] | None = None
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    grad_accum: int = 1
    workers: int = 0

    @property
    def warmup_epochs(self) -> float:
        """Epochs of warm-up: `warmup`, or what fits the epochs where it is not given."""
        return min(2.0, self.epochs / 10) if self.warmup is None else self.warmup

    def problems(self) -> list[str]:
        found = positive(epochs=self.epochs, batch_size=self.batch_size, grad_accum=self.grad_accum)
        sizes = self.img_size if isinstance(self.img_size, tuple) else (self.img_size,)
        if any(size is not None and not 1 <= size <= LARGEST for size in sizes):
            found.append(f"img_size={self.img_size}: must be 1 to {LARGEST} pixels a side")
        if not 0 < self.lr < float("inf"):
            found.append(f"lr={self.lr}: must be > 0, such as 0.001")
        if not 0 <= self.weight_decay < float("inf"):
            found.append(f"weight_decay={self.weight_decay}: must be >= 0")
        if self.epochs >= 1 and not 0 <= self.warmup_epochs < self.epochs:
            found.append(f"warmup={self.warmup}: must be >= 0 and less than epochs={self.epochs}")
        if not 0 <= self.label_smoothing < 1:
            found.append(f"label_smoothing={self.label_smoothing}: must be in [0, 1)")
        if not 0 <= self.clip_grad < float("inf"):
            found.append(f"clip_grad={self.clip_grad}: must be >= 0 (0 clips nothing)")
        if not 0 <= self.seed < 2**63:
            found.append(f"seed={self.seed}: must be in [0, 2**63)")
        if self.workers < 0:
            found.append(f"workers={self.workers}: must be >= 0")
        return found

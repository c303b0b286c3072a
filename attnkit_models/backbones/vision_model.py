"""VisionModel: the conventions of timm that every model here follows."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnkit.blocks import Block
from attnkit.errors import ConfigError, ShapeError, shown
from attnkit.grid import Grid
from attnkit.heads import MixOutput
from attnkit.kernels.precision import autocasting
from attnkit_models.backbones.config import ModelConfig
from attnkit_models.backbones.features import FeatureInfo, take_indices

NO_DECAY = ("pos_embed", "cls_token", "relative_bias", "gain")


ConfigT = TypeVar("ConfigT", bound=ModelConfig)


class VisionModel(nn.Module, ABC, Generic[ConfigT]):
    """An image classifier and backbone: (B, in_chans, H, W) -> (B, num_classes), for any H and W.

    Attributes:
        config: the options it was built from.
        num_classes: number of classes, 0 for no classifier.
        num_features: channels of the last feature map.
        feature_info: the feature levels.
    """

    config: ConfigT
    head: nn.Module
    feature_info: FeatureInfo

    def __init__(self, config: ConfigT) -> None:
        super().__init__()
        self.config = config
        self.num_classes = config.num_classes
        self.in_chans = config.in_chans
        self.img_size = config.image
        self.global_pool: str = config.global_pool
        self.num_features: int = 0
        self.grad_checkpointing = False

    @property
    def head_hidden_size(self) -> int:
        """Channels that the classifier gets."""
        return self.num_features

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """What timm's tools ask of a model: its sizes, and the names of its first convolution and its classifier."""
        return {
            "num_classes": self.num_classes,
            "input_size": (self.in_chans, *self.img_size),
            "fixed_input_size": False,
            "first_conv": "stem.0.conv",
            "classifier": "head",
        }

    @abstractmethod
    def levels(self, x: Tensor, draw: Tensor | None = None) -> Iterator[tuple[Tensor, Grid]]:
        """Yields tokens (B, N, C) and their grid at the end of every feature level, without the final norm.

        Args:
            x: images (B, in_chans, H, W).
            draw: number of the random draw of all layers; each layer's own count where not given.
        """

    @abstractmethod
    def finish(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Applies the final norm to the last level's tokens and brings them to the form of `forward_features`."""

    @abstractmethod
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools features and classifies them; `pre_logits=True` stops before the classifier."""

    @abstractmethod
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into layers, for layer-wise learning rates."""

    def forward(self, x: Tensor) -> Tensor:
        draws = 1 if self.training else self.config.eval_draws
        if draws == 1:
            return self.forward_head(self.forward_features(x))
        # Evaluation's own draw comes before the first of training.
        numbers = torch.arange(-1, draws - 1, device=x.device)
        return torch.stack([self.forward_head(self._features(x, number)) for number in numbers]).mean(0)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, behind the final norm and before pooling; of evaluation's first draw only."""
        return self._features(x)

    def _features(self, x: Tensor, draw: Tensor | None = None) -> Tensor:
        self.check_images(x)
        last: tuple[Tensor, Grid] | None = None
        for last in self.levels(x, draw):  # noqa: B007 - only the last level is kept alive
            pass
        assert last is not None
        return self.finish(*last)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Feature maps of several levels.

        Args:
            x: images (B, in_chans, H, W).
            indices: which levels: a list (negative counts from the end), a number n for the last n, None for all.
            norm: apply the final norm to the last level where it is among them.
            stop_early: stop at the last level asked for (only with `intermediates_only`).
            output_fmt: `"NCHW"` maps or `"NLC"` tokens without prefix.
            intermediates_only: return the list alone.

        Returns:
            (features, [map, ...]) with `forward_features`'s features first, or only the list.

        Raises:
            ConfigError: for a level that does not exist or another format.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ConfigError(f"output_fmt must be 'NCHW' or 'NLC', but got {shown(output_fmt)}")
        self.check_images(x)
        wanted = take_indices(len(self.feature_info), indices)
        maps: dict[int, Tensor] = {}
        tokens, grid = x, None
        for level, (tokens, grid) in enumerate(self.levels(x)):
            if level in wanted:
                last = level == len(self.feature_info) - 1
                chosen = self.normed(tokens, grid) if norm and last else tokens
                image = chosen[:, grid.prefix :]
                maps[level] = image.transpose(1, 2).unflatten(2, grid.sizes) if output_fmt == "NCHW" else image
            if stop_early and intermediates_only and level == max(wanted):
                break
        found = [maps[level] for level in wanted]
        if intermediates_only:
            return found
        assert grid is not None
        return self.finish(tokens, grid), found

    @abstractmethod
    def normed(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Tokens behind the final norm, still as (B, N, C)."""

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier; 0 classes remove it.

        Args:
            num_classes: number of classes, >= 0.
            global_pool: `"avg"`, `"token"` (where there is a class token) or `""` for no pooling; None keeps it.
        """
        if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 0:
            raise ConfigError(f"num_classes must be an integer >= 0, but got {shown(num_classes)}")
        changes: dict[str, Any] = {"num_classes": num_classes}
        if global_pool is not None:
            changes["global_pool"] = global_pool
        self.config = dataclasses.replace(self.config, **changes)
        self.num_classes = num_classes
        self.global_pool = self.config.global_pool
        weight = next(self.parameters())
        self.head = make_head(self.num_features, num_classes).to(weight.device, weight.dtype)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Makes the model one for images of another size. It runs on any size without that, and gives the same.

        Learned positions are resized once, where every pass would do it: for fine-tuning at another size, before an
        optimizer gets the parameters.

        Args:
            img_size: pixels, one number or (height, width).
        """
        self.config = dataclasses.replace(self.config, img_size=img_size)
        self.img_size = self.config.image

    def get_classifier(self) -> nn.Module:
        """The classifier, `nn.Identity` where there is none."""
        return self.head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone: position tables, class token, gains."""
        return {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in NO_DECAY}

    def check_images(self, x: Tensor) -> None:
        """Raises `ShapeError` unless x is a batch of non-empty float images with the right number of channels."""
        if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != self.in_chans:
            got = tuple(x.shape) if isinstance(x, Tensor) else shown(x)
            raise ShapeError(
                f"{type(self).__name__} takes images (B, {self.in_chans}, H, W), but got {got}; "
                f"for other channels build it with in_chans=..."
            )
        if not x.shape[2] or not x.shape[3]:
            raise ShapeError(f"images must be at least 1 x 1 pixels, but got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ShapeError(
                f"images must be floating point numbers, but got {x.dtype}; convert and normalise them first"
            )
        weight = next(self.parameters())
        if x.device != weight.device:
            raise ShapeError(f"the images are on {x.device} but the model is on {weight.device}; move one of them")
        if x.dtype != weight.dtype and not autocasting(x.device):
            raise ShapeError(f"the images are {x.dtype} but the model is {weight.dtype}; convert one or use autocast")

    def run_block(self, block: nn.Module, x: Tensor, grid: Grid, draw: Tensor | None = None, **more: Any) -> MixOutput:
        """Runs one block, recomputed in the backward pass if asked for.

        Args:
            block: the block.
            x: (B, N, C).
            grid: how the tokens lie.
            draw: number of the random draw; the block's own count where not given.
            **more: further arguments of `Block.run`.
        """
        assert isinstance(block, Block)
        # Drawn out here, so that a recomputed block sees the same random windows.
        draw = block.mix.next_draw() if draw is None else draw
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block.run, x, grid, draw=draw, use_reentrant=False, **more)  # type: ignore[return-value]
        return block.run(x, grid, draw=draw, **more)


class FeaturesOnly(nn.Module):
    """A model cut down to feature maps: (B, in_chans, H, W) -> list of (B, C, H', W'), coarser and coarser.

    Args:
        model: the model.
        out_indices: the levels, negative counting from the end; all where not given.
    """

    def __init__(self, model: VisionModel[Any], out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        model.reset_classifier(0, "")
        self.model = model
        self.out_indices = take_indices(len(model.feature_info), out_indices)
        self.feature_info = FeatureInfo(model.feature_info[level] for level in self.out_indices)
        self.config = model.config

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.model.forward_intermediates(x, self.out_indices, stop_early=True, intermediates_only=True)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See `VisionModel.set_grad_checkpointing`."""
        self.model.set_grad_checkpointing(enable)


def make_head(features: int, num_classes: int) -> nn.Module:
    """A linear classifier, or nothing for 0 classes."""
    if not num_classes:
        return nn.Identity()
    head = nn.Linear(features, num_classes)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def drop_rates(rate: float, blocks: int) -> list[float]:
    """Drop-path rates that rise evenly from 0 to `rate`."""
    return [rate * at / max(blocks - 1, 1) for at in range(blocks)]


def finished(model: VisionModel[Any]) -> nn.Module:
    """The model itself, or cut down to feature maps if its options ask for that."""
    return FeaturesOnly(model, model.config.out_indices) if model.config.features_only else model

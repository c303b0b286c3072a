"""Losses of Sparsifiner's two stages, and what of a model they look at.

First the predictors alone learn to reconstruct the attention of a dense teacher, then the rest learns from labels and
from the teacher's logits and tokens while the predictors stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnkit.errors import ConfigError, ShapeError
from attnkit.kernels.precision import widened, without_autocast
from attnkit.primitives import HeadInputs, HeadOutput, SoftmaxHeads
from attnkit_models.backbones import IsotropicModel

# Weights of the terms in the authors' configuration.
RECONSTRUCTION = 0.01
LABELS, LOGITS, TOKENS = 1.0, 0.5, 0.5


def attention_reconstruction(
    guesses: Sequence[Tensor], maps: Sequence[Tensor], *, weight: float = RECONSTRUCTION
) -> Tensor:
    """How far guesses of attention maps are off: `weight * mean over layers of sum (guess - map)^2`.

    It is a sum over the batch too, as the authors have it, so that it grows with the batch.

    Args:
        guesses: of each layer, (B, heads, image queries, keys), as `Watch.guesses`.
        maps: a teacher's attention of each layer, (B, heads, N, N); the last rows and columns count, as many as there
            are in the guess. A model's own maps without a mask make this the authors' self-distillation, to which they
            give a weight of 0.05.
        weight: factor.

    Returns:
        The loss, a tensor of shape ().

    Raises:
        ShapeError: for other numbers of layers, or maps that do not fit.
    """
    if len(guesses) != len(maps) or not guesses:
        raise ShapeError(f"there are guesses of {len(guesses)} layers and maps of {len(maps)}; give one for each layer")
    total = guesses[0].new_zeros(())
    for guess, whole in zip(guesses, maps, strict=True):
        part = whole[..., -guess.shape[-2] :, -guess.shape[-1] :]
        if part.shape != guess.shape:
            raise ShapeError(f"a guess {tuple(guess.shape)} is of no attention map {tuple(whole.shape)}")
        total = total + (guess - part).square().sum()
    return weight * total / len(guesses)


def distillation(
    logits: Tensor,
    teacher_logits: Tensor,
    tokens: Tensor,
    teacher_tokens: Tensor,
    labels: Tensor,
    *,
    left: Tensor | None = None,
    weights: Mapping[str, float] | None = None,
) -> dict[str, Tensor]:
    """The terms of the second stage, each with its weight; their sum is the loss.

    `labels`: cross entropy with soft labels, mean over the batch. `logits`: KL(teacher || student), mean over the
    batch. `tokens`: mean squared difference of the last layer's image tokens, over those that are left.

    Args:
        logits: (B, classes).
        teacher_logits: (B, classes).
        tokens: (B, image tokens, C), as `distilled` gives them.
        teacher_tokens: (B, image tokens, C).
        labels: shares of the classes (B, classes), or numbers of classes (B,).
        left: bool (B, image tokens), which tokens are left where some have been pruned, or None for all.
        weights: factors of `labels`, `logits` and `tokens`, 1.0, 0.5 and 0.5 where not given; a term of weight 0 is
            left out.

    Returns:
        The terms by name, each a tensor of shape () times its weight.

    Raises:
        ConfigError: for weights of a term that there is not.
    """
    factors = {"labels": LABELS, "logits": LOGITS, "tokens": TOKENS}
    unknown = sorted(set(weights or ()) - set(factors))
    if unknown:
        raise ConfigError(f"there is no term {unknown[0]!r}; the terms are {', '.join(factors)}")
    factors |= weights or {}
    found: dict[str, Tensor] = {}
    if factors["labels"]:
        found["labels"] = F.cross_entropy(logits, labels)
    if factors["logits"]:
        student, teacher = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
        found["logits"] = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    if factors["tokens"]:
        if left is not None:
            tokens, teacher_tokens = tokens[left], teacher_tokens[left]
        found["tokens"] = F.mse_loss(tokens, teacher_tokens)
    return {name: factors[name] * one for name, one in found.items()}


def distilled(model: IsotropicModel, images: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the second stage compares: logits, image tokens, and which of them are left.

    Of a model with a second classifier (LV-ViT) the logits are those of the class token alone, and the tokens are the
    second classifier's logits of each token, as the authors have it.

    Args:
        model: student or teacher, with a class token.
        images: (B, in_chans, H, W).

    Returns:
        (B, classes), (B, image tokens, C), and bool (B, image tokens), or None for a model without `keep_tokens`.

    Raises:
        ConfigError: for a model whose logits are not those of a class token.
    """
    if model.config.global_pool != "token":
        raise ConfigError("distillation compares logits of class tokens: build the model with global_pool='token'")
    features, left = model.forward_tokens(images)
    tokens = features[:, 1:] if model.aux_head is None else model.aux_head(features[:, 1:])
    return model.head(features[:, 0]), tokens, None if left is None else left[:, 1:]


class Watch:
    """What the softmax heads of a model did in one pass, in the order of the layers."""

    def __init__(self) -> None:
        self.visits: list[tuple[SoftmaxHeads, HeadInputs, HeadOutput]] = []

    @property
    def guesses(self) -> list[Tensor]:
        """Guesses of attention maps, (B, heads, image queries, keys), of the layers of `MaskReconstruction`."""
        return [output.aux["guess"] for _, _, output in self.visits if "guess" in output.aux]

    def maps(self) -> list[Tensor]:
        """Attention maps (B, heads, N, N) as if every query saw every key that is not masked."""
        found = []
        for group, inputs, _ in self.visits:
            q, k, _ = inputs.qkv
            with without_autocast(q.device):
                logits = widened(q) @ widened(k).mT * group.scale
                if inputs.token_mask is not None:
                    logits = logits.masked_fill(~inputs.token_mask[:, None, None], -torch.inf)
                found.append(logits.softmax(-1))
        return found


@contextmanager
def watching(model: nn.Module) -> Iterator[Watch]:
    """Within it, a pass through a model tells its attention maps and the guesses of them.

    ```python
    with watching(student) as seen:
        student(images)
    with torch.no_grad(), watching(teacher) as right:
        teacher(images)
    loss = attention_reconstruction(seen.guesses, right.maps())
    ```

    Args:
        model: a model; each pass inside the block adds to what has been seen. Layers other than softmax heads are not
            seen.

    Returns:
        A context manager that gives a `Watch`, with `guesses` and `maps()`; both are there after the block too.
    """
    watch = Watch()

    def keep(group: nn.Module, given: tuple[HeadInputs], output: HeadOutput) -> None:
        assert isinstance(group, SoftmaxHeads)
        watch.visits.append((group, given[0], output))

    handles = [one.register_forward_hook(keep) for one in model.modules() if isinstance(one, SoftmaxHeads)]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()

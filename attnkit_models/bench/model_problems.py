"""Problems of whole models: inference and training steps, on attnkit and on the papers' own formulations."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import attnkit
from attnkit_models.bench.case import OURS, Contender, Problem, Setting, refused
from attnkit_models.bench.formulations.biformer_gather import NAME as BIFORMER_GATHER
from attnkit_models.bench.gate import apart, difference
from attnkit_models.bench.model_runs import IN_HALF, Trainer, Way, built, from_timm

# Models are held to attention written out on an image small enough for that. It leaves padding in the regions of every
# stage.
CHECKED_SIZE = 128
NO_GRAPH = "CUDA graphs are for GPUs only"
# What the headline calls a recipe's rival.
RIVALS = {"BiFormer gather": BIFORMER_GATHER}


def images(batch: int, size: int, seed: int) -> Tensor:
    """Random images (B, 3, size, size)."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def model_check(way: Way, setting: Setting) -> Mapping[str, float]:
    """Errors of logits and of the image's gradient against the reference backend.

    On the CPU in float64. On a GPU both in float32, where its kernels run, and with less exact limits: a few more
    digits of what came before may let a layer choose other keys. Where half precision is timed, also those of logits
    and of all weights' gradients against the same model in float32.
    """
    plain = Way(way.model, way.on)
    return {**_model_errors(plain, CHECKED_SIZE, setting), **_half_errors(plain, CHECKED_SIZE, setting)}


@functools.cache
def _model_errors(way: Way, size: int, setting: Setting) -> Mapping[str, float]:
    wide = torch.float64 if setting.device.type == "cpu" else torch.float32
    model = built(way.model, size, setting.seed).to(setting.device, wide).eval()
    image = images(1, size, setting.seed).to(setting.device, wide).requires_grad_()
    out = way.run(lambda: model(image))
    with attnkit.use_backend("reference"):
        right = model(image)
    arriving = torch.linspace(-1, 1, right.shape[-1], dtype=right.dtype, device=right.device).expand_as(right)
    found, expected = (torch.autograd.grad(one, image, arriving)[0] for one in (out, right))
    return {"output": difference(out, right), "gradients": difference(found, expected)}


@functools.cache
def _half_errors(way: Way, size: int, setting: Setting) -> Mapping[str, float]:
    low = half(setting)
    if low is None:
        return {}
    model, image = built(way.model, size, setting.seed), images(1, size, setting.seed).to(setting.device)
    narrow, wide = (Trainer(model, image, dtype, way).gradients() for dtype in (low, None))
    errors = [apart(one, other) for one, other in zip(narrow, wide, strict=True)]
    return {IN_HALF.format(what): error for what, error in zip(("output", "gradients"), errors, strict=True)}


def half(setting: Setting) -> torch.dtype | None:
    """Half precision where a setting asks for it."""
    return setting.dtype if setting.dtype in (torch.bfloat16, torch.float16) else None


def _recipe(way: Way, size: int, batches: Tensor, setting: Setting) -> Contender:
    if way.graph and batches.device.type != "cuda":
        return refused(NO_GRAPH)
    trainer = Trainer(built(way.model, size, setting.seed), batches, half(setting), way)
    check = functools.partial(model_check, way, setting)
    return trainer.contender(check, same=True, wide=batches.device.type == "cpu")


def recipe_step(
    setting: Setting, *, name: str, size: int, batch: int, against: Sequence[str] = ("BiFormer gather",)
) -> Problem:
    """One recipe, on attnkit and on others: BiFormer's formulation, or what `Way.on` knows."""
    batches = images(setting.batch(batch), size, setting.seed).to(setting.device)
    ways = {OURS: Way(name), **{one: Way(name, RIVALS.get(one, one)) for one in against}}
    contenders = {label: _recipe(way, size, batches, setting) for label, way in ways.items()}
    return Problem(contenders, None, {"size": size, "batch": len(batches)})


def models(setting: Setting, *, size: int, batch: int, names: Sequence[str], timm: Sequence[str] = ()) -> Problem:
    """Many models on the same images: recipes and models of timm, by names that `Way.of` reads."""
    batches = images(setting.batch(batch), size, setting.seed).to(setting.device)
    contenders = {label: _recipe(Way.of(label), size, batches, setting) for label in names}
    for label in timm:
        way = Way.of(label)
        if way.graph and batches.device.type != "cuda":
            contenders[f"timm {label}"] = refused(NO_GRAPH)
            continue
        try:
            contenders[f"timm {label}"] = Trainer(from_timm(way.model, size), batches, half(setting), way).contender(
                None, same=False
            )
        except Exception as error:
            contenders[f"timm {label}"] = refused(f"{type(error).__name__}: {error}")
    return Problem(contenders, None, {"size": size, "batch": len(batches)})

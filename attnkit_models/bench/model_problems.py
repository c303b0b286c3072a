"""Problems of whole models: inference and training steps, on attnkit and on the papers' own formulations."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attnkit
from attnkit_models.bench.case import OURS, Contender, Problem, Setting, refused
from attnkit_models.bench.formulations.biformer_gather import NAME as BIFORMER_GATHER
from attnkit_models.bench.gate import difference
from attnkit_models.bench.guests import guest_backend

# Models are held to attention written out, in float64, on an image small enough for that. It leaves padding in the
# regions of every stage.
CHECKED_SIZE = 128
CLASSES = 1000


def built(name: str, size: int, seed: int) -> nn.Module:
    """A recipe with weights that are a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return attnkit.build(name, img_size=size, num_classes=CLASSES)


def images(batch: int, size: int, seed: int) -> Tensor:
    """Random images (B, 3, size, size)."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def on_guest(backend: str | None, run: Callable[[], Tensor]) -> Tensor:
    """Runs with a guest backend wherever it can, or as attnkit chooses."""
    with ExitStack() as stack:
        if backend is not None:
            stack.enter_context(guest_backend(backend))
            stack.enter_context(attnkit.use_backend(f"{backend},auto"))
        return run()


def model_check(name: str, backend: str | None, setting: Setting) -> Mapping[str, float]:
    """Errors of logits and of the image's gradient against the reference backend, in float64 on the same device."""
    return _model_errors(name, backend, CHECKED_SIZE, setting)


@functools.cache
def _model_errors(name: str, backend: str | None, size: int, setting: Setting) -> Mapping[str, float]:
    model = built(name, size, setting.seed).to(setting.device).double().eval()
    image = images(1, size, setting.seed).to(setting.device).double().requires_grad_()
    out = on_guest(backend, lambda: model(image))
    with attnkit.use_backend("reference"):
        right = model(image)
    arriving = torch.linspace(-1, 1, right.shape[-1], dtype=right.dtype, device=right.device).expand_as(right)
    found, expected = (torch.autograd.grad(one, image, arriving)[0] for one in (out, right))
    return {"output": difference(out, right), "gradients": difference(found, expected)}


class Trainer:
    """One model with its inference and its training step.

    Args:
        model: takes images and returns logits.
        batch: images (B, 3, H, W).
        low: half precision to compute in, by autocast, or None.
        backend: name of a guest backend, or None.
    """

    def __init__(self, model: nn.Module, batch: Tensor, low: torch.dtype | None, backend: str | None = None) -> None:
        self.model, self.batch, self.low, self.backend = model.to(batch.device), batch, low, backend
        self.labels = torch.arange(len(batch), device=batch.device) % CLASSES
        # The same work as any rate, and weights that stay where they are.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-12)

    def logits(self) -> Tensor:
        """The model's output, in mixed precision where half precision is asked for, as models are trained."""
        with torch.autocast(self.batch.device.type, self.low, enabled=self.low is not None):
            return on_guest(self.backend, lambda: self.model(self.batch))

    def forward(self) -> Tensor:
        """Inference."""
        self.model.eval()
        return self.logits()

    def prepare(self) -> None:
        """Makes the optimizer's state, as a first step does."""
        for one in self.model.parameters():
            one.grad = torch.zeros_like(one)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """A training step: forward, loss, backward, optimizer."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(self.logits().float(), self.labels).backward()
        self.optimizer.step()

    def contender(self, check: Callable[[], Mapping[str, float]] | None, *, same: bool) -> Contender:
        """The model as a contender."""
        held = None if check is None else lambda _: check()
        return Contender(self.forward, (), held, wide=True, same=same, step=self.step, prepare=self.prepare)


def half(setting: Setting) -> torch.dtype | None:
    """Half precision where a setting asks for it."""
    return setting.dtype if setting.dtype in (torch.bfloat16, torch.float16) else None


def from_timm(name: str, size: int) -> nn.Module:
    """A model of timm at an image size, with random weights."""
    timm = importlib.import_module("timm")
    return timm.create_model(name, img_size=size, num_classes=CLASSES)


def recipe_step(setting: Setting, *, name: str, size: int, batch: int) -> Problem:
    """One recipe, on attnkit and on BiFormer's own formulation."""
    batches = images(setting.batch(batch), size, setting.seed).to(setting.device)
    contenders = {}
    for label, backend in ((OURS, None), ("BiFormer gather", BIFORMER_GATHER)):
        check = functools.partial(model_check, name, backend, setting)
        contenders[label] = Trainer(built(name, size, setting.seed), batches, half(setting), backend).contender(
            check, same=True
        )
    return Problem(contenders, None, {"size": size, "batch": len(batches)})


def models(setting: Setting, *, size: int, batch: int, names: Sequence[str], timm: Sequence[str] = ()) -> Problem:
    """Many models on the same images: recipes by name, `name on biformer_gather`, and models of timm."""
    batches = images(setting.batch(batch), size, setting.seed).to(setting.device)
    contenders: dict[str, Contender] = {}
    for label in names:
        name, _, backend = label.partition(" on ")
        check = functools.partial(model_check, name, backend or None, setting)
        trainer = Trainer(built(name, size, setting.seed), batches, half(setting), backend or None)
        contenders[label] = trainer.contender(check, same=True)
    for name in timm:
        try:
            contenders[f"timm {name}"] = Trainer(from_timm(name, size), batches, half(setting)).contender(
                None, same=False
            )
        except Exception as error:
            contenders[f"timm {name}"] = refused(f"{type(error).__name__}: {error}")
    return Problem(contenders, None, {"size": size, "batch": len(batches)})

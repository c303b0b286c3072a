"""Whole models as they are run: which backends compute their attention, compiled or not, in a CUDA graph or not."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attnkit
from attnkit.errors import did_you_mean
from attnkit_models.bench.case import Contender
from attnkit_models.bench.formulations.biformer_gather import NAME as BIFORMER_GATHER
from attnkit_models.bench.gate import MODEL_TOLERANCE, apart
from attnkit_models.bench.guests import GUESTS, guest_backend

CLASSES = 1000
ON, COMPILED, GRAPH = " on ", ", compiled", ", in a CUDA graph"
# Names of errors: against the model that is neither compiled nor in a graph, and against it in float32.
AS_IT_IS, IN_HALF = "{} beside the model as it is", "{} beside float32"
# What torch.compile compiles with.
COMPILER = "inductor"
# Calls on a stream of their own that a CUDA graph wants before it is captured.
WARM = 3

PLAIN, NO_TRITON = "plain formulation", "PyTorch alone"
# Every formulation that the papers' own code computes with, written in PyTorch: fetched keys, or a masked softmax.
_PLAIN = {"biformer": f"{BIFORMER_GATHER},gather,sdpa,reference", "sparsifiner": "reference"}
_FETCHED = "gather,sdpa,reference"


@dataclass(frozen=True)
class Way:
    """How a model is run.

    Attributes:
        model: name of a recipe, or of a model of timm.
        on: what computes its attention: `"plain formulation"`, `"PyTorch alone"` (the automatic choice of a GPU without
            Triton), names of backends, or empty for the automatic choice.
        compiled: whether by `torch.compile`.
        graph: whether in a CUDA graph.
    """

    model: str
    on: str = ""
    compiled: bool = False
    graph: bool = False

    @classmethod
    def of(cls, label: str) -> Way:
        """From `"biformer_tiny"`, `"biformer_tiny on plain formulation"`, `"swin, compiled, in a CUDA graph"`."""
        rest, graph = label.removesuffix(GRAPH), label.endswith(GRAPH)
        name, compiled = rest.removesuffix(COMPILED), rest.endswith(COMPILED)
        model, _, on = name.partition(ON)
        return cls(model, on, compiled, graph)

    @property
    def backends(self) -> str:
        """The preference that `attnkit.use_backend` takes."""
        if self.on == PLAIN:
            return next((names for family, names in _PLAIN.items() if self.model.startswith(family)), _FETCHED)
        if self.on == NO_TRITON:
            return _FETCHED
        return f"{self.on},auto" if self.on else "auto"

    def run(self, call: Callable[[], Any]) -> Any:
        """Calls on its backends."""
        if not self.on:
            return call()
        with ExitStack() as stack:
            for name in self.backends.split(","):
                if name in GUESTS:
                    stack.enter_context(guest_backend(name))
            stack.enter_context(attnkit.use_backend(self.backends))
            return call()


class Trainer:
    """One model with its inference and its training step.

    Args:
        model: takes images and returns logits.
        batch: images (B, 3, H, W).
        low: half precision to compute in, by autocast, or None.
        way: how it is run.
    """

    def __init__(self, model: nn.Module, batch: Tensor, low: torch.dtype | None, way: Way) -> None:
        self.model, self.batch, self.low, self.way = model.to(batch.device), batch, low, way
        self.called = torch.compile(self.model, backend=COMPILER) if way.compiled else self.model
        self.labels = torch.arange(len(batch), device=batch.device) % CLASSES
        # The same work as any rate, and weights that stay where they are.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-12, capturable=way.graph)
        self.captured: dict[str, Callable[[], Any]] = {}

    def logits(self) -> Tensor:
        """The model's output, in mixed precision where half precision is asked for, as models are trained."""
        # Weights are cast anew for every pass of a graph: a cast that is remembered lies in memory of another.
        with torch.autocast(
            self.batch.device.type, self.low, enabled=self.low is not None, cache_enabled=not self.way.graph
        ):
            return self.way.run(lambda: self.called(self.batch))

    def forward(self) -> Tensor:
        """Inference."""
        self.model.eval()
        return self._replayed("forward", self.logits)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Logits, and the gradients of all weights in one row, without what is random in training."""
        self.model.eval()
        return self._replayed("gradients", self._gradients)

    def _gradients(self) -> tuple[Tensor, Tensor]:
        logits = self.logits()
        loss = F.cross_entropy(logits.float(), self.labels)
        found = torch.autograd.grad(loss, list(self.model.parameters()), allow_unused=True)
        return logits, torch.cat([one.flatten().float() for one in found if one is not None])

    def as_it_is(self) -> Mapping[str, float]:
        """Errors of what is compiled or in a graph against the same model without, in the same dtype."""
        plain = Trainer(self.model, self.batch, self.low, replace(self.way, compiled=False, graph=False))
        with torch.no_grad():
            output = apart(self.forward(), plain.forward())
        pairs = zip(self.gradients(), plain.gradients(), strict=True)
        _, gradients = (apart(one, other) for one, other in pairs)
        # Only the passes that are timed keep their graphs.
        self.captured.pop("gradients", None)
        return {AS_IT_IS.format("output"): output, AS_IT_IS.format("gradients"): gradients}

    def prepare(self) -> None:
        """Makes the optimizer's state, as a first step does."""
        for one in self.model.parameters():
            one.grad = torch.zeros_like(one)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """A training step: forward, loss, backward, optimizer."""
        self.model.train()
        self._replayed("training", self._step)

    def _step(self) -> None:
        # Gradients that are made within a graph lie in its memory, where each replay writes them anew.
        self.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(self.logits().float(), self.labels).backward()
        self.optimizer.step()

    def _replayed(self, what: str, call: Callable[[], Any]) -> Any:
        if not self.way.graph:
            return call()
        if what not in self.captured:
            self.captured[what] = captured(call, self.batch.device)
        return self.captured[what]()

    def contender(self, check: Callable[[], Mapping[str, float]] | None, *, same: bool, wide: bool = True) -> Contender:
        """The model as a contender; what is compiled or in a graph is held to the model that is not, too."""
        changed = self.way.compiled or self.way.graph
        checks = [*([check] if check else []), *([self.as_it_is] if changed else [])]

        def held(_: Contender) -> Mapping[str, float]:
            return {name: error for one in checks for name, error in one().items()}

        return Contender(
            self.forward,
            (),
            held if checks else None,
            wide=wide,
            same=same,
            step=self.step,
            prepare=self.prepare,
            compiles=self.way.compiled,
            keeps=self.way.graph,
            limits=model_limits(self.low or torch.float32),
        )


def model_limits(dtype: torch.dtype) -> dict[str, float]:
    """How far a model may be from itself in float32, and from itself neither compiled nor in a graph."""
    names = [name.format(what) for name in (IN_HALF, AS_IT_IS) for what in ("output", "gradients")]
    return dict.fromkeys(names, MODEL_TOLERANCE[dtype])


def captured(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Calls a few times, captures one call in a CUDA graph, and returns its replay, which gives the same tensors anew.

    Args:
        call: reads and writes tensors that stay where they are.
        device: a GPU.
    """
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        for _ in range(WARM):
            call()
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay() -> Any:
        graph.replay()
        return out

    return replay


def built(name: str, size: int, seed: int) -> nn.Module:
    """A recipe with weights that are a function of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return attnkit.build(name, img_size=size, num_classes=CLASSES)


def from_timm(name: str, size: int) -> nn.Module:
    """A model of timm at an image size, with random weights."""
    timm = importlib.import_module("timm")
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}{did_you_mean(name, timm.list_models())}")
    try:
        return timm.create_model(name, img_size=size, num_classes=CLASSES)
    except TypeError:
        # Convolutions take images of any size and are told of none.
        return timm.create_model(name, num_classes=CLASSES)

"""What a module that runs must also do: repeat itself, train, and be the same after saving, loading and exporting."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnkit_models.train.checkpoint import load_weights, pack, read_weights
from tests.fuzz.case import agree, must_work


def check_module(model: nn.Module, fresh: nn.Module, x: Any, file: Path, dice: random.Random) -> None:
    """Runs a module twice, trains it one step, and moves it through a file into a fresh one.

    Args:
        model: the module.
        fresh: another one from the same options.
        x: its input; where it is refused, so is the case.
        file: where to save.
        dice: chooses which of the rarer checks are made.
    """
    model.eval()
    with torch.no_grad():
        first = _outputs(model(x))
    state = torch.get_rng_state()
    with torch.no_grad():
        again = _outputs(model(x))
    agree(torch.equal(state, torch.get_rng_state()), "evaluation changed the global random state")
    agree(_same(first, again), "two evaluations of one input differ")
    agree(all(one.isfinite().all() for one in first), "a finite input gave an output that is not finite")
    # Training may be refused where evaluation is not: batch norm needs more than one value per channel.
    _train_one_step(model, x)
    model.eval()
    with must_work("saving and loading"), torch.no_grad():
        trained = _outputs(model(x))
        agree(all(one.isfinite().all() for one in trained), "one training step made the output not finite")
        file.write_bytes(pack(model.state_dict(), {}))
        load_weights(fresh, read_weights(file), source=str(file))
        agree(_same(trained, _outputs(fresh.eval()(x))), "a loaded module differs from the saved one")


def check_export(model: nn.Module, x: Tensor) -> None:
    """Exports a module that has already run, and compares what the graph gives."""
    model.eval()
    with torch.no_grad(), must_work("exporting"):
        right = _outputs(model(x))
        graph = torch.export.export(model, (x,), strict=False).module()
        found = _outputs(graph(x))
    tolerance = 4 * torch.finfo(x.dtype).eps ** 0.75
    for one, other in zip(found, right, strict=True):
        agree(torch.allclose(one, other, rtol=tolerance, atol=tolerance), "the exported graph gives something else")


def _train_one_step(model: nn.Module, x: Tensor) -> None:
    model.train()
    x = x.detach().clone().requires_grad_()
    outputs = _outputs(model(x))
    loss = sum((one.float() * torch.randn(one.shape)).mean() for one in outputs)
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        return
    loss.backward()
    gradients = {"the input": x.grad, **{name: one.grad for name, one in model.named_parameters()}}
    for name, grad in gradients.items():
        agree(grad is None or bool(grad.isfinite().all()), f"the gradient of {name} is not finite")
    # As in training: without it, one step can throw a deep model on images of one token out of all bounds.
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.SGD(model.parameters(), lr=0.01).step()


def _outputs(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def _same(found: list[Tensor], right: list[Tensor]) -> bool:
    return len(found) == len(right) and all(torch.equal(one, other) for one, other in zip(found, right, strict=True))

"""Calls of the public functions and methods, right and with one or two arguments that are wrong."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import attnkit
from attnkit import Grid, analysis, layouts
from attnkit.primitives import PrimitiveOptions
from attnkit.registry import unregister_primitive
from attnkit.testing import random_layout, random_options, random_tensor
from attnkit_models import export_official, import_official, import_official_layer, read_checkpoint
from attnkit_models.checkpoints.qna_arguments import qna_config
from attnkit_models.train.predict import load_classifier
from tests.fuzz import checkpoints
from tests.fuzz.case import agree, must_work
from tests.fuzz.mutation import ODDITIES, any_of, nearby
from tests.fuzz.official import HPARAMS

# What is odd where a tensor, a grid, a layout, options, a module or a path is wanted.
OTHERS: tuple[Callable[[], Any], ...] = (
    lambda: torch.zeros(0),
    lambda: torch.zeros(2, 0, 8),
    lambda: torch.zeros(1, 16, 8, dtype=torch.complex64),
    lambda: torch.zeros(1, 16, 8, device="meta"),
    lambda: torch.zeros(1, 4, 4, 8).to_sparse(),
    lambda: torch.full((1, 16, 8), torch.nan),
    lambda: Grid(1, 1),
    lambda: Grid(3, 5, prefix=2),
    lambda: Grid(2, 2, 2),
    lambda: layouts.Dense(3),
    lambda: nn.Linear(3, 3),
    nn.Module,
    lambda: attnkit.Window(2, 4),
    lambda: attnkit.Window,
    lambda: Path("no/such/folder/a.png"),
    lambda: "no\x00such.png",
    Path,
)


def case(dice: random.Random, folder: Path) -> None:
    function, arguments = dice.choice(CALLS)(folder)
    odd = dice.choice((0, 0, 1, 1, 1, 2))
    changed = dice.sample(sorted(arguments), min(odd, len(arguments)))
    model = arguments.get("model")
    state = copy.deepcopy(model.state_dict()) if isinstance(model, nn.Module) else {}
    for name in changed:
        arguments[name] = _wrong(dice, arguments[name])
    settings = torch.get_rng_state(), torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        if odd:
            function(**arguments)
        else:
            with must_work(f"a right call of {function.__qualname__}"):
                function(**arguments)
    finally:
        agree(torch.equal(settings[0], torch.get_rng_state()), "a call changed the global random state")
        agree(settings[1:] == (torch.get_default_dtype(), torch.is_grad_enabled()), "a call changed torch's settings")
        if isinstance(model, nn.Module):
            after = model.state_dict()
            agree(state.keys() == after.keys(), "a call changed what a model holds")
            agree(all(torch.equal(one, after[name]) for name, one in state.items()), "a call changed a model's weights")


def _wrong(dice: random.Random, right: Any) -> Any:
    if isinstance(right, bool):
        # A switch is whatever Python takes for true or false.
        return any_of(dice, [one for one in ODDITIES if not isinstance(one, Tensor)])
    if isinstance(right, Path):
        # Messages show a path as it is, line breaks included.
        return any_of(dice, [*(one for one in ODDITIES if not isinstance(one, str)), "", "a" * 10_000, "no\x00such"])
    way = dice.random()
    if way < 0.45:
        return any_of(dice, ODDITIES)
    if way < 0.65:
        return dice.choice(OTHERS)()
    if isinstance(right, dict):
        return {**right, dice.choice((*right, "extra", 3)): any_of(dice, ODDITIES)}
    if isinstance(right, Tensor):
        ways = (right[:1, 1:], right[None], right.double(), right.long(), right.to("meta"), right[..., :0], right.mT)
        return dice.choice(ways)
    return nearby(right, dice)


def _numbers(*shape: int) -> Tensor:
    return random_tensor(*shape, seed=0, dtype=torch.float32)


def _attend(folder: Path) -> Any:
    q, k, v = (random_tensor(1, 2, 16, 4, seed=seed) for seed in range(3))
    extra = {"scale": 0.5, "bias": None, "gain": None, "backend": None, "return_lse": True}
    return attnkit.attend, {"q": q, "k": k, "v": v, "layout": layouts.Dense(16), **extra}


def _mix(folder: Path) -> Any:
    return _called, {
        "model": _layer(),
        "x": _numbers(1, 18, 8),
        "grid": Grid(4, 4, prefix=2),
        "token_mask": None,
    }


def _called(model: Any, **rest: Any) -> Any:
    """The model's call; the model itself stays as it was."""
    return model(**rest) if isinstance(model, attnkit.HeadMix) else attnkit.explain(model, rest["grid"])


def _layer() -> attnkit.HeadMix:
    with torch.random.fork_rng():
        return attnkit.HeadMix(8, [attnkit.Dense(1), attnkit.TopKRegion(1, 2, 2)]).eval()


@functools.cache
def _model() -> nn.Module:
    with torch.random.fork_rng():
        return attnkit.build("bigbird_vit_micro", in_chans=1, num_classes=3, img_size=16).eval()


def _explain(folder: Path) -> Any:
    arguments = {"image_size": 4, "training": False, "device": None, "dtype": torch.float32}

    def explain(model: Any, **rest: Any) -> str:
        return str(attnkit.explain(model, **rest))

    return explain, {"model": _layer(), **arguments}


def _flops(folder: Path) -> Any:
    def flops(model: Any, **rest: Any) -> str:
        return str(attnkit.flops(model, **rest))

    return flops, {"model": _model(), "image_size": (16, 24), "device": None, "dtype": None}


def _reach(folder: Path) -> Any:
    options = attnkit.Neighborhood(2, 3)
    return analysis.reach, {"model_or_mix": options, "grid": Grid(3, 4), "layers": 2, "outputs": [0, 3]}


def _draw(folder: Path) -> Any:
    arguments = {"query": (1, 2), "matrix": True}
    return analysis.draw, {"what": [attnkit.Window(1, 2)], "grid": (4, 4), "path": folder / "a.png", **arguments}


def _draw_attention(folder: Path) -> Any:
    arguments = {"layers": ["stages.1.blocks.0.mix"], "query": (0, 0), "title": "a", "path": None, "picture": None}
    return analysis.draw_attention, {
        "model": _model(),
        "image": _numbers(1, 16, 16),
        **arguments,
    }


def _list(folder: Path) -> Any:
    return attnkit.list_models, {"pattern": "vit*"}


def _register(folder: Path) -> Any:
    def register(name: Any, options: Any) -> None:
        attnkit.register_primitive(name, options)
        with must_work("forgetting a primitive"):
            unregister_primitive(name)

    return register, {"name": "fuzzed", "options": type("Fuzzed", (PrimitiveOptions,), {})}


def _forget(folder: Path) -> Any:
    def forget(name: Any, options: Any) -> None:
        attnkit.register_primitive("fuzzed", options)
        try:
            unregister_primitive(name)
        finally:
            if name != "fuzzed":
                unregister_primitive("fuzzed")

    return forget, {"name": "fuzzed", "options": type("Fuzzed", (PrimitiveOptions,), {})}


def _backend(folder: Path) -> Any:
    def use_backend(name: Any) -> None:
        with attnkit.use_backend(name):
            _layer()(_numbers(1, 4, 4, 8))

    return use_backend, {"name": "reference"}


def _grid(folder: Path) -> Any:
    def grid(sizes: Any, prefix: Any, stride: Any, scale: Any) -> None:
        made = Grid(*sizes, prefix=prefix) if isinstance(sizes, (tuple, list)) else Grid(sizes, prefix=prefix)
        coarse, fine = made.strided(stride), made.refined(scale)
        agree(coarse.tokens <= made.tokens <= fine.tokens, "a coarser grid has more tokens")
        agree(eval(repr(made)) == made and hash(made) == hash(copy.copy(made)), "a grid differs from itself")

    return grid, {"sizes": (4, 6), "prefix": 1, "stride": 2, "scale": 2}


def _checkpoint(folder: Path) -> Any:
    file = folder / "best.safetensors"
    file.write_bytes(checkpoints.intact("weights"))
    return read_checkpoint, {"path": file}


def _classifier(folder: Path) -> Any:
    return _unseeded(load_classifier), {"path": _checkpoint(folder)[1]["path"]}


@functools.cache
def _theirs() -> dict[str, Tensor]:
    with torch.random.fork_rng():
        return export_official("qna_vit", attnkit.build(qna_config(HPARAMS)))


def _import(folder: Path) -> Any:
    arguments = {"state_dict": dict(_theirs()), "hparams": copy.deepcopy(HPARAMS), "resize_tables": False}
    return _unseeded(import_official), {"name": "qna_vit", **arguments}


def _export(folder: Path) -> Any:
    with torch.random.fork_rng():
        return export_official, {"name": "qna_vit", "model": attnkit.build(qna_config(HPARAMS))}


def _import_layer(folder: Path) -> Any:
    weights = {"qkv.weight": torch.zeros(24, 8), "qkv.bias": torch.zeros(24), "proj.weight": torch.zeros(8, 8)}
    arguments = {"hparams": {"dim": 8, "num_heads": 2, "qkv_bias": True}, "resize_tables": False}
    state = {**weights, "proj.bias": torch.zeros(8)}
    return _unseeded(import_official_layer), {"upstream_class": "Attention", "state_dict": state, **arguments}


def _method(name: str, **arguments: Any) -> Callable[[Path], Any]:
    """The call of a method on a copy of a model, which then still runs."""

    def prepare(folder: Path) -> Any:
        def call(**given: Any) -> None:
            model: Any = copy.deepcopy(_model())
            image = _numbers(1, 1, 16, 16)
            try:
                getattr(model, name)(**given)
            finally:
                with must_work(f"running a model after {name}"), torch.no_grad():
                    agree(isinstance(model(image), Tensor), "no logits")

        return _unseeded(call), dict(arguments)

    return prepare


def _unseeded(function: Callable[..., Any]) -> Callable[..., Any]:
    """What may draw numbers, for weights that are loaded over, without that being seen."""

    @functools.wraps(function)
    def run(**arguments: Any) -> Any:
        with torch.random.fork_rng():
            return function(**arguments)

    return run


def _options(folder: Path) -> Any:
    return random_options, {"name": "window", "seed": 3, "heads": 2}


def _layout(folder: Path) -> Any:
    return random_layout, {"kind": "blocks", "grid": Grid(3, 4, prefix=1), "batch": 2, "heads": 2, "seed": 1}


CALLS: tuple[Callable[[Path], tuple[Callable[..., Any], dict[str, Any]]], ...] = (
    *(_attend, _mix, _explain, _flops, _reach, _draw, _draw_attention, _list, _register, _forget, _backend, _grid),
    *(_checkpoint, _classifier, _import, _export, _import_layer, _options, _layout),
    _method("forward", x=_numbers(1, 1, 16, 16)),
    _method("forward_features", x=_numbers(1, 1, 16, 16)),
    _method(
        "forward_intermediates",
        x=_numbers(1, 1, 16, 16),
        indices=2,
        norm=True,
        output_fmt="NCHW",
    ),
    _method("reset_classifier", num_classes=4, global_pool="avg"),
    _method("set_input_size", img_size=(24, 16)),
    _method("group_matcher", coarse=True),
    _method("set_grad_checkpointing", enable=True),
)

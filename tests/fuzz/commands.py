"""Command lines, right and mutated: status 0, or a line a mistake on standard error and another status."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import attnkit
from attnkit import factory
from attnkit.cli import main
from attnkit.errors import ConfigError
from attnkit.registry import list_primitives
from attnkit.testing import random_options
from attnkit_models import export_official
from attnkit_models.checkpoints.qna_arguments import qna_config
from attnkit_models.train.checkpoint import pack
from attnkit_models.train.images import Preprocess
from tests.fuzz.case import agree
from tests.fuzz.checkpoints import intact
from tests.fuzz.configs import written
from tests.fuzz.mutation import PLAIN_ODDITIES, misspelt, mutate_plain
from tests.fuzz.official import HPARAMS

WORDS = ("", "-1", "0", "x", "=", "--", "-h", "--help", "--nope", "ü", "9" * 400, "3x3", "nan", "*", "[", "\x00", "a b")
MODELS = ("vit_micro", "bigbird_vit_micro", "biformer_micro", "qna_vit_micro", "sparsifiner_micro")
TRAIN = {"epochs": 1, "lr": 1e-3, "augment": True, "grad_accum": 1, "seed": 0, "label_smoothing": 0.1}
RECIPE = {"reconstruction_epochs": 1, "reconstruction_lr": 1e-3, "labels": 1.0, "logits": 0.5, "tokens": 0.5}
# What may be asked of a student: some of it fits the teacher, the rest is refused.
STUDENTS = (
    "mix.groups[0].keep=0.5",
    "keep_tokens=[0.5]",
    "depth=2",
    "recipe.reconstruction=0.1",
    "recipe.labels=0",
    "recipe.reconstruction_epochs=2",
    "mix.groups=[{kind: dense, heads: 3}]",
    "mix.groups=[{kind: threshold_mask_predictor, heads: 3, tokens: 16, score: 0.05, prefix: 1}]",
    "mix.groups=[{kind: mask_predictor, heads: 2, tokens: 16, keep: 0.5, prefix: 1}, {kind: dense, heads: 1}]",
    "mix.groups=[{kind: mask_predictor, heads: 1, tokens: 9, keep: 0.5, prefix: 1}, {kind: conv, heads: 2}]",
    "global_pool=avg",
)
SIZES = ("32", "16x24", "1", "33", "7x50")


def case(dice: random.Random, folder: Path) -> None:
    arguments = _right(dice, folder)
    times = dice.choice((0, 0, 1, 1, 2))
    for _ in range(times):
        arguments = _changed(arguments, dice)
    out, err = io.StringIO(), io.StringIO()
    with _inside(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    agree(status in (0, 2) or "predict" in arguments, f"attnkit {arguments} ended with status {status}")
    said = err.getvalue().splitlines()
    if status:
        agree(bool(said) and all(one.startswith("error: ") for one in said), f"attnkit {arguments} said {said}")
        raise ConfigError("; ".join(said))
    if (folder / "run" / "best.safetensors").is_file():
        with _inside(folder), contextlib.redirect_stdout(out):
            agree(main(["predict", "run", "data/a/0.png"]) == 0, "a model that was just trained cannot be used")
    # A pattern that matches nothing lists nothing.
    agree(bool(out.getvalue().strip()) or "list" in arguments, f"attnkit {arguments} said nothing")


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _right(dice: random.Random, folder: Path) -> list[str]:
    """A command line that works."""
    name = dice.choice(list_primitives())
    way = dice.choice(("list", "show", "explain", "flops", "draw", "train", "sparsify", "predict", "convert"))
    if way == "list":
        return ["list", *dice.choice(([], ["models"], ["primitives", "*window"], ["backends"]))]
    if way == "show":
        return ["show", dice.choice((name, *MODELS))]
    if way in ("explain", "flops"):
        return [way, dice.choice(MODELS), "--size", dice.choice(SIZES)]
    if way == "draw":
        plain: dict[str, Any] = random_options(name, seed=dice.randrange(1000)).to_dict()
        options = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in plain.items()]
        return [
            "draw",
            name,
            *options[1:],
            "--grid",
            dice.choice(("5", "4x6")),
            "--out",
            f"a.{dice.choice(('png', 'svg'))}",
        ]
    _pictures(folder)
    if way == "convert":
        return _convert(dice, folder)
    if way == "sparsify":
        return _sparsify(dice, folder)
    if way == "predict":
        (folder / "best.safetensors").write_bytes(intact("weights"))
        words = ["data/a/0.png", dice.choice(("data/b/1.png", "none.png", "config.yaml", "data"))]
        if dice.random() < 0.3:
            return ["draw", "best.safetensors", "--image", dice.choice(words), "--out", "a.png"]
        return ["predict", dice.choice((".", "best.safetensors", "none", "data/a/0.png")), *words[: dice.randint(1, 2)]]
    plain: dict[str, Any] = {"model": factory.config(dice.choice(MODELS)).to_dict(), "train": TRAIN}
    if dice.random() < 0.5:
        plain = mutate_plain(plain, dice, PLAIN_ODDITIES)
    (folder / "config.yaml").write_text(written(plain))
    inputs = ["--config", "config.yaml", "--data", "data", "--img-size", "16"]
    return ["train", *inputs, "--out", "run", "--batch-size", "4"]


def _sparsify(dice: random.Random, folder: Path) -> list[str]:
    """A small dense teacher that is made sparse, by a file's section or by arguments alone."""
    (folder / "teacher.safetensors").write_bytes(teacher())
    inputs = ["--data", "data", "--img-size", "16", "--out", "run", "--batch-size", "4", "--epochs", "2"]
    if dice.random() < 0.4:
        plain: dict[str, Any] = {"recipe": {"kind": "sparsifiner", "teacher": "teacher.safetensors", **RECIPE}}
        if dice.random() < 0.5:
            plain = mutate_plain(plain, dice, PLAIN_ODDITIES)
        (folder / "config.yaml").write_text(written(plain))
        inputs = ["--config", "config.yaml", *inputs]
    else:
        inputs = ["--recipe", "sparsifiner", "--teacher", "teacher.safetensors", *inputs]
    if dice.random() < 0.3:
        inputs += ["--model", dice.choice(MODELS)]
    for change in dice.sample(STUDENTS, dice.choice((0, 0, 1, 2))):
        inputs += ["--set", change]
    return ["train", *inputs]


@functools.cache
def teacher() -> bytes:
    """A dense model as a training would have left it, of the images of `_pictures`."""
    torch.manual_seed(0)
    model = attnkit.build("vit_micro", depth=1, num_classes=2, img_size=16, in_chans=3)
    header = {
        "kind": "weights",
        "label": "vit_micro",
        "model": model.config.to_dict(full=True),
        "classes": ["a", "b"],
        "preprocess": Preprocess((16, 16), 3, (0.5,) * 3, (0.5,) * 3).to_dict(),
        "epoch": 1,
        "val_accuracy": 0.5,
        "versions": {},
    }
    return pack(model.state_dict(), header)


def _convert(dice: random.Random, folder: Path) -> list[str]:
    """A small model of an authors' code, to be made a checkpoint."""
    theirs = export_official("qna_vit", attnkit.build(qna_config(HPARAMS)))
    torch.save({"params": theirs}, folder / "theirs.pth")
    plain = mutate_plain(HPARAMS, dice, PLAIN_ODDITIES) if dice.random() < 0.3 else HPARAMS
    (folder / "hparams.yaml").write_text(written(plain))
    (folder / "classes.txt").write_text("a\nb\nc\nd\ne\n")
    extra = ["--classes", "classes.txt"] if dice.random() < 0.5 else []
    return ["convert", "theirs.pth", "ours.safetensors", "--model", "qna_vit", "--hparams", "hparams.yaml", *extra]


def _pictures(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / "data" / name).mkdir(parents=True)
        for at in range(3):
            Image.new("RGB", (9, 8), (99 * at, 50, 200 if name == "a" else 0)).save(
                folder / "data" / name / f"{at}.png"
            )


def _changed(arguments: list[str], dice: random.Random) -> list[str]:
    if not arguments:
        return [dice.choice(WORDS)]
    at = dice.randrange(len(arguments))
    before, word, after = arguments[:at], arguments[at], arguments[at + 1 :]
    way = dice.randrange(5)
    if way == 0:
        return [*before, misspelt(word, dice), *after]
    if way == 1:
        return [*before, dice.choice(WORDS), *after]
    if way == 2:
        return [*before, *after]
    if way == 3:
        return [*before, word, word, *after]
    return [*before, word, dice.choice(WORDS), *after]

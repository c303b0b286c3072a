"""Configuration files and `--set` arguments, right and mutated, as YAML and JSON."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml

from attnkit import factory
from attnkit_models.train.configfile import merge_options, read_config, read_overrides
from attnkit_models.train.options import TrainOptions
from tests.fuzz.case import agree, must_work
from tests.fuzz.mutation import PLAIN_ODDITIES, any_of, mutate_bytes, mutate_plain, mutate_text, slots

# What YAML gives a meaning of its own.
TOKENS = (
    *("[", "]", "{", "}", ": ", "- ", "? ", "\n", "\t", "#", "'", '"', "|\n", ">", "%YAML 9.9\n", "---\n", "...\n"),
    *("&a ", "*a", "&a [*a]", "<<: ", "<<: *a", "=", "~", "null", ".nan", "-.inf", "1e999", "0x", "0b2", "1_0", "1:30"),
    *("2001-99-99", "2001-01-01", "!!int x", "!!float x", "!!bool x", "!!timestamp x", "!!binary x", "!!set {a}"),
    *("!!omap [a]", "!!str", "!x y", "!!python/none", "\x00", "\x85", "ü", "\\", "9" * 5_000, "true", "-1", "1e-3"),
)
NESTED = ("[" * 50, "[" * 5_000, "{a: " * 1_000, "[" * 100 + "]" * 100, "- " * 3_000 + "1", "[" * 200_000)
# Built and run only where no number in the configuration is above this.
SMALL = 300


def case(dice: random.Random, folder: Path) -> None:
    plain = _plain(dice)
    marker = folder / "executed"
    content, right = _content(dice, plain, marker)
    file = folder / dice.choice(("a.yaml", "a.yml", "a.json"))
    file.write_bytes(content)
    try:
        found = read_config(file)
        options = merge_options(found.train, {"epochs": dice.choice((None, None, 3)), "seed": None})
        if right:
            agree(found.model == plain.get("model", plain), "a configuration file gave another model than it holds")
        agree(isinstance(options, TrainOptions), "merge_options gave something else")
        if found.model is None:
            return
        config = factory.override(factory.config(found.model), read_overrides(_assignments(dice)))
        with must_work("writing an accepted configuration"):
            agree(type(config).from_dict(config.to_dict()) == config, "a configuration differs from its own dict")
        _run(config)
    finally:
        agree(not marker.exists(), "reading a configuration file executed what stands in it")


def _plain(dice: random.Random) -> dict[str, Any]:
    name = dice.choice(("vit_micro", "bigbird_vit_micro", "biformer_micro", "qna_vit_micro", "sparsifiner_micro"))
    model: Any = factory.config(name).to_dict(full=dice.random() < 0.3)
    if dice.random() < 0.3:
        model = {"kind": name, "drop_path": 0.1}
    if dice.random() < 0.3:
        return model
    sections: dict[str, Any] = {"model": name if dice.random() < 0.3 else model}
    if dice.random() < 0.7:
        sections["train"] = TrainOptions().to_dict(full=dice.random() < 0.5)
    if dice.random() < 0.3:
        sections["baseline"] = "vit_micro"
    return sections


def _content(dice: random.Random, plain: dict[str, Any], marker: Path) -> tuple[bytes, bool]:
    """A file's content, and whether it says just what the plain data does."""
    way = dice.randrange(8)
    if way == 0:
        plain = mutate_plain(plain, dice, PLAIN_ODDITIES, dice.randint(1, 2))
    text = written(plain, as_json=dice.random() < 0.4)
    if way == 1:
        return mutate_bytes(text.encode(), dice, dice.randint(1, 3)), False
    if way in (2, 3):
        return mutate_text(text, dice, TOKENS, dice.randint(1, 3)).encode(), False
    if way == 4:
        return dice.choice((*NESTED, _laughs(), *_attacks(marker))).encode(), False
    return text.encode(), way != 0


def written(plain: Any, *, as_json: bool = False) -> str:
    """Plain data as YAML or JSON; where it is nested too deeply to be written, something as deep."""
    try:
        return json.dumps(plain, indent=2) if as_json else yaml.safe_dump(plain, sort_keys=False)
    except (TypeError, RecursionError):
        return NESTED[1]


def _laughs() -> str:
    """A few hundred bytes that stand for ten thousand million numbers."""
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{at}: &a{at} [{', '.join([f'*a{at - 1}'] * 10)}]" for at in range(1, 10)]
    return "\n".join([*lines, "model: *a9", ""])


def _attacks(marker: Path) -> tuple[str, ...]:
    """What a loader that makes any Python object would run."""
    return (
        f'model: !!python/object/apply:os.system ["touch {marker}"]\n',
        f"model: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{marker}']]\n",
        f'model: !!python/object/new:os.system ["touch {marker}"]\n',
        "model: !!python/name:os.system\n",
        "kind: !!python/module:os\n",
    )


def _assignments(dice: random.Random) -> list[str]:
    if dice.random() < 0.6:
        return []
    right = ["num_classes=3", "drop_path=0.2", "img_size=[16, 24]", "init=lecun_normal", "in_chans=1"]
    chosen = dice.choice(right)
    if dice.random() < 0.5:
        return [chosen]
    if dice.random() < 0.2:
        return [f"num_classes={dice.choice(NESTED)}", chosen]
    return [mutate_text(chosen, dice, TOKENS), any_of(dice, right)]


def _run(config: Any) -> None:
    numbers = [holder[key] for holder, key in slots(config.to_dict(full=True)) if isinstance(holder[key], int)]
    if not hasattr(config, "in_chans") or max(numbers, default=0) > SMALL:
        return
    images = torch.randn(1, config.in_chans, 16, 16)
    found = config.build().eval()(images)
    found = found if isinstance(found, list) else [found]
    agree(
        all(one.isfinite().all() for one in found), "a model from a configuration file gave a value that is not finite"
    )

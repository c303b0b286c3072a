"""Plain dicts of options, right and mutated: read, written back, overridden by path."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import random
from pathlib import Path
from typing import Any

from attnkit import factory, list_models
from attnkit.options import Options
from attnkit.registry import STRUCTURES, list_primitives, load
from attnkit.testing import random_options
from attnkit_models.train.options import TrainOptions
from tests.fuzz.case import agree, must_work
from tests.fuzz.mutation import ODDITIES, any_of, misspelt, mutate_plain, nearby, slots


def case(dice: random.Random, folder: Path) -> None:
    start = _options(dice)
    plain = start.to_dict(full=dice.random() < 0.5)
    agree(json.loads(json.dumps(plain)) == plain, "to_dict gave something that JSON changes")
    way = dice.choice(("read", "read", "build", "override", "construct"))
    times = dice.choice((0, 0, 0, 1, 1, 2))
    if way == "override":
        _override(start, dice, times)
        return
    if way == "construct":
        fields = {field.name: getattr(start, field.name) for field in dataclasses.fields(start)}
        for _ in range(times):
            fields[dice.choice(list(fields))] = any_of(dice, ODDITIES)
        _check(type(start)(**fields))
        return
    mutated = mutate_plain(plain, dice, ODDITIES, times)
    before = copy.copy(mutated)
    found = type(start).from_dict(mutated) if way == "read" else factory.config(mutated)
    agree(mutated.keys() == before.keys(), "reading a dict changed it")
    if not times and way == "read":
        agree(found == start, "options read from their own dict differ")
    _check(found)


def _options(dice: random.Random) -> Options:
    """Right options of any class."""
    what = dice.random()
    if what < 0.45:
        return random_options(dice.choice(list_primitives()), seed=dice.randrange(10**6))
    if what < 0.6:
        groups = tuple(random_options(dice.choice(("dense", "window", "conv")), seed=at, heads=2) for at in range(2))
        strides = {group.output_stride() for group in groups}
        return load(STRUCTURES["mix"])(groups[: 2 if len(strides) == 1 else 1], dim=8)
    if what < 0.7:
        return TrainOptions()
    return factory.config(dice.choice(list_models()))


def _check(options: Options) -> None:
    """What holds for all options that were accepted."""
    with must_work("writing and reading accepted options"):
        for full in (False, True):
            text = json.dumps(options.to_dict(full=full), allow_nan=False)
            agree(type(options).from_dict(json.loads(text)) == options, "options -> JSON -> options differ")
    agree(hash(options) == hash(copy.deepcopy(options)), "equal options have unequal hashes")
    agree(pickle.loads(pickle.dumps(options)) == options, "pickled options differ")
    agree(bool(repr(options)), "options without a repr")


def _override(start: Options, dice: random.Random, times: int) -> None:
    changes: dict[Any, Any] = {}
    for _ in range(max(times, 1)):
        path, value = random_path(start, dice)
        if dice.random() < 0.15:
            path = dice.choice(("", ".", "[0]", "a..b", "stages[", "stages[*]]", "kind", path + "[7]", path + ".x", 3))
        elif dice.random() < 0.2:
            path = misspelt(path, dice)
        odd = dice.random()
        changes[path] = any_of(dice, ODDITIES) if odd < 0.3 else nearby(value, dice) if odd < 0.6 else value
    _check(factory.override(start, changes))


def random_path(options: Options, dice: random.Random) -> tuple[str, Any]:
    """The path of some value inside options, such as `stages[*].mix.groups[0].heads`, and the value."""
    plain = options.to_dict(full=True)
    holder, key = dice.choice(slots(plain))
    path = _path_to(plain, holder, key)
    if "[" in path and dice.random() < 0.3:
        at = path.index("[")
        path = path[:at] + "[*]" + path[path.index("]") + 1 :]
    return path, holder[key]


def _path_to(plain: Any, holder: Any, key: Any) -> str:
    inside: list[tuple[Any, str]] = [(plain, "")]
    while inside:
        node, path = inside.pop()
        pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for name, value in pairs:
            step = f"[{name}]" if isinstance(node, list) else f".{name}" if path else str(name)
            if node is holder and name == key:
                return path + step
            inside.append((value, path + step))
    raise AssertionError("the place lies in another tree")

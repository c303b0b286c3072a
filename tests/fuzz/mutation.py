"""Mutations of plain data, text and bytes, as functions of a dice."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

# What JSON or YAML can say and hardly any option wants.
PLAIN_ODDITIES: tuple[Any, ...] = (
    None,
    True,
    False,
    "",
    "4",
    "dense",
    "\x00ü\n",
    "a" * 10_000,
    0,
    -1,
    2**31,
    2**63,
    -(2**63),
    10**30,
    1.5,
    -0.0,
    1e308,
    math.nan,
    math.inf,
    -math.inf,
    [],
    [3],
    [[3, None]],
    {},
    {"kind": "dense"},
    {"kind": "dense", "heads": 2},
    {"kind": "no such kind"},
    {"kind": None},
)

# What only Python can say.
ODDITIES: tuple[Any, ...] = (
    *PLAIN_ODDITIES,
    b"bytes",
    (1, 2),
    {3},
    object(),
    len,
    int,
    3 + 0j,
    torch.tensor(3),
    torch.ones(2, 2),
    torch.float32,
    range(3),
)


def any_of(dice: random.Random, choices: Sequence[Any]) -> Any:
    """One of several things, copied, so that no case changes another's."""
    chosen = dice.choice(choices)
    return copy.deepcopy(chosen) if isinstance(chosen, (list, dict, set)) else chosen


def nested(dice: random.Random) -> Any:
    """A value inside so many lists or mappings that code which recurses into them cannot reach it."""
    value: Any = 1
    for _ in range(dice.choice((30, 300, 3_000, 100_000))):
        value = [value] if dice.random() < 0.5 else {dice.choice(("kind", "mix", "groups")): value}
    return value


def misspelt(word: str, dice: random.Random) -> str:
    """A word with one slip of the fingers."""
    if not word:
        return "x"
    at = dice.randrange(len(word))
    slips: tuple[Callable[[], str], ...] = (
        lambda: word[:at] + word[at + 1 :],
        lambda: word[:at] + word[at] + word[at:],
        lambda: word[:at] + dice.choice("abcxyz_") + word[at + 1 :],
        lambda: word[:at] + word[at : at + 2][::-1] + word[at + 2 :],
        word.upper,
    )
    return dice.choice(slips)()


def nearby(value: Any, dice: random.Random) -> Any:
    """Another value of the same type, small enough to be built and run."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return dice.choice((value + 1, value - 1, 2 * value, value // 2, -value, dice.randint(0, 9)))
    if isinstance(value, float):
        return dice.choice((value * 2, value / 2, -value, 0.0, 1.0, dice.random()))
    if isinstance(value, str):
        return misspelt(value, dice)
    if isinstance(value, (list, tuple)):
        longer = [*value, *copy.deepcopy(list(value[-1:]))]
        return type(value)(dice.choice((longer, list(value[:-1]), list(reversed(value)))))
    return value


def slots(plain: Any) -> list[tuple[Any, Any]]:
    """Every place in plain data where a value stands: (dict or list, key or index)."""
    found: list[tuple[Any, Any]] = []
    inside: list[Any] = [plain]
    while inside:
        holder = inside.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        for key in keys:
            found.append((holder, key))
            inside.append(holder[key])
    return found


def mutate_plain(plain: Any, dice: random.Random, oddities: Sequence[Any] = ODDITIES, times: int = 1) -> Any:
    """Plain data with some things changed: values, types, names, lengths, depth."""
    plain = copy.deepcopy(plain)
    for _ in range(times):
        places = slots(plain)
        if not places:
            return any_of(dice, oddities)
        holder, key = dice.choice(places)
        what = dice.randrange(11)
        if what < 4:
            holder[key] = nearby(holder[key], dice)
        elif what < 7:
            holder[key] = any_of(dice, oddities)
        elif what == 7 and isinstance(holder, dict):
            holder[misspelt(str(key), dice)] = holder.pop(key)
        elif what == 8:
            del holder[key]
        elif what == 9:
            holder[key] = [holder[key]]
        elif isinstance(holder, dict) and dice.random() < 0.5:
            holder[any_of(dice, ("kind", "heads", "extra", 3, None, (1, 2)))] = any_of(dice, oddities)
        else:
            other, name = dice.choice(places)
            holder[key] = copy.deepcopy(other[name])
    places = slots(plain)
    if places and times and dice.random() < 0.03:
        # Last, because copying recurses too.
        holder, key = dice.choice(places)
        holder[key] = nested(dice)
    return plain


def mutate_text(text: str, dice: random.Random, tokens: Sequence[str], times: int = 1) -> str:
    """Text with characters, words and lines dropped, doubled, swapped and put in."""
    for _ in range(times):
        text = _slip(text, dice, tokens) if text else dice.choice(tokens)
    return text


def _slip(text: str, dice: random.Random, tokens: Sequence[str]) -> str:
    at = dice.randrange(len(text) + 1)
    near = at + dice.randint(1, 12)
    lines = text.splitlines(keepends=True)
    line = dice.randrange(len(lines))
    ways: tuple[Callable[[], str], ...] = (
        lambda: text[:at] + text[near:],
        lambda: text[:at] + dice.choice(tokens) + text[at:],
        lambda: text[:at] + dice.choice(tokens) + text[near:],
        lambda: text[:at] + text[at:near] * dice.randint(2, 4) + text[near:],
        lambda: text[:at],
        lambda: "".join(lines[:line] + lines[line + 1 :]),
        lambda: "".join([*lines[: line + 1], *lines[line:]]),
        lambda: "".join([*lines[:line], dice.choice(("  ", "\t", "- ")) + lines[line], *lines[line + 1 :]]),
    )
    return dice.choice(ways)()


def mutate_bytes(content: bytes, dice: random.Random, times: int = 1) -> bytes:
    """Bytes with bits flipped, pieces dropped, doubled and overwritten, or cut short."""
    for _ in range(times):
        content = _damage(content, dice) if content else dice.randbytes(dice.randint(0, 64))
    return content


def _damage(content: bytes, dice: random.Random) -> bytes:
    # Most of what a format can trip over stands at its beginning.
    at = dice.randrange(min(len(content), dice.choice((16, 256, len(content)))))
    near = at + dice.randint(1, 16)
    ways: tuple[Callable[[], bytes], ...] = (
        lambda: content[:at] + bytes([content[at] ^ (1 << dice.randrange(8))]) + content[at + 1 :],
        lambda: content[:at] + dice.randbytes(near - at) + content[near:],
        lambda: content[:at] + b"\xff" * (near - at) + content[near:],
        lambda: content[:at] + content[near:],
        lambda: content[:at] + content[at:near] + content[at:],
        lambda: content[:at],
        lambda: content + dice.randbytes(near - at),
    )
    return dice.choice(ways)()

"""The gallery: one page and its pictures per registered primitive, made from the registry alone."""

from __future__ import annotations

import dataclasses
import io
import re
import typing
from functools import cache
from typing import Any

import attnkit
from attnkit.analysis.canvas import draw_tile, new_figure
from attnkit.analysis.palette import BY_CONTENT, colour_of
from attnkit.analysis.pictures import describe_options, picture_rows
from attnkit.analysis.tables import metric, percent
from attnkit.options import Options, field_types
from attnkit.primitives import PrimitiveOptions
from attnkit.registry import list_primitives, primitive_class
from attnkit.testing import random_options

GRID = attnkit.Grid(14, 14)
SIDES = (14, 28, 56)
HEADS, HEAD_DIM = 2, 32

LETTERS = {
    "N": "number of tokens",
    "C": "channels of the group",
    "H": "height in tokens",
    "W": "width in tokens",
    "L": "learned queries per head",
    "M": "tokens per window",
    "S": "regions per side",
    "h": "heads",
    "k": "kernel, or regions each region sees",
    "r": "side of a cell, or rank",
    "s": "width of a stripe",
    "w": "side of a window",
}


def options_class(name: str) -> type[PrimitiveOptions]:
    """The options of a primitive by name."""
    return typing.cast("type[PrimitiveOptions]", primitive_class(name))


def examples(name: str) -> list[PrimitiveOptions]:
    """The options to draw: the primitive's own examples, or anything valid where it names none."""
    cls = options_class(name)
    made = [cls(**{"heads": HEADS, **example}) for example in cls.examples]
    return made or [random_options(name, heads=HEADS)]


def pictures(name: str) -> dict[str, bytes]:
    """PNG files by name: one per example, and a small one for the index."""
    found = {f"{name}-{at}.png": _png(attnkit.draw(one, GRID)) for at, one in enumerate(examples(name))}
    row = picture_rows(examples(name)[0], GRID, (4, 3))[0]
    small = new_figure(1.6, 1.6)
    draw_tile(small.add_axes((0, 0, 1, 1)), row.tiles[0], row.colour)
    found[f"{name}.png"] = _png(small)
    return found


def page(name: str) -> str:
    """The page of a primitive in Markdown."""
    cls = options_class(name)
    text, arguments = split_docstring(cls)
    parts = [f"# {name}", text]
    for at, one in enumerate(examples(name)):
        parts.append(f"![What four queries see under {describe_options(one)}]({name}-{at}.png){{ .pattern }}")
    parts.append(
        "One tile per query, which is the dark square, on 14 x 14 tokens. Pale tokens are seen by some heads only."
        + (" " + _content_note() if _by_content(name) else "")
    )
    parts += ["## Formula", f"```text\n{_formula(cls)}\n```", "## Options", _options_table(cls, arguments)]
    parts += ["## Use", f"```python\n{_use(examples(name)[0])}\n```", "## Cost", _cost(cls), _measured(name)]
    parts += ["## Paper", cls.paper or "not given", f"Reference: [`{_public(cls)}`][{_public(cls)}]"]
    return "\n\n".join(parts) + "\n"


def index() -> str:
    """The gallery's first page: all primitives at a glance."""
    cards = []
    for name in list_primitives():
        text, _ = split_docstring(options_class(name))
        first = re.sub(r"`([^`]*)`", r"<code>\1</code>", re.split(r"(?<=\.)\s", text)[0])
        image = f'<img src="{name}.png" alt="What a query sees under {name}">'
        cards.append(f'<a class="card" href="{name}/">{image}<strong>{name}</strong><br>{first}</a>')
    return (
        "# Gallery\n\nEvery registered primitive, from one query (the dark square) on 14 x 14 tokens. Pages and "
        "pictures are made from the registry when this site is built.\n\n"
        f'<div class="cards">\n{chr(10).join(cards)}\n</div>\n'
    )


def split_docstring(cls: type[Options]) -> tuple[str, dict[str, str]]:
    """A docstring's text before `Args:`, and what it says about each argument; those of base classes included."""
    arguments: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        document = base.__dict__.get("__doc__") or ""
        if "Args:" in document:
            arguments.update(_arguments(document.split("Args:", 1)[1]))
    text = (cls.__doc__ or "").split("Args:", 1)[0]
    paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)]
    return "\n\n".join(filter(None, paragraphs)), arguments


def _arguments(section: str) -> dict[str, str]:
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        entry = re.match(r" {8}(\w+): (.*)", line)
        if entry:
            name = entry[1]
            found[name] = entry[2]
        elif name and line.startswith(" " * 12):
            found[name] += " " + line.strip()
        elif line.strip():
            break
    return found


def _formula(cls: type[PrimitiveOptions]) -> str:
    return re.sub(r"([;,]) (?=out_i|j over)", r"\1\n    ", cls.formula) or "not given"


def _options_table(cls: type[PrimitiveOptions], arguments: dict[str, str]) -> str:
    lines = ["| option | type | default | meaning |", "|---|---|---|---|"]
    types = field_types(cls)
    bases = [base for base in cls.__mro__[1:] if dataclasses.is_dataclass(base)]
    inherited = {field.name for base in bases for field in dataclasses.fields(base)}
    for field in sorted(dataclasses.fields(cls), key=lambda one: (one.name in inherited) - 2 * (one.name == "heads")):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        default = "required" if required else f"`{field.default!r}`"
        meaning = arguments.get(field.name, "").replace("|", "\\|")
        lines.append(f"| `{field.name}` | {_type(types[field.name])} | {default} | {meaning} |")
    return "\n".join(lines)


def _type(annotation: Any) -> str:
    parts = []
    for one in typing.get_args(annotation) if not isinstance(annotation, type) else (annotation,):
        if typing.get_origin(one) is typing.Literal:
            parts += [f'`"{value}"`' for value in typing.get_args(one)]
        elif typing.get_origin(one) is tuple:
            parts.append("several")
        else:
            names = {int: "integer", float: "number", bool: "true or false", str: "text", type(None): "`None`"}
            parts.append(names.get(one, str(one)))
    if typing.get_origin(annotation) is typing.Literal:
        parts = [f'`"{value}"`' for value in typing.get_args(annotation)]
    return " or ".join(parts)


def _use(options: PrimitiveOptions) -> str:
    name = type(options).__name__
    width = options.heads * HEAD_DIM
    place = f"attnkit.{describe_options(options)}" if name in attnkit.__all__ else repr(options.to_dict())
    return (
        f"import attnkit\nimport torch\n\n"
        f"mix = attnkit.HeadMix({width}, [{place}])\n"
        f"out = mix(torch.randn(1, 14, 14, {width}))"
    )


def _cost(cls: type[PrimitiveOptions]) -> str:
    if not cls.cost:
        return "The primitive gives no formula."
    letters = [f"{letter}: {LETTERS[letter]}" for letter in LETTERS if re.search(rf"\b{letter}\b", cls.cost)]
    return f"`{cls.cost}` multiply-adds; {', '.join(letters)}. Projections before and after are not included."


@cache
def _measured(name: str) -> str:
    """Multiply-adds of the group on three grids, counted by `attnkit.flops`, next to dense attention."""
    lines = [
        "| options | tokens | keys seen | attention | other | dense attention |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for options in examples(name):
        mix = attnkit.HeadMix(options.heads * HEAD_DIM, [options])
        for side in SIDES:
            count = attnkit.flops(mix, side)
            groups = [row for row in count.rows if row.path.startswith("groups.")]
            attention, dense = sum(row.attention for row in groups), 2 * side**4 * options.heads * HEAD_DIM
            other = sum(row.linear + row.conv for row in groups)
            density = next((row.density for row in groups if row.density is not None), None)
            seen = percent(density) if density is not None else "no softmax"
            chosen = describe_options(options).partition("(")[2][:-1].partition(", ")[2]
            shown = f"`{chosen}`" if chosen and side == SIDES[0] else ""
            cells = (shown, f"{side} x {side}", seen, metric(attention), metric(other))
            lines.append(f"| {' | '.join(cells)} | {metric(dense)} |")
    note = (
        f"Counted by `attnkit.flops` for {HEADS} heads of width {HEAD_DIM}; *keys seen* is a query's share of the keys "
        f"there are, *other* is what the group computes beside attention."
    )
    return "\n".join(lines) + "\n\n" + note


def _public(cls: type) -> str:
    name = cls.__name__
    return f"attnkit.{name}" if name in attnkit.__all__ else f"{cls.__module__}.{name}"


def _by_content(name: str) -> bool:
    return colour_of(name) == BY_CONTENT


def _content_note() -> str:
    return (
        "The keys depend on the image, for which the first tile stands: sky, ground and two like things. Queries, "
        "keys and predictors are set by hand so that like attends to like, as training would have to bring about."
    )


def _png(figure: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=160)
    return content.getvalue()

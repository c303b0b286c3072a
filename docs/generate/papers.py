"""Renews docs/papers.md: the papers' figures, from docs/tables/papers.json, beside what attnkit counts.

Run it from the repository root: python docs/generate/papers.py

It takes a quarter of a minute on one core. Models are counted with one block a stage, times the blocks there are.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import attnkit
from attnkit import factory
from attnkit.analysis.tracing import example_inputs, unmarked, visits
from attnkit.primitives import Conv, LearnedQuery

PAGE = Path(__file__).parents[1] / "papers.md"
FIGURES = Path(__file__).parents[1] / "tables" / "papers.json"
BEGIN, END = "<!-- tables: docs/generate/papers.py -->", "<!-- end of the tables -->"
PIXELS = 224
TITLES = {
    "biformer": "BiFormer",
    "qna_vit": "QnA-ViT",
    "sparsifiner": "Sparsifiner",
    "bigbird_vit": "Vision Big Bird",
}

# Sparsifiner on DeiT-S, as in the authors' code: tokens with the class token, width, blocks, heads; width of a head of
# the predictor, tokens it makes of all, and coefficients it keeps.
TOKENS, WIDTH, BLOCKS, HEADS = 197, 384, 12, 6
NARROW, SHORT, COEFFICIENTS = 32, 32, 8
KEEPS = (0.25, 0.1, 0.05)
# Share of the basis that is not zero: our guess for trained weights, that of fresh ones, and all.
DENSITIES = (0.05, 0.316, 1.0)
PRUNED_AT = (3, 6, 9)
SHARES = (0.7, 0.5, 0.35, 0.3)


def figures() -> dict[str, Any]:
    """The papers' figures with their sources."""
    return json.loads(FIGURES.read_text(encoding="utf-8"))


def depths(name: str) -> dict[str, int]:
    """Number of blocks by what their paths begin with."""
    config: Any = factory.config(name)
    if hasattr(config, "depth"):
        return {"blocks.": config.depth}
    return {f"stages.{at}.blocks.": stage.depth for at, stage in enumerate(config.stages)}


def times(name: str, path: str) -> int:
    """How often a layer of the shallow model is there in the whole one."""
    return next((count for begin, count in depths(name).items() if path.startswith(begin)), 1)


@functools.cache
def shallow(name: str) -> torch.nn.Module:
    """The model with one block a stage."""
    depth = {"depth": 1} if "blocks." in depths(name) else {"stages[*].depth": 1}
    return attnkit.build(name, **depth).eval()


def parameters(name: str) -> int:
    """Number of parameters of the whole model."""
    with torch.device("meta"):
        return sum(one.numel() for one in attnkit.build(name).parameters())


@functools.cache
def macs(name: str, size: int = PIXELS) -> int:
    """Multiply-adds of the whole model for one image."""
    return sum(row.total * times(name, row.path) for row in attnkit.flops(shallow(name), size).rows)


def key_counts(name: str) -> list[tuple[int, str, str, int, float, int]]:
    """Stage by stage: blocks, map, kind of heads, queries, keys that a query sees on average, and keys there are.

    Queries are those of the image; a class token's own is not among them.
    """
    model, found = shallow(name), []
    with unmarked(model):
        passed = visits(model, example_inputs(model, PIXELS))
    for visit in passed:
        assert visit.inputs is not None and visit.output is not None
        options, grid = getattr(visit.module, "options", None), visit.inputs.grid
        queries, keys, everything = visit.output.grid.tokens - visit.output.grid.prefix, 0.0, grid.tokens
        if isinstance(options, (Conv, LearnedQuery)):
            keys = options.kernel**2
        else:
            layout = visit.choices[0].call.layout
            everything = layout.num_keys
            keys = float(layout.visible()[..., grid.prefix :].double().mean())
        sizes = " x ".join(map(str, grid.sizes))
        found.append((times(name, visit.path), sizes, visit.kind, queries, keys, everything))
    return found


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table in Markdown whose first columns are text and whose others are numbers."""
    lines = [head, ["---"] * left + ["--:"] * (len(head) - left), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def off(ours: float, theirs: float) -> str:
    """The difference in percent."""
    return f"{100 * (ours / theirs - 1):+.2f} %"


def totals_table(family: str) -> str:
    """Parameters, multiply-adds and the authors' accuracies of a family."""
    rows = []
    for one in figures()["models"]:
        if one["family"] != family:
            continue
        name = one["name"]
        count, cost = parameters(name), macs(name)
        exact, macs_then = one["parameters"], one["macs"]
        more = [one["shown"] or "not given"]
        if exact:
            more += [f"{exact:,}", f"{count:,}", f"{count - exact:+,}" if count != exact else "0"]
        else:
            more += ["not known", f"{count:,}", off(count / 1e6, one["millions"])]
        if macs_then:
            more += [f"{macs_then} G", f"{cost / 1e9:.3f} G", off(cost / 1e9, macs_then)]
        else:
            more += ["not given", f"{cost / 1e9:.3f} G", ""]
        rows.append([f"`{name}`", *more, f"{one['top1']} %" if one["top1"] else "not given"])
    head = ["model", "as published", "parameters, theirs", "ours", "difference"]
    return markdown([*head, "multiply-adds, theirs", "ours", "difference", "top-1, theirs"], rows, left=2)


def keys_table(names: Sequence[str]) -> str:
    """Keys of every stage of some models."""
    rows = []
    for name in names:
        figure = figures()["keys"][name]
        for at, (blocks, sizes, kind, queries, keys, everything) in enumerate(key_counts(name)):
            theirs = "not known" if figure["keys"] is None else str(figure["keys"][at])
            rows.append([f"`{name}`", sizes, f"`{kind}`", str(blocks), f"{queries:,}", f"{everything:,}", theirs])
            rows[-1].append(f"{keys:.4g}")
    head = ["model", "map", "heads", "blocks", "queries", "keys there are", "seen by a query, theirs", "ours"]
    return markdown(head, rows, left=3)


def budget(keep: float, tokens: int = TOKENS) -> int:
    """Keys of a query: a share of the whole row, and never more than there are."""
    return min(math.ceil(round(keep * TOKENS, 6)), tokens)


def sparse_maps(keep: float, density: float, tokens: int = TOKENS) -> float:
    """Multiply-adds of a layer's sparse attention maps and of its predictor, by the formula of the page."""
    wide = WIDTH // HEADS
    narrowed = 2 * tokens * wide * NARROW * HEADS
    shortened = 2 * HEADS * NARROW * tokens * SHORT
    spread = HEADS * (tokens - 1) * COEFFICIENTS * tokens * density
    attended = 2 * WIDTH * (tokens + (tokens - 1) * budget(keep, tokens))
    return narrowed + shortened + spread + attended


def dense_maps(tokens: int = TOKENS) -> int:
    """Multiply-adds of a layer's dense attention maps."""
    return 2 * tokens**2 * WIDTH


def whole_model(keep: float, density: float, share: float, *, before_mlp: bool) -> float:
    """Multiply-adds of the model where three layers leave a share of the tokens each, kept keys among them.

    Args:
        keep: share of the keys.
        density: share of the basis that is not zero.
        share: share of the tokens that each of the three hands on.
        before_mlp: tokens leave between the attention and the MLP of such a layer, and else behind it.
    """
    ends = macs("vit_small") - BLOCKS * (12 * TOKENS * WIDTH**2 + dense_maps())
    total, left = float(ends), 1.0
    for block in range(BLOCKS):
        attending = 1 + math.ceil(left * (TOKENS - 1))
        if block in PRUNED_AT:
            left *= share
        after = 1 + math.ceil(left * (TOKENS - 1))
        total += 4 * attending * WIDTH**2 + sparse_maps(keep, density, attending)
        total += 8 * (after if before_mlp else attending) * WIDTH**2
    return total


def less(now: float, before: float) -> str:
    """By how much a number is smaller, in percent."""
    return f"-{100 * (1 - now / before):.1f} %"


def maps_table() -> str:
    """Attention maps and predictor, over the share of keys and the density of the basis."""
    rows = []
    for keep in KEEPS:
        cells = [f"{keep:g}", str(budget(keep))]
        for density in DENSITIES:
            cost = sparse_maps(keep, density)
            cells.append(f"{BLOCKS * cost / 1e6:.1f} M, {less(cost, dense_maps())}")
        rows.append(cells)
    return markdown(["keys kept", "a query", *(f"basis density {one:g}" for one in DENSITIES)], rows)


def executed_table() -> str:
    """What attnkit runs, counted by `attnkit.flops`."""
    rows = []
    for keep in KEEPS:
        model = attnkit.build("sparsifiner_deit_small", depth=1, **{"mix.groups[0].keep": keep}).eval()
        (row,) = (one for one in attnkit.flops(model, PIXELS).rows if one.kind == "mask_predictor")
        cost = row.attention + row.linear
        cells = [f"{BLOCKS * one / 1e6:.1f} M" for one in (row.attention, row.linear)]
        rows.append([f"{keep:g}", *cells, less(row.attention, row.dense), less(cost, row.dense)])
    head = ["keys kept", "maps", "predictor, as it runs", "maps alone", "maps and predictor"]
    return markdown(head, rows)


def combined_table() -> str:
    """The whole model with fewer keys and fewer tokens."""
    dense, goal = macs("vit_small"), figures()["sparsifiner"]["combined"]
    columns = [(keep, before_mlp) for keep in (0.25, 0.05) for before_mlp in (False, True)]

    def cost(share: float, column: tuple[float, bool]) -> float:
        return whole_model(column[0], DENSITIES[0], share, before_mlp=column[1])

    rows = [[f"{share:g}", *(less(cost(share, column), dense) for column in columns)] for share in SHARES]
    enough = [
        next(at / 100 for at in range(100, 0, -1) if cost(at / 100, column) <= (1 - goal / 100) * dense)
        for column in columns
    ]
    rows.append([f"the most for {goal} %", *(f"{share:g}" for share in enough)])
    places = {False: "behind the layer", True: "before its MLP"}
    return markdown(["tokens handed on", *(f"keys {keep:g}, {places[early]}" for keep, early in columns)], rows)


def pruned_table() -> str:
    """The whole model with fewer keys and fewer tokens, as attnkit runs it."""
    rows = []
    for share in (SHARES[1], SHARES[-1]):
        kept = [share ** sum(block >= place for place in PRUNED_AT) for block in range(BLOCKS)]
        cells = [f"{share:g}"]
        for keep in (KEEPS[0], KEEPS[-1]):
            changes = {"keep_tokens": kept, "mix.groups[0].keep": keep}
            model = attnkit.build("sparsifiner_deit_small", **changes).eval()
            cells.append(less(attnkit.flops(model, PIXELS).total, macs("vit_small")))
        rows.append(cells)
    return markdown(["tokens handed on", *(f"keys {keep:g}" for keep in (KEEPS[0], KEEPS[-1]))], rows)


def page() -> str:
    """What stands between the marks of the page."""
    claims = figures()["sparsifiner"]
    parts = []
    for family, title in TITLES.items():
        parts += [f"## {title}", f"Sources: {figures()['sources'][family]}.", totals_table(family)]
        names = [name for name in figures()["keys"] if name.startswith(family)]
        parts += [keys_table(names)]
        by_source: dict[str, list[str]] = {}
        for name in names:
            by_source.setdefault(figures()["keys"][name]["source"], []).append(f"`{name}`")
        parts += [f"Theirs for {', '.join(some)}: {source}." for source, some in by_source.items() if source]
        if family == "sparsifiner":
            parts += [
                "### Attention maps",
                f"The abstract says that attention costs {claims['least']} % to {claims['most']} % less, at a loss of "
                f"at most {claims['drop']} points of accuracy. It does not say at which share of keys, nor what is "
                "counted. By the formula above, of the dense maps' "
                f"{BLOCKS * dense_maps() / 1e6:.1f} M multiply-adds there are left:",
                maps_table(),
                "What attnkit runs, by `attnkit.flops`, where the predictor's products are dense ones:",
                executed_table(),
                "### Fewer keys and fewer tokens",
                f"The abstract says that with tokens left out too the whole model costs over {claims['combined']} % "
                "less. By formula, where layers 3, 6 and 9 hand on a share of their tokens each, and the basis has a "
                f"density of {DENSITIES[0]:g}:",
                combined_table(),
                "What attnkit runs with `keep_tokens`, which takes tokens out behind the layer, by `attnkit.flops`:",
                pruned_table(),
                f"Over {claims['combined']} % takes layers that hand on about a third of their tokens each, where "
                "those that are dropped skip that layer's MLP too, and about a fifth where they leave behind it. Which "
                "setting the abstract means is not known.",
            ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    torch.set_num_threads(1)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{page()}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")

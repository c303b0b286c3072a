"""Measures how much of all pairs the tiles of the Triton kernels of token sets visit; needs no GPU.

A dense vision transformer learns the digits of scikit-learn, then Sparsifiner's mask predictors learn to reconstruct
its attention. For the keys that they choose, and for random ones, it counts the keys that any query of a tile sees, and
the queries that see any key of one, for queries and keys in the order of the image and in others. `python
benchmarks/token_set_unions.py` takes a quarter of an hour on two cores and writes
`benchmarks/results/token-sets/unions.json`.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import attnkit
from attnkit.mixes import Mix
from attnkit.primitives import Dense, MaskPredictor
from attnkit.primitives.guesses import GuessHeads
from attnkit_models.bench.case import Setting
from attnkit_models.bench.machine import machine, now
from attnkit_models.distillation import attention_reconstruction, watching
from attnkit_models.sparsifiner import sparsifiner_micro
from attnkit_models.train.data import digits

RESULTS = Path(__file__).parent / "results" / "token-sets" / "unions.json"
KEEP, ROWS = (0.25, 0.1, 0.05), (16, 32, 64)
HEADS = 3


class Schedule(NamedTuple):
    """How long is learned and what is counted: a pass at 784 tokens takes eight times as long as one at 196.

    Attributes:
        batch: images of a step.
        steps: steps in which the transformer learns.
        predictor_steps: steps in which its predictors learn.
        images: held-out images whose keys are counted.
        learned_at: pixels a side of the images that the transformer has learned from before, by their schedule.
    """

    batch: int
    steps: int
    predictor_steps: int
    images: int
    learned_at: int | None = None


# By pixels a side; a token has four.
SCHEDULES = {56: Schedule(32, 150, 80, 16), 112: Schedule(8, 60, 60, 4, learned_at=56)}


def main() -> None:
    """Writes `benchmarks/results/token-sets/unions.json`, in which sizes that are not asked for stay as they are."""
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = tuple(SCHEDULES)
    parser.add_argument("--img-size", type=int, nargs="+", default=sizes, choices=sizes, help="pixels a side")
    given = parser.parse_args()
    cases = [one for size in given.img_size for one in measured(size, SCHEDULES[size])]
    # Read last, so that sizes can be measured side by side.
    before = json.loads(RESULTS.read_text(encoding="utf-8"))["cases"] if RESULTS.exists() else []
    again = {case["tokens"] for case in cases}
    cases = sorted(cases + [one for one in before if one["tokens"] not in again], key=itemgetter("tokens"))
    head = json.dumps({"kind": "token set unions", "machine": machine(Setting())}, indent=2)[:-2]
    rows = ",\n".join(f"    {json.dumps(one)}" for one in cases)
    RESULTS.write_text(f'{head},\n  "cases": [\n{rows}\n  ]\n}}\n', encoding="utf-8")


def measured(size: int, schedule: Schedule) -> list[dict[str, Any]]:
    """The records of one image size."""
    when = now()
    torch.manual_seed(0)
    train, held = images_of(size)
    model = trained_dense(size, schedule)
    accuracy = accuracy_of(model, held, schedule.batch)
    sparse = with_predictors(model, size)
    shown = held[0][: schedule.images]
    chosen: dict[str, tuple[Tensor, Tensor | None]] = {"at the start": chosen_by(sparse, shown)}
    error = train_predictors(model, sparse, train[0], schedule)
    chosen["trained"] = chosen_by(sparse, shown)
    scores, _ = chosen["trained"]
    chosen["random"] = (torch.rand_like(scores), None)
    learned = {name.replace("_", " "): number for name, number in schedule._asdict().items()}
    about = {"tokens": (size // 4) ** 2, **learned, "accuracy": accuracy, "reconstruction": error, **when}
    print(about, flush=True)
    found = []
    for keys, (scores, leading) in chosen.items():
        for keep in KEEP:
            budget = math.ceil(round(keep * scores.shape[-1], 6))
            mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(budget).indices, True)
            tiles = {"queries": (mask, orders(mask, leading)), "keys": (mask.mT, orders_of_keys(mask))}
            for side, (seen, ways) in tiles.items():
                for order, rank in ways.items():
                    shares = {str(rows): round(visited(seen, rank, rows), 4) for rows in ROWS}
                    case = {"keys": keys, "keep": keep, "tiles of": side, "order": order, "visited": shares}
                    found.append({**about, **case})
                    print(*case.values(), flush=True)
    return found


def images_of(size: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images and labels to learn from, and those held out."""
    data = digits((size, size))
    train, held = ((data.preprocess.normalise(one.pixels.float() / 255), one.labels) for one in (data.train, data.val))  # type: ignore[union-attr]
    return train, held


def trained_dense(size: int, schedule: Schedule) -> Any:
    """A dense transformer in the shape of `sparsifiner_micro`."""
    highest = 2e-3
    if schedule.learned_at is None:
        model = built(size, Dense(HEADS))
    else:
        model = trained_dense(schedule.learned_at, SCHEDULES[schedule.learned_at])
        model.set_input_size((size, size))
        highest = 5e-4
    optimizer = torch.optim.AdamW(model.parameters(), lr=highest, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, highest, schedule.steps)
    model.train()
    for number, (images, labels) in enumerate(batches(*images_of(size)[0], schedule.batch, schedule.steps)):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        if number % 20 == 19:
            print(f"{size} pixels, step {number + 1}, loss {float(loss.detach()):.3f}", flush=True)
    return model.eval()


@torch.no_grad()
def accuracy_of(model: Any, held: tuple[Tensor, Tensor], batch: int) -> float:
    """Share of held-out images that a model names."""
    parts = zip(*(one.split(batch) for one in held), strict=True)
    right = [(model(some).argmax(-1) == labels).sum() for some, labels in parts]
    return round(float(sum(right)) / len(held[1]), 4)


def with_predictors(model: Any, size: int) -> Any:
    """The same transformer with mask predictors in every layer, which have learned nothing yet."""
    sparse = built(size, MaskPredictor(HEADS, (size // 4) ** 2, KEEP[0], prefix=1))
    sparse.load_state_dict({**sparse.state_dict(), **model.state_dict()})
    return sparse.eval()


def train_predictors(model: Any, sparse: Any, images: Tensor, schedule: Schedule) -> float:
    """Trains predictors, as Sparsifiner's authors do, to reconstruct the dense attention; returns the last loss."""
    groups = [one for one in sparse.modules() if isinstance(one, GuessHeads)]
    weights = [one for group in groups for one in group.predictor.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=7.5e-3, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 7.5e-3, schedule.predictor_steps)
    loss = torch.zeros(())
    for some, _ in batches(images, torch.zeros(len(images)), schedule.batch, schedule.predictor_steps):
        with torch.no_grad(), watching(model) as seen:
            model(some)
        guesses = []
        for group, (_, inputs, _) in zip(groups, seen.visits, strict=True):
            q, k, _ = inputs.qkv
            guesses.append(group.predictor.guess(q, k, inputs))
        loss = attention_reconstruction(guesses, seen.maps())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        rate.step()
    return round(float(loss.detach()) / schedule.batch, 4)


@torch.no_grad()
def chosen_by(sparse: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of image tokens (layers, B, heads, N, N), and each query's largest basis row (layers, B, heads, N)."""
    scores, leading = [], []
    with watching(sparse) as seen:
        sparse(images)
        for group, inputs, _ in seen.visits:
            assert isinstance(group, GuessHeads)
            guess = group.guess(inputs, group.predicted.prefix)
            scores.append(guess.all_scores())
            leading.append((guess.query @ guess.pooled).argmax(-1))
    return torch.stack(scores), torch.stack(leading)


def orders(mask: Tensor, leading: Tensor | None) -> dict[str, Tensor | None]:
    """Orders of queries (..., N) in which neighbours may share keys; None is the image's own."""
    keys = mask.shape[-1]
    generator = torch.Generator().manual_seed(0)
    ranks = [torch.randperm(keys, generator=generator) for _ in range(2)]
    least = [torch.where(mask, rank, keys).amin(-1) for rank in ranks]
    found: dict[str, Tensor | None] = {"image": None, "least of ranked keys": (least[0] * keys + least[1]).argsort(-1)}
    if leading is not None:
        found["leading basis row"] = leading.argsort(dim=-1, stable=True)
    found["largest direction"] = by_largest_direction(mask)
    return found


def orders_of_keys(mask: Tensor) -> dict[str, Tensor | None]:
    """Orders of keys (..., N) in which neighbours may be seen by the same queries; None is the image's own."""
    seen_by = mask.sum(-2).argsort(dim=-1, descending=True, stable=True)
    return {"image": None, "how many queries see them": seen_by, "largest direction": by_largest_direction(mask.mT)}


def by_largest_direction(mask: Tensor) -> Tensor:
    """The order of rows along the direction in which they differ most."""
    centred = mask.float() - mask.float().mean(-2, keepdim=True)
    direction = torch.randn(*mask.shape[:-2], mask.shape[-1], 1, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        direction = F.normalize(centred.mT @ (centred @ direction), dim=-2)
    return (centred @ direction)[..., 0].argsort(-1)


def visited(mask: Tensor, order: Tensor | None, rows: int) -> float:
    """Share of the columns that a row's tile of so many rows visits, on average over rows."""
    if order is not None:
        mask = mask.gather(-2, order[..., None].expand_as(mask))
    queries = mask.shape[-2]
    mask = F.pad(mask, (0, 0, 0, -queries % rows))
    seen = mask.unflatten(-2, (-1, rows)).any(-2).float().mean(-1)
    return float(seen.repeat_interleave(rows, -1)[..., :queries].mean())


def built(size: int, group: Any) -> Any:
    """A transformer of `sparsifiner_micro`'s stem and depth with one group of heads."""
    config = replace(sparsifiner_micro(), mix=Mix((group,)), img_size=(size, size), in_chans=1, num_classes=10)
    return attnkit.build(config)


def batches(images: Tensor, labels: Tensor, batch: int, steps: int) -> Any:
    """Random batches of images and labels."""
    for _ in range(steps):
        some = torch.randint(len(images), (batch,))
        yield images[some], labels[some]


if __name__ == "__main__":
    main()

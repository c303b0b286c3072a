"""explain beside dense: whether a layer pays, and from which image size on."""

from __future__ import annotations

import pytest
import torch

import attnkit
from attnkit import Grid, HeadMix
from attnkit.analysis.surroundings import Surroundings
from attnkit.analysis.turning import BesideDense
from attnkit.kernels import costs, dispatch
from attnkit.layouts import Stencil
from attnkit.primitives import Plan
from attnkit.primitives.neighborhood import NeighborhoodHeads
from attnkit.registry import list_primitives, primitive_class


@pytest.fixture
def simple(monkeypatch):
    """Constants with which one sees the answer: a logit takes a microsecond, a window's start a millisecond."""
    nothing = dict.fromkeys(
        ("calls", "pairs", "products", "mask", "problems", "moved", "operators", "bytes", "sorted"), 0.0
    )
    logits = {**nothing, "pairs": 1e-6}
    known = {
        "sdpa": logits,
        "sdpa masked": {**logits, "calls": 1e6},
        "reference": {**logits, "calls": 1e6},
        "flex": {**logits, "calls": 1e6},
        "chunked small windows": {**logits, "calls": 1e6},
        "gather windows": {**logits, "problems": 1e-3},
        "around": nothing,
    }
    monkeypatch.setattr(costs, "constants", lambda: {"float32 inference": known, "float32 training": known})
    # Choices are remembered.
    dispatch.forget()
    yield
    dispatch.forget()


def test_the_size_from_which_on_a_layer_pays(simple):
    """On 10 x 10 tokens nine windows take 9 + 1.6 ms and dense heads 10 ms; on 11 x 11 they take 10.9 and 14.6 ms."""
    found = attnkit.explain(HeadMix(8, [attnkit.Window(1, 4)]), 16).beside
    assert len(found) == 1
    one = found[0]
    assert (one.path, one.kind, one.unit) == ("groups.0", "window", "tokens")
    assert one.milliseconds == pytest.approx(16 + 16 * 256 / 1e3)
    assert one.dense_milliseconds == pytest.approx(256**2 / 1e3)
    assert one.faster_from == 11 and one.tried[0] == 2
    assert "sparse is faster from 11 x 11 tokens on" in str(one)


def test_a_layer_that_does_not_pay_says_so(simple):
    found = attnkit.explain(HeadMix(8, [attnkit.Window(1, 4)]), 8)
    assert "dense heads would be faster; sparse is faster from" in str(found)


@pytest.mark.parametrize(
    ("own", "end"),
    [(2.0, "dense heads would be faster; slower at 32 x 32 tokens too"), (0.5, ": slower at 32 x 32 tokens")],
)
def test_a_layer_that_is_slower_on_the_largest_map_says_so(own, end):
    assert str(BesideDense("", "window", own, 1.0, (2, 32), None, "tokens")).endswith(end)


def test_dense_groups_and_convolutions_are_not_compared():
    assert attnkit.explain(HeadMix(32, [attnkit.Dense(1), attnkit.Conv(1)]), 8).beside == ()


def test_every_primitive_gets_an_answer():
    for kind in list_primitives():
        options = primitive_class(kind)
        for example in options.examples:
            mix = HeadMix(48, [options(heads=2, **example)])
            found = attnkit.explain(mix, 14)
            if any(row.kind == kind and row.layout != "dense" for row in found.rows):
                assert [one.kind for one in found.beside] == [kind]
                low, high = found.beside[0].tried
                assert low <= 14 <= high and low < high, f"{kind} takes no map but the one it was asked for"
                assert found.beside[0].milliseconds > 0


def test_a_model_is_asked_in_pixels():
    model = attnkit.build("bigbird_vit_micro", img_size=32)
    found = attnkit.explain(model, 32)
    assert found.beside and {one.unit for one in found.beside} == {"pixels"}
    assert "Beside dense heads, predicted for one image as measured on " in str(found)


def test_choosing_the_keys_is_part_of_the_time(monkeypatch):
    known = {name: dict(rates) for name, rates in costs.constants()["float32 inference"].items()}
    known["around"]["operators"] += 1.0
    mix = HeadMix(32, [attnkit.TopKRegion(2, regions=2, topk=1)])
    before = attnkit.explain(mix, 8).beside[0].milliseconds
    monkeypatch.setattr(costs, "constants", lambda: {"float32 inference": known})
    assert attnkit.explain(mix, 8).beside[0].milliseconds > before + 1e3


def test_training_is_predicted_with_its_backward_pass():
    mix = HeadMix(64, [attnkit.Window(2, 7)])
    inference, training = (attnkit.explain(mix, 56, training=one).beside[0] for one in (False, True))
    assert training.milliseconds > inference.milliseconds
    assert training.dense_milliseconds > inference.dense_milliseconds


def test_asking_leaves_no_mark():
    mix = HeadMix(32, [attnkit.RandomWindow(2, window=4)]).train()
    state, draws = torch.random.get_rng_state(), mix.draws.clone()
    x = torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(0))
    first = mix.eval()(x, Grid(8, 8))
    attnkit.explain(mix.train(), 8, training=True)
    assert torch.equal(mix.draws, draws) and torch.equal(torch.random.get_rng_state(), state)
    # Tables that were asked for without content must not be found later.
    assert torch.equal(mix.eval()(x, Grid(8, 8)), first)
    assert torch.isfinite(mix(torch.randn(1, 256, 32), Grid(16, 16))).all()


def test_what_is_counted_around_attention():
    with Surroundings() as counted:
        a = torch.ones(4, 8)
        _ = (a.expand(3, 4, 8).transpose(1, 2), torch.ones(2, 4) @ a)
        _ = a.topk(2)
    counts = counted.work.counts
    # ones, ones, matmul, topk; views are free.
    assert counts["operators"] == 4 and counts["sorted"] == 32
    assert counts["products"] == 2 * 4 * 8
    assert counts["bytes"] == 4 * (32 + 8 + (8 + 32 + 16) + (32 + 8)) + 8 * 8


def test_a_primitive_that_looks_at_values_is_explained_without_a_comparison():
    class Peeking(NeighborhoodHeads):
        def plan(self, inputs):
            return Plan(Stencil(inputs.grid, 3 if float(inputs.x.sum()) else 5))

    class Options(attnkit.Neighborhood):
        kind = "peeking"

        def build(self, context):
            return Peeking(self, context)

    found = attnkit.explain(HeadMix(8, [Options(1, 3)]), 6)
    assert len(found.rows) == 1 and found.beside == ()


def test_heads_of_other_widths_get_numbers_of_their_own():
    groups = [attnkit.Window(2, 7)]
    layers = torch.nn.Sequential(*(HeadMix(64, groups, head_dim=width) for width in (16, 64)))
    narrow, wide = attnkit.explain(layers, 28).beside
    assert narrow.dense_milliseconds < wide.dense_milliseconds

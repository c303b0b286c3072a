"""The page of the papers' figures: what it shows is what its script counts now."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import attnkit
from attnkit import factory
from attnkit.analysis.tracing import example_inputs, unmarked, visits

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def papers():
    spec = importlib.util.spec_from_file_location("papers_page", DOCS / "generate" / "papers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_what_is_counted(papers):
    shown = papers.PAGE.read_text(encoding="utf-8").partition(papers.BEGIN)[2].partition(papers.END)[0]
    assert shown.strip() == papers.page(), "run: python docs/generate/papers.py"


@pytest.mark.parametrize("name", attnkit.list_models("*_micro"))
def test_blocks_of_a_stage_cost_the_same(papers, name):
    size = factory.config(name).image
    assert papers.macs(name, size) == attnkit.flops(attnkit.build(name), size).total


def test_every_recipe_of_an_author_is_there(papers):
    """All but our own: the micro models, and what the page says has no counterpart."""
    shown = {one["name"] for one in papers.figures()["models"]}
    ours = {"bigbird_vit", "bigbird_vit_small", "sparsifiner_deit_tiny", "sparsifiner_deit_base"}
    ours |= (
        set(attnkit.list_models("*_micro")) | set(attnkit.list_models("*_lineage")) | set(attnkit.list_models("vit*"))
    )
    assert shown == set(attnkit.list_models()) - ours


def test_keys_are_counted_for_every_model_of_the_papers(papers):
    assert set(papers.figures()["keys"]) == {one["name"] for one in papers.figures()["models"]} | {"bigbird_vit_small"}


KNOWN = [name for pattern in ("biformer*", "qna*", "sparsifiner*small") for name in attnkit.list_models(pattern)]


@pytest.mark.parametrize("name", [name for name in KNOWN if not name.endswith("_micro")])
def test_keys_are_as_many_as_in_the_authors_configuration(papers, name):
    assert [row[4] for row in papers.key_counts(name)] == papers.figures()["keys"][name]["keys"]


@pytest.mark.parametrize("name", ["bigbird_vit_tiny", "bigbird_vit_small", "bigbird_vit_base"])
def test_keys_are_as_many_as_in_our_own_table(papers, name):
    """The paper's is not known: convolutions of 3 x 3, windows of 49, and cells of 8, 4, 2 and 1 tokens a side."""
    assert papers.figures()["keys"][name]["keys"] is None
    assert [row[4] for row in papers.key_counts(name)] == [9, 49, 49] * 4


@pytest.mark.parametrize("name", ["sparsifiner_deit_small", "sparsifiner_lvvit_small"])
def test_the_class_tokens_row_is_what_the_table_leaves_out(papers, name):
    ((_, _, _, queries, keys, everything),) = papers.key_counts(name)
    assert (queries, everything) == (196, 197)
    model = papers.shallow(name)
    with unmarked(model):
        (visit,) = visits(model, example_inputs(model, papers.PIXELS))
    seen = visit.choices[0].call.layout.visible()
    assert (seen[..., 0] == 197).all() and (seen[..., 1:] == 50).all()
    assert (196 * keys + 197) / 197 == pytest.approx(50.75, abs=0.005)


def test_the_formula_of_sparse_maps(papers):
    """Known values: with all keys and no predictor it is dense attention, and DeiT-S's sums."""
    dense = papers.dense_maps()
    predictor = papers.sparse_maps(1.0, 1.0) - 2 * papers.WIDTH * (197 + 196 * 197)
    assert papers.sparse_maps(1.0, 1.0) - predictor == dense
    assert 12 * dense / 1e6 == pytest.approx(357.66, abs=0.01)
    for keep, density, millions in ((0.25, 0.05, 180.4), (0.1, 1.0, 147.3), (0.05, 0.05, 108.1)):
        assert 12 * papers.sparse_maps(keep, density) / 1e6 == pytest.approx(millions, abs=0.06)


def test_what_the_abstract_claims_is_in_range_but_for_its_settings(papers):
    dense = papers.dense_maps()
    assert papers.sparse_maps(0.25, 0.05) / dense == pytest.approx(1 - 0.48, abs=0.02)
    assert papers.sparse_maps(0.05, 0.05) / dense == pytest.approx(1 - 0.69, abs=0.02)
    # Leaving no token out is the model with sparse maps alone.
    whole, half = (papers.whole_model(0.25, 0.05, share, before_mlp=True) for share in (1.0, 0.5))
    assert whole / 1e9 == pytest.approx(4.422, abs=0.001)
    total = papers.macs("vit_small")
    assert half > 0.45 * total
    assert papers.whole_model(0.05, 0.05, 0.35, before_mlp=True) < 0.4 * total
    assert papers.whole_model(0.05, 0.05, 0.36, before_mlp=True) > 0.4 * total

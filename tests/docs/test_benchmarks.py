"""The page on benchmarks shows the results that lie in the repository."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from attnkit_models.bench import missed, results
from attnkit_models.bench.case import OURS
from attnkit_models.bench.kinds import KINDS
from attnkit_models.bench.profiled import COPIES, FUSED, PARTS
from attnkit_models.bench.sweeps import NAMES, TIMM

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def benchmarks():
    spec = importlib.util.spec_from_file_location("benchmarks", DOCS / "generate" / "benchmarks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SHARES = {**dict.fromkeys(PARTS, 0.0), FUSED: 0.6, COPIES: 0.4}


def contender(scale: float) -> dict:
    time = {"min": scale, "median": scale, "rounds": 3}
    memory = {"memory forward": 1000, "memory training": 2000}
    return {"passed": True, "errors": {}, "forward": time, "training": time, **memory}


def measured(kind: str) -> dict:
    """Results of a kind in which dense attention, or timm's models, are always twice as fast."""
    layers = {OURS: contender(2.0), "dense SDPA": {**contender(1.0), "times": 16}}
    whole = {name: contender(2.0) for name in NAMES} | {f"timm {name}": contender(1.0) for name in TIMM}
    cases = [
        {
            "name": case.name,
            "problem": case.problem,
            "title": case.title,
            "sizes": dict(case.sizes),
            "date": "2026-11-21",
            "commit": "abc",
            "load": 0.0,
            "density": 0.25,
            "facts": {"tokens": 64, "batch": 1},
            "contenders": whole if case.problem == "models" else layers,
            "profile": {what: {"milliseconds": 2.0, "shares": SHARES} for what in ("forward", "training")},
            "seconds": 1.0,
        }
        for case in KINDS[kind]
    ]
    where = {"processor": "CPU", "instructions": "AVX2", "threads": 2, "memory": "8 GiB", "dtype": "float32"}
    where |= {"python": "3.12", "versions": {"torch": "2.15"}, "attnkit": "0.1"}
    return {**results.empty(kind, where), "cases": cases}


def test_the_page_shows_the_results(benchmarks):
    shown = benchmarks.PAGE.read_text(encoding="utf-8").partition(benchmarks.BEGIN)[2].partition(benchmarks.END)[0]
    assert shown.strip() == benchmarks.page(benchmarks.stored())


def test_every_stored_result_is_one_and_its_pictures_lie_beside_the_page(benchmarks):
    for stem, one in benchmarks.stored().items():
        assert results.wrong(one) == []
        assert stem.endswith(one["kind"])
    for name in re.findall(r"\]\((pictures/[^)]+)\)", benchmarks.PAGE.read_text(encoding="utf-8")):
        assert (DOCS / name).is_file()


def test_a_page_is_made_from_results_of_every_kind(benchmarks, tmp_path):
    folder, page = tmp_path / "results", tmp_path / "page.md"
    for kind in KINDS:
        results.write(folder / f"cpu-{kind}.json", measured(kind))
    results.write(folder / "cpu-headline-quick.json", measured("headline"))
    page.write_text(f"before\n\n{benchmarks.BEGIN}\nold\n{benchmarks.END}\n\nafter\n", encoding="utf-8")
    readme = tmp_path / "README.md"
    readme.write_text("It took 1,094 ms where dense attention\ntook 7, and 6 ms where a dense layer took 5. More.\n")
    benchmarks.renew(folder, page, readme)
    told = "It took 2 ms where dense attention\ntook 1, and 2 ms where a dense layer took 1. More.\n"
    assert readme.read_text(encoding="utf-8") == told
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before") and text.endswith("after\n") and "\nold\n" not in text
    for title in ("The headline: CPU, 2 threads", "Sweeps: CPU", "Whole models: CPU", "Where attnkit loses"):
        assert title in text
    assert "**missed**" in text and "2.00 times as fast" in text and "1/16 of the queries, times 16" in text
    assert text.count("### The headline") == 1
    lost = text.partition("### Where attnkit loses")[2]
    dense, timm = "attnkit | dense SDPA", f"biformer_tiny | timm {TIMM[0]}"
    for row in (f"regions/128x128 | {dense}", f"topk/4 | {dense}", f"models/224 | {timm}"):
        assert f"| {row} | 2.00 times as fast |" in lost
    assert "Nowhere faster than dense attention" in text and "Nowhere in these results" not in text
    pictures = re.findall(r"\]\((pictures/[^)]+)\)", text)
    assert len(pictures) == 2 and all((tmp_path / name).is_file() for name in pictures)


def test_make_bench_leaves_committed_results_alone():
    """`make test` holds the page to benchmarks/results, so what anyone measures must not land there."""
    makefile = (DOCS.parent / "Makefile").read_text(encoding="utf-8")
    assert "attnkit bench --out runs/bench $(ARGS)" in makefile
    assert "attnkit bench all $(ARGS)\n" in makefile and "docs/generate/benchmarks.py" in makefile
    assert "/runs/" in (DOCS.parent / ".gitignore").read_text(encoding="utf-8").split()


def test_cases_that_were_not_measured_are_told(benchmarks):
    found = measured("models")
    assert "Not measured" not in benchmarks.page({"cpu-models": found})
    gone = found["cases"].pop()["name"]
    assert f"Not measured: `{gone}`." in benchmarks.page({"cpu-models": found})


def test_missed_targets_are_explained_and_no_others(benchmarks):
    found = measured("headline")
    section = benchmarks.page({"cpu-headline": found}).partition(benchmarks.WHY)[2].partition("\n###")[0]
    named = set(re.findall(r"`([^`]+)`: ", section))
    assert named == set(missed.missed(found)) and "regions/128x128" in named
    assert section.count("| 60 % | 40 % |") == 2 * len(named)


def test_results_of_a_gpu_are_held_to_its_own_targets(benchmarks):
    for kind, told in (("gpu", "| 0.7 (aim 0.85) |"), ("headline", "Targets are for another kind of device.")):
        found = measured(kind)
        found["machine"] |= {"device": "cuda", "gpu": "NVIDIA H200", "cuda": "13", "dtype": "bfloat16"}
        text = benchmarks.page({f"nvidia-h200-{kind}": found})
        assert told in text and (benchmarks.WHY in text) is (kind == "gpu")
        assert "of the limit" in text and ("images/s" in text) is (kind == "gpu")


def test_the_readme_names_numbers_that_were_measured(benchmarks):
    headline = next(one for one in benchmarks.stored().values() if one["kind"] == "headline")
    cases = {record["name"]: record["contenders"] for record in headline["cases"]}
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    named = [
        f"{cases[case][contender]['forward']['min']:,.0f}"
        for case in ("regions/128x128", "predicted_keys/3136")
        for contender in (OURS, "dense SDPA")
    ]
    assert benchmarks.readme(readme, benchmarks.stored()) == readme
    # What was not measured says nothing about what was.
    assert benchmarks.readme(readme, {}) == benchmarks.readme(readme, {"one": {**headline, "cases": []}}) == readme
    text = " ".join(readme.split())
    assert f"took {named[0]} ms where dense attention took {named[1]}," in text
    assert f"{named[2]} ms where a dense layer took {named[3]}." in text

"""The GPU's cases: each is made ready, held to float64 and timed here, at small sizes, before a GPU is ever at hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import attnkit
from attnkit import Grid
from attnkit.cli import main
from attnkit.kernels import dispatch
from attnkit.layouts import Stencil
from attnkit_models.bench import missed, report, results, runner
from attnkit_models.bench.case import OURS, Case, Setting
from attnkit_models.bench.formulations.flexed import tiles
from attnkit_models.bench.gpu import GPU, PEERS, RECIPES
from attnkit_models.bench.kinds import KINDS
from attnkit_models.bench.machine import machine
from attnkit_models.bench.model_runs import GRAPH, NO_TRITON, PLAIN, Trainer, Way, built, from_timm
from attnkit_models.bench.run import CUDA, run_all

BY_PROBLEM = {case.problem: case for case in GPU}
# Who does not run everywhere, and need not.
ELSEWHERE = ("xformers", "NATTEN does not import", "CUDA graphs are for GPUs")


def shallow(name, size, seed):
    """A micro model with one block of every kind: a compiler takes seconds for more of the same code."""
    depth = {"depth": 1} if name == "vit_micro" or "sparsifiner" in name else {"stages[*].depth": 1}
    torch.manual_seed(seed)
    return attnkit.build(name, img_size=size, num_classes=10, **depth)


@pytest.fixture(autouse=True)
def quickly_compiled(monkeypatch):
    monkeypatch.setattr("attnkit_models.bench.model_runs.COMPILER", "eager")
    monkeypatch.setattr("attnkit_models.bench.model_problems.built", shallow)


def small(case, **sizes):
    """A case as a quick run on the CPU has it; FlexAttention compiles for each shape."""
    given = {**case.sizes, **case.small}
    return replace(case, sizes={**given, **({"flex": False} if "flex" in given else {}), **sizes})


def run_small(case, dtype=torch.float32, **sizes):
    record = runner.run_case(small(case, **sizes), Setting(dtype=dtype), 0.002)
    timed = 0
    for name, one in record["contenders"].items():
        if "why_not" in one:
            assert any(text in one["why_not"] for text in ELSEWHERE), (name, one)
            continue
        assert one["passed"], (name, one["errors"])
        assert not [what for what in one if what.startswith("failed")], (name, one)
        assert one["forward"]["min"] > 0
        timed += 1
    assert timed >= 2
    return record


@pytest.mark.parametrize("name", PEERS)
def test_whole_models_cost_as_many_multiply_adds_as_their_peers(name):
    # swin_tiny and convnext_tiny have 4.5 G, deit_small has 4.6 G.
    assert 4.5e9 / 1.12 <= attnkit.flops(attnkit.build(name), 224).total <= 4.5e9 * 1.12


# Cases that differ in what is made small are one problem here.
ALIKE: dict[str, list[Case]] = {}
for _case in GPU:
    ALIKE.setdefault(f"{_case.problem} {small(_case).sizes}", []).append(_case)


@pytest.mark.parametrize("cases", ALIKE.values(), ids=lambda cases: cases[0].name)
def test_every_case_runs_at_small_sizes(cases):
    targets = tuple(target for case in cases for target in case.targets)
    record = run_small(replace(cases[0], targets=targets))
    there = set(record["contenders"]) | {"FlexAttention"}
    assert all(target.against in there for target in targets)
    if targets:
        ours = record["contenders"][OURS]
        assert {"forward", "training", "memory forward", "memory training", "backends"} <= set(ours)
        assert set(record["profile"]) == {"forward", "training"}


@pytest.mark.parametrize("problem", BY_PROBLEM)
def test_half_precision_passes_the_gate(problem):
    run_small(BY_PROBLEM[problem], torch.bfloat16)


@pytest.mark.slow
def test_flex_attention_is_held_to_the_same_numbers():
    record = run_small(GPU[0], flex=True)
    flex = record["contenders"]["FlexAttention"]
    assert flex["passed"] and flex["forward"]["min"] > 0 and "training" not in flex


@pytest.mark.parametrize(("tokens", "tile", "regions"), [(64, 128, 8), (64, 64, 8), (256, 128, 4), (128, 128, 4)])
def test_the_mask_of_tiles_is_that_of_all_pairs(tokens, tile, regions):
    from torch.nn.attention.flex_attention import create_block_mask

    routed = torch.rand(2, regions, regions, generator=torch.Generator().manual_seed(0)) < 0.4
    found, count = tiles(routed, tokens, tile), regions * tokens
    wanted = create_block_mask(
        lambda b, h, i, j: routed[b, i // tokens, j // tokens], 2, None, count, count, device="cpu", BLOCK_SIZE=tile
    )
    assert torch.equal(found.to_dense(), wanted.to_dense())
    assert torch.equal(found.full_kv_num_blocks, wanted.full_kv_num_blocks)


@pytest.mark.parametrize(("sizes", "kernel"), [((16, 16), 5), ((20, 13), 7)])
def test_flex_attention_sees_the_neighborhoods_of_the_others(sizes, kernel):
    from attnkit_models.bench.formulations import flexed

    leaves = tuple(
        torch.randn(1, 2, sizes[0] * sizes[1], 16, generator=torch.Generator().manual_seed(0)) for _ in "qkv"
    )
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flexed, "_flex", lambda: lambda *given, block_mask: seen.append(block_mask))
        flexed.flex_neighborhoods(leaves, sizes, kernel).forward()
    token = torch.arange(sizes[0] * sizes[1])
    found = seen[0].mask_mod(0, 0, token[:, None], token[None])
    wanted = Stencil(Grid(*sizes), kernel, border="clamp").to_mask("cpu")[0, 0]
    assert torch.equal(found, wanted)


def test_the_list_has_what_the_targets_are_about():
    regions = [case for case in GPU if case.name.startswith("gpu/regions")]
    assert {case.sizes["side"] for case in regions} == {64, 128, 256}
    assert {case.sizes["width"] for case in regions} == {32, 64}
    for case in regions:
        assert 1 / 16 <= case.sizes["topk"] / case.sizes["regions"] ** 2 <= 1 / 4
        assert (case.sizes["side"] // case.sizes["regions"]) ** 2 >= 64
        assert {target.against for target in case.targets} == {"dense SDPA", "BiFormer gather", "FlexAttention"}
    stages = [case.sizes for case in GPU if case.name.startswith("gpu/biformer")]
    assert [(one["side"], one["heads"], one["topk"], one["batch"]) for one in stages] == [
        (56, 2, 1, 64),
        (28, 4, 4, 64),
        (14, 8, 16, 64),
    ]
    names = {case.name for case in GPU}
    assert names >= {f"gpu/step/{name}/512" for name in RECIPES[:2]} | {f"gpu/step/{name}/224" for name in RECIPES}
    assert names >= {f"gpu/models/{size}" for size in (224, 384, 512, 1024)}
    assert all(case.device == "cuda" and case.small for case in GPU)
    assert all(case.device == "cpu" for kind in ("headline", "sweeps", "models") for case in KINDS[kind])


def test_a_gpu_gets_the_batches_that_are_written():
    asked = []
    case = replace(BY_PROBLEM["windows"], problem="seen")
    runner.PROBLEMS["seen"] = "tests.bench.test_gpu:seen"
    try:
        seen.asked = asked
        runner.make(case, Setting(torch.device("cuda")))
        runner.make(replace(case, device="cpu"), Setting(torch.device("cuda")))
    finally:
        del runner.PROBLEMS["seen"]
    assert asked == [case.sizes["batch"], 8 * case.sizes["batch"]]


def seen(setting, *, batch, **sizes):
    seen.asked.append(setting.batch(batch))


def test_ways_to_run_a_model():
    assert Way.of("biformer_tiny") == Way("biformer_tiny")
    assert Way.of("a on plain formulation, compiled, in a CUDA graph") == Way("a", PLAIN, True, True)
    assert Way.of("a, in a CUDA graph") == Way("a", graph=True)
    assert Way("biformer_tiny", PLAIN).backends.startswith("biformer_gather,")
    assert Way("sparsifiner_deit_small", PLAIN).backends == "reference"
    assert "triton" not in Way("qna_vit_tiny", NO_TRITON).backends
    assert Way("x", "biformer_gather").backends == "biformer_gather,auto"


def test_models_of_timm_that_take_no_size_are_built():
    timm = pytest.importorskip("timm")
    assert timm.is_model("convnext_tiny")
    model = from_timm("convnext_atto", 64)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)
    with pytest.raises(ValueError, match="timm has no model 'convnext_tyni'; did you mean"):
        from_timm("convnext_tyni", 64)


@pytest.mark.cuda
def test_a_step_in_a_graph_is_the_same_step():
    images = torch.randn(4, 3, 32, 32, device="cuda")
    plain, graph = (
        Trainer(built("biformer_micro", 32, 0), images, torch.bfloat16, way) for way in (Way("m"), Way("m", graph=True))
    )
    for trainer in (plain, graph):
        trainer.prepare()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            for _ in range(3):
                ours, theirs = (trainer.step() if grad else trainer.forward() for trainer in (graph, plain))
    with torch.no_grad():
        torch.testing.assert_close(graph.forward(), plain.forward(), rtol=0.05, atol=0.05)
    assert ours is None and theirs is None
    assert set(graph.captured) == {"forward", "training"}


def a_file(kind: str, name: str, device: str, **changes):
    """Results of one case in which attnkit takes 2 ms and the others 4."""

    def one(scale: float) -> dict:
        time = {"min": scale, "median": scale, "rounds": 3}
        return {
            "passed": True,
            "errors": {},
            "forward": time,
            "training": time,
            "memory forward": 9,
            "memory training": 9,
        }

    others = ("dense SDPA", "BiFormer gather", "FlexAttention")
    record = {"name": name, "problem": "regions", "title": name, "sizes": {}, "date": "2026-11-21", "commit": "abc"}
    record |= {"load": 0.1, "density": 0.25, "facts": {"tokens": 64}, "seconds": 1.0}
    record |= {"contenders": {OURS: one(2.0), **{name: one(4.0) for name in others}}, **changes}
    about = {**machine(Setting()), "device": device, "threads": 2}
    return {**results.empty(kind, about), "cases": [record]}


def test_targets_are_those_of_the_device():
    gpu, cpu = ("gpu", GPU[0].name), ("headline", "regions/128x128")
    assert report.targets_table(a_file(*gpu, "cuda")) and report.targets_table(a_file(*cpu, "cpu"))
    for kind, name, device in ((*gpu, "cpu"), (*cpu, "cuda")):
        assert report.targets_table(a_file(kind, name, device)) == ""
        assert missed.missed(a_file(kind, name, device)) == []
    table = report.targets_table(a_file(*gpu, "cuda"))
    assert "| 0.7 (aim 0.85) | 0.50 | **missed** |" in table
    assert "| FlexAttention | forward | 1.2 | 2.00 | yes |" in table


def test_what_is_only_reported_has_no_verdict():
    case = next(case for case in GPU if case.problem == "predicted_keys")
    target = next(target for target in case.targets if not target.at_least)
    record = a_file("gpu", case.name, "cuda")["cases"][0]
    assert report.reached(record, 0.1, target, 2) == "reported"


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [({"quick": True}, "not judged: a quick run"), ({"load": 5.5}, "not judged: the machine was busy (load 5.5)")],
)
def test_runs_that_say_little_are_not_judged(changes, verdict):
    found = a_file("headline", "regions/128x128", "cpu", **changes)
    rows = [line for line in report.targets_table(found).splitlines()[2:] if "memory" not in line]
    assert rows and all(verdict in row for row in rows)
    assert "missed" not in "".join(rows)
    # Bytes are the same on a busy machine.
    (memory,) = (line for line in report.targets_table(found).splitlines() if "memory" in line)
    assert ("missed" in memory) is ("quick" not in changes)


def test_quick_runs_are_marked_and_small(tmp_path):
    case = BY_PROBLEM["windows"]
    before = results.empty("gpu", machine(Setting()))
    found = run_all([case], before, tmp_path / "one.json", Setting(), list, quick=True)
    record = found["cases"][0]
    assert record["quick"] is True and record["sizes"] == {**case.sizes, **case.small}
    assert record["title"].endswith("; at small sizes: batch 2, heads 2, side 20")
    assert "not judged: a quick run" in report.targets_table(
        {**found, "machine": {**found["machine"], "device": "cuda"}}
    )
    assert results.read(tmp_path / "one.json") == json.loads(json.dumps(found))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["gpu"], "with --quick --device cpu its cases run at small sizes"),
        (["gpu", "--device", "cpu"], "too large for a CPU; --quick runs them there"),
        (["--only", "gpu/models/*"], "but 4 of gpu: `attnkit bench gpu --only 'gpu/models/*'` runs them"),
    ],
)
def test_where_it_runs_is_told(capsys, monkeypatch, words, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", *words]) == 2
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == 1


def test_the_command_lists_them(capsys):
    assert main(["bench", "gpu", "--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(GPU)


def test_the_pages_say_how_many_cases_and_how_long():
    docs = Path(__file__).parents[2] / "docs"
    said = " ".join((docs / "triton.md").read_text(encoding="utf-8").split())
    minutes = CUDA * sum(case.seconds for case in GPU) / 60
    assert round(minutes) == 2 and f"about two minutes in all, {len(GPU)} cases of one to five seconds" in said
    assert all(1 <= round(CUDA * case.seconds) <= 5 for case in GPU)
    for page in (docs / "index.md", docs.parent / "README.md"):
        text = page.read_text(encoding="utf-8")
        assert "`attnkit bench gpu`" in text and "triton.md)" in text


def test_the_page_on_dispatch_has_every_order():
    page = (Path(__file__).parents[2] / "docs" / "concepts" / "dispatch.md").read_text(encoding="utf-8")
    for order in (dispatch.DENSE_ORDER, dispatch.MASKED_ORDER, dispatch.SPARSE_ORDER):
        assert f"| {', '.join(f'`{name}`' for name in order)} |" in page


def test_graphs_are_refused_without_a_gpu():
    case = next(case for case in GPU if case.name == "gpu/compiled/biformer_tiny")
    made = runner.make(small(case), Setting())
    refused = {name for name, one in made.contenders.items() if one.why_not}
    assert refused == {name for name in made.contenders if name.endswith(GRAPH)}

"""Results files, the tables and plots made from them, and the command."""

from __future__ import annotations

import json

import pytest
import torch

from attnkit.cli import main
from attnkit.errors import ConfigError
from attnkit_models.bench import kinds, losses, missed, plots, report, results, run
from attnkit_models.bench.case import Case, Setting
from attnkit_models.bench.machine import file_name, machine
from attnkit_models.bench.run import run_all
from attnkit_models.bench.sweeps import IMAGE_SIZE, TOPK
from tests.bench.small import small_case

MEASURED = {"min": 2.0, "median": 2.5, "rounds": 3}


def record(name: str, density: float | None = 0.25, dense: float = 8.0, **others: float) -> dict:
    """A record of a case in which attnkit needs 2 ms and 1 MB."""

    def contender(scale: float) -> dict:
        time = {**MEASURED, "min": 2.0 * scale}
        return {
            "passed": True,
            "errors": {"output": 1e-7},
            "forward": time,
            "training": time,
            "memory forward": int(1e6 * scale),
            "memory training": int(2e6 * scale),
        }

    contenders = {"attnkit": contender(1.0), "dense SDPA": contender(dense / 2)}
    contenders |= {other: contender(scale) for other, scale in others.items()}
    contenders["NATTEN"] = {"why_not": "NATTEN does not import"}
    head = {"name": name, "problem": "regions", "title": name, "sizes": {}, "date": "2026-11-21", "commit": "abc"}
    return {
        **head,
        "load": 0.1,
        "density": density,
        "facts": {"tokens": 64, "topk": 2},
        "contenders": contenders,
        "seconds": 1.0,
    }


def a_file(*cases: dict, kind: str = "headline") -> dict:
    return {**results.empty(kind, machine(Setting())), "cases": list(cases)}


def test_results_survive_the_file(tmp_path):
    path = tmp_path / "deep" / "one.json"
    before = a_file(record("regions/128x128", **{"BiFormer gather": 3.0}), record("topk/2"))
    results.write(path, before)
    assert results.read(path) == json.loads(json.dumps(before))
    after = results.merged(before, record("topk/2", dense=2.0))
    assert len(after["cases"]) == 2
    assert after["cases"][1]["contenders"]["dense SDPA"]["forward"]["min"] == 2.0
    assert results.wrong(after) == []


def test_broken_files_are_told(tmp_path):
    path = tmp_path / "one.json"
    for text, message in (("{", "cannot be read"), ("[]", "must be an object"), ('{"schema": 1}', "must be")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=message):
            results.read(path)
    lacking = record("topk/2")
    del lacking["density"]
    assert results.wrong(a_file(lacking)) == ["case 'topk/2' lacks density"]
    cheating = record("topk/2")
    cheating["contenders"]["attnkit"]["passed"] = False
    assert "did not pass" in results.wrong(a_file(cheating))[0]
    assert "schema" in results.wrong({**a_file(), "schema": 0})[0]


def test_targets_hit_and_missed():
    found = a_file(record("regions/128x128", dense=8.0, **{"BiFormer gather": 3.9}))
    table = report.targets_table(found)
    rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in table.splitlines()[2:]]
    assert rows[0] == ["BiFormer gather", "forward", "3.5", "3.90", "yes"]
    assert rows[1] == ["BiFormer gather", "forward and backward", "4", "3.90", "**missed**"]
    assert rows[3] == ["dense SDPA", "sparse efficiency, forward", "0.8", "1.00", "yes"]
    del found["cases"][0]["contenders"]["BiFormer gather"]["forward"]
    assert "not measured" in report.targets_table(found).splitlines()[2]


def test_a_target_against_another_case():
    flat, bent = record("learned_query/64x64/k9"), record("learned_query/64x64/k7")
    bent["contenders"]["attnkit"]["memory training"] = 3_000_000
    target = kinds.KINDS["headline"][6].targets[-1]
    assert target.case == "learned_query/64x64/k7"
    assert report.ratio(report.by_name(a_file(flat, bent)), flat["name"], target) == pytest.approx(1.5)
    assert report.ratio(report.by_name(a_file(flat)), flat["name"], target) is None


def test_losing_points_are_told():
    assert "Nowhere" in losses.losses(a_file(record("topk/2")))
    text = losses.losses(a_file(record("topk/64", density=1.0, dense=1.0)))
    fast, small = ["2.00 times as fast"] * 2, ["0.50 of it"] * 2
    assert f"| {' | '.join(['topk/64', 'attnkit', 'dense SDPA', *fast, *small])} |" in text
    assert "less than 0.5 %" in losses.losses(a_file(record("topk/64", dense=1.996)))
    assert "Nowhere" in losses.losses(a_file(record("topk/2", **{"all but attention": 0.5})))


def test_a_wrong_attnkit_loses():
    wrong, gone = record("regions/128x128"), {**record("regions/256x256"), "contenders": {}, "error": "OSError: full"}
    found = {"passed": False, "errors": {"output": 0.1}}
    wrong["contenders"]["attnkit"] = found
    text = losses.losses(a_file(wrong, gone))
    assert "| regions/128x128 | attnkit | attnkit is **wrong**: output off by 0.1 |" in text
    assert "not measured: OSError: full" in text
    table = report.targets_table(a_file(wrong, gone))
    assert table.count("**wrong**") == 5 and table.count("not measured") == 5
    assert missed.missed(a_file(wrong, gone)) == ["regions/128x128"]
    assert "OSError: full" in report.case_table(gone) and "OSError: full" in report.models_table(gone)
    assert "OSError: full" in report.sweep_table(TOPK, a_file({**gone, "name": "topk/2"}, kind="sweeps"))


def test_every_recipe_is_held_to_its_rivals():
    made = record("models/224", density=None)
    scales = {"biformer_tiny": 2.0, "biformer_tiny on biformer_gather": 1.0, "vit_small": 4.0, "timm deit": 1.0}
    each = made["contenders"]["attnkit"]
    made["contenders"] = {name: {**each, "forward": {**MEASURED, "min": scale}} for name, scale in scales.items()}
    rows = [
        [cell.strip() for cell in line.split("|")[2:5]]
        for line in losses.losses(a_file(made, kind="models")).splitlines()
        if line.startswith("| models")
    ]
    assert rows == [
        ["biformer_tiny", "biformer_tiny on biformer_gather", "2.00 times as fast"],
        ["biformer_tiny", "timm deit", "2.00 times as fast"],
        ["vit_small", "timm deit", "4.00 times as fast"],
    ]


def test_crossover_lies_between_the_points_around_it():
    assert report.crossover([(0.1, 10.0), (1.0, 0.1)]) == pytest.approx(10**-0.5)
    assert report.crossover([(0.1, 10.0), (1.0, 2.0)]) is None
    assert report.crossover([(1.0, 0.5), (0.25, 2.0), (0.01, 9.0)]) == pytest.approx(0.5)


def test_tables_and_plots_of_sweeps(tmp_path):
    cases = [record(f"topk/{topk}", density=topk / 64, dense=2 * 32 / topk) for topk in (1, 4, 16, 64)]
    found = a_file(*cases, record("image_size/28x28"), kind="sweeps")
    table = report.sweep_table(TOPK, found)
    assert table.count("attnkit") == 4 and "NATTEN" not in table
    assert report.peers_missing(cases) == "- NATTEN: NATTEN does not import"
    assert report.crossover(report.points(TOPK, found, "forward")) == pytest.approx(0.5)
    for name, plot in plots.PLOTS.items():
        plot(found, tmp_path / f"{name}.png")
        first = (tmp_path / f"{name}.png").read_bytes()
        plot(found, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes() == first
        assert len(first) > 5000


def drawn(monkeypatch, plot, found):
    """The axes of a plot, each as its lines by name."""
    figures = []
    monkeypatch.setattr(plots, "save", lambda made, path: figures.append(made))
    plot(found, None)
    return [{line.get_label(): line for line in axis.get_lines()} for axis in figures[0].axes], figures[0].axes


def test_a_cross_marks_where_dense_attention_becomes_the_faster_one(monkeypatch):
    cases = [record(f"topk/{topk}", density=topk / 64, dense=2 * 32 / topk) for topk in (1, 4, 16, 64)]
    lines, axes = drawn(monkeypatch, plots.plot_density, a_file(*cases, kind="sweeps"))
    for named, axis in zip(lines, axes, strict=True):
        sweep = named["routed regions (by topk)"]
        assert list(sweep.get_xdata()) == [1 / 64, 4 / 64, 16 / 64, 1.0]
        assert list(sweep.get_ydata()) == pytest.approx([32, 8, 2, 0.5])
        (cross,) = (one for one in axis.get_lines() if one.get_marker() == "x")
        assert list(cross.get_xdata()) == pytest.approx([0.5]) and list(cross.get_ydata()) == [1.0]
        assert [text.get_text() for text in axis.texts] == ["50 %"]
        assert axis.get_xlabel() == "density"


def test_time_and_memory_are_drawn_against_tokens(monkeypatch):
    cases = [record(case.name, dense=scale) for scale, case in zip((4.0, 8.0), IMAGE_SIZE.cases, strict=False)]
    cases[1]["facts"] = {**cases[1]["facts"], "tokens": 256}
    del cases[1]["contenders"]["dense SDPA"]["memory training"]
    (time, memory), axes = drawn(monkeypatch, plots.plot_tokens, a_file(*cases, kind="sweeps"))
    assert list(time["attnkit"].get_xdata()) == [64, 256] and list(time["dense SDPA"].get_ydata()) == [4.0, 8.0]
    # What was not measured is not drawn.
    assert list(memory["attnkit"].get_ydata()) == [2.0, 2.0] and list(memory["dense SDPA"].get_xdata()) == [64]
    assert "NATTEN" not in time and axes[1].get_ylabel() == "MB at the peak"


def test_models_are_told_in_images_a_second():
    made = record("models/224", density=None)
    made["facts"] = {"size": 224, "batch": 4}
    line = report.models_table(made).splitlines()[2]
    assert line == "| attnkit | 2,000 | 2,000 | 1 MB | 2 MB |"


@pytest.fixture
def tiny(monkeypatch):
    """Two cases that take a moment."""
    cases = (small_case("windows", "windows/small"), small_case("regions", "regions/small"))
    monkeypatch.setattr(kinds, "KINDS", {**kinds.KINDS, "headline": cases})
    return cases


def test_the_command_measures_and_goes_on(tiny, tmp_path, capsys):
    assert main(["bench", "--quick", "--only", "windows/*", "--out", str(tmp_path), "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert "windows/small" in printed and "xformers" in printed and "regions/small" not in printed
    (path,) = tmp_path.glob("*-headline-quick.json")
    assert [one["name"] for one in results.read(path)["cases"]] == ["windows/small"]
    assert main(["bench", "--quick", "--resume", "--out", str(tmp_path), "--threads", "1"]) == 0
    assert "windows/small: measured at this commit" in capsys.readouterr().out
    assert [one["name"] for one in results.read(path)["cases"]] == ["windows/small", "regions/small"]
    assert main(["bench", "--report", "--out", str(tmp_path)]) == 0
    assert "| dense SDPA |" in capsys.readouterr().out


def test_what_was_interrupted_is_timed_again_later(tiny, tmp_path, capsys, monkeypatch):
    """The second visit comes minutes after the first, also where another process has to make it."""
    command = ["bench", "--quick", "--out", str(tmp_path), "--threads", "1"]
    monkeypatch.setattr(run, "time_again", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(command) == 130
    monkeypatch.undo()
    monkeypatch.setattr(kinds, "KINDS", {**kinds.KINDS, "headline": tiny})
    for where in ("machine", "run"):
        monkeypatch.setattr(f"attnkit_models.bench.{where}.commit", lambda: "0123456789")
    (path,) = tmp_path.glob("*.json")
    assert [one.get("visits") for one in results.read(path)["cases"]] == [None, None]
    assert main([*command, "--resume"]) == 0
    assert capsys.readouterr().out.count("once more:") == 2
    assert [one.get("visits") for one in results.read(path)["cases"]] == [2, 2]
    assert main([*command, "--resume"]) == 0
    assert "once more:" not in capsys.readouterr().out


def test_the_command_lists(capsys):
    assert main(["bench", "all", "--list"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == sum(map(len, kinds.KINDS.values()))
    assert any(one.startswith("stencil/7x7 ") and "window around it, 64 x 64 tokens" in one for one in rows)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--only", "region/128x128"], "did you mean 'regions/128x128'"),
        (["sweep"], "did you mean 'sweeps'"),
        (["stencil"], "cannot run 'stencil'; `attnkit bench --tune stencil` times the configurations of those kernels"),
        (["stencil"], "of those kernels, and `attnkit bench --only 'stencil'` runs the cases of that name (known: "),
        (["regions"], "cannot run 'regions'; `attnkit bench --only 'regions'` runs the cases of that name (known: "),
        (["token-sets", "--list"], "`attnkit bench --tune token_sets` times"),
        (["swep"], "cannot run 'swep'; did you mean 'sweeps'? (known: all, headline, sweeps, models, gpu)"),
        (["--device", "cud"], "did you mean 'cuda'"),
        (["--dtype", "float31"], "did you mean 'float32'"),
        (["--threads", "0"], "--threads 0 must be"),
        (["--report", "--out", "nowhere"], "there are no results in nowhere"),
        (
            ["sweeps", "--report"],
            "--report takes --out only, such as `attnkit bench --report --out runs/bench`, so sweeps",
        ),
        (["--report", "--quick", "--only", "x"], "so --only, --quick would do nothing"),
        (["--tune", "--report"], "--tune takes --only, --list, --resume and --out only"),
        (["headline", "--only", "topk/*"], "'topk/*' names no case of headline but 7 of sweeps: `attnkit bench sweeps"),
    ],
)
def test_mistakes_are_one_sentence(capsys, words, says):
    assert main(["bench", *words]) == 2
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == 1


def test_a_gpu_that_is_not_there_is_told(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--device", "cuda"]) == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_a_case_that_cannot_be_made_does_not_end_the_run(tmp_path):
    broken = Case("regions/huge", "regions", {"batch": -1, "heads": 1, "side": 4, "width": 4, "regions": 2, "topk": 1})
    told: list[str] = []
    path = tmp_path / "one.json"
    found = run_all([broken, small_case("windows")], a_file(), path, Setting(), told.append, quick=True)
    assert "error" in found["cases"][0] and "contenders" in found["cases"][1]
    assert results.read(path) == json.loads(json.dumps(found))
    assert any("RuntimeError" in line for line in told)


def test_without_git_the_code_itself_says_what_was_measured(monkeypatch):
    import attnkit_models.bench.machine as module

    monkeypatch.undo()
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    first = module.commit()
    assert first.startswith("code ") and len(first) == 15
    module._digest.cache_clear()
    assert module.commit() == first


def test_a_file_a_machine_and_kind():
    about = machine(Setting())
    assert {"processor", "threads", "versions", "attnkit", "dtype", "memory"} <= set(about)
    assert file_name({**about, "processor": "AMD EPYC", "threads": 2}, "headline") == (
        "amd-epyc-2-threads-float32-headline.json"
    )
    gpu = {**about, "gpu": "NVIDIA H200", "dtype": "bfloat16"}
    assert file_name(gpu, "models") == "nvidia-h200-bfloat16-models.json"


@pytest.mark.parametrize("words", [["--only", "regions/*"], ["--resume"]])
def test_results_of_another_machine_are_not_added_to(tiny, tmp_path, capsys, words):
    command = ["bench", "--quick", "--out", str(tmp_path), "--threads", "1"]
    assert main([*command, "--only", "windows/*"]) == 0
    (path,) = tmp_path.glob("*.json")
    before = results.read(path)
    before["machine"] |= {"python": "3.9.1", "versions": {**before["machine"]["versions"], "torch": "1.0"}}
    results.write(path, before)
    capsys.readouterr()
    assert main([*command, *words]) == 2
    told = capsys.readouterr().err
    assert "torch '1.0', now" in told and "python '3.9.1', now" in told and told.count("\n") == 1
    assert results.read(path) == before


@pytest.mark.parametrize("names", [["headline", "sweeps", "models"], ["gpu"]])
def test_on_a_gpu_the_whole_takes_under_eight_minutes(tmp_path, monkeypatch, names):
    shares = []
    monkeypatch.setattr(run, "run_case", lambda case, setting, share: shares.append(share) or record(case.name))
    cases = [case for name in names for case in kinds.KINDS[name]]
    run_all(cases, a_file(), tmp_path / "one.json", Setting(torch.device("cuda")), list)
    spent = sum(share * case.seconds for share, case in zip(shares, cases, strict=True))
    # A quarter is left for what is not timed: gates, memory, warming up.
    assert 0 < spent < 0.75 * 8 * 60

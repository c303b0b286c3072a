"""Tuning: which lines there are, which configurations are tried, which one wins, and what is told and written."""

from __future__ import annotations

import inspect
import json
import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from attnkit.cli import main
from attnkit.errors import ConfigError
from attnkit.kernels.triton import sweeping
from attnkit.kernels.triton.blocks.configs import REGION_SIZES, tile_of
from attnkit.kernels.triton.devices import DEVICE_CLASSES, device_class
from attnkit.kernels.triton.table import Table
from attnkit_models.bench import results
from attnkit_models.bench.timing import Times
from attnkit_models.bench.tuning import blocks, token_sets, tuner, workbench
from attnkit_models.bench.tuning.lines import Family, Started, configs_of, family_of, lines, table_of
from attnkit_models.bench.tuning.records import table, told
from attnkit_models.bench.tuning.room import Room
from attnkit_models.bench.tuning.search import Cut, Lead, Limits, climbed, lead, neighbours
from attnkit_models.bench.tuning.tuner import Session, images, title, tune
from attnkit_models.bench.tuning.workbench import Workbench, compared, exact, faults, put

FAMILIES = tuple(sweeping.families())
CPU = torch.device("cpu")
LIMITS = Limits((16, 64), (16, 128))


def small(device, images):
    return Room(device, 1, heads=1, side=8)


# One of each direction of each family, for calls that have all there is; and the one whose tiles a prefix takes too.
DIRECTIONS = [
    *{(line.family, line.direction): line for line in lines() if line.tables or "learned" in line.name}.values(),
    *lines(only="blocks/key_gradient/bfloat16/64/16"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_kernels_can_be_tuned(family):
    found = family_of(family)
    wanted = [
        *Family.__annotations__,
        *(name for name, one in vars(Family).items() if inspect.isfunction(one) and name[0] != "_"),
    ]
    assert len(wanted) >= 7 and all(hasattr(found, name) for name in wanted)
    names = {line.name for line in lines(family)}
    assert len(names) == len({line.spot for line in lines(family)}) == len(lines(family)) > 50
    assert all(one.startswith(f"{family}/") for one in names)


@pytest.mark.parametrize("family", FAMILIES)
def test_lines_have_the_names_of_the_page_on_kernels(family):
    sweep, names = sweeping.families()[family], {line.name for line in lines(family)}
    shown = {
        sweep.name(one).replace("sm_90", family, 1) for one in sweep.lines() if sweep.name(one).startswith("sm_90/")
    }
    # What takes no configuration has no line, and the page leaves out what is compiled to the same code.
    without = {one for one in shown if one.split("/")[1] in ("window_gradient", "lists")}
    assert shown - without <= names and len(shown - without) > len(names) / 2


def test_lines_are_found_by_name():
    assert [one.name for one in lines(None, "blocks/forward/*32*/32/64")] == [
        f"blocks/forward/{numbers}/32/64" for numbers in ("float32", "tf32", "float32 and bias", "tf32 and bias")
    ]
    assert lines("all") == lines() == [one for family in FAMILIES for one in lines(family)]
    assert {one.family for one in lines(only="stencil")} == {"stencil"}
    line = lines("stencil", "stencil/query_gradient/tf32 and tables/64/15")[0]
    assert (line.direction, line.numbers, line.dtype) == ("query_gradient", "tf32", torch.float32)
    assert (line.size, line.head_dim, line.tables, line.backward) == (15, 64, True, True)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            ("stencils", None),
            "cannot tune 'stencils'; did you mean 'stencil'? (known: all, blocks, stencil, token_sets)",
        ),
        (("sweeps", None), "cannot tune 'sweeps' (known: all, blocks, stencil, token_sets)"),
        ((None, "forwards"), "no line is named 'forwards' (names are like 'blocks/forward/bfloat16/16/16' and "),
        (("stencil", "blocks/*"), "no line is named 'blocks/*' (names are like 'stencil/forward/bfloat16/16/7' and "),
        ((None, "blocks/forward/bfloat16/16/15"), "did you mean 'blocks/forward/bfloat16/16/1"),
    ],
)
def test_names_of_nothing_are_told_the_right_ones(given, says):
    with pytest.raises(ConfigError) as found:
        lines(*given)
    assert says in str(found.value)


@pytest.mark.parametrize("device", DEVICE_CLASSES)
def test_neighbours_differ_in_one_number(device):
    for line in lines():
        start, limits = Cut(*table_of(line.family).line(device, line.spot)), family_of(line.family).limits(line)
        assert all(least <= number <= most for number, (least, most) in zip(start, limits, strict=True)), line
        found = neighbours(start, limits)
        assert found and start not in found and len(set(found)) == len(found)
        assert all(sum(a != b for a, b in zip(one, start, strict=True)) == 1 for one in found)


def test_it_climbs_to_the_fastest():
    asked: list[Cut] = []

    def seconds(some):
        asked.extend(some)
        # The nearer to the goal in every number, the faster.
        return {one: 1.0 + sum(abs(a - b) / b for a, b in zip(one, (64, 128, 8, 3), strict=True)) for one in some}

    assert climbed(Cut(64, 32, 4, 2), LIMITS, seconds, lambda _: True) == Cut(64, 128, 8, 3)
    # Neighbours that lost once are not timed again.
    assert asked.count(Cut(32, 32, 4, 2)) == 1


def test_chance_decides_nothing():
    start = Cut(64, 64, 4, 2)
    assert (
        climbed(start, LIMITS, lambda some: {one: 0.98 + 0.02 * (one == start) for one in some}, lambda _: True)
        == start
    )


def test_what_does_not_run_is_passed_over():
    start = Cut(64, 64, 4, 2)
    assert climbed(start, LIMITS, lambda some: {}, lambda _: True) == start
    slow = {Cut(64, 64, 8, 2): 2.0, Cut(64, 32, 4, 2): 1.0}
    found = climbed(start, LIMITS, lambda some: {one: slow[one] for one in some if one in slow}, lambda _: True)
    assert found == Cut(64, 32, 4, 2)


def test_only_what_is_faster_is_asked_whether_it_fits():
    start, best, second, slow = Cut(64, 64, 4, 2), Cut(64, 64, 8, 2), Cut(64, 32, 4, 2), Cut(32, 64, 4, 2)
    seconds, asked = {start: 1.0, best: 0.5, second: 0.8, slow: 2.0}, []

    def fits(cut):
        asked.append(cut)
        return cut != best

    assert climbed(start, LIMITS, lambda some: {one: seconds.get(one, 3.0) for one in some}, fits) == second
    assert asked == [best, second]


def test_the_default_is_tried_too():
    own, default = Cut(64, 64, 4, 2), Cut(16, 16, 1, 1)
    found = climbed(
        own, LIMITS, lambda some: {one: 0.5 if one == default else 1.0 for one in some}, lambda _: True, [default]
    )
    assert found == default


def test_a_lead_has_to_be_larger_than_the_noise():
    def scenes(*rounds):
        return [Times(list(one)) for one in rounds]

    even = scenes([1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0])
    found = lead(scenes([0.9, 0.9, 0.9, 0.9], [1.8, 1.8, 1.8, 1.8]), even)
    assert found.ratio == pytest.approx(0.9) and found.noise == pytest.approx(0.0) and found.sure
    # A tenth faster on average, as a slow round and a fast one would have it too.
    noisy = lead(scenes([0.6, 1.2, 0.7, 1.3], [1.8, 1.8, 1.8, 1.8]), even)
    assert noisy.ratio < 0.97 and noisy.noise > 0.1 and not noisy.sure
    # What disturbs both in a round does not count.
    assert lead(scenes([0.9, 1.8, 0.9]), scenes([1.0, 2.0, 1.0])).noise == pytest.approx(0.0, abs=1e-9)
    assert not lead(scenes([0.98] * 9), scenes([1.0] * 9)).sure
    assert not lead(scenes([0.1]), scenes([1.0])).sure


def test_regions_and_windows_take_their_lines():
    for tile in REGION_SIZES:
        assert tile_of(blocks.SIDES[tile] ** 2) == tile
        side = blocks.RAGGED[tile]
        assert tile_of(side**2) == tile and side**2 < tile and ((64 // side) * side - 1) % side


@pytest.mark.parametrize("line", DIRECTIONS, ids=lambda line: line.name)
def test_calls_take_their_line_and_what_is_timed_is_what_changes_with_it(line):
    """In all scenes: what other lines start is the same whatever this line is."""
    family, cut = family_of(line.family), Cut(*table_of(line.family).line("sm_90", line.spot))
    other = Cut(max(cut.rows // 2, 8), cut.columns, 9 - cut.warps, cut.stages)
    for scene, make in family.scenes(line).items():
        given, made = make(small(CPU, 1)), []
        for one in (cut, other):
            with sweeping.multiplying(line.numbers), having(line, one):
                first = family.forward(given, "sm_90")
                started, outputs = first, first.results()
                if line.backward:
                    started = family.backward(given, outputs, torch.empty_like(outputs[0]), "sm_90")
            made.append([_shown(steps) for steps in (first.steps, started.steps, family.timed(line, started.steps))])
        (first, every, timed), (first_then, every_then, timed_then) = made
        # Which keys a query sees is marked whatever the tiles are, and has to be for the lists of tiles.
        timed, timed_then = ({one for one in some if one[0] != "token_set_marks"} for some in (timed, timed_then))
        assert every - every_then == timed and every_then - every == timed_then and timed, scene
        assert not line.backward or first == first_then


def _shown(steps):
    launches = [step for step in steps if hasattr(step, "kernel")]
    return {(one.kernel.__name__, tuple(one.constants.items()), one.warps, one.stages) for one in launches}


@contextmanager
def having(line, cut):
    """Has a configuration in the table."""
    before = table_of(line.family).own("sm_90", line.spot)
    put(line, "sm_90", cut)
    try:
        yield
    finally:
        put(line, "sm_90", before)


@pytest.mark.parametrize("line", DIRECTIONS, ids=lambda line: line.name)
def test_calls_can_be_checked_anywhere(line):
    """The operator's own kernels take what is timed, and answer in the form that kernels are compared in."""
    family = family_of(line.family)
    for make in family.scenes(line).values():
        given = make(small(CPU, 1))
        outputs = family.forward(given, "sm_90").results()
        call = workbench.Made(given, outputs, torch.ones_like(outputs[0]))
        found = exact(family, line, call)
        assert all(one.isfinite().all() and one.dtype == torch.float32 for one in found)
        started = family.forward(given, "sm_90")
        if line.backward:
            started = family.backward(given, outputs, call.grad, "sm_90")
        assert [one.shape for one in compared(line, started.results())] == [one.shape for one in found]
        assert len(found) == (sum(given.needs) if line.backward else 2)


def test_indices_are_for_all_heads_and_for_each():
    line = lines(only="blocks/forward/bfloat16/32/64")[0]
    shared, each, windows = (make(Room(CPU, 2, heads=3, side=32)).arguments[7] for make in blocks.scenes(line).values())
    assert shared.shape[:2] == (2, 1) and each.shape[:2] == (2, 3) and windows is None
    # Some regions are seen by far more than others.
    seen = each[0, 0].flatten().bincount(minlength=16)
    assert seen.max() >= 3 * seen.float().mean()
    gradient = lines(only="blocks/query_gradient/bfloat16/32/64")[0]
    # Small windows have a kernel of their own for all gradients, unless they have an index.
    assert [*blocks.scenes(gradient).values()][2](small(CPU, 1)).arguments[7] is not None


def test_neighbours_share_keys():
    index = token_sets.scenes(lines(only="token_sets/forward/bfloat16/32")[0])
    table = next(iter(index.values()))(Room(CPU, 1, heads=1, side=64)).arguments[3][0, 0]
    assert table.shape == (28**2, 28**2 // 4) and table.min() == 1
    # Tiles of 16 queries whose keys are drawn for each would see all.
    assert table[:16].unique().numel() < 0.8 * 28**2


def test_the_work_is_about_the_same():
    assert {images(one) * one.head_dim * one.dtype.itemsize for one in lines()} == {tuner.BYTES}


@pytest.fixture
def bench(monkeypatch):
    """A line whose kernels are those of the CPU, but for what a configuration spoils."""
    line = lines(only="token_sets/forward/float32/16")[0]

    def forward(given, device_class):
        cut = Cut(*table_of("token_sets").line(device_class, line.spot))
        if cut.stages == 4:
            raise RuntimeError("out of resource\nand more")
        out, *rest = token_sets.PAIR.op(*given.arguments)
        return Started([SimpleNamespace(run=lambda: None)], lambda: (out + (cut.warps == 1), *rest))

    monkeypatch.setattr(token_sets, "forward", forward)
    monkeypatch.setattr(token_sets, "timed", lambda line, steps: steps)
    told: list[str] = []
    return Workbench(line, CPU, "sm_90", 1, told.append, small), told


def test_what_is_wrong_or_does_not_run_is_not_timed(bench, monkeypatch):
    made, told = bench
    good, wrong, fails = Cut(32, 16, 4, 2), Cut(32, 16, 1, 2), Cut(32, 16, 4, 4)
    before = table_of("token_sets").own("sm_90", made.line.spot)
    found = made.seconds([good, wrong, fails])
    assert set(found) == set(made.times) == {good} and 0 < found[good] < 1
    assert table_of("token_sets").own("sm_90", made.line.spot) == before
    assert set(made.dropped) == {wrong, fails} and len(told) == 2
    assert told[1] == f"    {fails} does not run: out of resource"
    assert told[0].startswith(
        f"    {wrong} is WRONG: lists of a quarter of the keys for each head, a class token, off by "
    )
    # A configuration is as good as in the mean of its scenes, as fast as its fastest round.
    samples = iter([[4.0, 0.5], [2.0, 3.0]])
    monkeypatch.setattr(workbench, "interleaved", lambda turns, *_: {one: Times(next(samples)) for one in turns})
    assert made.seconds([good]) == {good: pytest.approx(1.0)}


def test_the_last_two_are_compared(bench, monkeypatch):
    made, _ = bench
    good, wrong, start = Cut(32, 16, 4, 2), Cut(32, 16, 1, 2), Cut(32, 16, 8, 2)
    monkeypatch.setattr(
        workbench, "interleaved", lambda turns, *_: {one: Times([1.0 + ("8 w" in one)] * 3) for one in turns}
    )
    assert made.duel(good, start) == Lead(pytest.approx(0.5), pytest.approx(0.0))
    # What the table has does not run, or the other does not any more.
    assert made.duel(good, wrong) is None
    assert not made.duel(wrong, start).sure


def test_what_needs_too_much_does_not_fit():
    line, told = lines(only="token_sets/forward/bfloat16/256")[0], []
    made = Workbench(line, CPU, "sm_90", 1, told.append, small)
    before, start = (one("sm_90", line.spot) for one in (table_of("token_sets").own, table_of("token_sets").line))
    assert made.fits(Cut(*start)) and not told
    crowded = Cut(64, 128, 8, 4)
    assert not made.fits(crowded)
    assert made.dropped[crowded].startswith("does not fit: token_sets_forward, ")
    assert told == [f"    {crowded} {made.dropped[crowded]}"]
    with having(line, crowded):
        assert any("bytes of shared memory where there are" in one for one in faults(line, "sm_90"))
    assert table_of("token_sets").own("sm_90", line.spot) == before


LINE = lines(only="stencil/forward/bfloat16/64/7")[0]
START, BEST = Cut(*table_of("stencil").line("sm_90", LINE.spot)), Cut(64, 32, 4, 2)


@pytest.fixture
def session(monkeypatch, tmp_path):
    """A session whose benches find what a test says, on a table of its own."""
    used, before = table_of("stencil"), table_of("stencil").own("sm_90", LINE.spot)
    path = tmp_path / "configs.json"
    path.write_text(used.path.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(used, "path", path)

    def run(seconds=None, fought=None, **options):
        def seconds_of(some):
            if seconds is None:
                raise RuntimeError("out of memory\nand more")
            return {one: seconds.get(one, 3.0) for one in some}

        def bench(line, *_):
            times = {one: {"a scene": Times([1.0])} for one in (START, BEST)}
            family = SimpleNamespace(limits=lambda line: LIMITS)
            return SimpleNamespace(
                family=family,
                seconds=seconds_of,
                fits=lambda cut: True,
                duel=lambda *_: fought,
                times=times,
                dropped={},
            )

        told: list[str] = []
        Session(CPU, "sm_90", told.append, tmp_path / "out", bench=bench, **options).run([LINE])
        (file,) = (tmp_path / "out" / "tuning").iterdir()
        return results.read(file), told, path

    yield run
    put(LINE, "sm_90", before)


def test_a_line_that_is_faster_is_written_with_hardware_and_versions(session):
    found, said, path = session({START: 1.0, BEST: 0.5}, Lead(0.5, 0.01))
    assert Table(path).own("sm_90", LINE.spot) == list(BEST)
    assert list(configs_of("stencil").configuration("forward", 7, 64, torch.bfloat16, "sm_90")) == list(BEST)
    assert found["machine"]["versions"]["torch"] and found["machine"]["device class"] == "sm_90"
    (record,) = found["cases"]
    assert record["name"] == LINE.name and record["title"] == title(LINE) and record["date"]
    assert record["facts"] | {"before": str(START), "after": str(BEST), "ratio": 0.5, "noise": 0.01} == record["facts"]
    assert (
        told(record) == f"{LINE.name:44} now {BEST} (0.50 of its time, +- 1.0 %), was {START}" and told(record) in said
    )
    assert f"| {BEST} | in the table | 1,000 ms |" in table(record)


@pytest.mark.parametrize(("seconds", "fought"), [({START: 1.0}, None), ({START: 1.0, BEST: 0.5}, Lead(0.95, 0.1))])
def test_nothing_is_written_where_the_table_wins_or_chance_may_have(session, seconds, fought):
    found, said, path = session(seconds, fought)
    assert path.read_bytes() == configs_of("stencil").PATH.read_bytes() and not path.with_suffix(".part").exists()
    assert list(configs_of("stencil").configuration("forward", 7, 64, torch.bfloat16, "sm_90")) == list(START)
    assert found["cases"][0]["facts"]["after"] == str(START) and any(f"kept {START}" in one for one in said)
    assert any("not surely faster" in one for one in said) == (fought is not None)


def test_a_line_that_is_default_s_again_goes(session):
    put(LINE, "sm_90", BEST)
    found, _, path = session({BEST: 1.0, START: 0.5}, Lead(0.5, 0.0))
    assert found["cases"][0]["facts"]["after"] == str(START)
    assert table_of("stencil").own("sm_90", LINE.spot) is None
    assert path.read_bytes() == configs_of("stencil").PATH.read_bytes()


def test_what_the_table_has_does_not_run_here(session):
    found, said, path = session({BEST: 1.0, START: math.inf}, None)
    assert Table(path).own("sm_90", LINE.spot) == list(BEST) and f"now {BEST}, was {START}" in said[0]
    assert "ratio" not in found["cases"][0]["facts"]


def test_a_call_that_cannot_be_made_does_not_end_the_session(session, capsys, tmp_path):
    found, said, _ = session()
    assert found["cases"][0]["error"] == "out of memory" and said[0].endswith("not timed: out of memory")
    assert table(found["cases"][0]) == "Not timed: out of memory."
    # What was not timed is tried again.
    found, said, _ = session({START: 1.0}, resume=True, kept=True)
    assert "error" not in found["cases"][0]
    said = session(resume=True, kept=True)[1]
    assert said[0] == f"{LINE.name}: timed with these kernels"
    assert main(["bench", "--report", "--out", str(tmp_path / "out" / "tuning")]) == 0
    assert f"| {START} | in the table | 1,000 ms |" in capsys.readouterr().out


def test_a_table_that_is_not_ours_to_write_is_told_first(monkeypatch, tmp_path):
    monkeypatch.setattr(tuner.os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match=r"--tune cannot write .*configs.json; run it from a copy of attnkit"):
        Session(CPU, "sm_90", list, tmp_path / "out").run([LINE])
    assert not (tmp_path / "out").exists()


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="--tune needs a GPU that PyTorch can use"):
        tune(None, None, list, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert main(["bench", "--tune", "stencil"]) == 2
    said = capsys.readouterr().err
    assert "--tune needs a GPU" in said and said.count("\n") == 1


def test_without_triton_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tuner, "missing", lambda: "Triton is not installed")
    with pytest.raises(ConfigError, match="--tune has no kernels to time: Triton is not installed"):
        tune(None, None, list, tmp_path)


def test_its_lines_are_listed(capsys):
    assert main(["bench", "--tune", "--list", "--only", "blocks/key_gradient/bfloat16/*/16"]) == 0
    found = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in found] == [
        f"blocks/key_gradient/bfloat16/{width}/16" for width in (16, 32, 64, 128, 256)
    ]
    assert "gradients of k and v, heads of 16 in bfloat16: routed regions of 16 tokens; routed" in found[0]
    for words in (["--tune", "stencil", "--list"], ["stencil", "--tune", "--list"]):
        assert main(["bench", *words]) == 0
        assert {line.partition("/")[0] for line in capsys.readouterr().out.splitlines()} == {"stencil"}
    assert main(["bench", "all", "--tune", "--list"]) == 0
    assert {line.partition("/")[0] for line in capsys.readouterr().out.splitlines()} == {*FAMILIES}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--quick"],
            "--tune takes --only, --list, --resume and --out only, such as `attnkit bench --tune stencil --only",
        ),
        (["--device", "cuda"], "so --device would do nothing"),
        (["sweep"], "cannot tune 'sweep' (known: all, blocks, stencil, token_sets)"),
        (["--only", "region"], "no line is named 'region'"),
    ],
)
def test_mistakes_are_one_sentence(capsys, words, says):
    assert main(["bench", "--tune", *words]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


@pytest.mark.cuda
@pytest.mark.parametrize(
    "name",
    ["blocks/forward/bfloat16/64/64", "stencil/key_gradient/bfloat16/32/7", "token_sets/query_gradient/bfloat16/32"],
)
def test_a_line_is_tuned_and_the_table_written(monkeypatch, tmp_path, name):
    said: list[str] = []
    (line,), where = lines(only=name), device_class(torch.device("cuda"))
    used, before = table_of(line.family), table_of(line.family).own(where, line.spot)
    path = tmp_path / "configs.json"
    path.write_text(used.path.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(used, "path", path)
    try:
        tune(None, name, said.append, tmp_path)
        after = used.own(where, line.spot)
    finally:
        put(line, where, before)
    assert any(one.startswith(name) for one in said) and not any("WRONG" in one or "not timed" in one for one in said)
    assert Table(path).own(where, line.spot) == after
    (file,) = (tmp_path / "tuning").iterdir()
    assert (
        json.loads(file.read_text(encoding="utf-8"))["machine"]["gpu"] and results.read(file)["cases"][0]["contenders"]
    )

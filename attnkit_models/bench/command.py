"""What `attnkit bench` accepts; nothing heavy is imported before it runs."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnkit.cli.devices import check_names, check_there
from attnkit.errors import ConfigError

if TYPE_CHECKING:
    from attnkit_models.bench.case import Case


def bench(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[headline|sweeps|models|gpu|all]",
            help="What to measure (default: headline). With --tune a family of kernels, such as stencil, or all.",
        ),
    ] = None,
    only: Annotated[str | None, typer.Option(metavar="PATTERN", help="Only these cases, such as 'regions/*'.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few rounds: does it run? Kept apart from results.")] = False,
    device: Annotated[str | None, typer.Option(metavar="cpu|cuda", help="Where to compute; cuda for gpu.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 (on the CPU), bfloat16 (on GPUs), float16.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads (default: as many as PyTorch takes).")] = None,
    out: Annotated[Path, typer.Option(help="Folder of results.")] = Path("benchmarks/results"),
    resume: Annotated[bool, typer.Option("--resume", help="Leave out cases measured at this commit.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="Print the cases and stop.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Measure nothing, print the results there are.")] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Time Triton's configurations, of all kernels or a family; keep the fastest.")
    ] = False,
) -> None:
    """Measure attnkit beside dense attention, the papers' own formulations and other libraries."""
    given = {
        what or "": what is not None,
        "--only": only is not None,
        "--quick": quick,
        "--device": device is not None,
        "--dtype": dtype is not None,
        "--threads": threads is not None,
        "--out": out != Path("benchmarks/results"),
        "--resume": resume,
        "--list": list_,
        "--report": report,
        "--tune": tune,
    }
    if tune:
        takes = (what or "", "--only", "--list", "--resume", "--out")
        _nothing_else(given, "--tune", takes, "attnkit bench --tune stencil --only 'stencil/forward/*'")
        _tune(what, only, list_, out, resume)
        return
    if report:
        _nothing_else(given, "--report", ("--out",), "attnkit bench --report --out runs/bench")
        _print_reports(out)
        return
    check_names(device, dtype)
    if threads is not None and not 1 <= threads <= 1024:
        raise ConfigError(f"--threads {threads} must be between 1 and 1024")
    from attnkit_models.bench.kinds import ON_GPU, chosen, titled

    where = device or ("cuda" if what == ON_GPU else "cpu")
    runs = chosen(what, only, gpu=where == "cuda" or list_)
    if list_:
        for cases in runs.values():
            for case in cases:
                typer.echo(f"{case.name:40} {titled(case)}")
        return
    _measure(runs, where, dtype, threads, out, quick=quick, kept=resume or only is not None, resume=resume)


def _nothing_else(given: Mapping[str, bool], flag: str, takes: Sequence[str], example: str) -> None:
    """Refuses what a flag would leave unread."""
    unread = [name for name, there in given.items() if there and name not in (flag, *takes)]
    if unread:
        *first, last = (name for name in takes if name.startswith("-"))
        words = " and ".join([", ".join(first), last] if first else [last])
        raise ConfigError(f"{flag} takes {words} only, such as `{example}`, so {', '.join(unread)} would do nothing")


def _measure(
    runs: Mapping[str, Sequence["Case"]],
    device: str,
    dtype: str | None,
    threads: int | None,
    out: Path,
    *,
    quick: bool,
    kept: bool,
    resume: bool,
) -> None:
    import torch

    from attnkit_models.bench import machine, results, run
    from attnkit_models.bench.kinds import ON_GPU

    on_gpu = ON_GPU in runs
    check_there(device, "; with --quick --device cpu its cases run at small sizes on the CPU" if on_gpu else "")
    if on_gpu and device == "cpu" and not quick:
        raise ConfigError("the cases of gpu are too large for a CPU; --quick runs them there at small sizes")
    if threads is not None:
        torch.set_num_threads(threads)
    number = getattr(torch, dtype or ("bfloat16" if device == "cuda" else "float32"))
    setting = run.Setting(torch.device(device), number)
    about = machine.machine(setting)
    paths = {kind: out / machine.file_name(about, kind + "-quick" * quick) for kind in runs}
    # Files of all kinds are read first: what does not fit is told before anything is measured.
    found = {
        kind: results.continued(path, about) if kept and path.exists() else results.empty(kind, about)
        for kind, path in paths.items()
    }
    for kind, cases in runs.items():
        path = paths[kind]
        try:
            run.run_all(cases, found[kind], path, setting, typer.echo, quick=quick, resume=resume)
        except KeyboardInterrupt:
            typer.echo(f"interrupted; {path} has what was measured, and --resume goes on from there", err=True)
            raise
        typer.echo(f"wrote {os.path.relpath(path)}")


def _tune(what: str | None, only: str | None, listed: bool, out: Path, resume: bool) -> None:
    from attnkit_models.bench.tuning import lines, tuner

    if listed:
        for line in lines.lines(what, only):
            typer.echo(f"{line.name:44} {tuner.title(line)}")
    else:
        tuner.tune(what, only, typer.echo, out, resume=resume)


def _print_reports(folder: Path) -> None:
    from attnkit_models.bench import report, results, roofline
    from attnkit_models.bench.tuning import records

    tables = {"models": report.models_table, records.KIND: records.table}
    found = sorted(folder.glob("*.json"))
    if not found:
        raise ConfigError(
            f"there are no results in {folder}; run `attnkit bench` (or with --tune) first, or pass --out FOLDER"
        )
    for path in found:
        one = results.read(path)
        typer.echo(f"{path.name}\n{report.about(one)}\n")
        for table in (report.targets_table(one), roofline.table(one)):
            if table:
                typer.echo(table + "\n")
        for record in one["cases"]:
            table = tables.get(record["problem"], report.case_table)(record)
            typer.echo(f"{record['name']}\n\n{table}\n")

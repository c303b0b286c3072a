"""What `attnkit bench` accepts; nothing heavy is imported before it runs."""

import os
from pathlib import Path
from typing import Annotated

import typer

from attnkit.errors import ConfigError, did_you_mean

DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("cpu", "cuda")


def bench(
    what: Annotated[str | None, typer.Argument(metavar="[headline|sweeps|models|all]")] = None,
    only: Annotated[str | None, typer.Option(metavar="PATTERN", help="Only these cases, such as 'regions/*'.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few rounds: does it run? Kept apart from results.")] = False,
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where to compute.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32 (on the CPU), bfloat16 (on GPUs), float16.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads (default: as many as PyTorch takes).")] = None,
    out: Annotated[Path, typer.Option(help="Folder of results.")] = Path("benchmarks/results"),
    resume: Annotated[bool, typer.Option("--resume", help="Leave out cases measured at this commit.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="Print the cases and stop.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Measure nothing, print the results there are.")] = False,
    tune: Annotated[bool, typer.Option("--tune", help="Time Triton's configurations, keep the fastest.")] = False,
) -> None:
    """Measure attnkit beside dense attention, the papers' own formulations and other libraries."""
    if tune:
        _tune(what, only, list_)
        return
    from attnkit_models.bench.kinds import chosen

    runs = chosen(what, only)
    if list_:
        for cases in runs.values():
            for case in cases:
                typer.echo(f"{case.name:28} {case.title}")
        return
    if report:
        _print_reports(out)
        return
    for name, given, known in (("--device", device, DEVICES), ("--dtype", dtype or DTYPES[0], DTYPES)):
        if given not in known:
            raise ConfigError(f"{name} {given!r} is not known{did_you_mean(given, known)} (known: {', '.join(known)})")
    if threads is not None and not 1 <= threads <= 1024:
        raise ConfigError(f"--threads {threads} must be between 1 and 1024")
    import torch

    from attnkit_models.bench import machine, results, run

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda needs a GPU that PyTorch can use; `attnkit doctor` tells what it finds")
    if threads is not None:
        torch.set_num_threads(threads)
    number = getattr(torch, dtype or ("bfloat16" if device == "cuda" else "float32"))
    setting = run.Setting(torch.device(device), number)
    about = machine.machine(setting)
    paths = {kind: out / machine.file_name(about, kind + "-quick" * quick) for kind in runs}
    kept = resume or only is not None
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


def _tune(what: str | None, only: str | None, listed: bool) -> None:
    from attnkit_models.bench import tuning

    if what is not None:
        raise ConfigError(f"--tune measures no {what}; choose kernels with --only, such as 'forward/*'")
    if listed:
        for kernel in tuning.kernels(only):
            typer.echo(kernel.name)
    else:
        tuning.tune(only, typer.echo)


def _print_reports(folder: Path) -> None:
    from attnkit_models.bench import report, results, roofline

    found = sorted(folder.glob("*.json"))
    if not found:
        raise ConfigError(f"there are no results in {folder}; run `attnkit bench` first or pass --out FOLDER")
    for path in found:
        one = results.read(path)
        typer.echo(f"{path.name}\n{report.about(one)}\n")
        if one["kind"] == "headline":
            typer.echo(report.targets_table(one) + "\n")
            if limits := roofline.table(one):
                typer.echo(limits + "\n")
        for record in one["cases"]:
            table = report.models_table(record) if one["kind"] == "models" else report.case_table(record)
            typer.echo(f"{record['name']}\n\n{table}\n")

"""The training job: data, one or two models under the same budget, their table and pictures."""

from __future__ import annotations

import dataclasses
import functools
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

import attnkit
from attnkit.cli.invocation import invocation
from attnkit.cli.sizes import LARGEST
from attnkit.errors import AttnkitError, ConfigError, shown
from attnkit_models.train import rundir
from attnkit_models.train.checkpoint import versions, write_json
from attnkit_models.train.data import DIGITS, ImageData, digits
from attnkit_models.train.distributed import make_accelerator, on_main
from attnkit_models.train.fit import fit, identity_of
from attnkit_models.train.folder import image_folder
from attnkit_models.train.objective import Recipe, Supervised
from attnkit_models.train.options import TrainOptions
from attnkit_models.train.order import smallest_batch
from attnkit_models.train.progress import Reporter
from attnkit_models.train.report import Summary, show_table
from attnkit_models.train.room import check_size, enough_memory
from attnkit_models.train.task import Task, load_best, rehearse

DIGITS_SIZE = 32


@dataclass(frozen=True)
class Choice:
    """A model to train, as the user named it.

    Args:
        label: what to call it in reports and folder names.
        source: a recipe's name, or a configuration as plain data.
        overrides: changes to it by path, as `attnkit.build` takes them.
        recipe: how it learns.
    """

    label: str
    source: str | Mapping[str, Any]
    overrides: Mapping[str, Any] = field(default_factory=dict)
    recipe: Recipe = field(default_factory=Supervised)

    def wanted(self, name: str) -> Any:
        """What the user set for a top-level option of the model, or None."""
        inside = self.source.get(name) if isinstance(self.source, Mapping) else None
        return self.overrides.get(name, inside)


def train(
    choices: list[Choice],
    *,
    out: Path,
    options: TrainOptions | None = None,
    data: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    skip_bad: bool = False,
    build: Callable[..., nn.Module] | None = None,
    reporter: Reporter | None = None,
) -> list[Summary]:
    """Trains each chosen model on the same images, in the same order, for as long.

    Args:
        choices: the model and, to compare it with, a baseline.
        out: folder for everything the run writes.
        options: how to train.
        data: a folder of class folders of images; the handwritten digits if None.
        resume: go on with the run in `out`.
        overwrite: replace the run in `out`.
        skip_bad: leave unreadable images out.
        build: makes a model from a name or plain data and overrides; `attnkit.build` if None.
        reporter: where to print.

    Returns:
        One summary a model, in the order of the choices.

    Raises:
        AttnkitError: for anything the user can put right, before training starts wherever that is possible.
    """
    options = options or TrainOptions()
    build = build or attnkit.build
    if resume and overwrite:
        raise ConfigError("--resume goes on with a run and --overwrite replaces it; pass only one of them")
    labels = tuple(choice.label for choice in choices)
    if len(set(labels)) < len(labels):
        raise ConfigError(f"model and baseline are both called {labels[0]!r}; compare with another model")
    accelerator = make_accelerator(options)
    options = dataclasses.replace(options, mixed_precision=accelerator.mixed_precision)
    reporter = reporter or Reporter(main=accelerator.is_main_process)
    images = _load_data(choices[0], options, data, skip_bad, build, reporter)
    for choice in choices:
        images = choice.recipe.prepared(images)
    folder = rundir.RunFolder(out, labels)
    smallest = smallest_batch(len(images.train), options, accelerator.num_processes)
    tasks = [_task(choice, images, options, folder.of(choice.label), build, smallest) for choice in choices]
    identity = {
        "models": {task.label: task.config for task in tasks},
        **{key: value for key, value in identity_of({}, images, options, choices[0].recipe).items() if key != "model"},
        "processes": accelerator.num_processes,
        "versions": versions(),
    }
    # Weights and two Adam moments, once more while a new file stands beside the old one, and best and last.
    room = sum(task.parameters * 4 * 8 + 5_000_000 for task in tasks)
    note = on_main(accelerator, lambda: folder.open(identity, resume=resume, overwrite=overwrite, room=room))
    for line in (*images.notes, note):
        if line:
            reporter.say(line)
    height, width = images.preprocess.img_size
    reporter.say(
        f"{images.name}: {len(images.train):,} images to train on, {len(images.val):,} to test with, "
        f"{len(images.classes)} classes, {height} x {width} pixels; "
        f"training on {_machine(accelerator)}"
    )
    summaries = []
    for task in tasks:
        progress, memory = fit(task, images, options, accelerator, reporter)
        summaries.append(Summary(task, progress, memory.unit, exact_memory=memory.exact))
    on_main(accelerator, lambda: _finish(tasks, summaries, images, folder, data is None, reporter))
    return summaries


def _load_data(
    choice: Choice,
    options: TrainOptions,
    data: Path | None,
    skip_bad: bool,
    build: Callable,
    reporter: Reporter,
) -> ImageData:
    size = options.img_size or choice.wanted("img_size")
    if size is None:
        # A folder's images can have any size, so the model says which suits it.
        size = DIGITS_SIZE if data is None else build(choice.source, **choice.overrides).img_size
    sizes = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (list, tuple)) else ()
    if len(sizes) != 2 or not all(isinstance(one, int) and 1 <= one <= LARGEST for one in sizes):
        raise ConfigError(
            f"img_size={shown(size)} must be pixels a side such as 32, or [height, width] such as [96, 160], "
            f"at most {LARGEST}"
        )
    height, width = sizes
    channels = choice.wanted("in_chans")
    if data is None:
        check_size((height, width), 1, batch=options.batch_size, kept=DIGITS)
    else:
        check_size((height, width), 3, batch=options.batch_size)
    with enough_memory(f"for images of {height} x {width} pixels", "choose a smaller --img-size"):
        if data is None:
            return digits((height, width), channels)
        return image_folder(data, (height, width), channels, skip_bad=skip_bad, progress=reporter.track)


def _task(choice: Choice, data: ImageData, options: TrainOptions, folder: Path, build: Callable, smallest: int) -> Task:
    classes = choice.wanted("num_classes")
    if classes not in (None, len(data.classes)):
        raise ConfigError(
            f"{choice.label} has num_classes={classes}, but there are {len(data.classes)} classes "
            f"in {data.name}; leave num_classes out"
        )
    overrides = {
        **choice.overrides,
        "num_classes": len(data.classes),
        "in_chans": data.preprocess.channels,
        "img_size": data.preprocess.img_size,
    }
    make = functools.partial(build, choice.source, **overrides)
    return rehearse(choice.label, make, data, options, folder, recipe=choice.recipe, images=min(smallest, 2))


def _machine(accelerator: Accelerator) -> str:
    device = {"cpu": "the CPU", "cuda": "a GPU"}.get(accelerator.device.type, accelerator.device.type)
    together = f"{accelerator.num_processes} processes, each on " if accelerator.num_processes > 1 else ""
    precision = "" if accelerator.mixed_precision == "no" else f" in {accelerator.mixed_precision}"
    return f"{together}{device}{precision}"


def _finish(
    tasks: list[Task],
    summaries: list[Summary],
    data: ImageData,
    folder: rundir.RunFolder,
    samples: bool,
    reporter: Reporter,
) -> None:
    """Everything after the last epoch; the weights are safe by now."""
    from attnkit_models.train.pictures import draw_attention, draw_curves, save_samples

    rows, against = [], []
    for summary in summaries:
        origins = summary.task.recipe.origins(data)
        rows += [*origins, summary.row]
        against += [summary.row.against(origin) for origin in origins]
    show_table(rows, summaries[0].memory, reporter.console)
    for line in against:
        reporter.say(line)
    write_json(folder.root / rundir.COMPARISON, [dataclasses.asdict(row) for row in rows])
    draw_curves({summary.task.label: summary.progress.history for summary in summaries}, folder.root / rundir.CURVES)
    reporter.say(f"curves     {folder.root / rundir.CURVES}")
    for task in tasks:
        path = task.folder / rundir.ATTENTION
        try:
            draw_attention(load_best(task), data, path)
        except AttnkitError as error:
            reporter.say(f"no picture of what {task.label} attends to: {error}")
        else:
            reporter.say(f"attention  {path}")
    for task in tasks:
        reporter.say(f"weights    {task.folder / rundir.BEST}")
    if samples:
        written = save_samples(data, folder.root / rundir.SAMPLES)
        words = shlex.join(map(str, (folder.root, written[-3])))
        reporter.say(f"try        {invocation()} predict {words}")

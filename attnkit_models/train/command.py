"""What `attnkit train` and `attnkit predict` accept; nothing heavy is imported before they run."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from attnkit.cli.sizes import read_size
from attnkit.errors import ConfigError, DataError, load_extra
from attnkit_models.train.options import TrainOptions

_NEEDED = ("accelerate", "matplotlib", "numpy", "PIL", "rich", "safetensors", "sklearn", "yaml")


def _need_extra() -> None:
    for module in _NEEDED:
        load_extra(module, extra="train", purpose="training")


def _tuned(text: str, option: str) -> Any:
    """An option of `TrainOptions`: not given means the file's value, and then the default."""
    return typer.Option(help=f"{text} (default {getattr(TrainOptions, option)})")


def train(
    out: Annotated[Path, typer.Option(help="Folder for weights, metrics and pictures.")],
    model: Annotated[str | None, typer.Option(help="Name of a model; see `attnkit list models`.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file: a model's options, or model: and train:.")] = None,
    baseline: Annotated[str | None, typer.Option(help="A second model, trained alike and compared.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="sparsifiner: make a dense --teacher sparse, by reconstruction and distillation.")
    ] = None,
    teacher: Annotated[Path | None, typer.Option(help="A trained dense model: a checkpoint or a run's folder.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of class folders of images (default: the digits)")] = None,
    epochs: Annotated[int | None, _tuned("Passes over the training images.", "epochs")] = None,
    batch_size: Annotated[int | None, _tuned("Images a forward pass, over all processes.", "batch_size")] = None,
    lr: Annotated[float | None, _tuned("Peak learning rate.", "lr")] = None,
    weight_decay: Annotated[float | None, _tuned("Decoupled weight decay.", "weight_decay")] = None,
    warmup: Annotated[
        float | None, typer.Option(help="Epochs of linear warm-up (default: a tenth of them, at most 2).")
    ] = None,
    label_smoothing: Annotated[float | None, _tuned("Share spread over all classes.", "label_smoothing")] = None,
    clip_grad: Annotated[float | None, _tuned("Largest gradient norm, 0 for any.", "clip_grad")] = None,
    augment: Annotated[bool | None, typer.Option("--augment/--no-augment", help="Vary training images.")] = None,
    seed: Annotated[int | None, _tuned("Fixes weights, order and augmentation.", "seed")] = None,
    img_size: Annotated[str | None, typer.Option(help="Pixels a side (32) or height x width (96x160).")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Change an option of the model, or recipe.OPTION."),
    ] = None,
    mixed_precision: Annotated[
        str | None, typer.Option(metavar="auto|no|bf16|fp16", help="auto: as `accelerate launch` says, else no.")
    ] = None,
    grad_accum: Annotated[int | None, _tuned("Forward passes an optimizer step.", "grad_accum")] = None,
    workers: Annotated[int | None, _tuned("Processes that load images.", "workers")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out what cannot be read.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
) -> None:
    """Train a model, alone or next to a baseline, and draw what it learned.

    The same command runs on a GPU, under `accelerate launch` and under `torchrun`.
    """
    _need_extra()
    from attnkit_models.train.configfile import (
        ConfigFile,
        check_model,
        choose_recipe,
        merge_options,
        read_config,
        read_overrides,
        take_recipe,
    )
    from attnkit_models.train.mistakes import Mistakes
    from attnkit_models.train.objective import Recipe, Supervised
    from attnkit_models.train.run import Choice
    from attnkit_models.train.run import train as run
    from attnkit_models.train.sparsifying import Sparsifying
    from attnkit_models.train.teacher import load_teacher

    mistakes = Mistakes()
    file, size, overrides, options = ConfigFile(), None, {}, None
    with mistakes.noted():
        file = read_config(config) if config else file
    with mistakes.noted():
        size = read_size(img_size, "--img-size") if img_size else None
    with mistakes.noted():
        overrides = read_overrides(set_ or [])
    given: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "weight_decay": weight_decay,
        "warmup": warmup,
        "label_smoothing": label_smoothing,
        "clip_grad": clip_grad,
        "augment": augment,
        "seed": seed,
        "img_size": size,
        "mixed_precision": mixed_precision,
        "grad_accum": grad_accum,
        "workers": workers,
    }
    with mistakes.noted():
        options = merge_options(file.train, given)
    chosen = None
    with mistakes.noted():
        chosen = choose_recipe(file.recipe, recipe, teacher, take_recipe(overrides))
    learning: Recipe = Supervised()
    source = model or file.model
    with mistakes.noted():
        if chosen is not None and options is not None:
            chosen.options.phases(options)
            dense = load_teacher(chosen.teacher)
            learning = Sparsifying(chosen.options, dense)
            source = source or dense.sparse_config()
    with mistakes.noted():
        if model and file.model is not None:
            raise ConfigError(f"--model {model} and {config} both say what to train; keep one of them")
        if source is not None:
            check_model(source, overrides)
        elif not mistakes.found or not config:
            raise ConfigError(
                "nothing says what to train; pass --model NAME (see `attnkit list models`) or --config FILE"
            )
    second = baseline or file.baseline
    with mistakes.noted():
        if second:
            check_model(second)
    mistakes.told()
    assert source is not None
    named = Path(str(config)).stem if file.model is not None else str(recipe or file.recipe.get("kind"))
    label = source if isinstance(source, str) else named
    choices = [Choice(label, source, overrides, learning), *([Choice(second, second)] if second else [])]
    folder = data or (Path(file.data) if file.data else None)
    try:
        run(choices, out=out, options=options, data=folder, resume=resume, overwrite=overwrite, skip_bad=skip_bad)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            typer.echo("interrupted; the same command with --resume goes on after the last finished epoch", err=True)
        raise
    _leave_processes()


def _leave_processes() -> None:
    import gc

    from accelerate.state import PartialState

    # Whatever still holds the process group keeps its threads alive, and one that lets go of a tensor after the
    # interpreter is gone aborts the process.
    gc.collect()
    PartialState().destroy_process_group()


def predict(
    checkpoint: Annotated[Path, typer.Argument(help="A .safetensors file, or the folder of a run.")],
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    top: Annotated[int, typer.Option(help="How many classes to print.")] = 3,
) -> None:
    """Print the likeliest classes of image files; the exit status is 1 if one cannot be read."""
    _need_extra()
    from attnkit_models.train.predict import predict as classify

    unread = False
    for image, found in zip(images, classify(checkpoint, images, top=top), strict=True):
        if isinstance(found, DataError):
            unread = True
            typer.echo(f"error: {found}", err=True)
        else:
            typer.echo(f"{image}: " + ", ".join(f"{name} {probability:.1%}" for name, probability in found))
    if unread:
        raise typer.Exit(1)

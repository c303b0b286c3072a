"""The verbs of `attnkit`; what a verb needs is imported when it runs."""

import json
from pathlib import Path
from typing import Annotated

import typer

from attnkit import registry
from attnkit.cli.devices import check_names, check_there
from attnkit.cli.sizes import read_size
from attnkit.errors import ConfigError, did_you_mean

app = typer.Typer(
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

PLANNED = "planned, not part of this version"

Size = Annotated[str, typer.Option(help="Image size in pixels: 224, or height x width such as 96x160.")]


def _version(wanted: bool) -> None:
    if wanted:
        import attnkit

        typer.echo(f"attnkit {attnkit.__version__}")
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Attention primitives for PyTorch: list them, look at them, train with them."""


def _model(name: str, size: tuple[int, int]):
    import attnkit

    return attnkit.build(name, img_size=size).eval()


@app.command("list")
def list_names(
    what: Annotated[str | None, typer.Argument(metavar="[models|primitives|backends]")] = None,
    pattern: Annotated[str, typer.Argument(help="Shell-style pattern, such as 'biformer*'.")] = "*",
) -> None:
    """List models, primitives and backends by name."""
    import fnmatch

    def backends(chosen: str) -> list[str]:
        named = fnmatch.filter(registry.BACKENDS, chosen)
        return [name if registry.BACKENDS[name] else f"{name} ({PLANNED})" for name in named]

    groups = {"models": registry.list_models, "primitives": registry.list_primitives, "backends": backends}
    if what is not None and what not in groups:
        raise ConfigError(f"cannot list {what!r}{did_you_mean(what, groups)} (known: {', '.join(groups)})")
    for group, names in groups.items():
        if what in (None, group):
            typer.echo("\n".join(names(pattern)) if what else f"{group}: {', '.join(names(pattern))}")


@app.command()
def show(name: Annotated[str, typer.Argument(help="A model or a primitive.")]) -> None:
    """Show a model's configuration, or a primitive's formula, options and paper."""
    if name in registry.RECIPES:
        typer.echo(json.dumps(registry.recipe(name)().to_dict(), indent=2))
        return
    primitives = registry.list_primitives()
    if name not in primitives:
        known = [*registry.RECIPES, *primitives]
        raise ConfigError(
            f"{name!r} is neither a model nor a primitive{did_you_mean(name, known)} (see `attnkit list`)"
        )
    options = registry.primitive_class(name)
    typer.echo(f"{name}: {options.__doc__ or ''}".rstrip())
    for title in ("formula", "cost", "paper"):
        text = getattr(options, title, "")
        if text:
            typer.echo(f"\n    {title}: {text}")


@app.command()
def explain(
    model: Annotated[str, typer.Argument(help="Name of a model.")],
    size: Size = "224",
    training: Annotated[bool, typer.Option("--training", help="A training pass, which needs gradients.")] = False,
    device: Annotated[str | None, typer.Option(metavar="cpu|cuda", help="Where the model is (default: cpu).")] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="float32|bfloat16|float16", help="Its dtype (default: float32).")
    ] = None,
) -> None:
    """Say which backend each attention layer of a model gets, and why not the others."""
    import torch

    import attnkit

    on = read_size(size, "--size")
    check_names(device, dtype)
    check_there(device, ", and without --device the model is explained on the CPU")
    number = None if dtype is None else getattr(torch, dtype)
    typer.echo(str(attnkit.explain(_model(model, on), on, training=training, device=device, dtype=number)))


@app.command()
def flops(model: Annotated[str, typer.Argument(help="Name of a model.")], size: Size = "224") -> None:
    """Count a model's multiply-accumulates for one image, layer by layer."""
    import attnkit

    on = read_size(size, "--size")
    typer.echo(str(attnkit.flops(_model(model, on), on)))


@app.command()
def draw(
    what: Annotated[str, typer.Argument(help="A primitive, or with --image a checkpoint or the folder of a run.")],
    options: Annotated[list[str] | None, typer.Argument(metavar="[OPTION=VALUE]...", help="Its options.")] = None,
    out: Annotated[str, typer.Option(help="Picture to write: .png, .svg or .pdf.")] = "attention.png",
    grid: Annotated[str, typer.Option(help="Tokens a side, or rows x columns.")] = "14",
    image: Annotated[Path | None, typer.Option(help="Draw what a trained model attends to on this image.")] = None,
) -> None:
    """Draw which tokens a primitive's queries see, or what a trained model attends to on an image."""
    import attnkit

    if image is not None:
        if options:
            raise ConfigError(f"--image draws a trained model, which takes no options such as {options[0]!r}")
        registry.load("attnkit_models.train.predict:draw_image")(what, image, out)
    else:
        primitive = registry.primitive_class(what)
        examples = getattr(primitive, "examples", ())
        given = {"heads": 2, **(examples[0] if examples else {}), **dict(_assigned(text) for text in options or [])}
        height, width = read_size(grid, "--grid")
        attnkit.draw(primitive.from_dict(given), attnkit.Grid(height, width), out)
    typer.echo(out)


def _assigned(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"{text!r} must be OPTION=VALUE, such as heads=2")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


@app.command()
def doctor() -> None:
    """Print versions and devices, and try every backend."""
    from attnkit.cli.doctor import report

    for line in report():
        typer.echo(line)


for _verb, _target in registry.COMMANDS.items():
    app.command(_verb)(registry.load(_target))

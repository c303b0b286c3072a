"""`attnkit convert`: the file of a paper's authors becomes a checkpoint that says everything itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from attnkit.errors import CheckpointError, ConfigError, load_extra

# What the authors of all four papers evaluated with: channels of ImageNet.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="The authors' file: .pth, .safetensors or flax's.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The .safetensors file to write.")],
    model: Annotated[str, typer.Option(help="A released model, such as biformer_tiny, or a family with --hparams.")],
    hparams: Annotated[
        Path | None, typer.Option(help="YAML or JSON file: the arguments of the authors' constructor, for a family.")
    ] = None,
    classes: Annotated[Path | None, typer.Option(help="Text file: a class a line, in the order of the logits.")] = None,
    resize_tables: Annotated[
        bool, typer.Option("--resize-tables", help="Resize tables of windows and images of another size.")
    ] = False,
    backbone_only: Annotated[
        bool, typer.Option("--backbone-only", help="SRC has no mask predictors; make fresh ones (Sparsifiner).")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST.")] = False,
) -> None:
    """Turn the weights of a paper's authors into a checkpoint for `attnkit predict`."""
    for module in ("accelerate", "numpy", "PIL", "safetensors", "yaml"):
        load_extra(module, extra="train", purpose="converting")
    from attnkit_models.checkpoints.exchange import import_official
    from attnkit_models.checkpoints.files import read_checkpoint
    from attnkit_models.train.checkpoint import pack, versions, write_atomically
    from attnkit_models.train.images import Preprocess

    if target.is_dir():
        raise CheckpointError(f"{target} is a folder; name the file to write, such as {target / model}.safetensors")
    if target.suffix != ".safetensors":
        raise CheckpointError(
            f"{target} must end in .safetensors, which is what is written, such as {target.stem}.safetensors"
        )
    if target.exists() and not overwrite:
        raise CheckpointError(f"{target} already exists; replace it with --overwrite or choose another name")
    if not target.parent.is_dir():
        raise CheckpointError(f"there is no folder {target.parent} to write {target.name} to; make it first")
    arguments = None if hparams is None else _arguments(hparams)
    weights = read_checkpoint(source)
    built: Any = import_official(model, weights, arguments, resize_tables=resize_tables, backbone_only=backbone_only)
    header = {
        "kind": "weights",
        "label": model,
        "model": built.config.to_dict(full=True),
        "classes": _classes(classes, built.num_classes),
        "source": source.name,
        "versions": versions(),
    }
    if built.in_chans == len(MEAN):
        header["preprocess"] = Preprocess(built.config.image, built.in_chans, MEAN, STD).to_dict()
    content = pack(built.state_dict(), header)
    write_atomically(target, content, instead="choose another name")
    parameters = sum(one.numel() for one in built.parameters())
    typer.echo(f"{target}: {model}, {parameters:,} parameters, {len(content) / 1e6:.1f} MB")


def _arguments(file: Path) -> dict[str, Any]:
    from attnkit_models.train.plaindata import parse_yaml

    try:
        plain = parse_yaml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--hparams {file} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(plain, dict) or not all(isinstance(name, str) for name in plain):
        raise ConfigError(f"--hparams {file} must hold names and values, such as num_classes: 1000")
    return plain


def _classes(file: Path | None, count: int) -> Sequence[str]:
    if file is None:
        return [f"class {number}" for number in range(count)]
    try:
        names = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--classes {file} cannot be read: {' '.join(str(error).split())}") from error
    if len(names) != count:
        raise ConfigError(f"--classes {file} has {len(names)} lines, but the model tells {count} classes apart")
    return names

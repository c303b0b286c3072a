"""Pictures of a run: curves over the epochs, and what each head group attends to."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image
from torch import Tensor

from attnkit_models.train.checkpoint import write_atomically
from attnkit_models.train.data import ImageData

# Told apart also by people who see no red or green, and in print.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
LONGEST_NAME = 16


def draw_curves(histories: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> Figure:
    """Draws training loss and test accuracy of every model over the epochs.

    Args:
        histories: the records of each model's epochs, by label.
        path: the PNG file to write.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy = figure.subplots(1, 2)
    for colour, (label, history) in zip(COLOURS, histories.items(), strict=False):
        epochs = [record["epoch"] for record in history]
        # Losses of different phases cannot be compared; the last phase's are those that lead to the accuracy.
        drawn = [record for record in history if record.get("phase") == history[-1].get("phase")]
        loss.plot(
            [record["epoch"] for record in drawn],
            [record["train_loss"] for record in drawn],
            color=colour,
            label=label,
            marker=".",
        )
        accuracy.plot(epochs, [record["val_accuracy"] for record in history], color=colour, label=label, marker=".")
        accuracy.annotate(
            f"{history[-1]['val_accuracy']:.1%}",
            (epochs[-1], history[-1]["val_accuracy"]),
            xytext=(4, 0),
            textcoords="offset points",
            color=colour,
            va="center",
        )
    phases = {str(record["phase"]) for history in histories.values() for record in history[-1:] if "phase" in record}
    loss.set(
        title="Training loss", xlabel="epoch", ylabel=f"loss of {', '.join(phases)}" if phases else "cross-entropy"
    )
    accuracy.set(title="Test accuracy", xlabel="epoch", ylabel="accuracy")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    accuracy.margins(x=0.12)
    last = max(len(history) for history in histories.values())
    ticks = [tick for tick in MaxNLocator(8, integer=True).tick_values(1, last) if 1 <= tick <= last]
    for axes in (loss, accuracy):
        axes.set_xticks(ticks)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    accuracy.legend(loc="lower right", frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    write_atomically(path, content.getvalue())
    return figure


def draw_attention(model: torch.nn.Module, data: ImageData, path: Path) -> Figure:
    """Draws what each head group of a model attends to on a test image with much to see in it, its class above.

    Args:
        model: the trained model, in eval mode on the CPU.
        data: what it was trained on.
        path: the PNG file to write.
    """
    import attnkit.analysis

    first = data.val.__getitems__(range(min(len(data.val), 64)))["pixels"].float() / 255
    contrast = first.diff(dim=-1).abs().sum((1, 2, 3)) + first.diff(dim=-2).abs().sum((1, 2, 3))
    chosen = int(contrast.argmax())
    picture = first[chosen]
    image = data.preprocess.normalise(picture[None])
    title = f"true class {short(data.classes[int(data.val.labels[chosen])])}, {predicted(model, image, data.classes)}"
    return attnkit.analysis.draw_attention(model, image, path, picture=picture, title=title)


@torch.no_grad()
def predicted(model: torch.nn.Module, image: Tensor, classes: Sequence[str]) -> str:
    """The likeliest class of a normalised image (1, channels, H, W) in words: `predicted cat (98 %)`."""
    probability, label = model(image).float().softmax(dim=-1)[0].max(dim=0)
    return f"predicted {short(classes[int(label)])} ({100 * float(probability):.0f} %)"


def short(name: str) -> str:
    """A class name that fits into a picture's title."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def save_samples(data: ImageData, folder: Path) -> list[Path]:
    """Writes one test image of each class as `CLASS.png`, to try `attnkit predict` on."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for label, name in enumerate(data.classes):
        first = int((data.val.labels == label).nonzero()[0])
        pixels = data.val[first]["pixels"]
        picture = Image.fromarray(pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy())
        content = io.BytesIO()
        picture.save(content, format="PNG")
        written.append(folder / f"{name}.png")
        write_atomically(written[-1], content.getvalue())
    return written

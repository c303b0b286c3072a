"""Renews the table of models in docs/recipes.md: parameters and multiply-adds of every recipe.

Run it from the repository root: python docs/generate/models.py
"""

from __future__ import annotations

from pathlib import Path

import torch

import attnkit

PAGE = Path(__file__).parents[1] / "recipes.md"
BEGIN, END = "<!-- table of models: docs/generate/models.py -->", "<!-- end of the table -->"


def row(name: str) -> str:
    """A model's line of the table."""
    # Only shapes are counted, and numbers would take as long to draw as to count.
    with torch.device("meta"):
        model = attnkit.build(name)
    model = model.to_empty(device="cpu")
    for one in (*model.parameters(), *model.buffers()):
        one.data.zero_()
    size = model.config.image  # type: ignore[union-attr]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    macs = attnkit.flops(model, size).total
    return f"| `{name}` | {size[0]} x {size[1]} | {parameters:,} | {macs:,} |"


def table() -> str:
    """The whole table in Markdown."""
    head = ["| model | pixels | parameters | multiply-adds |", "|---|--:|--:|--:|"]
    return "\n".join([*head, *map(row, attnkit.list_models())])


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}", encoding="utf-8")

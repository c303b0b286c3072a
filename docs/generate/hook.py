"""mkdocs hook: adds the gallery's pages and pictures to the site while it is built."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

HERE = Path(__file__).parent
for place in (HERE, HERE.parents[1]):
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))

import gallery  # noqa: E402 - lies beside this file


def on_config(config: Any) -> Any:
    """Puts a page per primitive behind the gallery's first."""
    for entry in config.nav:
        if isinstance(entry, dict) and "Gallery" in entry:
            entry["Gallery"] = ["gallery/index.md", *(f"gallery/{name}.md" for name in gallery.list_primitives())]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the files, which exist only in memory."""
    made: dict[str, str | bytes] = {"index.md": gallery.index()}
    for name in gallery.list_primitives():
        made[f"{name}.md"] = gallery.page(name)
        made.update(gallery.pictures(name))
    for name, content in made.items():
        files.append(File.generated(config, f"gallery/{name}", content=content))
    return files

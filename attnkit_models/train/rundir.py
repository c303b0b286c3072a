"""The folder of a run: which file stands where, and whether it may be written to."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from attnkit.errors import CheckpointError
from attnkit_models.train.checkpoint import explain, write_atomically, write_json
from attnkit_models.train.paths import is_file, is_folder
from attnkit_models.train.plaindata import parse_json
from attnkit_models.train.resume import check_identity, read_progress

RUN, CURVES, COMPARISON, SAMPLES = "run.json", "curves.png", "comparison.json", "samples"
METRICS, BEST, LAST, RESUME, ATTENTION = (
    "metrics.jsonl",
    "best.safetensors",
    "last.safetensors",
    "resume.safetensors",
    "attention.png",
)
_OURS = (RUN, CURVES, COMPARISON, METRICS, BEST, LAST, RESUME, ATTENTION, "best.json", "last.json")


@dataclass(frozen=True)
class RunFolder:
    """Where a run's files lie.

    Args:
        root: the folder given as `--out`.
        labels: the models' names; a single model writes into `root` itself, several into a folder each.
    """

    root: Path
    labels: tuple[str, ...]

    def of(self, label: str) -> Path:
        """The folder of one model's files."""
        return self.root if len(self.labels) == 1 else self.root / label

    def open(self, identity: Mapping[str, Any], *, resume: bool, overwrite: bool, room: int) -> str:
        """Makes the folder ready to be written to, or says why it cannot be.

        Args:
            identity: models, options and data of the run, as plain data.
            resume: go on with the run that lies there.
            overwrite: remove the run that lies there.
            room: bytes that the run is going to need.

        Returns:
            A sentence for the user, or an empty string.

        Raises:
            CheckpointError: if the folder holds another run, or one that was not to be touched, or cannot
                be written to.
        """
        taken = [name for name in _OURS if (self.root / name).is_file()]
        note = ""
        if taken and overwrite:
            self._clear()
        elif taken and resume:
            note = self._compare(identity)
            if not self._finished_epochs():
                note = f"no epoch of the run in {self.root} was finished: starting from the beginning"
        elif taken:
            raise CheckpointError(
                f"{self.root} already holds a run ({', '.join(taken[:3])}); go on with it with --resume, "
                "replace it with --overwrite, or choose another --out"
            )
        elif resume:
            note = f"nothing to resume in {self.root}: starting from the beginning"
        self._probe(room)
        for label in self.labels:
            for leftover in self.of(label).glob(".*.partial"):
                leftover.unlink(missing_ok=True)
        write_json(self.root / RUN, identity)
        return note

    def _finished_epochs(self) -> int:
        files = [self.of(label) / RESUME for label in self.labels]
        return sum(read_progress(file).epoch for file in files if file.is_file())

    def _clear(self) -> None:
        """Removes what runs write and nothing else."""
        for sample in (self.root / SAMPLES).glob("*.png"):
            sample.unlink()
        folders = {*self._old_folders(), *(self.of(label) for label in self.labels)} - {self.root}
        # run.json last: as long as it stands, a half-cleared folder is known as a run.
        for folder in (*folders, self.root):
            for name in sorted(_OURS, key=lambda name: name == RUN):
                (folder / name).unlink(missing_ok=True)
        for folder in (*folders, self.root / SAMPLES):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _old_folders(self) -> list[Path]:
        models = _labels(_read_run(self.root))
        folders = [self.root / label for label in models]
        return [folder for folder in folders if is_folder(folder)] if len(models) > 1 else []

    def _compare(self, identity: Mapping[str, Any]) -> str:
        """Refuses another run; returns what may make a difference to the last digit."""
        found = _read_run(self.root)
        before = _labels(found)
        if not before:
            raise CheckpointError(
                f"{self.root} holds files of a run but no readable {RUN}, so it cannot be resumed; "
                "replace it with --overwrite or choose another --out"
            )
        if before != self.labels:
            raise CheckpointError(
                f"{self.root} holds a run of {' and '.join(before)}, not of {' and '.join(self.labels)}; "
                "continue it with what it was started with, or start anew with --overwrite or another --out"
            )
        check_identity(
            {key: found.get(key) for key in ("models", "options", "data")},
            {key: identity[key] for key in ("models", "options", "data")},
            self.root,
        )
        started, now = found.get("processes"), identity["processes"]
        if started == now:
            return ""
        return (
            f"the run was started with {started} process{'es' * (started != 1)} and goes on with {now}: "
            "its weights will differ a little from those of an uninterrupted run"
        )

    def _probe(self, room: int) -> None:
        """Finds out now what would otherwise end a training after its first epoch."""
        try:
            for label in self.labels:
                self.of(label).mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.root).free
        except OSError as error:
            raise CheckpointError(f"cannot make the folder {self.root}: {explain(error)}") from error
        probe = self.root / ".writable"
        write_atomically(probe, b"ok\n")
        probe.unlink(missing_ok=True)
        held = sum(file.stat().st_size for label in self.labels for file in self.of(label).glob("*.safetensors"))
        if free + held < room:
            raise CheckpointError(
                f"the disk of {self.root} has {free / 1e6:.1f} MB free, and the run needs about "
                f"{room / 1e6:.1f} MB; make room there or choose another --out"
            )


def _read_run(root: Path) -> dict[str, Any]:
    """What a run's folder says about it; nothing where that cannot be read."""
    try:
        found = parse_json((root / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _labels(run: Mapping[str, Any]) -> tuple[str, ...]:
    """The models of a run; none where one is no plain name, which could lead out of the run's folder."""
    models = run.get("models")
    names = tuple(models) if isinstance(models, dict) else ()
    return names if all(PurePath(name).name == name and name not in ("", "..") for name in names) else ()


def find_weights(path: Path) -> Path:
    """The weights a path means: a checkpoint itself, or the best of a run's first model.

    Raises:
        CheckpointError: if the folder holds no run with weights.
    """
    if not is_folder(path):
        return path
    candidates = [path / BEST, *(path / label / BEST for label in _labels(_read_run(path)))]
    for candidate in candidates:
        if is_file(candidate):
            return candidate
    raise CheckpointError(f"{path} holds no {BEST}; pass a .safetensors file or a folder that attnkit train wrote")

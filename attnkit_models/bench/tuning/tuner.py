"""Tuner: goes through lines of the tables on this GPU, and writes tables and results."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from attnkit.errors import ConfigError
from attnkit.kernels.triton import devices, sweeping
from attnkit.kernels.triton.version import missing
from attnkit_models.bench import results
from attnkit_models.bench.case import Setting
from attnkit_models.bench.machine import machine, now, slug
from attnkit_models.bench.tuning.lines import AND, Line, configs_of, family_of, lines, table_of
from attnkit_models.bench.tuning.records import KIND, contenders, told
from attnkit_models.bench.tuning.search import Cut, Lead, climbed
from attnkit_models.bench.tuning.workbench import Workbench, put

# Bytes that a token and head have in all images: about as much memory for every width, and so much work that launching
# takes none of the time.
BYTES = 32 * 64 * 2


def tune(what: str | None, only: str | None, tell: Callable[[str], object], out: Path, *, resume: bool = False) -> None:
    """Times the configurations of this GPU and writes those that are faster than the table's.

    Args:
        what: a family of kernels, None or `"all"` for all.
        only: pattern of lines, None for all.
        tell: gets lines for the terminal.
        out: folder of results.
        resume: leave out lines that were timed with the kernels as they are.

    Raises:
        ConfigError: without a GPU or Triton, for names of nothing, for tables that cannot be written, and where results
            of another machine or other versions would be added to.
    """
    chosen = lines(what, only)
    if not torch.cuda.is_available():
        raise ConfigError("--tune needs a GPU that PyTorch can use, for it times kernels; `attnkit doctor` tells more")
    if why := missing():
        raise ConfigError(f"--tune has no kernels to time: {why}")
    device = torch.device("cuda", torch.cuda.current_device())
    Session(device, devices.device_class(device), tell, out, kept=resume or only is not None, resume=resume).run(chosen)


class Session:
    """One go through lines.

    Args:
        device: where to compute.
        device_class: whose lines are written.
        tell: gets lines for the terminal.
        out: folder of results, a file a family.
        kept: whether lines of earlier results stay in their files.
        resume: leave out lines that are in them for the same kernels.
        bench: makes a line's calls ready.
    """

    def __init__(
        self,
        device: torch.device,
        device_class: str,
        tell: Callable[[str], object],
        out: Path,
        *,
        kept: bool = False,
        resume: bool = False,
        bench: Callable[..., Workbench] = Workbench,
    ) -> None:
        self.device, self.device_class, self.tell, self.out = device, device_class, tell, out
        self.kept, self.resume, self._bench = kept, resume, bench

    def run(self, chosen: Sequence[Line]) -> None:
        """Tunes lines one after the other; after each, table and results are written."""
        families = list(dict.fromkeys(line.family for line in chosen))
        for family in families:
            path = table_of(family).path
            if not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)):
                raise ConfigError(f"--tune cannot write {path}; run it from a copy of attnkit that is yours to change")
        about = {**machine(Setting(self.device)), "device class": self.device_class, "dtype": "as lines say"}
        paths = {family: self.out / KIND / f"{slug(about)}-{family}.json" for family in families}
        # Files of all families are read first: what does not fit is told before anything is timed.
        found = {
            family: results.continued(path, about) if self.kept and path.exists() else results.empty(KIND, about)
            for family, path in paths.items()
        }
        records = [one for each in found.values() for one in each["cases"]]
        done = {one["name"]: one["facts"]["kernels"] for one in records if "error" not in one}
        written: dict[Path, None] = {}
        for line in chosen:
            kernels = _kernels(line.family)
            if self.resume and done.get(line.name) == kernels:
                self.tell(f"{line.name}: timed with these kernels")
                continue
            record = self._tuned(line)
            record["facts"]["kernels"] = kernels
            found[line.family] = results.merged(found[line.family], record)
            path = paths[line.family]
            results.write(path, found[line.family])
            written[path] = None
            self.tell(told(record))
        for path in written:
            self.tell(f"wrote {os.path.relpath(path)}")
        self.tell("`make kernels` holds tables to registers and shared memory, and renews the page on kernels")

    def _tuned(self, line: Line) -> dict[str, Any]:
        """Tunes a line, writes its table where another configuration is better, and returns its record."""
        began, started, table = time.perf_counter(), now(), table_of(line.family)
        default, start = (Cut(*table.line(name, line.spot)) for name in ("default", self.device_class))
        head = {"name": line.name, "problem": KIND, "title": title(line), "sizes": {"images": images(line)}, **started}
        facts: dict[str, Any] = {"before": str(start), "after": str(start)}
        record = {**head, "density": None, "facts": facts, "contenders": {}}
        try:
            with sweeping.multiplying(line.numbers):
                bench = self._bench(line, self.device, self.device_class, images(line), self.tell)
                limits = bench.family.limits(line)
                best = climbed(start, limits, bench.seconds, bench.fits, also=[default])
                lead = bench.duel(best, start) if best != start else Lead(1.0, 0.0)
        except Exception as error:
            # A call that cannot be made here, for want of memory say, does not end the session.
            record["error"] = str(error).strip().partition("\n")[0] or type(error).__name__
            return {**record, "seconds": round(time.perf_counter() - began, 1)}
        if lead is None or lead.sure:
            put(line, self.device_class, None if best == default else best)
            table.save()
            facts["after"] = str(best)
        if lead is not None and best != start:
            facts |= {"fastest": str(best), "ratio": round(lead.ratio, 4), "noise": round(min(lead.noise, 99.0), 4)}
        record["contenders"] = contenders(bench)
        return {**record, "seconds": round(time.perf_counter() - began, 1)}


def title(line: Line) -> str:
    """A line in words, with the calls that stand for it."""
    family = family_of(line.family)
    tables = " with " + line.spot[1].partition(AND)[2] if line.tables else ""
    return f"{family.title(line)}, heads of {line.head_dim} in {line.numbers}{tables}: {'; '.join(family.scenes(line))}"


def images(line: Line) -> int:
    """Images at a time."""
    return max(BYTES // (line.head_dim * line.dtype.itemsize), 1)


def _kernels(family: str) -> str:
    """A number that changes with a family's kernels and how they are started, but not with its table."""
    return sweeping.fingerprint_of(configs_of(family).PATH.parent, Path(os.devnull))

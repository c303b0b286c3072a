"""What results were measured on: hardware, threads, versions, the state of the code."""

from __future__ import annotations

import datetime
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import attnkit
from attnkit_models.bench.case import Setting

PACKAGES = ("torch", "timm", "natten", "xformers", "triton")


def machine(setting: Setting) -> dict[str, Any]:
    """Everything about the machine that a reader of numbers asks for."""
    installed = {name: _version(name) for name in PACKAGES}
    found: dict[str, Any] = {
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "memory": _memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: one for name, one in installed.items() if one is not None},
        "attnkit": attnkit.__version__,
        "device": str(setting.device),
        "dtype": str(setting.dtype).removeprefix("torch."),
    }
    if setting.device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(setting.device)
        found["cuda"] = torch.version.cuda
    return found


def processor() -> str:
    """The name the processor gives itself."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def file_name(found: dict[str, Any], kind: str) -> str:
    """Name of the file for results of a machine and kind of run: one each."""
    return f"{slug(found)}-{found['dtype']}-{kind}.json"


def slug(found: dict[str, Any]) -> str:
    """A machine's name in file names."""
    where = found["gpu"] if "gpu" in found else f"{found['processor']} {found['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", where.lower()).strip("-")


def now() -> dict[str, Any]:
    """When a case was measured, at which commit, and how busy the machine was with other work just before."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"date": datetime.date.today().isoformat(), "commit": commit(), "load": load and round(load, 1)}


def commit() -> str:
    """The commit of the checkout, with `+` where its code differs from it; where this is none, a digest of the code."""
    here = Path(__file__).parent
    # An installed package may lie inside another project's checkout.
    if shutil.which("git") is None or not _git(here, "ls-files", Path(__file__).name):
        return _digest()
    changed = _git(here, "status", "--porcelain", "--", ":/*.py")
    return _git(here, "rev-parse", "--short=10", "HEAD") + "+" * bool(changed)


@functools.cache
def _digest() -> str:
    """A digest of both packages, by which `--resume` knows on a machine without git what was measured."""
    found = hashlib.sha256()
    for package in (Path(attnkit.__file__).parent, Path(__file__).parents[1]):
        for path in sorted([*package.rglob("*.py"), *package.rglob("*.json")]):
            found.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return f"code {found.hexdigest()[:10]}"


def _git(where: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(where), *words], check=False, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _memory() -> str:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return ""
    return f"{size / 2**30:.0f} GiB"

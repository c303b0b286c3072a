"""The interpreted tests, in a process of their own: whether Triton interprets is settled when it is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
pytest.importorskip("triton", reason="triton is not installed")


FILES = {path.stem.removeprefix("test_"): path for path in sorted(Path(__file__).parent.glob("interpreted/test_*.py"))}

# Pieces of about half a minute, so that no worker is left alone with the last one; small files share a process, since
# each takes some seconds to start.
SMALL = "small ones"
PIECES = {"blocks": 1, "stencil": 2, SMALL: 1}
RUNS = [(name, piece) for name, count in PIECES.items() for piece in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "piece"), RUNS)
def test_in_a_process_that_interprets(name, piece):
    files = [path for stem, path in FILES.items() if stem == name or (name == SMALL and stem not in PIECES)]
    command = [sys.executable, "-m", "pytest", *map(str, files), "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    environment["ATTNKIT_PIECE"] = f"{piece}/{PIECES[name]}"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    summary = re.search(r"^(\d+) passed(?:, \d+ (?:deselected|warnings?))* in ", done.stdout, re.MULTILINE)
    assert summary is not None and int(summary[1]) >= 3, text


def test_every_family_is_interpreted():
    assert set(PIECES) - {SMALL} < set(FILES)

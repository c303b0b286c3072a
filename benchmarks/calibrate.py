"""Measures how long every backend takes on this machine, and fits the constants behind the automatic choice.

`python benchmarks/calibrate.py` measures and fits (about five minutes), `--fit` only fits what was measured last.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from attnkit_models.bench.calibration.fit import counted, fit
from attnkit_models.bench.calibration.measure import measure
from attnkit_models.bench.case import Setting
from attnkit_models.bench.machine import machine, now

ROOT = Path(__file__).parent.parent
MEASURED = ROOT / "benchmarks" / "calibration.json"
CONSTANTS = ROOT / "attnkit" / "kernels" / "costs.json"


def main() -> None:
    """Writes `benchmarks/calibration.json` and `attnkit/kernels/costs.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fit", action="store_true", help="measure nothing")
    if parser.parse_args().fit:
        found = json.loads(MEASURED.read_text(encoding="utf-8"))
    else:
        about = {key: one for key, one in machine(Setting()).items() if key != "dtype"}
        found = {"machine": about, **now(), "points": list(measure(print))}
    # Counted anew also where nothing is measured: what is counted may have changed.
    points = counted(found["points"])
    rows = ",\n".join(f"    {json.dumps(point)}" for point in points)
    head = {key: one for key, one in found.items() if key != "points"}
    MEASURED.write_text(json.dumps(head, indent=2)[:-2] + f',\n  "points": [\n{rows}\n  ]\n}}\n', encoding="utf-8")
    constants = {"machine": found["machine"], "date": found["date"], "seconds": fit(points)}
    CONSTANTS.write_text(json.dumps(constants, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {MEASURED.relative_to(ROOT)} and {CONSTANTS.relative_to(ROOT)} ({torch.get_num_threads()} threads)")


if __name__ == "__main__":
    main()

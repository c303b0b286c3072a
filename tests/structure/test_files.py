"""The shape of the repository: sizes, names, what an import brings in, and what no file may mention."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("attnkit", "attnkit_models")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# Machine paths, and the hosts of package registries: neither means anything to who clones the repository.
PRIVATE = re.compile(
    r"(?<![\w./~-])/work(?=[/\s\"'`),;]|$)"
    r"|/tmp/ven[v]"
    r"|pypi\.org|pythonhosted\.org|npmjs\.(?:com|org)|deb\.debian\.org|download\.pytorch\.org",
    re.MULTILINE,
)


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def committed_files() -> list[Path]:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def modules_after(code: str) -> set[str]:
    """Top-level modules that a new interpreter holds after running code."""
    ending = "\nimport json, sys\nprint(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    return set(json.loads(run(sys.executable, "-W", "error", "-c", code + ending).stdout.splitlines()[-1]))


def test_no_file_is_too_long():
    too_long = {
        str(path.relative_to(ROOT)): lines(path)
        for path in MODULES
        if lines(path) > (400 if "kernels" in path.parts else 300)
    }
    assert not too_long


def test_the_median_file_is_short():
    assert statistics.median(map(lines, MODULES)) < 130


def test_no_module_has_a_name_that_says_nothing():
    # `build` would shadow attnkit.build.
    nameless = {"utils", "util", "helpers", "common", "misc", "types", "build"}
    found = {part for path in MODULES for part in path.relative_to(ROOT).with_suffix("").parts} & nameless
    assert not found


def test_both_packages_are_typed():
    assert all((ROOT / package / "py.typed").is_file() for package in PACKAGES)


def test_import_brings_in_nothing_optional():
    optional = {"triton", "timm", "xformers", "accelerate", "matplotlib", "attnkit_models"}
    optional |= {
        "sklearn",
        "hypothesis",
        "typer",
        "rich",
        "PIL",
        "yaml",
        "safetensors",
        "huggingface_hub",
        "pytest",
    }
    assert not modules_after("import attnkit") & optional


def test_every_public_name_exists_and_needs_no_extra():
    extras = {"timm", "xformers", "accelerate", "matplotlib", "sklearn", "typer", "rich", "huggingface_hub"}
    loaded = modules_after("import attnkit\nfor name in attnkit.__all__:\n    getattr(attnkit, name)")
    assert not loaded & extras
    # Nor PyTorch's compiler, which brings SymPy and takes longer than all the rest.
    assert "sympy" not in loaded


def test_imports_run_one_way():
    lint_imports = Path(sys.executable).with_name("lint-imports")
    if not lint_imports.exists():
        pytest.skip("import-linter is not installed")
    run(lint_imports, "--no-cache")


def test_no_file_names_a_machine_path_or_a_registry_host():
    found = []
    for path in committed_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in PRIVATE.finditer(text)]
    assert not found


def test_what_is_packed_exists():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r"^\[tool\.hatch\.build\.targets\.sdist\]\ninclude = (\[.*\])$", text, re.MULTILINE)
    assert found is not None
    packed = json.loads(found[1])
    assert "attnkit" in packed
    assert [pattern for pattern in packed if not list(ROOT.glob(pattern))] == []


# Import names that are not the package's; NATTEN is measured where someone built it.
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn"}
NOT_DECLARED = {"natten"}


def test_every_import_is_declared():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    declared = set(re.findall(r'"([A-Za-z_-]+)(?:\[\w+\])?>=', text))
    found = set()
    for path in [*ROOT.glob("attnkit/**/*.py"), *ROOT.glob("attnkit_models/**/*.py"), *ROOT.glob("benchmarks/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add((node.module or "").partition(".")[0])
    others = found - set(sys.stdlib_module_names) - {"attnkit", "attnkit_models"}
    assert "scipy" in others
    assert {DISTRIBUTIONS.get(name, name) for name in others} - declared <= NOT_DECLARED

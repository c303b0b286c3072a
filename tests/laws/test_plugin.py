"""pytest --attnkit-laws, as anyone runs it on a package of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(folder, *arguments, path=()):
    """pytest in an empty folder, where the plugin may or may not be installed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT]))}
    plugin = ["-p", "no:attnkit", "-p", "attnkit.pytest_plugin", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", *plugin, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def checkerboard(tmp_path_factory):
    """The example package, built and installed into a folder as anyone would install it."""
    folder = tmp_path_factory.mktemp("installed")
    source = ROOT / "examples" / "checkerboard"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "--target", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_example_package_is_found_by_its_entry_point_and_keeps_the_laws(checkerboard, tmp_path):
    found = run(tmp_path, "--attnkit-laws", "checkerboard", "--attnkit-laws-examples", "8", "-v", path=[checkerboard])
    assert found.returncode == 0, found.stdout + found.stderr
    assert "14 passed" in found.stdout
    assert "attnkit_laws[checkerboard-no_leak] PASSED" in found.stdout


def test_a_wrong_copy_of_it_does_not(checkerboard, tmp_path):
    module = (checkerboard / "checkerboard_attention" / "__init__.py").read_text()
    wrong = module.replace(".sum(-1) % 2\n        mask =", ".sum(-1) % 3\n        mask =")
    assert wrong != module
    package = tmp_path / "wrong" / "checkerboard_attention"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(wrong)
    found = run(
        tmp_path,
        *("--attnkit-laws", '{"kind": "checkerboard", "heads": 2}', "-k", "equals_dense", "--attnkit-laws-examples=20"),
        path=[tmp_path / "wrong", checkerboard],
    )
    assert found.returncode == 1
    assert "breaks law 1, equals_dense" in found.stdout and "by definition it is the other way round" in found.stdout
    assert "13 deselected" in found.stdout


def test_an_unknown_primitive_is_one_sentence(tmp_path):
    found = run(tmp_path, "--attnkit-laws", "windw")
    assert found.returncode == 4
    assert "ERROR: --attnkit-laws windw: unknown primitive 'windw'; did you mean 'window'" in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize("count", ["0", "-3", "many", "1.5"])
def test_a_number_of_examples_that_cannot_be_is_a_usage_error(tmp_path, count):
    found = run(tmp_path, "--attnkit-laws", "window", f"--attnkit-laws-examples={count}")
    assert found.returncode == 4
    says = f"error: argument --attnkit-laws-examples: a number of cases, an integer >= 1, but got '{count}'"
    assert says in found.stderr and "Traceback" not in found.stderr


def test_json_that_is_none_says_so(tmp_path):
    found = run(tmp_path, "--attnkit-laws", '{"kind": "window", ')
    assert found.returncode == 4
    assert "begins like options as JSON, but is none: Expecting property name" in found.stderr
    assert "Traceback" not in found.stderr


def test_nothing_is_imported_before_it_is_asked_for(tmp_path):
    (tmp_path / "test_light.py").write_text("import sys\ndef test():\n    assert 'torch' not in sys.modules\n")
    found = run(tmp_path)
    assert found.returncode == 0, found.stdout + found.stderr

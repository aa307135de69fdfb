"""The tests themselves: they need no folder of the reader, and leave nothing in one."""

import os
import shutil
import subprocess
import sys

import pytest
from project_files import FILES, ROOT

BRIEF = (  # of each kind: a script with a default --out, a lab, a page, the fuzz
    "tests/training/test_train_input.py::test_the_twin_differs_in_its_kind_alone",
    "tests/steering/test_lab.py",
    "tests/neurons/test_report.py",
    "tests/lesson/test_laws.py",
)


@pytest.mark.parametrize(
    "tests", [BRIEF, pytest.param(("tests",), marks=pytest.mark.slow)], ids=["brief", "all"]
)
def test_tests_leave_nothing_and_need_nothing(tests, tmp_path):
    """They run in a read-only copy, from another working folder, with an empty home folder."""
    checkout = tmp_path / "checkout"
    built = list((ROOT / "crate_mini").glob("_C.*"))
    for path in [*FILES, *built]:
        copy = checkout / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    # What a reader of the README has when the tests run: the default run's folder.
    (checkout / "out" / "crate-3L" / "last").mkdir(parents=True)
    (checkout / "out" / "crate-3L" / "last" / "config.json").write_text("{}")
    before = sorted(checkout.rglob("*"))
    for path in before:
        path.chmod(0o555 if path.is_dir() else 0o444)
    home = tmp_path / "home"
    elsewhere = tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--workers", "1"]
    command += [f"--rootdir={checkout}", f"--config-file={checkout / 'pyproject.toml'}"]
    command += [str(checkout / test) for test in tests]
    env = {**os.environ, "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    for name in ("CRATE_CACHE", "MPLCONFIGDIR", "PYTHONPATH"):
        env.pop(name, None)
    done = subprocess.run(command, cwd=elsewhere, env=env, capture_output=True, text=True)
    for path in before:
        path.chmod(0o755 if path.is_dir() else 0o644)
    assert done.returncode == 0, done.stdout[-3000:]
    assert not list(home.iterdir())
    assert not list(elsewhere.iterdir())
    assert sorted(checkout.rglob("*")) == before

"""The matrix of Pythons: which are found, what a row says, and that a failure is one."""

import json
import os
import re
import sys
from unittest import mock

import pytest

from crate_mini import UserError
from crate_mini.console import results
from crate_mini.studies import matrix
from crate_mini.studies.matrix import Settings, Trial, counts


def write_python(path, version, code=0):
    """A program that answers like an interpreter of this version, or fails like a shim."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{version}'\nexit {code}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A checkout, and a machine on which no Python is found but this one."""
    monkeypatch.setattr(results, "ROOT", tmp_path / "checkout")
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    (tmp_path / "checkout" / "results").mkdir(parents=True)
    return tmp_path


@pytest.mark.skipif(os.name != "posix", reason="the interpreters here are shell scripts")
def test_pythons_on_the_path_and_of_pyenv_are_found_and_shims_that_fail_are_not(place):
    mine = sys.version_info[1]
    for minor in set(matrix.MINORS) - {mine}:
        write_python(place / "path" / f"python3.{minor}", "", code=127)  # a shim
    old, new = (10, 12) if mine not in (10, 12) else (11, 13)
    theirs = write_python(place / f"pyenv/versions/3.{new}.1/bin/python", f"3 {new} 1")
    write_python(place / f"pyenv/versions/3.{old}.9/bin/python", "2 7 18")
    pythons = matrix.found()
    assert pythons[new] == theirs and pythons[old] is None
    assert matrix.version_of(pythons[mine]) == sys.version_info[:3]
    assert matrix.chosen(f"3.{new},{sys.executable}") == [theirs, sys.executable]
    with pytest.raises(UserError, match=f"--pythons 3.{old} is no Python that runs here; give a "):
        matrix.chosen(f"3.{old}")


@pytest.mark.parametrize(
    "line, expected",
    [
        ("12 passed, 3 skipped in 4.50s", (12, 0, 3)),
        ("== 1 failed, 12 passed, 2 errors in 61.20s (0:01:01) ==", (12, 3, 0)),
        ("it passed 5 times", (0, 0, 0)),
        ("", (0, 0, 0)),
    ],
)
def test_counts_are_those_of_pytests_last_line(line, expected):
    found = counts(f"3 passed in 1.00s\n{line}\n" if line.startswith("=") else f"{line}\n")
    assert tuple(found.values()) == expected


def scripted(monkeypatch, **codes):
    """Trial.step that runs nothing: the word of a command that `codes` names ends with its code."""
    commands = []

    def step(trial, *words, cwd=None, seconds=None):
        text = " ".join(map(str, words))
        commands.append(text)
        code = next((code for word, code in codes.items() if word in text), 0)
        output = "3.9.9 2.9.0 fused\n" if "platform" in text else ""
        if "-m pytest" in text:
            output = f"...\n{'1 failed, ' if code else ''}7 passed in 2.00s\n"
        return code, 1.0, output

    monkeypatch.setattr(Trial, "step", step)
    return commands


@pytest.mark.parametrize("failing", [None, "clone", "venv", "install", "import", "pytest"])
def test_a_row_says_how_far_a_python_came(place, monkeypatch, capsys, failing):
    word = {"import": "platform", "venv": "-m venv", "clone": "git", "pytest": "-m pytest"}.get(
        failing, failing
    )
    commands = scripted(monkeypatch, **({word: 2} if failing else {}))
    monkeypatch.setattr(sys, "argv", ["matrix", "matrix", "--quick"])
    code = matrix.run(Settings(quick=True, pythons=sys.executable))
    assert code == (1 if failing else 0)
    content = json.loads((results.ROOT / "results" / "matrix.json").read_text())
    (row,) = content["rows"]
    assert row["stopped_at"] == {"pytest": "tests"}.get(failing, failing)
    output = capsys.readouterr().out
    if failing is None:
        assert (row["torch"], row["backend"], row["passed"]) == ("2.9.0", "fused", 7)
        assert commands[-1].endswith(" ".join(matrix.QUICK))
        assert re.search(r"2\.9\.0 +fused +7 +0 +0 +passes$", output, re.M)
    else:
        assert f"fails at {row['stopped_at']}" in output
    assert len(content["not_here"]) >= 4
    assert matrix.run(Settings(table=True)) == 0 and capsys.readouterr().out in output


@pytest.mark.parametrize("printed", [b"begun", "begun", None])
def test_what_a_command_printed_in_its_time_is_kept_on_every_system(tmp_path, monkeypatch, printed):
    """subprocess.run hands it over as bytes on POSIX, as text on Windows."""
    late = matrix.subprocess.TimeoutExpired("pytest", 2, output=printed)
    monkeypatch.setattr(matrix.subprocess, "run", mock.Mock(side_effect=late))
    code, _, output = Trial(sys.executable, tmp_path).step("pytest", seconds=2)
    assert (code, output) == (124, "begun" if printed else "")


def test_rows_are_kept_when_a_later_python_is_interrupted(place, monkeypatch):
    rows = iter([{"python": "3.12.1", "stopped_at": None}])

    def run(trial, tests, seconds):
        trial.clone.mkdir()
        row = next(rows, None)
        if row is None:
            raise KeyboardInterrupt
        return row

    monkeypatch.setattr(Trial, "run", run)
    with pytest.raises(KeyboardInterrupt):
        matrix.run(Settings(pythons=f"{sys.executable},{sys.executable}"))
    content = json.loads((results.ROOT / "results" / "matrix.json").read_text())
    assert [row["python"] for row in content["rows"]] == ["3.12.1"]
    assert not list((results.ROOT / "out" / "matrix").glob("*/clone"))


def test_a_command_that_takes_too_long_or_fails_is_logged(tmp_path):
    trial = Trial(sys.executable, tmp_path)
    code, _, output = trial.step(sys.executable, "-c", "print('so far')")
    assert (code, output) == (0, "so far\n")
    slow = "import time; print('begun', flush=True); time.sleep(60)"
    code, _, output = trial.step(sys.executable, "-c", slow, seconds=2)
    assert (code, output) == (124, "begun\n")
    assert trial.step(sys.executable, "-c", "raise SystemExit(3)")[0] == 3
    assert "so far" in trial.log.read_text() and "exit code 124" in trial.log.read_text()

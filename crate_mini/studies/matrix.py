"""The README's two commands on every Python that this machine has: which of them pass?"""

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from crate_mini import UserError
from crate_mini.cli import setting
from crate_mini.console import results
from crate_mini.console.terminal import Command, Progress, aligned

MINORS = range(10, 15)  # of Python 3, as requires-python and the README say
QUICK = ("tests/kernels/test_kernels.py", "tests/lesson", "tests/training", "tests/house")
COUNT = re.compile(r"(\d+) (passed|failed|skipped|errors?)\b")
FACTS = """import platform, torch
from crate_mini import ops
print(platform.python_version(), torch.__version__, ops.backend("cpu")[0])"""


@dataclass
class Settings:
    """Install, build and test this commit with every Python found, each in a clone and environment
    of its own.

    Found: python3.10 to python3.14 on the PATH, and those of pyenv. Each takes a few minutes and,
    where pip finds PyTorch with CUDA only, several GB while it runs.
    """

    quick: bool = setting(False, "only the tests of kernels, lesson, training and house")
    pythons: str | None = setting(
        None, "these instead, as versions or paths, like 3.12,3.13", shown="all found"
    )
    minutes: int = setting(60, "stop a Python's tests after this time", low=1)
    table: bool = setting(False, "only print the table of the results file again")


# ---- which Pythons there are ---------------------------------------------------------------------


def version_of(python):
    """(major, minor, patch) of an interpreter, or None if it does not run, as a shim may not."""
    code = "import sys; print(*sys.version_info[:3])"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
        return tuple(map(int, done.stdout.split())) or None
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def candidates(minor):
    """Paths that may be Python 3.MINOR, the likeliest first."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    paths = [shutil.which(f"python3.{minor}")]
    paths += sorted(root.glob(f"versions/3.{minor}.*/bin/python"), reverse=True)
    if sys.version_info[1] == minor:
        paths.append(sys.executable)
    return [str(path) for path in paths if path]


def found():
    """{minor: path of the interpreter, or None} of MINORS."""
    pythons = {}
    for minor in MINORS:
        runs = (path for path in candidates(minor) if (version_of(path) or ())[:2] == (3, minor))
        pythons[minor] = next(runs, None)
    return pythons


def chosen(text):
    """The interpreters that --pythons names. Raises UserError for one that is none."""
    paths = []
    for word in text.split(","):
        match = re.fullmatch(r"3\.(\d+)", word.strip())
        path = found().get(int(match[1])) if match else word.strip()
        if path is None or version_of(path) is None:
            raise UserError(
                f"--pythons {word.strip()} is no Python that runs here; give a path, like "
                f"{sys.executable}, or one of "
                f"{', '.join(f'3.{minor}' for minor, path in found().items() if path)}."
            )
        paths.append(path)
    return paths


# ---- one of them ---------------------------------------------------------------------------------


class Trial:
    """One Python: a clone, an environment, and a log of all that its commands print."""

    def __init__(self, python, folder):
        self.python, self.folder = python, folder
        self.clone, self.venv = folder / "clone", folder / "venv"
        scripts = "Scripts" if os.name == "nt" else "bin"
        self.own_python = self.venv / scripts / "python"
        self.log = folder / "log.txt"

    def step(self, *words, cwd=None, seconds=None):
        """(exit code, seconds, output) of a command; 124 if it took longer than `seconds`."""
        start = time.monotonic()
        env = {**os.environ, "CRATE_CACHE": str(self.folder / "cache"), "PYTHONPATH": ""}
        try:
            done = subprocess.run(
                [str(word) for word in words],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                cwd=cwd,
                env=env,
                timeout=seconds,
            )
            code, output = done.returncode, done.stdout
        except subprocess.TimeoutExpired as error:
            output = error.stdout or ""  # bytes on POSIX in spite of text=True, str on Windows
            if isinstance(output, bytes):
                output = output.decode(errors="replace")
            code = 124
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(f"$ {' '.join(map(str, words))}\n{output}\nexit code {code}\n\n")
        return code, time.monotonic() - start, output

    def prepare(self):
        """Clone, environment, install; None, or the name of the step that failed."""
        steps = {
            "clone": ("git", "clone", "--quiet", results.ROOT, self.clone),
            "venv": (self.python, "-m", "venv", self.venv),
        }
        for name, words in steps.items():
            if self.step(*words)[0]:
                return name
        install = self.own_python, "-m", "pip", "install", "--quiet", "-e", ".[test]"
        return "install" if self.step(*install, cwd=self.clone)[0] else None

    def run(self, tests, seconds):
        """The row of this Python: what it is, how far it came, and what its tests said."""
        row = {"python": ".".join(map(str, version_of(self.python))), "stopped_at": None}
        start = time.monotonic()
        row["stopped_at"] = self.prepare()
        row["install_seconds"] = round(time.monotonic() - start)
        if row["stopped_at"]:
            return row
        code, _, output = self.step(self.own_python, "-c", FACTS, cwd=self.clone)
        if code:
            return {**row, "stopped_at": "import"}
        row |= dict(zip(("python", "torch", "backend"), output.split()[-3:]))
        pytest = self.own_python, "-m", "pytest", "-p", "no:cacheprovider", *tests
        code, took, output = self.step(*pytest, cwd=self.clone, seconds=seconds)
        row |= {"tests_seconds": round(took), "exit_code": code, **counts(output)}
        return {**row, "stopped_at": "tests" if code else None}


def counts(output):
    """{"passed", "failed", "skipped"} of pytest's last line that has them; errors are failures."""
    lines = [line for line in output.splitlines() if re.search(r"\d+ \w+.* in [\d.]+ ?s", line)]
    found_counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    for number, word in COUNT.findall(lines[-1] if lines else ""):
        found_counts["failed" if word.startswith("error") else word] += int(number)
    return found_counts


# ---- all of them ---------------------------------------------------------------------------------


def run(settings):
    """Try every Python, keep the rows in results/matrix.json, print the table.

    Returns 1 if one of them does not pass. Raises UserError if there is none.
    """
    file = results.ROOT / "results" / "matrix.json"
    if settings.table:
        print(table(results.read_json(file)))
        return 0
    pythons = chosen(settings.pythons) if settings.pythons else list(filter(None, found().values()))
    if not pythons:
        raise UserError("no Python 3.10 to 3.14 was found; name one with --pythons PATH.")
    results.ready_file(file)
    tests = QUICK if settings.quick else ()
    rows = []
    progress = Progress("matrix", len(pythons), every=0)
    for done, python in enumerate(pythons, 1):
        rows.append(tried(python, tests, 60 * settings.minutes))
        result = content(rows, settings)
        results.write_json(file, result)  # after each, as a run of all may take hours
        progress.update(done)
    print(table(result))
    return 1 if any(row["stopped_at"] for row in rows) else 0


def tried(python, tests, seconds):
    """The row of one Python; its log stays, its clone and environment do not."""
    major, minor, _ = version_of(python)
    folder = results.ROOT / "out" / "matrix" / f"{major}.{minor}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    trial = Trial(python, folder)
    try:
        return trial.run(tests, seconds)
    finally:
        for large in (trial.clone, trial.venv):
            shutil.rmtree(large, ignore_errors=True)


def content(rows, settings):
    """What results/matrix.json holds of these rows."""
    minors = {row["python"].rsplit(".", 1)[0] for row in rows}
    return {
        "command": results.command("-m", "crate_mini.studies"),
        "commit": results.commit(),
        "quick": settings.quick,
        "rows": rows,
        "not_here": [f"3.{minor}" for minor in MINORS if f"3.{minor}" not in minors],
    }


def table(result):
    """The rows as text, and the Pythons that were not tried."""
    heads = ["Python", "torch", "backend", "passed", "failed", "skipped", "verdict"]
    lines = [heads]
    for row in result["rows"]:
        cells = [str(row.get(name, "")) for name in ("python", "torch", "backend", *heads[3:6])]
        stopped = row["stopped_at"]
        lines.append([*cells, f"fails at {stopped}" if stopped else "passes"])
    text = aligned(lines)
    if result["not_here"]:
        text += f"\n\nnot tried: {', '.join(result['not_here'])}"
    return text


COMMAND = Command(Settings, run, checkpoint=False)

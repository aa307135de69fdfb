"""The house rules that a machine can check: sizes, directions of import, style, no trace of one machine."""

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WIDTH, FUNCTION = 110, 60  # columns of a line, lines of a function
BUDGETS = {  # lines of a file, a ceiling: what a reader has to take in before the file is understood
    "setup.py": 130,
    "train.py": 330,
    "interpret.py": 340,
    "steer.py": 330,
    "model.py": 330,
    "reference.py": 120,
    "checkpoint.py": 200,
    "measure.py": 150,
    "steering.py": 150,
    "head.py": 80,
    "corpora.py": 220,
    "explain.py": 350,
    "clvqvae.py": 400,
    "report.py": 350,
    "fused.py": 330,
    "kernels.h": 100,
    "bindings.cpp": 100,
    "ista_cuda.cu": 400,
    "product_cuda.cuh": 450,
    ".py": 250,
    ".cpp": 330,
    ".h": 330,
    ".cu": 330,
    ".cuh": 330,
}
SCRIPTS = {"train", "interpret", "steer"}
TOP = {
    "setup.py",
    "crate_mini",
    "csrc",
    "train.py",
    "interpret.py",
    "steer.py",
    "tests",
    "README.md",
    "LICENSE",
    "pyproject.toml",
    ".gitignore",
    ".ci",
    "results",
}


def tracked():
    """Files under version control; in an archive without it, all files that belong to the project."""
    listed = shutil.which("git") and subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    )
    if not listed or listed.returncode:
        return sorted(
            p
            for top in TOP
            for p in [ROOT / top, *(ROOT / top).rglob("*")]
            if p.is_file() and "__pycache__" not in p.parts and not p.name.startswith("_C.")
        )
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


FILES = tracked()
PYTHON = [p for p in FILES if p.suffix == ".py"]
C = [p for p in FILES if p.suffix in (".h", ".cpp", ".cuh", ".cu")]
PACKAGE = [p for p in PYTHON if p.is_relative_to(ROOT / "crate_mini")]


def name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [p for p in PYTHON + C if "tests" not in p.parts], ids=name)
def test_a_file_keeps_its_budget(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    budget = BUDGETS.get(path.name, BUDGETS[path.suffix])
    assert lines <= budget, f"{name(path)} has {lines} lines, its budget is {budget}"


@pytest.mark.parametrize("path", PYTHON + C, ids=name)
def test_lines_fit(path):
    text = path.read_text(encoding="utf-8")
    long = [i for i, line in enumerate(text.splitlines(), 1) if len(line) > WIDTH]
    assert not long, f"{name(path)}: longer than {WIDTH} columns: lines {long}"


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_python_functions_fit(path):
    functions = [
        n
        for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    long = {
        f.name: f.end_lineno - f.lineno + 1
        for f in functions
        if f.end_lineno - f.lineno >= FUNCTION
    }
    assert not long, f"{name(path)}: functions of more than {FUNCTION} lines: {long}"


@pytest.mark.parametrize("path", C, ids=name)
def test_c_functions_fit(path):
    """A function begins where a line ends in ") {" and is no statement, and ends at the brace below it."""
    start, long = None, []
    for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        indent = len(line) - len(line.lstrip())
        if (
            start is None
            and re.search(r"\)( const)? \{$", line)
            and not re.match(r" *(for|if|while) ", line)
        ):
            start, depth = i, indent
        elif start is not None and line.startswith(" " * depth + "}"):
            long += [start] if i - start >= FUNCTION else []
            start = None
    assert not long, f"{name(path)}: functions of more than {FUNCTION} lines begin at {long}"


def imports(path):
    """Names of all modules that a Python file imports, wherever it does, with crate_mini's in full."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_arrows_in_the_package(path):
    """scripts -> crate_mini -> (model -> ops -> reference | compiled module): never backwards."""
    found = set(imports(path))
    assert not found & SCRIPTS, f"{name(path)} imports a script"
    own = {n.split(".")[1] for n in found if n.startswith("crate_mini.")} - {
        "UserError",
        "__version__",
    }
    allowed = {
        "reference": set(),
        "_stamp": set(),
        "fused": {"_C"},
        "head": set(),
        "past": set(),
        "ops": {"fused", "reference", "_stamp", "_C"},
        "model": {"ops", "head", "past"},
    }
    assert own <= allowed.get(path.stem, own), f"{name(path)} imports {own}"
    studies = {n for n in own if n == "bench" or n.startswith("study")}
    assert not studies or path.stem.startswith("study"), (
        f"{name(path)}, no study, imports {studies}"
    )


@pytest.mark.parametrize("path", [p for p in C if p.parent.name == "csrc"], ids=name)
def test_arrows_in_csrc(path):
    """No torch anywhere; Python in bindings.cpp only; CUDA in CUDA files only."""
    found = re.findall(r'#include\s*[<"]([^>"]+)', path.read_text(encoding="utf-8"))
    assert not [f for f in found if re.match(r"torch|ATen|c10", f)]
    assert path.name == "bindings.cpp" or not [
        f for f in found if re.match(r"pybind11|Python\.h", f)
    ]
    assert path.suffix in (".cu", ".cuh") or not [f for f in found if f.startswith("cuda")]


def test_top_level():
    assert {p.relative_to(ROOT).parts[0] for p in FILES} <= TOP


def test_nothing_of_this_machine():
    """No path of a machine that this was written on."""
    bad = re.compile("/(" + "|".join(["work", "root", "tmp/venv", "opt", "home/[a-z]+"]) + ")/")
    for path in FILES:
        if path.suffix in (".png", ".tiktoken", ".npz"):
            continue
        found = sorted({m.group() for m in bad.finditer(path.read_text(encoding="utf-8"))})
        assert not found, f"{name(path)} mentions {found}, a path of one machine"


def test_ruff_is_content():
    if importlib.util.find_spec("ruff") is None:
        pytest.skip("ruff is not installed")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "ruff",
            "check",
            "--no-cache",
            "--output-format=concise",
            *(str(p) for p in PYTHON),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout

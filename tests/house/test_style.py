"""Style that a machine can count: width, dense constructs, long functions, ruff.

The counters do not judge beauty; they keep lines from being packed. Limits are per 1,000 lines of
the scripts and the package together.
"""

import ast
import importlib.util
import re
import statistics
import subprocess
import sys

import pytest
from project_files import PACKAGE, PYTHON, ROOT, C, name

WIDTH = 100  # columns
FUNCTION = 60  # lines
MEDIAN_WIDTH = 48
PER_1000_LINES = {
    "nested comprehensions": 1.5,
    "assignments of three or more": 2.0,
    "lambdas": 3.0,
    "expressions as statements": 0.2,
}
COMPREHENSIONS = (ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp)
READ = [ROOT / script for script in ("setup.py", "train.py", "interpret.py", "steer.py")] + PACKAGE
SHELF = [path for path in PACKAGE if path.parent == ROOT / "crate_mini"]


def dense(node):
    """The kind of dense construct of a syntax node, or None."""
    if isinstance(node, COMPREHENSIONS):
        inner = [other for other in ast.walk(node) if other is not node]
        nested = any(isinstance(other, COMPREHENSIONS) for other in inner)
        return "nested comprehensions" if nested else None
    if isinstance(node, ast.Assign):
        pair = isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)
        return "assignments of three or more" if pair and len(node.value.elts) >= 3 else None
    if isinstance(node, ast.Lambda):
        return "lambdas"
    if isinstance(node, ast.Expr) and isinstance(node.value, (ast.BoolOp, ast.IfExp)):
        return "expressions as statements"
    return None


def constructs(path):
    """[(construct, "file:line")] of a file."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    kinds = [(dense(node), node) for node in nodes]
    return [(kind, f"{name(path)}:{node.lineno}") for kind, node in kinds if kind]


@pytest.mark.parametrize("kind", PER_1000_LINES)
def test_dense_constructs_are_rare(kind):
    places, lines = [], 0
    for path in READ:
        lines += len(path.read_text(encoding="utf-8").splitlines())
        places += [place for construct, place in constructs(path) if construct == kind]
    assert 1000 * len(places) / lines <= PER_1000_LINES[kind], places


@pytest.mark.parametrize("path", SHELF, ids=name)
def test_the_top_shelf_has_no_nested_comprehension(path):
    nested = [place for kind, place in constructs(path) if kind == "nested comprehensions"]
    assert not nested


def test_lines_have_room():
    widths = []
    for path in READ:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                widths.append(len(line))
    assert statistics.median(widths) <= MEDIAN_WIDTH


@pytest.mark.parametrize("path", PYTHON + C, ids=name)
def test_lines_fit(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    long = [i for i, line in enumerate(lines, 1) if len(line) > WIDTH]
    assert not long, f"{name(path)}: longer than {WIDTH} columns: lines {long}"


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_python_functions_fit(path):
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    long = {}
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            if lines > FUNCTION:
                long[node.name] = lines
    assert not long, f"{name(path)}: functions of more than {FUNCTION} lines: {long}"


@pytest.mark.parametrize("path", C, ids=name)
def test_c_functions_fit(path):
    """A function begins at a line that ends in ") {" and is not a loop or condition."""
    start, long = None, []
    for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        indent = len(line) - len(line.lstrip())
        opens = re.search(r"\)( const)? \{$", line)
        if start is None and opens and not re.match(r" *(for|if|while) ", line):
            start, depth = i, indent
        elif start is not None and line.startswith(" " * depth + "}"):
            if i - start >= FUNCTION:
                long.append(start)
            start = None
    assert not long, f"{name(path)}: functions of more than {FUNCTION} lines begin at {long}"


@pytest.mark.parametrize("command", ["check --output-format=concise", "format --check"])
def test_ruff_is_content(command):
    if importlib.util.find_spec("ruff") is None:
        pytest.skip("ruff is not installed")
    files = [str(path) for path in PYTHON]
    words = [sys.executable, "-m", "ruff", *command.split(), "--no-cache", *files]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout

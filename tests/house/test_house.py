"""The structure of the project: its folders, its imports, and no trace of one machine."""

import ast
import re
import subprocess
import sys

import pytest
from project_files import FILES, PACKAGE, PYTHON, ROOT, TOP_LEVEL, C, name

SHELF = {
    "__init__",
    "__main__",
    "_stamp",
    "cli",
    "fused",
    "generate",
    "intervene",
    "lab",
    "loss",
    "model",
    "ops",
    "reference",
    "stats",
}
FLOORS = {  # a chapter imports only chapters of lower floors, and the top shelf
    "console": 0,
    "plots": 1,
    "data": 1,
    "training": 2,
    "layers": 3,
    "sae": 3,
    "neurons": 4,
    "judges": 5,
    "steering": 5,
    "concepts": 6,
    "playground": 6,
    "compare": 3,
    "export": 6,
    "course": 7,
    "studies": 7,
}
SCRIPTS = {"train", "interpret", "steer"}
SHELF_LINES = 2000
MODULES_OF_TRAIN = 25


def module(path):
    """crate_mini.data.batches for crate_mini/data/batches.py."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path): path for path in PACKAGE}


def imports(nodes):
    """Names of all modules that these statements import; names taken from a package in full."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def all_imports(path):
    return imports(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def imports_at_import_time(path):
    return imports(ast.parse(path.read_text(encoding="utf-8")).body)


def chapter(name):
    """The chapter that a module belongs to; None for the top shelf and for foreign modules."""
    parts = name.split(".")
    if parts[0] != "crate_mini" or len(parts) < 2 or parts[1] not in FLOORS:
        return None
    return parts[1]


# ---- rooms ---------------------------------------------------------------------------------------


def test_the_top_level_holds_nothing_else():
    assert {path.relative_to(ROOT).parts[0] for path in FILES} <= TOP_LEVEL


def test_the_top_shelf_holds_the_lesson_and_its_ground_in_few_lines():
    shelf = [path for path in PACKAGE if path.parent == ROOT / "crate_mini"]
    assert {path.stem for path in shelf} == SHELF
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in shelf)
    assert lines <= SHELF_LINES


def test_every_folder_of_the_package_is_a_chapter_with_a_place():
    folders = {path.relative_to(ROOT / "crate_mini").parts[0] for path in PACKAGE}
    assert {folder for folder in folders if not folder.endswith(".py")} == set(FLOORS)


# ---- arrows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_arrows_point_down(path):
    imported = all_imports(path)
    assert not imported & SCRIPTS, f"{name(path)} imports a script"
    own = chapter(module(path))
    chapters = {chapter(other) for other in imported} - {None, own}
    if own is None:
        if path.stem == "lab":  # may import chapters, but only when one of its functions runs
            chapters = {chapter(other) for other in imports_at_import_time(path)} - {None}
        assert not chapters, f"{name(path)}, on the top shelf, imports {chapters}"
    upward = {other for other in chapters if FLOORS[other] >= FLOORS[own]}
    assert not upward, f"{name(path)} imports upward, from {upward}"


@pytest.mark.parametrize(
    "file, allowed",
    [
        ("reference", set()),
        ("_stamp", set()),
        ("stats", set()),
        ("loss", {"ops", "fused"}),
        ("fused", {"_C"}),
        ("generate", set()),
        ("intervene", set()),
        ("ops", {"fused", "reference", "_stamp"}),
        ("model", {"ops", "loss", "cli"}),
    ],
)
def test_arrows_of_the_lesson(file, allowed):
    """The lesson reads from top to bottom: model -> ops -> fused, reference."""
    imported = all_imports(ROOT / "crate_mini" / f"{file}.py")
    own = {other.split(".")[1] for other in imported if other.startswith("crate_mini.")}
    assert own - {"UserError", "__version__"} <= allowed


def test_no_module_can_reach_itself():
    edges = {}
    for start, path in MODULES.items():
        edges[start] = (imports_at_import_time(path) & set(MODULES)) - {"crate_mini"}
    for start in edges:
        reached, waiting = set(), list(edges[start])
        while waiting:
            current = waiting.pop()
            if current not in reached:
                reached.add(current)
                waiting += edges[current]
        assert start not in reached, f"{start} imports itself by way of {sorted(reached)}"


def test_training_loads_the_lesson_and_its_chapters_alone():
    code = "import sys, train; print(*(m for m in sys.modules if m.split('.')[0] == 'crate_mini'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = done.stdout.split()
    assert len(loaded) <= MODULES_OF_TRAIN, loaded
    assert {chapter(module) for module in loaded} <= {None, "console", "data", "training"}


@pytest.mark.parametrize("path", [p for p in C if p.parent.name == "csrc"], ids=name)
def test_arrows_in_csrc(path):
    """No torch anywhere; Python in bindings.cpp only; CUDA in CUDA files only."""
    included = re.findall(r'#include\s*[<"]([^>"]+)', path.read_text(encoding="utf-8"))
    assert not [file for file in included if re.match(r"torch|ATen|c10", file)]
    python = [file for file in included if re.match(r"pybind11|Python\.h", file)]
    assert path.name == "bindings.cpp" or not python
    cuda = [file for file in included if file.startswith("cuda")]
    assert path.suffix in (".cu", ".cuh") or not cuda


def test_no_test_file_imports_another():
    names = {path.stem for path in PYTHON if path.name.startswith("test_")}
    for path in PYTHON:
        if "tests" in path.parts:
            assert not all_imports(path) & names, f"{name(path)} imports a test file"


def test_no_two_files_of_the_tests_share_a_name():
    """They are imported by name alone, from whichever folder comes first."""
    names = [path.name for path in PYTHON if "tests" in path.parts]
    assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)


# ---- one machine ---------------------------------------------------------------------------------


def test_nothing_of_one_machine():
    """No path of a machine that this was written on."""
    folders = "|".join(["work", "root", "tmp/venv", "tmp/w", "opt", "home/[a-z]+"])
    bad = re.compile(f"/({folders})/")
    for path in FILES:
        if path.suffix in (".png", ".tiktoken", ".npz", ".pt"):
            continue
        found = sorted({match.group() for match in bad.finditer(path.read_text(encoding="utf-8"))})
        assert not found, f"{name(path)} mentions {found}, a path of one machine"

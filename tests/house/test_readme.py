"""The README is true: its commands run at small size, and its names and counts are the code's."""

import ast
import importlib
import json
import os
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from forked import run_script
from project_files import FILES, ROOT

from crate_mini import cli
from crate_mini.concepts import finetune
from crate_mini.data.tokenizer import load_tokenizer
from crate_mini.model import Config
from crate_mini.training.settings import Settings

README = (ROOT / "README.md").read_text(encoding="utf-8")
REPORT = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
SMALL = {  # what makes a command small
    "train": "--train-steps 2 --eval-tokens 300 --n-layer 1 --n-embd 24 --n-head 2 --block-size 16 "
    "--batch-size 4 --micro-batch 2 --warmup 1 --device cpu",
    "classify": "--texts 300 --length 16 --epochs 1",
    "layers": "--tokens 64",
    "neurons": "--tokens 4000 --n 4",
    "report": "--humans 5",
    "selftest": "",
    "sae": "--steps 5 --batch 16 --tokens 64 --l1 1e-4",
    "concepts": "--k 4 --epochs 1 --tests 40 --whole 4 --nodes 2 --least 2 --methods kmeans "
    "--no-controls",
    "measure": "--neurons 2 --tokens 64 --doses 1,2,4",
}
FLAGS_OF_OTHERS = {  # of pytest, pip, torchrun; and those that no settings declare
    "resume",
    "config",
    "steps",
    "task",
    "fuzz-minutes",
    "help",
    "standalone",
    "nnodes",
    "node-rank",
    "nproc-per-node",
    "master-addr",
}


def fences(language, text=README):
    """The fenced blocks of a language; "" for those that name none."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M)
    return [block for name, block in blocks if name == language]


def commands():
    """Every command of the README's shell blocks, without its comment."""
    lines = "".join(fences("sh")).splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip()]


def runnable():
    """The commands that can run here; .ci/run runs the installation and the tests."""
    words = ("pytest", "pip install", "crate_mini.studies")
    return [command for command in commands() if not any(word in command for word in words)]


# ---- commands ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A reader's folder: the scripts and the package, two texts, and a trained model."""
    place = tmp_path_factory.mktemp("reader")
    for name in ("train.py", "interpret.py", "steer.py", "crate_mini", "csrc", "setup.py"):
        (place / name).symlink_to(ROOT / name)
    lines = [f"line {i} of a small text about codes\n" for i in range(3000)]
    (place / "mytext.txt").write_text("".join(lines))
    reviews = []
    for i in range(200):
        for label, word in enumerate(("bad", "good")):
            text = f"a {word} film, number {i}, seen with {word} friends"
            reviews.append(json.dumps({"text": text, "label": label}) + "\n")
    (place / "reviews.jsonl").write_text("".join(reviews))
    small = shlex.split(SMALL["train"])
    run(["train.py", "--data", "mytext.txt", *small, "--block-size", "64", "--n-layer", "3"], place)
    return place


def run(words, place):
    """Run a script in `place`, on one thread, with its own cache; returns its output."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CRATE_CACHE": str(place / "cache")}
    done = run_script(words, place, env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def small(words):
    """The same command at small size, with our ranks instead of GPT-2's, which are a download."""
    words = list(words)
    if "--tokenizer" in words:
        words[words.index("--tokenizer") + 1] = "pydocs"
    if "--resume" in words:
        return words[: words.index("--train-steps")] + ["--train-steps", "3"]
    if "classify" in words:
        return words + shlex.split(SMALL["classify"])
    if "train.py" in words:
        return words + shlex.split(SMALL["train"])
    return words + shlex.split(SMALL.get(words[2], ""))


def test_the_first_command_installs_and_trains_and_the_second_tests():
    assert commands()[0] == 'pip install -e ".[test]" && python train.py'
    assert commands()[1] == "python -m pytest"


@pytest.mark.parametrize("command", runnable())
def test_a_command_runs(command, folder):
    words = small(shlex.split(command))
    if words[0] == "torchrun":
        words = ["python", "-m", "torch.distributed.run", *words[1:]]
    output = run(words[1:], folder)
    if "train.py" in words and "classify" not in words:
        assert "\nresult " in output
        assert "\nnext " in output


def test_the_lines_of_python_run(folder):
    (code,) = fences("python")
    assert len(code.strip().splitlines()) <= 12
    output = run(["-c", code], folder)
    assert output.strip()


def test_what_steer_measures_comes_onto_the_page_of_neurons(folder):
    checkpoint = "out/crate-3L/best"
    for script, command in (
        ("interpret.py", "neurons"),
        ("steer.py", "measure"),
        ("interpret.py", "report"),
    ):
        run(small(["python", script, command, checkpoint])[1:], folder)
    page = folder / "out" / "crate-3L" / "interpret" / "index.html"
    assert "<h2>Steering</h2>" in page.read_text("utf-8")


# ---- names ---------------------------------------------------------------------------------------


def all_settings():
    """Every settings dataclass of the scripts."""
    import interpret
    import steer

    modules = [*interpret.COMMANDS.values(), *steer.COMMANDS.values(), steer.PROMPT]
    modules += ["crate_mini.export.command", "crate_mini.compare.command"]
    settings = [importlib.import_module(module).COMMAND.settings for module in modules]
    return [Settings, Config, finetune.Settings, *settings]


@pytest.mark.parametrize("text", [README, REPORT], ids=["README", "results"])
def test_flags_exist(text):
    known = set(FLAGS_OF_OTHERS)
    for settings in all_settings():
        known |= {cli.flag_name(f.name).removeprefix("--") for f in fields(settings)}
    for block in re.findall(r"`[^`]*`|```.*?```", text, re.S):
        if "studies" in block:
            continue  # these have other settings
        for flag in re.findall(r"(?<![\w-])--(?:no-)?([a-z][\w-]*)", block):
            assert flag in known, f"--{flag} in {block}"


@pytest.mark.parametrize("text", [README, REPORT], ids=["README", "results"])
def test_studies_exist(text):
    from crate_mini.studies.__main__ import COMMANDS

    named = set(re.findall(r"crate_mini\.studies ([a-z]+)", text))
    assert named and named <= set(COMMANDS)


@pytest.mark.parametrize("text", [README, REPORT], ids=["README", "results"])
def test_files_exist(text):
    for path in re.findall(r"`((?:crate_mini|csrc|tests|results)/[\w/.-]+)`", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\(((?!http|#)[^)]+)\)", text):
        base = ROOT if text is README else ROOT / "results"
        assert (base / path).exists(), path


def test_the_default_vocabulary_is_the_one_named():
    ids = load_tokenizer(Settings.tokenizer).vocab_size
    assert ids == 4096
    assert "a vocabulary of 4,096" in " ".join(README.split())


def names_in(path):
    """Names that a source file defines or uses in its code, not in comments or docstrings."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return set(re.findall(r"\w+(?=\()", text))
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
    return names


def equation_rows():
    """(names, file) of the table from equations to code."""
    rows = []
    for line in README.splitlines():
        cells = re.split(r"(?<!\\)\|", line.strip("|"))
        if len(cells) == 3 and re.fullmatch(r" `(crate_mini|csrc)/\S+` ", cells[2]):
            rows.append((re.findall(r"`(\w+)`", cells[1]), cells[2].strip(" `")))
    return rows


def test_the_table_of_equations_is_found():
    assert len(equation_rows()) >= 8


@pytest.mark.parametrize("names, file", equation_rows(), ids=lambda value: str(value))
def test_equations_are_where_the_table_says(names, file):
    assert names
    missing = set(names) - names_in(ROOT / file)
    assert not missing, f"{file} has no {missing}"


# ---- the tree ------------------------------------------------------------------------------------


def tree():
    """{path: about how many lines} of the annotated tree."""
    block = next(block for block in fences("") if "crate_mini/" in block)
    parent, entries = Path(), {}
    for line in block.splitlines():
        match = re.match(r"( *)(\S+)", line)
        if not match:
            continue
        path = Path(match[2]) if not match[1] else parent / match[2]
        if not match[1]:
            parent = path
        count = re.search(r"about ([\d,]+) lines", line)
        entries[path] = int(count[1].replace(",", "")) if count else None
    return entries


def lines_of(path):
    """Lines of a source file, or of all source files below a folder."""
    suffixes = (".py", ".cpp", ".cu", ".cuh", ".h", ".js", ".css")
    files = [path] if path.is_file() else [f for f in FILES if f.is_relative_to(path)]
    texts = [f.read_text(encoding="utf-8") for f in files if f.suffix in suffixes]
    return sum(len(text.splitlines()) for text in texts)


def test_the_tree_names_every_file_of_the_top_shelf_and_every_chapter():
    shelf = {f.relative_to(ROOT) for f in FILES if f.parent == ROOT / "crate_mini"}
    hidden = {Path("crate_mini") / f"{stem}.py" for stem in ("__init__", "__main__", "_stamp")}
    chapters = {f.relative_to(ROOT).parent for f in FILES if f.name == "__init__.py"}
    chapters = {path for path in chapters if path.parent == Path("crate_mini")}
    scripts = {Path(name) for name in ("train.py", "interpret.py", "steer.py", "setup.py")}
    named = set(tree())
    assert (shelf - hidden) | chapters | scripts <= named
    assert all((ROOT / path).exists() for path in named)


@pytest.mark.parametrize("path", [path for path, lines in tree().items() if lines], ids=str)
def test_lines_in_the_tree_are_about_right(path):
    said = tree()[path]
    assert said == pytest.approx(lines_of(ROOT / path), rel=0.15)

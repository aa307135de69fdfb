"""python -m crate_mini.course: what a learner and a teacher type."""

import json
import os
import re
import shlex
import time

import pytest
from forked import ROOT, run_script

from crate_mini import course
from crate_mini.course import exercise, grading, notebook


def one_thread():
    """The environment as it is now: another test may have changed it since this file was read."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run(folder, *words):
    """(exit code, stdout, stderr) of a command of the course."""
    done = run_script(["-m", "crate_mini.course", *map(str, words)], folder, one_thread())
    return done.returncode, done.stdout, done.stderr


def test_without_a_word_it_lists_the_exercises_and_what_to_do(tmp_path):
    code, output, errors = run(tmp_path)
    assert code == 0 and not errors
    for chosen in exercise.exercises():
        pattern = rf"(?m)^ ?{chosen.number} +{re.escape(chosen.stars)} .*{re.escape(chosen.title)}$"
        assert re.search(pattern, output)
        assert chosen.facts["TEACHES"] in output
    assert "next      python -m crate_mini.course start 1\n" in output
    assert "idea.md" in output
    assert not list(tmp_path.iterdir())


def test_a_learner_starts_checks_looks_and_passes(tmp_path):
    code, output, _ = run(tmp_path, "start", 6)
    assert code == 0 and "next      edit it, then python -m crate_mini.course check 6" in output
    mine = tmp_path / "exercises" / "06_counting.py"
    code, output, errors = run(tmp_path, "check", 6)
    assert code == 1 and not errors
    assert output.startswith(
        "fails     exercise 6, Count parameters and FLOPs: n_parameters is not"
    )
    code, solution, _ = run(tmp_path, "solution", 6)
    assert code == 0
    mine.write_text(f"print('hello')\n{solution}")
    code, output, errors = run(tmp_path, "check", 6)
    assert code == 0 and not errors
    assert output.startswith("hello\npasses    exercise 6, Count parameters and FLOPs. CRATE S")
    assert output.endswith("next      python -m crate_mini.course start 7\n")


def test_a_learners_work_is_never_replaced_unasked(tmp_path):
    run(tmp_path, "start", 2)
    mine = tmp_path / "exercises" / "02_gradient.py"
    mine.write_text("my work")
    code, _, error = run(tmp_path, "start", 2)
    assert code == 2 and "may hold your work, so it stays" in error and "--overwrite" in error
    assert mine.read_text() == "my work"
    code, output, _ = run(tmp_path, "start", 2, "--out", "again")
    assert code == 0 and "check 2 --file again/02_gradient.py" in output
    code, _, _ = run(tmp_path, "start", 2, "--overwrite")
    assert code == 0 and mine.read_text() != "my work"


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["check", 1], "exercises/01_rates.py is not a file; write it with `python -m crate_mini."),
        (["check", 1, "--file", "none.py"], "none.py is not a file; write it with"),
        (["check", 1, "--file", "."], ". is not a file"),
        (
            ["check"],
            "check needs the number of an exercise, like `python -m crate_mini.course chec",
        ),
        (["start", 99], "exercise 99 does not exist; they are 1 to "),
        (["start", 0], "exercise 0 does not exist; they are 1 to "),
        (["solution", "x"], "invalid int value: 'x'"),
        (["chek", 1], "did you mean check?"),
        (["check", 1, "--seconds", 0], "--seconds 0 must lie in 1 to 3600"),
        (["plan", 1], "unknown argument '1'"),
    ],
)
def test_misuse_gets_one_sentence(words, sentence, tmp_path):
    code, output, error = run(tmp_path, *words)
    assert code == 2 and not output
    assert error.startswith("error: ") and sentence in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_judged_is_misuse(tmp_path, monkeypatch, capsys):
    from crate_mini.course import command

    (tmp_path / "mine.cpp").write_text("")
    unusable = grading.Verdict("unusable", "no compiler")
    monkeypatch.setattr(grading, "grade", lambda *args: unusable)
    with pytest.raises(course.exercise.UserError, match="no compiler"):
        command.check(command.Check(13, str(tmp_path / "mine.cpp")))


def test_the_plan_names_every_exercise_and_only_commands_that_exist(tmp_path):
    code, output, _ = run(tmp_path, "plan")
    assert code == 0
    (sheets,) = re.findall(r"\| sheet .*?\n\n", output, re.S)
    named = {int(number) for number in re.findall(r"\b\d+\b(?=[,| ])", re.sub("2.5 h", "", sheets))}
    assert set(range(1, len(exercise.ORDER) + 1)) <= named
    words = set(re.findall(r"crate_mini\.course (\w+)", output))
    from crate_mini.course.__main__ import COMMANDS

    assert words <= set(COMMANDS)
    minutes = [int(end) for _, end in re.findall(r"(?m)^\| (\d+) - (\d+) \|", output)]
    assert minutes[-1] == 120


# ---- the notebook --------------------------------------------------------------------------------


def test_the_notebook_is_written_once_and_well_formed(tmp_path):
    code, output, _ = run(tmp_path, "notebook")
    assert code == 0 and "jupyter" in output
    content = json.loads((tmp_path / "lab.ipynb").read_text())
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in content["cells"]]
    assert len(ids) == len(set(ids))
    for cell in content["cells"]:
        assert cell["cell_type"] in ("code", "markdown") and "".join(cell["source"]).strip()
        assert ("outputs" in cell) == (cell["cell_type"] == "code")
    code, _, error = run(tmp_path, "notebook")
    assert code == 2 and "lab.ipynb exists" in error


def forked_run(command, **options):
    """subprocess.run of a Python script, in a child that has imported torch."""
    return run_script(command[1:], os.getcwd(), one_thread())


SMALL = shlex.split("--n-embd 32 --block-size 64 --batch-size 4 --warmup 1 --eval-tokens 512")


def write_text(path):
    lines = [f"line {i} of a small text about codes\n" for i in range(3000)]
    path.write_text("".join(lines))
    return path


def made_small(source, text):
    """A cell that does its work in little time, on this file of text."""
    for old, new in (
        ("STEPS = 100", "STEPS = 12"),
        ("NEURONS = 20", "NEURONS = 5"),
        ("TOKENS = 60_000", "TOKENS = 4000"),
        ("FLAGS = []", f"FLAGS = ['--data', {str(text)!r}, *{SMALL!r}]"),
        ('"--tokens", 8192', '"--tokens", 128'),
    ):
        source = source.replace(old, new)
    return source


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_the_cells_of_the_notebook_run_in_order(tmp_path, monkeypatch, capsys):
    """At small size; it trains, measures, scores, reads, steers and compares."""
    import subprocess

    import matplotlib.pyplot as plt

    text = write_text(tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CRATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", forked_run)
    plt.switch_backend("agg")
    names = {"__name__": "__main__"}
    figures = 0
    for kind, source in notebook.cells():
        if kind == "markdown":
            continue
        exec(compile(made_small(source, text), "cell", "exec"), names)
        figures += len(plt.get_fignums())
        plt.close("all")
    assert figures == 5
    output = capsys.readouterr().out
    assert "fires on" in output and "the intervention acted on" in output
    assert re.search(r"crate  validation loss \d\.\d\d, fires on \d+ %, ngram_r", output)
    assert re.search(r"gpt2   validation loss \d\.\d\d", output)


@pytest.mark.parametrize("small", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_jupyter_runs_the_notebook(tmp_path, monkeypatch, small):
    """In a kernel of its own; as it is written, it takes at most three minutes on two cores."""
    missing = "the notebook needs Jupyter's client: pip install -e '.[notebook]'"
    nbclient = pytest.importorskip("nbclient", reason=missing)
    pytest.importorskip("ipykernel", reason=missing)
    import nbformat

    monkeypatch.setenv("CRATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))  # not in the home folder
    book = nbformat.reads(notebook.text(), as_version=4)
    if small:
        text = write_text(tmp_path / "text.txt")
        for cell in book.cells:
            cell.source = made_small(cell.source, text)
    start = time.monotonic()
    nbclient.NotebookClient(
        book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    print(f"the notebook took {time.monotonic() - start:.0f} s")
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 5
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "the intervention acted on" in printed
    assert re.search(r"gpt2   validation loss \d\.\d\d", printed)


def test_the_notebook_says_what_to_expect():
    texts = [text for kind, text in notebook.cells() if kind == "markdown"]
    assert sum("**Expected.**" in text for text in texts) >= 6

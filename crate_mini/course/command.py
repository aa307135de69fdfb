"""`python -m crate_mini.course`: list, start, check, solution, plan, notebook."""

from dataclasses import dataclass
from pathlib import Path

from crate_mini import UserError
from crate_mini.cli import setting
from crate_mini.console import terminal
from crate_mini.console.results import atomic_write
from crate_mini.course import exercise, grading, notebook

COMMAND = exercise.COMMAND
FOLDER = "exercises"
SHOWN = 4000  # characters of what a learner's file prints


@dataclass
class Numbered:
    """Show our solution of an exercise."""

    number: int | None = setting(None, "number of the exercise, like 1")


@dataclass
class Start(Numbered):
    """Write the file of an exercise: the task, hints, and functions to fill in."""

    out: str = setting(FOLDER, "folder to write it into")
    overwrite: bool = setting(False, "replace the file if it exists, with your work in it")


@dataclass
class Check(Numbered):
    """Judge your file of an exercise: exit code 0 if it passes, 1 if not, 2 for misuse."""

    file: str | None = setting(None, "your file", shown=f"{FOLDER}/NN_NAME.py")
    seconds: int = setting(60, "stop the check after this time", low=1, high=3600)


@dataclass
class Plan:
    """Show the plan of a class of two hours, with homework."""


@dataclass
class Notebook:
    """Write the laboratory class as a Jupyter notebook."""

    out: str = setting("lab.ipynb", "file to write")
    overwrite: bool = setting(False, "replace the file if it exists")


def overview():
    """Print all exercises, and what to do next."""
    for chosen in exercise.exercises():
        minutes = f"{chosen.facts['MINUTES']} min"
        print(f"{chosen.number:2d}  {chosen.stars:3s}  {minutes:>7s}  {chosen.title}")
        print(f"{'':18s}{chosen.facts['TEACHES']}")
    print(
        f"\nstars     * easy, ** medium, *** hard\n"
        f"first     read {Path(__file__).with_name('idea.md')}: the idea in ten minutes\n"
        f"next      {COMMAND} start 1\n"
        f"teachers  {COMMAND} plan; {COMMAND} notebook"
    )
    return 0


def chosen_exercise(settings, command):
    if settings.number is None:
        raise UserError(
            f"{command} needs the number of an exercise, like `{COMMAND} {command} 1`; "
            f"`{COMMAND}` lists them."
        )
    return exercise.find(settings.number)


def write_new(path, text, overwrite, what):
    """Write a file that must not replace a learner's work."""
    if path.exists() and not overwrite:
        raise UserError(
            f"{path} exists, and may hold your work, so it stays; choose another folder with "
            f"--out, or replace it with --overwrite."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(text.encode())
    print(f"{what:9s} {path}")


def start(settings):
    """Write the stub of an exercise into the learner's folder."""
    chosen = chosen_exercise(settings, "start")
    path = Path(settings.out, chosen.file)
    write_new(path, chosen.stub(), settings.overwrite, "wrote")
    place = "" if settings.out == FOLDER else f" --file {path}"
    print(f"next      edit it, then {COMMAND} check {chosen.number}{place}")


def check(settings):
    """Judge a learner's file; returns the exit code."""
    chosen = chosen_exercise(settings, "check")
    path = Path(settings.file or Path(FOLDER, chosen.file))
    if not path.is_file():
        raise UserError(
            f"{path} is not a file; write it with `{COMMAND} start {chosen.number}`, or name yours "
            "with --file."
        )
    verdict = grading.grade(chosen.number, path, settings.seconds)
    if verdict.outcome == "unusable":
        raise UserError(verdict.sentence)
    if verdict.printed:
        shown = verdict.printed[:SHOWN]
        print(shown, end="" if shown.endswith("\n") else "\n")
    name = f"exercise {chosen.number}, {chosen.title}"
    if verdict.outcome == "fail":
        print(f"fails     {name}: {verdict.sentence}")
        return verdict.exit_code
    print(f"passes    {' '.join(filter(None, [name + '.', verdict.sentence]))}")
    following = chosen.number + 1
    if following <= len(exercise.ORDER):
        print(f"next      {COMMAND} start {following}")
    else:
        print("next      that was the last one: train a model with `python train.py`")
    return verdict.exit_code


def solution(settings):
    """Print our solution."""
    print(chosen_exercise(settings, "solution").solution(), end="")


def plan(settings):
    """Print the plan of a class."""
    print(Path(__file__).with_name("plan.md").read_text(encoding="utf-8"), end="")


def write_notebook(settings):
    """Write the notebook."""
    path = Path(settings.out)
    write_new(path, notebook.text(), settings.overwrite, "wrote")
    print(
        f"next      jupyter lab {path}   (pip install jupyterlab), or open it in VS Code or Colab"
    )


NUMBER = ("number",)
START = terminal.Command(Start, start, checkpoint=False, positional=NUMBER)
CHECK = terminal.Command(Check, check, checkpoint=False, positional=NUMBER)
SOLUTION = terminal.Command(Numbered, solution, checkpoint=False, positional=NUMBER)
PLAN = terminal.Command(Plan, plan, checkpoint=False)
NOTEBOOK = terminal.Command(Notebook, write_notebook, checkpoint=False)

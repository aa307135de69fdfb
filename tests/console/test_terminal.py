"""What scripts share at the terminal: commands, exit codes, error sentences, progress."""

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from forked import run_script

from crate_mini import UserError
from crate_mini.cli import setting
from crate_mini.console import terminal


@dataclass
class Settings:
    """What the command does."""

    text: str = setting("t", "a text")
    steps: int = setting(7, "steps", low=1)


CALLS = []


def remember(*arguments):
    CALLS.append(arguments)
    return 5


WITHOUT = terminal.Command(Settings, remember, checkpoint=False, positional=("text", "steps"))
COMMAND = terminal.Command(Settings, remember)
COMMANDS = {"one": __name__, "two": f"{__name__}:WITHOUT"}


@pytest.fixture(autouse=True)
def forget_calls():
    CALLS.clear()


def dispatch(*words):
    return terminal.dispatch("script.py", "What the script does.", COMMANDS, list(words))


def test_a_command_gets_its_settings_and_its_checkpoint():
    assert dispatch("one", "out/best", "--steps", "3") == 5
    assert CALLS == [(Settings(steps=3), "out/best")]


def test_a_command_without_checkpoint_takes_words_in_order():
    dispatch("two", "mine", "4")
    dispatch("two", "--steps", "4")
    assert CALLS == [(Settings("mine", 4),), (Settings(steps=4),)]


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_names_what_the_script_does(words, capsys):
    assert dispatch(*words) == 0
    assert capsys.readouterr().out.startswith("What the script does.")


@pytest.mark.parametrize(
    "words, message",
    [
        (["oen"], r"unknown command 'oen' \(did you mean one\?\); choose one or two"),
        (["one"], "the following arguments are required: CKPT; see `python script.py one --help`."),
        (["one", "c", "--stesp", "3"], r"unknown argument '--stesp' \(did you mean --steps\?\)"),
        (["one", "c", "--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["one", "c", "--steps", "0"], "--steps 0 must lie in 1 to"),
    ],
)
def test_wrong_words_are_one_sentence(words, message):
    with pytest.raises(UserError, match=message):
        dispatch(*words)
    assert not CALLS


def test_underscores_are_taken_for_hyphens():
    parser = terminal.Parser(prog="script.py")
    parser.add_argument("--a-b")
    assert parser.parse_args(["--a_b=c_d"]).a_b == "c_d"


def ending(main, capsys):
    """(exit code, what was printed to stderr) of a script."""
    with pytest.raises(SystemExit) as end:
        terminal.run(main)
    return end.value.code, capsys.readouterr().err


def raising(error):
    def main():
        raise error

    return main


class BackendCompilerFailed(RuntimeError):
    """As torch names it."""


@pytest.mark.parametrize(
    "error, code, message",
    [
        (UserError("bad --x."), 2, "error: bad --x.\n"),
        (OSError(28, "No space left", "f"), 2, "error: No space left: f; free it or choose"),
        (MemoryError(), 2, "error: not enough memory (allocation failed); take less"),
        (RuntimeError("can't allocate memory: 4 GB"), 2, "error: not enough memory (can't alloc"),
        (BackendCompilerFailed("x\n C.cpp: error: no"), 2, "torch.compile cannot compile here"),
        (RuntimeError("Symlink loop from 'a'"), 2, "'a': this link leads back to itself; give"),
        (KeyboardInterrupt(), 130, "\ninterrupted"),
    ],
)
def test_an_error_ends_a_script_with_its_code_and_sentence(error, code, message, capsys):
    ended, printed = ending(raising(error), capsys)
    assert ended == code
    assert message in printed and "Traceback" not in printed


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a fault"):
        terminal.run(raising(RuntimeError("a fault")))


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX")
def test_ctrl_c_after_the_work_is_no_traceback():
    code = """
import atexit, os, signal
from crate_mini.console import terminal
atexit.register(os.kill, os.getpid(), signal.SIGINT)
terminal.run(lambda: 0)
"""
    done = run_script(["-c", code])
    assert done.returncode == -2 and done.stderr == ""


def test_a_script_ends_with_what_it_returns(capsys):
    assert ending(lambda: 3, capsys) == (3, "")


def test_numbers_of_a_list():
    assert terminal.number_list(None, "--k", int, "8,16") == []
    assert terminal.number_list("8,16,8", "--k", int, "8,16") == [8, 16]
    for text in ("", "8,,9", "eight", "1e99", "nan"):
        with pytest.raises(UserError, match=r"--k .* is not a list of numbers"):
            terminal.number_list(text, "--k", float, "8,16")


def test_a_comma_may_be_part_of_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "a,b.json", "c,"):
        (tmp_path / name).touch()
    assert terminal.file_list(None, "--sae") == terminal.file_list("", "--sae") == []
    assert terminal.file_list("a,b", "--sae") == ["a", "b"]
    assert terminal.file_list("a,b.json", "--sae") == ["a,b.json"]
    assert terminal.file_list("b,a,b.json,none,c,,a", "--sae") == [
        "b",
        "a,b.json",
        "none",
        "c,",
        "a",
    ]
    os.mkfifo("pipe")
    for path in ("pipe", "/dev/zero", str(tmp_path)):
        with pytest.raises(UserError, match=f"--sae {path} is not a plain file"):
            terminal.file_list(f"a,{path}", "--sae")


def test_a_package_that_is_missing_is_named():
    missing = ModuleNotFoundError("No module named 'torch.x'", name="torch.x")
    assert "the package torch is not installed; `pip install" in terminal._missing_package(missing)
    ours = ModuleNotFoundError("No module", name="crate_mini.nothing")
    assert terminal._missing_package(ours) is None


def test_an_error_that_the_system_did_not_report_is_no_full_disk():
    with pytest.raises(OSError, match="could not get source code"):
        terminal.run(raising(OSError("could not get source code")))


@pytest.mark.parametrize(
    "closed", ["<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "> /dev/full"]
)
def test_closed_streams_and_full_ones(closed, tmp_path):
    code = "from crate_mini.console import terminal as t; t.run(lambda: print('x' * 99))"
    errors = "" if "2>" in closed else "2> errors"
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {closed} {errors}"
    env = {**os.environ, "PYTHONPATH": str(Path(terminal.__file__).parents[2])}
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=env)
    text = (tmp_path / "errors").read_text() if errors else ""
    assert done.returncode == (2 if "full" in closed else 0), text
    assert "Traceback" not in text and "Exception" not in text
    assert text.count("\n") == ("full" in closed)


def test_a_byte_of_a_file_name_is_printed_as_it_is(tmp_path):
    code = "from crate_mini.console import terminal as t; t.run(lambda: print(t.sys.argv[1]))"
    env = {**os.environ, "PYTHONPATH": str(Path(terminal.__file__).parents[2])}
    for encoding, expected in (("utf-8", "é\n".encode() + b""), ("ascii", b"?\n")):
        words = [sys.executable, "-c", code, b"caf\xe9 \xc3\xa9"]
        env["PYTHONIOENCODING"] = encoding
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True)
        assert done.stdout == b"caf\xe9 " + expected, done


def test_progress_is_shown_when_due_and_at_the_end(capsys, monkeypatch):
    now = iter([0.0, 1.0, 4.0, 5.0, 8.0])
    monkeypatch.setattr(terminal.time, "perf_counter", lambda: next(now))
    assert list(terminal.track("abcd", "letters")) == list("abcd")
    assert capsys.readouterr().out.splitlines() == [
        "letters   2/4  ETA 0:04",
        "letters   4/4  ETA 0:00",
    ]


def test_short_work_shows_no_progress(capsys):
    list(terminal.track("abcd", "letters"))
    assert capsys.readouterr().out == ""


def test_remaining_time():
    assert terminal.eta(65.9) == "1:05"
    assert terminal.eta(3600) == "60:00"

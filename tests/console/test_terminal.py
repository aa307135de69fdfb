"""What scripts share at the terminal: commands, exit codes, error sentences, progress."""

from dataclasses import dataclass

import pytest

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
        (MemoryError(), 2, "error: not enough memory (MemoryError); take less"),
        (RuntimeError("can't allocate memory: 4 GB"), 2, "error: not enough memory (can't alloc"),
        (BackendCompilerFailed("x\n C.cpp: error: no"), 2, "torch.compile cannot compile here"),
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


def test_a_script_ends_with_what_it_returns(capsys):
    assert ending(lambda: 3, capsys) == (3, "")


def test_numbers_of_a_list():
    assert terminal.number_list(None, "--k", int, "8,16") == []
    assert terminal.number_list("8,16,8", "--k", int, "8,16") == [8, 16]
    for text in ("", "8,,9", "eight", "1e99", "nan"):
        with pytest.raises(UserError, match=r"--k .* is not a list of numbers"):
            terminal.number_list(text, "--k", float, "8,16")


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

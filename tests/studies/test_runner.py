"""Parts of a study run once; the command line of the studies."""

import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from crate_mini import UserError
from crate_mini.cli import setting
from crate_mini.console import results, terminal
from crate_mini.console.terminal import Command
from crate_mini.studies import __main__ as studies
from crate_mini.studies.runner import Runner, absolute


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with a script that counts its runs and fails if it is given a 2."""
    monkeypatch.setattr(results, "ROOT", tmp_path)
    script = "import sys; print('went wrong'); open('count', 'a').write('x')"
    (tmp_path / "script.py").write_text(f"{script}\nsys.exit('2' in sys.argv)")
    return tmp_path


def runs(checkout):
    return len((checkout / "count").read_text())


def test_a_finished_part_is_kept(checkout, capsys):
    runner = Runner("study", 3)
    folder = checkout / "out" / "train"
    for word, expected in (("1", 1), ("1", 1), ("3", 2)):  # the same command runs once
        record = runner.part(folder, "script.py", word)
        assert runs(checkout) == expected
    kept = results.read_json(checkout / "out" / "train.json")
    assert kept == record
    assert kept["command"] == ["script.py", "3", "--out", "out/train"]  # no folder of this machine
    assert kept["seconds"] >= 0 and kept["commit"]
    assert (checkout / "out" / "train.log").read_text() == "went wrong\n"
    output = capsys.readouterr().out
    assert output.count("python script.py 1 --out out/train") == 1 and "study     3/3" in output


def test_a_failed_part_is_reported_and_runs_again(checkout):
    runner = Runner("study", 1)
    for expected in (1, 2):
        message = "script.py 2 --out out/train` ended with code 1: went wrong"
        with pytest.raises(UserError, match=message):
            runner.part(checkout / "out" / "train", "script.py", "2")
        assert runs(checkout) == expected
    assert not (checkout / "out" / "train.json").exists()


def test_two_parts_may_share_a_folder(checkout):
    runner = Runner("study", 2)
    for name in ("first", "second"):
        runner.part(checkout / "out", "script.py", name=name)
    assert runs(checkout) == 2
    assert (checkout / "first.json").exists() and (checkout / "second.log").exists()


def test_a_part_of_another_commit_runs_again_if_asked(checkout, monkeypatch):
    folder = checkout / "out" / "train"
    commit = mock.Mock(return_value="a")
    monkeypatch.setattr(results, "commit", commit)
    for commit.return_value, expected in (("a", 1), ("a", 1), ("b", 2)):
        Runner("study", 1, this_commit=True).part(folder, "script.py")
        assert runs(checkout) == expected
    commit.return_value = "c"
    Runner("study", 1).part(folder, "script.py")
    assert runs(checkout) == 2


def test_names_of_files_survive_a_change_of_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("ranks").write_text("")
    assert absolute("ranks:511") == f"{tmp_path / 'ranks'}:511"
    assert absolute("pydocs:511") == "pydocs:511"


# ---- the command line ----------------------------------------------------------------------------


@dataclass
class Words:
    """A study with words."""

    text: str | None = setting(None, "a text")
    steps: int = setting(7, "training steps", low=1)
    seeds: tuple[int, ...] = setting((1, 2), "seeds", high=9)
    names: tuple[str, ...] = setting((), "names", choices=("a", "b"))
    table: bool = setting(False, "only print the table")


def parsed(*words):
    """The settings that a command is called with."""
    run = mock.Mock()
    command = Command(Words, run, checkpoint=False, positional=("text", "steps", "seeds"))
    terminal.run_command("study", command, words)
    return run.call_args.args[0]


def test_settings_may_be_given_as_words():
    assert parsed() == Words()
    assert parsed("t", "8") == Words("t", 8)
    assert tuple(parsed("t", "8", "3", "4", "--table").seeds) == (3, 4)
    assert list(parsed("t", "--names", "a", "b").names) == ["a", "b"]


@pytest.mark.parametrize(
    "words, message",
    [
        (("t", "0"), "--steps 0 must lie in 1 to"),
        (("t", "many"), "argument --steps: invalid int value"),
        (("t", "8", "3", "12"), "--seeds 12 must lie in 0 to 9"),
        (("t", "--names", "a", "c"), "--names 'c' is unknown"),
    ],
)
def test_bad_words_are_one_sentence(words, message):
    with pytest.raises(UserError, match=message):
        parsed(*words)


def test_help_names_the_words(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    output = capsys.readouterr().out
    assert "These may be given without their flags, in this order: TEXT STEPS SEEDS." in output
    assert "training steps (default 7)" in output
    assert "seeds (default 1 2)" in output


def test_table_is_a_word_or_a_flag(monkeypatch):
    dispatch = mock.Mock()
    monkeypatch.setattr(terminal, "dispatch", dispatch)
    for word in ("table", "--table"):
        monkeypatch.setattr(sys, "argv", ["crate_mini.studies", "neurons", word])
        studies.main()
        assert dispatch.call_args.args[-1] == ["neurons", "--table"]


def test_an_unknown_study_is_one_sentence(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["crate_mini.studies", "neuron"])
    with pytest.raises(UserError, match="did you mean neurons"):
        studies.main()

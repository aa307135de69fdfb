"""Every flag of every command of interpret.py and steer.py, with values of any kind.

A command line is accepted or refused in one sentence: what a mistyped word may lead to is never a
traceback. Flags are parsed and checked, and the command then runs on a checkpoint that is not
there, so that its own checks run as well while no model does.
"""

import argparse
import contextlib
import importlib
import io
import os
import tempfile
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import interpret
import steer
from crate_mini import UserError
from crate_mini.cli import check, flag_name, takes_several
from crate_mini.console import terminal

NAMES = [*interpret.COMMANDS, *steer.COMMANDS, "steer"]
WORDS = [
    "", " ", "0", "1", "-1", "2", "7", "64", "1e-3", "0.5", "-0.5", "1e999", "nan", "inf",
    "1" * 400, "9" * 12, "0x10", "1_000", "٣", "all", "none", "auto", "cpu", "cuda:99", "0,1", ",",
    "1,,2", "0-2",
    "init,shuffle", "record", "report", "set", "scale", "label:x", "2x", "1.5abs", "hf:", "http:m",
    "hf:m", "openai_tar", "--", "-", "--help", "-h", "--seed=1", "=", "a b", "'", '"', "$HOME", "~",
    "/dev/null", "/dev/zero", "/dev/full", ".", "..", "/", "nowhere", "a,b", "caf\udce9", "\udcff",
    "\x00", "\n", "\x1b[31m", "é", "\U0001f600", "{}", "[]", "%s", "%", "\\", "*", "0.15,0.60",
]  # fmt: skip


def commands():
    """{name: terminal.Command} of both scripts."""
    places = {**interpret.COMMANDS, **steer.COMMANDS, "steer": steer.PROMPT}
    return {name: importlib.import_module(module).COMMAND for name, module in places.items()}


def any_word(data):
    """A word that someone might type for a value."""
    if data.draw(st.booleans()):
        return data.draw(st.sampled_from(WORDS))
    return data.draw(st.one_of(st.integers().map(str), st.floats().map(str), st.text(max_size=9)))


def flags_of(command):
    """Every flag that the command's parser knows, with its switches off."""
    parser = terminal.Parser(prog="script.py")
    terminal.add_flags(parser, command.settings)
    return [name for action in parser._actions for name in action.option_strings]


def words_for(data, command):
    """A command line: some flags of the command, most with a value, perhaps in another spelling."""
    words = []
    for flag in data.draw(st.lists(st.sampled_from(flags_of(command)), max_size=6)):
        spelling = data.draw(st.sampled_from(["as is", "as is", "as is", "joined", "_", "cut"]))
        flag = {"_": flag.replace("-", "_"), "cut": flag[:-1]}.get(spelling, flag)
        value = any_word(data)
        if spelling == "joined":
            words.append(f"{flag}={value}")
        else:
            words += [flag, value][: data.draw(st.sampled_from([1, 2, 2, 2]))]
    place = data.draw(st.integers(0, len(words)))
    return words[:place] + ["nowhere"] * command.checkpoint + words[place:]


def run_quietly(name, command, words):
    """Run a command; what it prints goes nowhere. Returns its sentence if it was refused."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            terminal.run_command(name, command, words)
        except UserError as error:
            return str(error)
        except SystemExit as end:  # --help
            assert not end.code
    return ""


@contextlib.contextmanager
def an_empty_folder():
    """The working folder of the block, so that names of files mean nothing."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


@pytest.mark.fuzz
@given(data=st.data())
def test_a_command_line_is_accepted_or_refused_in_one_sentence(data):
    with an_empty_folder():
        for _ in range(8):
            name = data.draw(st.sampled_from(NAMES))
            command = commands()[name]
            words = words_for(data, command)
            if not command.checkpoint:  # it would really run
                command = terminal.Command(command.settings, print, checkpoint=False)
            sentence = run_quietly(name, command, words)
            shown = terminal.printable(sentence).rstrip()
            assert sentence or "--help" in words or "-h" in words or not command.checkpoint
            assert not sentence or shown.endswith((".", ")", "?", "\ufffd")), sentence
            assert "Error" not in sentence.replace("UserError", ""), sentence


@pytest.mark.parametrize("name", NAMES)
def test_each_flag_refuses_each_word_that_it_cannot_mean(name):
    """Every flag alone, with every word: parsing and checking end in a sentence or in settings."""
    command = commands()[name]
    parser = terminal.Parser(prog=name)
    terminal.add_flags(parser, command.settings)
    refused = 0
    for f in fields(command.settings):
        for word in WORDS:
            words = [flag_name(f.name), word]
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    settings = command.settings(**vars(parser.parse_args(words)))
                check(settings)
            except (UserError, SystemExit) as error:
                refused += 1
                assert isinstance(error, UserError) or word in ("-h", "--help"), words
                continue
            value = getattr(settings, f.name)
            values = value if takes_several(f) else [value]
            assert all(item is None or isinstance(item, (int, float, str)) for item in values)
    assert refused


def test_no_flag_is_left_out():
    for command in commands().values():
        known = {flag.removeprefix("--no-").removeprefix("--") for flag in flags_of(command)}
        names = {flag_name(f.name).removeprefix("--") for f in fields(command.settings)}
        assert names <= known
    assert argparse.SUPPRESS not in WORDS and not Path("nowhere").exists()

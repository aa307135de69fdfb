"""Settings: what their declarations allow, and the flags made from them."""

import argparse
import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crate_mini import UserError
from crate_mini.cli import check, flag_name, nearest, one_of, setting
from crate_mini.console.terminal import add_flags


@dataclass
class Settings:
    """Settings of every kind."""

    steps: int = setting(10, "steps", low=1, high=20)
    share: float = setting(0.5, "a share", above=0, below=1)
    rate: float = setting(0.1, "a rate", above=0)
    start: float = setting(0.1, "a start", low=0, below=2)
    op: str = setting("set", "what to do", choices=("set", "scale"))
    name: str = setting("a", "a name")
    note: str = setting("", "a note")
    seeds: tuple[int, ...] = setting((1, 2), "seeds", high=9)
    layer: int | None = setting(None, "a layer", shown="the last")
    quiet: bool = setting(False, "print nothing")
    from_: str = setting("here", "where to start")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(steps=0), "--steps 0 must lie in 1 to 20; leave it out for the default 10."),
        (dict(steps=21), "--steps 21 must lie in 1 to 20"),
        (dict(steps=1.5), "--steps 1.5 is not of type int"),
        (dict(steps=True), "--steps True is not of type int"),
        (dict(steps=None), "--steps None is not of type int"),
        (dict(share=0.0), "--share 0.0 must be above 0 and below 1"),
        (dict(share=1), "--share 1 must be above 0 and below 1"),
        (dict(rate=0), "--rate 0 must be above 0; leave it out for the default 0.1."),
        (dict(rate=1e30), "--rate 1e\\+30 must be above 0 and at most 2147483647"),
        (dict(rate=math.nan), "--rate nan is not a finite number"),
        (dict(rate=math.inf), "--rate inf is not a finite number"),
        (dict(start=2.0), "--start 2.0 must be at least 0 and below 2"),
        (dict(start=-0.1), "--start -0.1 must be at least 0 and below 2"),
        (dict(op="sett"), r"--op 'sett' is unknown \(did you mean set\?\); choose set or scale"),
        (dict(name=""), "--name '' is empty"),
        (dict(name="a\0b"), "holds a zero byte"),
        (dict(seeds=(3, 10)), "--seeds 10 must lie in 0 to 9"),
        (dict(layer="one"), "--layer 'one' is not of type int"),
        (dict(quiet=1), "--quiet 1 is not of type bool"),
        (dict(from_=""), "--from '' is empty"),
    ],
)
def test_what_a_declaration_does_not_allow_is_one_sentence(changes, message):
    with pytest.raises(UserError, match=message) as error:
        check(Settings(**changes))
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_defaults_are_allowed_and_so_is_an_empty_default():
    check(Settings())
    check(Settings(note="", layer=3, seeds=(), share=1e-9))


def test_in_python_a_field_is_named_as_in_python():
    with pytest.raises(UserError, match="^steps=0 must lie in"):
        check(Settings(steps=0), as_flags=False)


@given(st.integers(-30, 30), st.floats())
def test_numbers_are_allowed_within_their_bounds_alone(steps, share):
    allowed = 1 <= steps <= 20 and 0 < share < 1
    try:
        check(Settings(steps=steps, share=share))
    except UserError:
        assert not allowed
    else:
        assert allowed


def parser():
    made = argparse.ArgumentParser(prog="test", allow_abbrev=False)
    add_flags(made, Settings, shown={"name": "yours"})
    return made


def test_only_given_flags_are_parsed():
    assert vars(parser().parse_args([])) == {}
    words = ["--steps", "3", "--no-quiet", "--from", "there", "--seeds", "4", "5", "--layer", "2"]
    given = vars(parser().parse_args(words))
    assert given == dict(steps=3, quiet=False, from_="there", seeds=[4, 5], layer=2)


def test_help_gives_each_setting_its_meaning_and_one_default():
    text = " ".join(parser().format_help().split())
    assert "--steps INT steps (default 10)" in text
    assert "set | scale: what to do (default set)" in text
    assert "a layer (default the last)" in text  # computed later: words for it
    assert "a name (default yours)" in text
    assert "seeds (default 1 2)" in text
    assert "a note (default" not in text  # an empty default is not printed
    assert text.count("(default") == 10


def test_names_and_lists():
    assert flag_name("match_density") == "--match-density"
    assert flag_name("from_") == "--from"
    assert one_of(["a"]) == "a"
    assert one_of(["a", "b", "c"]) == "a, b or c"
    assert nearest("scael", ["scale", "set"]) == " (did you mean scale?)"
    assert nearest("x", ["scale"]) == ""

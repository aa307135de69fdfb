"""Settings, declared once: default, help, bounds and choices in one place.

    @dataclass
    class Settings:
        "What the command does: the description of its --help."
        steps: int = setting(1000, "optimizer steps", low=1)

`check` compares an instance with the declarations. Flags, commands that take settings, and how
their errors are printed: console/terminal.py.
"""

import difflib
import math
import types
import typing
from dataclasses import field, fields

from crate_mini import UserError


def setting(
    default, help, low=0, high=2**31 - 1, *, above=None, below=None, choices=None, shown=None
):
    """A dataclass field with its help text and the values it may take.

    low, high: smallest and largest number; above, below: exclusive bounds.
    choices: the allowed words. shown: what --help prints for a default that is computed later.
    """
    facts = dict(
        help=help, low=low, high=high, above=above, below=below, choices=choices, shown=shown
    )
    return field(default=default, metadata=facts)


def flag_name(name):
    """--a-b for a_b. A field named like a Python keyword ends in _, which its flag drops."""
    return "--" + name.rstrip("_").replace("_", "-")


def kind_of(f):
    """The plain type of a dataclass field: int for `int | None` and for `tuple[int, ...]`."""
    if isinstance(f.type, types.UnionType):
        return next(t for t in typing.get_args(f.type) if t is not types.NoneType)
    return typing.get_args(f.type)[0] if takes_several(f) else f.type


def takes_several(f):
    """Whether a field holds several values, as in `tuple[int, ...]`."""
    return typing.get_origin(f.type) is tuple


def check(settings, as_flags=True):
    """Raise UserError for the first setting with a value that its declaration does not allow.

    as_flags: write --n-head 5, as on a command line; otherwise n_head=5, as in Python.
    """
    for f in fields(settings):
        value = getattr(settings, f.name)
        if value is None and f.default is None:
            continue
        for item in value if takes_several(f) else [value]:
            if problem := _problem(f, item):
                name = f"{flag_name(f.name)} " if as_flags else f"{f.name}="
                has_plain_default = f.default is not None and not f.metadata["choices"]
                default = f" for the default {f.default}" if has_plain_default else ""
                raise UserError(f"{name}{item!r} {problem}; leave it out{default}.")


def _problem(f, value):
    """The end of a sentence that says why a value is not allowed, or None."""
    kind, facts = kind_of(f), f.metadata
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or isinstance(value, bool) != (kind is bool):
        return f"is not of type {kind.__name__}"
    if kind in (int, float):
        return _out_of_bounds(value, facts["low"], facts["high"], facts["above"], facts["below"])
    if kind is str and facts["choices"] and value not in facts["choices"]:
        suggestion = nearest(value, facts["choices"])
        return f"is unknown{suggestion}; choose {one_of(facts['choices'])}"
    if kind is str and not value and f.default != "":
        return "is empty"
    if kind is str and "\0" in value:
        return "holds a zero byte, which no name can"
    return None


def _out_of_bounds(value, low, high, above, below):
    """The same for a number outside its bounds; NaN compares false, so it is outside."""
    if isinstance(value, float) and not math.isfinite(value):
        return "is not a finite number"
    if above is None and below is None:
        return None if low <= value <= high else f"must lie in {low} to {high}"
    lower = f"at least {low}" if above is None else f"above {above}"
    upper = f" and at most {high}" if value > high else ""
    upper = f" and below {below}" if below is not None else upper
    inside = low <= value <= high if above is None else above < value <= high
    inside = inside and (below is None or value < below)
    return None if inside else f"must be {lower}{upper}"


def one_of(words):
    """'a, b or c' for a list of words."""
    words = list(words)
    if len(words) == 1:
        return words[0]
    return f"{', '.join(words[:-1])} or {words[-1]}"


def nearest(word, known, similarity=0.6):
    """' (did you mean X?)' for the known word closest to this one, or ''."""
    match = difflib.get_close_matches(word, known, 1, similarity)
    return f" (did you mean {match[0]}?)" if match else ""

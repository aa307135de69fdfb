"""What the three scripts share at the command line: flags made from dataclass fields, errors in one sentence.

A field's comment in the source is its help text: each setting is explained once, where it is declared.
"""

import argparse
import difflib
import inspect
import json
import os
import re
import sys
import types
import typing
from contextlib import suppress
from dataclasses import fields

from crate_mini import UserError

SMALLER = "like train.py's --micro-batch 1 or interpret.py's --n 100"
NO_MEMORY = "out of memory|an.t allocate|not enough memory|Storage size calculation overflowed"


class Parser(argparse.ArgumentParser):
    """argparse that answers in one sentence, names the nearest flag, and reads --a_b as --a-b."""

    def __init__(self, **kwargs):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs
        )

    def error(self, message):
        raise UserError(f"{message[0].lower()}{message[1:]}; see `python {self.prog} --help`.")

    def parse_args(self, args=None, namespace=None):
        """As argparse's; raises UserError for anything it cannot take."""
        args = [
            re.sub(r"^--[^=]+", lambda m: m[0].replace("_", "-"), a)
            for a in (sys.argv[1:] if args is None else args)
        ]
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [s for action in self._actions for s in action.option_strings]
            raise UserError(
                f"unknown argument {unknown[0]!r}{nearest(unknown[0].split('=')[0], flags)}; "
                f"`python {self.prog} --help` lists all."
            )
        return found


def nearest(word, known, alike=0.6):
    """' (did you mean X?)' for the known word closest to this one, or nothing."""
    match = difflib.get_close_matches(word, known, 1, alike)
    return f" (did you mean {match[0]}?)" if match else ""


def nearest_folder(folder, holding):
    """' (did you mean X?)' for the folder with such a file in `folder`, or of a path like it, or nothing."""
    for root in (folder, *folder.parents[:2]):
        with suppress(OSError):
            found = [
                path.parent for depth in ("*", "*/*") for path in root.glob(f"{depth}/{holding}")
            ]
            if match := nearest(str(folder), map(str, found), 0.0 if root == folder else 0.6):
                return match
    return ""


def comments(cls):
    """{field: its trailing comment}, continuation lines joined, read from the class's source."""
    found, name = {}, None
    for line in inspect.getsource(cls).splitlines():
        m = re.match(r"    (\w+): [^#]*#\s*(.*)", line)
        if m:
            name = m[1]
            found[name] = m[2].strip()
        elif name and re.match(r"\s{20,}#", line):
            found[name] += " " + line.split("#", 1)[1].strip()
        else:
            name = None
    return found


def add_fields(parser, cls, title, texts=(), defaults=()):
    """One flag per field of a dataclass, type and help from its declaration; absent unless given.

    A field named like a word of Python ends in _, which its flag does not: from_ is --from.
    texts, defaults: {field: whole help text}, {field: words for a default that is not a plain value}.
    """
    group, notes = parser.add_argument_group(title), comments(cls)
    for f in fields(cls):
        flag, default = (
            "--" + f.name.rstrip("_").replace("_", "-"),
            dict(defaults).get(f.name, f.default),
        )
        text = notes.get(f.name, "") + ("" if default is None else f" (default {default})")
        text = dict(texts).get(f.name, text).replace("%", "%%")
        if f.type is bool:
            group.add_argument(
                flag,
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                dest=f.name,
                help=text,
            )
        else:
            group.add_argument(
                flag,
                type=kind_of(f),
                default=argparse.SUPPRESS,
                help=text,
                dest=f.name,
                metavar=kind_of(f).__name__.upper(),
            )


def kind_of(field):
    """The plain type of a field: int for `int | None`."""
    if isinstance(field.type, types.UnionType):
        return next(t for t in typing.get_args(field.type) if t is not types.NoneType)
    return field.type


def flags(settings):
    """{field: value} as words of a command line."""
    words = []
    for name, value in settings.items():
        flag = name.rstrip("_").replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return words


def as_flags(message, names):
    """A message about name=value, told as --name value to who typed it so."""
    return re.sub(rf"\b({'|'.join(names)})=", lambda m: f"--{m[1].replace('_', '-')} ", message)


def read_json(path, known=None, expected="a file that crate_mini has written"):
    """A JSON object from a file; raises UserError for a bad file or a name that is not among the known.

    expected: what such a file is, for that sentence.
    """
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError, RecursionError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"{path} cannot be read as JSON: {reason}; expected {expected}.") from e
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object; expected {expected}.")
    for name in found:
        if known is not None and name not in known:
            raise UserError(f"{path} names {name!r}, which is no setting{nearest(name, known)}.")
    return found


def hush():
    """Send standard output nowhere, once its reader has left: or Python would fail again at its own exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def run(main):
    """Call a script's main; user errors become one sentence on stderr and exit code 2, Ctrl-C becomes 130."""
    for stream in (sys.stdout, sys.stderr):  # a sample may hold what a console cannot show
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        sys.exit(main())
    except UserError as e:
        message = str(e)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command starts again.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        hush()
        sys.exit(141)
    except OSError as e:
        message = f"{e.strerror}: {e.filename or 'while writing'}; free it or choose another place."
    except (MemoryError, RuntimeError) as e:
        lines = str(e).splitlines() or [type(e).__name__]
        if isinstance(e, MemoryError) or re.search(NO_MEMORY, str(e)):
            message = f"not enough memory ({lines[0][:120]}); take less at a time, {SMALLER}."
        elif any(
            kind.__name__ == "BackendCompilerFailed" for kind in type(e).__mro__
        ):  # import: seconds
            why = next(
                line for sign in (" error: ", "Error: ", "") for line in lines if sign in line
            ).strip()
            message = f"torch.compile cannot compile here ({why[:200]}); `--compile off` trains without it."
        else:
            raise
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)

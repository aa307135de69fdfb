"""Scripts at a terminal: flags, commands, errors in one sentence, progress, aligned tables."""

import argparse
import atexit
import codecs
import glob
import importlib
import itertools
import json
import os
import re
import shlex
import signal
import sys
import time
import typing
from contextlib import suppress
from dataclasses import dataclass, fields
from inspect import cleandoc

from crate_mini import UserError, cli
from crate_mini.cli import check, flag_name, kind_of, nearest, one_of, takes_several
from crate_mini.console import INTERRUPTED, prepare_help, signals

SMALLER_RUNS = "like train.py's --micro-batch 1 or interpret.py's --n 100"
COMPILER_ERRORS = {"BackendCompilerFailed", "GPUTooOldForTriton", "TritonMissing"}
OUT_OF_MEMORY = "out of memory|an.t allocate|not enough memory|Storage size calculation overflowed"


class Parser(argparse.ArgumentParser):
    """argparse that fails in one sentence, suggests the nearest flag, and takes --a_b for --a-b."""

    def __init__(self, prog, **kwargs):
        layout = argparse.RawDescriptionHelpFormatter
        kwargs = dict(allow_abbrev=False, formatter_class=layout, **kwargs)
        super().__init__(prog=f"python {prog}", **kwargs)

    def error(self, message):
        message = f"{message[0].lower()}{message[1:]}"
        raise UserError(f"{message}; see `{self.prog} --help`.")

    def parse_args(self, args=None, namespace=None):
        """As argparse's; raises UserError for anything it does not accept."""
        words = []
        for word in sys.argv[1:] if args is None else args:
            flag, equals, value = word.partition("=")
            if flag.startswith("--"):
                flag = flag.replace("_", "-")
            words.append(flag + equals + value)
        parsed, unknown = self.parse_known_args(words, namespace)
        if unknown:
            known = [flag for action in self._actions for flag in action.option_strings]
            suggestion = nearest(unknown[0].split("=")[0], known)
            raise UserError(
                f"unknown argument {unknown[0]!r}{suggestion}; `{self.prog} --help` lists all."
            )
        return parsed


def add_flags(parser, settings, title="settings", shown=()):
    """One flag for each field of a dataclass of settings; absent from the result unless given.

    shown: {field: words for its default}, instead of the field's own.
    """
    group = parser.add_argument_group(title)
    for f in fields(settings):
        text = help_text(f, dict(shown).get(f.name)).replace("%", "%%")
        common = dict(dest=f.name, default=argparse.SUPPRESS, help=text)
        if f.type is bool:
            action = argparse.BooleanOptionalAction
            group.add_argument(flag_name(f.name), action=action, **common)
        else:
            kind = kind_of(f)
            group.add_argument(
                flag_name(f.name),
                type=kind,
                metavar=kind.__name__.upper(),
                nargs="+" if takes_several(f) else None,
                **common,
            )


def help_text(f, shown=None):
    """Help of one setting: its meaning, its choices, its default."""
    facts, text = f.metadata, f.metadata["help"]
    if facts.get("choices"):
        text = f"{' | '.join(facts['choices'])}: {text}"
    default = next((d for d in (shown, facts.get("shown")) if d is not None), f.default)
    if default is None or default == "":
        return text
    if isinstance(default, tuple):
        default = " ".join(map(str, default))
    return f"{text} (default {default})"


def number_list(text, flag, kind, example):
    """The distinct numbers of a list like 8,16,32; [] for None.

    Raises UserError if it cannot be parsed.
    """
    if text is None:
        return []
    try:
        numbers = [kind(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(abs(number) < 2**31 for number in numbers):
        raise UserError(
            f"{flag} {text!r} is not a list of numbers; expected something like {flag} {example}."
        )
    return list(dict.fromkeys(numbers))


def file_list(text, flag):
    """The paths in a list like a.pt,b.pt; [] for None.

    A comma may be part of a path: the longest part of the list that exists is one path. Raises
    UserError as `plain_file` does.
    """
    words = (text or "").split(",")
    paths = []
    while words:
        lengths = range(len(words), 0, -1)
        names = [",".join(words[:length]) for length in lengths]
        path = next(filter(os.path.exists, names), words[0])
        words = words[path.count(",") + 1 :]
        paths.append(plain_file(path, flag))
    return [path for path in paths if path]


def plain_file(path, flag):
    """A path that need not exist.

    Raises UserError if it is a folder, or a pipe or device, which might never end.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{flag} {path} is not a plain file; give the path of one.")
    return path


@dataclass(frozen=True)
class Command:
    """A command of a script: run(settings, checkpoint), or run(settings) without a checkpoint.

    settings: a dataclass. positional: names of settings that may be given without their flags, as
    in `studies neurons TEXT RANKS`. several(settings, checkpoints): what more than one does.
    """

    settings: type
    run: typing.Callable
    checkpoint: bool = True
    positional: tuple = ()
    several: typing.Callable | None = None


def dispatch(script, description, commands, argv=None):
    """Run the command that the first word names, e.g. `interpret.py layers CKPT --tokens 4096`.

    commands: {name: "module"}, where module.COMMAND is a Command, or "module:NAME" for another one.
    A module is imported only when its command runs. Returns the exit code. Raises UserError for an
    unknown command or setting.
    """
    words = sys.argv[1:] if argv is None else argv
    name = words[0] if words else "--help"
    if name in ("-h", "--help"):
        text = description or f"Commands: {', '.join(commands)}."  # python -OO has no docstrings
        print(f"{text.strip()}\n\n`python {script} COMMAND --help` lists its settings.")
        return 0
    if name not in commands:
        suggestion = nearest(name, commands)
        raise UserError(
            f"unknown command {name!r}{suggestion}; choose {one_of(commands)}, "
            f"see `python {script} --help`."
        )
    return run_command(f"{script} {name}", commands[name], words[1:])


def run_command(prog, command, words, description=None):
    """Parse the words after a command's name, check the settings, run it; returns its exit code.

    command: a Command, or where it is, as in `dispatch`.
    """
    if isinstance(command, str):
        prepare_help(words)
        module, _, attribute = command.partition(":")
        command = getattr(importlib.import_module(module), attribute or "COMMAND")
    if sys.flags.optimize < 2:  # python -OO has no docstrings
        description = description or cleandoc(command.settings.__doc__)
    parser = Parser(prog=prog, description=description)
    if command.positional:
        order = " ".join(name.upper() for name in command.positional)
        parser.epilog = f"These may be given without their flags, in this order: {order}."
    if command.checkpoint:
        hint = "a checkpoint folder, like out/crate-3L/best"
        nargs = None
        if command.several:
            nargs, hint = "+", f"{hint}; several of one run, like out/run/step-*: its history"
        parser.add_argument("ckpt", metavar="CKPT", nargs=nargs, help=hint)
    add_flags(parser, command.settings)
    words = with_flags(words, command.positional, int(command.checkpoint))
    given = vars(parser.parse_args(words))
    checkpoint = [given.pop("ckpt")] if command.checkpoint else []
    settings = command.settings(**given)
    check(settings)
    if command.several and checkpoint:
        checkpoint = expanded(*checkpoint)
        if len(checkpoint) > 1:
            return command.several(settings, checkpoint)
    return command.run(settings, *checkpoint)


def expanded(paths):
    """The paths, with out/run/step-* as what it matches: PowerShell leaves that to the program."""
    found = []
    for path in paths:
        found += [path] if os.path.exists(path) else sorted(glob.glob(path)) or [path]
    return found


def with_flags(words, positional, skip=0):
    """TEXT 600 --seed 1 as --text TEXT --steps 600 --seed 1; the last takes all the rest.

    skip: how many words before them stay as they are.
    """
    if not positional:
        return list(words)
    flagged, words = list(words[:skip]), words[skip:]
    plain = list(itertools.takewhile(_is_plain, words))
    for i, name in enumerate(positional[: len(plain)]):
        values = plain[i:] if name == positional[-1] else [plain[i]]
        flagged += [flag_name(name), *values]
    return flagged + list(words[len(plain) :])


def _is_plain(word):
    """Whether a word is no flag; - stands for standard input, and no flag holds a space."""
    return not word.startswith("-") or word == "-" or (" " in word and word[:2] != "--")


def run(main):
    """Call a script's main and exit.

    A UserError becomes one sentence on stderr and exit code 2; Ctrl-C becomes exit code 130.
    """
    prepare_streams()
    try:
        code = main()
        # The work is done: Ctrl-C during Python's own end, which takes a while, ends it silently.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)
        sys.stdout.flush()  # what cannot be written is an error now rather than at exit
        sys.exit(code)
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        silence_stdout()
        sys.exit(141)
    except ModuleNotFoundError as error:
        message = _missing_package(error)
        if message is None:
            raise
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        message = _sentence(error)
        if message is None:
            raise
    try:
        sys.stdout.flush()
    except OSError:
        silence_stdout()
    report_to_torchrun(f"error: {message}")
    print(f"error: {printable(message)}", file=sys.stderr)
    sys.exit(2)


cli.run = run  # the name that it had before this chapter; other people's scripts use it


def report_to_torchrun(message):
    """Let torchrun, if it started this process, end its long report with this message."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with suppress(OSError), open(path, "w") as file:
            json.dump({"message": message, "timestamp": int(time.time())}, file)


def prepare_streams():
    """Let nothing that is printed or typed end a script.

    A stream that was closed leads nowhere. A character that the terminal lacks becomes "?", and a
    byte of a file's name that is not text is printed as the byte that it is. A byte that is typed
    and is not text arrives as a lone surrogate, like one in an argument.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  (for the whole run)
    codecs.register_error("replace_or_escape", _replace_or_escape)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace_or_escape")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")


def _replace_or_escape(error):
    """For codecs: what to write instead of a character that cannot be encoded."""
    character = ord(error.object[error.start])
    if 0xDC80 <= character <= 0xDCFF:
        return bytes([character - 0xDC00]), error.start + 1
    return "?", error.start + 1


def _missing_package(error):
    """The sentence for a package that is not installed; None for a module of ours."""
    package = (error.name or "crate_mini").split(".")[0]
    if package == "crate_mini":
        return None
    return (
        f"the package {package} is not installed; `pip install -e .` in the project's folder "
        "installs what this needs."
    )


def _sentence(error):
    """An error as a sentence for the user; None for a bug of ours."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.strerror is None:
        return None  # not from the system: no disk is full
    if isinstance(error, OSError):
        place = error.filename or "while writing"
        return f"{error.strerror}: {place}; free it or choose another place."
    lines = str(error).splitlines() or ["allocation failed"]
    if isinstance(error, MemoryError) or re.search(OUT_OF_MEMORY, str(error)):
        return f"not enough memory ({lines[0][:120]}); take less at a time, {SMALLER_RUNS}."
    if lines[0].startswith("Symlink loop from "):  # of Path.resolve, before Python 3.13
        return f"{lines[0]}: this link leads back to itself; give another path."
    # By name: importing the classes would take seconds.
    if COMPILER_ERRORS & {kind.__name__ for kind in type(error).__mro__}:
        return (
            f"torch.compile cannot compile here ({compiler_message(error)}); "
            "`--compile off` trains without it."
        )
    return None


def compiler_message(error):
    """The line of a compiler's long message that names the problem; its type if it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    signs = ("fatal error: ", " error: ", "Error: ", "")
    return next(line for sign in signs for line in lines if sign in line)[:200]


def silence_stdout():
    """Redirect stdout to /dev/null after a broken pipe; otherwise Python fails again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


# ---- Ctrl-C --------------------------------------------------------------------------------------


class StopRequest:
    """Notes SIGINT and SIGTERM while its block runs, so that work ends where it can be kept.

    caught: the signal, or 0. A second Ctrl-C acts at once. announcement: printed at the first.
    """

    def __init__(self, announcement=""):
        self.caught = 0
        self.announcement = announcement

    def __enter__(self):
        # A notebook survives its second Ctrl-C.
        self._second = signal.getsignal(signal.SIGINT) if hasattr(sys, "ps1") else signal.SIG_DFL
        self._signals = signals(self._note)
        self._signals.__enter__()
        return self

    def __exit__(self, *error):
        self._signals.__exit__(*error)

    def _note(self, number, frame):
        self.caught = number
        signal.signal(signal.SIGINT, self._second)
        if self.announcement:
            with suppress(OSError):  # print is not safe in a signal handler
                os.write(1, f"\n{self.announcement}; Ctrl-C again stops at once\n".encode())


# ---- text that a terminal can show, words that a shell can read ----------------------------------


def printable(text):
    """The text with U+FFFD for what a terminal would obey or cannot show, such as escape codes."""
    return "".join(c if _is_safe(c) else "\ufffd" for c in text)


def _is_safe(c):
    return c.isprintable() or c in "\n\t" or "\udc80" <= c <= "\udcff"  # bytes of a file's name


def typable(*words):
    """A command line that a shell reads as these words, whatever bytes the name of a file holds."""
    return " ".join(map(_quoted, words))


def flag_words(flag, value):
    """The words that give a flag its value, even one that begins with a dash."""
    return [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]


def _quoted(word):
    with suppress(UnicodeEncodeError):
        word.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
        if word.isprintable():
            return shlex.quote(word)
    characters = []
    for byte in word.encode(errors="surrogateescape"):
        is_plain = 32 <= byte < 127 and byte not in b"\\'"
        characters.append(chr(byte) if is_plain else f"\\x{byte:02x}")
    return f"$'{''.join(characters)}'"


# ---- tables --------------------------------------------------------------------------------------


def aligned(rows):
    """Rows of cells (strings) as lines of text, with columns aligned on the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths)]
        lines.append("  ".join(cells))
    return "\n".join(lines)


# ---- progress ------------------------------------------------------------------------------------


def eta(seconds):
    """A remaining time as minutes and seconds, 1:05."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def show_line(line, last=False):
    """Show a progress line: rewritten in place on a terminal, a new line each time in a pipe."""
    if sys.stdout.isatty():
        print(f"\r{line}\033[K", end="\n" if last else "", flush=True)
    else:
        print(line, flush=True)


class Progress:
    """A line with items done, total and ETA, shown every few seconds."""

    def __init__(self, name, total, every=3.0):
        self.name, self.total, self.every = name, total, every
        self.start = self.shown = time.perf_counter()

    def update(self, done):
        """Show the line if one is due: after `every` seconds, and at the end if any was shown."""
        now, last = time.perf_counter(), done == self.total
        if now - self.shown < self.every and not (last and self.shown > self.start):
            return
        self.shown = now
        remaining = (now - self.start) / done * (self.total - done)
        show_line(f"{self.name:<9} {done}/{self.total}  ETA {eta(remaining)}", last)


def track(items, name, every=3.0):
    """Yield the items of a sized collection while a Progress line is shown."""
    progress = Progress(name, len(items), every)
    for done, item in enumerate(items, 1):
        yield item
        progress.update(done)

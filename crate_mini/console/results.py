"""Result files: JSON that says how it was made, written atomically, read back with clear errors."""

import errno
import hashlib
import json
import os
import re
import shlex
import stat
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

from crate_mini import UserError, cli

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ROOT = Path(__file__).resolve().parent.parent.parent  # the checkout, if this runs from one
ELSEWHERE = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # a hook of git names its repository


@contextmanager
def atomic_write(path):
    """A binary file that replaces `path` when the block ends without an exception.

    Links are followed; devices and pipes are written to directly. Raises UserError when the folder
    cannot be written or the disk is full, and leaves nothing behind.
    """
    special = is_special(path)
    target = Path(path if special else os.path.realpath(path))
    temporary = target if special else target.with_name(f"{target.name}.{os.getpid()}.tmp")
    created = False
    try:
        if not special and os.path.islink(target):  # followed above, so it leads back to itself
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        _remove_leftovers(target)
        with open(temporary, "wb" if special else "xb") as file:
            created = not special
            with suppress(AttributeError, OSError):  # Windows; a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
            file.flush()
            if created:
                os.fsync(file.fileno())
                if fcntl is None:  # Windows renames closed files only
                    file.close()
                os.replace(temporary, target)
    except OSError as error:
        raise UserError(
            f"Cannot write {path}: {error.strerror or error}; make room or choose another folder."
        ) from None
    finally:
        if created and temporary.exists():
            temporary.unlink()


def is_special(path):
    """Whether this is a device or a pipe: to read it might never end."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


@contextmanager
def open_plain(path):
    """A file to read bytes from. Raises OSError for a device or a pipe, too, without waiting."""
    with open(path, "rb", opener=_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is a device or a pipe", str(path))
        yield file


def _without_waiting(path, flags):
    """A file descriptor; for a pipe that nobody writes to, too."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_bytes(path):
    """The bytes of a plain file. Raises OSError, as `open_plain`."""
    with open_plain(path) as file:
        return file.read()


class _Tried(Exception):
    """Ends the writing of a file of which only the beginning was asked."""


def ready_file(path):
    """Make the folder of a file, and see whether the file can be written: before long work.

    A file that is there stays as it is. Returns the Path. Raises UserError, as `atomic_write`.
    """
    path = Path(path)
    ready_folder(path.parent)
    if os.path.isdir(path):
        raise UserError(f"Cannot write {path}: it is a folder; give the name of a file.")
    if not is_special(path):  # a pipe would wait for its reader
        with suppress(_Tried), atomic_write(path):
            raise _Tried
    return path


def ready_folder(path):
    """Make a folder for results, and see whether a file can be written there: before long work.

    Returns the Path. Raises UserError if not.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        reason = "it is not a folder" if isinstance(error, FileExistsError) else error.strerror
        raise UserError(
            f"Nothing can be written to {path} ({reason}); choose another folder."
        ) from None
    return path


def _remove_leftovers(path):
    """Remove temporary files of `path` that a killed process left: their locks are free."""
    pattern = re.escape(path.name) + r"\.\d+\.tmp"
    for name in os.listdir(path.parent) if fcntl else []:
        if re.fullmatch(pattern, name):
            with suppress(OSError), open(path.with_name(name), "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.with_name(name).unlink()


def write_json(path, result):
    """Write a result as JSON, atomically; every number in it must be finite. Returns the path."""
    return _write(path, [json.dumps(sealed(result), indent=1)])


def write_rows(path, rows):
    """Write one JSON object a line (.jsonl), atomically; returns the path."""
    return _write(path, (json.dumps(sealed(row), ensure_ascii=False) for row in rows))


def _write(path, texts):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        for text in texts:
            file.write(text.encode(errors="backslashreplace") + b"\n")
    return path


def sealed(content):
    """A JSON value as it will be read; an object with a digest of all other entries."""
    content = json.loads(json.dumps(content, allow_nan=False))
    if not isinstance(content, dict):
        return content
    text = json.dumps({**content, "digest": None}, sort_keys=True)
    return {**content, "digest": hashlib.sha256(text.encode()).hexdigest()[:16]}


def is_intact(content):
    """Whether a JSON object fits its digest, which this removes; old files have none."""
    digest = content.pop("digest", None)
    return digest is None or sealed(content)["digest"] == digest


def read_json(path, known=None, expected="a file written by crate_mini"):
    """A JSON object from a file.

    known: the names it may hold. expected: describes such a file in the error sentence. Raises
    UserError if the file cannot be parsed, does not fit its digest, or holds another name.
    """
    try:
        content = json.loads(read_bytes(path).decode())
        intact = not isinstance(content, dict) or is_intact(content)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read as JSON: {reason}; expected {expected}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; expected {expected}.")
    if not intact:
        raise UserError(f"{path} is damaged, its digest does not fit; expected {expected}.")
    for name in content:
        if known is not None and name not in known:
            raise UserError(f"{path} names {name!r}, not a setting{cli.nearest(name, known)}.")
    return content


def folder(checkpoint, out=None):
    """The folder for results of a checkpoint: `out`, or `interpret` next to the checkpoint."""
    return Path(out) if out else Path(checkpoint).resolve().parent / "interpret"


def command(*script):
    """The running command, as it can be typed again; script: its name, or -m and the module."""
    return shlex.join(["python", *script, *sys.argv[1:]])


def commit():
    """The git commit of the source, with + if any file outside results/ differs from it.

    'unknown' outside a checkout, also if the source lies in another project's.
    """
    git = ["git", "-C", str(ROOT)]
    head = [*git, "rev-parse", "--show-toplevel", "--short=12", "HEAD"]
    changes = [*git, "diff", "--quiet", "HEAD", "--", ".", ":!results"]
    env = {name: value for name, value in os.environ.items() if name not in ELSEWHERE}
    try:
        done = subprocess.run(head, capture_output=True, check=True, env=env)
        place, name = os.fsdecode(done.stdout).rstrip("\n").rsplit("\n", 1)
        changed = subprocess.run(changes, capture_output=True, env=env).returncode != 0
        if not os.path.samefile(place, ROOT):
            return "unknown"
    except (OSError, ValueError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name}+" if changed else name

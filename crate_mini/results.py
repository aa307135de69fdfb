"""Result files: JSON that says how it was made, written atomically, read back with clear errors."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

from crate_mini import UserError, atomic_write, cli

ROOT = Path(__file__).resolve().parent.parent  # the checkout, if this runs from one


def write_json(path, result):
    """Write a result as JSON, atomically; every number in it must be finite. Returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(json.dumps(result, indent=1, allow_nan=False).encode() + b"\n")
    return path


def read_json(path, known=None, expected="a file written by crate_mini"):
    """A JSON object from a file.

    known: the names it may hold. expected: describes such a file in the error sentence. Raises
    UserError if the file cannot be parsed or holds another name.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read as JSON: {reason}; expected {expected}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; expected {expected}.")
    for name in content:
        if known is not None and name not in known:
            raise UserError(f"{path} names {name!r}, not a setting{cli.nearest(name, known)}.")
    return content


def write_rows(path, rows):
    """Write one JSON object a line (.jsonl), atomically; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        for row in rows:
            text = json.dumps(row, ensure_ascii=False, allow_nan=False)
            file.write(text.encode() + b"\n")
    return path


def folder(checkpoint, out=None):
    """The folder for results of a checkpoint: `out`, or `interpret` next to the checkpoint."""
    return Path(out) if out else Path(checkpoint).resolve().parent / "interpret"


def command(*script):
    """The running command, as it can be typed again; script: its name, or -m and the module."""
    return shlex.join(["python", *script, *sys.argv[1:]])


def commit():
    """The git commit of the source, with + if any file outside results/ differs from it.

    'unknown' outside a checkout.
    """
    git = ["git", "-C", str(ROOT)]
    head = [*git, "rev-parse", "--short=12", "HEAD"]
    changes = [*git, "diff", "--quiet", "HEAD", "--", ".", ":!results"]
    try:
        name = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(changes, capture_output=True).returncode != 0
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name}+" if changed else name

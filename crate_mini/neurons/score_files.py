"""Scored neurons on disk: what `interpret.py neurons` wrote, read back.

`read_rows` gives the rows of scores.jsonl alone, `read_summary` what they belong to, `read` all
that pages and figures show.
"""

import json
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from crate_mini import UserError
from crate_mini.console import results
from crate_mini.neurons.protocols import flat_scores

# Of a row: what its entries may be, as far as commands read them without its other scores.
ENTRIES = {
    "site": str,
    "neuron": int,
    "max": (int, float, type(None)),
    "label": (dict, type(None)),
}


def read_rows(path, made_by="score"):
    """The rows of a file of write_rows, such as scores.jsonl.

    made_by: the stage that makes it again. NaN and infinities become None. Raises UserError if the
    file is missing or damaged.
    """
    try:
        lines = results.read_bytes(path).decode().split("\n")
        rows = [json.loads(line, parse_constant=_missing) for line in lines if line.strip()]
        if all(isinstance(row, dict) and results.is_intact(row) for row in rows):
            return rows
        problem = "is damaged"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    except (ValueError, RecursionError):
        problem = "is damaged"
    raise UserError(
        f"{path} {problem}; make it again with `python interpret.py neurons CKPT --from {made_by}`."
    )


def read_summary(folder, rows):
    """(record.json, summary.json) of a result folder, and a check that `rows` are all they count.

    Raises UserError for a file that is missing or damaged, for scores of another record than the
    one there now, and if rows are missing.
    """
    with complete(folder):
        return _read_summary(Path(folder), rows)


@contextmanager
def complete(folder):
    """Turn a lookup of an entry that is missing or of another type into a UserError."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"the scores in {folder} are damaged, {type(error).__name__}: {error}; score again "
            "with `python interpret.py neurons CKPT --from score`."
        ) from error


def _read_summary(folder, rows):
    for row in rows:
        wrong = [name for name, kinds in ENTRIES.items() if not isinstance(row.get(name), kinds)]
        if wrong:
            raise TypeError(f"{wrong[0]} is {row.get(wrong[0])!r}")
    record, summary = (_json(folder / name) for name in ("record.json", "summary.json"))
    if (summary.get("record") or record).get("stamp") != record.get("stamp"):
        raise UserError(
            f"the scores in {folder} are of another record than the one there now; score again "
            "with `python interpret.py neurons CKPT --from select`."
        )
    if any(row.get("made_with") != summary.get("made_with") for row in rows):
        raise UserError(
            f"{folder / 'scores.jsonl'} and summary.json were made with different settings; score "
            "again with `python interpret.py neurons CKPT --from score`."
        )
    counted = Counter(row["site"] for row in rows)
    for site, statistics in summary.get("sites", {}).items():
        total = statistics["n"].get("neurons", {}).get("total", counted[site])
        if counted[site] != total:
            raise UserError(
                f"{folder / 'scores.jsonl'} has {counted[site]} of {total} neurons of {site}; "
                "score again with `python interpret.py neurons CKPT --from score`."
            )
    return record, summary


def _json(path):
    """The content of record.json or summary.json."""
    stage = "record" if path.name == "record.json" else "score"
    command = f"`python interpret.py neurons CKPT --from {stage}`"
    return results.read_json(path, expected=f"what {command} writes")


class Scored(NamedTuple):
    """What pages and figures show of a result folder; `read` reads it."""

    record: dict  # record.json
    summary: dict  # summary.json
    neurons: list  # a dict each: its row of scores.jsonl with flat scores, and its excerpts


def read(folder):
    """The Scored neurons of a result folder.

    The lines take most of a report's time to read, so everything that shows them takes a Scored
    rather than the folder. Raises UserError as `read_rows` and `read_summary` do.
    """
    folder = Path(folder)
    for name in ("record.json", "summary.json", "excerpts.jsonl", "scores.jsonl"):
        if not (folder / name).exists():
            raise UserError(
                f"{folder} has no {name}; `python interpret.py neurons CKPT` writes it."
            )
    with complete(folder):
        return _read(folder)


def _read(folder):
    rows, excerpts = (read_rows(folder / name) for name in ("scores.jsonl", "excerpts.jsonl"))
    shown = {(line["site"], line["neuron"]): line for line in excerpts}
    neurons = []
    for row in rows:
        name = row["site"], row["neuron"]
        if name not in shown or shown[name].get("made_with") != row.get("made_with"):
            raise UserError(
                f"{folder / 'excerpts.jsonl'} lacks neuron {name[1]} of {name[0]}; score again "
                "with `python interpret.py neurons CKPT --from score`."
            )
        neurons.append({**shown[name], **row, "scores": flat_scores(row["scores"])})
    return Scored(*read_summary(folder, rows), neurons)


def _missing(constant):
    """In place of NaN and Infinity, which Python reads but JSON does not have."""
    return None


def checkpoint_name(record):
    """The last two folders of the path of a record's checkpoint, e.g. crate-3L/best."""
    path = (record.get("checkpoint") or {}).get("path", "")
    return "/".join(Path(path).parts[-2:]) or "a checkpoint"

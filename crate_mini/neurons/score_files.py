"""Scored neurons on disk: what `interpret.py neurons` wrote, read back.

`read_rows` gives the rows of scores.jsonl alone; `read` gives all that pages and figures show.
"""

import json
from pathlib import Path

from crate_mini import UserError
from crate_mini.neurons.protocols import flat_scores


def read_rows(path):
    """The rows of a scores.jsonl. Raises UserError if it is missing or damaged."""
    try:
        with open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    except (OSError, ValueError) as error:
        raise UserError(
            f"Cannot read the scores in {path} ({error}); make them again with "
            "`python interpret.py neurons CKPT --from score`."
        ) from None


def read(folder):
    """(record, summary, neurons) of a result folder: two dicts and a list of one for each neuron.

    A neuron is its row of scores.jsonl with flat scores, and the excerpts of its line in
    excerpts.jsonl. Raises UserError for a file that is missing or damaged.
    """
    folder = Path(folder)
    record, summary = _read_json(folder, "record.json")[0], _read_json(folder, "summary.json")[0]
    shown = {}
    for line in _read_json(folder, "excerpts.jsonl"):
        shown[line["site"], line["neuron"]] = line
    neurons = []
    for line in _read_json(folder, "scores.jsonl"):
        excerpts = shown.get((line["site"], line["neuron"]), {})
        neurons.append({**excerpts, **line, "scores": flat_scores(line["scores"])})
    return record, summary, neurons


def _read_json(folder, name):
    """The JSON values of a file, one a line in .jsonl; NaN and infinities become None."""
    try:
        text = (folder / name).read_text(encoding="utf-8")
        parts = text.splitlines() if name.endswith(".jsonl") else [text]
        return [json.loads(part, parse_constant=_missing) for part in parts if part.strip()]
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no {name}; `python interpret.py neurons CKPT` writes it."
        ) from None
    except ValueError as error:
        raise UserError(
            f"{folder / name} is damaged ({error}); `python interpret.py neurons CKPT --from "
            "score` writes it again."
        ) from None


def _missing(constant):
    """In place of NaN and Infinity, which Python reads but JSON does not have."""
    return None


def checkpoint_name(record):
    """The last two folders of the path of a record's checkpoint, e.g. crate-3L/best."""
    path = (record.get("checkpoint") or {}).get("path", "")
    return "/".join(Path(path).parts[-2:]) or "a checkpoint"

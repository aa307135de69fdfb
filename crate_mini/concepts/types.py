"""What the steps of concept discovery hand to each other: Vectors of words in two layers, and Codes of them.

    vectors -> discover (methods.py) -> codes -> health.py and the other judges

Both are files: an .npz with a JSON header {schema, kind, ...}; a step can be rerun alone, on another machine.
"""

import json
import zipfile
import zlib
from dataclasses import dataclass, field, fields

import numpy as np

from crate_mini import UserError, atomic_write

SCHEMA = 1
SPLITS = {"train": 0, "stop": 1, "test": 2}  # learn from, stop training by, judge on
AGAIN = "make it again with `python interpret.py concepts CKPT --from vectors`"


@dataclass
class Vectors:
    """N words of S sentences, each with its state in two layers of one frozen model.

    Words stand in the order of their text. A sentence may have lost all its words to the frequency filter.
    Raises UserError when made of arrays that do not fit each other or hold a number that is not finite.
    """

    lower: np.ndarray  # (N, d) float32: where concepts are looked for
    upper: np.ndarray  # (N, d) float32: the same words some layers later
    sentence: np.ndarray  # (N,) int64, non-decreasing: index of the word's sentence, below S
    word: np.ndarray  # (N,) int64: index into vocabulary
    position: np.ndarray  # (N,) int64: the word's place in its sentence, before any filter
    label: np.ndarray  # (S,) int64: class of the sentence
    split: np.ndarray  # (S,) int64: value of SPLITS
    vocabulary: list  # str
    classes: list = field(default_factory=list)  # str: names of the labels
    facts: dict = field(
        default_factory=dict
    )  # where all this is from: checkpoint, layers, corpus, seed

    def __post_init__(self):
        for name in ("lower", "upper"):
            setattr(self, name, np.ascontiguousarray(getattr(self, name), np.float32))
        for name in ("sentence", "word", "position", "label", "split"):
            setattr(self, name, np.asarray(getattr(self, name), np.int64))
        N, S = len(self.sentence), len(self.label)
        rows = [len(getattr(self, name)) for name in ("lower", "upper", "word", "position")]
        if rows != [N] * 4 or len(self.split) != S or self.lower.ndim != 2 or self.upper.ndim != 2:
            raise UserError(
                f"word vectors do not fit each other: {N} words have {rows} states, words and "
                f"positions, {S} sentences have {len(self.split)} splits; {AGAIN}."
            )
        ordered = np.all(np.diff(self.sentence) >= 0)
        inside = not N or (
            0 <= self.sentence[0]
            and self.sentence[-1] < S
            and 0 <= self.word.min()
            and self.word.max() < len(self.vocabulary)
        )
        if not (ordered and inside and np.isin(self.split, list(SPLITS.values())).all()):
            raise UserError(
                f"word vectors name sentences, words or splits that are not there; {AGAIN}."
            )
        if not (np.isfinite(self.lower).all() and np.isfinite(self.upper).all()):
            raise UserError("word vectors are not all finite; use a checkpoint of sound weights.")

    def rows(self, split):
        """(N,) bool: the words of a split, named as in SPLITS."""
        return self.split[self.sentence] == SPLITS[split]

    def save(self, path):
        """Write the .npz at once or not at all."""
        _save(path, self, "vectors")

    @classmethod
    def load(cls, path):
        """The Vectors of such a file. Raises UserError when it is missing, damaged or of another kind."""
        return cls(**_load(path, cls, "vectors"))


@dataclass
class Codes:
    """What one method discovered: a code for each of the N words, and the direction that stands for it."""

    method: str  # name in methods.METHODS
    seed: int
    assignment: np.ndarray  # (N,) int64, below K: all words of all splits, by the rule of test time
    centroids: (
        np.ndarray
    )  # (K, d) float32 in the space of the lower layer: to remove code j from a state h
    # is h - (h . u) u, u = centroids[j] / |centroids[j]|: rank one, for all methods
    health: dict = field(default_factory=dict)  # health.codebook, and "epochs" where there are any
    settings: dict = field(default_factory=dict)  # every switch of the method

    def __post_init__(self):
        self.assignment = np.asarray(self.assignment, np.int64)
        self.centroids = np.ascontiguousarray(self.centroids, np.float32)
        K = len(self.centroids)
        if (
            self.centroids.ndim != 2
            or len(self.assignment)
            and not (0 <= self.assignment.min() and self.assignment.max() < K)
        ):
            raise UserError(f"codes of {self.method} name more than the {K} there are; {AGAIN}.")

    def directions(self):
        """(K, d) float32: centroids of length 1; a code of length 0 stays 0, to remove it changes nothing."""
        norm = np.linalg.norm(self.centroids, axis=1, keepdims=True)
        return self.centroids / np.where(norm > 0, norm, 1)

    def save(self, path):
        """Write the .npz at once or not at all."""
        _save(path, self, "codes")

    @classmethod
    def load(cls, path):
        """The Codes of such a file. Raises UserError when it is missing, damaged or of another kind."""
        return cls(**_load(path, cls, "codes"))


def _save(path, content, kind):
    values = {f.name: getattr(content, f.name) for f in fields(content)}
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    header = {name: value for name, value in values.items() if name not in arrays}
    text = json.dumps({"schema": SCHEMA, "kind": kind, **header}).encode()
    with atomic_write(path) as file:
        np.savez(file, header=np.frombuffer(text, np.uint8), **arrays)


def _load(path, cls, kind):
    try:
        with np.load(path) as file:
            found = {name: file[name] for name in file.files}
        header = json.loads(found.pop("header").tobytes())
        schema, told = header.pop("schema"), header.pop("kind")
    except OSError as error:
        raise UserError(
            f"Cannot read {path}: {error.strerror or 'it is damaged'}; {AGAIN}."
        ) from None
    except (KeyError, ValueError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error):
        raise UserError(f"{path} is damaged or holds no {kind}; {AGAIN}.") from None
    found |= header
    if (schema, told) != (SCHEMA, kind) or set(found) != {f.name for f in fields(cls)}:
        raise UserError(
            f"{path} holds {told} of schema {schema!r}, expected {kind} of {SCHEMA}; {AGAIN}."
        )
    return found

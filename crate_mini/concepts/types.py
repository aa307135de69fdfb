"""The two results that the steps of concept discovery pass on: word vectors, and their codes.

    word_vectors.extract -> Vectors -> methods.discover -> Codes -> faithfulness and the other tests

Both are files, an .npz with a JSON header {schema, kind, ...}, so that a step can run again alone,
or on another machine.
"""

import json
from dataclasses import dataclass, field, fields

import numpy as np

from crate_mini import UserError
from crate_mini.console.results import atomic_write
from crate_mini.neurons import npz

SCHEMA = 1
SPLITS = {"train": 0, "stop": 1, "test": 2}  # to learn from, to stop training by, to judge on
AGAIN = "make it again with `python interpret.py concepts CKPT --from vectors`"


@dataclass
class Vectors:
    """N words of S texts, each with its state in two layers of one frozen model.

    A word is one occurrence. Words are in the order of their text; a text may have lost all its
    words to the frequency filter. Raises UserError for arrays that do not fit each other, and for
    numbers that are not finite.
    """

    lower: np.ndarray  # (N, d) float32: states in which concepts are discovered
    upper: np.ndarray  # (N, d) float32: states of the same words some layers later
    sentence: np.ndarray  # (N,) int64, non-decreasing: index of the word's text, below S
    word: np.ndarray  # (N,) int64: index into vocabulary
    position: np.ndarray  # (N,) int64: which word of its text it is, counted before any filter
    label: np.ndarray  # (S,) int64: class of each text
    split: np.ndarray  # (S,) int64: a value of SPLITS
    vocabulary: list  # str
    classes: list = field(default_factory=list)  # str: names of the labels
    facts: dict = field(default_factory=dict)  # where the vectors come from: layers, texts, filter

    def __post_init__(self):
        for name in ("lower", "upper"):
            setattr(self, name, np.ascontiguousarray(getattr(self, name), np.float32))
        for name in ("sentence", "word", "position", "label", "split"):
            setattr(self, name, np.asarray(getattr(self, name), np.int64))
        self._check_shapes()
        self._check_indices()
        if not (np.isfinite(self.lower).all() and np.isfinite(self.upper).all()):
            raise UserError(
                "the word vectors are not all finite; use a checkpoint whose weights are finite."
            )

    def _check_shapes(self):
        N, S = len(self.sentence), len(self.label)
        per_word = (self.lower, self.upper, self.word, self.position)
        lengths = [len(array) for array in per_word]
        matrices = self.lower.ndim == self.upper.ndim == 2
        if lengths != [N] * 4 or len(self.split) != S or not matrices:
            raise UserError(
                f"word vectors do not fit each other: {N} words have {lengths} lower and upper "
                f"states, words and positions, {S} texts have {len(self.split)} splits; {AGAIN}."
            )

    def _check_indices(self):
        ordered = (np.diff(self.sentence) >= 0).all()
        inside = below(self.sentence, len(self.label)) and below(self.word, len(self.vocabulary))
        known_splits = np.isin(self.split, list(SPLITS.values())).all()
        if not (ordered and inside and known_splits):
            raise UserError(f"word vectors name texts, words or splits that do not exist; {AGAIN}.")

    def rows(self, split):
        """(N,) bool: which words are in a split, named as in SPLITS."""
        return self.split[self.sentence] == SPLITS[split]

    def save(self, path):
        """Write the .npz, whole or not at all."""
        _save(path, self, "vectors")

    @classmethod
    def load(cls, path):
        """The Vectors in a file; UserError if it is missing, damaged or holds something else."""
        return cls(**_load(path, cls, "vectors"))


@dataclass
class Codes:
    """The result of one method: a code for each of N words, and a direction for each of K codes.

    To remove code j from a state h of the lower layer is h - (h . u) u with
    u = centroids[j] / |centroids[j]|: rank one, for every method.
    """

    method: str  # a name in methods.METHODS
    seed: int
    assignment: np.ndarray  # (N,) int64, below K: codes at test time, for the words of all splits
    centroids: np.ndarray  # (K, d) float32, in the space of the lower layer
    health: dict = field(default_factory=dict)  # kmeans.usage by split; "epochs" of a training
    settings: dict = field(default_factory=dict)  # every switch of the method

    def __post_init__(self):
        self.assignment = np.asarray(self.assignment, np.int64)
        self.centroids = np.ascontiguousarray(self.centroids, np.float32)
        K = len(self.centroids)
        if self.centroids.ndim != 2 or not below(self.assignment, K):
            raise UserError(f"codes of {self.method} name more than the {K} that exist; {AGAIN}.")

    def directions(self):
        """(K, d) float32: centroids of length 1; one of length 0 stays, and removes nothing."""
        norm = np.linalg.norm(self.centroids, axis=1, keepdims=True)
        return self.centroids / np.where(norm > 0, norm, 1)

    def save(self, path):
        """Write the .npz, whole or not at all."""
        _save(path, self, "codes")

    @classmethod
    def load(cls, path):
        """The Codes in a file; UserError if it is missing, damaged or holds something else."""
        return cls(**_load(path, cls, "codes"))


def below(indices, n):
    """Whether all indices lie in 0 .. n - 1."""
    return not len(indices) or (indices.min() >= 0 and indices.max() < n)


def _save(path, content, kind):
    values = {f.name: getattr(content, f.name) for f in fields(content)}
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    header = {name: value for name, value in values.items() if name not in arrays}
    text = json.dumps({"schema": SCHEMA, "kind": kind, **header}).encode()
    with atomic_write(path) as file:
        np.savez(file, header=np.frombuffer(text, np.uint8), **arrays)


def _load(path, cls, kind):
    """The fields of a dataclass from a file that _save wrote."""
    content = npz.arrays(path, AGAIN)
    try:
        header = json.loads(content.pop("header").tobytes())
        file_schema = header.pop("schema")
        file_kind = header.pop("kind")
    except (KeyError, ValueError, AttributeError):
        raise UserError(f"{path} is damaged or holds no {kind}; {AGAIN}.") from None
    content |= header
    expected = {f.name for f in fields(cls)}
    if (file_schema, file_kind) != (SCHEMA, kind) or set(content) != expected:
        raise UserError(
            f"{path} holds {file_kind} of schema {file_schema!r}, expected {kind} of {SCHEMA}; "
            f"{AGAIN}."
        )
    return content

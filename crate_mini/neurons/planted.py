"""Neuron puzzles: neurons that we planted, so that what fires them is known: tests of simulators and metrics.

Each puzzle has a true explanation and false ones, as text and as a function: what somebody who takes the text
at its word predicts. A simulator that is told the true explanation must predict the neuron better than when
told any false one, and a metric must rank them likewise. Tokens are characters, drawn one by one, so that
nothing but the plan connects them. `Planted` is a model whose codes are all these functions: the selftest
sends it through the same stages, from text on disk to scores, as any checkpoint.
"""

import json
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn as nn

from crate_mini.model import Config

# The frequent ones first: characters follow Zipf's law, and the puzzles need some often enough.
ALPHABET = "e;qua,ti.o7n\ns4hrX1dlT cmfwypvbgk92MR"
EOT = 256  # of the tokenizer "bytes"


@dataclass
class Reading:
    """An explanation: what it says, and the activations (n, t) it implies for tokens (n, t); -1 is none."""

    text: str
    predict: object


@dataclass
class Puzzle:
    """A planted neuron, its true explanation and false ones. expect: what a fair pipeline reports."""

    name: str
    true: Reading
    false: list = field(default_factory=list)
    expect: str = (
        "true wins"  # | no score: nothing predicts it | undefined: constant | dead: never above 0
    )


def on(characters):
    """Fires on these characters."""
    ids = torch.tensor(list(characters.encode()))
    return lambda x: torch.isin(x, ids).float()


def back(n, characters):
    """Fires n tokens after one of these characters."""

    def predict(x):
        moved = torch.full_like(x, -1)
        moved[:, n:] = x[:, :-n]
        return on(characters)(moved)

    return predict


def both(*readings):
    """Fires where all of these do."""
    return lambda x: torch.stack([reading(x) for reading in readings]).prod(0)


def first(n):
    """Fires on the first n tokens of a context, which a -1 comes before."""

    def predict(x):
        fires = torch.zeros(x.shape)
        for k in range(1, n + 1):
            fires[:, k:] += x[:, :-k] < 0
        return fires.clamp(max=1) * (x >= 0)

    return predict


def noise(x):
    """A number that follows from all tokens so far, four or more, but nobody can tell how: 0 in 70 %."""
    early = first(4)(x).bool()
    mixed = torch.cumsum((x + 2).double() * (torch.arange(x.shape[1]) % 97 + 1), 1)
    return (
        torch.relu(torch.frac(torch.sin(mixed * 12.9898).abs() * 43758.5453) - 0.7).float() * ~early
    )


def level(value, reading=None):
    """The same everywhere, or `value` times what a reading says."""
    return lambda x: torch.full(x.shape, float(value)) if reading is None else value * reading(x)


PUZZLES = [
    Puzzle(
        "token set",
        Reading("the vowels a, i and o", on("aio")),
        [
            Reading("digits", on("12479")),
            Reading("capital letters", on("XTMR")),
            Reading("the character after a, i or o", back(1, "aio")),
        ],
    ),
    Puzzle(
        "bigram",
        Reading("u, but only directly after q", both(on("u"), back(1, "q"))),
        [
            Reading("u, whatever comes before it", on("u")),
            Reading("q", on("q")),
            Reading("q, but only directly after u", both(on("q"), back(1, "u"))),
        ],
    ),
    Puzzle(
        "third token back",
        Reading("any character three places after a semicolon", back(3, ";")),
        [
            Reading("semicolons", on(";")),
            Reading("the character after a semicolon", back(1, ";")),
            Reading("any character three places after a comma", back(3, ",")),
        ],
    ),
    Puzzle(
        "position",
        Reading("the first four characters of a text", first(4)),
        [
            Reading("line breaks", on("\n")),
            Reading("full stops", on(".")),
            Reading("the character after a line break", back(1, "\n")),
        ],
    ),
    Puzzle(
        "noise",
        Reading("a number drawn anew at every character", noise),
        [Reading("e", on("e"))],
        "no score",
    ),
    Puzzle("dead", Reading("never fires", level(0)), [Reading("commas", on(","))], "dead"),
    Puzzle(
        "always on",
        Reading("fires alike everywhere", level(1)),
        [Reading("commas", on(","))],
        "undefined",
    ),
    Puzzle(
        "negative only",
        Reading("below zero on commas, never above it", level(-1, on(","))),
        [Reading("commas", on(","))],
        "dead",
    ),
]
READINGS = [(puzzle, reading) for puzzle in PUZZLES for reading in (puzzle.true, *puzzle.false)]
NEURON = {puzzle.name: i for i, (puzzle, reading) in enumerate(READINGS) if reading is puzzle.true}


class Planted(nn.Module):
    """A model of one layer whose codes (B, T, h) are what the h READINGS imply, a neuron each."""

    def __init__(self, block_size=128):
        super().__init__()
        h = len(READINGS)
        self.config = Config(
            vocab_size=EOT + 1, block_size=block_size, n_layer=1, n_head=1, n_embd=h, expansion=1
        )
        self.tokens = nn.Embedding(EOT + 1, h)
        nn.init.zeros_(self.tokens.weight)  # nothing is predicted: the neurons move no logit
        proj = nn.Linear(h, h, bias=False)  # and write nothing
        nn.init.zeros_(proj.weight)
        sparsifier = nn.ModuleDict({"code": nn.Identity(), "proj": proj})
        self.blocks = nn.ModuleList([nn.ModuleDict({"sparsifier": sparsifier})])

    def trunk(self, idx):
        """(stream (B, T, h), [codes (B, T, h)]) of ids (B, T), as LM.trunk."""
        x = torch.cat((torch.full_like(idx[:, :1], -1), idx), 1)
        codes = torch.stack([reading.predict(x)[:, 1:] for _, reading in READINGS], -1)
        return torch.zeros(codes.shape), [self.blocks[0]["sparsifier"]["code"](codes)]


def texts(n, seed=0, shortest=64, longest=192):
    """n documents of characters, drawn one by one by Zipf's law."""
    rng, letters = np.random.default_rng(seed), np.array(list(ALPHABET))
    weight = 1 / (np.arange(len(letters)) + 8)
    return [
        "".join(rng.choice(letters, rng.integers(shortest, longest + 1), p=weight / weight.sum()))
        for _ in range(n)
    ]


def write_texts(path, n, seed=0):
    """Documents as .jsonl, a source for data.open_corpus."""
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts(n, seed))

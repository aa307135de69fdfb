"""Planted neurons: we know what fires them, so they test simulators and metrics.

Each has a true explanation and false ones, as a text and as a function, which predicts what a
literal reader of the text would. A simulator given the true explanation must predict the neuron
better than when given any false one, and a metric must rank them likewise. Tokens are characters
drawn one by one, so that nothing but the plan connects them. The codes of `PlantedModel` are all
these functions: `selftest` sends it through the same stages as any checkpoint, from text on disk
to scores.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn as nn

from crate_mini import loss
from crate_mini.model import Config

# Frequent characters first: they follow Zipf's law, and some must be frequent enough to score.
ALPHABET = "e;qua,ti.o7n\ns4hrX1dlT cmfwypvbgk92MR"
EOT = 256  # of the tokenizer "bytes"


@dataclass
class Explanation:
    """A text, and the activations (n, t) it implies for tokens (n, t), where -1 is no token."""

    text: str
    predict: Callable


@dataclass
class PlantedNeuron:
    """A neuron with its explanations, and what a fair pipeline must report about it.

    expect: "true wins"; "no score", because nothing predicts it; "undefined", because it is
    constant; or "dead", because it is never above 0.
    """

    name: str
    true: Explanation
    false: list = field(default_factory=list)
    expect: str = "true wins"


# ---- what explanations predict -------------------------------------------------------------------


def on(characters):
    """Fires on these characters."""
    ids = torch.tensor(list(characters.encode()))

    def predict(x):
        return torch.isin(x, ids).float()

    return predict


def after(n, characters):
    """Fires n tokens after one of these characters."""

    def predict(x):
        moved = torch.full_like(x, -1)
        moved[:, n:] = x[:, :-n]
        return on(characters)(moved)

    return predict


def all_of(*predictions):
    """Fires where all of these do."""

    def predict(x):
        return torch.stack([prediction(x) for prediction in predictions]).prod(0)

    return predict


def first(n):
    """Fires on the first n tokens of a context, which follow a -1."""

    def predict(x):
        fires = torch.zeros(x.shape)
        for k in range(1, n + 1):
            fires[:, k:] += x[:, :-k] < 0
        return fires.clamp(max=1) * (x >= 0)

    return predict


def noise(x):
    """A hash of all tokens so far, if there are more than four; 0 in 70 % of cases."""
    early = first(4)(x).bool()
    weights = torch.arange(x.shape[1]) % 97 + 1
    mixed = torch.cumsum((x + 2).double() * weights, 1)
    uniform = torch.frac(torch.sin(mixed * 12.9898).abs() * 43758.5453)
    return torch.relu(uniform - 0.7).float() * ~early


def constant(value):
    """The same everywhere."""

    def predict(x):
        return torch.full(x.shape, float(value))

    return predict


def negative(prediction):
    """Below 0 where a prediction fires."""

    def predict(x):
        return -1 * prediction(x)

    return predict


# ---- the neurons ---------------------------------------------------------------------------------

PLANTED = [
    PlantedNeuron(
        "token set",
        Explanation("the vowels a, i and o", on("aio")),
        [
            Explanation("digits", on("12479")),
            Explanation("capital letters", on("XTMR")),
            Explanation("the character after a, i or o", after(1, "aio")),
        ],
    ),
    PlantedNeuron(
        "bigram",
        Explanation("u, but only directly after q", all_of(on("u"), after(1, "q"))),
        [
            Explanation("u, whatever comes before it", on("u")),
            Explanation("q", on("q")),
            Explanation("q, but only directly after u", all_of(on("q"), after(1, "u"))),
        ],
    ),
    PlantedNeuron(
        "third token back",
        Explanation("any character three places after a semicolon", after(3, ";")),
        [
            Explanation("semicolons", on(";")),
            Explanation("the character after a semicolon", after(1, ";")),
            Explanation("any character three places after a comma", after(3, ",")),
        ],
    ),
    PlantedNeuron(
        "position",
        Explanation("the first four characters of a text", first(4)),
        [
            Explanation("line breaks", on("\n")),
            Explanation("full stops", on(".")),
            Explanation("the character after a line break", after(1, "\n")),
        ],
    ),
    PlantedNeuron(
        "noise",
        Explanation("a fresh random number at every character", noise),
        [Explanation("e", on("e"))],
        expect="no score",
    ),
    PlantedNeuron(
        "dead",
        Explanation("never fires", constant(0)),
        [Explanation("commas", on(","))],
        expect="dead",
    ),
    PlantedNeuron(
        "always on",
        Explanation("fires equally everywhere", constant(1)),
        [Explanation("commas", on(","))],
        expect="undefined",
    ),
    PlantedNeuron(
        "negative only",
        Explanation("below zero on commas, never above it", negative(on(","))),
        [Explanation("commas", on(","))],
        expect="dead",
    ),
]
# The codes of PlantedModel: each explanation, true or false, has a neuron that does what it says.
EXPLANATIONS = [
    (planted, explanation) for planted in PLANTED for explanation in (planted.true, *planted.false)
]
INDEX = {  # name of a planted neuron: its place among the codes
    planted.name: i
    for i, (planted, explanation) in enumerate(EXPLANATIONS)
    if explanation is planted.true
}


class PlantedModel(nn.Module):
    """A model of one layer whose codes (B, T, h) are what the h EXPLANATIONS predict."""

    cache = None

    def __init__(self, block_size=128):
        super().__init__()
        h = len(EXPLANATIONS)
        self.config = Config(
            vocab_size=EOT + 1, block_size=block_size, n_layer=1, n_head=1, n_embd=h, expansion=1
        )
        self.tokens = nn.Embedding(EOT + 1, h)
        nn.init.zeros_(self.tokens.weight)  # so that no neuron moves a logit
        proj = nn.Linear(h, h, bias=False)
        nn.init.zeros_(proj.weight)  # so that none writes to the stream
        sparsifier = nn.ModuleDict({"code": nn.Identity(), "proj": proj})
        block = {"attention": nn.Identity(), "sparsifier": sparsifier}
        self.blocks = nn.ModuleList([nn.ModuleDict(block)])

    def trunk(self, idx):
        """(stream (B, T, h), [codes (B, T, h)]) of ids (B, T), as LM.trunk."""
        T, all_ids = idx.shape[1], idx
        if self.cache:  # the explanations depend on earlier ids, so these are what it keeps
            (kept,) = self.cache.extend(self.blocks[0].attention, idx[:, None, :, None])
            all_ids = kept[:, 0, :, 0]
            self.cache.length = all_ids.shape[1]
        x = torch.cat((torch.full_like(all_ids[:, :1], -1), all_ids), 1)
        predictions = [explanation.predict(x)[:, -T:] for _, explanation in EXPLANATIONS]
        codes = torch.stack(predictions, -1)
        return torch.zeros(codes.shape), [self.blocks[0]["sparsifier"]["code"](codes)]

    def forward(self, ids, targets):
        """The mean loss, as LM.forward: no neuron moves it."""
        return loss.cross_entropy(self.trunk(ids)[0], self.tokens.weight, targets)


# ---- their texts ---------------------------------------------------------------------------------


def texts(n, seed=0, shortest=64, longest=192):
    """n documents of characters, drawn one by one by Zipf's law."""
    rng, letters = np.random.default_rng(seed), np.array(list(ALPHABET))
    weights = 1 / (np.arange(len(letters)) + 8)
    share = weights / weights.sum()
    documents = []
    for _ in range(n):
        length = rng.integers(shortest, longest + 1)
        documents.append("".join(rng.choice(letters, length, p=share)))
    return documents


def write_texts(path, n, seed=0):
    """Write documents as .jsonl, a source for open_corpus."""
    with open(path, "w", encoding="utf-8") as file:
        for text in texts(n, seed):
            file.write(json.dumps({"text": text}) + "\n")

"""Planted neurons of the text so far: what the scores beyond the token must find, and must not.

`PlantedStates` has a neuron for every property of text_states.py, and those of MISLEADING, on
which scores by token go wrong. Its texts hold every property, in words that also stand elsewhere.
"""

import json

import numpy as np
import torch
import torch.nn as nn

from crate_mini.model import Config
from crate_mini.neurons.text_states import NAMES, TOPIC_WORDS, TextStates

PROSE = (
    "the a this to of in and but is was they it can must not red old house tree water light "
    "walking running slowly quickly walked turned Paul London Green music left right under long "
    "small part of the name with place to the end in a way"
)
WORDS = PROSE.split()
CODE_NAMES = ["x", "total_sum", "row", "left_part", "name", "value_2"]
BRACKETS = ("({})", "[{}]", "{{{}}}", "([{}] {})", '"{}"', "'{}'", "`{}`")
SENTENCE_STARTS = ("They", "What", "When", "It", "The", "A", "Long", "Paul", "She", "Why")
SAID = ("film", "war", "city")  # what the planted topic neuron listens for

# Misleading neurons: the properties that must come out as theirs; none: no score at all.
MISLEADING = {
    "a random number for each token": (),
    "a fresh random number": (),
    "in any brackets": (
        "in round brackets",
        "in square brackets",
        "in curly brackets",
        "in nested brackets",
    ),
    "third occurrence": ("third or later occurrence of the token",),
    "one word, in quotes only": ("in double quotes",),
    "topic": tuple(f"text has said {word}" for word in SAID),
    "position": ("beyond 64 tokens of the context", "first 8 tokens of the context"),
}


class PlantedStates(nn.Module):
    """A model of one layer with a neuron for each property, then those of MISLEADING."""

    def __init__(self, tokenizer, block_size=256, seed=0):
        super().__init__()
        h = len(NAMES) + len(MISLEADING)
        V = tokenizer.vocab_size
        self.config = Config(
            vocab_size=V, block_size=block_size, n_layer=1, n_head=1, n_embd=h, expansion=1
        )
        self.tokens = nn.Embedding(1, 1)  # where `device` is read
        self.states = TextStates(tokenizer.token_bytes)
        self.the = tokenizer.encode("in the")[-1]
        rng = np.random.default_rng(seed)
        self.by_token = rng.random(V)
        self.draws = rng.random(1 << 16)

    def trunk(self, idx):
        """(None, [codes (B, T, h)]) of ids (B, T)."""
        codes = [self._codes(ids) for ids in idx.numpy()]
        return None, [torch.from_numpy(np.stack(codes)).float()]

    def _codes(self, ids):
        """(T, h): each property times a number between 0.75 and 1.25, then the misleading ones."""
        holds = self.states.of(ids)
        property_of = dict(zip(NAMES, holds.T))
        place = np.arange(len(ids))
        fresh = self.draws[(ids * 977 + place * 131 + np.cumsum(ids)) % len(self.draws)]
        any_brackets = [property_of[name] for name in MISLEADING["in any brackets"]]
        topics = [property_of[name] for name in MISLEADING["topic"]]
        misleading = [
            self.by_token[ids],
            fresh,
            np.any(any_brackets, 0),
            property_of["third or later occurrence of the token"],
            property_of["in double quotes"] & (ids == self.the),
            np.any(topics, 0),
            np.log1p(place),
        ]
        return np.column_stack([holds * (0.75 + fresh[:, None] / 2), *misleading])


def texts(n, seed=0, lines=12):
    """n documents that hold every property, each about four topics."""
    rng = np.random.default_rng(seed)
    topics = [word.decode() for word in TOPIC_WORDS]
    documents = []
    for _ in range(n):
        about = rng.choice(topics, 4, replace=False).tolist()
        documents.append("\n".join(_line(rng, about) for _ in range(lines)))
    return documents


def _line(rng, topics):
    """A line of prose, of code or of a list; sometimes none."""
    kind = rng.integers(10)
    if kind == 0:
        return ""
    if kind == 1:
        first, second = rng.choice(CODE_NAMES, 2)
        number = rng.integers(10, 99_999)
        return f"    {first} = {second}.{first}({number}, {second})  # {_phrase(rng, topics, 3)}"
    if kind == 2:
        colon = rng.choice([": ", ":\n    "])
        return f"{_phrase(rng, topics, 3)}{colon}{_phrase(rng, topics, 9)}"
    if kind == 3:
        return f"{rng.choice(['-', '*', '1', '2020'])} {_phrase(rng, topics, 5)}"
    sentences = []
    for _ in range(rng.integers(1, 4)):
        start = rng.choice(SENTENCE_STARTS)
        sentences.append(f"{start} {_phrase(rng, topics, rng.integers(3, 30))}.")
    return " ".join(sentences)


def _phrase(rng, topics, n):
    """About n words, some in brackets or quotes, with numbers, commas and topics."""
    words = []
    while len(words) < n:
        kind = rng.integers(14)
        if kind == 0:
            inside = " ".join(rng.choice(WORDS, rng.integers(1, 7)))
            words.append(rng.choice(BRACKETS).format(inside, rng.choice(WORDS)))
        elif kind == 1:
            words.append(str(rng.integers(1, 99_999)))
        elif kind == 2:
            words.append(f"{rng.choice(WORDS)},")
        elif kind == 3 and rng.random() < 0.6:
            words.append(rng.choice(topics))
        else:
            words.append(rng.choice(WORDS))
    return " ".join(words)


def write_texts(path, n, seed=0, lines=12):
    """Write documents as .jsonl, a source for open_corpus."""
    with open(path, "w", encoding="utf-8") as file:
        for text in texts(n, seed, lines):
            file.write(json.dumps({"text": text}) + "\n")

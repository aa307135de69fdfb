"""A language model that only matches strings, and a checkpoint with neurons for it to judge."""

import random
import re
import sys

import pytest
import torch

import interpret
from crate_mini.data.batches import open_corpus
from crate_mini.data.tokenizer import load_tokenizer
from crate_mini.judges.language_model import LanguageModel
from crate_mini.judges.queries import NoAnswer
from crate_mini.model import LM, preset
from crate_mini.training import checkpoint

T = 128  # context of the model
WORDS = ["code", "rate", "step", "sparse", "token", "head"]


class MatchingClient:
    """Level 10 where the explanation names the token, else 0, which passes no probe.

    It explains every neuron with the same words. asked: number of questions so far. failures: the
    numbers of those that it does not answer.
    """

    def __init__(self, failures=()):
        self.asked = 0
        self.failures = failures

    def ask(self, query):
        if query["ask"] == "can":
            return {"can": ["prompt logprobs"], "why": {}, "tokens": [0, 0]}
        self.asked += 1
        if self.asked in self.failures:
            raise NoAnswer("status 500")
        if query["ask"] == "text":
            return {"text": "the tokens of code", "tokens": [100, 4]}
        last = query["prompt"].split("\n\n")[-1]
        parts = re.fullmatch(r".*fires on: ([^\n]*)\nTokens:\n(.*)", last, re.DOTALL)
        explanation, lines = parts.groups()
        slots = []
        for line in lines.split("\n"):
            level = "10" if line.removesuffix("\t?") in explanation else "0"
            slots.append({level: -0.1})
        return {"slots": slots, "tokens": [100, 0]}


def run_interpret(monkeypatch, *words, failures=()):
    """Run interpret.py in this process with a MatchingClient for every model; returns it."""
    client = MatchingClient(failures)
    monkeypatch.setattr(LanguageModel, "client", client)
    monkeypatch.setattr(sys, "argv", ["interpret.py", *map(str, words)])
    interpret.main()
    return client


def scored_checkpoint(tmp_path_factory):
    """A checkpoint with scores from `interpret.py neurons`, made once for all tests.

    It has random weights. 24 neurons of each layer are scored; every fourth of layer 0 is dead.
    """
    folder = tmp_path_factory.getbasetemp() / "scored"
    if not folder.exists():
        folder.mkdir()
        make_scored_checkpoint(folder)
    return folder / "best"


def quiet(line):
    """A log that shows nothing."""


def make_scored_checkpoint(folder):
    """Write the checkpoint folder/best and the scores in folder/interpret."""
    generator = random.Random(0)
    text = folder / "text.txt"
    lines = [" ".join(generator.choices(WORDS, k=9)) + ".\n" for _ in range(2500)]
    text.write_text("".join(lines))
    torch.manual_seed(0)
    model = LM(preset("2L", "crate", vocab_size=257, block_size=T, n_embd=32, n_head=2))
    with torch.no_grad():
        model.tokens.weight *= 8
        model.blocks[0].sparsifier.D[:, ::4].zero_()
    tokenizer = load_tokenizer("bytes")
    settings = {"data": str(text), "val_fraction": 0.5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRATE_CACHE", str(folder / "cache"))
        corpus = open_corpus(str(text), tokenizer, val_fraction=0.5, log=quiet)
        checkpoint.save(
            folder / "best",
            model,
            tokenizer={"spec": "bytes", "hash": tokenizer.hash},
            training={"step": 0, "settings": settings, "corpus": corpus.meta},
        )
        run_interpret(
            patch, "neurons", folder / "best", "--controls", "none", "--n", 24, "--until", "score"
        )

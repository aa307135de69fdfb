"""Classifiers with random weights, large enough that every part of a state matters."""

from functools import cache

import torch

from crate_mini import model
from crate_mini.concepts.classifier import Classifier

KINDS = ("crate", "gpt2", "crate+")
D = 32
SPEC = "pydocs:511"  # the tokenizer that they fit
TEXTS = ["It's a fine, fine film!", "one", "never  seen\nsuch a thing before; not at all (2 of 10)"]


@cache
def random_classifier(kind):
    """A Classifier of three classes and three blocks, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = model.LM(model.preset("3L", kind, n_embd=D, block_size=64, vocab_size=512))
        for w in lm.parameters():
            w.data = w.data + 0.05 * torch.randn_like(w)
    classifier = Classifier(lm, 3, torch.Generator().manual_seed(1))
    classifier.double().eval().requires_grad_(False)
    classifier.head.weight.mul_(30)
    return classifier

"""A classifier that depends on one planted direction, and the codes that are this direction."""

import numpy as np
import torch

from crate_mini import model
from crate_mini.concepts import ablate
from crate_mini.concepts.classifier import Classifier
from crate_mini.concepts.types import SPLITS, Codes, Vectors

D = 32


class TableClassifier(Classifier):
    """States by the number of the text, its second id, in place of a network.

    table: (texts, T, D). The head reads the direction u (D,).
    """

    def __init__(self, table, u):
        super().__init__(model.LM(model.preset("1L", n_embd=D, block_size=16, vocab_size=400)), 2)
        self.table = table
        self.lm.norm = torch.nn.Identity()
        with torch.no_grad():
            self.head.weight.copy_(torch.stack([-u, u]))
            self.head.bias.zero_()

    def states(self, ids, layer=None):
        return self.table[ids[:, 1]]


def planted_concepts(n=240, strength=4.0):
    """(model, Vectors, Codes, SalientTexts) of n texts of one word, in two classes.

    The state that the head reads is +u or -u, by the class, plus noise; the codes are +-u.
    """
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    u = ablate.unit(torch.randn(D, generator=generator))
    label = torch.from_numpy(rng.permutation(np.arange(n) % 2))
    sign = (2.0 * label - 1)[:, None]
    h = 0.15 * torch.randn(n, D, generator=generator) + sign * u
    words = strength * sign * u + 0.3 * torch.randn(n, D, generator=generator)
    split = np.full(n, SPLITS["test"])
    split[: n // 6] = SPLITS["train"]
    vectors = Vectors(
        lower=words.numpy(),
        upper=words.numpy(),
        sentence=np.arange(n),
        word=label.numpy(),
        position=np.zeros(n),
        label=label.numpy(),
        split=split,
        vocabulary=["bad", "good"],
        classes=["neg", "pos"],
        facts={"layers": [1, 1]},
    )
    centroids = torch.stack([-strength * u, strength * u]).numpy()
    codes = Codes("planted", 0, label.numpy(), centroids)
    test = np.flatnonzero(split == SPLITS["test"])
    table = torch.zeros(n, 3, D)
    table[:, -1] = h
    ids = torch.zeros(n, 3, dtype=torch.long)
    ids[:, 1] = torch.arange(n)
    lengths = torch.full((len(test),), 3)
    texts = ablate.SalientTexts(test, test, ids[test], lengths, label[test], h[test], h[test])
    return TableClassifier(table, u), vectors, codes, texts

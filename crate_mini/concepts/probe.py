"""The original's probe, honestly: 20 stratified folds, each judged on texts that did not stop its training.

Linear(d, 64) - ReLU - dropout 0.2 - Linear(64, C), Adam 1e-3, batches of 32, at most 100 epochs, stopped
after 5 without +0.001 of accuracy. The original stops each probe by the fold that it is judged on; here by
another one. All states are centred and divided by one number, so that widths and models compare. All folds
train side by side, as one batch of small products.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from crate_mini import UserError

HIDDEN, DROPOUT, RATE, BATCH, EPOCHS, PATIENCE, GAIN = 64, 0.2, 1e-3, 32, 100, 5, 0.001


def deal(label, folds, seed):
    """(n,) fold of each text: every class shuffled and dealt round, so that folds have equal shares."""
    rng, fold, start = np.random.default_rng(seed), np.empty(len(label), np.int64), 0
    for c in np.unique(label):
        own = rng.permutation(np.flatnonzero(label == c))
        fold[own] = (start + np.arange(len(own))) % folds
        start += len(own)
    return fold


class Probes:
    """`folds` probes on states h (n, d) with label (n,): fold f is judged on the texts dealt to it, stopped
    by those of fold f + 1, trained on all others. `right` judges any change of the same states.

    Raises UserError for fewer than two texts a fold.
    """

    def __init__(self, h, label, n_classes, folds=20, seed=0):
        self.fold, self.folds = torch.from_numpy(deal(np.asarray(label), folds, seed)), folds
        self.label, d = torch.as_tensor(label), h.shape[1]
        if len(h) < 2 * folds:
            raise UserError(
                f"{len(h)} texts are too few for {folds} folds; give {2 * folds} or more, or "
                "fewer folds."
            )
        generator = torch.Generator().manual_seed(seed)

        def start(*shape):  # as torch's Linear: uniform within 1 / sqrt(inputs)
            return torch.empty(shape).uniform_(-1, 1, generator=generator) / math.sqrt(shape[1])

        self.mean, self.std = h.mean(0), h.std()
        self.weights = [
            start(folds, d, HIDDEN),
            torch.zeros(folds, 1, HIDDEN),
            start(folds, HIDDEN, n_classes),
            torch.zeros(folds, 1, n_classes),
        ]
        self.train(h, generator)

    def logits(self, x, mask=1.0):
        """(folds, m, C) of x (folds, m, d) or (m, d); mask: dropout's."""
        U, b, V, c = self.weights
        x = ((x - self.mean) / self.std).expand(self.folds, -1, -1)
        return (F.relu(x @ U + b) * mask) @ V + c

    def train(self, h, generator):
        """Adam on all probes; each keeps the weights of its best epoch on its own stopping fold."""
        f = torch.arange(self.folds)[:, None]
        uses = (self.fold != f) & (self.fold != (f + 1) % self.folds)  # (folds, n)
        stops = self.fold == (f + 1) % self.folds
        n = int(uses.sum(1).min())
        for w in self.weights:
            w.requires_grad_()
        optimizer = torch.optim.Adam(self.weights, RATE)
        best, since = torch.full((self.folds,), -1.0), torch.zeros(self.folds)
        kept = [w.detach().clone() for w in self.weights]
        for _ in range(EPOCHS):
            key = torch.rand(uses.shape, generator=generator).masked_fill(~uses, 2)
            for rows in key.argsort(1)[:, :n].split(BATCH, 1):  # (folds, batch)
                mask = torch.rand(*rows.shape, HIDDEN, generator=generator) >= DROPOUT
                found = self.logits(h[rows], mask / (1 - DROPOUT))
                loss = F.cross_entropy(
                    found.flatten(0, 1), self.label[rows].flatten(), reduction="sum"
                )
                optimizer.zero_grad()
                (loss / rows.shape[1]).backward()
                optimizer.step()
            with torch.no_grad():
                hit = self.logits(h).argmax(2) == self.label
                score = (hit & stops).sum(1) / stops.sum(1).clamp(min=1)
            better = (score > best + GAIN) & (since < PATIENCE)
            since = torch.where(better, 0, since + 1)
            best = torch.where(better, score, best)
            for old, new in zip(kept, self.weights):
                old[better] = new.detach()[better]
            if (since >= PATIENCE).all():
                break
        self.weights = kept

    @torch.no_grad()
    def right(self, h):
        """(n,) bool: is each text, in state h (n, d), told right by the probe that has not seen it?"""
        found = self.logits(h)[self.fold, torch.arange(len(h))]
        return (found.argmax(1) == self.label).numpy()

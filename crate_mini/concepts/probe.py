"""The authors' probe, cross-validated: no text is judged by a probe that saw it or stopped by it.

Linear(d, 64) - ReLU - dropout 0.2 - Linear(64, C), Adam 1e-3, batches of 32, at most 100 epochs,
stopped after 5 without +0.001 of accuracy. The authors stop each probe by the fold that it is
judged on; here by another one. All states are centred and divided by one number, so that widths and
models compare. The probes of all folds train side by side, as one batch of small products.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from crate_mini import UserError

HIDDEN = 64
DROPOUT = 0.2
RATE = 1e-3
BATCH = 32
EPOCHS = 100
PATIENCE = 5
GAIN = 0.001  # of accuracy on the stopping fold, below which an epoch does not count as better


def stratified_folds(label, folds, seed):
    """(n,) fold of each text; every class is shuffled and dealt out evenly."""
    rng = np.random.default_rng(seed)
    fold = np.empty(len(label), np.int64)
    start = 0
    for c in np.unique(label):
        members = rng.permutation(np.flatnonzero(label == c))
        fold[members] = (start + np.arange(len(members))) % folds
        start += len(members)
    return fold


class Probes:
    """`folds` probes on states h (n, d) with label (n,).

    Probe f is judged on fold f, stopped by fold f + 1, and trained on all others. `right` judges
    any change of the same states. Raises UserError for fewer than two texts a fold.
    """

    def __init__(self, h, label, n_classes, folds=20, seed=0):
        if len(h) < 2 * folds:
            raise UserError(
                f"{len(h)} texts are too few for {folds} folds; give {2 * folds} or more, or "
                "fewer folds."
            )
        self.folds = folds
        self.fold = torch.from_numpy(stratified_folds(np.asarray(label), folds, seed))
        self.label = torch.as_tensor(label)
        self.mean = h.mean(0)
        self.std = h.std()
        generator = torch.Generator().manual_seed(seed)
        U = uniform(folds, h.shape[1], HIDDEN, generator)
        V = uniform(folds, HIDDEN, n_classes, generator)
        self.weights = [U, torch.zeros(folds, 1, HIDDEN), V, torch.zeros(folds, 1, n_classes)]
        self._train(h, generator)

    def logits(self, x, mask=1.0):
        """(folds, m, C) of x (m, d) or (folds, m, d); mask: of dropout."""
        U, b, V, c = self.weights
        x = ((x - self.mean) / self.std).expand(self.folds, -1, -1)
        hidden = F.relu(x @ U + b) * mask
        return hidden @ V + c

    def _train(self, h, generator):
        """Adam on all probes; each keeps the weights of its best epoch on its own stopping fold."""
        probe = torch.arange(self.folds)[:, None]
        stops = self.fold == (probe + 1) % self.folds  # (folds, n)
        trains = (self.fold != probe) & ~stops
        for w in self.weights:
            w.requires_grad_()
        optimizer = torch.optim.Adam(self.weights, RATE)
        best_score = torch.full((self.folds,), -1.0)
        best_weights = [w.detach().clone() for w in self.weights]
        since_best = torch.zeros(self.folds)
        for _ in range(EPOCHS):
            self._epoch(h, trains, optimizer, generator)
            with torch.no_grad():
                right = self.logits(h).argmax(2) == self.label
            score = (right & stops).sum(1) / stops.sum(1).clamp(min=1)
            better = (score > best_score + GAIN) & (since_best < PATIENCE)
            since_best = torch.where(better, 0, since_best + 1)
            best_score = torch.where(better, score, best_score)
            for best, w in zip(best_weights, self.weights):
                best[better] = w.detach()[better]
            if (since_best >= PATIENCE).all():
                break
        self.weights = best_weights

    def _epoch(self, h, trains, optimizer, generator):
        """One epoch of all probes; trains: (folds, n), which texts each of them is trained on."""
        n = int(trains.sum(1).min())
        key = torch.rand(trains.shape, generator=generator).masked_fill(~trains, 2)
        shuffled = key.argsort(1)[:, :n]  # (folds, n) of its own texts, for each probe
        for rows in shuffled.split(BATCH, 1):
            mask = torch.rand(*rows.shape, HIDDEN, generator=generator) >= DROPOUT
            logits = self.logits(h[rows], mask / (1 - DROPOUT))
            label = self.label[rows]
            loss = F.cross_entropy(logits.flatten(0, 1), label.flatten(), reduction="sum")
            optimizer.zero_grad()
            (loss / rows.shape[1]).backward()
            optimizer.step()

    @torch.no_grad()
    def right(self, h):
        """(n,) bool: whether each text, in state h (n, d), is classified right by its own probe."""
        logits = self.logits(h)[self.fold, torch.arange(len(h))]
        return (logits.argmax(1) == self.label).numpy()


def uniform(folds, n_in, n_out, generator):
    """Weights (folds, n_in, n_out) as torch's Linear starts: uniform within 1 / sqrt(n_in)."""
    weights = torch.empty(folds, n_in, n_out).uniform_(-1, 1, generator=generator)
    return weights / math.sqrt(n_in)

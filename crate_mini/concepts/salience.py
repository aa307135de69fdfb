"""The word that most decided a prediction: integrated gradients at the lower layer.

The path runs from the states of a text of marks alone (<|endoftext|> at every position, what the
model has before anything is written) to the states of the text, at the output of block `layer`; the
target is the logit of the predicted class. Attributions then add up to the difference of that logit
between both ends (completeness, Sundararajan et al. 2017), up to the error of the quadrature, which
`gap` measures. The path does not start at 0: LayerNorm sees the same direction all along a path
from 0, so that everything would happen in the first step.
"""

from dataclasses import dataclass

import numpy as np
import torch

from crate_mini.concepts.classifier import batches
from crate_mini.console import terminal

NODES = 16  # of the Gauss-Legendre rule; take more where `gap` is large


@dataclass
class Salience:
    """The salient words of n texts; all arrays (n,).

    position: number of the salient word in its text, -1 in a text without words. difference: of
    the logit of the predicted class between text and baseline. gap: sum of the attributions minus
    that difference.
    """

    sentence: np.ndarray
    position: np.ndarray
    predicted: np.ndarray
    difference: np.ndarray
    gap: np.ndarray

    def facts(self, nodes):
        """How complete the attributions are; gaps as shares of the mean |difference|."""
        size = np.abs(self.difference).mean() or 1.0
        return {
            "texts": len(self.gap),
            "without_words": int((self.position < 0).sum()),
            "nodes": nodes,
            "mean_difference": float(size),
            "gap_mean": float(np.abs(self.gap).mean() / size),
            "gap_max": float(np.abs(self.gap).max() / size),
        }


def attributions(model, ids, lengths, layer, nodes=NODES):
    """Integrated gradients of the states of ids (B, T) at one layer.

    Returns (attribution (B, T) of each token, predicted class (B,), difference (B,) of its logit).
    """
    marks = torch.full_like(ids[:1], int(ids[0, 0]))
    with torch.no_grad():
        z = model.states(ids, layer)
        baseline = model.states(marks, layer)
        logits, _ = model.run_from(z, layer, lengths)
        baseline_logits, _ = model.run_from(baseline.expand_as(z), layer, lengths)
    predicted = logits.argmax(1, keepdim=True)
    points, weights = np.polynomial.legendre.leggauss(nodes)  # on -1 .. 1
    gradient = torch.zeros_like(z)
    for a, weight in zip((points + 1) / 2, weights / 2):
        point = (baseline + a * (z - baseline)).requires_grad_()
        target = model.run_from(point, layer, lengths)[0].gather(1, predicted).sum()
        gradient += weight * torch.autograd.grad(target, point)[0]
    attribution = ((z - baseline) * gradient).sum(-1)
    difference = (logits - baseline_logits).gather(1, predicted)[:, 0]
    return attribution, predicted[:, 0], difference


def find_salient_words(model, text, rows, layer, nodes=NODES, size=32):
    """The Salience of the texts `rows` (n,) of TextWords.

    A word counts as much as its token with the largest |attribution|. The authors take the largest
    attribution and then its absolute value, which passes over words that speak against the class.
    """
    device = model.head.weight.device
    parts = []
    for batch, T in terminal.track(list(batches(rows, text.lengths, size)), "salience"):
        ids = text.ids[batch, :T].to(device)
        results = attributions(model, ids, text.lengths[batch], layer, nodes)
        by_token, predicted, difference = (t.cpu().numpy() for t in results)
        word_of = text.word_of[batch.numpy(), :T]
        score = np.where(word_of >= 0, np.abs(by_token), -1.0)
        position = word_of[np.arange(len(batch)), score.argmax(1)]
        gap = by_token.sum(1) - difference
        parts.append((batch.numpy(), position, predicted, difference, gap))
    return Salience(*map(np.concatenate, zip(*parts)))

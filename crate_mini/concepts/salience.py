"""The word that most decided a prediction: integrated gradients at the lower layer.

The path runs from the states of a text of marks alone (<|endoftext|> at every position, what the
model has before anything is written) to the states of the text, at the output of block `layer`; the
target is the logit of the predicted class. Attributions then add up to the difference of that logit
between both ends (completeness, Sundararajan et al. 2017), up to the error of the quadrature, which
`gap` measures. The path does not start at 0: LayerNorm sees the same direction all along a path
from 0, so that everything would happen in the first step.

How many points a path needs differs from text to text, so the points of a text are doubled until
its own gap is small.
"""

from dataclasses import dataclass

import numpy as np
import torch

from crate_mini.concepts.classifier import batches
from crate_mini.console import terminal

NODES = 16  # of the Gauss-Legendre rule, at first
MOST_NODES = 256
TOLERANCE = 0.02  # largest gap of a text, as a share of its difference
FLOOR = 0.1  # of the mean |difference|: a smaller one counts as this much


@dataclass
class Salience:
    """The salient words of n texts; all arrays (n,).

    position: number of the salient word in its text, -1 in a text without words. difference: of
    the logit of the predicted class between text and baseline. gap: sum of the attributions minus
    that difference. nodes: points on the path.
    """

    sentence: np.ndarray
    position: np.ndarray
    predicted: np.ndarray
    difference: np.ndarray
    gap: np.ndarray
    nodes: np.ndarray

    def relative_gap(self):
        """(n,) |gap| as a share of the text's own |difference|, of FLOOR of the mean at least.

        Where the difference is near 0, its share would ask for more digits than float32 has.
        """
        size = np.abs(self.difference)
        floor = FLOOR * size.mean() or 1.0
        return np.abs(self.gap) / np.maximum(size, floor)

    def facts(self, tolerance=TOLERANCE):
        """How complete the attributions are: a JSON-able dict.

        nodes: {points: texts that took them}. gap_mean, gap_max: of `relative_gap`. above: texts
        whose gap stayed above the tolerance.
        """
        points, texts = np.unique(self.nodes, return_counts=True)
        gap = self.relative_gap()
        return {
            "texts": len(gap),
            "without_words": int((self.position < 0).sum()),
            "nodes": dict(zip(map(str, points.tolist()), texts.tolist())),
            "tolerance": tolerance,
            "mean_difference": float(np.abs(self.difference).mean()),
            "gap_mean": float(gap.mean()),
            "gap_max": float(gap.max()),
            "above": int((gap > tolerance).sum()),
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


def find_salient_words(
    model, text, rows, layer, nodes=NODES, tolerance=TOLERANCE, most_nodes=MOST_NODES, size=32
):
    """The Salience of the texts `rows` (n,) of TextWords.

    Every text gets `nodes` points; those whose `relative_gap` is above the tolerance get twice as
    many, again and again, up to `most_nodes`. A word counts as much as its token with the largest
    |attribution|. The authors take the largest attribution and then its absolute value, which
    passes over words that speak against the class.
    """
    found = with_nodes(model, text, rows, layer, nodes, size)
    rest = np.flatnonzero(found.relative_gap() > tolerance)
    while len(rest) and nodes < most_nodes:
        nodes = min(2 * nodes, most_nodes)
        better = with_nodes(model, text, found.sentence[rest], layer, nodes, size)
        for name, values in vars(better).items():
            getattr(found, name)[rest] = values
        rest = np.flatnonzero(found.relative_gap() > tolerance)
    return found


def with_nodes(model, text, rows, layer, nodes, size):
    """The Salience of the texts `rows` (n,), in their order, with the same points for all."""
    device = model.head.weight.device
    parts = []
    for batch, T in terminal.track(list(batches(rows, text.lengths, size)), f"salience {nodes}"):
        ids = text.ids[batch, :T].to(device)
        results = attributions(model, ids, text.lengths[batch], layer, nodes)
        by_token, predicted, difference = (t.cpu().numpy() for t in results)
        word_of = text.word_of[batch.numpy(), :T]
        score = np.where(word_of >= 0, np.abs(by_token), -1.0)
        position = word_of[np.arange(len(batch)), score.argmax(1)]
        gap = by_token.sum(1) - difference
        points = np.full(len(batch), nodes)
        parts.append((batch.numpy(), position, predicted, difference, gap, points))
    return Salience(*map(np.concatenate, zip(*parts)))

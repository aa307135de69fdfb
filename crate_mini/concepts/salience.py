"""Which word made the classifier decide so: integrated gradients at the lower layer.

The path runs from the states of a text of marks alone (<|endoftext|> at every place, what the model has when
nothing is said) to the text's own, at the output of block `layer`; the target is the predicted class' logit.
Attributions then add up to the difference of that logit between the two ends (completeness, Sundararajan et
al. 2017), up to the error of the quadrature: `gap` says how far off they are. Not zeros: a LayerNorm sees the
same direction all along a path from 0, so that everything would happen at its first step.
"""

from dataclasses import dataclass

import numpy as np
import torch

from crate_mini.concepts.classifier import batches

NODES = 16  # of the Gauss-Legendre rule; more where `gap` is large


@dataclass
class Salience:
    """Of n texts: sentence (n,), position (n,) of the salient word, -1 in a text without words; predicted
    (n,) class; difference (n,) of its logit between text and baseline; gap (n,): the attributions'
    sum less it."""

    sentence: np.ndarray
    position: np.ndarray
    predicted: np.ndarray
    difference: np.ndarray
    gap: np.ndarray

    def facts(self, nodes):
        """How complete the attributions of so many nodes are: gaps as shares of the mean |difference|."""
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
    """(attribution (B, T) of each token's state, predicted (B,), difference (B,)) of ids (B, T)."""
    with torch.no_grad():
        z, base = (model.states(x, layer) for x in (ids, torch.full_like(ids[:1], int(ids[0, 0]))))
        ends, starts = (model.onward(x, layer, lengths)[0] for x in (z, base.expand_as(z)))
    predicted = ends.argmax(1, keepdim=True)
    places, weights = np.polynomial.legendre.leggauss(nodes)  # on -1 .. 1
    total = torch.zeros_like(z)
    for a, weight in zip((places + 1) / 2, weights / 2):
        point = (base + a * (z - base)).requires_grad_()
        of = model.onward(point, layer, lengths)[0].gather(1, predicted).sum()
        total += weight * torch.autograd.grad(of, point)[0]
    return ((z - base) * total).sum(-1), predicted[:, 0], (ends - starts).gather(1, predicted)[:, 0]


def salience(model, text, rows, layer, nodes=NODES, size=32, track=iter):
    """Salience of the texts `rows` (n,) of a states.Text; track: what shows progress over a list.

    A word counts as much as the token of it with the largest |attribution| (the original takes the largest
    attribution and then its absolute value, which passes over words that only speak against the class).
    """
    device, found = model.head.weight.device, []
    for part, T in track(list(batches(rows, text.lengths, size))):
        by_token, *rest = (
            t.cpu().numpy()
            for t in attributions(
                model, text.ids[part, :T].to(device), text.lengths[part], layer, nodes
            )
        )
        number = text.number[part.numpy(), :T]
        score = np.where(number >= 0, np.abs(by_token), -1.0)
        at = score.argmax(1)
        position = number[np.arange(len(part)), at]
        found.append((part.numpy(), position, *rest, by_token.sum(1) - rest[1]))
    return Salience(*(np.concatenate(column) for column in zip(*found)))

"""Neuron2Graph: the shortest patterns of tokens that keep half of a neuron's activation.

Foote et al. 2023, in the compact form of OpenAI's SAE paper (Gao et al. 2024): one pattern per
excerpt, without a language model that varies it.
"""

import numpy as np
import torch

from crate_mini.neurons.metrics import rounded

# Edges of the trie that are not token ids.
ANY = -2  # any token
END = -3  # the value of a pattern that ends here
BEGIN = -4  # the same, for a pattern that begins a context


class Trie:
    """Patterns over the last tokens, read backwards; the shortest that matches gives the value.

    A pattern lists tokens from the newest to the oldest, ANY for one that does not matter. An
    anchored pattern matches only where the context begins with it.
    """

    def __init__(self):
        self.root, self.patterns = {}, []

    @classmethod
    def of(cls, patterns):
        """The Trie with these `patterns`, as another one lists them."""
        trie = cls()
        for pattern, value, anchored in patterns:
            trie.add(pattern, value, anchored)
        return trie

    def add(self, pattern, value, anchored=False):
        """Add a pattern; of equal ones the largest value counts."""
        pattern = [int(token) for token in pattern]
        node = self.root
        for token in pattern:
            node = node.setdefault(token, {})
        end = BEGIN if anchored else END
        node[end] = max(value, node.get(end, value))
        self.patterns.append([pattern, rounded(value), bool(anchored)])

    def __call__(self, tokens):
        """tokens (n, w + 1) -> (n, w) expected activations, 0 where no pattern matches."""
        n, columns = tokens.shape
        expected = np.zeros((n, columns - 1), np.float32)
        for i, row in enumerate(tokens.tolist()):
            for t in range(1, columns):
                expected[i, t - 1] = self._match(row, t)
        return expected

    def _match(self, row, t):
        """The value of the shortest pattern that ends at row[t], 0 if there is none."""
        nodes = [self.root]  # reached by the patterns that match so far
        while nodes and t >= 0 and row[t] >= 0:
            edges = (row[t], ANY)
            nodes = [node[edge] for node in nodes for edge in edges if edge in node]
            t -= 1
            at_beginning = t >= 0 and row[t] < 0
            for node in nodes:
                if END in node:
                    return node[END]
                if at_beginning and BEGIN in node:
                    return node[BEGIN]
        return 0.0


def fit_trie(activate, excerpts, pad, ratio=0.5, longest=32):
    """The Trie of excerpts [(ids up to the token that fires, its activation)].

    activate: a list of id lists -> the activation at the last token of each. The pattern of an
    excerpt is its shortest suffix, of at most `longest` tokens, that keeps `ratio` of the
    activation. It is anchored if it keeps less with a `pad` token in front; a token in it is
    literal if `pad` in its place costs `ratio` or more. A pattern without literal tokens would fire
    everywhere and hide the others, so it is left out.
    """
    trie = Trie()
    for ids, value in excerpts:
        suffix, full = _shortest_suffix(activate, ids[-longest:], value, ratio)
        if suffix is None:
            continue
        variants = [[pad, *suffix]]
        for i in range(len(suffix)):
            variants.append([*suffix[:i], pad, *suffix[i + 1 :]])
        padded, *without = activate(variants)
        pattern = []
        for token, activation in zip(suffix, without):
            pattern.append(token if full - activation >= ratio * full else ANY)
        if set(pattern) != {ANY}:
            trie.add(pattern[::-1], value, anchored=padded < ratio * full)
    return trie


def _shortest_suffix(activate, ids, value, ratio):
    """(shortest suffix of ids with `ratio` of the activation `value`, its own), or (None, None)."""
    suffixes = [ids[-n:] for n in range(1, len(ids) + 1)]
    for suffix, activation in zip(suffixes, activate(suffixes)):
        if activation >= ratio * value > 0:
            return suffix, activation
    return None, None


def activation_at_end(model, layer, j, encode=None):
    """The `activate` of fit_trie for neuron j of a layer, or of its features if `encode` is given.

    Each list of ids is a whole context.
    """
    device = next(model.parameters()).device

    @torch.no_grad()
    def activate(rows):
        lengths = torch.tensor([len(row) for row in rows], device=device)
        longest = int(lengths.max())
        padded = [row + [0] * (longest - len(row)) for row in rows]
        codes = model.trunk(torch.tensor(padded, device=device))[1][layer]  # (B, T, h)
        last = codes[torch.arange(len(rows), device=device), lengths - 1]
        if encode is not None:
            last = encode(last.float())
        return last[:, j].float().tolist()

    return activate


def precision_recall(true, predicted, level):
    """{"precision", "recall", "f1"} of firing, which means `level` or more.

    None for 0 / 0, and if the neuron fires everywhere, so that nothing could be wrong.
    """
    fires, predicted_fires = true >= level, predicted >= level
    if fires.all():
        return dict.fromkeys(("precision", "recall", "f1"))
    hits = int((fires & predicted_fires).sum())
    n_true, n_predicted = int(fires.sum()), int(predicted_fires.sum())
    return {
        "precision": hits / n_predicted if n_predicted else None,
        "recall": hits / n_true if n_true else None,
        "f1": 2 * hits / (n_true + n_predicted) if n_true or n_predicted else None,
    }

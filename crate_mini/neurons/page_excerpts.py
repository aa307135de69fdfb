"""Excerpts of a neuron for its page: top windows, windows across its range, random windows."""

from operator import itemgetter

import numpy as np

from crate_mini.neurons.metrics import rounded

TOKENS = 24  # of an excerpt on a page
TOP = 5  # top windows of each part
PER_FIFTH = 2  # windows of each fifth of the neuron's range
RANDOM = 3  # windows drawn from all


def of_site(work, site, simulated):
    """A dict for each scored neuron of a site: {"top", "intervals", "random"}, lists of excerpts.

    Windows of the score part show the activations that the n-gram table expects; the table was
    made from the fit part, whose windows show none. simulated: what the stage `simulate` wrote.
    """
    neurons, arrays = work.neurons(site), work.record.site(site.name)
    ngram = work.ngram_table(site, neurons)
    rows = []
    for i, j in enumerate(neurons.tolist()):
        windows = _UniformWindows(work.record.shared, arrays, simulated, i, j)
        rng = np.random.default_rng([work.seed, j])
        order = rng.permutation(len(windows.peaks))
        count = min(RANDOM, len(windows.peaks))
        drawn = rng.choice(len(windows.peaks), count, replace=False)
        across = windows.across_range(order, max(float(arrays["max"][j]), 1e-30))
        rows.append(
            {
                "top": _top(arrays, ngram, i, j),
                "intervals": [windows.excerpt(window) for window in across],
                "random": [windows.excerpt(window) for window in drawn],
            }
        )
    return rows


def _top(arrays, ngram, i, j):
    """Excerpts of the top windows of both parts, the largest peak first."""
    ranked = []
    for part in ("fit", "score"):
        acts, documents = arrays[f"top_{part}_acts"][j], arrays[f"top_{part}_doc"][j]
        for k in range(TOP):
            if documents[k] >= 0:
                ranked.append((float(acts[k].max()), part, k))
    ranked.sort(key=itemgetter(0), reverse=True)
    shown = []
    for _, part, k in ranked:
        tokens, acts = arrays[f"top_{part}_tokens"][j, k], arrays[f"top_{part}_acts"][j, k]
        expected = ngram(tokens[None], i)[0] if part == "score" else None
        shown.append(excerpt(tokens, acts, expected, arrays[f"top_{part}_doc"][j, k], part))
    return shown


class _UniformWindows:
    """The uniform windows of the score part, with the activations of neuron j, the i-th scored."""

    def __init__(self, shared, arrays, simulated, i, j):
        self.tokens, self.documents = shared["uniform_score"], shared["uniform_score_doc"]
        self.acts = arrays["uniform_score_acts"][..., j]
        self.expected = simulated.uniform_ngram[..., i]
        self.peaks = self.acts.max(1).astype(np.float32)

    def excerpt(self, window):
        """The excerpt around the peak of one window."""
        return excerpt(
            self.tokens[window],
            self.acts[window],
            self.expected[window],
            self.documents[window],
            "score",
        )

    def across_range(self, order, largest):
        """Windows whose peak lies in each fifth of 0 to `largest`, the highest fifth first.

        Of each fifth the first few in `order`, sorted by their peak; windows without a positive
        value are in none.
        """
        steps = np.minimum(np.floor(5 * (self.peaks / largest)), 4)
        fifth = np.where(self.peaks > 0, steps, -1)
        chosen = []
        for step in (4, 3, 2, 1, 0):
            windows = [window for window in order if fifth[window] == step][:PER_FIFTH]
            chosen += sorted(windows, key=self.peaks.__getitem__, reverse=True)
        return chosen


def excerpt(tokens, acts, expected, document, part):
    """TOKENS tokens of a window that hold its peak; JSON-able.

    tokens (65,), acts and expected (64,); expected may be None. "at": the place of the peak.
    """
    peak = int(np.argmax(acts))
    start = int(np.clip(peak - TOKENS // 2, 0, len(acts) - TOKENS))
    shown = slice(start, start + TOKENS)
    return {
        "tokens": tokens[1:][shown].tolist(),
        "acts": [rounded(value, 3) for value in acts[shown]],
        "sim": None if expected is None else [rounded(value, 3) for value in expected[shown]],
        "at": peak - start,
        "doc": int(document),
        "part": part,
    }

"""Simulators without a language model: they predict activations from the tokens alone.

    NgramTable      mean activation by previous and current token, else by current token, else the
                    mean: `ngram`
    TokenTable      the same by current token alone: `token`
    ShortTable      by a few tokens alone: those of a label (`label@10`), or of five excerpts, which
                    are all that a language model would be shown

labels.py makes the labels, trie.py holds one more simulator. All are called with tokens
(.., w + 1), whose column 0 is the token before the window (-1: none), and return the expected
activations (.., w). The first two know all neurons of a site: they return (.., w, h), or (.., w)
for neuron j, an int or ints that broadcast against (.., w).

V tokens, h neurons of a site, P frequent bigrams.
"""

import numpy as np

from crate_mini.neurons.labels import LABEL_TOKENS

# Pseudo-counts of a mean by token and of a mean by bigram, as good as the best of a grid on 18,000
# and on 250,000 tokens.
SHRINK = (0.5, 10.0)
SAW = {  # one line under each table of results
    "token": "token_r: saw the current token only (mean activation per token over the fit part, "
    "shrunk).",
    "ngram": "ngram_r: saw the last two tokens only (mean per frequent pair, else per token, "
    "shrunk); r is predictability from them, not meaning.",
    "label": f"label_r@{LABEL_TOKENS}: saw only the tokens of the printed label (up to "
    f"{LABEL_TOKENS}) and their means.",
    "null": "null_r: the ngram table of another neuron of the same site, drawn by the seed.",
    "init": "init_r: ngram_r of the same architecture at random initialisation, same corpus and "
    "windows.",
    "five excerpts": "five excerpts: saw the tokens of five excerpts, those a language model would "
    "be shown: the number its explanation has to beat.",
    "trie": "trie: saw up to 32 tokens of context through patterns of the top excerpts of the fit "
    "part.",
}


class TokenTable:
    """Expected activation by current token.

    values (V + 1, h): the last row, reached as -1, stands for no token.
    """

    def __init__(self, values):
        self.values = values

    def __call__(self, tokens, j=slice(None)):
        """tokens (.., w + 1) -> (.., w, h), or (.., w) of neurons j."""
        return self.values[tokens[..., 1:], j]


class NgramTable(TokenTable):
    """Means by bigram over means by token over the mean, each shrunk towards the next.

        m_v  = (sum over the tokens v + k m) / (c_v + k)
        m_uv = (sum over the bigrams uv + k' m_v) / (c_uv + k')

    as if k more tokens had been seen with the activation that is expected without them. As
    recorded: counts (V,), token_sum (V, h), pairs (P, 2), pair_counts (P,), pair_sum (P, h).
    shrink: k and k', numbers or (h,).
    """

    def __init__(self, counts, token_sum, pairs, pair_counts, pair_sum, shrink=SHRINK):
        k, k_pair = shrink
        self.counts = counts
        self.token_sum = token_sum
        self.mean = token_sum.sum(0) / max(counts.sum(), 1)
        means = (token_sum + k * self.mean) / (counts[:, None] + k)
        super().__init__(np.concatenate((means, self.mean[None])).astype(np.float32))
        keys = pairs[:, 0].astype(np.int64) * len(counts) + pairs[:, 1]
        order = np.argsort(keys)
        self.keys = keys[order]
        self.pairs = pairs[order]
        self.pair_counts = pair_counts[order]
        sums = pair_sum[order] + k_pair * self.values[self.pairs[:, 1]]
        self.pair_values = (sums / (self.pair_counts[:, None] + k_pair)).astype(np.float32)

    def find(self, tokens):
        """(bool (.., w), their numbers): which of tokens (.., w + 1) end a frequent bigram."""
        previous = tokens[..., :-1].astype(np.int64)
        current = tokens[..., 1:]
        if not len(self.keys):
            return np.zeros(current.shape, bool), np.zeros(0, np.int64)
        keys = previous * len(self.counts) + current
        keys = np.where((previous < 0) | (current < 0), -1, keys)
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        known = self.keys[place] == keys
        return known, place[known]

    def __call__(self, tokens, j=slice(None)):
        """tokens (.., w + 1) -> (.., w, h), or (.., w) of neurons j."""
        expected = super().__call__(tokens, j)
        known, numbers = self.find(tokens)
        if not isinstance(j, slice):
            j = np.broadcast_to(j, known.shape)[known]
        expected[known] = self.pair_values[numbers, j]
        return expected


class ShortTable:
    """A table of a few tokens, for one neuron: {id: activation}, and one value for all others."""

    def __init__(self, values, rest):
        self.ids = np.array(sorted(values), dtype=np.int64)
        self.values = np.array([values[i] for i in self.ids.tolist()], np.float32)
        self.rest = rest

    def __call__(self, tokens):
        """tokens (n, w + 1) -> (n, w)."""
        current = tokens[:, 1:]
        if not len(self.ids):
            return np.full(current.shape, self.rest, np.float32)
        place = np.minimum(np.searchsorted(self.ids, current), len(self.ids) - 1)
        known = self.ids[place] == current
        return np.where(known, self.values[place], np.float32(self.rest))


def excerpt_table(tokens, acts, shrink=0.3):
    """The ShortTable of a few excerpts of a neuron; tokens (n, w + 1), -1 padding; acts (n, w)."""
    current = tokens[:, 1:]
    real = current >= 0
    ids, index, counts = np.unique(current[real], return_inverse=True, return_counts=True)
    acts = acts[real]
    mean = float(acts.mean()) if len(ids) else 0.0
    sums = np.bincount(index, acts, minlength=len(ids))
    means = (sums + shrink * mean) / (counts + shrink)
    return ShortTable(dict(zip(ids.tolist(), means.tolist())), mean)


def label_table(label):
    """The ShortTable of what a label shows: its tokens at their printed means, others at `rest`."""
    means = {id: mean for id, mean, *_ in label["tokens"]}
    return ShortTable(means, label["rest"])

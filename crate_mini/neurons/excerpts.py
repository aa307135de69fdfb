"""Select: the excerpts of one neuron that a protocol explains on and scores on, from a record.

    protocol          fit (documents of the fit part)        score (documents of the score part)
    uniform           128 uniform windows                    256 uniform windows
    openai_tar        5 top                                  5 top, 5 random
    openai_random     5 top                                  the same 5 random
    anthropic_crate   15 top, 2 from each of 11 rank         top 16-25, 2 from each of 11 rank
                      intervals, 5 random: 42                intervals, 5 random, top 26-35 out of
                                                             context: 47
    anthropic_2023    10 top, 2 from each of 12 value        6 top, 2 from each of 12 value
                      intervals, 5 random, 10 top tokens     intervals, 10 random, 20 top tokens out
                      out of context: 49                     of context: 60

uniform and openai (Bills et al. 2023) take windows of 64 tokens, anthropic excerpts of 8 that begin
4 before the chosen position. A top excerpt lies around the peak of a top window. Everything else
comes from the uniform windows of the part:

    random            a random position in each of several windows
    rank interval     of n (CRATE-LM's code): interval i < n - 1 holds the positions from i/n to
                      (i+1)/n of the ascending order of activations, ties in random order
    value interval    (Bricken et al. 2023): interval i < 12 holds the positions where
                      i/13 < a/max <= (i+1)/13, with the max of the part; i = 12 would be the top
    out of context    in the paper's code the peak with one neighbour on each side; in Bricken et
                      al. the token of a top peak where it occurs in any other window

A neuron that fires too rarely gets fewer excerpts. Activations are always those recorded in the
full context.
"""

import zlib
from dataclasses import dataclass

import numpy as np

from crate_mini import UserError
from crate_mini.neurons.documents import PARTS, WINDOW

SHORT = 8  # tokens of an anthropic excerpt
BEFORE = 4  # of them before the chosen position
RANK_INTERVALS = 12  # with the top one, which is left out
VALUE_INTERVALS = 13


@dataclass
class Excerpts:
    """n excerpts of at most w tokens, with the activations of one neuron.

    Shorter excerpts are padded with token -1 and activation NaN.
    """

    tokens: np.ndarray  # (n, w + 1) int32: the token before the excerpt (-1: none), then its own
    acts: np.ndarray  # (n, w) float32
    doc: np.ndarray  # (n,) document
    position: np.ndarray  # (n,) the token that the excerpt was chosen for
    origin: list  # n of "top", "interval 3", "random", "out of context", "uniform"


def select(record, site, protocol, neuron, seed=0):
    """(fit, score): the Excerpts of a site's neuron under a protocol.

    The same seed gives the same excerpts; the draws for one part do not affect the other. Raises
    UserError for an unknown protocol or neuron.
    """
    if protocol not in SELECTORS:
        raise UserError(f"protocol {protocol!r} is unknown; choose among {', '.join(SELECTORS)}.")
    width = len(record.site(site)["max"])
    if not 0 <= neuron < width:
        raise UserError(f"{site} has no neuron {neuron}; its neurons are 0 to {width - 1}.")
    # Both openai protocols draw the same random windows.
    family = "openai" if protocol.startswith("openai") else protocol
    key = zlib.crc32(f"{site}/{family}".encode())
    selected = []
    for i, part in enumerate(PARTS):
        pool = Pool(record, site, part, neuron, seed=[seed, key, neuron, i])
        selected.append(SELECTORS[protocol](pool, part == "score"))
    return tuple(selected)


@dataclass
class Windows:
    """n windows with the activations of one neuron."""

    tokens: np.ndarray  # (n, 65)
    acts: np.ndarray  # (n, 64) float32
    doc: np.ndarray  # (n,)


class Pool:
    """The windows of one part to choose from: the neuron's top ones, best first, and uniform ones.

    A choice is a list of (window, position); `take` cuts an excerpt around each, `excerpts`
    returns what was taken.
    """

    def __init__(self, record, site, part, neuron, seed):
        arrays = record.site(site)
        shared = record.shared
        docs = arrays[f"top_{part}_doc"][neuron]
        filled = docs >= 0
        self.top = Windows(
            arrays[f"top_{part}_tokens"][neuron][filled],
            arrays[f"top_{part}_acts"][neuron].astype(np.float32)[filled],
            docs[filled],
        )
        self.peaks = arrays[f"top_{part}_at"][neuron][filled].astype(int)  # of the top windows
        self.uniform = Windows(
            shared[f"uniform_{part}"],
            arrays[f"uniform_{part}_acts"][:, :, neuron].astype(np.float32),
            shared[f"uniform_{part}_doc"],
        )
        self.rng = np.random.default_rng(seed)
        self.taken = []

    def take(self, windows, chosen, origin, width=SHORT, before=BEFORE, padded=None):
        """Take an excerpt of `width` tokens for each (window, position), padded to `padded`.

        It begins `before` tokens earlier, or as near to that as the window allows.
        """
        room = padded or width
        for window, position in chosen:
            start = min(max(position - before, 0), WINDOW - width)
            tokens = np.full(room + 1, -1, np.int32)
            acts = np.full(room, np.nan, np.float32)
            tokens[: width + 1] = windows.tokens[window, start : start + width + 1]
            acts[:width] = windows.acts[window, start : start + width]
            self.taken.append((tokens, acts, windows.doc[window], position - start, origin))

    def take_top(self, first, last, **changes):
        """Take excerpts around the peaks of the top windows first .. last - 1."""
        self.take(self.top, self.top_peaks(first, last), "top", **changes)

    def take_intervals(self, intervals, n):
        """Take n excerpts from each interval but the last."""
        for i, positions in enumerate(intervals[:-1]):
            self.take(self.uniform, self.draw(positions, n), f"interval {i}")

    def top_peaks(self, first, last):
        """(window, position) of the peaks of the top windows first .. last - 1."""
        return [(i, self.peaks[i]) for i in range(first, min(last, len(self.peaks)))]

    def draw(self, positions, n):
        """n of the positions (in the flattened uniform windows), or all if there are fewer."""
        drawn = self.rng.choice(positions, min(n, len(positions)), replace=False)
        return [divmod(int(i), WINDOW) for i in drawn]

    def random(self, n):
        """A random position in each of n uniform windows."""
        count = len(self.uniform.tokens)
        windows = self.rng.choice(count, min(n, count), replace=False)
        return [(int(window), int(self.rng.integers(WINDOW))) for window in windows]

    def rank_intervals(self, n):
        """The positions in ascending order of activation, in n equal shares."""
        acts = self.uniform.acts.ravel()
        shuffled = self.rng.permutation(len(acts))  # so that ties fall at random
        order = np.argsort(acts[shuffled], kind="stable")
        return np.array_split(shuffled[order], n)

    def value_intervals(self, n):
        """The positions by value, in n equal steps of (0, max]; none if the neuron never fired."""
        acts = self.uniform.acts.ravel()
        top = self.top.acts.max(initial=0)
        step = np.ceil(acts / top * n) if top else np.zeros(len(acts))
        return [np.flatnonzero(step == i + 1) for i in range(n)]

    def elsewhere(self, n):
        """Positions outside the best n top windows that hold the token of one of their peaks."""
        top = self.top.tokens[:n]
        peaks = [top[window, 1 + position] for window, position in self.top_peaks(0, n)]
        tokens = self.uniform.tokens
        is_top = (tokens[:, None] == top).all(-1).any(1)  # (W,)
        return np.flatnonzero(np.isin(tokens[:, 1:], peaks) & ~is_top[:, None])

    def excerpts(self, width):
        """The Excerpts taken so far, which are `width` tokens wide."""
        n = len(self.taken)
        result = Excerpts(
            tokens=np.zeros((n, width + 1), np.int32),
            acts=np.zeros((n, width), np.float32),
            doc=np.zeros(n, np.int64),
            position=np.zeros(n, np.int64),
            origin=[],
        )
        for i, (tokens, acts, doc, position, origin) in enumerate(self.taken):
            result.tokens[i] = tokens
            result.acts[i] = acts
            result.doc[i] = doc
            result.position[i] = position
            result.origin.append(origin)
        return result


# ---- the protocols: a Pool -> its Excerpts -------------------------------------------------------


def _uniform(pool, score):
    windows = pool.uniform
    n = len(windows.doc)
    position = np.zeros(n, np.int64)
    return Excerpts(windows.tokens, windows.acts, windows.doc, position, ["uniform"] * n)


def _openai_tar(pool, score):
    pool.take_top(0, 5, width=WINDOW)
    if score:
        pool.take(pool.uniform, pool.random(5), "random", width=WINDOW)
    return pool.excerpts(WINDOW)


def _openai_random(pool, score):
    if score:
        pool.take(pool.uniform, pool.random(5), "random", width=WINDOW)
    else:
        pool.take_top(0, 5, width=WINDOW)
    return pool.excerpts(WINDOW)


def _anthropic_crate(pool, score):
    if score:
        pool.take_top(15, 25)
    else:
        pool.take_top(0, 15)
    pool.take_intervals(pool.rank_intervals(RANK_INTERVALS), 2)
    pool.take(pool.uniform, pool.random(5), "random")
    if score:
        peaks = pool.top_peaks(25, 35)
        pool.take(pool.top, peaks, "out of context", width=3, before=1, padded=SHORT)
    return pool.excerpts(SHORT)


def _anthropic_2023(pool, score):
    n_top = 6 if score else 10
    pool.take_top(0, n_top)
    pool.take_intervals(pool.value_intervals(VALUE_INTERVALS), 2)
    pool.take(pool.uniform, pool.random(10 if score else 5), "random")
    elsewhere = pool.draw(pool.elsewhere(n_top), 20 if score else 10)
    pool.take(pool.uniform, elsewhere, "out of context")
    return pool.excerpts(SHORT)


SELECTORS = {
    "uniform": _uniform,
    "openai_tar": _openai_tar,
    "openai_random": _openai_random,
    "anthropic_crate": _anthropic_crate,
    "anthropic_2023": _anthropic_2023,
}

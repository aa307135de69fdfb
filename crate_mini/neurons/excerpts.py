"""Select: the excerpts of one neuron that a protocol explains on and scores on, from a record (stage 2).

    protocol          fit (from documents of that part)         score (from the other documents)
    uniform           128 uniform windows                       256 uniform windows, both as drawn for all
    openai_tar        5 top                                     5 top, 5 random
    openai_random     5 top                                     the same 5 random
    anthropic_crate   15 top, 2 from each of 11 rank            top 16-25, 2 from each of 11 rank intervals,
                      intervals, 5 random: 42                   5 random, top 26-35 out of context: 47
    anthropic_2023    10 top, 2 from each of 12 value           6 top, 2 from each of 12 value intervals,
                      intervals, 5 random, 10 top tokens        10 random, 20 top tokens out of context: 60
                      out of context: 49
Windows are of 64 tokens (uniform, openai: Bills et al. 2023) or 8, 4 before the position (anthropic). A top
excerpt is around the peak of a top window. Everything else is taken from the uniform windows of the part:
random, a position each in different windows; rank interval i of n (CRATE-LM's code), positions in i/n to
(i+1)/n of the ascending order, i < n - 1, ties in random order; value interval i (Bricken et al. 2023),
positions with i/13 < a/max <= (i+1)/13, where i = 12 would be the top and max is the part's. Out of context
means in the paper's code the position with one neighbour on either side, and in Bricken et al. the token of a
top peak wherever else it occurs. A neuron that fires too seldom gets fewer excerpts. Activations are always
those recorded in the full context.
"""

import zlib
from dataclasses import dataclass

import numpy as np

from crate_mini import UserError
from crate_mini.neurons.documents import PARTS, WINDOW

SHORT, BEFORE = 8, 4  # tokens of an anthropic excerpt, those before the position
RANKS, VALUES = 12, 13  # intervals, the top one included


@dataclass
class Excerpts:
    """n excerpts of at most w tokens, with the neuron's activations.

    tokens (n, w + 1) int32: column 0 is the token before the excerpt, -1 where a chunk begins; acts (n, w)
    float32; doc (n,) document; at (n,) which token it was chosen for; origin n of "top", "interval 3",
    "random", "out of context", "uniform". Shorter excerpts end in tokens -1 and activations NaN.
    """

    tokens: np.ndarray
    acts: np.ndarray
    doc: np.ndarray
    at: np.ndarray
    origin: list


def select(record, site, protocol, neuron, seed=0):
    """(fit, score): the Excerpts of a neuron of a site under a protocol. Same seed, same excerpts.

    The draw for one part does not depend on the other's. Raises UserError for an unknown protocol or neuron.
    """
    if protocol not in CHOOSE:
        raise UserError(f"protocol {protocol!r} is unknown; choose among {', '.join(CHOOSE)}.")
    width = len(record.site(site)["max"])
    if not 0 <= neuron < width:
        raise UserError(f"{site} has no neuron {neuron}: its neurons are 0 to {width - 1}.")
    family = (
        "openai" if protocol.startswith("openai") else protocol
    )  # both take the same random ones
    keys = [seed, zlib.crc32(f"{site}/{family}".encode()), neuron]
    return tuple(
        CHOOSE[protocol](_Pool(record, site, part, neuron, [*keys, i]), part == "score")
        for i, part in enumerate(PARTS)
    )


class _Pool:
    """Windows of one part and one neuron's activations in them: `top` ones, best first, and `uniform` ones.

    Each is tokens (n, 65), acts (n, 64), doc (n,). `take` collects excerpts, `excerpts` returns them.
    """

    def __init__(self, record, site, part, neuron, seed):
        arrays, shared = record.site(site), record.shared
        doc = arrays[f"top_{part}_doc"][neuron]
        tokens, acts, at = (
            arrays[f"top_{part}_{name}"][neuron] for name in ("tokens", "acts", "at")
        )
        self.top = [a[doc >= 0] for a in (tokens, acts.astype(np.float32), doc)]
        self.peaks = at[doc >= 0].astype(int)
        self.uniform = [
            shared[f"uniform_{part}"],
            arrays[f"uniform_{part}_acts"][:, :, neuron].astype(np.float32),
            shared[f"uniform_{part}_doc"],
        ]
        self.rng, self.found = np.random.default_rng(seed), []

    def take(self, windows, chosen, origin, width=SHORT, before=BEFORE, pad=None):
        """Add an excerpt of `width` tokens, padded to `pad`, for each (window, position).

        It begins `before` tokens earlier, or where the window leaves room for it.
        """
        (tokens, acts, doc), room = windows, pad or width
        for window, at in chosen:
            start = min(max(at - before, 0), WINDOW - width)
            ids, values = np.full(room + 1, -1, np.int32), np.full(room, np.nan, np.float32)
            ids[: width + 1] = tokens[window, start : start + width + 1]
            values[:width] = acts[window, start : start + width]
            self.found.append((ids, values, doc[window], at - start, origin))

    def best(self, first, last):
        """(window, position) of the peaks of top windows first .. last - 1."""
        return [(i, self.peaks[i]) for i in range(first, min(last, len(self.peaks)))]

    def draw(self, among, n):
        """n of the positions `among` (in the uniform windows, flattened), all if there are fewer."""
        drawn = self.rng.choice(among, min(n, len(among)), replace=False)
        return [divmod(int(i), WINDOW) for i in drawn]

    def random(self, n):
        """A position in each of n uniform windows."""
        count = len(self.uniform[0])
        windows = self.rng.choice(count, min(n, count), replace=False)
        return [(int(window), int(self.rng.integers(WINDOW))) for window in windows]

    def rank_intervals(self, n):
        """Positions by interval of the ascending order of activations, in n equal shares."""
        values = self.uniform[1].ravel()
        mixed = self.rng.permutation(len(values))  # so that ties fall at random
        return np.array_split(mixed[np.argsort(values[mixed], kind="stable")], n)

    def value_intervals(self, n):
        """Positions by interval of (0, max], in n equal steps; none if the neuron never fired."""
        values = self.uniform[1].ravel()
        top = self.top[1].max(initial=0)
        place = np.ceil(values / top * n) if top else np.zeros(len(values))
        return [np.flatnonzero(place == i + 1) for i in range(n)]

    def elsewhere(self, top):
        """Positions where the peak tokens of the best `top` windows occur in other windows than these."""
        tokens, windows = self.uniform[0], self.top[0][:top]
        peaks = [windows[window, 1 + at] for window, at in self.best(0, top)]
        other = ~(tokens[:, None] == windows).all(-1).any(1)
        return np.flatnonzero(np.isin(tokens[:, 1:], peaks) & other[:, None])

    def excerpts(self, width):
        """The Excerpts taken so far."""
        if not self.found:
            return Excerpts(
                np.zeros((0, width + 1), np.int32),
                np.zeros((0, width), np.float32),
                np.zeros(0, np.int64),
                np.zeros(0, np.int64),
                [],
            )
        tokens, acts, doc, at, origin = zip(*self.found)
        return Excerpts(np.stack(tokens), np.stack(acts), np.array(doc), np.array(at), list(origin))


def _uniform(pool, score):
    tokens, acts, doc = pool.uniform
    return Excerpts(tokens, acts, doc, np.zeros(len(doc), np.int64), ["uniform"] * len(doc))


def _openai_tar(pool, score):
    pool.take(pool.top, pool.best(0, 5), "top", WINDOW)
    return _openai_random(pool, score) if score else pool.excerpts(WINDOW)


def _openai_random(pool, score):
    if score:
        pool.take(pool.uniform, pool.random(5), "random", WINDOW)
    else:
        pool.take(pool.top, pool.best(0, 5), "top", WINDOW)
    return pool.excerpts(WINDOW)


def _anthropic_crate(pool, score):
    pool.take(pool.top, pool.best(15, 25) if score else pool.best(0, 15), "top")
    for i, positions in enumerate(pool.rank_intervals(RANKS)[:-1]):
        pool.take(pool.uniform, pool.draw(positions, 2), f"interval {i}")
    pool.take(pool.uniform, pool.random(5), "random")
    if score:
        pool.take(pool.top, pool.best(25, 35), "out of context", width=3, before=1, pad=SHORT)
    return pool.excerpts(SHORT)


def _anthropic_2023(pool, score):
    top, random, elsewhere = (6, 10, 20) if score else (10, 5, 10)
    pool.take(pool.top, pool.best(0, top), "top")
    for i, positions in enumerate(pool.value_intervals(VALUES)[:-1]):
        pool.take(pool.uniform, pool.draw(positions, 2), f"interval {i}")
    pool.take(pool.uniform, pool.random(random), "random")
    pool.take(pool.uniform, pool.draw(pool.elsewhere(top), elsewhere), "out of context")
    return pool.excerpts(SHORT)


CHOOSE = {
    "uniform": _uniform,
    "openai_tar": _openai_tar,
    "openai_random": _openai_random,
    "anthropic_crate": _anthropic_crate,
    "anthropic_2023": _anthropic_2023,
}

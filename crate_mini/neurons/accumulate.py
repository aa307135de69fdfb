"""What recording keeps, updated batch by batch: its size never depends on the corpus.

    Shared   for all sites: bigrams, uniformly drawn windows; makes a Batch of some chunks of text
    Tally    of a site: moments, density, histogram of all tokens; sums by token and by bigram of the fit part
    Top      of a site and a part: the k windows in which each neuron fires hardest

Activations x are (R, C, h) float32: R chunks of text padded to C tokens, h neurons. A `Batch` says which
tokens of x are text, and where its windows lie. All state is on the device of x.
"""

from dataclasses import dataclass

import numpy as np
import torch

from crate_mini.neurons.documents import PARTS, WINDOW

OCTAVE, LOWEST, OCTAVES = (
    64,
    -20,
    32,
)  # histogram while recording: bins per factor 2, from 2^LOWEST up
BINS = OCTAVE * OCTAVES
HIST = 50  # bins of the histogram that is kept
F16 = 65504.0  # largest float16


@dataclass
class Batch:
    """Chunks of one part. Tensors; W windows, N tokens of text.

    ids (R, C); text (N,) positions in ids.flatten(), None if all are text; token, pair (N,) the id of each
    and the number of the bigram that it ends (-1: not a frequent one); window_row, window_start, window_doc
    (W,); window_tokens (W, 65): the token before the window (-1: none), then the window; drawn: (slot, row,
    start) of each uniformly drawn window.
    """

    ids: torch.Tensor
    text: torch.Tensor | None
    token: torch.Tensor
    pair: torch.Tensor
    window_row: torch.Tensor
    window_start: torch.Tensor
    window_doc: torch.Tensor
    window_tokens: torch.Tensor
    drawn: list


class Shared:
    """seen (V,) token counts and pairs (P, 2) bigrams of fit; windows: {part: (wanted, of how many)}."""

    def __init__(self, seen, pairs, V, windows, seed, device):
        self.seen, self.pairs, self.V, self.device = seen, pairs, V, device
        key = torch.from_numpy(pairs[:, 0] * V + pairs[:, 1]).to(device)
        self.keys, self.order = key.sort()
        self.pair_counts = torch.zeros(len(pairs), dtype=torch.int64, device=device)
        self.ordinals, self.tokens, self.doc = {}, {}, {}
        for i, part in enumerate(PARTS):  # each part draws by a generator of its own
            wanted, total = windows[part]
            drawn = np.random.default_rng([seed, i]).choice(
                total, min(wanted, total), replace=False
            )
            self.ordinals[part] = np.sort(drawn)
            self.tokens[part] = np.full((len(drawn), WINDOW + 1), -1, np.int32)
            self.doc[part] = np.full(len(drawn), -1)

    def batch(self, part, chunks):
        """The Batch of chunks (document, ids, number of its first window), longest first."""
        C, length = len(chunks[0][1]), np.array([len(ids) for _, ids, _ in chunks])
        ids, before = np.zeros((len(chunks), C), np.int64), np.full((len(chunks), C), -1)
        for row, (_, chunk, _) in enumerate(chunks):
            ids[row, : len(chunk)], before[row, 1 : len(chunk)] = chunk, chunk[:-1]
        text = np.flatnonzero(np.arange(C) < length[:, None])
        row = np.repeat(np.arange(len(chunks)), length // WINDOW)
        start = WINDOW * np.concatenate([np.arange(n // WINDOW) for n in length])
        doc, ordinal = np.array([(doc, first) for doc, _, first in chunks])[row].T
        inside = ids[row[:, None], start[:, None] + np.arange(WINDOW)]
        windows = np.hstack((before[row, start][:, None], inside)).astype(np.int32)
        slots = np.searchsorted(self.ordinals[part], ordinal + start // WINDOW)
        found = np.append(self.ordinals[part], -1)[slots] == ordinal + start // WINDOW
        self.tokens[part][slots[found]], self.doc[part][slots[found]] = windows[found], doc[found]
        put = lambda array: torch.from_numpy(np.ascontiguousarray(array)).to(self.device)  # noqa: E731
        token, pair = (
            put(ids.ravel()[text]),
            self._number(put((before * self.V + ids).ravel()[text])),
        )
        if part == "fit":
            self.pair_counts += torch.bincount(pair[pair >= 0], minlength=len(self.pairs))
        text = None if len(text) == ids.size else put(text)
        return Batch(
            put(ids),
            text,
            token,
            pair,
            put(row),
            put(start),
            put(doc),
            put(windows),
            [*zip(*(a[found].tolist() for a in (slots, row, start)))],
        )

    def _number(self, key):
        """Which of the frequent bigrams each key is, or -1."""
        if not len(self.keys):
            return torch.full_like(key, -1)
        place = torch.searchsorted(self.keys, key).clamp(max=len(self.keys) - 1)
        return torch.where(self.keys[place] == key, self.order[place], -1)

    def results(self):
        """{name: array}: counts, pairs, pair_counts; uniform_<part> (W, 65), uniform_<part>_doc (W,)."""
        return {
            "counts": self.seen,
            "pairs": self.pairs,
            "pair_counts": self.pair_counts.cpu().numpy(),
            **{f"uniform_{part}": self.tokens[part] for part in PARTS},
            **{f"uniform_{part}_doc": self.doc[part] for part in PARTS},
        }


class Tally:
    """Sums over tokens for h neurons; V, P rows of sums by token and by bigram (float32, as are x)."""

    def __init__(self, h, V, P, device):
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.n, self.center = 0, None
        self.power = torch.zeros(4, h, dtype=wide, device=device)  # of x - center
        self.positive = torch.zeros(h, dtype=torch.int64, device=device)
        self.max = torch.full((h,), -torch.inf, device=device)
        self.bins = torch.zeros(h * BINS, dtype=torch.int64, device=device)
        self.offset = torch.arange(h, dtype=torch.int32, device=device) * BINS
        self.token_sum = torch.zeros(V, h, device=device)
        self.pair_sum = torch.zeros(P, h, device=device)

    def add(self, x, batch, fit):
        """Take in the tokens of a batch; fit: it is of the part that tables are made from."""
        x = x.flatten(0, 1) if batch.text is None else x.flatten(0, 1)[batch.text]
        if self.center is None:  # powers of x itself would cancel where the mean is far from zero
            self.center = x.mean(0)
        self.n += len(x)
        self.max = torch.maximum(self.max, x.amax(0))
        fires = x > 0
        self.positive += fires.sum(0)
        # Sign, exponent and six bits of mantissa of a float are the number of a bin on a logarithmic scale.
        key = (x.view(torch.int32) >> 17).sub_((127 + LOWEST) * OCTAVE - 1).clamp_(0, BINS - 1)
        key = key.add_(self.offset)[fires]
        self.bins.index_add_(0, key, torch.ones_like(key, dtype=torch.int64))
        y = x - self.center
        z = y * y
        self.power += torch.stack((y.sum(0), z.sum(0), y.mul_(z).sum(0), z.square_().sum(0)))
        if fit:
            self.token_sum.index_add_(0, batch.token, x)
            found = (batch.pair >= 0).nonzero()[:, 0]
            self.pair_sum.index_add_(0, batch.pair[found], x[found])

    def results(self):
        """{name: array}: mean, var (population), skew, kurtosis (3 for a Gaussian; both NaN if var is 0), ...

        hist (h, 50): counts of positive values, between hist_edges (51,) times the neuron's max. From a
        finer logarithmic histogram, taken as uniform within a bin (at most 1.6 % wide); sums are exact.
        """
        m1, m2, m3, m4 = (self.power / self.n).double().cpu().numpy()
        mean, var = self.center.double().cpu().numpy() + m1, m2 - m1**2
        var[var <= (1e-6 * mean) ** 2] = 0  # a constant, but for rounding
        third, fourth = m3 - 3 * m1 * m2 + 2 * m1**3, m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        with np.errstate(divide="ignore", invalid="ignore"):
            skew, kurtosis = (
                np.where(var > 0, a / var**b, np.nan) for a, b in ((third, 1.5), (fourth, 2))
            )
        positive, top = self.positive.cpu().numpy(), self.max.double().cpu().numpy()
        out = {
            "mean": mean,
            "var": var,
            "skew": skew,
            "kurtosis": kurtosis,
            "density": positive / self.n,
            "max": top,
        }
        edges = np.linspace(0, 1, HIST + 1)
        bins = self.bins.view(-1, BINS).cpu().numpy()
        hist = np.stack([_linear(b[1:], n, edges * m) for b, n, m in zip(bins, positive, top)])
        return {
            **{name: value.astype(np.float32) for name, value in out.items()},
            "hist": hist,
            "hist_edges": edges,
            "token_sum": self.token_sum.cpu().numpy(),
            "pair_sum": self.pair_sum.cpu().numpy(),
        }


def _linear(bins, positive, edges):
    """Counts between `edges` (first 0, last the maximum) from counts in the logarithmic bins, (BINS - 1,)."""
    if not positive:
        return np.zeros(len(edges) - 1, np.int64)
    i = np.arange(BINS)
    values = np.ldexp(
        1 + i % OCTAVE / OCTAVE, LOWEST + i // OCTAVE
    )  # lower end of each bin, then the end
    below = positive - bins.sum() + np.concatenate(([0], bins.cumsum()))
    last = np.searchsorted(below, positive)  # the bin with the maximum ends there
    values, below = np.append(values[:last], max(edges[-1], values[last - 1])), below[: last + 1]
    found = np.interp(edges, np.append(0, values), np.append(0, below))
    found[-1] = positive
    return np.diff(np.rint(found)).astype(np.int64)


class Top:
    """The k windows of highest peak per neuron, best first; only peaks above 0 count.

    dedup: at most one window of a document. Of equal peaks the one seen first stays.
    """

    def __init__(self, h, k, dedup, device):
        self.k, self.dedup = k, dedup
        self.value = torch.full((h, k), -torch.inf, device=device)
        self.doc = torch.full((h, k), -1, device=device)
        self.at = torch.zeros((h, k), dtype=torch.int16, device=device)
        self.tokens = torch.full((h, k, WINDOW + 1), -1, dtype=torch.int32, device=device)
        self.acts = torch.zeros((h, k, WINDOW), dtype=torch.float16, device=device)

    def offer(self, x, batch):
        """Take in the windows of a batch with activations x (R, C, h)."""
        if not len(batch.window_row):
            return
        count = x.shape[1] // WINDOW
        peaks = x[:, : count * WINDOW].unflatten(1, (count, WINDOW)).amax(2)  # (R, count, h)
        peaks = peaks[batch.window_row, batch.window_start // WINDOW].T  # (h, W)
        doc, group = batch.window_doc, torch.arange(peaks.shape[1], device=x.device)
        j = (peaks > self.value[:, -1:].clamp(min=0)).any(1).nonzero()[:, 0]  # who may change
        if not len(j):
            return
        peaks, window = peaks[j], group
        if self.dedup:
            doc, group = doc.unique(return_inverse=True)
            peaks, window = _best(peaks, group, len(doc))
        peaks = peaks.masked_fill(peaks <= 0, -torch.inf)
        value, known = self.value[j], self.doc[j]
        if self.dedup:  # of a document that has a window already, the better one stays
            same = known[:, None] == doc[:, None]  # (j, documents, k)
            held = torch.where(same, value[:, None], -torch.inf).amax(-1)
            value = value.masked_fill((same & (peaks > held)[..., None]).any(1), -torch.inf)
            peaks = peaks.masked_fill(peaks <= held, -torch.inf)
        value, order = torch.cat((value, peaks), 1).sort(dim=1, descending=True, stable=True)
        value, order = value[:, : self.k], order[:, : self.k]
        kept = order.clamp(max=self.k - 1)
        self.value[j], self.doc[j], self.at[j] = (
            value,
            known.gather(1, kept),
            self.at[j].gather(1, kept),
        )
        self.tokens[j], self.acts[j] = self.tokens[j[:, None], kept], self.acts[j[:, None], kept]
        row, slot = ((order >= self.k) & (value > 0)).nonzero(as_tuple=True)
        which, j = order[row, slot] - self.k, j[row]
        window = window.expand(len(peaks), -1)[row, which]
        span = batch.window_start[window, None] + torch.arange(WINDOW, device=x.device)
        acts = x[batch.window_row[window, None], span, j[:, None]]
        self.doc[j, slot], self.at[j, slot] = doc[which], acts.argmax(1).to(torch.int16)
        self.tokens[j, slot], self.acts[j, slot] = batch.window_tokens[window], half(acts)

    def results(self, part):
        """{name: array}: top_<part>_tokens (h, k, 65), _acts (h, k, 64), _at, _doc (h, k; -1: no window)."""
        none = ~(self.value > 0)
        self.doc[none], self.at[none], self.tokens[none], self.acts[none] = -1, 0, -1, 0
        return {
            f"top_{part}_{name}": getattr(self, name).cpu().numpy()
            for name in ("tokens", "acts", "at", "doc")
        }


def _best(peaks, group, n):
    """Of peaks (h, W), the highest of each of n groups (h, n), and the number of its window (the first)."""
    h, W = peaks.shape
    group = group.expand(h, W)
    best = peaks.new_full((h, n), -torch.inf).scatter_reduce_(1, group, peaks, "amax")
    number = torch.arange(W, device=peaks.device).expand(h, W)
    number = torch.where(peaks == best.gather(1, group), number, W)
    return best, torch.full_like(best, W, dtype=torch.int64).scatter_reduce_(
        1, group, number, "amin"
    )


def half(x):
    """float16, what lies beyond its range at its end."""
    return x.clamp(-F16, F16).half()

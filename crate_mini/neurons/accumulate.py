"""The state of a recording, updated batch by batch; its size does not depend on the corpus.

    Shared       all sites: token counts, frequent bigrams, uniform windows; makes each Batch
    TokenStats   one site: moments, density, histogram; sums by token and bigram of the fit part
    TopWindows   one site and part: the k windows in which each neuron fires most strongly

Activations x are (R, C, h) float32: R chunks of text padded to C tokens, h neurons. A Batch knows
which of the R C tokens are text, and where the windows lie. All state is on the device of x.
"""

from dataclasses import dataclass

import numpy as np
import torch

from crate_mini.neurons.documents import PARTS, WINDOW
from crate_mini.neurons.histogram import LogHistogram
from crate_mini.training.device import widest_float

HIST = 50  # bins of the histogram in the record, which is linear


@dataclass
class Batch:
    """R chunks of one part padded to C tokens, the longest first; N tokens of text, W windows."""

    ids: torch.Tensor  # (R, C)
    text: torch.Tensor | None  # (N,) where ids.flatten() is text; None: everywhere
    token: torch.Tensor  # (N,) the ids of the text
    bigram: torch.Tensor  # (N,) number of the frequent bigram that ends at each token; -1: none
    window_row: torch.Tensor  # (W,) chunk of each window
    window_start: torch.Tensor  # (W,) its first column
    window_doc: torch.Tensor  # (W,) its document
    window_tokens: torch.Tensor  # (W, 65) the token before it (-1: none), then its tokens
    drawn: list  # (slot, row, start) of each window that was drawn uniformly


# ---- all sites -----------------------------------------------------------------------------------


class UniformWindows:
    """`wanted` of the `total` windows of a part, drawn without replacement, in slots 0, 1, ..."""

    def __init__(self, wanted, total, rng):
        drawn = rng.choice(total, min(wanted, total), replace=False)
        self.numbers = np.sort(drawn)  # (n,) which windows of the part
        self.tokens = np.full((len(drawn), WINDOW + 1), -1, np.int32)
        self.doc = np.full(len(drawn), -1)

    def take(self, numbers, tokens, doc):
        """Keep those of W windows that were drawn: (slot of each, which of the W they are)."""
        slots = np.searchsorted(self.numbers, numbers)  # (W,)
        drawn = np.append(self.numbers, -1)[slots] == numbers
        slots = slots[drawn]
        self.tokens[slots] = tokens[drawn]
        self.doc[slots] = doc[drawn]
        return slots, np.flatnonzero(drawn)


class Shared:
    """The state that all sites share; it depends on the text and the seed, not on the model.

    token_counts (V,) and bigrams (P, 2) of the fit part; windows: {part: (how many to draw, how
    many there are)}.
    """

    def __init__(self, token_counts, bigrams, V, windows, seed, device):
        self.token_counts, self.bigrams = token_counts, bigrams
        self.V, self.device = V, device
        keys = torch.from_numpy(bigrams[:, 0] * V + bigrams[:, 1]).to(device)
        self.keys, self.order = keys.sort()
        self.bigram_counts = torch.zeros(len(bigrams), dtype=torch.int64, device=device)
        self.uniform = {}
        for i, part in enumerate(PARTS):  # a generator each: one draw does not affect the other
            rng = np.random.default_rng([seed, i])
            self.uniform[part] = UniformWindows(*windows[part], rng)

    def batch(self, part, chunks):
        """The Batch of chunks of a part; they come sorted, the longest first."""
        lengths = np.array([len(chunk.ids) for chunk in chunks])  # (R,)
        shape = len(chunks), lengths[0]
        ids = np.zeros(shape, np.int64)
        before = np.full(shape, -1)  # the token before each, -1 where a chunk begins
        for row, chunk in enumerate(chunks):
            ids[row, : len(chunk.ids)] = chunk.ids
            before[row, 1 : len(chunk.ids)] = chunk.ids[:-1]
        text = np.flatnonzero(np.arange(shape[1]) < lengths[:, None])  # (N,)
        keys = (before * self.V + ids).ravel()[text]  # below 0 where a chunk begins: no bigram
        bigram = self._bigram_numbers(self._tensor(keys))
        if part == "fit":
            frequent = bigram[bigram >= 0]
            self.bigram_counts += torch.bincount(frequent, minlength=len(self.bigrams))

        row, start, doc, numbers = _windows(chunks, lengths)
        columns = start[:, None] + np.arange(WINDOW)  # (W, 64)
        inside = ids[row[:, None], columns]
        tokens = np.hstack((before[row, start][:, None], inside)).astype(np.int32)
        slots, drawn = self.uniform[part].take(numbers, tokens, doc)
        return Batch(
            ids=self._tensor(ids),
            text=None if len(text) == ids.size else self._tensor(text),
            token=self._tensor(ids.ravel()[text]),
            bigram=bigram,
            window_row=self._tensor(row),
            window_start=self._tensor(start),
            window_doc=self._tensor(doc),
            window_tokens=self._tensor(tokens),
            drawn=list(zip(slots.tolist(), row[drawn].tolist(), start[drawn].tolist())),
        )

    def _tensor(self, array):
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def _bigram_numbers(self, keys):
        """The number of the frequent bigram with each key, or -1."""
        if not len(self.keys):
            return torch.full_like(keys, -1)
        place = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        return torch.where(self.keys[place] == keys, self.order[place], -1)

    def results(self):
        """{name: array} of record-shared.npz."""
        arrays = {
            "counts": self.token_counts,
            "pairs": self.bigrams,
            "pair_counts": self.bigram_counts.cpu().numpy(),
        }
        for part in PARTS:
            arrays[f"uniform_{part}"] = self.uniform[part].tokens
        for part in PARTS:
            arrays[f"uniform_{part}_doc"] = self.uniform[part].doc
        return arrays


def _windows(chunks, lengths):
    """(row, start, document, number in the part), each (W,), of the windows in chunks."""
    counts = lengths // WINDOW  # windows of each chunk
    row = np.repeat(np.arange(len(chunks)), counts)
    place = np.concatenate([np.arange(count) for count in counts])  # within the chunk
    doc = np.array([chunk.document for chunk in chunks])[row]
    first = np.array([chunk.first_window for chunk in chunks])[row]
    return row, WINDOW * place, doc, first + place


# ---- one site, all tokens ------------------------------------------------------------------------


class TokenStats:
    """Sums over tokens for h neurons of a site; V and P rows of sums by token and by bigram."""

    def __init__(self, h, V, P, device):
        self.center = self.unit = None
        self.powers = torch.zeros(4, h, dtype=widest_float(device), device=device)  # see add
        self.values = LogHistogram(h, device)
        self.token_sum = torch.zeros(V, h, device=device)
        self.bigram_sum = torch.zeros(P, h, device=device)

    def add(self, x, batch, fit):
        """Add the tokens of a batch, x (R, C, h); fit: whether it belongs to the fit part."""
        x = x.flatten(0, 1)
        if batch.text is not None:
            x = x[batch.text]  # (N, h)
        if self.center is None:
            # Powers of x itself would cancel if the mean is far from zero, and could overflow.
            self.center = x.mean(0)
            spread = (x - self.center).abs().amax(0)
            exponent = torch.frexp(torch.where(spread > 0, spread, spread.max())).exponent
            self.unit = torch.ldexp(torch.ones_like(self.center), exponent.clamp(-100, 100))
        self.values.add(x)
        y = (x - self.center) / self.unit
        y2 = y * y
        sums = y.sum(0), y2.sum(0), y.mul_(y2).sum(0), y2.square_().sum(0)
        self.powers += torch.stack(sums)
        if fit:
            self.token_sum.index_add_(0, batch.token, x)
            frequent = (batch.bigram >= 0).nonzero()[:, 0]
            self.bigram_sum.index_add_(0, batch.bigram[frequent], x[frequent])

    def results(self):
        """{name: array} of record-SITE.npz, except the windows.

        mean, var (population; float64), skew, kurtosis (3 for a Gaussian; both NaN where var is 0),
        density (share of positive values), max: (h,) float32. hist (h, 50): positive values between
        hist_edges (51,) times the neuron's max, read off the logarithmic histogram.
        """
        arrays = self._moments()
        variances = arrays.pop("var")  # squares: float32 may be too narrow for them
        arrays["density"] = self.values.positive.cpu().numpy() / self.values.n
        arrays["max"] = self.values.max.cpu().numpy()
        arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
        arrays["var"] = variances
        arrays["hist_edges"] = np.linspace(0, 1, HIST + 1)
        arrays["hist"] = self.values.linear(arrays["hist_edges"])
        arrays["token_sum"] = self.token_sum.cpu().numpy()
        arrays["pair_sum"] = self.bigram_sum.cpu().numpy()
        return arrays

    def _moments(self):
        """Mean, variance, skewness and kurtosis from the raw moments of (x - center) / unit."""
        m1, m2, m3, m4 = (self.powers.cpu().double() / self.values.n).numpy()
        unit = self.unit.cpu().double().numpy()
        mean = self.center.cpu().double().numpy() / unit + m1
        var = m2 - m1**2
        var[var <= (1e-6 * mean) ** 2] = 0  # a constant, up to rounding
        third = m3 - 3 * m1 * m2 + 2 * m1**3
        fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
        with np.errstate(divide="ignore", invalid="ignore"):
            skew = np.where(var > 0, third / var**1.5, np.nan)
            kurtosis = np.where(var > 0, fourth / var**2, np.nan)
        return {"mean": mean * unit, "var": var * unit**2, "skew": skew, "kurtosis": kurtosis}


# ---- one site and part, the strongest windows ----------------------------------------------------


class TopWindows:
    """The k windows with the highest peaks of each neuron, best first; only peaks above 0 count.

    dedup: at most one window per document. Of equal peaks the one seen first stays.
    """

    def __init__(self, h, k, dedup, device):
        self.k, self.dedup = k, dedup
        self.peak = torch.full((h, k), -torch.inf, device=device)
        self.doc = torch.full((h, k), -1, device=device)
        self.position = torch.zeros((h, k), dtype=torch.int16, device=device)  # of the peak
        self.tokens = torch.full((h, k, WINDOW + 1), -1, dtype=torch.int32, device=device)
        self.acts = torch.zeros((h, k, WINDOW), device=device)

    def offer(self, x, batch):
        """Consider the windows of a batch with activations x (R, C, h)."""
        if not len(batch.window_row):
            return
        peaks = _window_peaks(x, batch)  # (h, W)
        weakest = self.peak[:, -1:].clamp(min=0)
        neurons = (peaks > weakest).any(1).nonzero()[:, 0]  # (n,) those whose list may change
        if not len(neurons):
            return
        peaks, docs, windows = self._candidates(peaks[neurons], batch.window_doc)
        peaks = peaks.masked_fill(peaks <= 0, -torch.inf)
        old_peaks = self.peak[neurons]  # (n, k)
        if self.dedup:
            old_peaks, peaks = _one_per_document(old_peaks, self.doc[neurons], peaks, docs)
        both = torch.cat((old_peaks, peaks), 1)
        ranked, order = both.sort(dim=1, descending=True, stable=True)
        ranked, order = ranked[:, : self.k], order[:, : self.k]
        self._reorder(neurons, ranked, order)
        row, slot = ((order >= self.k) & (ranked > 0)).nonzero(as_tuple=True)
        candidate = order[row, slot] - self.k  # of each new entry
        window = windows[row, candidate]
        self._insert(x, batch, neurons[row], slot, window)

    def _candidates(self, peaks, window_docs):
        """(peaks (n, m), documents (m,), windows (n, m)) of the windows that may enter a list.

        Without dedup these are all W windows, else the best window of each document.
        """
        if self.dedup:
            docs, group = window_docs.unique(return_inverse=True)
            best, windows = _best_of_groups(peaks, group, len(docs))
            return best, docs, windows
        windows = torch.arange(peaks.shape[1], device=peaks.device)
        return peaks, window_docs, windows.expand(peaks.shape)

    def _reorder(self, neurons, ranked, order):
        """Give the lists of `neurons` their new peaks, and move what stays to its new slot."""
        kept = order.clamp(max=self.k - 1)  # new entries, >= k, are overwritten by _insert
        rows = neurons[:, None]
        self.peak[neurons] = ranked
        for entries in (self.doc, self.position, self.tokens, self.acts):
            entries[neurons] = entries[rows, kept]

    def _insert(self, x, batch, neurons, slots, windows):
        """Write the new entries: windows[i] of the batch to slots[i] of neurons[i]."""
        columns = batch.window_start[windows, None] + torch.arange(WINDOW, device=x.device)
        acts = x[batch.window_row[windows, None], columns, neurons[:, None]]
        self.doc[neurons, slots] = batch.window_doc[windows]
        self.position[neurons, slots] = acts.argmax(1).to(torch.int16)
        self.tokens[neurons, slots] = batch.window_tokens[windows]
        self.acts[neurons, slots] = acts

    def results(self, part):
        """{name: array}: top_<part>_tokens (h, k, 65), _acts (h, k, 64), _at and _doc (h, k).

        An empty slot has document -1.
        """
        empty = ~(self.peak > 0)
        self.doc[empty] = -1
        self.position[empty] = 0
        self.tokens[empty] = -1
        self.acts[empty] = 0
        entries = {
            "tokens": self.tokens,
            "acts": self.acts,
            "at": self.position,
            "doc": self.doc,
        }
        return {f"top_{part}_{name}": value.cpu().numpy() for name, value in entries.items()}


def _window_peaks(x, batch):
    """(h, W): the highest activation of each neuron in each window."""
    count = x.shape[1] // WINDOW
    windows = x[:, : count * WINDOW].unflatten(1, (count, WINDOW))  # (R, count, 64, h)
    peaks = windows.amax(2)
    return peaks[batch.window_row, batch.window_start // WINDOW].T


def _best_of_groups(peaks, group, n):
    """(peaks (h, n), windows (h, n)): the highest of peaks (h, W) in each of n groups.

    group (W,): the group of each window. Of equal peaks the first window counts.
    """
    h, W = peaks.shape
    group = group.expand(h, W)
    best = peaks.new_full((h, n), -torch.inf).scatter_reduce_(1, group, peaks, "amax")
    windows = torch.arange(W, device=peaks.device).expand(h, W)
    windows = torch.where(peaks == best.gather(1, group), windows, W)
    first = torch.full_like(best, W, dtype=torch.int64)
    return best, first.scatter_reduce_(1, group, windows, "amin")


def _one_per_document(old_peaks, old_docs, peaks, docs):
    """Both sets of peaks, with -inf for the worse window of each document that has two.

    old_peaks, old_docs (n, k): the lists; peaks (n, m) of new windows from docs (m,), distinct.
    """
    same = old_docs[:, None] == docs[:, None]  # (n, m, k)
    held = torch.where(same, old_peaks[:, None], -torch.inf).amax(-1)  # (n, m)
    beaten = (same & (peaks > held)[..., None]).any(1)  # (n, k)
    old_peaks = old_peaks.masked_fill(beaten, -torch.inf)
    return old_peaks, peaks.masked_fill(peaks <= held, -torch.inf)

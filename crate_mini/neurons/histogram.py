"""How often each neuron of a site takes which positive values, at any scale, in bounded memory.

A bin is a 64th of an octave, at most 1.6 % wide: the sign, the exponent and the upper six bits of
the mantissa of a float32, read as an integer, number the bins. Each neuron has bins for the
OCTAVES below its largest value so far; when that grows they move up, and the first bin takes what
falls out below.
"""

import numpy as np
import torch

OCTAVE = 64  # bins per factor of 2
OCTAVES = 32
BINS = OCTAVE * OCTAVES
SMALLEST = -126  # exponent of the smallest normal float32


class LogHistogram:
    """Counts of the positive values of h neurons; n: all values, positive or not."""

    def __init__(self, h, device):
        self.n = 0
        # 2^lowest begins the second bin of each neuron.
        self.lowest = torch.full((h,), SMALLEST, dtype=torch.int32, device=device)
        self.max = torch.full((h,), -torch.inf, device=device)
        self.positive = torch.zeros(h, dtype=torch.int64, device=device)
        self.bins = torch.zeros(h * BINS, dtype=torch.int64, device=device)
        self.first_bin = torch.arange(h, dtype=torch.int32, device=device) * BINS

    def add(self, x):
        """Count x (N, h) float32."""
        self.n += len(x)
        self.max = torch.maximum(self.max, x.amax(0))
        self._move_up()
        fires = x > 0
        self.positive += fires.sum(0)
        offset = (127 + self.lowest) * OCTAVE - 1
        bins = (x.view(torch.int32) >> 17).sub_(offset).clamp_(0, BINS - 1)
        bins = bins.add_(self.first_bin)[fires]
        self.bins.index_add_(0, bins, torch.ones_like(bins, dtype=torch.int64))

    def _move_up(self):
        """Move the bins of each neuron so that they end above its largest value."""
        exponent = torch.frexp(self.max).exponent - OCTAVES  # max < 2^exponent before
        wanted = torch.where(self.max > 0, exponent, SMALLEST).clamp(min=SMALLEST).int()
        octaves = wanted - self.lowest
        neurons = (octaves > 0).nonzero()[:, 0]  # (n,)
        if len(neurons):
            bins = self.bins.view(-1, BINS)
            old = bins[neurons]
            place = torch.arange(BINS, device=old.device) - OCTAVE * octaves[neurons, None]
            bins[neurons] = torch.zeros_like(old).scatter_add_(1, place.clamp(min=0).long(), old)
            self.lowest[neurons] = wanted[neurons]

    def linear(self, edges):
        """(h, E - 1): counts between `edges` (E,) from 0 to 1 times each neuron's maximum.

        Read off as if values were uniform within a bin. Sums are exact.
        """
        positive = self.positive.cpu().numpy()
        maxima = self.max.cpu().double().numpy()
        rows = []
        for row, begins, n, top in zip(self._counts(), self._begins(), positive, maxima):
            rows.append(_linear(row, begins, n, edges * top))
        return np.stack(rows)

    def limits(self, share):
        """(h,) float32: the least value of each neuron that no more than `share` of all reach.

        It is where a bin begins; 0 if the neuron fires no more often than that, and infinite if
        even its top bin holds more values.
        """
        allowed = int(share * self.n)
        limits = np.zeros(len(self.positive), np.float32)
        positive = self.positive.cpu().numpy()
        for j, (row, begins) in enumerate(zip(self._counts(), self._begins())):
            if positive[j] > allowed:
                reached = row[::-1].cumsum()[::-1]  # values from each bin up
                enough = np.flatnonzero(reached <= allowed)
                limits[j] = np.append(begins, np.inf)[enough[0] if len(enough) else -1]
        # Nothing lies above the last value, so the limit behind it silences the neuron.
        return np.where(limits > self.max.cpu().numpy(), np.float32(np.inf), limits)

    def _counts(self):
        """(h, BINS - 1): counts in the bins that have a lower end."""
        return self.bins.view(-1, BINS).cpu().numpy()[:, 1:]

    def _begins(self):
        """(h, BINS - 1) float64: where these bins begin."""
        i = np.arange(BINS - 1)
        exponents = self.lowest.cpu().numpy()[:, None] + i // OCTAVE
        return np.ldexp(1 + i % OCTAVE / OCTAVE, exponents)


def _linear(bins, begins, positive, edges):
    """Counts between `edges`, which run from 0 to the maximum, of one neuron.

    bins, begins (BINS - 1,): counts of the bins and where they begin; positive: how many positive
    values there are, those below the first bin included.
    """
    if not positive:
        return np.zeros(len(edges) - 1, np.int64)
    below = positive - bins.sum() + np.concatenate(([0], bins.cumsum()))  # values below each
    last = np.searchsorted(below, positive)  # the bin before it holds the maximum
    values = np.append(begins[:last], max(edges[-1], begins[last - 1]))
    cumulative = np.interp(edges, np.append(0, values), np.append(0, below[: last + 1]))
    cumulative[-1] = positive
    return np.diff(np.rint(cumulative)).astype(np.int64)

"""Correlation of ranks, for protocols and judges that only order what they score."""

import numpy as np

from crate_mini.stats import columns, pearson


def ranks(x):
    """Ranks 1..n in each column of (n, h), ties sharing their average.

    A column that holds a NaN is all NaN.
    """
    x = columns(x)
    out = np.empty(x.shape)
    for column, values in enumerate(x.T):
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        last = counts.cumsum()  # the rank of the last of the values that are equal
        out[:, column] = (last - (counts - 1) / 2)[place]
    return np.where(np.isfinite(x).all(0), out, np.nan)


def spearman(x, y):
    """(rho, reasons): Pearson r of average ranks, so that the order of ties does not matter."""
    return pearson(ranks(x), ranks(y))

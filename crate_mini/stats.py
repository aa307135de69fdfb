"""Statistics that every chapter shares: correlations, bootstrap and Wilson intervals.

x and y of shape (n, h) are h pairs of columns of n values; (n,) is one pair. A correlation returns
(values, reasons): values (h,) float64, NaN where undefined, and reasons (h,), strings that say why,
empty where the value is defined. Undefined values are never replaced or dropped here.
"""

import math

import numpy as np

CONSTANT = 1e-12  # a range below this share of the largest value is rounding, not variation
NORMAL_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


def columns(x):
    """x as float64 of shape (n, h)."""
    x = np.asarray(x, np.float64)
    return x[:, None] if x.ndim == 1 else x


def pearson(x, y):
    """(r, reasons): Pearson r of each pair of columns."""
    both = np.stack([columns(x), columns(y)])
    n, width = both.shape[1:]
    if n < 2:
        return np.full(width, np.nan), np.full(width, "fewer than two tokens", object)
    low, high = both.min(1), both.max(1)  # they keep any NaN or infinity
    with np.errstate(all="ignore"):
        a, b = both - both.mean(1)[:, None]
        r = (a * b).sum(0) / np.sqrt((a * a).sum(0)) / np.sqrt((b * b).sum(0))
        constant = high - low <= CONSTANT * np.maximum(abs(low), abs(high))
    r = np.clip(r, -1, 1)
    finite = np.isfinite(low) & np.isfinite(high)
    reasons = np.full(width, "", object)
    reasons[~np.isfinite(r)] = "too close to constant for double precision"
    for side, name in ((1, "simulated"), (0, "true")):  # the true side overrides
        reasons[constant[side]] = f"{name} activations are constant"
        reasons[~finite[side]] = f"{name} activations are not finite"
    return np.where(reasons == "", r, np.nan), reasons


def bootstrap_interval(groups, draws=1000, seed=0, weights=None):
    """95 % interval of a weighted sum of group means, by default their mean.

    Symmetric studentized bootstrap (Hall 1988): each group is redrawn with replacement, and the
    interval is as many standard errors wide as 95 % of the redrawn sums stay within, each by its
    own standard error. groups: arrays (n,), for [low, high], or (n, h), for (2, h). Values must be
    independent: one for each document, not for each token. seed: a number or a numpy Generator.
    None without groups, or with one of fewer than two values; no width if no value differs.
    """
    if not groups or min(len(group) for group in groups) < 2:
        return None
    rng = np.random.default_rng(seed)
    center, variance, shifts, variances = np.zeros(4, object)
    for group, weight in zip(groups, weights or [1 / len(groups)] * len(groups)):
        n, x = len(group), columns(group)
        center += weight * x.mean(0)
        x = weight * (x - x.mean(0))
        variance += x.var(0, ddof=1) / n
        drawn = rng.integers(n, size=(draws, n)) + n * np.arange(draws)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=draws * n).reshape(draws, n) / n
        moved = counts @ x
        shifts += moved
        variances += (counts @ x**2 - moved**2) / (n - 1)
    errors = np.sqrt(np.maximum(variances, variance / 16))  # of few values some draws hold one only
    ratios = np.divide(abs(shifts), errors, out=np.zeros_like(errors), where=errors > 0)
    half = np.quantile(ratios, 0.95, axis=0) * np.sqrt(variance)
    bounds = np.stack([center - half, center + half])
    return bounds[:, 0].tolist() if np.ndim(groups[0]) == 1 else bounds


def pseudo_values(statistic, sums):
    """(D, ..) jackknife pseudo-values of statistic(sums (k, ..)), from sums (k, D, ..)."""
    total = sums.sum(1)
    whole, without = statistic(total), statistic(total[:, None] - sums)
    return len(without) * whole - (len(without) - 1) * without


def wilson(successes, n, z=NORMAL_95):
    """(low, high) of Wilson's score interval for a share, 95 % by default; (0, 1) when n is 0."""
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)

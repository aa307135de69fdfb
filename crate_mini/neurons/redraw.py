"""How far scores move on other documents: what the intervals of neurons and layers are made of.

Tokens and windows of one document resemble one another, so documents are redrawn, never parts of
them. A statistic of text becomes a mean over documents by the jackknife (Miller 1974): with s all
of them and s_d all but document d, of D in all, its pseudo-values D s - (D - 1) s_d have about the
same mean, and stats.bootstrap_interval redraws them. For a correlation only sums by document are
kept, so that leaving one out costs nothing.
"""

import numpy as np

from crate_mini import stats

GROUPS = 16  # of documents, left out together, for means over the neurons of a layer
SAMPLE = 64  # neurons of a site for which slow scores are computed without each group
PERFECT = 1 - 1e-9  # correlations nearer to 1 have no finite z
BLOCK = 64  # neurons at a time, to bound the memory of float64


# ---- correlations, by sums -----------------------------------------------------------------------


def document_sums(x, y, docs):
    """(6, D, h): sums over documents of 1, x, y, x^2, y^2, x y, with x and y centred.

    x, y: (W, T, h) true and simulated activations in windows; docs (W,) the document of each.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    x = x - x.mean((0, 1))
    y = y - y.mean((0, 1))
    windows = np.stack([v.sum(1) for v in (np.ones_like(x), x, y, x * x, y * y, x * y)])
    numbers, document = np.unique(docs, return_inverse=True)
    sums = np.zeros((6, len(numbers), x.shape[2]))
    for number in range(len(numbers)):
        sums[:, number] = windows[:, document == number].sum(1)
    return sums


def correlation(sums):
    """Pearson r (..) of sums (6, ..) of 1, x, y, x^2, y^2, x y; NaN where it is undefined."""
    n, x, y, xx, yy, xy = sums
    with np.errstate(all="ignore"):
        var_x = xx / n - (x / n) ** 2
        var_y = yy / n - (y / n) ** 2
        r = (xy / n - x * y / n**2) / np.sqrt(var_x * var_y)
        varies = (var_x > stats.CONSTANT * xx / n) & (var_y > stats.CONSTANT * yy / n)
    return np.where(varies, np.clip(r, -1, 1), np.nan)


def fisher_z(sums):
    """Fisher's z (..) of the correlation of sums (6, ..); NaN where that is undefined."""
    return np.arctanh(np.clip(correlation(sums), -PERFECT, PERFECT))


def neuron_intervals(x, y, docs, seed=0):
    """95 % intervals (h, 2) of the Pearson r of each neuron, documents redrawn.

    x, y: (W, T, h); docs (W,). In Fisher's z, whose errors do not depend on r. NaN with fewer than
    two documents, and where r is undefined without one of them. test_redraw.py measures that they
    hold the truth in 90 to 98 % of cases, from 12 documents on; but only in 80 to 92 % where a few
    documents are so loud that they decide the r of a neuron that seldom fires.
    """
    intervals = np.full((x.shape[2], 2), np.nan)
    if len(np.unique(docs)) < 2:
        return intervals
    for start in range(0, x.shape[2], BLOCK):
        block = slice(start, start + BLOCK)
        sums = document_sums(x[..., block], y[..., block], docs)
        values = stats.pseudo_values(fisher_z, sums)
        low, high = np.tanh(stats.bootstrap_interval([values], seed=seed))
        r = correlation(sums.sum(1))
        intervals[block] = np.stack([np.minimum(low, r), np.maximum(high, r)], 1)
    return intervals


# ---- means over the neurons of a site ------------------------------------------------------------


def group_of(docs, among):
    """The group of each document, in 0 .. GROUPS - 1; among: documents, (D,) ascending.

    Neighbours come into different groups.
    """
    return np.searchsorted(among, docs) % GROUPS


def correlation_shifts(x, y, groups):
    """{group: shift} of the mean r over neurons: its pseudo-value minus the mean of all.

    x, y: (W, T, h); groups (W,) of documents, which are left out in turn. Neurons without a
    correlation are in no mean. None with fewer than two groups, or if no neuron has one.
    """
    blocks = []
    for start in range(0, x.shape[2], BLOCK):
        block = slice(start, start + BLOCK)
        sums = document_sums(x[..., block], y[..., block], groups)
        total = sums.sum(1)
        blocks.append(np.vstack((correlation(total)[None], correlation(total[:, None] - sums))))
    return _shifts(np.hstack(blocks), np.unique(groups).tolist())


def score_shifts(score, groups, n, seed):
    """{metric: {group: shift}} of means over n neurons of scores that are computed again.

    score(neurons, group) -> {metric: k numbers or None}, of k of the n neurons, without a group of
    documents, or with all if it is None. groups: their numbers. At most SAMPLE neurons are scored
    again; the spread that is due to their being few is taken out. {} with fewer than two groups,
    as without the only one nothing is left to score.
    """
    if len(groups) < 2:
        return {}
    chosen = np.arange(n)
    if n > SAMPLE:
        chosen = np.sort(np.random.default_rng(seed).choice(n, SAMPLE, replace=False))
    rows = [score(chosen, group) for group in (None, *groups)]
    shifts = {}
    for metric in rows[0]:
        scores = np.array([row[metric] for row in rows], np.float64)
        shifts[metric] = _shifts(scores, groups, n)
    return shifts


def _shifts(scores, groups, n=None):
    """{group: shift} of the mean of scores (1 + G, k): row 0 with all groups, then without each.

    n: neurons of which these k are a sample; then the spread due to sampling is that of n.
    """
    scores = scores[:, np.isfinite(scores[0])]
    if len(groups) < 2 or not scores.shape[1]:
        return None
    scores = np.where(np.isfinite(scores), scores, scores[0])
    values = len(groups) * scores[0] - (len(groups) - 1) * scores[1:]  # (G, k) pseudo-values
    shifts = values.mean(1) - values.mean()
    k = values.shape[1]
    if n is not None and 1 < k < n:
        variance = (shifts**2).mean()
        noise = (values - values.mean(0)).var(1, ddof=1).mean() / k
        aimed = max(variance - noise, 0) + noise * k / n
        shifts = shifts * np.sqrt(aimed / variance) if variance else shifts
    return {str(group): float(shift) for group, shift in zip(groups, shifts)}


# ---- the interval of a mean ----------------------------------------------------------------------


def mean_interval(live, drawn_from, shifts=None, splits=(), share=0.5, *, seed=0):
    """(95 % interval or None, what was redrawn) of the mean of the means of groups of scores.

    live: lists of scores, one for each layer; drawn_from: how many neurons each layer has. shifts:
    {group: shift} of the mean by documents that are scored. splits: the mean in several splits of
    the documents; share: the part of all documents that is scored in one. Other documents for both
    parts would move the mean more than other splits of the same do, with 1 / (1 - share) of the
    variance; what of it the shifts do not hold is due to the tables, and added. Neurons are redrawn
    if only some of a layer's were scored, less so the more, or if nothing is known of documents.
    """
    center = float(np.mean([np.mean(values) for values in live]))
    sources, weights = {"documents": [], "splits": [], "neurons": []}, []
    known = 0.0  # variance of the mean
    if shifts:
        sources["documents"].append(np.array(list(shifts.values())))
        weights.append(1.0)
        known = np.var(sources["documents"], ddof=1) / len(shifts)
    variance = np.var(splits, ddof=1) if len(splits) > 1 else 0.0
    if variance > 0:
        sources["splits"].append(np.array(splits) - np.mean(splits))
        missing = max(0.0, variance / (1 - share) - known)
        weights.append((missing / variance * len(splits)) ** 0.5)
    for values, n in zip(live, drawn_from):
        drawn = 1 - len(values) / n if shifts else 1.0
        if drawn > 0:
            sources["neurons"].append(np.array(values) - np.mean(values))
            weights.append(drawn**0.5 / len(live))
    bounds = stats.bootstrap_interval(sum(sources.values(), []), seed=seed, weights=weights)
    names = [name for name, values in sources.items() if values]
    return None if bounds is None else [center + bound for bound in bounds], names

"""The statistics of neuron scores that are not in stats.py, and how activations are quantised.

Arrays in, numbers out; nothing here knows what a neuron is. As in stats.py, x and y of shape (n, h)
are h pairs of columns of n values (x true, y simulated), (n,) is one pair; a statistic returns
(values, reasons), NaN with a reason where it is undefined.
"""

import numpy as np

from crate_mini.stats import NORMAL_95, columns

LEVELS = {str(i): i for i in range(11)}  # the answers that count as a quantised activation
FIRES = 0.1  # share of its maximum from which a neuron fires: level 1 of 0 to 10


# ---- firing --------------------------------------------------------------------------------------


def fires(acts, maxima):
    """(.., h): whether each activation is one at which its neuron fires; maxima (h,).

    That is a tenth of the neuron's maximum or more, which Bills et al. 2023 show to a language
    model as level 1 or more, while anything below is a 0. Any value above 0 would count rounding,
    noise and the foot of a dense neuron as firing. Others draw the line at 0.01 of the maximum
    (SAEBench), 0.3 (delphi) or 0.5 (Neuron2Graph); NeuronEval tunes a quantile.
    """
    return (acts > 0) & (acts >= FIRES * np.asarray(maxima, np.float64))


def firing(fires, y):
    """Does a high simulated value predict firing? {"f1", "auprc", "f1_chance"}; fires, y (n, h).

    Each is (values, reasons). auprc: average precision, the sum over thresholds of precision times
    gain in recall; equal values of y pass together. f1: at the threshold that passes as many tokens
    as truly fire, or the nearest to it that ties in y allow (the looser of two equally near), so
    that no threshold is tuned to the score. f1_chance: what both are worth for a simulator that
    knows nothing, the share of tokens that fire. Undefined if no token or every token fires.
    """
    fires, y = columns(fires) > 0, columns(y)
    n, positives = len(y), fires.sum(0)
    order = np.argsort(-y, axis=0, kind="stable")
    y_sorted = np.take_along_axis(y, order, 0)
    passed = np.arange(1, n + 1)[:, None]  # tokens at or above each value
    hits = np.cumsum(np.take_along_axis(fires, order, 0), 0)  # of them, those that fire
    is_threshold = np.ones(y_sorted.shape, bool)  # where the value changes
    is_threshold[:-1] = y_sorted[:-1] != y_sorted[1:]
    hits_before = np.zeros(y_sorted.shape, np.int64)  # at the threshold above
    hits_before[1:] = np.maximum.accumulate(np.where(is_threshold, hits, 0), 0)[:-1]
    distance = 2 * abs(passed - positives) - (passed > positives)  # looser wins a tie
    chosen = np.where(is_threshold, distance, 4 * n).argmin(0)
    with np.errstate(all="ignore"):
        gains = (hits - hits_before) * (hits / passed)
        auprc = np.where(is_threshold, gains, 0).sum(0) / positives
        f1 = 2 * hits[chosen, np.arange(len(chosen))] / (chosen + 1 + positives)
    reasons = np.full(len(f1), "", object)
    reasons[~np.isfinite(y).all(0)] = "simulated activations are not finite"
    reasons[positives == n] = "fires on every scored token"
    reasons[positives == 0] = "fires on no scored token"
    defined = reasons == ""
    return {
        "f1": (np.where(defined, f1, np.nan), reasons),
        "auprc": (np.where(defined, auprc, np.nan), reasons),
        "f1_chance": (np.where(defined, positives / n, np.nan), reasons),
    }


def balanced_accuracy(truth, answers):
    """Detection: (mean of the hit rates on windows that fire and on the others, reason).

    truth (n,) booleans; answers (n,) of 0, 1 or None. None is an answer that cannot be read: it is
    left out and counted in the reason, and the number is None if a class has no answer left.
    Chance is 0.5.
    """
    hits = {True: [], False: []}  # of windows that fire, of the others
    missing = 0
    for fires, answer in zip(truth, answers, strict=True):
        if answer is None:
            missing += 1
        else:
            hits[bool(fires)].append(bool(answer) == bool(fires))
    if not hits[True] or not hits[False]:
        return None, "failed: no readable answer" if missing else "windows of one class only"
    value = float(np.mean([np.mean(hits[True]), np.mean(hits[False])]))
    if missing:
        return value, f"{missing} of {len(truth)} answers missing and left out"
    return value, None


# ---- levels 0 to 10 ------------------------------------------------------------------------------


def quantise(acts, top=None, highest=10):
    """Activations as integers 0..highest, rounded down, as Bills et al. 2023 show them to a model.

    top: the activation that 10 stands for, by default the largest of `acts` (OpenAI: of the
    excerpts shown). highest 9 joins the two upper levels (Anthropic 2023). All zeros if top is not
    above 0.
    """
    acts = np.asarray(acts, np.float64)
    top = acts.max(initial=0.0) if top is None else float(top)
    if not top > 0:
        return np.zeros(acts.shape, np.int64)
    scaled = 10 * (np.maximum(acts, 0) / top)  # dividing first makes the top exactly 10
    return np.clip(np.floor(scaled), 0, highest).astype(np.int64)


def expected(logprobs):
    """Expected activation from log-probabilities of candidate tokens {text: log p}, or None.

    Only the texts "0" to "10" count; their probabilities are renormalised (Bills et al. 2023).
    """
    levels = {}
    for text, logprob in logprobs.items():
        if text in LEVELS and logprob > -np.inf:
            levels[LEVELS[text]] = float(logprob)
    if not levels:
        return None
    peak = max(levels.values())
    weights = {level: np.exp(logprob - peak) for level, logprob in levels.items()}
    total = sum(level * weight for level, weight in weights.items())
    return float(total / sum(weights.values()))


def rounded(value, digits=4):
    """A number with `digits` significant digits, as result files keep it."""
    return float(f"{float(value):.{digits}g}")


# ---- intervals -----------------------------------------------------------------------------------


def student_95(df):
    """Two-sided 95 % quantile of Student's t with df >= 1 degrees of freedom.

    Exact for 1 and 2, else by the expansion around the normal quantile (Cornish & Fisher), which is
    off by less than 1 %.
    """
    if df <= 2:
        return {1: 12.7062, 2: 4.30265}[df]
    z = NORMAL_95
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / df + second / df**2 + third / df**3

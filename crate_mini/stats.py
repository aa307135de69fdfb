"""The statistics behind every score: arrays in, numbers out; nothing here knows what a neuron is.

x and y of shape (n, h) are h pairs of columns of n values (x true, y simulated); (n,) is one pair. A
statistic returns (values, why): values (h,) float64 with NaN where it is undefined, why (h,) strings that say
the reason there and are empty elsewhere. An undefined number is never replaced and never dropped here.
"""

import numpy as np

CONSTANT = 1e-12  # a range below this share of the largest value is rounding, not variation
NUMBERS = {str(i): i for i in range(11)}


def columns(x):
    """x as float64 of shape (n, h)."""
    x = np.asarray(x, np.float64)
    return x[:, None] if x.ndim == 1 else x


class Pearson:
    """Pearson r over everything added, column by column, in one pass (Chan, Golub & LeVeque 1979)."""

    def __init__(self, width):
        self.n, self.mean, self.sums = 0, np.zeros((2, width)), np.zeros((3, width))
        self.low, self.high = np.full((2, width), np.inf), np.full((2, width), -np.inf)

    def add(self, x, y):
        """Take n more values of each column; x, y (n, width). Returns self."""
        both = np.stack([columns(x), columns(y)])
        if n := both.shape[1]:
            self.low, self.high = (
                np.minimum(self.low, both.min(1)),
                np.maximum(self.high, both.max(1)),
            )
            with np.errstate(all="ignore"):  # low and high remember what is not finite
                mean = both.mean(1)
                a, b = both - mean[:, None]
                shift, total = mean - self.mean, self.n + n
                u, v = shift
                self.sums += np.stack(
                    [(a * a).sum(0), (b * b).sum(0), (a * b).sum(0)]
                ) + self.n * n / total * np.stack([u * u, v * v, u * v])
                self.mean, self.n = self.mean + shift * n / total, total
        return self

    def result(self):
        """(r, why) of each column."""
        xx, yy, xy = self.sums
        with np.errstate(all="ignore"):
            r = np.clip(xy / np.sqrt(xx) / np.sqrt(yy), -1, 1)
            flat = self.high - self.low <= CONSTANT * np.maximum(abs(self.low), abs(self.high))
        why = np.full(len(r), "", object)
        why[~np.isfinite(r)] = "too close to constant for double precision"
        for side, name in ((1, "simulated"), (0, "true")):  # the true side has the last word
            why[flat[side]] = f"{name} activations are constant"
            why[~(np.isfinite(self.low[side]) & np.isfinite(self.high[side]))] = (
                f"{name} activations are not finite"
            )
        if self.n < 2:
            why[:] = "fewer than two tokens"
        return np.where(why == "", r, np.nan), why


def pearson(x, y):
    """(r, why) of each pair of columns."""
    x, y = columns(x), columns(y)
    return Pearson(x.shape[1]).add(x, y).result()


def ranks(x):
    """Ranks 1..n in each column of (n, h), ties sharing their average; a column with a NaN is NaN."""
    x = columns(x)
    order, at = np.argsort(x, axis=0, kind="stable"), np.arange(len(x))[:, None]
    s = np.take_along_axis(x, order, 0)
    new = np.ones(s.shape, bool)  # where a run of equal values begins
    new[1:] = s[1:] != s[:-1]
    last = np.ones(s.shape, bool)  # and where it ends
    last[:-1] = new[1:]
    first = np.maximum.accumulate(np.where(new, at, 0), 0)
    final = np.minimum.accumulate(np.where(last, at, len(x))[::-1], 0)[::-1]
    out = np.empty(s.shape)
    np.put_along_axis(out, order, (first + final) / 2 + 1, 0)
    return np.where(np.isfinite(x).all(0), out, np.nan)


def spearman(x, y):
    """(rho, why): Pearson of average ranks, so that ties neither help nor hurt by their order."""
    return pearson(ranks(x), ranks(y))


def firing(fires, y):
    """Does a high simulated value tell when the neuron fires? {"f1": (values, why), "auprc": (values, why)}.

    fires, y (n, h). auprc: average precision, sum over thresholds of precision * gain in recall, equal
    values of y passing together. f1: at the threshold that lets through as many tokens as truly fire, or as
    near to that as ties in y allow (the looser of two equally near): no threshold is tuned to the score.
    Chance is the density for both, so read them beside it. Undefined where no token or every token fires.
    """
    fires, y = columns(fires) > 0, columns(y)
    n, positives = len(y), fires.sum(0)
    order = np.argsort(-y, axis=0, kind="stable")
    s, taken = np.take_along_axis(y, order, 0), np.arange(1, n + 1)[:, None]
    hits = np.cumsum(np.take_along_axis(fires, order, 0), 0)
    end = np.ones(s.shape, bool)
    end[:-1] = s[:-1] != s[1:]  # thresholds lie where the value changes
    before = np.zeros(s.shape, np.int64)
    before[1:] = np.maximum.accumulate(np.where(end, hits, 0), 0)[:-1]
    away = np.where(end, 2 * abs(taken - positives) - (taken > positives), 4 * n)
    chosen = away.argmin(0)
    with np.errstate(all="ignore"):
        auprc = np.where(end, (hits - before) * (hits / taken), 0).sum(0) / positives
        f1 = 2 * hits[chosen, np.arange(s.shape[1])] / (chosen + 1 + positives)
    why = np.full(len(f1), "", object)
    why[~np.isfinite(y).all(0)] = "simulated activations are not finite"
    why[positives == n] = "fires on every scored token"
    why[positives == 0] = "fires on no scored token"
    found = (("f1", f1), ("auprc", auprc))
    return {name: (np.where(why == "", value, np.nan), why) for name, value in found}


def balanced_accuracy(truth, answers):
    """Detection: (mean of the hit rates on windows that fire and on those that do not, why); chance is 0.5.

    truth (n,) booleans; answers (n,) of 0, 1 or None (no readable answer: left out and counted in why; the
    number is None when a class has no answer left).
    """
    pairs = [(bool(t), bool(a)) for t, a in zip(truth, answers, strict=True) if a is not None]
    missing = len(truth) - len(pairs)
    rates = [[a == t for t, a in pairs if t is side] for side in (True, False)]
    if not all(rates):
        why = "failed: no readable answer" if missing else "windows of one class only"
        return None, why
    return (
        float(np.mean([np.mean(r) for r in rates])),
        f"{missing} of {len(truth)} answers missing and left out" if missing else None,
    )


def quantise(acts, top=None, highest=10):
    """Activations as integers 0..highest, rounded down, as Bills et al. 2023 show them to a language model.

    top: the activation that 10 stands for, by default the largest of `acts` (OpenAI: of the excerpts shown).
    highest 9 joins the two uppermost steps (Anthropic 2023). All zeros when top is not above 0.
    """
    acts = np.asarray(acts, np.float64)
    top = acts.max(initial=0.0) if top is None else float(top)
    if not top > 0:
        return np.zeros(acts.shape, np.int64)
    steps = 10 * (np.maximum(acts, 0) / top)  # a / top first: the top is exactly 10
    return np.clip(np.floor(steps), 0, highest).astype(np.int64)


def expected(logprobs):
    """Expected activation from log-probabilities of candidate tokens {text: log p}; None if none is a number.

    Only texts that are exactly "0".."10" count; their probabilities are renormalised (Bills et al. 2023).
    """
    found = {NUMBERS[t]: float(p) for t, p in logprobs.items() if t in NUMBERS and p > -np.inf}
    if not found:
        return None
    peak = max(found.values())
    weight = {i: np.exp(p - peak) for i, p in found.items()}
    return float(sum(i * w for i, w in weight.items()) / sum(weight.values()))


def resample(groups, draws=2000, seed=0):
    """Bootstrap of the mean of the groups' means: (draws,); each group is redrawn from itself."""
    rng, total = np.random.default_rng(seed), np.zeros(draws)
    for g in (np.asarray(g, np.float64) for g in groups):
        step = max(1, 2**22 // len(g))
        total += np.concatenate(
            [
                g[rng.integers(len(g), size=(min(step, draws - i), len(g)))].mean(1)
                for i in range(0, draws, step)
            ]
        )
    return total / len(groups)


def interval(groups, draws=2000, seed=0):
    """95 % interval [low, high] of the mean of group means, by resample; None if a group has under two."""
    if not groups or min(len(g) for g in groups) < 2:
        return None
    return [float(v) for v in np.quantile(resample(groups, draws, seed), (0.025, 0.975))]


def excerpt_intervals(x, y, draws=200, seed=0):
    """95 % intervals (h, 2) of Pearson r when whole windows are redrawn; x, y (W, T, h).

    Tokens of one window are not independent, windows are. NaN where over 5 % of the draws have no r.
    """
    x, y = (np.asarray(v, np.float64) for v in (x, y))
    x, y, (W, T, _) = x - x.mean((0, 1)), y - y.mean((0, 1)), x.shape
    rng = np.random.default_rng(seed)
    weight = rng.multinomial(W, np.full(W, 1 / W), size=draws) / (W * T)
    sx, sy, sxx, syy, sxy = (weight @ v.sum(1) for v in (x, y, x * x, y * y, x * y))
    vx, vy = sxx - sx * sx, syy - sy * sy
    fine = (vx > CONSTANT * sxx) & (vy > CONSTANT * syy)
    with np.errstate(all="ignore"):
        r = np.where(fine, (sxy - sx * sy) / np.sqrt(vx * vy), np.nan)
    good, out = fine.mean(0) >= 0.95, np.full((x.shape[2], 2), np.nan)
    if good.any():
        out[good] = np.clip(np.nanquantile(r[:, good], (0.025, 0.975), axis=0), -1, 1).T
    return out

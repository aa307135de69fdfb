"""Scores of neurons: the protocols, and a neuron's row in scores.jsonl.

A missing number is None with a reason, and is counted: for every metric, n = live + dead +
undefined + failed. dead: the neuron was never above 0 on the recorded tokens. failed: the
simulator gave no readable answer; the reason begins with "failed". undefined: any other missing
number, mostly because one side is constant.

The protocols (Bills et al. 2023; Bai & Ma 2024; Bricken et al. 2023) take their excerpts from
excerpts.py and simulated activations from any simulator:

    uniform          uniformly drawn held-out windows, Pearson, next to F1 and AUPRC
    openai_tar       5 top and 5 random excerpts, Pearson over all their tokens
    openai_random    the random excerpts alone
    anthropic_crate  47 excerpts of 8 tokens by rank interval, Pearson (the paper's code)
    anthropic_2023   60 excerpts by value interval, Spearman of average ranks, both sides as 0..9

Both sides, because a Spearman of whole levels against any finer numbers is capped: most tokens are
silent, all of them tie in the truth, and a simulator that is right to the last digit but one has
them in a random order. Each side is divided by its own maximum, as a language model answers on its
own scale, and rounded down.
"""

import numpy as np

from crate_mini import stats
from crate_mini.neurons import metrics
from crate_mini.neurons.ranks import spearman

# Excerpts to score on, for each protocol but `uniform`.
EXCERPTS = {"openai_tar": 10, "openai_random": 5, "anthropic_crate": 47, "anthropic_2023": 60}
PROTOCOLS = tuple(EXCERPTS)
FEWER = "excerpts of the protocol's"  # in the reason next to a score from fewer than these
MISSING = 0.2  # share of excerpts without an answer above which the neuron counts as failed
BLOCK = 64  # neurons at a time, to bound the memory of float64
DEAD = "dead: never above 0 on the recorded tokens"


# ---- protocols -----------------------------------------------------------------------------------


def score_uniform(true, simulated, maxima=None):
    """Scores on uniform windows, for all neurons at once; true, simulated (W, T, h) of any float.

    {"r": (values, reasons)}, with maxima (h,), the largest activations known, also what
    metrics.firing returns (a neuron fires at a tenth of its maximum, metrics.fires). Values and
    reasons as in metrics.py.
    """
    blocks = []
    for start in range(0, true.shape[2], BLOCK):
        x = np.asarray(true[..., start : start + BLOCK], np.float64)
        y = np.asarray(simulated[..., start : start + BLOCK], np.float64)
        x_flat, y_flat = x.reshape(-1, x.shape[2]), y.reshape(-1, y.shape[2])
        block = {"r": stats.pearson(x_flat, y_flat)}
        if maxima is not None:
            fires = metrics.fires(x_flat, maxima[start : start + BLOCK])
            block |= metrics.firing(fires, y_flat)
        blocks.append(block)
    scores = {}
    for name in blocks[0]:
        values = np.concatenate([block[name][0] for block in blocks])
        reasons = np.concatenate([block[name][1] for block in blocks])
        scores[name] = values, reasons
    return scores


def score_excerpts(protocol, excerpts, simulated):
    """(score or None, reason or None) of one neuron under one of PROTOCOLS.

    excerpts: tokens (n, w + 1), acts (n, w), n strings origin; a negative token is padding.
    simulated: n rows of w numbers, or None (or only NaN) where the simulator failed. Such an
    excerpt is left out and counted in the reason; if more than 20 % fail, so does the neuron.
    """
    chosen = range(len(excerpts.origin))
    if protocol == "openai_random":
        chosen = [i for i in chosen if excerpts.origin[i] == "random"]
    if not len(chosen):
        return None, "no such excerpts in the record"
    true, answers = [], []
    for i in chosen:
        real = np.asarray(excerpts.tokens[i][1:]) >= 0
        answer = _answer(simulated, i, real)
        if answer is not None:
            true.append(np.asarray(excerpts.acts[i], np.float64)[real])
            answers.append(answer)
    missing = len(chosen) - len(answers)
    message = f"{missing} of {len(chosen)} excerpts without a readable answer"
    if missing > MISSING * len(chosen):
        return None, f"failed: {message}"
    x, y = np.concatenate(true), np.concatenate(answers)
    if protocol == "anthropic_2023":
        values, reasons = spearman(_levels(x), _levels(y))
    else:
        values, reasons = stats.pearson(x, y)
    if reasons[0]:
        return None, reasons[0]
    return float(values[0]), f"{message}, left out" if missing else None


def _levels(acts):
    """Activations as 0..9; unchanged if one is not finite, for which there is no level."""
    return metrics.quantise(acts, highest=9) if np.isfinite(acts).all() else acts


def _answer(simulated, i, real):
    """The simulated activations of excerpt i without padding, or None if there are none."""
    if simulated is None or simulated[i] is None:
        return None
    answer = np.asarray(simulated[i], np.float64)[real]
    return None if np.isnan(answer).all() else answer


# ---- rows of scores.jsonl ------------------------------------------------------------------------


def score_row(site, layer, neuron, activity, label, uniform, others, ci95=None):
    """The row of one neuron, a line of scores.jsonl: a JSON-able dict.

    activity: {"density", "max", "mean"} from the record; label: see labels.py; uniform, others:
    {metric: (number or NaN or None, reason)}; ci95: {metric: (low, high)}. A dead neuron has no
    scores.
    """
    dead = not activity["max"] > 0
    why = {}

    def score(name, value, reason):
        if dead:
            value, reason = None, DEAD
        elif value is None or not np.isfinite(value):
            value, reason = None, reason or "not a finite number"
        if reason:
            why[name] = str(reason)
        return None if value is None else round(float(value), 6)

    scores = {}
    if uniform:
        scores["uniform"] = {name: score(name, *pair) for name, pair in uniform.items()}
    for name, pair in others.items():
        scores[name] = score(name, *pair)
    intervals = {}
    for name, bounds in (ci95 or {}).items():
        if not dead and np.isfinite(bounds).all():
            intervals[name] = [round(float(bound), 4) for bound in bounds]
    return {
        "site": site,
        "layer": int(layer),
        "neuron": int(neuron),
        "status": "dead" if dead else _row_status(scores, why),
        **{name: metrics.rounded(activity[name], 6) for name in ("density", "max", "mean")},
        "label": label,
        "scores": scores,
        "ci95": intervals,
        "why": why,
    }


def _row_status(scores, why):
    """live if any of a neuron's scores is, else undefined, else failed."""
    statuses = {status_of(value, why.get(name)) for name, value in flat_scores(scores).items()}
    for status in ("live", "undefined", "failed"):
        if status in statuses:
            return status
    return "undefined"


def status_of(value, reason):
    """The status of one score of a neuron: live, dead, undefined or failed."""
    if value is not None:
        return "live"
    if reason == DEAD:
        return "dead"
    return "failed" if (reason or "").startswith("failed") else "undefined"


def flat_scores(scores):
    """{metric: number or None} of a row's scores, those of the protocol `uniform` among them."""
    others = {name: value for name, value in scores.items() if name != "uniform"}
    return {**scores.get("uniform", {}), **others}

"""Scores of neurons: the protocols, density matching, and the book of who was scored and who was not.

A number missing is None with a reason, and is counted: for every metric n = live + dead + undefined + failed.
dead: the neuron was never above zero on the recorded tokens. failed: the simulator gave no readable answer;
its reason begins with "failed". undefined: everything else without a number (a constant side, mostly).

Protocols (facts about them: Bills et al. 2023; Bai & Ma 2024; Bricken et al. 2023); excerpts come from
`activations.select`, values for them from any simulator:
    uniform          uniformly drawn held-out windows, Pearson; F1 and AUPRC of firing beside it: the headline
    openai_tar       5 top and 5 random excerpts, Pearson over all their tokens
    openai_random    the random excerpts alone
    anthropic_crate  47 excerpts of 8 tokens by rank interval, Pearson (the paper's code)
    anthropic_2023   60 excerpts by value interval, Spearman of average ranks, truth as integers 0..9
"""

import json

import numpy as np

from crate_mini import UserError, atomic_write
from crate_mini import stats as metrics

EXCERPTS = {
    "openai_tar": 10,
    "openai_random": 5,
    "anthropic_crate": 47,
    "anthropic_2023": 60,
}  # to score on
PROTOCOLS = tuple(EXCERPTS)
FEWER = "excerpts of the protocol's"  # in the reason beside a number that was made from fewer than these
MISSING = 0.2  # share of excerpts without an answer above which the neuron counts as failed
COLUMNS = 64  # neurons at a time: what bounds the memory of float64
DEAD = "dead: never above 0 on the recorded tokens"


# ---- protocols -------------------------------------------------------------------------------------------


def uniform(true, simulated, firing=False, draws=0, seed=0):
    """Scores on uniformly drawn windows, all neurons at once; true, simulated (W, T, h) of any float type.

    {"r": (values, why)}; with firing also "f1" and "auprc" (fires: true above 0); with draws also "ci95",
    (h, 2), by redrawing windows that often. Values and reasons as in `metrics`.
    """
    parts = []
    for start in range(0, true.shape[2], COLUMNS):
        x, y = (np.asarray(v[..., start : start + COLUMNS], np.float64) for v in (true, simulated))
        flat = [v.reshape(-1, v.shape[2]) for v in (x, y)]
        part = {"r": metrics.pearson(*flat), **(metrics.firing(*flat) if firing else {})}
        if draws:
            part["ci95"] = metrics.excerpt_intervals(x, y, draws, seed)
        parts.append(part)
    return {
        name: np.concatenate([p[name] for p in parts])
        if name == "ci95"
        else tuple(np.concatenate(column) for column in zip(*(p[name] for p in parts)))
        for name in parts[0]
    }


def protocol(name, excerpts, simulated):
    """(number or None, reason or None) of one neuron under a protocol of PROTOCOLS.

    excerpts: tokens (n, w + 1), acts (n, w), origin n strings; a position whose token is negative is padding.
    simulated: n rows of w numbers, or None (or NaN throughout) where the simulator failed; such an excerpt is
    left out and counted in the reason, and above 20 % of them the neuron counts as failed.
    """
    keep = [
        i
        for i, origin in enumerate(excerpts.origin)
        if name != "openai_random" or origin == "random"
    ]
    if not keep:
        return None, "no such excerpts in the record"
    truth, guess, missing = [], [], 0
    for i in keep:
        real = np.asarray(excerpts.tokens[i][1:]) >= 0
        row = (
            None
            if simulated is None or simulated[i] is None
            else np.asarray(simulated[i], np.float64)
        )
        if row is None or np.isnan(row[real]).all():
            missing += 1
            continue
        truth.append(np.asarray(excerpts.acts[i], np.float64)[real])
        guess.append(row[real])
    said = f"{missing} of {len(keep)} excerpts without a readable answer"
    if missing > MISSING * len(keep):
        return None, f"failed: {said}"
    x, y = np.concatenate(truth), np.concatenate(guess)
    if name == "anthropic_2023":
        value, why = metrics.spearman(metrics.quantise(x, highest=9), y)
    else:
        value, why = metrics.pearson(x, y)
    return (None, why[0]) if why[0] else (float(value[0]), f"{said}, left out" if missing else None)


def protocols(selected, simulate, simulator):
    """{"NAME[simulator]": (number, reason)} of one neuron; selected: {protocol: Excerpts to score};
    simulate(tokens (n, w + 1)) -> n rows, called once for each set of excerpts."""
    return {
        f"{name}[{simulator}]": protocol(name, excerpts, simulate(excerpts.tokens))
        for name, excerpts in selected.items()
    }


# ---- density matching ------------------------------------------------------------------------------------


def thresholds(acts, share):
    """Per neuron (h,) the value above which `share` of its activations lie; acts (n, h) or (W, T, h).

    Never below 0: a neuron that fires less often than `share` is left as it is. Equal values at the cut fall
    together, so the share above is exact where values differ and never larger than asked.
    """
    if not 0 < share < 1:
        raise UserError(f"--match-density {share} must be above 0 and below 1, for example 0.01.")
    acts = np.asarray(acts).reshape(-1, np.shape(acts)[-1])
    at = len(acts) - 1 - min(max(1, round(share * len(acts))), len(acts) - 1)
    return np.maximum(np.partition(acts, at, axis=0)[at], 0)


def cut(acts, limits):
    """Activations above their neuron's limit, zero elsewhere; a NumPy array or a torch tensor (..., h)."""
    return acts * (acts > limits)


# ---- the book --------------------------------------------------------------------------------------------


def row(site, layer, neuron, stats, label, uniform, others, ci95=None):
    """One line of scores.jsonl, by the contract of interpret.py.

    stats: {"density", "max", "mean"} of the record; label: what `explain` shows; uniform and others: {metric:
    (number or NaN or None, reason)} of this neuron; ci95: {metric: (low, high)}. A dead neuron has no scores.
    """
    dead, why = not stats["max"] > 0, {}

    def told(name, found):
        value, reason = found
        if dead:
            value, reason = None, DEAD
        elif value is None or not np.isfinite(value):
            value, reason = None, reason or "not a finite number"
        if reason:
            why[name] = str(reason)
        return None if value is None else round(float(value), 6)

    scores = {"uniform": {k: told(k, v) for k, v in uniform.items()}} if uniform else {}
    scores |= {k: told(k, v) for k, v in others.items()}
    kinds = {kind(value, why.get(name)) for name, value in flat(scores).items()}
    status = next((s for s in ("live", "undefined", "failed") if s in kinds), "undefined")
    bounds = {
        k: [round(float(b), 4) for b in v] for k, v in (ci95 or {}).items() if np.isfinite(v).all()
    }
    return {
        "site": site,
        "layer": int(layer),
        "neuron": int(neuron),
        "status": "dead" if dead else status,
        **{k: float(f"{float(stats[k]):.6g}") for k in ("density", "max", "mean")},
        "label": label,
        "scores": scores,
        "ci95": {} if dead else bounds,
        "why": why,
    }


def kind(value, why):
    """What a number of one neuron is: live, dead, undefined or failed."""
    if value is not None:
        return "live"
    return "dead" if why == DEAD else "failed" if (why or "").startswith("failed") else "undefined"


def flat(scores):
    """{metric: number or None} of a row's scores, the protocol `uniform` opened."""
    return {**scores.get("uniform", {}), **{k: v for k, v in scores.items() if k != "uniform"}}


def write_rows(path, rows):
    """scores.jsonl: one JSON line per row, whole or not at all. ValueError on NaN, which JSON lacks."""
    with atomic_write(path) as file:
        for r in rows:
            file.write(json.dumps(r, allow_nan=False, ensure_ascii=False).encode() + b"\n")


def read_rows(path):
    """The rows of a scores.jsonl. Raises UserError when it is missing or broken."""
    try:
        with open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    except (OSError, ValueError) as error:
        raise UserError(
            f"Cannot read the scores in {path} ({error}); make them again with "
            "`python interpret.py neurons CKPT --from score`."
        ) from None

"""What scores.jsonl says altogether: counts, means with intervals, layers, two models compared, the table.

Functions of the rows that `score.row` makes and of nothing else: a summary is drawn again without a model.
For every metric n = live + dead + undefined + failed, and a mean is over the live ones.
"""

import itertools
from collections import Counter

import numpy as np

from crate_mini import stats as metrics
from crate_mini.neurons.protocols import FEWER, PROTOCOLS, flat, kind

STATUS = ("live", "dead", "undefined", "failed")
ORDER = ("token_r", "ngram_r", "label_r@10", "null_r", "init_r", "f1", "auprc", *PROTOCOLS)
WINDOWS = {
    "dense": 50,
    "sparse": 200,
}  # uniform windows wanted, for densities from 1 % and below it
PAPER_DROPS_LAST = (6, 12)  # layers of the models whose last layer the paper leaves out
ACROSS = 6  # sites side by side in a printed table


def by_site(rows):
    """{site: its rows}, layers in order, codes before the features of autoencoders."""
    keyed = sorted(rows, key=lambda r: (r["site"].partition(".")[2], r["layer"], r["site"]))
    return {name: list(group) for name, group in itertools.groupby(keyed, lambda r: r["site"])}


def families(rows):
    """{"codes" or the name after the dot of a site: {layer: rows}}: what may be averaged over layers."""
    found = {}
    for name, group in by_site(rows).items():
        found.setdefault(name.partition(".")[2] or "codes", {})[group[0]["layer"]] = group
    return found


def numbers(rows):
    """{metric: [(number or None, kind)]} over rows, in the order of the table; a row may lack a metric."""
    found = {}
    for r in rows:
        for name, value in flat(r["scores"]).items():
            found.setdefault(name, []).append((value, kind(value, r["why"].get(name))))
    base = {name: name.split("[")[0] for name in found}
    return dict(
        sorted(
            found.items(),
            key=lambda item: (
                ORDER.index(base[item[0]]) if base[item[0]] in ORDER else len(ORDER),
                item[0],
            ),
        )
    )


def counts(kinds):
    """{"total", "live", "dead", "undefined", "failed"} of a list of them."""
    return {"total": len(kinds), **{s: kinds.count(s) for s in STATUS}}


def statistics(found, seed=0):
    """One metric over neurons: mean of the live, its 95 % interval by redrawing neurons, median, deciles; and
    the mean with dead and undefined neurons as 0 (the failed, of which nothing is known, still left out)."""
    live, known = [v for v, k in found if k == "live"], sum(k != "failed" for _, k in found)
    if not live:
        return {
            "n": 0,
            "mean": None,
            "ci95": None,
            "median": None,
            "deciles": None,
            "mean_undefined_as_0": 0.0 if known else None,
        }
    tenths = [float(v) for v in np.quantile(live, np.arange(1, 10) / 10)]
    return {
        "n": len(live),
        "mean": float(np.mean(live)),
        "ci95": metrics.interval([live], seed=seed),
        "median": tenths[4],
        "deciles": tenths,
        "mean_undefined_as_0": float(np.sum(live) / known),
    }


def density(rows):
    """How often a site's neurons fire: over neurons, and how many fire on a mean token (L0)."""
    d = np.array([r["density"] for r in rows])
    return {
        "n": len(d),
        "mean": float(d.mean()),
        "median": float(np.median(d)),
        "max": float(d.max()),
        "over_1%": float((d > 0.01).mean()),
        "over_10%": float((d > 0.1).mean()),
        "L0": float(d.sum()),
    }


def summarise(rows, saw, layers, seed=0, windows=None):
    """The part of summary.json that follows from scores.jsonl; the caller adds command, machine and record.

    saw: {simulator: the sentence that says what it saw}; layers: of the whole model; windows: how many
    uniform windows there are, to count the neurons ("few_windows") for which they are fewer than wanted.
    "few_excerpts": by metric, how many neurons had fewer than its protocol asks for.
    """
    sites = {}
    for name, group in by_site(rows).items():
        found = numbers(group)
        n = {
            "neurons": counts([r["status"] for r in group]),
            **{metric: counts([k for _, k in values]) for metric, values in found.items()},
        }
        if windows is not None:
            n["few_windows"] = sum(
                windows < WINDOWS["sparse" if r["density"] < 0.01 else "dense"] for r in group
            )
        few = {metric: sum(FEWER in r["why"].get(metric, "") for r in group) for metric in found}
        n["few_excerpts"] = {metric: count for metric, count in few.items() if count}
        sites[name] = {
            "n": n,
            "density": density(group),
            **{metric: statistics(values, seed) for metric, values in found.items()},
        }
    return {
        "seed": seed,
        "what_the_simulator_saw": saw,
        "sites": sites,
        "overall": {name: overall(group, layers, seed) for name, group in families(rows).items()},
    }


def live_by_layer(layers):
    """{metric: {layer: its live numbers}} of {layer: rows}; a layer without any is there, empty."""
    found = {layer: numbers(rows) for layer, rows in layers.items()}
    names = dict.fromkeys(name for of in found.values() for name in of)
    return {
        name: {
            layer: [v for v, k in of[name] if k == "live"]
            for layer, of in found.items()
            if name in of
        }
        for name in names
    }


def overall(layers, total, seed=0):
    """{metric: the mean of the layers' means, each counting once}; {layer: rows}; total: layers of the model.

    paper: the same by the paper's convention: at 6 and 12 layers the last one left out; variance is the
    population variance of the layers' means. A layer without a live neuron is in no mean but is named.
    """
    found = {}
    for name, values in live_by_layer(layers).items():
        groups = {layer: v for layer, v in values.items() if v}
        kept = {
            layer: np.mean(v)
            for layer, v in groups.items()
            if not (total in PAPER_DROPS_LAST and layer == total - 1)
        }
        found[name] = {
            "n": sum(map(len, groups.values())),
            "layers": sorted(groups),
            "without": sorted(set(values) - set(groups)),
            "mean": float(np.mean([np.mean(v) for v in groups.values()])) if groups else None,
            "ci95": metrics.interval(list(groups.values()), seed=seed),
            "paper": {
                "layers": sorted(kept),
                "mean": float(np.mean([*kept.values()])) if kept else None,
                "variance": float(np.var([*kept.values()])) if kept else None,
            },
        }
    return found


def compare(ours, theirs, seed=0, family="codes", other=None):
    """Two models: {metric: {layer or "all": {"difference", "ci95"}}}, of ours minus theirs (rows of each).

    Only layers and metrics that both have; neurons of two models are not matched, so both are redrawn apart.
    family, other: which sites of ours, of theirs ("codes" or an autoencoder's name; default the same).
    """
    sides = [
        live_by_layer(families(rows).get(name, {}))
        for rows, name in ((ours, family), (theirs, other or family))
    ]
    found = {}
    for name in (n for n in sides[0] if n in sides[1]):
        a, b = (side[name] for side in sides)
        shared = sorted(layer for layer in a if a[layer] and b.get(layer))
        for key, pick in [*((str(layer), [layer]) for layer in shared), ("all", shared)]:
            left, right = ([side[layer] for layer in pick] for side in (a, b))
            if pick:
                found.setdefault(name, {})[key] = difference(left, right, seed)
    return found


def difference(left, right, seed=0):
    """{"difference", "ci95"} of two means of group means, each bootstrapped by itself."""
    means = [float(np.mean([np.mean(g) for g in side])) for side in (left, right)]
    if min(len(g) for g in left + right) < 2:
        return {"difference": means[0] - means[1], "ci95": None}
    draws = metrics.resample(left, seed=seed) - metrics.resample(right, seed=seed + 1)
    return {"difference": means[0] - means[1], "ci95": np.quantile(draws, (0.025, 0.975)).tolist()}


def table(found, seeds=1):
    """summary.json as text: a metric a row, a site a column; means with intervals, and n under every mean."""
    sites = list(found["sites"].items())
    blocks = [side_by_side(sites[i : i + ACROSS]) for i in range(0, len(sites), ACROSS)]
    few = sum(site["n"].get("few_windows", 0) for _, site in sites)
    blocks += [
        "n = live + dead + undefined + failed; mean over the live [95 % interval, neurons redrawn]"
        + (
            f"\n{few} neurons have fewer uniform windows than the {WINDOWS['dense']} wanted, or "
            f"{WINDOWS['sparse']} below 1 % density"
            if few
            else ""
        )
    ]
    short = Counter()
    for _, site in sites:
        short.update(site["n"].get("few_excerpts", {}))
    blocks += [
        "\n".join(
            f"{metric}: {count} neurons have fewer excerpts than it asks for (few documents, or "
            "they seldom fire)"
            for metric, count in short.items()
        )
    ] * bool(short)
    blocks += [all_layers(name, of) for name, of in found["overall"].items()]
    blocks += [
        "paper: averaged as the paper does, without the last layer at 6 and 12 layers; variance of\n"
        f"the layers' means. {'One training seed.' if seeds == 1 else f'{seeds} training seeds.'}"
    ]
    return "\n\n".join([*blocks, "\n".join(found["what_the_simulator_saw"].values())])


def side_by_side(sites):
    """The block of a table for some sites [(name, site)]."""
    names = list(dict.fromkeys(m for _, s in sites for m in s if m not in ("n", "density")))
    rows = [
        ("", [name for name, _ in sites]),
        ("density", [f"{s['density']['mean']:.3f}" for _, s in sites]),
    ]
    for m in names:
        rows += [
            (m, [cell(s.get(m)) for _, s in sites]),
            ("", [tally(s["n"].get(m)) for _, s in sites]),
        ]
    width = max(len(head) for head, _ in rows) + 2
    lines = [head.ljust(width) + "".join(c.rjust(25) for c in cells) for head, cells in rows]
    return "\n".join(line.rstrip() for line in lines)


def all_layers(family, found):
    """The block of a table for means over layers."""
    width = max(map(len, found), default=0) + 2
    lines = [f"{'':{width}}{f'all layers, {family}':>25}{'paper: mean':>14}{'variance':>10}"]
    for m, of in found.items():
        mean, variance = of["paper"]["mean"], of["paper"]["variance"]
        paper = f"{mean:14.3f}{variance:10.5f}" if mean is not None else f"{'-':>14}{'-':>10}"
        lines.append(f"{m:{width}}{cell(of):>25}{paper}")
    return "\n".join(lines)


def cell(stat):
    """Mean and interval, short: ".93 [.92, .94]"."""
    if not stat or stat["mean"] is None:
        return "-"
    bounds = f" [{stat['ci95'][0]:.3f}, {stat['ci95'][1]:.3f}]" if stat["ci95"] else ""
    return f"{stat['mean']:.3f}{bounds}"


def tally(n):
    """Counts as a sum: "512 = 500+8+4+0"."""
    return f"{n['total']} = " + "+".join(str(n[s]) for s in STATUS) if n else ""

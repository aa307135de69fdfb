"""summary.json from the rows of scores.jsonl: counts, means with intervals, comparisons, the table.

Everything here is a function of the rows that protocols.score_row makes, so that a summary can be
made again without a model. For every metric n = live + dead + undefined + failed; means are over
the live neurons.
"""

import itertools
import textwrap
from collections import Counter

import numpy as np

from crate_mini import stats
from crate_mini.neurons import redraw
from crate_mini.neurons.cut import WHAT
from crate_mini.neurons.protocols import FEWER, PROTOCOLS, flat_scores, status_of

STATUS = ("live", "dead", "undefined", "failed")
CORRELATIONS = ("token_r", "ngram_r", "context_gain", "label_r@10", "null_r", "init_r")
ORDER = (*CORRELATIONS, "f1", "auprc", "f1_chance", *PROTOCOLS)
SPARSE = 0.01  # density below which more windows are wanted
WINDOWS = {"dense": 50, "sparse": 200}  # uniform windows wanted for dense and sparse neurons
PAPER_DROPS_LAST = (6, 12)  # layers of the models whose last layer the paper leaves out
WIDTH = 100  # of a line of notes
SITES_ACROSS = 5  # sites next to one another in a printed table


def summarise(rows, saw, layers, seed=0, windows=None, spread=None):
    """The part of summary.json that follows from scores.jsonl, and from spread.json if given.

    saw: {simulator: a sentence on what it saw}; layers: of the whole model. windows: the number of
    uniform windows; "few_windows" counts the neurons that need more. "few_excerpts" counts, for
    each metric, the neurons with fewer excerpts than its protocol asks for. spread: see spread.py.
    """
    spread = spread or {}
    sites = {}
    for name, group in by_site(rows).items():
        scores = scores_by_metric(group)
        n = {"neurons": counts([row["status"] for row in group])}
        for metric, pairs in scores.items():
            n[metric] = counts([status for _, status in pairs])
        if windows is not None:
            n["few_windows"] = sum(windows < _windows_wanted(row) for row in group)
        n["few_excerpts"] = _few_excerpts(group, scores)
        sites[name] = {"n": n, "density": density(group)}
        for metric, pairs in scores.items():
            known = _known({name: spread.get(name, {})}, metric)
            sites[name][metric] = statistics(pairs, seed, *known)
    overall_means = {}
    for family, by_layer in families(rows).items():
        overall_means[family] = overall(by_layer, layers, seed, spread)
    return {
        "seed": seed,
        "what_the_simulator_saw": saw,
        "sites": sites,
        "overall": overall_means,
    }


def by_site(rows):
    """{site: its rows}, layers in order, codes before the features of autoencoders."""

    def place(row):
        return row["site"].partition(".")[2], row["layer"], row["site"]

    groups = itertools.groupby(sorted(rows, key=place), place)
    return {site: list(group) for (_, _, site), group in groups}


def families(rows):
    """{"codes" or an autoencoder's name: {layer: rows}}: what may be averaged over layers."""
    grouped = {}
    for site, group in by_site(rows).items():
        family = site.partition(".")[2] or "codes"
        grouped.setdefault(family, {})[group[0]["layer"]] = group
    return grouped


def scores_by_metric(rows):
    """{metric: [(number or None, status)]} in the order of the table; rows may lack a metric."""
    scores = {}
    for row in rows:
        for metric, value in flat_scores(row["scores"]).items():
            status = status_of(value, row["why"].get(metric))
            scores.setdefault(metric, []).append((value, status))
    return {metric: scores[metric] for metric in sorted(scores, key=_place_in_table)}


def _place_in_table(metric):
    """Sort key of a metric: its place in ORDER, then its name."""
    base = metric.partition("[")[0]
    return (ORDER.index(base) if base in ORDER else len(ORDER), metric)


def counts(statuses):
    """{"total", "live", "dead", "undefined", "failed"} of a list of statuses."""
    return {"total": len(statuses), **{status: statuses.count(status) for status in STATUS}}


def _windows_wanted(row):
    return WINDOWS["sparse" if row["density"] < SPARSE else "dense"]


def _few_excerpts(rows, metrics):
    """{metric: neurons scored on fewer excerpts than its protocol asks for}, without zeros."""
    few = {}
    for metric in metrics:
        count = sum(FEWER in row["why"].get(metric, "") for row in rows)
        if count:
            few[metric] = count
    return few


# ---- means ---------------------------------------------------------------------------------------


def _known(spreads, metric):
    """(neurons of each site, shifts, splits, share) of a metric's mean over sites.

    From the spread of each site, as redraw.mean_interval takes them; shifts and splits are empty
    unless all sites have them.
    """
    widths = [spread.get("neurons") for spread in spreads.values()]
    shifts = [spread.get("documents", {}).get(metric) or {} for spread in spreads.values()]
    splits = [spread.get("splits", {}).get(metric) or [] for spread in spreads.values()]
    mean_shifts = {}
    if all(shifts):
        for group in dict.fromkeys(itertools.chain(*shifts)):
            mean_shifts[group] = sum(site.get(group, 0) for site in shifts) / len(shifts)
    mean_splits = np.mean(splits, 0).tolist() if all(splits) else []
    share = max(spread.get("share", 0.5) for spread in spreads.values())
    return widths, mean_shifts, mean_splits, share


def statistics(scores, seed=0, widths=(None,), *moves):
    """One metric over neurons; scores: [(number or None, status)].

    The mean of the live with its 95 % interval (redraw.mean_interval explains widths and moves) and
    its standard deviation over splits; median and deciles; and the mean with dead and undefined
    neurons as 0. Nothing is known about the failed: they are left out.
    """
    live = [value for value, status in scores if status == "live"]
    known = sum(status != "failed" for _, status in scores)
    if not live:
        return {
            "n": 0,
            "mean": None,
            "ci95": None,
            "redrawn": [],
            "split_sd": None,
            "median": None,
            "deciles": None,
            "mean_undefined_as_0": 0.0 if known else None,
        }
    deciles = np.quantile(live, np.arange(1, 10) / 10).tolist()
    return {
        "n": len(live),
        "mean": float(np.mean(live)),
        **_interval([live], [widths[0] and widths[0] - len(scores) + len(live)], seed, *moves),
        "median": deciles[4],
        "deciles": deciles,
        "mean_undefined_as_0": float(np.sum(live) / known),
    }


def _interval(live, widths, seed, shifts=None, splits=(), share=0.5):
    """{"ci95", "redrawn", "split_sd"} of a mean; see redraw.mean_interval."""
    drawn_from = [width or float("inf") for width in widths]
    ci95, redrawn = redraw.mean_interval(live, drawn_from, shifts, splits, share, seed=seed)
    split_sd = float(np.std(splits, ddof=1)) if len(splits) > 1 else None
    return {"ci95": ci95, "redrawn": redrawn, "split_sd": split_sd}


def density(rows):
    """How often the neurons of a site fire; L0: how many of them fire on a mean token."""
    densities = np.array([row["density"] for row in rows])
    return {
        "n": len(densities),
        "mean": float(densities.mean()),
        "median": float(np.median(densities)),
        "max": float(densities.max()),
        "over_1%": float((densities > 0.01).mean()),
        "over_10%": float((densities > 0.1).mean()),
        "L0": float(densities.sum()),
    }


def overall(by_layer, layers, seed=0, spread=None):
    """{metric: mean of the layers' means, each layer counting once}; by_layer {layer: rows}.

    layers: of the whole model; spread: as in `summarise`. "paper": the same by the paper's
    convention, which leaves out the last of 6 or 12 layers and gives the population variance of the
    layers' means. A layer without a live neuron is in no mean; "without" names it.
    """
    averaged = {}
    for metric, live in live_by_layer(by_layer).items():
        groups = {layer: values for layer, values in live.items() if values}
        means = {layer: np.mean(values) for layer, values in groups.items()}
        paper_means = dict(means)
        if layers in PAPER_DROPS_LAST:
            paper_means.pop(layers - 1, None)
        averaged[metric] = {
            "n": sum(map(len, groups.values())),
            "layers": sorted(groups),
            "without": sorted(set(live) - set(groups)),
            "mean": _or_none(np.mean, means),
            **_overall_interval(by_layer, groups, spread or {}, metric, seed),
            "paper": {
                "layers": sorted(paper_means),
                "mean": _or_none(np.mean, paper_means),
                "variance": _or_none(np.var, paper_means),
            },
        }
    return averaged


def _overall_interval(by_layer, groups, spread, metric, seed):
    """`_interval` of the mean of a metric over the layers of groups {layer: live scores}."""
    if not groups:
        return {"ci95": None, "redrawn": [], "split_sd": None}
    sites = {by_layer[layer][0]["site"]: layer for layer in groups}
    known = _known({site: spread.get(site, {}) for site in sites}, metric)
    widths = []
    for width, (layer, live) in zip(known[0], groups.items()):
        widths.append(width and width - len(by_layer[layer]) + len(live))
    return _interval(list(groups.values()), widths, seed, *known[1:])


def _or_none(function, means):
    """function of the means {layer: mean}, None if there are none."""
    return float(function(list(means.values()))) if means else None


def live_by_layer(by_layer):
    """{metric: {layer: its live scores}} of {layer: rows}; a layer may have none."""
    scores = {layer: scores_by_metric(rows) for layer, rows in by_layer.items()}
    live = {}
    for layer, by_metric in scores.items():
        for metric, pairs in by_metric.items():
            values = [value for value, status in pairs if status == "live"]
            live.setdefault(metric, {})[layer] = values
    return live


# ---- two models ----------------------------------------------------------------------------------


def compare(ours, theirs, seed=0, family="codes", other=None, spreads=({}, {})):
    """Differences of two models, ours minus theirs; each given as rows.

    Returns {metric: {layer or "all": {"difference", "ci95", "redrawn"}}} for layers and metrics
    that both have. Neurons of two models are not matched, so each side is redrawn separately.
    Documents are the same for both if they were scored on one text with one seed: then give the
    spread of both summaries, and they are redrawn too, and split again. family, other: the sites of
    ours and of theirs, "codes" or an autoencoder's name; by default the same.
    """
    sides = families(ours).get(family, {}), families(theirs).get(other or family, {})
    left_scores, right_scores = (live_by_layer(rows) for rows in sides)
    compared = {}
    for metric in left_scores:
        left, right = left_scores[metric], right_scores.get(metric, {})
        shared = sorted(layer for layer in left if left[layer] and right.get(layer))
        if not shared:
            continue
        groups = {str(layer): [layer] for layer in shared}
        groups["all"] = shared
        compared[metric] = {}
        for name, chosen in groups.items():
            left_groups = [left[layer] for layer in chosen]
            right_groups = [right[layer] for layer in chosen]
            known = []
            for rows, spread in zip(sides, spreads):
                sites = [rows[layer][0]["site"] for layer in chosen]
                known.append(_known({site: spread.get(site, {}) for site in sites}, metric))
            compared[metric][name] = difference(left_groups, right_groups, seed, *known)
    return compared


def difference(left, right, seed=0, left_known=(), right_known=()):
    """{"difference", "ci95", "redrawn"} of two means of group means.

    Neurons of each side are redrawn; left_known, right_known: as `_known` returns them.
    """
    sources = left + right
    weights = [1 / len(left)] * len(left) + [-1 / len(right)] * len(right)
    redrawn = ["neurons"]
    _, left_shifts, left_splits, _ = left_known or (None, {}, [], None)
    _, right_shifts, right_splits, _ = right_known or (None, {}, [], None)
    groups = [group for group in left_shifts if group in right_shifts]
    if len(groups) > 1:
        sources = [*sources, [left_shifts[group] - right_shifts[group] for group in groups]]
        weights.append(1)
        redrawn.append("documents")
    if len(left_splits) == len(right_splits) > 1:
        splits = np.subtract(left_splits, right_splits)
        sources = [*sources, splits - splits.mean()]
        weights.append(len(splits) ** 0.5)
        redrawn.append("splits")
    return {
        "difference": _mean_of_means(left) - _mean_of_means(right),
        "ci95": stats.bootstrap_interval(sources, seed=seed, weights=weights),
        "redrawn": redrawn,
    }


def _mean_of_means(groups):
    return float(np.mean([np.mean(group) for group in groups]))


# ---- the printed table ---------------------------------------------------------------------------


def table(summary, seeds=1):
    """summary.json as text: a row for each metric, a column for each site, n below every mean.

    seeds: training seeds behind the summary, for its last note.
    """
    sites = list(summary["sites"].items())
    cut = summary.get("cut") or {}
    blocks = []
    for i in range(0, len(sites), SITES_ACROSS):
        blocks.append(_site_columns(sites[i : i + SITES_ACROSS], cut))
    if cut:
        blocks.append("\n".join(cut_notes(cut)))
    blocks.append(_notes_on_counts(list(summary["sites"].values())))
    for family, by_metric in summary["overall"].items():
        blocks.append(_all_layers(family, by_metric))
    seeds_text = "One training seed." if seeds == 1 else f"{seeds} training seeds."
    blocks.append(
        "paper: averaged as the paper does, without the last layer at 6 and 12 layers; "
        f"variance of\nthe layers' means. {seeds_text}"
    )
    blocks.append("\n".join(summary["what_the_simulator_saw"].values()))
    return "\n\n".join(blocks)


def _notes_on_counts(sites):
    """Notes under the table: the meaning of n, and neurons with too few windows or excerpts."""
    text = (
        "n = live + dead + undefined + failed; mean over the live [95 % interval], with\n"
        "± the standard deviation over splits of the documents into fit and score"
    )
    for sentence in redrawn_notes(sites):
        text += f"\n{textwrap.fill(sentence, WIDTH)}"
    few = sum(site["n"].get("few_windows", 0) for site in sites)
    if few:
        text += (
            f"\n{few} neurons have fewer uniform windows than the {WINDOWS['dense']} wanted, or "
            f"{WINDOWS['sparse']} below 1 % density"
        )
    few_excerpts = Counter()
    for site in sites:
        few_excerpts.update(site["n"].get("few_excerpts", {}))
    lines = []
    for metric, count in few_excerpts.items():
        lines.append(
            f"{metric}: {count} neurons have fewer excerpts than it asks for (few documents, or "
            "they seldom fire)"
        )
    return "\n\n".join([text, "\n".join(lines)]) if lines else text


def redrawn_notes(sites):
    """Sentences on what was redrawn for the intervals of the sites' means."""
    metrics_by_sources = {}
    for site in sites:
        for metric, statistic in site.items():
            if isinstance(statistic, dict) and statistic.get("ci95"):
                sources = ", ".join(statistic.get("redrawn", ["neurons"]))
                metrics_by_sources.setdefault(sources, {})[metric] = True
    return [
        f"redrawn for the intervals ({sources}): {', '.join(metrics)}"
        for sources, metrics in metrics_by_sources.items()
    ]


def cut_notes(cut):
    """Sentences on a cut to a density: what it is, what was reached, what it costs the model.

    cut: that entry of summary.json.
    """
    notes = [WHAT.format(share=cut["share"])]
    reached = []
    for name, density in cut["density"].items():
        text = f"{name} mean {density['mean']:.3g}, at most {density['max']:.3g}"
        if density["silenced"]:
            text += f", {density['silenced']} neurons silenced"
        reached.append(text)
    notes.append(f"Density reached: {'; '.join(reached)}.")
    loss = cut["loss"]
    if loss:
        alone = [f"{name} cut {value:.3f}" for name, value in loss["sites"].items()]
        if "all" in loss:
            alone.append(f"all layers cut {loss['all']:.3f}")
        notes.append(
            f"Loss on {loss['tokens']:,} held-out tokens, nats per token: {loss['uncut']:.3f} as "
            f"the model runs; with {', '.join(alone)}."
        )
    return notes


def _site_columns(sites, cut):
    """The block of the table for a few sites [(name, site)]; cut: see cut_notes, or {}."""
    metrics = {}  # in order of appearance
    for _, site in sites:
        metrics |= dict.fromkeys(name for name in site if name not in ("n", "density"))
    rows = [
        ("", [name for name, _ in sites]),
        ("density", [f"{site['density']['mean']:.3f}" for _, site in sites]),
    ]
    losses = (cut.get("loss") or {}).get("sites", {})
    if losses:
        rows.append(("loss, run so cut", [f"{losses[name]:.3f}" for name, _ in sites]))
    for metric in metrics:
        rows.append((metric, [mean_text(site.get(metric)) for _, site in sites]))
        rows.append(("", [count_text(site["n"].get(metric)) for _, site in sites]))
    width = max(len(head) for head, _ in rows) + 2
    lines = []
    for head, cells in rows:
        line = head.ljust(width) + "".join(cell.rjust(31) for cell in cells)
        lines.append(line.rstrip())
    return "\n".join(lines)


def _all_layers(family, by_metric):
    """The block of the table for means over layers."""
    width = max(map(len, by_metric), default=0) + 2
    lines = [f"{'':{width}}{f'all layers, {family}':>31}{'paper: mean':>14}{'variance':>10}"]
    for metric, statistic in by_metric.items():
        mean, variance = statistic["paper"]["mean"], statistic["paper"]["variance"]
        paper = f"{'-':>14}{'-':>10}" if mean is None else f"{mean:14.3f}{variance:10.5f}"
        lines.append(f"{metric:{width}}{mean_text(statistic):>31}{paper}")
    return "\n".join(lines)


def mean_text(statistic):
    """Mean, interval, deviation over splits as text: "0.930 [0.920, 0.940] ±0.004"."""
    if not statistic or statistic["mean"] is None:
        return "-"
    text = f"{statistic['mean']:.3f}"
    if statistic["ci95"]:
        low, high = statistic["ci95"]
        text += f" [{low:.3f}, {high:.3f}]"
    if statistic.get("split_sd") is not None:
        text += f" ±{statistic['split_sd']:.3f}"
    return text


def count_text(n):
    """Counts as a sum: "512 = 500+8+4+0"."""
    if not n:
        return ""
    return f"{n['total']} = " + "+".join(str(n[status]) for status in STATUS)

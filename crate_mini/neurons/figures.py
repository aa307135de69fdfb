"""Scores and densities of neurons as PNG figures, drawn from summary.json and scores.jsonl."""

import math
import statistics

from crate_mini.neurons.protocols import flat_scores
from crate_mini.plots.figure import AMBER, BLUE, GREEN, GREY, LIGHT, grid, shared_legend, write

SCORES = {  # metric of summary.json: (name in the legend, colour, hatching)
    "ngram_r": ("two tokens", BLUE, ""),
    "token_r": ("one token", GREEN, ""),
    "label_r@10": ("the label shown", AMBER, ""),
    "init_r": ("control: untrained model", GREY, "///"),
    "null_r": ("control: another neuron's table", GREY, "..."),
}
NUMBERED = 18  # bars of a panel, at most, over which their values are written
GROUPS = 10  # of neurons, for the medians along the density


def scores_by_layer(summaries, target, metrics=SCORES):
    """Draw mean scores with 95 % intervals by site, one panel for each model; returns the path.

    summaries: {model: summary.json}; metrics: as SCORES. A metric that no site has is left out; one
    that a site lacks, or that none of its neurons has, leaves a gap.
    """
    sites_of = {model: summary["sites"] for model, summary in summaries.items()}
    drawn = [metric for metric in metrics if any(_known(s, metric) for s in sites_of.values())]
    width = 0.8 / max(1, len(drawn))
    widest = max(len(sites) for sites in sites_of.values())
    shape = (max(5.2, 0.24 * widest * len(drawn)), 4)
    figure, panels = grid(len(summaries), min(3, len(summaries)), shape, sharey=True)
    for axes, (model, sites) in zip(panels, sites_of.items()):
        is_numbered = len(sites) * len(drawn) <= NUMBERED
        for i, metric in enumerate(drawn):
            shift = width * (i - (len(drawn) - 1) / 2)
            _draw_bars(axes, _known(sites, metric), shift, width, is_numbered, *metrics[metric])
        axes.axhline(0, color="black", linewidth=0.6)
        slant = {"rotation": 30, "ha": "right"} if len(sites) > 4 else {}
        axes.set_xticks(range(len(sites)), sites, **slant)
        axes.set_xlim(-0.5, len(sites) - 0.5)
        axes.set_title(model, fontsize=10, parse_math=False)
        axes.set(xlabel="site", ylabel="mean correlation" if axes is panels[0] else "")
    shared_legend(figure, panels)
    figure.suptitle(
        "How well few tokens predict a neuron: means over neurons, 95 % intervals", fontsize=11
    )
    return write(figure, target)


def _known(sites, metric):
    """[(place of the site, statistic)] of the sites that have a mean of the metric."""
    known = []
    for place, by_metric in enumerate(sites.values()):
        statistic = by_metric.get(metric) or {}
        if statistic.get("mean") is not None:
            known.append((place, statistic))
    return known


def _draw_bars(axes, known, shift, width, is_numbered, label, color, hatch):
    """One metric's bars with their intervals; shift: of their middles from the site's place."""
    for place, statistic in known:
        mean = statistic["mean"]
        low, high = statistic["ci95"] or (mean, mean)
        lengths = [[abs(low - mean)], [abs(high - mean)]]  # of the whisker below and above
        whisker = {"ecolor": "black", "error_kw": {"elinewidth": 0.8}, "capsize": 2}
        look = {"color": color, "hatch": hatch, "edgecolor": "white", "label": label, **whisker}
        axes.bar(place + shift, mean, width, yerr=lengths, **look)
        if is_numbered:
            text = {"textcoords": "offset points", "ha": "center", "fontsize": 6.5}
            number = f"{mean:.2f}".replace("-0.00", "0.00")
            axes.annotate(number, (place + shift, max(high, 0)), (0, 3), **text)


def score_against_density(models, target, metric="ngram_r", control="null_r"):
    """Draw each neuron's score over its density, one panel for each model; returns the path.

    models: {model: lines of scores.jsonl}. The lines are medians of ten groups of equally many
    neurons, of the score and of its control. All panels have the same axes.
    """
    figure, panels = grid(len(models), min(3, len(models)), (5.2, 4), sharey=True)
    drawn = [point for neurons in models.values() for point in _points(neurons, metric)]
    lowest = min((density for density, _ in drawn), default=1e-4)
    for axes, (model, neurons) in zip(panels, models.items()):
        _draw_medians(axes, _points(neurons, control), control, GREY)
        points = _points(neurons, metric)
        _draw_medians(axes, points, metric, BLUE)
        densities, scores = zip(*points or [(math.nan, math.nan)])
        axes.plot(densities, scores, ".", color=LIGHT, markersize=4, zorder=1)
        axes.axhline(0, color="black", linewidth=0.6)
        dead = sum(neuron["status"] == "dead" for neuron in neurons)
        without = len(neurons) - len(points) - dead
        axes.set_title(
            f"{model}: {len(points)} neurons, {dead} dead, {without} without a score",
            fontsize=9,
            parse_math=False,
        )
        axes.set(
            xscale="log",
            xlim=(lowest / 2, 1.2),
            xlabel="density (share of tokens above 0)",
            ylabel=f"correlation ({metric})" if axes is panels[0] else "",
        )
        axes.xaxis.set_major_formatter("{x:g}")
    shared_legend(figure, panels)
    figure.suptitle("Score of each neuron over how often it fires", fontsize=11)
    return write(figure, target)


def _points(neurons, metric):
    """(density, score) of the neurons that have both, by density."""
    points = []
    for neuron in neurons:
        score = flat_scores(neuron["scores"]).get(metric)
        if neuron["density"] and score is not None:
            points.append((neuron["density"], score))
    return sorted(points)


def _draw_medians(axes, points, metric, color):
    """The median score of each group of points, at the group's median density."""
    densities, scores = [], []
    for group in _groups(points):
        densities.append(statistics.median(density for density, _ in group))
        scores.append(statistics.median(score for _, score in group))
    name = SCORES.get(metric, (metric,))[0]
    look = {"color": color, "linewidth": 2, "zorder": 3}
    axes.plot(densities, scores, "-", label=f"{name}, median", **look)


def _groups(points):
    """Sorted points in up to GROUPS groups of nearly equal size, none empty."""
    n = min(GROUPS, len(points))
    return [points[i * len(points) // n : (i + 1) * len(points) // n] for i in range(n)]

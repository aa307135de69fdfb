"""Scores and densities of neurons as PNG figures, drawn from summary.json and scores.jsonl."""

import math
import statistics

from crate_mini.neurons.protocols import flat_scores
from crate_mini.plots.figure import AMBER, BLUE, GREEN, GREY, LIGHT, grid, shared_legend, write

SCORES = {  # metric of summary.json: (name in the legend, colour, marker and line)
    "ngram_r": ("two tokens", BLUE, "o-"),
    "token_r": ("one token", GREEN, "^-"),
    "label_r@10": ("the label shown", AMBER, "D-"),
    "null_r": ("null: another neuron's table", GREY, "s:"),
    "init_r": ("untrained model", GREY, "v--"),
}
GROUPS = 10  # of neurons, for the medians along the density


def scores_by_layer(summaries, target, metrics=SCORES):
    """Draw mean scores with 95 % intervals by site, one panel for each model; returns the path.

    summaries: {model: summary.json}; metrics: as SCORES. A metric that a site lacks, or that none
    of its neurons has, is left out. A line joins the codes of the layers, another one the features
    of an autoencoder.
    """
    figure, panels = grid(len(summaries), min(3, len(summaries)), (5.2, 4), sharey=True)
    for axes, (model, summary) in zip(panels, summaries.items()):
        sites = summary["sites"]
        for i, metric in enumerate(metrics):
            shift = 0.03 * (i - (len(metrics) - 1) / 2)  # so that equal means are both visible
            for line in _lines(sites, metric):
                _draw_means(axes, line, shift, *metrics[metric])
        axes.axhline(0, color="black", linewidth=0.6)
        slant = {"rotation": 30, "ha": "right"} if len(sites) > 4 else {}
        axes.set_xticks(range(len(sites)), sites, **slant)
        axes.set_xlim(-0.4, len(sites) - 0.6)
        axes.set_title(model, fontsize=10, parse_math=False)
        axes.set(xlabel="site", ylabel="mean correlation" if axes is panels[0] else "")
    shared_legend(figure, panels)
    figure.suptitle("means over neurons, with 95 % intervals")
    return write(figure, target)


def _lines(sites, metric):
    """Lists of (place of the site, statistic), one list for codes and one for each autoencoder."""
    lines = {}
    for place, (site, by_metric) in enumerate(sites.items()):
        statistic = by_metric.get(metric) or {}
        if statistic.get("mean") is not None:
            autoencoder = site.partition(".")[2]
            lines.setdefault(autoencoder, []).append((place, statistic))
    return lines.values()


def _draw_means(axes, line, shift, label, color, style):
    """One line of means with their intervals; shift: to the right, in sites."""
    places = [place + shift for place, _ in line]
    means = [statistic["mean"] for _, statistic in line]
    lengths = []  # of the bars below and above each mean
    for _, statistic in line:
        mean = statistic["mean"]
        low, high = statistic["ci95"] or (mean, mean)
        lengths.append((abs(low - mean), abs(high - mean)))
    look = {"fmt": style, "color": color, "capsize": 3, "markersize": 5}
    axes.errorbar(places, means, list(zip(*lengths)), label=label, **look)


def score_against_density(models, target, metric="ngram_r", control="null_r"):
    """Draw each neuron's score over its density, one panel for each model; returns the path.

    models: {model: lines of scores.jsonl}. The lines are medians of ten groups of equally many
    neurons, of the score and of its control.
    """
    figure, panels = grid(len(models), min(3, len(models)), (5.2, 4), sharey=True)
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
        lowest = min((density for density, _ in points), default=1e-4)
        axes.set(
            xscale="log",
            xlim=(lowest / 2, 1.2),
            xlabel="density (share of tokens above 0)",
            ylabel=f"correlation ({metric})" if axes is panels[0] else "",
        )
    shared_legend(figure, panels)
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

"""steering.png: effects by dose and by side effect, of one model or of several."""

import numpy as np

from crate_mini.plots.figure import AMBER, BLUE, GREEN, GREY, RED, grid, write
from crate_mini.steering.dose_response import AT_KL
from crate_mini.steering.tables import name

COLORS = (BLUE, GREEN, RED, "#7a5195")  # of models; features of an autoencoder are AMBER
LINES = {"neuron": "o-", "feature": "s-.", "feature+error": "^--", "random": "x:"}
SIDE = "KL from the unsteered model (nats)"
GAIN = "change of log-probability (nats)"
PANELS = (  # title, metrics on the x axis (None: the dose) and on the y axis
    ("a neuron's continuations, by dose", None, "effect"),
    ("side effect, by dose", None, "kl"),
    ("own continuations, for side effect", "kl", "own"),
    ("tokens seen to follow, for side effect", "kl", "seen"),
)
THIN = {"markersize": 4, "linewidth": 1.2}


def figure(results, target):
    """Draw a list of results (contents of steering.json) to a PNG file; returns its path.

    Four panels of effects, then the cost of inserting each kind and direct attribution by layer.
    """
    drawing, axes = grid(6, 3, (5, 3.6))
    for number, result in enumerate(results):
        color = COLORS[number % len(COLORS)]
        for kind, summary in result["summary"].items():
            alone = kind == "random" and len(results) == 1
            shade = _shade(kind, GREY if alone else color)
            label = f"{name(result)}, {kind}"
            for axis, (_, x, y) in zip(axes, PANELS):
                _effects(axis, summary["doses"], x, y, LINES[kind], shade, label)
        _inserted(axes[4], result, color)
        _attribution(axes[5], result, color)
    doses = [float(dose) for dose in next(iter(results[0]["summary"].values()))["doses"]]
    for axis, (title, x, y) in zip(axes, PANELS):
        _dress(axis, title, x, y, doses)
    axes[1].set_yscale("log")
    axes[4].set(title="inserted, not steered", xlabel="layer", ylabel=SIDE)
    axes[5].set(
        title="weights against a run (dotted: another neuron's)",
        xlabel="layer",
        ylabel="correlation of logits",
        ylim=(None, 1.03),
    )
    for axis in axes[4:]:
        axis.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = axes[0].get_legend_handles_labels()
    drawing.legend(handles, labels, frameon=False, loc="outside lower center", ncols=4)
    return write(drawing, target)


def _shade(kind, color):
    """The colour of a kind, in a figure that gives this colour to its model."""
    return AMBER if kind.startswith("feature") else color


def _effects(axis, doses, x, y, style, color, label):
    """One kind in one panel: the metric y with its intervals, over the metric x or the dose."""
    intervals = [metrics[y] for metrics in doses.values()]
    means = [interval["mean"] for interval in intervals]
    if x is None:
        positions = [float(dose) for dose in doses]
    else:
        positions = [metrics[x]["mean"] for metrics in doses.values()]
    bounds = [interval["ci95"] or [interval["mean"]] * 2 for interval in intervals]
    bars = abs(np.transpose(bounds) - means)  # (2, doses): below and above each mean
    axis.errorbar(positions, means, bars, fmt=style, color=color, label=label, capsize=2, **THIN)


def _dress(axis, title, x, y, doses):
    """Title, labels and scales of one panel of effects."""
    axis.set(
        title=title,
        xlabel="dose (x observed maximum)" if x is None else SIDE,
        xscale="log",
        ylabel=SIDE if y == "kl" else GAIN,
    )
    if x is None:
        axis.set_xticks(doses, [f"{dose:g}" for dose in doses])
        axis.set_xticks([], minor=True)
    else:
        axis.axvline(AT_KL, color=GREY, linewidth=0.8)


def _inserted(axis, result, color):
    """KL of inserting each kind into each layer without changing anything."""
    for kind in dict.fromkeys(row["kind"] for row in result["inserted"]):
        rows = [row for row in result["inserted"] if row["kind"] == kind]
        layers = [row["layer"] for row in rows]
        costs = [row["kl"] for row in rows]
        axis.plot(layers, costs, LINES[kind], color=_shade(kind, color), **THIN)


def _attribution(axis, result, color):
    """Correlation of direct attribution with a run, by layer; dotted: with another neuron's run."""
    smallest = min(row["dose"] for row in result["attribution"])
    rows = [row for row in result["attribution"] if row["dose"] == smallest]
    for key, style in (("correlation", "o-"), ("null", "x:")):
        known = [row for row in rows if row[key] is not None]
        layers = [row["layer"] for row in known]
        axis.plot(layers, [row[key] for row in known], style, color=color, **THIN)

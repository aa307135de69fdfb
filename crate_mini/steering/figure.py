"""steering.png: effects by dose and by side effect, of one model or of several."""

import numpy as np

from crate_mini.plots.figure import (
    AMBER,
    BLUE,
    GREEN,
    GREY,
    PURPLE,
    RED,
    grid,
    shared_legend,
    write,
)
from crate_mini.steering.dose_response import AT_KL
from crate_mini.steering.tables import name

COLORS = (BLUE, GREEN, RED, PURPLE)  # of models; features of an autoencoder are AMBER
KINDS = {  # kind: (name, marker and line)
    "neuron": ("one neuron steered", "o-"),
    "feature": ("autoencoder feature in place of the codes", "s-."),
    "feature+error": ("the same feature, reconstruction error kept", "^--"),
    "random": ("random direction of the same length", "x:"),
}
SIDE = "side effect (KL from unsteered, nats)"
GAIN = "change of log-probability (nats)"
PANELS = (  # title, metrics on the x axis (None: the dose) and on the y axis
    ("Effect of the dose:\ntokens that the neuron raises", None, "effect"),
    ("Side effect of the dose:\nall next tokens", None, "kl"),
    ("At equal side effect:\ntokens seen to follow where it fires", "kl", "seen"),
    ("At equal side effect:\ntokens that each change raises itself", "kl", "own"),
)
THIN = {"markersize": 4, "linewidth": 1.2}


def figure(results, target):
    """Draw a list of results (contents of steering.json) to a PNG file; returns its path.

    Four panels of effects, then the correlation of direct attribution with a run and, where a kind
    changes the model already by being inserted, what that costs. Models differ by colour, kinds by
    line; features of autoencoders are amber.
    """
    inserted = any(row["kl"] > 0 for result in results for row in result["inserted"])
    drawing, axes = grid(6 if inserted else 5, 3, (4.6, 3.7))
    used = {}  # of the legend
    for number, result in enumerate(results):
        color = COLORS[number % len(COLORS)]
        used[name(result)] = ("-", color)
        for kind, summary in result["summary"].items():
            for axis, (_, x, y) in zip(axes, PANELS):
                _effects(axis, summary["doses"], x, y, KINDS[kind][1], _shade(kind, color), kind)
        _attribution(axes[4], result, color)
        if inserted:
            _inserted(axes[5], result, color)
    _dress(axes, results)
    kinds = dict.fromkeys(kind for result in results for kind in result["summary"])
    used |= {KINDS[kind][0]: (KINDS[kind][1], _shade(kind, "black")) for kind in kinds}
    used["direct attribution of another neuron (control)"] = ("+:", "black")
    for label, (style, color) in used.items():
        axes[0].plot([], [], style, color=color, label=label, **THIN)
    shared_legend(drawing, axes[:1])
    return write(drawing, target)


def _shade(kind, color):
    """The colour of a kind, in a figure that gives this colour to its model."""
    return AMBER if kind.startswith("feature") else color


def _effects(axis, doses, x, y, style, color, kind):
    """One kind in one panel: the metric y with its intervals, over the metric x or the dose."""
    intervals = [metrics[y] for metrics in doses.values()]
    means = [interval["mean"] for interval in intervals]
    if x is None:
        positions = [float(dose) for dose in doses]
    else:
        positions = [metrics[x]["mean"] for metrics in doses.values()]
    bounds = [interval["ci95"] or [interval["mean"]] * 2 for interval in intervals]
    bars = abs(np.transpose(bounds) - means)  # (2, doses): below and above each mean
    look = {"color": color, "capsize": 2, **THIN}
    drawn = axis.errorbar(positions, means, bars, fmt=style, **look)
    drawn.set_label(f"_{kind}")  # a name that no legend shows


def _dress(axes, results):
    """Titles, labels and scales of all panels."""
    doses = [float(dose) for dose in next(iter(results[0]["summary"].values()))["doses"]]
    for axis, (title, x, y) in zip(axes, PANELS):
        axis.set(xscale="log", ylabel=SIDE if y == "kl" else GAIN)
        axis.set_title(title, fontsize=10)
        if x is None:
            axis.set_xlabel("dose (times the neuron's observed maximum)")
            axis.set_xticks(doses, [f"{dose:g}" for dose in doses])
            axis.set_xticks([], minor=True)
        else:
            axis.set_xlabel(SIDE)
            _plain_ticks(axis.xaxis)
            axis.axvline(AT_KL, color=GREY, linewidth=0.8)
            place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
            text = f" compared at {AT_KL:g}"
            axis.annotate(text, (AT_KL, 1), (0, -4), fontsize=8, color=GREY, va="top", **place)
    axes[1].set_yscale("log")
    _plain_ticks(axes[1].yaxis)
    axes[4].set_title("Do the weights alone predict the effect?\ndirect attribution", fontsize=10)
    axes[4].set(xlabel="layer", ylabel="correlation with the steered logits", ylim=(None, 1.05))
    for axis in axes[5:]:
        axis.set_title("What an autoencoder costs\nbefore anything is steered", fontsize=10)
        axis.set(xlabel="layer", ylabel=SIDE)
        axis.set_ylim(bottom=0)
    for axis in axes[4:]:
        axis.xaxis.get_major_locator().set_params(integer=True)


def _plain_ticks(axis):
    """Ticks of a logarithmic axis as plain numbers at 1 and 3 of each decade."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _inserted(axis, result, color):
    """KL of inserting each kind that costs anything, without changing anything, by layer."""
    for kind in dict.fromkeys(row["kind"] for row in result["inserted"] if row["kl"] > 0):
        rows = [row for row in result["inserted"] if row["kind"] == kind]
        layers = [row["layer"] for row in rows]
        costs = [row["kl"] for row in rows]
        axis.bar(layers, costs, 0.5, color=_shade(kind, color))


def _attribution(axis, result, color):
    """Correlation of direct attribution with a run, by layer; dotted: with another neuron's run."""
    smallest = min(row["dose"] for row in result["attribution"])
    rows = [row for row in result["attribution"] if row["dose"] == smallest]
    for key, style in (("correlation", "o-"), ("null", "+:")):
        known = [row for row in rows if row[key] is not None]
        layers = [row["layer"] for row in known]
        axis.plot(layers, [row[key] for row in known], style, color=color, **THIN)

"""Sparse autoencoders of one layer as a printed table and as a PNG figure.

Both take the list that `autoencoder.comparable` returns.
"""

import itertools
import math

from crate_mini.console.terminal import aligned
from crate_mini.plots.figure import AMBER, BLUE, GREEN, GREY, RED, grid, shared_legend, write

HEAD = [
    "SAE",
    "L0",
    "dead",
    "expl. var.",
    "cosine",
    "loss",
    "of zeros",
    "of mean",
    "recovered of zeros",
    "of mean",
]
COLOURS = (BLUE, GREEN, AMBER, RED, GREY)


def table(saes):
    """The SAEs as text, one row each, columns aligned on the right."""
    return aligned([HEAD, *map(table_row, saes)])


def table_row(sae):
    """The cells of one SAE, in the order of HEAD."""
    held_out = sae["held_out"]
    losses, recovered = held_out["loss"], held_out["recovered"]
    numbers = [
        held_out["explained_variance"],
        held_out["cosine"],
        losses["sae"],
        losses["zero"],
        losses["mean"],
        recovered["zero"],
        recovered["mean"],
    ]
    cells = [sae["name"], f"{held_out['L0']:.1f}", f"{100 * held_out['dead']:.1f} %"]
    for number in numbers:
        cells.append("none" if number is None else f"{number:.3f}")
    return cells


def draw(saes, target):
    """Draw loss recovered and codes explained against L0, a colour for each family of SAEs.

    SAEs of a family share activation and width. Returns the path of the PNG.
    """
    figure, (left, right) = grid(2, 2, (5.2, 4))
    for (name, family), colour in zip(families(saes).items(), itertools.cycle(COLOURS)):
        held_out = [sae["held_out"] for sae in family]
        l0 = [result["L0"] for result in held_out]
        zero = [result["recovered"]["zero"] for result in held_out]
        mean = [result["recovered"]["mean"] for result in held_out]
        variance = [result["explained_variance"] for result in held_out]
        cosine = [result["cosine"] for result in held_out]
        solid(left, l0, zero, colour, f"{name}, of the loss of zeros")
        dashed(left, l0, mean, colour, f"{name}, of the loss of the mean code")
        solid(right, l0, variance, colour, f"{name}, variance about the mean")
        dashed(right, l0, cosine, colour, f"{name}, cosine")
    l0 = [sae["held_out"]["L0"] for sae in saes]
    finish(left, "share of the loss recovered", l0)
    finish(right, "share of the codes explained", l0)
    shared_legend(figure, [left, right])
    figure.suptitle(
        f"sparse autoencoders on the {saes[0]['h']} codes of layer {saes[0]['layer']}, "
        f"{saes[0]['tokens']:,} held-out tokens"
    )
    return write(figure, target)


def families(saes):
    """{"TopK, 4x": [SAEs], ...}, in the order in which they first appear."""
    groups = {}
    for sae in saes:
        activation = "TopK" if sae["k"] else "ReLU + L1"
        name = f"{activation}, {sae['width'] // sae['h']}x"
        groups.setdefault(name, []).append(sae)
    return groups


def solid(axes, l0, values, colour, label):
    """A solid line of values against L0."""
    axes.plot(l0, gaps(values), "o-", color=colour, markersize=5, label=label)


def dashed(axes, l0, values, colour, label):
    """A pale dashed line of values against L0."""
    axes.plot(l0, gaps(values), "s--", color=colour, alpha=0.5, markersize=5, label=label)


def gaps(values):
    """The values, with NaN for None, which leaves a gap in a line."""
    return [math.nan if value is None else value for value in values]


def finish(axes, title, l0):
    """Title, a line at 1, the best value, and the axis of L0, logarithmic if it spans much."""
    from matplotlib.ticker import LogLocator

    axes.set_xlabel("features per token (L0)")
    if max(l0) > 5 * min(l0) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    axes.set_title(title, fontsize=10)
    axes.axhline(1, color="black", linewidth=0.6)

"""Sparse autoencoders of one layer as a printed table and as a PNG figure.

Both take the list that `autoencoder.comparable` returns.
"""

import itertools
import math

from crate_mini.console.terminal import aligned
from crate_mini.plots.figure import SERIES, grid, shared_legend, write

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
    """Draw loss recovered, reconstruction and dead features against L0, a colour for each family.

    SAEs of a family share activation and width. Returns the path of the PNG.
    """
    figure, (loss, reconstruction, dead) = grid(3, 3, (4.4, 4))
    for (name, family), colour in zip(families(saes).items(), itertools.cycle(SERIES)):
        held_out = [sae["held_out"] for sae in family]
        l0 = [result["L0"] for result in held_out]
        solid(loss, l0, [result["recovered"]["zero"] for result in held_out], colour, name)
        dashed(loss, l0, [result["recovered"]["mean"] for result in held_out], colour)
        variance = [result["explained_variance"] for result in held_out]
        solid(reconstruction, l0, variance, colour, name)
        dashed(reconstruction, l0, [result["cosine"] for result in held_out], colour)
        solid(dead, l0, [100 * result["dead"] for result in held_out], colour, name)
    l0 = [sae["held_out"]["L0"] for sae in saes]
    finish(loss, "Loss recovered\nsolid: of zero ablation; dashed: of mean ablation", l0)
    finish(
        reconstruction, "Reconstruction\nsolid: explained variance; dashed: cosine similarity", l0
    )
    finish(dead, "Dead features\nshare that is 0 on every held-out token", l0)
    for axes in (loss, reconstruction):
        axes.axhline(1, color="black", linewidth=0.6)
        axes.set_ylabel("share (1: as good as the codes)")
    dead.set(ylabel="dead features (%)", ylim=(0, 1.1 * max(1, dead.get_ylim()[1])))
    shared_legend(figure, [loss])
    figure.suptitle(
        f"Sparse autoencoders on the {saes[0]['h']} codes of layer {saes[0]['layer']}, "
        f"{saes[0]['tokens']:,} held-out tokens",
        fontsize=11,
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


def dashed(axes, l0, values, colour):
    """A pale dashed line of values against L0, without a name of its own."""
    axes.plot(l0, gaps(values), "s--", color=colour, alpha=0.6, markersize=5)


def gaps(values):
    """The values, with NaN for None, which leaves a gap in a line."""
    return [math.nan if value is None else value for value in values]


def finish(axes, title, l0):
    """Title, and the axis of L0, logarithmic if it spans much."""
    from matplotlib.ticker import LogLocator

    axes.set_xlabel("L0 (active features per token)")
    if max(l0) > 5 * min(l0) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    axes.set_title(title, fontsize=9)

"""Matplotlib figures as PNG files: colours, panels, labels at curves, one way to write them.

Colours mean the same in every figure: blue for trained models, grey for controls, red for limits.
Any two of them differ for colour-blind eyes too (tests/plots). Figures are made without pyplot, so
a notebook's backend and plots are not affected.
"""

import math

from crate_mini.console.results import atomic_write

BLUE = "#1f4e8c"
LIGHT = "#9fb8d8"
GREY = "#6e6e6e"
RED = "#c8402a"
GREEN = "#5cbf8a"
AMBER = "#d99a1c"
PURPLE = "#c070c8"
SERIES = (BLUE, GREEN, AMBER, RED, PURPLE, GREY)  # of curves that are alike: layers, runs, models


def grid(n, columns, shape, sharey=False):
    """A figure with n panels in rows of `columns`; returns (figure, [axes of each panel]).

    shape: (width, height) of one panel in inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-n // columns)
    size = (columns * shape[0], rows * shape[1])
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)  # attaches itself to the figure
    panels = figure.subplots(rows, columns, squeeze=False, sharey=sharey).flat
    for axes in panels[:n]:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[n:]:
        axes.remove()
    return figure, list(panels[:n])


def shared_legend(figure, panels):
    """One legend below all panels, each label once."""
    lines = {}
    for axes in panels:
        for line, label in zip(*axes.get_legend_handles_labels()):
            lines[label] = line
    inches = 0.7 + 0.08 * max(map(len, lines), default=0)  # of the widest label
    fitting = int(figure.get_figwidth() // inches)
    columns = max(1, min(len(lines), fitting))
    figure.legend(lines.values(), lines, frameon=False, loc="outside lower center", ncols=columns)


def ink(color):
    """A darker shade of a colour, in which text can be read on white."""
    channels = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{int(0.6 * channel):02x}" for channel in channels)


def label_ends(axes, ends, size=9):
    """Write a text right of the panel at the height of each curve's end, apart from the others.

    ends: [(y, text, colour)]; a curve that ends in NaN or infinity is named at the bottom. Call it
    when the panel is otherwise complete: the figure is laid out to learn how much room there is.
    Returns the texts from bottom to top.
    """
    bottom = min(axes.get_ylim())
    places = [(y if math.isfinite(y) else bottom, text, color) for y, text, color in ends]
    texts = []
    for y, text, color in sorted(places, key=lambda place: place[0]):
        place = {"xycoords": ("axes fraction", "data"), "xytext": (4, 0), "va": "center"}
        look = {"color": ink(color), "fontsize": size, "annotation_clip": False}
        texts.append(axes.annotate(text, (1, y), textcoords="offset points", **place, **look))
    _show_names_as_they_are(axes.figure)
    axes.figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in texts]
    middles = [(box.y0 + box.y1) / 2 for box in boxes]
    for text, old, new in zip(
        texts, middles, spread(middles, [1.05 * box.height for box in boxes])
    ):
        text.xyann = (4, (new - old) * 72 / axes.figure.dpi)  # in points
    return texts


def spread(middles, heights):
    """New middles of boxes, given from bottom to top, so that none overlap; each moves little.

    Boxes that touch form a block around the mean of what its boxes wanted.
    """
    blocks = []  # (bottom of the block, its height, the bottoms that its boxes wanted for it)
    for middle, height in zip(middles, heights):
        wanted = [middle - height / 2]
        bottom, size = wanted[0], height
        while blocks and blocks[-1][0] + blocks[-1][1] > bottom:
            _, below, earlier = blocks.pop()
            wanted = earlier + [want - below for want in wanted]
            size += below
            bottom = sum(wanted) / len(wanted)
        blocks.append((bottom, size, wanted))
    moved, boxes = [], iter(heights)
    for bottom, _, wanted in blocks:
        for _ in wanted:
            height = next(boxes)
            moved.append(bottom + height / 2)
            bottom += height
    return moved


def write(figure, target, dpi=150):
    """Write a figure as PNG, atomically; returns the path."""
    _show_names_as_they_are(figure)
    with atomic_write(target) as file:
        figure.savefig(file, format="png", dpi=dpi)
    return target


def _show_names_as_they_are(figure):
    """Take the texts of a figure literally: a $ in the name of a file begins no formula.

    Bytes of a name that are no text become "?". The numbers at the axes stay what they are, because
    10^3 is a formula.
    """
    from matplotlib.axis import Axis
    from matplotlib.text import Text

    numbers = set()
    for axis in figure.findobj(Axis):
        numbers |= {*axis.findobj(Text)} - {axis.label}
    for text in figure.findobj(Text):
        if text not in numbers:
            text.set_parse_math(False)
            text.set_text(text.get_text().encode(errors="replace").decode())

"""Matplotlib figures as PNG files: colours, panels, a shared legend, one way to write them.

Colours mean the same in every figure: blue for trained models, grey for controls, red for limits.
Figures are made without pyplot, so a notebook's backend and plots are not affected.
"""

from crate_mini.console.results import atomic_write

BLUE = "#1f4e8c"
LIGHT = "#9fb8d8"
GREY = "#8c8c8c"
RED = "#d1495b"
GREEN = "#2a9d6f"
AMBER = "#e0a030"


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

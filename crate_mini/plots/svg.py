"""Small charts as SVG, drawn without a library; page.css gives them their colours."""

import math
from html import escape

import numpy as np

# Size and margins of a chart, in the units of its viewBox.
WIDTH, HEIGHT = 360, 190
LEFT, RIGHT = 36, 8
TOP, BOTTOM = 10, 24


class Plot:
    """One chart: `line`, `steps` and `path` add shapes, `svg` adds the axes and returns the text.

    xs, ys: (lowest, highest) value on each axis. title: for screen readers.
    """

    def __init__(self, xs, ys, title):
        self.x0, self.x1 = xs
        self.y0, self.y1 = ys
        self.title = title
        self.shapes = []

    def x(self, value):
        """Horizontal position of a value."""
        share = (value - self.x0) / (self.x1 - self.x0)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value):
        """Vertical position of a value; SVG counts from the top."""
        share = (value - self.y0) / (self.y1 - self.y0)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    def path(self, kind, commands, style=""):
        """Add a path of SVG commands; `kind` is its CSS class, `style` further CSS."""
        style = f' style="{style}"' if style else ""
        self.shapes.append(f'<path class="{kind}"{style} d="{commands}"/>')

    def line(self, kind, points, style=""):
        """Add a line through points (x, y)."""
        places = [f"{self.x(x)} {self.y(y)}" for x, y in points]
        self.path(kind, "M" + "L".join(places), style)

    def steps(self, kind, counts, edges):
        """Add the outline of a histogram; edges has one more element than counts."""
        commands = [f"M{self.x(edges[0])} {self.y(0)}"]
        for count, right_edge in zip(counts, edges[1:]):
            commands.append(f"V{self.y(count)}H{self.x(right_edge)}")
        commands.append(f"V{self.y(0)}")
        self.path(kind, "".join(commands))

    def svg(self, xticks, yticks, attributes=""):
        """The chart as SVG; ticks {value: text}, attributes of the <svg> element as HTML."""
        end = WIDTH - RIGHT
        parts = [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            f'aria-label="{escape(self.title)}" {attributes}>'
        ]
        for value, text in yticks.items():
            y = self.y(value)
            parts.append(f'<path class="grid" d="M{LEFT} {y}H{end}"/>')
            parts.append(f'<text x="{LEFT - 5}" y="{y + 3.5}" text-anchor="end">{text}</text>')
        for value, text in xticks.items():
            place = f'x="{self.x(value)}" y="{HEIGHT - 8}"'
            parts.append(f'<text {place} text-anchor="middle">{text}</text>')
        parts += self.shapes
        parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{end}"/></svg>')
        return "".join(parts)


def count_ticks(highest):
    """Ticks of an axis of counts from 0, at most five, a round number apart."""
    power = 10 ** math.floor(math.log10(max(highest, 1)))
    candidates = (power / 2, power, 2 * power, 5 * power)
    step = next(step for step in candidates if highest / step <= 4)
    ticks = {}
    for value in np.arange(0, highest + 1e-9, max(step, 1)).tolist():
        ticks[int(value) if value == int(value) else value] = f"{value:g}"
    return ticks

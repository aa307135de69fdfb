"""What a page shows above its neurons: charts of scores and densities as SVG, the table of means."""

import math
from html import escape

import numpy as np

ABOUT = {  # metric: what the reader is told about it
    "ngram_r": "uniform windows, previous and current token: the headline",
    "token_r": "uniform windows, current token only",
    "label_r@10": "uniform windows, only the tokens of the printed label",
    "null_r": "control: another neuron’s table",
    "init_r": "control: the same architecture, untrained",
    "f1": "does it fire? F1 of the n-gram table",
    "auprc": "does it fire? area under precision and recall",
    "openai_tar": "5 top and 5 random windows (OpenAI)",
    "openai_random": "5 random windows (OpenAI)",
    "anthropic_crate": "windows of 8, rank intervals (the paper's code)",
    "anthropic_2023": "windows of 8, value intervals, Spearman (Anthropic 2023)",
}
W, H, LEFT, RIGHT, TOP, BOTTOM = 360, 190, 36, 8, 10, 24  # of a chart, in its own units
DECADES = {-4: "0.01 %", -3: "0.1 %", -2: "1 %", -1: "10 %", -0.12: "all"}  # ticks of log10 density
QUARTERS = {v: f"{v:g}" for v in (0, 0.25, 0.5, 0.75, 1)}


class Plot:
    """One small chart: maps values to places, collects SVG, closes with the axes that `ticks` name."""

    def __init__(self, xs, ys, title):
        (self.x0, self.x1), (self.y0, self.y1), self.title, self.parts = xs, ys, title, []

    def x(self, v):
        return round(LEFT + (v - self.x0) / (self.x1 - self.x0) * (W - LEFT - RIGHT), 1)

    def y(self, v):
        return round(H - BOTTOM - (v - self.y0) / (self.y1 - self.y0) * (H - TOP - BOTTOM), 1)

    def steps(self, counts, edges, kind):
        """A histogram's outline."""
        path = (
            f"M{self.x(edges[0])} {self.y(0)}"
            + "".join(f"V{self.y(c)}H{self.x(edge)}" for c, edge in zip(counts, edges[1:]))
            + f"V{self.y(0)}"
        )
        self.parts.append(f'<path class="{kind}" d="{path}"/>')

    def svg(self, xticks, yticks, extra=""):
        """The chart as SVG; ticks {value: text}."""
        grid = "".join(
            f'<path class="grid" d="M{LEFT} {self.y(v)}H{W - RIGHT}"/><text x="{LEFT - 5}" '
            f'y="{self.y(v) + 3.5}" text-anchor="end">{t}</text>'
            for v, t in yticks.items()
        )
        base = "".join(
            f'<text x="{self.x(v)}" y="{H - 8}" text-anchor="middle">{t}</text>'
            for v, t in xticks.items()
        )
        label = escape(self.title)
        return (
            f'<svg viewBox="0 0 {W} {H}" role="img" aria-label="{label}" {extra}>{grid}{base}'
            f'{"".join(self.parts)}<path class="axis" d="M{LEFT} {H - BOTTOM}H{W - RIGHT}"/></svg>'
        )


def _counts(top):
    """Ticks of an axis of counts: 0, half, all, in round numbers."""
    step = 10 ** math.floor(math.log10(max(top, 1)))
    step = next(s for s in (step / 2, step, 2 * step, 5 * step) if top / s <= 4)
    return {
        int(v) if v == int(v) else v: f"{v:g}"
        for v in np.arange(0, top + 1e-9, max(step, 1)).tolist()
    }


def score_chart(neurons, metric="ngram_r"):
    """Histogram of a score over neurons with the outlines of the two controls."""
    kinds = {"bars": metric, "null": "null_r", "init": "init_r"}
    values = {
        kind: [v for v in (n["scores"].get(m) for n in neurons) if v is not None]
        for kind, m in kinds.items()
    }
    low = min([0, *(v for found in values.values() for v in found)])
    edges = np.linspace(math.floor(low * 10) / 10, 1, 41).tolist()
    counts = {k: np.histogram(v, edges)[0].tolist() for k, v in values.items() if v}
    top = max((max(c) for c in counts.values()), default=1)
    plot = Plot((edges[0], 1), (0, max(top, 1)), f"{metric} of {len(values['bars'])} neurons")
    for kind, found in counts.items():
        plot.steps(found, edges, kind)
    return plot.svg(QUARTERS, _counts(top))


def density_chart(neurons):
    """Histogram of log10 density; neurons that never fire stand apart at the left."""
    logs = [max(math.log10(n["density"]), -5) for n in neurons if n.get("density")]
    edges = np.linspace(-5, 0, 41).tolist()
    counts, dead = np.histogram(logs, edges)[0].tolist(), sum(not n.get("density") for n in neurons)
    plot = Plot((-5.5, 0), (0, max(*counts, dead, 1)), "share of tokens on which neurons fire")
    plot.steps(counts, edges, "bars")
    plot.steps([dead], [-5.45, -5.2], "dead")
    return plot.svg({-5.33: "0", **DECADES}, _counts(max(*counts, dead, 1)))


def scatter_chart(neurons, at, metric="ngram_r"):
    """A score against density, a dot a neuron; at: the neuron's number in the page for each, or None."""
    dots = [
        (max(math.log10(n["density"]), -5), n["scores"][metric], i)
        for n, i in zip(neurons, at)
        if n.get("density") and n["scores"].get(metric) is not None
    ]
    low = math.floor(min([0, *(d[1] for d in dots)]) * 5) / 5
    plot = Plot((-5, 0), (low, 1), f"{metric} against density")
    path = "".join(f"M{plot.x(x)} {plot.y(y)}h0" for x, y, _ in dots)
    plot.parts.append(f'<path class="dots" d="{path}"/>')
    ids = ",".join("" if i is None else str(i) for _, _, i in dots)
    return plot.svg(DECADES, QUARTERS, f'data-neurons="{ids}"')


def figures(neurons, metric, place, name):
    """The three charts of a set of neurons, as one block that the script shows or hides."""
    at = [place.get((n["site"], n["neuron"])) for n in neurons]
    keys = "".join(
        f'<span class="key {k}">{t}</span>'
        for k, t in (
            ("bars", escape(metric)),
            ("null", "null: another neuron’s table"),
            ("init", "init: untrained"),
        )
    )
    charts = (
        (f"Score ({escape(metric)})", score_chart(neurons, metric), keys),
        (
            "Density",
            density_chart(neurons),
            '<span class="key bars">share of tokens where the value is '
            'positive</span><span class="key dead">never</span>',
        ),
        (
            "Score against density",
            scatter_chart(neurons, at, metric),
            "click a dot to see its neuron",
        ),
    )
    return (
        f'<div class="charts" data-site="{escape(name)}">'
        + "".join(
            f"<figure><h3>{t}</h3>{svg}<figcaption>{c}</figcaption></figure>"
            for t, svg, c in charts
        )
        + "</div>"
    )


def _two(v):
    """Two decimals, and no minus before 0."""
    return f"{v:.2f}".replace("-0.00", "0.00")


def _cell(stat, n):
    """A mean with its interval, drawn and written, as a table cell; n: how many were live, dead, ..."""
    if not stat or stat.get("mean") is None:
        return '<td class="missing">–</td>'
    mean, (low, high) = stat["mean"], stat.get("ci95") or (stat["mean"],) * 2
    place = ";".join(
        f"--{k}:{min(1, max(0, v)):.3f}" for k, v in (("m", mean), ("l", low), ("h", high))
    )
    if "variance" in stat:
        bounds, count = (
            f"variance {stat['variance']:.2g}",
            f"layers {', '.join(map(str, stat['layers']))}",
        )
    else:
        bounds = f"{_two(low)} to {_two(high)}" if stat.get("ci95") else "no interval"
        left_out = ", ".join(f"{n[k]} {k}" for k in ("dead", "undefined", "failed") if n.get(k))
        lower = f"; {stat['mean_undefined_as_0']:.3f} with those as 0" if left_out else ""
        middle = f", median {_two(stat['median'])}" if "median" in stat else ""
        count = f"n {stat['n']:,}{middle}" + (f", without {left_out}{lower}" if left_out else "")
    return (
        f'<td><b>{mean:.3f}</b> <small>{bounds}</small><span class="range" style="{place}"></span>'
        f"<small>{count}</small></td>"
    )


def means(summary):
    """The table of means: a row a metric; means of the layers' means, then a column a site."""
    columns = {}
    for family, found in summary.get("overall", {}).items():
        name = "" if family == "codes" else f", {family}"
        columns[f"all layers{name}"] = found
        columns[f"as the paper averages{name}"] = {m: stat["paper"] for m, stat in found.items()}
    columns |= summary["sites"]
    metrics = dict.fromkeys(m for c in columns.values() for m in c if m not in ("n", "density"))
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    rows = "".join(
        f'<tr><th scope="row">{escape(m)}<small>{escape(ABOUT.get(m.split("[")[0], ""))}</small></th>'
        + "".join(_cell(c.get(m), c.get("n", {}).get(m, {})) for c in columns.values())
        + "</tr>"
        for m in metrics
    )
    saw = "".join(
        f"<p>{escape(text)}</p>"
        for text in (
            "All layers: the mean of the layers’ means. As the paper averages: at 6 and 12 layers without the "
            "last; variance of the layers’ means. One training seed.",
            *summary.get("what_the_simulator_saw", {}).values(),
        )
    )
    return (
        f'<div class="wide"><table class="means"><thead><tr><th scope="col">mean over live neurons'
        f"<small>and its 95 % interval, neurons redrawn</small></th>{head}</tr></thead><tbody>{rows}"
        f'</tbody></table></div><div class="saw">{saw}</div>'
    )

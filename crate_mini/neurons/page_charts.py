"""Charts of scores and densities as SVG, and the table of means, for index.html."""

import math
from html import escape

import numpy as np

from crate_mini.neurons.summary import cut_notes, redrawn_notes
from crate_mini.plots.svg import Plot, count_ticks

ABOUT = {  # metric: its note in the table of means
    "ngram_r": "uniform windows, previous and current token",
    "token_r": "uniform windows, current token only",
    "context_gain": "ngram_r minus token_r: what the previous token adds",
    "label_r@10": "uniform windows, only the tokens of the printed label",
    "null_r": "control: another neuron’s table",
    "init_r": "control: the same architecture, untrained",
    "f1": "does it fire, at a tenth of its maximum? F1 of the n-gram table",
    "auprc": "does it fire, at a tenth of its maximum? area under the precision-recall curve",
    "f1_chance": "what a blind guess gets in f1 and auprc: the share of tokens that fire",
    "trie_r": "uniform windows, context trie",
    "trie_f1": "top windows, context trie: F1 of firing",
    "trie_precision": "top windows, context trie: precision of firing",
    "trie_recall": "top windows, context trie: recall of firing",
    "openai_tar": "5 top and 5 random windows (OpenAI)",
    "openai_random": "5 random windows (OpenAI)",
    "anthropic_crate": "windows of 8, rank intervals (the paper’s code)",
    "anthropic_2023": "windows of 8, value intervals, Spearman (Anthropic 2023)",
}
DECADES = {-4: "0.01 %", -3: "0.1 %", -2: "1 %", -1: "10 %", -0.12: "all"}  # ticks of log10 density
LOWEST = -5  # log10 density; below it all are drawn alike
BINS = 40


def lowest_score(neurons, metric):
    """The lowest value of a score and of its controls, at most 0: where axes of scores begin."""
    found = [0]
    for neuron in neurons:
        values = (neuron["scores"].get(name) for name in (metric, "null_r", "init_r"))
        found += [value for value in values if value is not None]
    return min(found)


def distributions(neurons, metric, places, site, lowest):
    """The three charts of some neurons as one block, which the script shows or hides by its site.

    metric: the score to draw. places: {(site, neuron): place on the page}; a neuron without a
    place cannot be opened. lowest: lowest_score of all sites, so that their charts share axes.
    """
    metric_text = escape(metric)
    score_key = (
        f'<span class="key bars">{metric_text}</span>'
        '<span class="key null">null: another neuron’s table</span>'
        '<span class="key init">init: untrained</span>'
    )
    density_key = (
        '<span class="key bars">share of tokens where the value is positive</span>'
        '<span class="key dead">never</span>'
    )
    charts = [
        _figure(f"Score ({metric_text})", score_chart(neurons, metric, lowest), score_key),
        _figure("Density", density_chart(neurons), density_key),
        _figure(
            "Score against density",
            scatter_chart(neurons, places, metric, lowest),
            "click a dot to see its neuron",
        ),
    ]
    return f'<div class="charts" data-site="{escape(site)}">{"".join(charts)}</div>'


def _figure(title, svg, caption):
    return f"<figure><h3>{title}</h3>{svg}<figcaption>{caption}</figcaption></figure>"


def score_chart(neurons, metric="ngram_r", lowest=None):
    """Histogram of a score over neurons, with the outlines of its two controls.

    lowest: where the axis begins at the latest; by default the lowest_score of these neurons.
    """
    values = {}
    for kind, name in (("bars", metric), ("null", "null_r"), ("init", "init_r")):
        scores = [neuron["scores"].get(name) for neuron in neurons]
        values[kind] = [score for score in scores if score is not None]
    lowest = lowest_score(neurons, metric) if lowest is None else lowest
    edges = np.linspace(math.floor(lowest * 10) / 10, 1, BINS + 1).tolist()
    counts = {}
    for kind, scores in values.items():
        if scores:
            counts[kind] = np.histogram(scores, edges)[0].tolist()
    highest = max((max(heights) for heights in counts.values()), default=1)
    title = f"{metric} of {len(values['bars'])} neurons"
    plot = Plot((edges[0], 1), (0, max(highest, 1)), title)
    for kind, heights in counts.items():
        plot.steps(kind, heights, edges)
    return plot.svg(quarter_ticks(edges[0]), count_ticks(highest))


def density_chart(neurons):
    """Histogram of log10 density; neurons that never fire stand apart on the left."""
    live = [neuron for neuron in neurons if neuron.get("density")]
    dead = len(neurons) - len(live)
    edges = np.linspace(LOWEST, 0, BINS + 1).tolist()
    counts = np.histogram([_log_density(neuron) for neuron in live], edges)[0].tolist()
    highest = max(*counts, dead, 1)
    plot = Plot((LOWEST - 0.5, 0), (0, highest), "share of tokens on which neurons fire")
    plot.steps("bars", counts, edges)
    plot.steps("dead", [dead], [LOWEST - 0.45, LOWEST - 0.2])
    return plot.svg({LOWEST - 0.33: "0", **DECADES}, count_ticks(highest))


def scatter_chart(neurons, places, metric="ngram_r", lowest=None):
    """A score against density, one dot a neuron; places and lowest as in `distributions`.

    The dots are one path; data-neurons lists the place on the page of each dot, or nothing.
    """
    dotted = []
    for neuron in neurons:
        if neuron.get("density") and neuron["scores"].get(metric) is not None:
            dotted.append(neuron)
    lowest = lowest_score(neurons, metric) if lowest is None else lowest
    bottom = math.floor(lowest * 5) / 5
    plot = Plot((LOWEST, 0), (bottom, 1), f"{metric} against density")
    dots, listed = [], []
    for neuron in dotted:
        dots.append(f"M{plot.x(_log_density(neuron))} {plot.y(neuron['scores'][metric])}h0")
        listed.append(str(places.get((neuron["site"], neuron["neuron"]), "")))
    plot.path("dots", "".join(dots))
    return plot.svg(DECADES, quarter_ticks(bottom), f'data-neurons="{",".join(listed)}"')


def quarter_ticks(lowest):
    """Ticks of an axis of scores, a quarter apart from `lowest` to 1: {value: text}."""
    return {i / 4: f"{i / 4:g}" for i in range(math.ceil(4 * lowest), 5)}


def _log_density(neuron):
    return max(math.log10(neuron["density"]), LOWEST)


# ---- the table of means --------------------------------------------------------------------------


def means(summary):
    """The table of means as HTML: a row for each metric, a column for all layers and each site."""
    columns = {}
    for family, by_metric in summary.get("overall", {}).items():
        suffix = "" if family == "codes" else f", {family}"
        columns[f"all layers{suffix}"] = by_metric
        paper = {metric: statistic["paper"] for metric, statistic in by_metric.items()}
        columns[f"as the paper averages{suffix}"] = paper
    columns |= summary["sites"]
    metrics = {}  # in order of appearance
    for column in columns.values():
        metrics |= dict.fromkeys(column)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    rows = []
    for metric in metrics:
        if metric not in ("n", "density"):
            rows.append(_row(metric, columns))
    notes = [
        *(cut_notes(summary["cut"]) if summary.get("cut") else []),
        "All layers: the mean of the layers’ means. As the paper averages: without the last layer "
        "at 6 and 12 layers; variance of the layers’ means. One training seed.",
        *redrawn_notes(summary["sites"].values()),
        *summary.get("what_the_simulator_saw", {}).values(),
    ]
    paragraphs = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return (
        '<div class="wide"><table class="means"><thead><tr><th scope="col">mean over live neurons'
        f"<small>with its 95 % interval; ± over splits of documents</small></th>{head}</tr></thead>"
        f'<tbody>{"".join(rows)}</tbody></table></div><div class="saw">{paragraphs}</div>'
    )


def _row(metric, columns):
    """A metric's row of the table."""
    about = ABOUT.get(metric.partition("[")[0], "")
    cells = []
    for name, column in columns.items():
        cells.append(_cell(name, column.get(metric), column.get("n", {}).get(metric, {})))
    head = f'<th scope="row">{escape(metric)}<small>{escape(about)}</small></th>'
    return f"<tr>{head}{''.join(cells)}</tr>"


def _cell(name, statistic, n):
    """A mean with its interval, drawn and written; name: of its column; n: {status: neurons}."""
    column = f'data-name="{escape(name)}"'
    if not statistic or statistic.get("mean") is None:
        return f'<td class="missing" {column}>–</td>'
    mean = statistic["mean"]
    low, high = statistic.get("ci95") or (mean, mean)
    places = ";".join(f"--{name}:{_share(v)}" for name, v in (("m", mean), ("l", low), ("h", high)))
    if "variance" in statistic:  # of the paper's convention
        bounds = f"variance {statistic['variance']:.2g}"
        count = f"layers {', '.join(map(str, statistic['layers']))}"
    else:
        bounds = f"{_two(low)} to {_two(high)}" if statistic.get("ci95") else "no interval"
        if statistic.get("split_sd") is not None:
            bounds += f", ±{statistic['split_sd']:.3f}"
        count = _count(statistic, n)
    return (
        f"<td {column}><b>{mean:.3f}</b> <small>{bounds}</small>"
        f'<span class="range" style="{places}"></span><small>{count}</small></td>'
    )


def _count(statistic, n):
    """How many neurons a mean is over, and how many it leaves out."""
    text = f"n {statistic['n']:,}"
    if "median" in statistic:
        text += f", median {_two(statistic['median'])}"
    missing = [
        f"{n[status]} {status}" for status in ("dead", "undefined", "failed") if n.get(status)
    ]
    if missing:
        lower = f"{statistic['mean_undefined_as_0']:.3f} with those as 0"
        text += f", without {', '.join(missing)}; {lower}"
    return text


def _share(value):
    """A place between 0 and 1 for the style sheet."""
    return f"{min(1, max(0, value)):.3f}"


def _two(value):
    """Two decimals, without a minus before 0."""
    return f"{value:.2f}".replace("-0.00", "0.00")

"""Scores and densities of neurons as PNG figures, from what `interpret.py` wrote and nothing else.

Colours mean the same everywhere: blue what was trained, grey its controls, red a limit. The figure of
layers.json is in layer_views.py, curves of the loss are in report.py.
"""

import math
import statistics

from crate_mini import atomic_write

BLUE, LIGHT, GREY, RED, GREEN, AMBER = (
    "#1f4e8c",
    "#9fb8d8",
    "#8c8c8c",
    "#d1495b",
    "#2a9d6f",
    "#e0a030",
)
SCORES = {  # metric of summary.json: how it is drawn
    "ngram_r": ("two tokens", BLUE, "o-"),
    "token_r": ("one token", GREEN, "^-"),
    "label_r@10": ("the label shown", AMBER, "D-"),
    "null_r": ("null: another neuron's table", GREY, "s:"),
    "init_r": ("the model untrained", GREY, "v--"),
}


def l0_by_layer(curves, target):
    """Draw active codes per token by layer; curves {name: [{"mean": codes, "std": or absent} of each layer]}.

    A name that ends in "untrained" is drawn in grey. Sources: "l0" of a layer in layers.json, or the mean
    {"mean": site["density"]["L0"]} of a site in summary.json.
    """
    figure, (axes,) = grid(1, 1, (6, 3.8))
    colors = iter((BLUE, GREEN, AMBER, RED, LIGHT) * len(curves))
    for name, curve in curves.items():
        grey = name.endswith("untrained")
        mean, std = [n["mean"] for n in curve], [n.get("std", 0) for n in curve]
        color = GREY if grey else next(colors)
        axes.plot(
            range(len(mean)), mean, "s--" if grey else "o-", color=color, markersize=5, label=name
        )
        axes.fill_between(
            range(len(mean)),
            [m - s for m, s in zip(mean, std)],
            [m + s for m, s in zip(mean, std)],
            color=color,
            alpha=0.12,
            linewidth=0,
        )
    axes.set(xlabel="layer", ylabel="active codes per token (L0)")
    axes.set_xticks(range(max(map(len, curves.values()))))
    axes.set_ylim(bottom=0)
    axes.set_title("codes above 0; band: std over tokens")
    axes.legend(frameon=False)
    return write(figure, target)


def scores_by_layer(summaries, target, metrics=SCORES):
    """Draw mean scores with 95 % intervals by site, one panel a model; summaries {name: summary.json}.

    metrics as SCORES; one that a site lacks, or that no neuron has, is left out. A line joins the codes of
    the layers, another the features of an autoencoder.
    """
    figure, axes = grid(len(summaries), min(3, len(summaries)), (5.2, 4), sharey=True)
    for axis, (name, summary) in zip(axes, summaries.items()):
        sites = summary["sites"]
        for i, (metric, (label, color, style)) in enumerate(metrics.items()):
            aside = 0.03 * (i - (len(metrics) - 1) / 2)  # equal means must both be seen
            lines = {}  # one for codes, one each autoencoder
            for x, (site, found) in enumerate(sites.items()):
                if (found.get(metric) or {}).get("mean") is not None:
                    lines.setdefault(site.partition(".")[2], []).append((x + aside, found[metric]))
            for line in lines.values():
                x, stats = zip(*line)
                mean = [s["mean"] for s in stats]
                ends = zip(*(s["ci95"] or (s["mean"], s["mean"]) for s in stats))
                bars = [[abs(e - m) for e, m in zip(end, mean)] for end in ends]
                axis.errorbar(
                    x, mean, bars, fmt=style, color=color, capsize=3, markersize=5, label=label
                )
        axis.axhline(0, color="black", linewidth=0.6)
        slant = {"rotation": 30, "ha": "right"} if len(sites) > 4 else {}
        axis.set_xticks(range(len(sites)), sites, **slant)
        axis.set_xlim(-0.4, len(sites) - 0.6)
        axis.set_title(name, fontsize=10, parse_math=False)
        axis.set(xlabel="site", ylabel="mean correlation" if axis is axes[0] else "")
    shared_legend(figure, axes)
    figure.suptitle("means over neurons, with 95 % intervals")
    return write(figure, target)


def score_against_density(models, target, metric="ngram_r", control="null_r"):
    """Draw each neuron's score over its density, one panel a model; models {name: lines of scores.jsonl}.

    The lines are medians of ten groups of equally many neurons, of the score and of its control.
    """
    figure, axes = grid(len(models), min(3, len(models)), (5.2, 4), sharey=True)
    for axis, (name, neurons) in zip(axes, models.items()):
        points = {}
        for key, color in ((control, GREY), (metric, BLUE)):
            scores = [{**n["scores"].get("uniform", {}), **n["scores"]}.get(key) for n in neurons]
            found = zip((n["density"] for n in neurons), scores)
            points[key] = sorted((x, y) for x, y in found if x and y is not None)
            groups = _tenths(points[key])
            axis.plot(
                [statistics.median(x for x, _ in g) for g in groups],
                [statistics.median(y for _, y in g) for g in groups],
                "-",
                color=color,
                linewidth=2,
                zorder=3,
                label=f"{SCORES.get(key, (key,))[0]}, median",
            )
        axis.plot(
            *zip(*points[metric] or [(math.nan, math.nan)]),
            ".",
            color=LIGHT,
            markersize=4,
            zorder=1,
        )
        axis.axhline(0, color="black", linewidth=0.6)
        dead = sum(n["status"] == "dead" for n in neurons)
        without = len(neurons) - len(points[metric]) - dead
        axis.set_title(
            f"{name}: {len(points[metric])} neurons, {dead} dead, {without} without score",
            fontsize=9,
            parse_math=False,
        )
        least = min((x for x, _ in points[metric]), default=1e-4)
        axis.set(
            xscale="log",
            xlim=(least / 2, 1.2),
            xlabel="density (share of tokens above 0)",
            ylabel=f"correlation ({metric})" if axis is axes[0] else "",
        )
    shared_legend(figure, axes)
    return write(figure, target)


def _tenths(points):
    """Sorted points in up to ten groups of nearly equal size, none empty."""
    n = min(10, len(points))
    return [points[i * len(points) // n : (i + 1) * len(points) // n] for i in range(n)]


# ---- sae-L*.json -----------------------------------------------------------------------------------------


def sae_table(found):
    """Sparse autoencoders as text, a row each; found: what sae.beside returns."""
    rows = [
        [
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
    ]
    for facts in found:
        r, numbers = facts["held_out"], facts["held_out"]["loss"]
        shown = (
            r["explained_variance"],
            r["cosine"],
            numbers["sae"],
            numbers["zero"],
            numbers["mean"],
            r["recovered"]["zero"],
            r["recovered"]["mean"],
        )
        rows.append(
            [
                facts["name"],
                f"{r['L0']:.1f}",
                f"{100 * r['dead']:.1f} %",
                *("none" if value is None else f"{value:.3f}" for value in shown),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths)) for row in rows)


def sae(found, target):
    """Draw what sparse autoencoders of one layer lose against how sparse they are, one line a family."""
    from matplotlib.ticker import LogLocator

    figure, (left, right) = grid(2, 2, (5.2, 4))
    families = {}
    for facts in found:
        name = f"{'TopK' if facts['k'] else 'ReLU + L1'}, {facts['width'] // facts['h']}x"
        families.setdefault(name, []).append(facts)
    for (name, family), color in zip(
        families.items(), (BLUE, GREEN, AMBER, RED, GREY) * len(families)
    ):
        for axes, keys, style, label in (
            (left, ("recovered", "zero"), "o-", f"{name}, of the loss of zeros"),
            (left, ("recovered", "mean"), "s--", f"{name}, of the loss of the mean code"),
            (right, ("explained_variance",), "o-", f"{name}, variance about the mean"),
            (right, ("cosine",), "s--", f"{name}, cosine"),
        ):
            values = [f["held_out"][keys[0]] for f in family]
            values = [v[keys[1]] if keys[1:] else v for v in values]
            axes.plot(
                [f["held_out"]["L0"] for f in family],
                [math.nan if v is None else v for v in values],
                style,
                color=color,
                alpha=1 if style == "o-" else 0.5,
                markersize=5,
                label=label,
            )
    for axes, title in (
        (left, "share of the loss recovered"),
        (right, "share of the codes explained"),
    ):
        axes.set(xscale="log", xlabel="features per token (L0)")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.set_title(title, fontsize=10)
        axes.axhline(1, color="black", linewidth=0.6)
        axes.legend(frameon=False, fontsize=7, loc="lower right")
    figure.suptitle(
        f"sparse autoencoders on the {found[0]['h']} codes of layer {found[0]['layer']}, "
        f"{found[0]['tokens']:,} held-out tokens"
    )
    return write(figure, target)


def grid(n, columns, shape, sharey=False):
    """A figure and its n axes, `shape` inches each, the superfluous ones removed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = -(-n // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(columns * shape[0], rows * shape[1]),
        squeeze=False,
        layout="constrained",
        sharey=sharey,
    )
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[n:]:
        axis.remove()
    return figure, list(axes.flat[:n])


def shared_legend(figure, axes):
    """One legend below all panels, each name once."""
    found = {text: line for axis in axes for line, text in zip(*axis.get_legend_handles_labels())}
    figure.legend(
        found.values(),
        found,
        frameon=False,
        loc="outside lower center",
        ncols=max(1, min(len(found), int(figure.get_figwidth() // 2))),
    )


def write(figure, target):
    import matplotlib.pyplot as plt

    with atomic_write(target) as file:
        figure.savefig(file, format="png", dpi=150)
    plt.close(figure)
    return target

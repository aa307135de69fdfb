"""steering.json, which `steer.py measure` wrote: printed tables, a section of index.html, a PNG figure.

The figure takes several together, and what study_steering.py made of several seeds.
"""

import math
from html import escape
from pathlib import Path

from crate_mini import UserError, cli
from crate_mini.model import Config
from crate_mini.neurons.record import kind_of
from crate_mini.plots.figure import AMBER, BLUE, GREEN, GREY, RED, grid, write
from crate_mini.plots.svg import Plot
from crate_mini.steering.dose_response import AT_KL, METRICS

COLORS = BLUE, GREEN, RED, "#7a5195"  # of models; an autoencoder's features are AMBER
LINES = {"neuron": "o-", "feature": "s-.", "feature+error": "^--", "random": "x:"}
DASHES = {
    "neuron": ("init", "none", "solid"),
    "feature": ("init", "9 2 2 2", "dashes and dots"),
    "feature+error": ("init", "5 3", "dashed"),
    "random": ("null", "2 2", "grey"),
}  # in the page
INSERTED = "inserted, nothing turned"
SIDE = "KL from the unsteered model (nats)"
GAIN = "change of log-probability (nats)"
PANELS = (  # title, what is drawn against what; x None is the dose
    ("a neuron's continuations, by dose", None, "effect"),
    ("side effect, by dose", None, "kl"),
    ("own continuations, for side effect", "kl", "own"),
    ("tokens seen to follow, for side effect", "kl", "seen"),
)


def name(result):
    """crate 3L, gpt2 2L: the kind of model and its layers."""
    config = Config(**result["checkpoint"]["config"])
    return f"{kind_of(config)} {config.n_layer}L"


def read(path):
    """A steering.json; raises UserError for a file that is none."""
    found = cli.read_json(path, expected="what `python steer.py measure CKPT` writes")
    if not {"summary", "inserted", "attribution", "checkpoint"} <= set(found):
        raise UserError(f"{path} is no steering.json; `python steer.py measure CKPT` writes one.")
    return found


# ---- tables ----------------------------------------------------------------------------------------------


def cell(found):
    """mean [95 % interval], or the reason for none."""
    if found["mean"] is None:
        return "none reached"
    return f"{found['mean']:+.3g} [{found['ci95'][0]:.3g}, {found['ci95'][1]:.3g}]"


def markdown(head, rows):
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(v) for v in line) + " |" for line in lines)


def null(row):
    """A row's correlation with another neuron, as text."""
    return "none" if row["null"] is None else f"{row['null']:.3f}"


def tables(result):
    """[(head, rows)]: doses, equal side effect, cost of inserting, attribution by layer."""
    by_dose = [
        [kind, f"{dose}x", *(cell(found[m]) for m in METRICS)]
        for kind, kinds in result["summary"].items()
        for dose, found in kinds["doses"].items()
    ]
    equal = [
        [kind, *(cell(f) for f in found["at_kl"].values()), found["at_kl"]["effect"]["n"]]
        for kind, found in result["summary"].items()
    ]
    inserted = [
        [r["layer"], r["kind"], f"{r['kl']:.4g}", f"{r['loss']:+.4g}"] for r in result["inserted"]
    ]
    told = [
        [r["layer"], f"{r['dose']:g}x", f"{r['correlation']:.3f}", null(r), f"{r['top10']:.2f}"]
        for r in result["attribution"]
    ]
    return [
        (["kind", "dose", "effect", "own", "seen", "KL", "loss"], by_dose),
        ([f"kind, at KL {AT_KL}", "effect", "own", "seen", "n"], equal),
        (["layer", INSERTED, "KL", "loss"], inserted),
        (
            [
                "layer",
                "direct attribution at",
                "correlation with a run",
                "with another neuron's",
                "top 10 shared",
            ],
            told,
        ),
    ]


def table(result):
    """Everything measured, as markdown."""
    return "\n\n".join(markdown(head, rows) for head, rows in tables(result))


def readme(found):
    """The README's tables, of results/steering.json: what is turned, pairs of kinds, weights against runs."""
    turned, pairs, told = [], [], []
    for result in found["models"].values():
        model, loss = (
            name(result),
            sum(run["val_loss"] for run in result["runs"]) / len(result["runs"]),
        )
        for kind, some in result["summary"].items():
            costs = [r["kl"] for r in result["inserted"] if r["kind"] == kind]
            cost = ", ".join(dict.fromkeys("0 exactly" if kl == 0 else f"{kl:.2g}" for kl in costs))
            at = some["at_kl"]
            turned.append(
                [
                    f"{model}, {kind}",
                    f"{loss:.3f}",
                    cost,
                    cell(at["own"]),
                    cell(at["seen"]),
                    at["own"]["n"],
                ]
            )
        pairs += [
            [f"{model}, {pair}", cell(some["own"]), cell(some["seen"]), some["own"]["n"]]
            for pair, some in result["contrasts"].items()
        ]
        least = min(r["dose"] for r in result["attribution"])
        told.append(
            [
                model,
                *(
                    f"{r['correlation']:.2f} ({null(r)})"
                    for r in result["attribution"]
                    if r["dose"] == least
                ),
            ]
        )
    return "\n\n".join(
        (
            markdown(
                [
                    "what is turned",
                    "base loss",
                    "KL of inserting it, by layer",
                    f"own at KL {AT_KL}",
                    "seen",
                    "n",
                ],
                turned,
            ),
            markdown([f"the same neurons at KL {AT_KL}", "own", "seen", "n"], pairs),
            markdown(
                [
                    "weights against a run (another neuron's)",
                    *(f"layer {n}" for n in range(max(map(len, told)) - 1)),
                ],
                told,
            ),
        )
    )


# ---- a section of index.html -----------------------------------------------------------------------------


def beside(folder, sha256):
    """The section of the steering.json in a folder, or '' if none is there or it is of another checkpoint."""
    path = Path(folder, "steering.json")
    found = read(path) if path.exists() else None
    return section(found) if found and found["checkpoint"]["sha256"] == sha256 else ""


def section(result):
    """Everything measured, as HTML: a chart for each panel, and the tables."""
    lines = ", ".join(f"{kind} {DASHES[kind][2]}" for kind in result["summary"])
    charts = "".join(
        f"<figure><h3>{escape(title)}</h3>{_chart(result, title, x, y)}<figcaption>{lines}"
        "</figcaption></figure>"
        for title, x, y in PANELS
    )
    written = "".join(
        '<div class="wide"><table><thead><tr>'
        + "".join(f'<th scope="col">{escape(v)}</th>' for v in head)
        + "</tr></thead><tbody>"
        + "".join(f"<tr>{''.join(f'<td>{escape(str(v))}</td>' for v in row)}</tr>" for row in rows)
        + "</tbody></table></div>"
        for head, rows in tables(result)
    )
    return (
        f'<section><h2>Steering</h2><p class="saw">{escape(result["command"])}. Doses are multiples of '
        "each neuron’s observed maximum; KL and loss on text that chose nothing; intervals of the mean "
        f'over neurons.</p><div class="charts two">{charts}</div>{written}</section>'
    )


def _chart(result, title, x, y):
    """One panel as SVG; doses and KL on a scale of decades."""

    def at(metric, dose, found):
        value = float(dose) if metric is None else found[metric]["mean"]
        return value if metric not in (None, "kl") else math.log10(max(value, 1e-6))

    lines = {
        kind: [(at(x, dose, f), at(y, dose, f)) for dose, f in found["doses"].items()]
        for kind, found in result["summary"].items()
    }
    xs, ys = zip(*(point for line in lines.values() for point in line))
    low, high = math.floor(min(ys)), math.floor(max(ys)) + 1
    plot = Plot((min(xs) - 0.05, max(xs) + 0.05), (low, high), title)
    for kind, line in lines.items():
        look, dashes, _ = DASHES[kind]
        path = "L".join(f"{plot.x(a)} {plot.y(b)}" for a, b in line)
        plot.parts.append(f'<path class="{look}" style="stroke-dasharray:{dashes}" d="M{path}"/>')
    decades = {v: f"{10.0**v:g}" for v in range(math.ceil(min(xs)), math.floor(max(xs)) + 1)}
    return plot.svg(
        {math.log10(d): f"{d:g}x" for d in doses(result)} if x is None else decades,
        {v: f"{10.0**v:g}" if y == "kl" else f"{v}" for v in range(low, high + 1)},
    )


def doses(result):
    """The doses of a result, as numbers; all kinds have the same."""
    return [float(dose) for dose in next(iter(result["summary"].values()))["doses"]]


# ---- steering.png ----------------------------------------------------------------------------------------


def figure(results, target):
    """Draw results (a list): effects by dose and by side effect, costs of inserting, attribution."""
    drawn, axes = grid(6, 3, (5, 3.6))
    for result, color in zip(results, COLORS * len(results)):
        for kind, found in result["summary"].items():
            look = {
                "fmt": LINES[kind],
                "markersize": 4,
                "linewidth": 1.2,
                "capsize": 2,
                "color": paint(kind, GREY if kind == "random" and len(results) == 1 else color),
                "label": f"{name(result)}, {kind}",
            }
            for axis, (_, x, y) in zip(axes, PANELS):
                ys = [f[y] for f in found["doses"].values()]
                xs = [f[x]["mean"] if x else float(d) for d, f in found["doses"].items()]
                axis.errorbar(xs, [v["mean"] for v in ys], _bars(ys), **look)
        _inserted(axes[4], result, color)
        _attribution(axes[5], result, color)
    for axis, (title, x, y) in zip(axes, PANELS):
        axis.set(
            title=title,
            xlabel=SIDE if x else "dose (x observed maximum)",
            xscale="log",
            ylabel=SIDE if y == "kl" else GAIN,
        )
        if x is None:
            axis.set_xticks(doses(results[0]), [f"{d:g}" for d in doses(results[0])])
            axis.set_xticks([], minor=True)
        else:
            axis.axvline(AT_KL, color=GREY, linewidth=0.8)
    axes[1].set_yscale("log")
    axes[4].set(title=INSERTED, xlabel="layer", ylabel=SIDE)
    axes[5].set(
        title="weights against a run (dotted: another neuron's)",
        xlabel="layer",
        ylabel="correlation of logits",
        ylim=(None, 1.03),
    )
    for axis in axes[4:]:
        axis.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, frameon=False, loc="outside lower center", ncols=4)
    return write(drawn, target)


def paint(kind, color):
    """A kind's colour in a model of this colour."""
    return AMBER if kind.startswith("feature") else color


def _inserted(axis, result, color):
    """KL of putting each kind into each layer without turning it."""
    for kind in dict.fromkeys(r["kind"] for r in result["inserted"]):
        rows = [r for r in result["inserted"] if r["kind"] == kind]
        axis.plot(
            [r["layer"] for r in rows],
            [r["kl"] for r in rows],
            LINES[kind],
            color=paint(kind, color),
            markersize=4,
            linewidth=1.2,
        )


def _attribution(axis, result, color):
    """Correlation of direct attribution with a run, by layer; dotted: with the run of another neuron."""
    least = min(r["dose"] for r in result["attribution"])
    rows = [r for r in result["attribution"] if r["dose"] == least]
    for key, style in (("correlation", "o-"), ("null", "x:")):
        at = [(r["layer"], r[key]) for r in rows if r[key] is not None]
        axis.plot(*zip(*at), style, color=color, markersize=4, linewidth=1.2)


def _bars(values):
    """Distances from the means to the ends of their intervals."""
    return [[abs(v["mean"] - v["ci95"][side]) for v in values] for side in (0, 1)]

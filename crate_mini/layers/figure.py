"""layers.json, which `interpret.py layers` wrote, as a printed table and as a figure."""

from crate_mini.plots.figure import BLUE, GREY, RED, grid, shared_legend, write

MODELS = {"trained": (BLUE, "o-"), "untrained": (GREY, "s--")}
WIDE = 6  # columns side by side in the printed table; the others go below
COLUMNS = (  # title, cell of a layer (None where it does not apply), what it says
    (
        "R^c(Z|U)",
        lambda n: _pair(n, "U"),
        "nats, before > after attention, tokens of unit length in each head; compression lowers it",
    ),
    (
        "orthonormal",
        lambda n: _pair(n, "orthonormal U"),
        "the same with every head's basis made orthonormal: comparable between layers and models",
    ),
    (
        "R(Z)",
        lambda n: _pair(n, "whole"),
        "the same of the whole stream, d dimensions at once; the theory wants it large",
    ),
    (
        "density",
        lambda n: f"{n['density']:.3f}",
        "share of codes above 0, mean over neurons and tokens",
    ),
    (
        "10-90 %",
        lambda n: f"{n['density_deciles'][0]:.2f}-{n['density_deciles'][8]:.2f}",
        "the densities that a tenth and nine tenths of the neurons stay below",
    ),
    ("dead", lambda n: str(n["dead"]), "neurons never above 0 on this text"),
    (
        "objective",
        lambda n: n["lasso"] and " > ".join(f"{v:.3f}" for v in n["lasso"]),
        "lam |a|_1 + 1/2 |LN(z) - D a|^2, per coordinate: at a = 0, after each ISTA step",
    ),
    (
        "error",
        lambda n: n["lasso"] and f"{n['reconstruction_error']:.3f}",
        "|LN(z) - D a|^2 / |LN(z)|^2, what the last codes leave out",
    ),
    (
        "eta|D|^2",
        lambda n: n["lasso"] and f"{n['dictionary']['eta_norm2']:.2f}",
        "a step is sure to lower the objective up to 1, and may diverge above 2",
    ),
    (
        "coherence",
        lambda n: f"{n['dictionary']['coherence']:.2f}",
        "largest |cos| of two atoms (columns of D; of the output map in an MLP)",
    ),
    (
        "frame",
        lambda n: f"{n['dictionary']['frame_distance_unit']:.1f}",
        "|D D^T - (h/d) I|_F of unit atoms: 0 if they cover all directions evenly",
    ),
)


def _pair(layer, name):
    return " > ".join(f"{found[name]['mean']:.1f}" for found in layer["rate"].values())


def table(result):
    """layers.json as text: a row per layer, trained and untrained, and below it one line on each column."""
    columns = [column for column in COLUMNS if column[1](result["trained"][0]) is not None]
    blocks, notes = [], {title: note for title, _, note in columns}
    for part in (columns[:WIDE], columns[WIDE:]):
        rows = [["", "layer", *(title for title, _, _ in part)]]
        for model in MODELS:
            rows += [
                [model * (n["layer"] == 0), str(n["layer"]), *(cell(n) for _, cell, _ in part)]
                for n in result[model]
            ]
        widths = [max(map(len, column)) for column in zip(*rows)]
        blocks.append("\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths)) for row in rows))
    if result["trained"][0]["projection"] != "U":
        notes["R^c(Z|U)"] += "; no U here: the value projection stands in"
    notes["on"] = (
        f"{result['tokens']:,} held-out tokens in windows of {result['window']}; "
        f"untrained: the same model from seed {result['seed']}"
    )
    return "\n\n".join([*blocks, "\n".join(f"{title:<12}{note}" for title, note in notes.items())])


def figure(result, target):
    """Draw layers.json: rates, density, objective, dictionary by layer, trained beside untrained."""
    of = "U" if result["trained"][0]["projection"] == "U" else "value maps"
    panels = [
        lambda axes: _rates(axes, result, "U", f"coding rate R^c(Z|{of})"),
        lambda axes: _rates(axes, result, "orthonormal U", f"R^c, {of} orthonormal in each head"),
        lambda axes: _rates(axes, result, "whole", "R(Z), the whole stream"),
        lambda axes: _densities(axes, result),
    ]
    if result["trained"][0]["lasso"]:
        panels += [
            lambda axes: _objective(axes, result),
            lambda axes: _errors(axes, result),
            lambda axes: _steps(axes, result),
        ]
    panels += [lambda axes: _coherence(axes, result)]
    picture, axes = grid(len(panels), 3 if len(panels) < 6 else 4, (3.7, 3.1))
    for axis, draw in zip(axes, panels):
        draw(axis)
    c = result["checkpoint"]["config"]
    picture.suptitle(
        f"{c['attention']} + {c['sparsifier']}{' + residual' * c['residual']}, "
        f"{c['n_layer']} layers, d = {c['n_embd']}; {result['tokens']:,} held-out tokens"
    )
    for name, (color, style) in MODELS.items():
        axes[0].plot([], [], style, color=color, label=name)
    for name, face in (("attention input", "white"), ("after attention", BLUE)):
        axes[0].plot([], [], "o", color=BLUE, markerfacecolor=face, label=name)
    shared_legend(picture, axes)
    return write(picture, target)


def _rates(axes, result, name, title):
    """Before and after attention, joined: a segment that falls is a block that compresses."""
    for model, (color, _) in MODELS.items():
        for n in result[model]:
            x = n["layer"] + (-0.2 if model == "trained" else 0.2)
            at, (before, after) = [x - 0.1, x + 0.1], (found[name] for found in n["rate"].values())
            axes.errorbar(
                at,
                [before["mean"], after["mean"]],
                [before["std"], after["std"]],
                color=color,
                elinewidth=0.8,
                linewidth=1.6,
                zorder=2,
            )
            axes.plot(at[0], before["mean"], "o", color=color, markerfacecolor="white", zorder=3)
            axes.plot(at[1], after["mean"], "o", color=color, zorder=3)
    least, most = result["rate_bounds"]["whole" if name == "whole" else "U"]
    _label(
        axes,
        result,
        "nats",
        f"{title}\npossible: {least:.0f} to {most:.0f}; bars: std over windows",
    )


def _densities(axes, result):
    """Where the neurons' densities lie: middle 80 % thin, middle 40 % thick, the mean; dead ones counted."""
    for model, (color, style) in MODELS.items():
        for n in result[model]:
            x, q = n["layer"] + (-0.12 if model == "trained" else 0.12), n["density_deciles"]
            axes.plot([x, x], [q[0], q[8]], color=color, linewidth=1)
            axes.plot(
                [x, x], [q[2], q[6]], color=color, linewidth=6, alpha=0.5, solid_capstyle="butt"
            )
            axes.plot(x, n["density"], style[0], color=color, markeredgecolor="white")
            if n["dead"]:
                axes.annotate(
                    f"{n['dead']} dead", (x, q[8]), color=color, ha="center", va="bottom", size=7
                )
    axes.set_ylim(0, 1)
    _label(axes, result, "share of tokens", "density of the neurons\nmean; middle 40 % and 80 %")


def _by_layer(axes, result, value, ylabel, title):
    for model, (color, style) in MODELS.items():
        axes.plot(
            [n["layer"] for n in result[model]],
            [value(n) for n in result[model]],
            style,
            color=color,
            markersize=5,
        )
    axes.set_ylim(bottom=0)
    _label(axes, result, ylabel, title)


def _errors(axes, result):
    _by_layer(
        axes,
        result,
        lambda n: n["reconstruction_error"],
        "share left out",
        "reconstruction error\n|LN(z) - D a|^2 / |LN(z)|^2",
    )


def _steps(axes, result):
    _by_layer(
        axes, result, lambda n: n["dictionary"]["eta_norm2"], "eta |D|^2", "size of the ISTA step"
    )
    axes.set_ylim(
        0, 1.1 * max(2.1, *(n["dictionary"]["eta_norm2"] for m in MODELS for n in result[m]))
    )
    axes.axhline(2, color=RED, linewidth=1)
    axes.axhline(1, color=RED, linewidth=1, linestyle=":")
    for y, text in ((2, "may diverge above"), (1, "sure to descend below")):
        axes.annotate(
            text,
            (1, y),
            xycoords=("axes fraction", "data"),
            color=RED,
            fontsize=7,
            ha="right",
            va="bottom" if y == 2 else "top",
        )


def _coherence(axes, result):
    _by_layer(
        axes,
        result,
        lambda n: n["dictionary"]["coherence"],
        "|cos|",
        "coherence of the atoms\nlargest; dots: mean; red: least possible",
    )
    for model, (color, _) in MODELS.items():
        mean = [n["dictionary"]["mean_cosine"] for n in result[model]]
        axes.plot(range(len(mean)), mean, ":", color=color)
    axes.axhline(result["trained"][0]["dictionary"]["welch"], color=RED, linewidth=1)
    axes.set_ylim(0, 1.05)


def _objective(axes, result):
    """The lasso objective step by step: lighter lines are deeper layers."""
    for model, (color, style) in MODELS.items():
        for n in result[model]:
            axes.plot(
                n["lasso"],
                style,
                color=color,
                markersize=4,
                linewidth=1.2,
                alpha=1 - 0.7 * n["layer"] / len(result[model]),
            )
    axes.set(
        xticks=range(len(result["trained"][0]["lasso"])),
        xlabel="ISTA steps",
        ylabel="per coordinate",
    )
    axes.set_title("lasso objective\npaler: deeper layers", fontsize=9)
    axes.set_ylim(bottom=0)


def _label(axes, result, ylabel, title):
    axes.set(xlabel="layer", ylabel=ylabel, xticks=[n["layer"] for n in result["trained"]])
    axes.set_xlim(-0.5, len(result["trained"]) - 0.5)
    axes.set_title(title, fontsize=9)

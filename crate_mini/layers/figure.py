"""layers.json, which `interpret.py layers` writes, as a printed table and as figures."""

import itertools

from crate_mini.console.terminal import aligned
from crate_mini.layers import verdict
from crate_mini.plots.figure import (
    AMBER,
    BLUE,
    GREEN,
    GREY,
    PURPLE,
    RED,
    grid,
    ink,
    label_ends,
    shared_legend,
    write,
)

MODELS = {"trained": (BLUE, "o-"), "untrained": (GREY, "s--")}
SIDE = {"trained": -1, "untrained": 1}  # of a layer's tick, where a model is drawn


# ---- table ---------------------------------------------------------------------------------------

COLUMNS_IN_A_BLOCK = 6  # the others go into a second block, below
NOTES = {  # title of a column: its meaning
    "R^c(Z|U)": "nats, before > after attention, tokens of unit length in each head; "
    "compression lowers it",
    "orthonormal": "the same with every head's basis made orthonormal: comparable between layers "
    "and models",
    "R(Z)": "the same for the whole stream, all d dimensions; the theory wants it large",
    "density": "share of codes above 0, mean over neurons and tokens",
    "10-90 %": "10th and 90th percentile of the density over neurons",
    "dead": "neurons never above 0 on this text",
    "objective": "lam |a|_1 + 1/2 |LN(z) - D a|^2, per coordinate: at a = 0, after each ISTA step",
    "optimum": "the lowest possible objective, and the density of its codes",
    "error": "|LN(z) - D a|^2 / |LN(z)|^2, the share that the final codes miss",
    "eta|D|^2": "below 2 no ISTA step can raise the objective, above it steps may diverge",
    "coherence": "largest |cos| of two atoms (columns of D; of the output map in an MLP)",
    "frame": "|D D^T - (h/d) I|_F of unit atoms: 0 if they cover all directions evenly",
}


def table(result):
    """layers.json as text: a row for each layer of both models, then a line about each column."""
    titles = [title for title in NOTES if title in cells(result["trained"][0])]
    blocks = [
        _block(result, titles[:COLUMNS_IN_A_BLOCK]),
        _block(result, titles[COLUMNS_IN_A_BLOCK:]),
    ]
    notes = {title: NOTES[title] for title in titles}
    if result["trained"][0]["projection"] != "U":
        notes["R^c(Z|U)"] += "; no U here: the value projection stands in"
    notes["on"] = (
        f"{result['tokens']:,} held-out tokens in windows of {result['window']}; "
        f"untrained: the same model from seed {result['seed']}"
    )
    lines = [f"{title:<12}{note}" for title, note in notes.items()]
    return "\n\n".join([*blocks, "\n".join(lines)])


def _block(result, titles):
    """The columns of the table with these titles, as text."""
    rows = [["", "layer", *titles]]
    for model in MODELS:
        for layer in result[model]:
            name = model if layer["layer"] == 0 else ""
            texts = cells(layer)
            rows.append([name, str(layer["layer"]), *(texts[title] for title in titles)])
    return aligned(rows)


def cells(layer):
    """{title: text} of one layer, without the columns that do not apply to it."""
    deciles = layer["density_deciles"]
    dictionary = layer["dictionary"]
    texts = {
        "R^c(Z|U)": _before_and_after(layer, "U"),
        "orthonormal": _before_and_after(layer, "orthonormal U"),
        "R(Z)": _before_and_after(layer, "whole"),
        "density": f"{layer['density']:.3f}",
        "10-90 %": f"{deciles[0]:.2f}-{deciles[8]:.2f}",
        "dead": str(layer["dead"]),
        "coherence": f"{dictionary['coherence']:.2f}",
        "frame": f"{dictionary['frame_distance_unit']:.1f}",
    }
    if layer["lasso"]:
        texts["objective"] = " > ".join(f"{value:.3f}" for value in layer["lasso"])
        best = layer["optimum"]["best"]
        texts["optimum"] = f"{best['objective']:.3f} at {best['density']:.2f}"
        texts["error"] = f"{layer['reconstruction_error']:.3f}"
        texts["eta|D|^2"] = f"{dictionary['eta_norm2']:.2f}"
    return texts


def _before_and_after(layer, basis):
    """The mean rate in a basis before and after attention, as text."""
    return " > ".join(f"{rates[basis]['mean']:.1f}" for rates in layer["rate"].values())


# ---- layers.png ----------------------------------------------------------------------------------


PANEL = (3.7, 3.1)  # width and height in inches
LINE = 0.17  # height of a line of the headline in inches
CHARACTERS = 13.5  # of the headline in an inch
FEW = 6  # layers, at most, whose changes are written in per cent
HOLDS, FAILS = "✓", "✗"
BEST = "best codes (lasso optimum)"


def draw(result, target):
    """Draw rates, density, objective and dictionary by layer, with the verdict above them.

    result: the content of layers.json. Returns the path of the PNG.
    """
    maps = "U" if result["trained"][0]["projection"] == "U" else "value maps"
    is_ista = bool(result["trained"][0]["lasso"])
    drawings = [
        (_rates, "U", f"coding rate R^c(Z|{maps})"),
        (_rates, "orthonormal U", f"R^c, {maps} orthonormal in each head"),
        (_rates, "whole", "R(Z), the whole stream"),
        (_densities,),
    ]
    if is_ista:
        drawings += [(_objective,), (_errors,), (_steps,)]
    drawings += [(_coherence,)]
    figure, panels = grid(len(drawings), 3 if len(drawings) < 6 else 4, PANEL)
    for axes, (draw_panel, *arguments) in zip(panels, drawings):
        draw_panel(axes, result, *arguments)
    _add_headline(figure, result)
    _add_legend(figure, panels, is_ista)
    return write(figure, target)


def _add_headline(figure, result):
    """What was measured, and the verdict in words; the figure grows by the height of the text."""
    config = result["checkpoint"]["config"]
    residual = " + residual" if config["residual"] else ""
    title = (
        f"{config['attention']} + {config['sparsifier']}{residual}, "
        f"{config['n_layer']} layers, d = {config['n_embd']}; "
        f"{result['tokens']:,} held-out tokens: {result['verdict']['question']}"
    )
    width, height = figure.get_size_inches()
    lines = verdict.headline(result["verdict"], int(CHARACTERS * width))
    figure.set_size_inches(width, height + LINE * (2 + lines.count("\n")))
    left = dict(x=0.01, ha="left", linespacing=1.3)
    figure.suptitle(f"{title}\n\n{lines}", fontsize=9.5, **left)


def _add_legend(figure, panels, is_ista):
    """A legend of colours and markers, from empty lines."""
    for name, (color, style) in MODELS.items():
        panels[0].plot([], [], style, color=color, label=name)
    for name, face in (("attention input", "white"), ("after attention", BLUE)):
        panels[0].plot([], [], "o", color=BLUE, markerfacecolor=face, label=name)
    if is_ista:
        panels[0].plot([], [], "D", color=BLUE, markerfacecolor="white", label=BEST)
    shared_legend(figure, panels)


def _rates(axes, result, basis, title):
    """Rates before and after attention, joined: a falling segment is a block that compresses."""
    for model, (color, _) in MODELS.items():
        for layer in result[model]:
            middle = layer["layer"] + 0.2 * SIDE[model]
            places = [middle - 0.1, middle + 0.1]
            rates = [site[basis] for site in layer["rate"].values()]
            means = [rate["mean"] for rate in rates]
            deviations = [rate["std"] for rate in rates]
            look = dict(color=color, elinewidth=0.8, linewidth=1.6, zorder=2)
            axes.errorbar(places, means, deviations, **look)
            for place, mean, face in zip(places, means, ("white", color)):
                axes.plot(place, mean, "o", color=color, markerfacecolor=face, zorder=3)
            if model == "trained" and means[0] and len(result[model]) <= FEW:
                text = f"{100 * (means[1] / means[0] - 1):+.0f} %"
                text = "0 %" if text in ("-0 %", "+0 %") else text
                highest = max(mean + std for mean, std in zip(means, deviations))
                look = {"ha": "center", "fontsize": 7, "color": ink(color)}
                axes.annotate(text, (middle, highest), (0, 5), textcoords="offset points", **look)
    least, most = result["rate_bounds"]["whole" if basis == "whole" else "U"]
    title = f"{title}\npossible: {least:.0f} to {most:.0f}; bars: std over windows"
    axes.set_ylim(0, 1.15 * axes.get_ylim()[1])  # the eye compares heights with 0
    _label(axes, result, "coding rate (nats)", title, "attention" if basis == "U" else None)


def _densities(axes, result):
    """Densities of the neurons: thin line the middle 80 %, thick 40 %, a marker at the mean."""
    for model, (color, style) in MODELS.items():
        for layer in result[model]:
            x = layer["layer"] + 0.12 * SIDE[model]
            deciles = layer["density_deciles"]
            thick = dict(linewidth=6, alpha=0.5, solid_capstyle="butt")
            axes.plot([x, x], [deciles[0], deciles[8]], color=color, linewidth=1)
            axes.plot([x, x], [deciles[2], deciles[6]], color=color, **thick)
            axes.plot(x, layer["density"], style[0], color=color, markeredgecolor="white")
            if layer["dead"]:
                place = dict(ha="center", va="bottom", size=7)
                axes.annotate(f"{layer['dead']} dead", (x, deciles[8]), color=color, **place)
            if layer["optimum"]:
                _mark_best(axes, x, layer["optimum"]["best"]["density"], color)
    axes.set_ylim(0, 1)
    _label(axes, result, "share of tokens", "density of the neurons\nmean; middle 40 % and 80 %")


def _mark_best(axes, x, y, color, alpha=1):
    """A diamond for the best possible codes."""
    look = dict(color=color, markerfacecolor="white", markersize=5, alpha=alpha, zorder=3)
    axes.plot(x, y, "D", **look)


def _objective(axes, result):
    """The lasso objective by ISTA step, then the lowest possible; paler lines are deeper layers."""
    n_steps = len(result["trained"][0]["lasso"]) - 1
    for model, (color, style) in MODELS.items():
        for layer in result[model]:
            alpha = 1 - 0.7 * layer["layer"] / len(result[model])
            look = dict(color=color, linewidth=1.2, alpha=alpha)
            lowest = layer["optimum"]["best"]["objective"]
            axes.plot(layer["lasso"], style, markersize=4, **look)
            axes.plot([n_steps, n_steps + 1], [layer["lasso"][-1], lowest], ":", **look)
            _mark_best(axes, n_steps + 1, lowest, color, alpha)
    axes.set(xlabel="ISTA steps", ylabel="objective per coordinate")
    axes.set_xticks(range(n_steps + 2), [*range(n_steps + 1), "optimum"])
    marks = " ".join(f"{i} {mark}" for i, mark in enumerate(_marks(result, "ISTA steps")))
    title = (
        f"lasso objective: by step, and lowest\npaler: deeper layers; no step raises it: {marks}"
    )
    axes.set_title(title, fontsize=9)
    axes.set_ylim(bottom=0)


def _errors(axes, result):
    """The share of LN(z) that the codes miss, by layer."""
    errors = {}
    for model in MODELS:
        errors[model] = [layer["reconstruction_error"] for layer in result[model]]
    title = "reconstruction error\n|LN(z) - D a|^2 / |LN(z)|^2"
    _by_layer(axes, result, errors, "share left out", title)


def _steps(axes, result):
    """eta |D|^2 by layer, with the limit of descent."""
    sizes = _of_dictionary(result, "eta_norm2")
    title = f"size of the ISTA step\nbelow {verdict.LIMIT} none can raise the objective"
    _by_layer(axes, result, sizes, "eta |D|^2", title, "step size")
    axes.set_ylim(0, 1.1 * max(2.1, *itertools.chain(*sizes.values())))
    axes.axhline(verdict.LIMIT, color=RED, linewidth=1)


def _coherence(axes, result):
    """The largest and the mean |cos| of two atoms, by layer."""
    title = "coherence of the atoms\nlargest; dots: mean; red: least possible"
    _by_layer(axes, result, _of_dictionary(result, "coherence"), "|cos|", title)
    for model, means in _of_dictionary(result, "mean_cosine").items():
        axes.plot(range(len(means)), means, ":", color=MODELS[model][0])
    axes.axhline(result["trained"][0]["dictionary"]["welch"], color=RED, linewidth=1)
    axes.set_ylim(0, 1.05)


def _of_dictionary(result, name):
    """{model: [a number of the dictionary, layer by layer]}."""
    numbers = {}
    for model in MODELS:
        numbers[model] = [layer["dictionary"][name] for layer in result[model]]
    return numbers


def _by_layer(axes, result, values, ylabel, title, aspect=None):
    """A line for each model; values {model: [a number of each layer]}; aspect as in _label."""
    for model, (color, style) in MODELS.items():
        axes.plot(range(len(values[model])), values[model], style, color=color, markersize=5)
    axes.set_ylim(bottom=0)
    _label(axes, result, ylabel, title, aspect)


def _marks(result, aspect):
    """Each layer's verdict on an aspect as a mark: whether it does what the theory says."""
    return [HOLDS if layer[aspect]["holds"] else FAILS for layer in result["verdict"]["layers"]]


def _label(axes, result, ylabel, title, aspect=None):
    """Set the title, labels and layer ticks of a panel; aspect: of the verdict, marked at each."""
    layers = range(len(result["trained"]))
    axes.set(xlabel="layer", ylabel=ylabel)
    if aspect:
        marks = _marks(result, aspect)
        axes.set_xticks(layers, [f"{i}\n{mark}" for i, mark in zip(layers, marks)])
        for mark, label in zip(marks, axes.get_xticklabels()):
            label.set_color(ink(GREEN) if mark == HOLDS else ink(RED))
        axes.set_xlabel(f"trained layer; {HOLDS} as the theory says, {FAILS} not")
    else:
        axes.set_xticks(layers)
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.set_title(title, fontsize=9)


# ---- l0.png --------------------------------------------------------------------------------------


def l0_by_layer(curves, target):
    """Draw the active codes per token by layer; curves {name: [{"mean", "std"} of each layer]}.

    "std" may be absent; a name that ends in "untrained" is drawn in grey. Curves come from "l0" of
    a layer in layers.json, or from {"mean": site["density"]["L0"]} of a site in summary.json.
    """
    figure, (axes,) = grid(1, 1, (6, 3.8))
    colors = itertools.cycle((BLUE, GREEN, AMBER, RED, PURPLE))
    ends = []
    for name, layers in curves.items():
        if name.endswith("untrained"):
            color, style = GREY, "s--"
        else:
            color, style = next(colors), "o-"
        means = [layer["mean"] for layer in layers]
        low = [layer["mean"] - layer.get("std", 0) for layer in layers]
        high = [layer["mean"] + layer.get("std", 0) for layer in layers]
        axes.plot(means, style, color=color, markersize=5, label=name)
        axes.fill_between(range(len(means)), low, high, color=color, alpha=0.12, linewidth=0)
        ends.append((means[-1], name, color))
    axes.set(xlabel="layer", ylabel="active codes per token (L0)")
    axes.set_xticks(range(max(map(len, curves.values()))))
    axes.set_ylim(bottom=0)
    axes.set_title("codes above 0; band: std over tokens")
    label_ends(axes, ends)
    return write(figure, target)

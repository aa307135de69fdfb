"""`interpret.py layers` on several checkpoints of a run: how each layer's numbers change."""

from crate_mini.console import results
from crate_mini.console.terminal import aligned
from crate_mini.layers.measure import AFTER, BEFORE, measure_layers
from crate_mini.layers.windows import Windows
from crate_mini.plots.figure import GREY, SERIES, grid, label_ends, write
from crate_mini.training import checkpoint, histories

KEPT = ("layer", "projection", "density", "dead", "reconstruction_error", "windows_compressed")


def run(settings, ckpts):
    """Write layers-history.json and .png next to the first checkpoint; print a table."""
    rows = []
    folder = results.folder(ckpts[0], settings.out)
    for step, path, model, meta, tokenizer in histories.each(
        ckpts, settings.device, settings.tokenizer
    ):
        corpus = checkpoint.held_out(path, meta, tokenizer, settings.data, settings.val_fraction)
        windows = Windows(settings, corpus, model.config.block_size)
        results.ready_folder(folder)
        layers = measure_layers(model, windows, f"step {step}", settings.lasso_tokens)
        rows.append(
            {"step": step, "checkpoint": str(path), "layers": [kept(row) for row in layers]}
        )
    facts = {"corpus": corpus.meta, "tokens": windows.tokens, "rows": rows}
    header = checkpoint.result_header("interpret.py", path, meta, model, **facts)
    target = results.write_json(folder / "layers-history.json", header)
    picture = draw(rows, target.with_suffix(".png"))
    print(f"\n{table(rows)}\n\nfiles     {target}, {picture}")


def kept(layer):
    """What the history keeps of a layer's report."""
    row = {name: layer[name] for name in KEPT}
    rates = {place: layer["rate"][place]["U"]["mean"] for place in (BEFORE, AFTER)}
    ratio = None
    if layer["lasso"]:
        ratio = layer["lasso"][-1] / layer["lasso"][0]
    return {**row, "rate": rates, "objective_ratio": ratio}


def table(rows):
    """The history as text: a row for each checkpoint, the columns of each layer side by side."""
    n = len(rows[0]["layers"])
    lines = [["step", *(f"R^c {i}" for i in range(n)), *(f"density {i}" for i in range(n))]]
    for row in rows:
        rates = [f"{x['rate'][BEFORE]:.1f} > {x['rate'][AFTER]:.1f}" for x in row["layers"]]
        densities = [f"{x['density']:.3f}" for x in row["layers"]]
        lines.append([f"{row['step']:,}", *rates, *densities])
    return (
        f"{aligned(lines)}\n\nR^c: nats before > after attention; density: share of codes above 0"
    )


def draw(rows, target):
    """Draw rates, density and objective of each layer over the steps; returns the path."""
    panels = {
        "R^c after attention (nats)": _rate_after,
        "change of R^c by attention (nats)": _rate_change,
        "density (share of codes above 0)": _density,
    }
    if rows[0]["layers"][0]["objective_ratio"] is not None:
        panels["objective after ISTA / at a = 0"] = _objective
    figure, axes = grid(len(panels), 2, (4.6, 3.2))
    steps = [row["step"] for row in rows]
    named = []
    for panel, (title, value) in zip(axes, panels.items()):
        ends = []
        for i in range(len(rows[0]["layers"])):
            values = [value(row["layers"][i]) for row in rows]
            color = SERIES[i % len(SERIES)]  # of the layer, again from the start after these
            panel.plot(steps, values, "o-", color=color, markersize=3)
            ends.append((values[-1], f"layer {i}", color))
        panel.set(title=title, xlabel="step")
        if value is not _rate_change:  # a difference; the others are read as shares of something
            panel.set_ylim(bottom=0)
        named.append((panel, ends))
    axes[1].axhline(0, color=GREY, linewidth=0.8)
    for panel, ends in named:
        label_ends(panel, ends, 8)
    return write(figure, target)


def _rate_after(layer):
    return layer["rate"][AFTER]


def _rate_change(layer):
    return layer["rate"][AFTER] - layer["rate"][BEFORE]


def _density(layer):
    return layer["density"]


def _objective(layer):
    return layer["objective_ratio"]

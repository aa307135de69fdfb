"""`interpret.py neurons` on several checkpoints of a run: the history of scores and of neurons."""

import re
from dataclasses import fields

import numpy as np

from crate_mini import UserError
from crate_mini.cli import flag_name
from crate_mini.console import results
from crate_mini.console.terminal import aligned
from crate_mini.data.tokenizer import visible
from crate_mini.neurons.quick_score import quick_scores
from crate_mini.neurons.record import sites
from crate_mini.plots.figure import GREY, SERIES, grid, label_ends, write
from crate_mini.training import checkpoint, histories

USED = ("layers", "seed", "tokens", "data", "tokenizer", "val_fraction", "device", "out", "follow")
NEURON = re.compile(r" *(\d{1,3}):(\d{1,9}) *")


def run(settings, ckpts):
    """Write neurons-history.json and .png next to the first checkpoint; print a table."""
    check(settings)
    followed = parse_neurons(settings.follow)
    folder, rows = results.folder(ckpts[0], settings.out), []
    for step, path, model, meta, tokenizer in histories.each(
        ckpts, settings.device, settings.tokenizer
    ):
        corpus = checkpoint.held_out(path, meta, tokenizer, settings.data, settings.val_fraction)
        scored = sites(model, settings.layers)
        check_neurons(followed, scored)
        results.ready_folder(folder)
        print(f"step      {step:,}", flush=True)
        facts = (model, meta, tokenizer, corpus, scored, settings.tokens, settings.seed)
        scores = quick_scores(*facts, log=print)
        row = {"step": step, "checkpoint": str(path), "layers": {}, "neurons": {}}
        for site in scored:
            row["layers"][str(site.layer)] = means(scores[site.name])
        for layer, neuron in followed:
            row["neurons"][f"{layer}:{neuron}"] = of_neuron(scores[f"L{layer}"], neuron, tokenizer)
        rows.append(row)
    facts = {"seed": settings.seed, "corpus": corpus.meta, "tokens": settings.tokens, "rows": rows}
    header = checkpoint.result_header("interpret.py", path, meta, model, **facts)
    target = results.write_json(folder / "neurons-history.json", header)
    picture = draw(rows, target.with_suffix(".png"))
    print(f"\n{table(rows)}\n\nfiles     {target}, {picture}")


def check(settings):
    """Raise UserError for a setting that a history does not use."""
    for f in fields(settings):
        if f.name not in USED and getattr(settings, f.name) != f.default:
            raise UserError(
                f"{flag_name(f.name)} goes with a single checkpoint; leave it out for a history."
            )


def parse_neurons(text):
    """[(layer, neuron)] of a list like 0:12,1:40. Raises UserError if it cannot be parsed."""
    if not text:
        return []
    matches = [NEURON.fullmatch(word) for word in text.split(",")]
    if not all(matches):
        raise UserError(f"--follow {text!r} names no neurons; give layer:neuron, like 0:12,1:40.")
    return [(int(match[1]), int(match[2])) for match in matches]


def check_neurons(followed, scored):
    """Raise UserError for a neuron that is not among those of the scored sites."""
    widths = {site.layer: site.width for site in scored}
    for layer, neuron in followed:
        if neuron >= widths.get(layer, 0):
            numbers = ", ".join(map(str, widths))
            raise UserError(
                f"--follow {layer}:{neuron} does not exist; layers are {numbers} here, with "
                f"neurons 0 to {max(widths.values()) - 1}."
            )


def means(scores):
    """The means of a layer's scores over the neurons that have them, and how many are dead."""
    live = scores["density"] > 0
    return {
        "ngram_r": _mean(scores["ngram_r"]),
        "null_r": _mean(scores["null_r"]),
        "density": float(scores["density"].mean()),
        "dead": int((~live).sum()),
    }


def _mean(values):
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def of_neuron(scores, neuron, tokenizer):
    """The scores of one neuron, and the tokens on which it is highest."""
    facts = {}
    for name in ("ngram_r", "null_r", "density"):
        value = float(scores[name][neuron])
        facts[name] = value if np.isfinite(value) else None
    ids = scores["top"][neuron].tolist() if facts["density"] else []  # none if it is dead
    return {**facts, "tokens": [visible(tokenizer.token_bytes(id)) for id in ids]}


def table(rows):
    """The history as text: scores of layers, then the followed neurons with their tokens."""
    layers = list(rows[0]["layers"])
    titles = [f"{name} {layer}" for name in ("ngram_r", "density") for layer in layers]
    lines = [["step", *titles]]
    for row in rows:
        scores = [_text(row["layers"][layer]["ngram_r"]) for layer in layers]
        densities = [_text(row["layers"][layer]["density"]) for layer in layers]
        lines.append([f"{row['step']:,}", *scores, *densities])
    blocks = [aligned(lines)]
    for name in rows[0]["neurons"]:
        lines = [[name, "ngram_r", "density", "highest on"]]
        for row in rows:
            facts = row["neurons"][name]
            tokens = " ".join(f"“{token}”" for token in facts["tokens"])
            scores = [_text(facts["ngram_r"]), _text(facts["density"])]
            lines.append([f"{row['step']:,}", *scores, tokens])
        blocks.append(aligned(lines))
    return "\n\n".join(blocks)


def _text(value):
    return "none" if value is None else f"{value:.3f}"


def draw(rows, target):
    """Draw mean score and density of each layer over the steps, and of each followed neuron."""
    kinds = [kind for kind in ("layers", "neurons") if rows[0][kind]]
    figure, axes = grid(2 * len(kinds), 2, (4.6, 3.2))
    steps = [row["step"] for row in rows]
    named = []
    for i, kind in enumerate(kinds):
        for j, score in enumerate(("ngram_r", "density")):
            panel, ends = axes[2 * i + j], []
            for n, name in enumerate(rows[0][kind]):
                label = f"layer {name}" if kind == "layers" else f"neuron {name}"
                values = [row[kind][name][score] for row in rows]
                values = [np.nan if value is None else value for value in values]
                color = SERIES[n % len(SERIES)]
                panel.plot(steps, values, "o-", color=color, markersize=3)
                known = [value for value in values if not np.isnan(value)]
                if known:
                    ends.append((known[-1], label, color))
            title = "score (ngram_r)" if score == "ngram_r" else "share of tokens that fire it"
            mean = ", mean over neurons" if kind == "layers" else ""
            panel.set(title=title + mean, xlabel="step")
            if score == "density":
                panel.set_ylim(bottom=0)
            named.append((panel, ends))
    nulls = [row["layers"][name]["null_r"] or 0 for row in rows for name in row["layers"]]
    control = sum(nulls) / len(nulls)
    axes[0].axhline(control, color=GREY, linestyle="--", linewidth=0.8)
    named[0][1].append((control, "control: another\nneuron's table", GREY))
    for panel, ends in named:
        label_ends(panel, ends, 8)
    return write(figure, target)

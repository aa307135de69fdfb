"""What does interpretability cost? -> results/front.json, front.png.

Each point is a model as it is used: the loss that it has with the codes that are scored. CRATE,
crate+ and the twin come dense and with 8, 16 or 32 codes a token (`--top-k`), all from the study
`models`; each dense one also with autoencoders in place of its codes, in all layers at once, that
keep as many features. Interpretability is the coverage of `interpret.py neurons`, stage `beyond`:
how well the best feature of each exact property of the text follows it, beyond the token.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from statistics import mean

import torch

from crate_mini import UserError
from crate_mini.cli import setting
from crate_mini.console import results
from crate_mini.console.terminal import Command
from crate_mini.plots.figure import AMBER, BLUE, GREEN, GREY, grid, shared_legend, write
from crate_mini.plots.markdown import markdown
from crate_mini.sae import autoencoder
from crate_mini.sae.evaluate import loss_in_context, predicted_tokens
from crate_mini.studies.runner import Runner, is_trained, trained_model
from crate_mini.studies.tables import NAMES
from crate_mini.training import checkpoint
from crate_mini.training.device import machine

SEED = 1337
KEPT = (8, 16, 32)  # codes, or features, that a token keeps
TOKENS = 65_536  # held-out tokens for the loss with autoencoders
BEYOND = ("--controls", "none", "--splits", 0, "--tokens", 250_000)
SAE = ("--expansion", 1, "--k", ",".join(map(str, KEPT)))  # as many features as there are codes
STYLES = {  # kind of model: (colour, marker)
    "crate": (BLUE, "o"),
    "crate+": (GREEN, "s"),
    "gpt2": (AMBER, "D"),
}


@dataclass
class Settings:
    """Loss against what the neurons know: dense, top-k, and with autoencoders spliced in.

    Needs the rows crate, crate+ and gpt2 of `python -m crate_mini.studies models`, and those of its
    group sparse. Writes results/front.json and front.png.
    """

    models: tuple[str, ...] = setting(tuple(NAMES), "kinds of models to compare")


def run(settings):
    """Score every model, write results/front.json and .png, print the table.

    Raises UserError for a model that is missing, and when a part fails.
    """
    rows = chosen_rows(settings.models)
    n_layer = results.read_json(checkpoint_of(rows[0][0]) / "config.json")["config"]["n_layer"]
    runner = Runner("front", 2 * len(rows) + n_layer * len(settings.models))
    points = []
    for name, kind, kept in rows:
        points += scored(runner, name, kind, kept)
    study = {
        "command": results.command("-m", "crate_mini.studies"),
        "seeds": [SEED],
        "machine": machine(torch.device("cpu")),
        "points": points,
    }
    path = results.write_json(results.ROOT / "results" / "front.json", study)
    figure(points, path.with_suffix(".png"))
    print(f"\n{table(study)}")


def chosen_rows(kinds):
    """[(row of the study `models`, kind, codes kept or None)] of these kinds of models.

    Raises UserError for a kind that is unknown, and for models that have not been trained.
    """
    rows = []
    for kind in kinds:
        if kind not in NAMES:
            raise UserError(f"--models {kind} is unknown; choose some of {', '.join(NAMES)}.")
        rows.append((kind, kind, None))
        rows += [(f"{kind}-top{kept}", kind, kept) for kept in KEPT]
    missing = [name for name, *_ in rows if not is_trained(checkpoint_of(name))]
    if missing:
        raise UserError(
            f"no model in out/study for {', '.join(missing)}; train with "
            f"`python -m crate_mini.studies models --only {','.join(missing)} --seeds 1 "
            "--checkpoints`."
        )
    return rows


def checkpoint_of(name):
    """The checkpoint that the study `models` made of a row."""
    return trained_model(name, SEED) / "last"


# ---- one model -----------------------------------------------------------------------------------


def scored(runner, name, kind, kept):
    """The points of one model: its own codes and, if it is dense, those of its autoencoders."""
    ckpt, folder = checkpoint_of(name), results.ROOT / "out" / "front" / name
    meta = results.read_json(ckpt / "config.json")
    if kept is None:
        for layer in range(meta["config"]["n_layer"]):
            words = ["interpret.py", "sae", ckpt, "--layer", layer, "--seed", SEED, *SAE]
            runner.part(folder, *words, name=f"{name}-sae-{layer}")
    words = ["interpret.py", "neurons", ckpt, *BEYOND]
    runner.part(folder, *words, "--until", "record", name=f"{name}-record")
    stage = ("--from", "beyond", "--until", "beyond")
    record = runner.part(folder, *words, *stage, name=f"{name}-beyond")
    sites = results.read_json(folder / "beyond.json")["sites"]
    facts = {"model": kind, "commit": record["commit"]}
    loss = meta["training"]["val_loss"]
    points = [{**facts, "codes": "own", "kept": kept, "loss": loss, **layers_mean(sites)}]
    for k in KEPT if kept is None else ():
        saes = f"sae x1-k{k}"
        increase = loss_increase(ckpt, folder, f"x1-k{k}")
        of_features = layers_mean(sites, saes)
        points.append({**facts, "codes": "sae", "kept": k, "loss": loss + increase, **of_features})
    return points


def layers_mean(sites, features="neurons"):
    """Coverage of some features and its controls, means over layers.

    The ends of an interval are means of the layers' ends, which is too wide rather than too narrow:
    layers are read on the same documents, but do not err by the same amount.
    """
    entries = [site["sets"][features] for site in sites.values()]
    rotations = [site["sets"]["rotation"] for site in sites.values()]
    point = {
        "density": mean(entry["density"] for entry in entries),
        "coverage": mean(entry["coverage"] for entry in entries),
        "ci95": [mean(ends) for ends in zip(*(entry["ci95"] for entry in entries))],
        "by_layer": [entry["coverage"] for entry in entries],
    }
    if features == "neurons":  # the rotations are as dense as the model's own codes
        minus = [rotation["neurons_minus"] for rotation in rotations]
        point["minus_rotation"] = mean(entry["difference"] for entry in minus)
        point["minus_rotation_ci95"] = [mean(ends) for ends in zip(*(m["ci95"] for m in minus))]
    return point


@torch.no_grad()
def loss_increase(ckpt, folder, name):
    """What it costs to splice the autoencoders of this name into all layers at once, in nats."""
    model, meta, tokenizer = checkpoint.open_model(ckpt, "cpu", None)
    corpus = checkpoint.held_out(ckpt, meta, tokenizer, None, None)
    tokens = predicted_tokens(corpus, TOKENS)

    def loss(title):
        blocks = corpus.blocks("val", 8, model.config.block_size, tokens)
        return loss_in_context(model, blocks, title, tokens)

    before = loss("unchanged")
    with ExitStack() as stack:
        for layer in range(len(model.blocks)):
            sae, _ = autoencoder.load(folder / f"sae-L{layer}-{name}.pt", model)
            stack.enter_context(autoencoder.splice(model, layer, sae))
        return loss(name) - before


# ---- reports -------------------------------------------------------------------------------------


def table(study):
    """Markdown: one row for each point, in the order of the study."""
    rows = []
    for point in study["points"]:
        minus = ""
        if "minus_rotation" in point:
            minus = with_interval(point["minus_rotation"], point["minus_rotation_ci95"])
        rows.append(
            [
                NAMES[point["model"]],
                title_of(point),
                f"{point['loss']:.3f}",
                f"{100 * point['density']:.1f}",
                with_interval(point["coverage"], point["ci95"]),
                minus,
            ]
        )
    head = ["model", "codes", "loss", "density, %", "coverage", "minus rotation"]
    return markdown(head, rows)


def title_of(point):
    """What is scored in a point, in words."""
    if point["codes"] == "sae":
        return f"autoencoders, {point['kept']} features"
    return "all" if point["kept"] is None else f"top {point['kept']}"


def with_interval(value, ends):
    """0.105 [0.098, 0.112]"""
    low, high = ends
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def figure(points, target):
    """Draw coverage, and what it is above a rotation, against loss; returns the path."""
    drawn, panels = grid(2, 2, (6.2, 4.6))
    for axes, key, label in zip(
        panels,
        ("coverage", "minus_rotation"),
        ("coverage: mean r beyond the token", "coverage minus that of a random rotation"),
    ):
        for kind in dict.fromkeys(point["model"] for point in points):
            for codes, line in (("own", "-"), ("sae", ":")):
                shown = [p for p in points if (p["model"], p["codes"]) == (kind, codes)]
                draw_line(axes, [p for p in shown if key in p], key, kind, line)
        axes.axhline(0, color="black", linewidth=0.6)
        axes.set(xlabel="validation loss of the model with these codes (nats)", ylabel=label)
    panels[0].set_title("better is up and to the left", fontsize=10)
    panels[1].set_title("is the basis of the neurons privileged?", fontsize=10)
    shared_legend(drawn, panels[:1])
    return write(drawn, target)


def draw_line(axes, points, key, kind, line):
    """Points of one kind, joined by loss, each with its interval and the number of codes kept."""
    color, marker = STYLES[kind]
    label = NAMES[kind] + ("" if line == "-" else " with autoencoders")
    face = color if line == "-" else "white"
    points = sorted(points, key=lambda point: point["loss"])
    losses, values = [p["loss"] for p in points], [p[key] for p in points]
    style = dict(color=color, linestyle=line, marker=marker, markerfacecolor=face, markersize=6)
    if points:
        axes.plot(losses, values, label=label, linewidth=1.2, **style)
    for point in points:
        ends = point["ci95" if key == "coverage" else "minus_rotation_ci95"]
        axes.plot([point["loss"]] * 2, ends, color=color, linewidth=0.8, alpha=0.6)
        text = "all" if point["kept"] is None else str(point["kept"])
        place = (point["loss"], point[key])
        axes.annotate(text, place, (5, 4), textcoords="offset points", fontsize=8, color=GREY)


COMMAND = Command(Settings, run, checkpoint=False)

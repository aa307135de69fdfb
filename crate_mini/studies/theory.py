"""Does the trained network do what the theory says? -> results/theory.json.

`interpret.py layers` on checkpoints that the study `models` left in out/study: the paper's model,
changes that the theory would ask for, our models and the twin. The file keeps the verdicts.
"""

from dataclasses import dataclass

import torch

from crate_mini import UserError
from crate_mini.cli import setting
from crate_mini.console import results
from crate_mini.console.terminal import Command
from crate_mini.plots.markdown import markdown
from crate_mini.studies.runner import Runner, is_trained, trained_model
from crate_mini.training.device import machine

MODELS = ("crate", "crate-unit", "crate-learned", "crate-shift", "crate+", "gpt2")
SEED = 1337


@dataclass
class Settings:
    """Measure the layers of trained models and collect the verdicts.

    Needs the models of `python -m crate_mini.studies models`. Writes results/theory.json.
    """

    models: tuple[str, ...] = setting(MODELS, "rows of the study `models`, trained on pydocs")


def run(settings):
    """Measure each model, write results/theory.json, print the table.

    Raises UserError for a model that is missing, and when a part fails.
    """
    folders = {name: trained_model(name, SEED) for name in settings.models}
    for name, folder in folders.items():
        if not is_trained(folder / "last"):
            raise UserError(
                f"{folder.relative_to(results.ROOT)} is missing; "
                f"`python -m crate_mini.studies models --only {name} --checkpoints` trains it."
            )
    runner = Runner("theory", len(folders))
    models = {}
    for name, folder in folders.items():
        place = results.ROOT / "out" / "theory" / name
        runner.part(place, "interpret.py", "layers", folder / "last")
        layers = results.read_json(place / "layers.json")
        models[name] = {"tokens": layers["tokens"], "verdict": layers["verdict"]}
    study = {
        "command": "python -m crate_mini.studies theory",
        "seeds": [SEED],
        "machine": machine(torch.device("cpu")),
        "models": models,
    }
    results.write_json(results.ROOT / "results" / "theory.json", study)
    print(f"\n{table(study)}")


def table(study):
    """One row for each layer of each model."""
    rows = []
    for name, model in study["models"].items():
        for layer in model["verdict"]["layers"]:
            rows.append([name, layer["layer"], *attention_cells(layer), *code_cells(layer)])
    head = ["model", "layer", "R^c before, after", "R, change"]
    return markdown([*head, "objective after each step", "best", "eta norm(D)^2"], rows)


def attention_cells(layer):
    """The rates of a layer, as text."""
    rates = layer["attention"]
    return f"{rates['before']:.1f} > {rates['after']:.1f}", f"{rates['change_whole']:+.1f}"


def code_cells(layer):
    """What ISTA does in a layer, as text; empty for an MLP."""
    if layer["ISTA steps"] is None:
        return ["", "", ""]
    objective = " > ".join(f"{value:.3f}" for value in layer["ISTA steps"]["objectives"])
    best = layer["optimum"]["best"]["objective"]
    return [objective, f"{best:.3f}", f"{layer['step size']['eta_norm2']:.2f}"]


COMMAND = Command(Settings, run, checkpoint=False)

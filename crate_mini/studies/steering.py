"""What does steering a neuron do, and what does it cost? -> results/steering.json, steering.png.

The checkpoints are those that the study `models` left in out/study: CRATE, crate+ and the GPT-2
twin, three seeds each. The layers of the first twin get sparse autoencoders. Then neurons of all
models, features of the autoencoders and random directions are steered by the same doses on the same
text.
"""

import itertools
from dataclasses import dataclass
from statistics import mean

import torch

from crate_mini import UserError
from crate_mini.cli import setting
from crate_mini.console import results
from crate_mini.console.terminal import Command
from crate_mini.steering import dose_response
from crate_mini.steering.figure import figure
from crate_mini.steering.tables import readme
from crate_mini.studies.runner import Runner, is_trained, trained_model
from crate_mini.studies.tables import NAMES
from crate_mini.training.device import machine

# 0.26 M tokens, 4 features a code, 32 of them at a time
SAE = ("--k", 32, "--steps", 500, "--batch", 512)
MEASURE = ("--neurons", 24, "--tokens", 512)
TWIN = "gpt2"  # the model that gets autoencoders, with the first seed


@dataclass
class Settings:
    """Dose and response of steering neurons, features and random directions in all models.

    Needs the models of `python -m crate_mini.studies models`. Writes results/steering.json and
    steering.png.
    """

    seeds: tuple[int, ...] = setting((1337, 1338, 1339), "seeds of the models to steer")
    report: bool = setting(False, "steer nothing, only draw steering.png and the tables again")


def run(settings):
    """Steer every model, write results/steering.json and .png, print the tables.

    Raises UserError for a model that is missing, and when a part fails.
    """
    path = results.ROOT / "results" / "steering.json"
    if settings.report:
        draw(results.read_json(path), path)
        return
    grid = list(itertools.product(settings.seeds, NAMES))
    checkpoints = {(kind, seed): trained_model(kind, seed) / "last" for seed, kind in grid}
    for checkpoint in checkpoints.values():
        if not is_trained(checkpoint):
            raise UserError(
                f"{checkpoint.relative_to(results.ROOT)} is missing; "
                "`python -m crate_mini.studies models --checkpoints` trains it."
            )
    first = settings.seeds[0]
    config = results.read_json(checkpoints[TWIN, first] / "config.json")["config"]
    runner = Runner("steering", len(grid) + config["n_layer"])
    runs, saes = {}, []
    for seed, kind in grid:
        checkpoint = checkpoints[kind, seed]
        files = []
        if (kind, seed) == (TWIN, first):
            for layer in range(config["n_layer"]):
                facts, file = autoencoder(runner, checkpoint, layer, seed)
                saes.append({**facts, "model": kind, "seed": seed})
                files.append(file)
        runs.setdefault(kind, []).append(measured(runner, checkpoint, kind, seed, files))
    models = {kind: pooled(runs_of_kind) for kind, runs_of_kind in runs.items()}
    study = {
        "schema": 1,
        "seeds": settings.seeds,
        "command": results.command("-m", "crate_mini.studies"),
        "machine": machine(torch.device("cpu")),
        "models": models,
        "sae": saes,
    }
    draw(study, results.write_json(path, study))


def draw(study, path):
    """Draw steering.png next to steering.json and print the tables."""
    figure(list(study["models"].values()), path.with_suffix(".png"))
    print(f"\n{readme(study)}")


def autoencoder(runner, checkpoint, layer, seed):
    """Train an autoencoder on one layer of the twin; (its facts, its file)."""
    folder = results.ROOT / "out" / "steering" / f"{TWIN}-{seed}-sae-{layer}"
    words = ["interpret.py", "sae", checkpoint, "--layer", layer, "--seed", seed]
    runner.part(folder, *words, *SAE)
    facts = results.read_json(folder / f"sae-L{layer}.json")["saes"][0]
    return facts, folder / f"sae-L{layer}-{facts['name']}.pt"


def measured(runner, checkpoint, kind, seed, autoencoders):
    """steering.json of one checkpoint, with the features of these files too."""
    folder = results.ROOT / "out" / "steering" / f"{kind}-{seed}"
    words = ["steer.py", "measure", checkpoint, "--seed", seed, *MEASURE]
    if autoencoders:
        words += ["--sae", ",".join(map(str, autoencoders))]
    runner.part(folder, *words)
    return results.read_json(folder / "steering.json")


# ---- seeds together ------------------------------------------------------------------------------


def pooled(runs):
    """One result, shaped as steering.json, of a model's runs: neurons pooled, costs averaged."""
    rows = []
    for run in runs:
        rows += [{**row, "neuron": (run["seed"], row["neuron"])} for row in run["rows"]]
    seed = runs[0]["seed"]
    correlations = ("correlation", "null", "top10")
    return {
        "checkpoint": {"config": runs[0]["checkpoint"]["config"]},
        "summary": dose_response.summary(rows, seed),
        "contrasts": dose_response.contrasts(rows, seed),
        "inserted": averaged(runs, "inserted", ("layer", "kind"), ("kl", "loss")),
        "attribution": averaged(runs, "attribution", ("layer", "dose"), correlations),
        "runs": [essence(run) for run in runs],
    }


def averaged(runs, part, keys, values):
    """The rows of a part of all runs, those with equal keys averaged; `seeds` keeps each value."""
    groups = {}
    for run in runs:
        for row in run[part]:
            groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    rows = []
    for _, group in sorted(groups.items()):
        by_seed = {}
        for value in values:
            by_seed[value] = [row[value] for row in group if row[value] is not None]
        means = {value: mean(known) if known else None for value, known in by_seed.items()}
        shared = {key: group[0][key] for key in keys}
        rows.append({**shared, **means, "seeds": by_seed})
    return rows


def essence(run):
    """The part of one steering.json that results/steering.json keeps."""
    at_kl = {}
    for kind, summary in run["summary"].items():
        at_kl[kind] = {metric: value["mean"] for metric, value in summary["at_kl"].items()}
    return {
        "seed": run["seed"],
        "command": run["command"],
        "commit": run["machine"].get("commit"),
        "sha256": run["checkpoint"]["sha256"],
        "live": run["live"],
        "val_loss": run["checkpoint"]["training"]["val_loss"],
        "at_kl": at_kl,
    }


COMMAND = Command(Settings, run, checkpoint=False, positional=("seeds",))

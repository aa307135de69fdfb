"""`python -m crate_mini.studies.steering [SEED ...]`: what does turning a neuron do, and what does it cost?

The checkpoints are those that `python -m crate_mini.studies.train_default default` left in out/study: CRATE, crate+ and the
GPT-2 twin, three seeds each. The layers of the first twin get sparse autoencoders; then neurons of all,
features of the autoencoders and random directions are turned by the same doses on the same text.
-> results/steering.json, results/steering.png, and the README's tables

Every part is `interpret.py sae` or `steer.py measure` in a process of its own; a part that is finished is
kept in out/steering as long as its command stays the same, and its result says at which commit it was made.
To make one again delete its folder. `python -m crate_mini.studies.tables` prints the README's tables again.
"""

import itertools
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

import torch

from crate_mini import UserError, atomic_write, cli
from crate_mini import results as evidence
from crate_mini.steering import dose_response as dose
from crate_mini.steering import figure as dose_views
from crate_mini.studies import tables
from crate_mini.training import device as machine

ROOT = Path(__file__).resolve().parents[2]
RUNS, OUT, RESULT = Path("out/study"), Path("out/steering"), ROOT / "results" / "steering.json"
SEEDS = 1337, 1338, 1339
SAE = (
    "--k",
    32,
    "--steps",
    500,
    "--batch",
    512,
)  # 0.26 M tokens, 4 features a code, 32 of them at a time
MEASURE = "--neurons", 24, "--tokens", 512


def part(place, *words):
    """Run a script with --out `place`, unless the very same command has finished there before."""
    told, words = ROOT / place / "finished.json", [*map(str, words), "--out", str(place)]
    if not told.exists() or json.loads(told.read_text()) != words:
        print(f"\npython {' '.join(words)}", flush=True)
        code = subprocess.run([sys.executable, *words], cwd=ROOT).returncode
        if code:
            raise UserError(f"`python {' '.join(words)}` ended with code {code}, see above.")
        with atomic_write(told) as file:
            file.write(json.dumps(words).encode())


def measured(kind, seed, sae):
    """(steering.json of one checkpoint, [facts of each of its autoencoders, if it is to have some])."""
    name, places, facts = f"{kind}-{seed}", [], []
    ckpt, flags = RUNS / name / "last", []
    if not (ROOT / ckpt).exists():
        raise UserError(
            f"{ckpt} is missing; `python -m crate_mini.studies.train_default default` trains it."
        )
    if sae:
        for layer in range(cli.read_json(ROOT / ckpt / "config.json")["config"]["n_layer"]):
            place = OUT / f"{name}-sae-{layer}"
            part(place, "interpret.py", "sae", ckpt, "--layer", layer, "--seed", seed, *SAE)
            facts.append(cli.read_json(ROOT / place / f"sae-L{layer}.json")["saes"][0])
            places.append(f"{place}/sae-L{layer}-{facts[-1]['name']}.pt")
        flags = ["--sae", ",".join(places)]
    part(OUT / name, "steer.py", "measure", ckpt, "--seed", seed, *MEASURE, *flags)
    return cli.read_json(ROOT / OUT / name / "steering.json"), facts


def together(runs):
    """One result, shaped as steering.json, of a model's runs: neurons of all seeds pooled, costs averaged."""

    def averaged(key, by, values):
        rows = sorted((row for run in runs for row in run[key]), key=lambda r: [r[k] for k in by])
        groups = (
            (k, list(g)) for k, g in itertools.groupby(rows, key=lambda r: [r[k] for k in by])
        )
        found = ((k, {v: [r[v] for r in g if r[v] is not None] for v in values}) for k, g in groups)
        return [
            dict(
                zip(by, k),
                **{v: mean(some) if some else None for v, some in each.items()},
                seeds=each,
            )
            for k, each in found
        ]

    pooled = [
        {**row, "neuron": (run["seed"], row["neuron"])} for run in runs for row in run["rows"]
    ]
    return {
        "checkpoint": {"config": runs[0]["checkpoint"]["config"]},
        "summary": dose.summary(pooled, runs[0]["seed"]),
        "contrasts": dose.contrasts(pooled, runs[0]["seed"]),
        "inserted": averaged("inserted", ("layer", "kind"), ("kl", "loss")),
        "attribution": averaged("attribution", ("layer", "dose"), ("correlation", "null", "top10")),
        "runs": [
            {
                "seed": run["seed"],
                "command": run["command"],
                "commit": run["machine"].get("commit"),
                "sha256": run["checkpoint"]["sha256"],
                "live": run["live"],
                "val_loss": run["checkpoint"]["training"]["val_loss"],
                "at_kl": {
                    kind: {m: v["mean"] for m, v in found["at_kl"].items()}
                    for kind, found in run["summary"].items()
                },
            }
            for run in runs
        ],
    }


def run(seeds):
    """All parts, a seed after the other, then the files."""
    grid, runs, saes, start = list(itertools.product(seeds, tables.NAMES)), {}, [], time.monotonic()
    for done, (seed, kind) in enumerate(grid):
        left = (time.monotonic() - start) / max(1, done) * (len(grid) - done) / 60
        print(
            f"[{done + 1}/{len(grid)}] {kind} {seed}" + f"  ETA {left:.0f} min" * bool(done),
            flush=True,
        )
        result, facts = measured(kind, seed, kind == "gpt2" and seed == seeds[0])
        runs.setdefault(kind, []).append(result)
        saes += [{**f, "model": kind, "seed": seed} for f in facts]
    models = {kind: together(some) for kind, some in runs.items()}
    found = {
        "schema": 1,
        "seeds": seeds,
        "command": shlex.join(["python", "-m", "crate_mini.studies.steering", *sys.argv[1:]]),
        "machine": machine.describe(torch.device("cpu")),
        "models": models,
        "sae": saes,
    }
    evidence.write_json(RESULT, found)
    dose_views.figure(list(models.values()), RESULT.with_suffix(".png"))
    print(f"\n{dose_views.readme(found)}")


def main():
    words = sys.argv[1:]
    if all(word.isdecimal() for word in words):
        run([int(word) for word in words] or list(SEEDS))
    else:
        raise UserError(
            "give seeds, or nothing for all three: `python -m crate_mini.studies.steering 1337`."
        )


if __name__ == "__main__":
    cli.run(main)

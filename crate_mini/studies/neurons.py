"""`python -m crate_mini.studies.neurons TEXT RANKS [STEPS] [TOKENS]`: whose neurons are how predictable?

Trains CRATE, crate+ and the GPT-2 twin at one, two and three layers (d = 128), two seeds each, on the same
tokens of a text, and scores every neuron by every protocol: as it is, and with all activations cut so that
each neuron fires on at most 1 % of the tokens, because sparsity alone moves these scores. Autoencoders of
every layer of CRATE and the twin at three layers are scored like neurons. -> results/neurons.json, .png

Every part is `train.py` or `interpret.py` itself in a process of its own, kept as long as its command stays
the same; its result names its commit. `python -m crate_mini.studies.neurons table` prints the table again.
"""

import itertools
import json
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from crate_mini import UserError, atomic_write, cli
from crate_mini.neurons import protocols as score
from crate_mini.neurons import summary
from crate_mini.plots import figure as figures
from crate_mini.studies import tables
from crate_mini.training import device as machine

ROOT = tables.RESULTS.parent
NAMES = tables.NAMES
MATCHED = 0.01  # share of tokens on which a neuron fires at most, in the second scoring
SCORINGS = {
    "interpret": "as it is",
    f"matched/density-{MATCHED:g}": "matched",
}  # by where their files are
FEATURES = 512  # of an autoencoder, drawn by the seed: as many as a layer has neurons
SHOWN = (
    "ngram_r",
    "token_r",
    "null_r",
    "init_r",
    "f1",
    "auprc",
    "openai_tar[ngram]",
    "openai_random[ngram]",
    "anthropic_crate[ngram]",
    "anthropic_2023[ngram]",
)
BRIEFLY = (SHOWN[0], *SHOWN[2:4], *SHOWN[6:9])  # of the second scoring
PAPER = {  # mean over layers x 100: CRATE, GPT-2; project page of arXiv 2410.16443
    "openai_tar": {"1L": (3.9, 8.8), "2L": (8.05, 4.2), "3L": (9.1, 3.57)},
    "openai_random": {"1L": (4.8, 8.9), "2L": (6.95, 1.95), "3L": (8.43, 1.37)},
    "anthropic_crate": {"1L": (10.1, 14.2), "2L": (11.35, 10.2), "3L": (11.23, 9.2)},
}
NOT_OURS = (
    "paper (LLM simulators: Mistral-7B explains, LLaMA-2-7B simulates; Pile; all 512 neurons of each "
    "layer, NaN dropped; not comparable)"
)


@dataclass
class Study:
    """What is compared, and where; the defaults are the study in results/."""

    text: str
    ranks: str
    steps: int = 1000  # of training
    tokens: int = 1_000_000  # held-out tokens that a score is made from
    presets: tuple = ("1L", "2L", "3L")
    models: tuple = tuple(NAMES)
    seeds: tuple = (1337, 1338)
    sae: tuple = (
        "crate",
        "gpt2",
    )  # models whose layers get autoencoders, at the last preset, first seed
    train_flags: tuple = ()
    sae_flags: tuple = ()
    out: Path = ROOT / "out" / "neurons"
    results: Path = ROOT / "results"

    def run(self):
        """All parts, then the result files; prints the table."""
        grid = [(p, k, s) for s, p, k in itertools.product(self.seeds, self.presets, self.models)]
        start, runs, autoencoders = time.monotonic(), [], []
        for done, key in enumerate(grid):
            left = (time.monotonic() - start) / max(1, done) * (len(grid) - done) / 60
            print(
                f"[{done + 1}/{len(grid)}] {' '.join(map(str, key))}"
                + (f"  ETA {left:.0f} min" if done else ""),
                flush=True,
            )
            runs.append(self.model(*key))
        for kind in self.sae:
            autoencoders += self.autoencoders(kind)
        found = {
            "schema": 1,
            "seeds": self.seeds,
            "command": f"python -m crate_mini.studies.neurons TEXT RANKS {self.steps} {self.tokens}",
            "text": Path(self.text).name,
            "ranks": Path(self.ranks).name,
            "presets": self.presets,
            "steps": self.steps,
            "tokens": self.tokens,
            "match_density": MATCHED,
            "machine": machine.describe(torch.device("cpu")),
            "runs": runs,
            "sae": autoencoders,
            "differences": self.differences(),
        }
        self.results.mkdir(exist_ok=True)
        with atomic_write(self.results / "neurons.json") as file:
            file.write(json.dumps(found, indent=1, allow_nan=False).encode() + b"\n")
        self.draw()
        print(f"\n{table(found)}")

    def folder(self, preset, kind, seed):
        return self.out / f"{kind}-{preset}-{seed}"

    def part(self, place, *words, name=""):
        """Run a script with --out `place`, unless the very same command has finished there before.

        Beside the folder: NAME.log, what it said, and NAME.json, which says that it has finished.
        """
        told, log = (place.with_name((name or place.name) + end) for end in (".json", ".log"))
        began = time.monotonic()
        words = [str(word).removeprefix(f"{ROOT}/") for word in (*words, "--out", place)]
        if told.exists() and json.loads(told.read_text())["command"] == words:
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w") as file:
            code = subprocess.run(
                [sys.executable, str(ROOT / words[0]), *words[1:]],
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
            ).returncode
        if code:
            last = (log.read_text().strip().splitlines() or ["it said nothing"])[-1]
            raise UserError(f"`python {shlex.join(words)}` ended with code {code}: {last}")
        seconds = time.monotonic() - began
        with atomic_write(told) as file:
            file.write(json.dumps({"command": words, "seconds": round(seconds, 1)}).encode())
        print(f"  {seconds / 60:5.1f} min  python {shlex.join(words[:3])} ...", flush=True)

    def neurons(self, preset, kind, seed, name, *flags):
        """summary.json of one scoring of a model; name: its folder, with what `neurons` adds to --out."""
        run = self.folder(preset, kind, seed)
        self.part(
            run / name.partition("/")[0],
            "interpret.py",
            "neurons",
            run / "train" / "last",
            "--tokens",
            self.tokens,
            "--seed",
            seed,
            *flags,
        )
        return cli.read_json(run / name / "summary.json")

    def model(self, preset, kind, seed):
        """Train and score one model twice; its line in results/neurons.json."""
        run = self.folder(preset, kind, seed)
        self.part(
            run / "train",
            "train.py",
            "--model",
            kind,
            "--preset",
            preset,
            "--seed",
            seed,
            "--data",
            self.text,
            "--tokenizer",
            self.ranks,
            "--train-steps",
            self.steps,
            "--log-sparsity",
            "--overwrite",
            *self.train_flags,
        )
        plain, matched = (
            self.neurons(preset, kind, seed, name, *flags)
            for name, flags in zip(SCORINGS, ((), ("--match-density", MATCHED)))
        )
        trained = cli.read_json(run / "train" / "last" / "config.json")["training"]
        return {
            "preset": preset,
            "model": kind,
            "seed": seed,
            "val_loss": trained["val_loss"],
            "commit": plain["machine"].get("commit"),
            "as it is": essence(plain),
            "matched": essence(matched),
        }

    def autoencoders(self, kind):
        """Train autoencoders on each layer of a model, score the one of middle L0; their lines."""
        preset, seed, lines = self.presets[-1], self.seeds[0], []
        run = self.folder(preset, kind, seed)
        for layer in range(int(preset[:-1])):
            place = run / f"sae-{layer}"
            self.part(
                place,
                "interpret.py",
                "sae",
                run / "train" / "last",
                "--layer",
                layer,
                "--seed",
                seed,
                *self.sae_flags,
            )
            saes = cli.read_json(place / f"sae-L{layer}.json")["saes"]
            name = sorted(saes, key=lambda s: s["held_out"]["L0"])[len(saes) // 2]["name"]
            found = self.neurons(
                preset,
                kind,
                seed,
                f"sae-{layer}-scores/sae",
                "--n",
                FEATURES,
                "--sae",
                place / f"sae-L{layer}-{name}.pt",
            )
            site = next(site for site in found["sites"] if "." in site)
            lines.append(
                {
                    "preset": preset,
                    "model": kind,
                    "seed": seed,
                    "site": site,
                    "held_out": {s["name"]: s["held_out"] for s in saes},
                    **found["sites"][site],
                }
            )
        return lines

    def rows(self, preset, kind, seed, name="interpret"):
        return score.read_rows(self.folder(preset, kind, seed) / name / "scores.jsonl")

    def differences(self):
        """Layer by layer and over all, the means of a model minus the twin's, for each preset and seed."""
        found, ours = (
            [],
            [kind for kind in self.models if kind != "gpt2"] if "gpt2" in self.models else [],
        )
        for preset, kind, seed, name in itertools.product(self.presets, ours, self.seeds, SCORINGS):
            sides = [self.rows(preset, model, seed, name) for model in (kind, "gpt2")]
            found.append(
                {
                    "preset": preset,
                    "of": f"{kind} - gpt2",
                    "seed": seed,
                    "scoring": SCORINGS[name],
                    **summary.compare(*sides, seed=seed),
                }
            )
        return found

    def draw(self):
        """Pictures of the deepest models of the first seed."""
        preset, seed = self.presets[-1], self.seeds[0]
        names = {kind: f"{NAMES[kind]}, {preset}" for kind in self.models}
        place = {
            kind: self.folder(preset, kind, seed) / "interpret" / "summary.json"
            for kind in self.models
        }
        figures.scores_by_layer(
            {name: cli.read_json(place[kind]) for kind, name in names.items()},
            self.results / "neurons.png",
        )
        figures.score_against_density(
            {names[k]: self.rows(preset, k, seed) for k in names},
            self.results / "neurons-density.png",
        )


def essence(found):
    """What results/neurons.json keeps of a summary.json: everything but deciles and the record's header."""
    sites = {
        name: {m: {k: v for k, v in stat.items() if k != "deciles"} for m, stat in site.items()}
        for name, site in found["sites"].items()
    }
    return {
        "command": found["command"],
        "sites": sites,
        "overall": found["overall"]["codes"],
        "what_the_simulator_saw": found["what_the_simulator_saw"],
    }


def over_seeds(found, preset, kind, scoring, metric):
    """ "59.1 ± 0.4": mean x 100 of all layers over seeds and half of its range; "-" if a seed has none."""
    values = [
        (r[scoring]["overall"].get(metric) or {}).get("mean")
        for r in found["runs"]
        if (r["preset"], r["model"]) == (preset, kind)
    ]
    if not values or None in values:
        return "-"
    half = f" ± {50 * (max(values) - min(values)):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{half}"


def table(found):
    """The README's table, in Markdown: mean over layers x 100 and over seeds, half of their range; beside it
    the paper's numbers, which are of other simulators and another corpus."""
    kinds = list(dict.fromkeys(r["model"] for r in found["runs"]))
    seeds = f"{len(found['seeds'])} seeds" if len(found["seeds"]) > 1 else "one seed"
    names = " | ".join(NAMES[k] for k in kinds)
    lines = [
        f"| layers | score x 100, {seeds} | {names} | {NOT_OURS}: CRATE | GPT-2 |",
        "|---" * (len(kinds) + 4) + "|",
    ]
    for preset in found["presets"]:
        runs = {
            k: [r for r in found["runs"] if (r["preset"], r["model"]) == (preset, k)] for k in kinds
        }
        losses = [f"{statistics.mean(r['val_loss'] for r in runs[k]):.3f}" for k in kinds]
        lines.append(f"| {preset} | validation loss | {' | '.join(losses)} | | |")
        sites = [[s for r in runs[k] for s in r["as it is"]["sites"].values()] for k in kinds]
        fires = [
            f"{100 * statistics.mean(s['density']['mean'] for s in some):.1f}" for some in sites
        ]
        lines.append(f"| {preset} | density, % | {' | '.join(fires)} | | |")
        for metric in SHOWN:
            theirs = PAPER.get(metric.split("[")[0], {}).get(preset, ("", ""))
            cells = [over_seeds(found, preset, k, "as it is", metric) for k in kinds]
            lines.append(
                f"| {preset} | {metric} | {' | '.join(cells)} | {theirs[0]} | {theirs[1]} |"
            )
        for metric in BRIEFLY:
            cells = [over_seeds(found, preset, k, "matched", metric) for k in kinds]
            lines.append(
                f"| {preset} | {metric}, density <= {found['match_density']:.0%} | "
                f"{' | '.join(cells)} | | |"
            )
        for scoring in SCORINGS.values():
            cells = [
                ", ".join(summary.tally(add(r[scoring]["sites"])) for r in runs[k]) for k in kinds
            ]
            lines.append(f"| {preset} | n of ngram_r, {scoring} | {' | '.join(cells)} | | |")
    return "\n".join([*lines, "", *sae_lines(found)])


def add(sites, metric="ngram_r"):
    """Counts of a metric over all sites: total, live, dead, undefined, failed."""
    return {k: sum(s["n"][metric][k] for s in sites.values()) for k in ("total", *summary.STATUS)}


def sae_lines(found):
    """A table of the autoencoders' features beside the neurons of the same layer."""
    if not found["sae"]:
        return []
    lines = ["| features of | " + " | ".join(SHOWN) + " |", "|---" * (len(SHOWN) + 1) + "|"]
    for of in found["sae"]:
        means = [(of.get(m) or {}).get("mean") for m in SHOWN]
        lines.append(
            f"| {NAMES[of['model']]} {of['preset']}, {of['site']} | "
            + " | ".join("-" if v is None else f"{100 * v:.1f}" for v in means)
            + " |"
        )
    return lines


def absolute(word):
    """A file's full name, with what follows its first colon; other words as they are."""
    name, colon, rest = word.partition(":")
    return f"{Path(name).resolve()}{colon}{rest}" if Path(name).exists() else word


def main():
    words = sys.argv[1:]
    if words == ["table"]:
        print(table(cli.read_json(ROOT / "results" / "neurons.json")))
    elif 2 <= len(words) <= 4 and all(w.isdecimal() and int(w) for w in words[2:]):
        Study(absolute(words[0]), absolute(words[1]), *map(int, words[2:])).run()
    else:
        raise UserError(
            "give a text and the ranks of a tokenizer, then steps and tokens if need be: `python "
            "-m crate_mini.studies.neurons wiki.txt.xz gpt2.tiktoken:8191 1000 1000000`."
        )


if __name__ == "__main__":
    cli.run(main)

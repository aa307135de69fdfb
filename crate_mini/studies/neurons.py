"""How predictable are neurons? CRATE, crate+ and the GPT-2 twin -> results/neurons.json, .png.

Models of one, two and three layers (d = 128) are trained with two seeds each on the same tokens of
a text. Every neuron is scored by every protocol, twice: unchanged, and with its weakest activations
zeroed so that it fires on at most 1 % of the tokens, because sparsity alone moves these scores.
Autoencoders of every layer of CRATE and the twin at three layers are scored like neurons.
"""

import itertools
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

from crate_mini import UserError
from crate_mini.cli import setting
from crate_mini.console import results
from crate_mini.console.terminal import Command
from crate_mini.neurons import figures, summary
from crate_mini.neurons.score_files import read_rows
from crate_mini.plots.markdown import markdown
from crate_mini.studies.runner import Runner, absolute, neurons_run
from crate_mini.studies.tables import NAMES, add_counts, mean_density, runs_of
from crate_mini.training.device import machine

MATCHED = 0.01  # share of tokens on which a neuron fires at most, in the second scoring
SCORINGS = {"interpret": "as it is", f"matched/density-{MATCHED:g}": "matched"}  # by folder
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
    "paper (LLM simulators: Mistral-7B explains, LLaMA-2-7B simulates; Pile; all 512 neurons of "
    "each layer, NaN dropped; not comparable)"
)


@dataclass
class Settings:
    """How well does what fires a neuron predict it? Every model, every layer, every protocol.

    Trains and scores CRATE, crate+ and the GPT-2 twin at one to three layers. Writes
    results/neurons.json, neurons.png and neurons-density.png.
    """

    text: str | None = setting(None, "text to train on and to score on, like wiki.txt.xz")
    ranks: str | None = setting(None, "tokenizer, like gpt2.tiktoken:8191")
    steps: int = setting(1000, "training steps", low=1)
    tokens: int = setting(1_000_000, "held-out tokens that a score is made from", low=1)
    table: bool = setting(False, "only print the table of results/neurons.json")


def run(settings):
    """Run the study, or print the table of its last result.

    Raises UserError without a text and ranks, and when a part fails.
    """
    if settings.table:
        print(table(results.read_json(results.ROOT / "results" / "neurons.json")))
        return
    if settings.text is None or settings.ranks is None:
        raise UserError(
            "give a text and the ranks of a tokenizer, then steps and tokens if need be: "
            "`python -m crate_mini.studies neurons wiki.txt.xz gpt2.tiktoken:8191 1000 1000000`."
        )
    text, ranks = absolute(settings.text), absolute(settings.ranks)
    Study(text, ranks, settings.steps, settings.tokens).run()


@dataclass
class Study:
    """The models to compare and their settings; the defaults are those of results/neurons.json."""

    text: str
    ranks: str
    steps: int
    tokens: int
    presets: tuple = ("1L", "2L", "3L")
    models: tuple = tuple(NAMES)
    seeds: tuple = (1337, 1338)
    sae: tuple = ("crate", "gpt2")  # models whose layers get autoencoders: last preset, first seed
    train_flags: tuple = ()
    sae_flags: tuple = ()

    def run(self):
        """Run all parts, write the result files, print the table."""
        grid = list(itertools.product(self.seeds, self.presets, self.models))
        parts = 3 * len(grid) + 2 * len(self.sae) * self.layers()
        self.runner = Runner("neurons", parts)
        runs = [self.model(preset, kind, seed) for seed, preset, kind in grid]
        autoencoders = []
        for kind in self.sae:
            autoencoders += self.autoencoders(kind)
        command = f"neurons TEXT RANKS {self.steps} {self.tokens}"
        study = {
            "schema": 1,
            "seeds": self.seeds,
            "command": f"python -m crate_mini.studies {command}",
            "text": Path(self.text).name,
            "ranks": Path(self.ranks).name,
            "presets": self.presets,
            "steps": self.steps,
            "tokens": self.tokens,
            "match_density": MATCHED,
            "machine": machine(torch.device("cpu")),
            "runs": runs,
            "sae": autoencoders,
            "differences": self.differences(),
        }
        results.write_json(results.ROOT / "results" / "neurons.json", study)
        self.write_figures(results.ROOT / "results")
        print(f"\n{table(study)}")

    def layers(self):
        """The number of layers of the last preset."""
        return int(self.presets[-1].removesuffix("L"))

    def model(self, preset, kind, seed):
        """Train one model and score it twice; its entry in results/neurons.json."""
        folder = neurons_run(preset, kind, seed)
        shape = ["--model", kind, "--preset", preset, "--seed", seed]
        data = ["--data", self.text, "--tokenizer", self.ranks, "--train-steps", self.steps]
        flags = ["--log-sparsity", "--overwrite", *self.train_flags]
        self.runner.part(folder / "train", "train.py", *shape, *data, *flags)
        config = results.read_json(folder / "train" / "last" / "config.json")
        plain_folder, matched_folder = SCORINGS
        plain = self.score(preset, kind, seed, plain_folder)
        matched = self.score(preset, kind, seed, matched_folder, "--match-density", MATCHED)
        return {
            "preset": preset,
            "model": kind,
            "seed": seed,
            "val_loss": config["training"]["val_loss"],
            "commit": plain["machine"].get("commit"),
            "as it is": essence(plain),
            "matched": essence(matched),
        }

    def score(self, preset, kind, seed, folder, *flags):
        """summary.json of one scoring of a model; folder: --out and what `neurons` adds to it."""
        run = neurons_run(preset, kind, seed)
        out, _, _ = folder.partition("/")
        words = ["interpret.py", "neurons", run / "train" / "last"]
        flags = ["--tokens", self.tokens, "--seed", seed, *flags]
        self.runner.part(run / out, *words, *flags)
        return results.read_json(run / folder / "summary.json")

    def autoencoders(self, kind):
        """Train autoencoders on each layer of a model and score one of them; their entries.

        Scored is the one in the middle by L0.
        """
        preset, seed = self.presets[-1], self.seeds[0]
        run = neurons_run(preset, kind, seed)
        entries = []
        for layer in range(self.layers()):
            folder = run / f"sae-{layer}"
            words = ["interpret.py", "sae", run / "train" / "last", "--layer", layer]
            self.runner.part(folder, *words, "--seed", seed, *self.sae_flags)
            saes = results.read_json(folder / f"sae-L{layer}.json")["saes"]
            by_l0 = sorted(saes, key=lambda sae: sae["held_out"]["L0"])
            file = folder / f"sae-L{layer}-{by_l0[len(saes) // 2]['name']}.pt"
            flags = ["--n", FEATURES, "--sae", file]
            scores = self.score(preset, kind, seed, f"sae-{layer}-scores/sae", *flags)
            site = next(site for site in scores["sites"] if "." in site)
            entries.append(
                {
                    "preset": preset,
                    "model": kind,
                    "seed": seed,
                    "site": site,
                    "held_out": {sae["name"]: sae["held_out"] for sae in saes},
                    **scores["sites"][site],
                }
            )
        return entries

    def rows(self, preset, kind, seed, folder="interpret"):
        """The rows of scores.jsonl of one scoring."""
        return read_rows(neurons_run(preset, kind, seed) / folder / "scores.jsonl")

    def spread(self, preset, kind, seed, folder):
        """How the means of one scoring move with its documents; {} in an older summary.json."""
        path = neurons_run(preset, kind, seed) / folder / "summary.json"
        return results.read_json(path).get("spread", {})

    def differences(self):
        """Each model's means minus the twin's, by layer and over all, for each preset and seed."""
        if "gpt2" not in self.models:
            return []
        others = [kind for kind in self.models if kind != "gpt2"]
        entries = []
        grid = itertools.product(self.presets, others, self.seeds, SCORINGS)
        for preset, kind, seed, folder in grid:
            ours = self.rows(preset, kind, seed, folder)
            twin = self.rows(preset, "gpt2", seed, folder)
            spreads = [self.spread(preset, model, seed, folder) for model in (kind, "gpt2")]
            entries.append(
                {
                    "preset": preset,
                    "of": f"{kind} - gpt2",
                    "seed": seed,
                    "scoring": SCORINGS[folder],
                    **summary.compare(ours, twin, seed=seed, spreads=spreads),
                }
            )
        return entries

    def write_figures(self, target):
        """Write figures of the deepest models of the first seed to the folder `target`."""
        preset, seed = self.presets[-1], self.seeds[0]
        summaries, neurons = {}, {}
        for kind in self.models:
            name = f"{NAMES[kind]}, {preset}"
            folder = neurons_run(preset, kind, seed) / "interpret"
            summaries[name] = results.read_json(folder / "summary.json")
            neurons[name] = self.rows(preset, kind, seed)
        figures.scores_by_layer(summaries, target / "neurons.png")
        figures.score_against_density(neurons, target / "neurons-density.png")


def essence(scores):
    """The part of a summary.json that results/neurons.json keeps: no deciles, no record header."""
    sites = {}
    for name, site in scores["sites"].items():
        sites[name] = {metric: without_deciles(statistic) for metric, statistic in site.items()}
    cut = {"cut": scores["cut"]} if "cut" in scores else {}
    return {
        "command": scores["command"],
        **cut,
        "sites": sites,
        "overall": scores["overall"]["codes"],
        "what_the_simulator_saw": scores["what_the_simulator_saw"],
    }


def without_deciles(statistic):
    return {key: value for key, value in statistic.items() if key != "deciles"}


# ---- the table -----------------------------------------------------------------------------------


def table(study):
    """Markdown: means over layers x 100, over seeds ± half of their range, next to the paper's.

    The paper's numbers are of other simulators and another corpus.
    """
    kinds = list(dict.fromkeys(run["model"] for run in study["runs"]))
    n = len(study["seeds"])
    seeds = f"{n} seeds" if n > 1 else "one seed"
    names = [NAMES[kind] for kind in kinds]
    head = ["layers", f"score x 100, {seeds}", *names, f"{NOT_OURS}: CRATE", "GPT-2"]
    rows = []
    for preset in study["presets"]:
        by_model = [runs_of(study, preset, kind) for kind in kinds]
        for title, cells, paper in preset_rows(by_model, preset, study["match_density"]):
            rows.append([preset, title, *cells, *paper])
    return "\n\n".join([markdown(head, rows), *sae_table(study)])


def preset_rows(by_model, preset, match_density):
    """(title, a cell for each model, the paper's two numbers) of each row of a preset."""
    none = ("", "")
    losses = [statistics.mean(run["val_loss"] for run in runs) for runs in by_model]
    yield "validation loss", [f"{loss:.3f}" for loss in losses], none
    yield "density, %", [mean_density(runs) for runs in by_model], none
    for metric in SHOWN:
        paper = PAPER.get(metric.split("[")[0], {}).get(preset, none)
        yield metric, [over_seeds(runs, "as it is", metric) for runs in by_model], paper
    if all("cut" in run["matched"] for runs in by_model for run in runs):
        losses = [statistics.mean(map(cut_loss, runs)) for runs in by_model]
        yield (
            f"loss if it ran on density <= {match_density:.0%}",
            [f"{loss:.3f}" for loss in losses],
            none,
        )
    for metric in BRIEFLY:
        title = f"{metric}, density <= {match_density:.0%}"
        yield title, [over_seeds(runs, "matched", metric) for runs in by_model], none
    for scoring in SCORINGS.values():
        yield f"n of ngram_r, {scoring}", [counts(runs, scoring) for runs in by_model], none


def cut_loss(run):
    """The loss of a model that runs with the codes of all its layers cut."""
    loss = run["matched"]["cut"]["loss"]
    return loss["all"] if "all" in loss else loss["sites"]["L0"]


def over_seeds(runs, scoring, metric):
    """59.1 ± 0.4: mean x 100 of all layers over seeds, half of their range; - if one has none."""
    values = [(run[scoring]["overall"].get(metric) or {}).get("mean") for run in runs]
    if not values or None in values:
        return "-"
    half = f" ± {50 * (max(values) - min(values)):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{half}"


def counts(runs, scoring):
    """How many neurons of each run are live, dead, undefined and failed."""
    texts = [summary.count_text(add_counts(run[scoring]["sites"])) for run in runs]
    return ", ".join(texts)


def sae_table(study):
    """[A Markdown table of the autoencoders' features], or [] if there are none."""
    if not study["sae"]:
        return []
    rows = []
    for entry in study["sae"]:
        means = [(entry.get(metric) or {}).get("mean") for metric in SHOWN]
        cells = ["-" if value is None else f"{100 * value:.1f}" for value in means]
        rows.append([f"{NAMES[entry['model']]} {entry['preset']}, {entry['site']}", *cells])
    return [markdown(["features of", *SHOWN], rows)]


COMMAND = Command(Settings, run, checkpoint=False, positional=("text", "ranks", "steps", "tokens"))

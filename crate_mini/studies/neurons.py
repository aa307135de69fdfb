"""What do neurons know, and how predictable are they? -> results/neurons.json, .png.

CRATE, crate+ and the GPT-2 twin of one, two and three layers, trained by the study `models` on its
second text. Every neuron is scored by every protocol, twice: unchanged, and with its weakest
activations zeroed so that it fires on at most 1 % of the tokens, because sparsity alone moves these
scores. The battery beyond the token is the first of the tables. Autoencoders of every layer of
CRATE and the twin at three layers are scored like neurons.

The file is also the memory of the study: the models of a preset and a seed that it holds, scored on
as many tokens, are not scored again, on whatever machine.
"""

import itertools
import statistics
from dataclasses import dataclass

import torch

from crate_mini import UserError
from crate_mini.cli import one_of, setting
from crate_mini.console import results
from crate_mini.console.terminal import Command
from crate_mini.neurons import figures, summary
from crate_mini.neurons.score_files import read_rows
from crate_mini.plots.markdown import markdown
from crate_mini.studies.runner import Runner, is_trained, neurons_checkpoint, neurons_run
from crate_mini.studies.tables import (
    BEYOND,
    NAMES,
    add_counts,
    beyond_the_token,
    mean_density,
    over_runs,
    runs_of,
)
from crate_mini.training.device import machine

PRESETS = ("1L", "2L", "3L")
DEEPEST = PRESETS[-1]
SEEDS = (1337, 1338, 1339)  # of the deepest models; the others have the first
MATCHED = 0.01  # share of tokens on which a neuron fires at most, in the second scoring
SCORINGS = {"interpret": "as it is", f"matched/density-{MATCHED:g}": "matched"}  # by folder
AUTOENCODERS_OF = ("crate", "gpt2")  # their deepest models, with the first seed
FEATURES = 512  # of an autoencoder, drawn by the seed: as many as a layer has neurons
SCHEMA = 2  # of results/neurons.json
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
    """How well does what fires a neuron predict it, and what does it know beyond the token?

    Scores CRATE, crate+ and the GPT-2 twin at one to three layers, trained on the second text of
    `python -m crate_mini.studies models`. Writes results/neurons.json, neurons.png and
    neurons-density.png; what the file holds is kept.
    """

    presets: tuple[str, ...] = setting(PRESETS, f"sizes of models: some of {one_of(PRESETS)}")
    seeds: tuple[int, ...] = setting(SEEDS, "seeds of the deepest; the others have the first")
    tokens: int = setting(250_000, "held-out tokens that a score is made from", low=1)
    autoencoders: bool = setting(
        True, "also train and score autoencoders of the deepest models with the first seed"
    )
    table: bool = setting(False, "only draw neurons.png again from neurons.json, print its table")


def run(settings):
    """Score what is missing, write results/neurons.json and the figures, print the table.

    Raises UserError for a preset that is unknown or a model that is missing, and when a part fails.
    """
    path = results.ROOT / "results" / "neurons.json"
    if settings.table:
        study = results.read_json(path)
        draw_scores(study, path.with_suffix(".png"))
        print(table(study))
        return
    study = Study(path, settings.tokens)
    missing = [group for group in groups(settings) if not study.holds(*group)]
    encoded = []
    if settings.autoencoders and DEEPEST in settings.presets:
        encoded = study.missing_autoencoders(settings.seeds[0])
    require_checkpoints(missing + [(DEEPEST, settings.seeds[0])] * bool(encoded))
    study.score(missing, encoded)
    draw_scores(study.content, path.with_suffix(".png"))
    print(f"\n{table(study.content)}")


def groups(settings):
    """[(preset, seed)] that the settings ask for. Raises UserError for an unknown preset."""
    chosen = []
    for preset in settings.presets:
        if preset not in PRESETS:
            raise UserError(f"--presets {preset} is unknown; choose some of {one_of(PRESETS)}.")
        seeds = settings.seeds if preset == DEEPEST else settings.seeds[:1]
        chosen += [(preset, seed) for seed in seeds]
    return chosen


def require_checkpoints(chosen):
    """Raise UserError, with the command that trains them, if models are missing."""
    missing = {}
    for (preset, seed), kind in itertools.product(chosen, NAMES):
        checkpoint = neurons_checkpoint(preset, kind, seed)
        if not is_trained(checkpoint):
            missing[checkpoint.parent.name.rpartition("-")[0]] = None
    if missing:
        names = ",".join(missing)
        raise UserError(
            f"no model on the second text in out/study/wiki for {', '.join(missing)}; train with "
            "`python -m crate_mini.studies models --text wiki.txt.xz --ranks gpt2.tiktoken --only "
            f"{names} --checkpoints`."
        )


class Study:
    """results/neurons.json: "runs", "differences" and "sae", each entry of a preset and a seed."""

    def __init__(self, path, tokens):
        """Begin with what the file holds, if this version of the study has written it.

        Raises UserError if its scores were made from another number of tokens.
        """
        self.path, self.tokens = path, tokens
        self.content = {"runs": [], "differences": [], "sae": []}
        known = results.read_json(path) if path.exists() else {}
        if known.get("schema") != SCHEMA:
            return
        if known["tokens"] != tokens:
            raise UserError(
                f"--tokens {tokens}, but the scores in results/{path.name} were made from "
                f"{known['tokens']} tokens, and the two cannot be compared; add to them with "
                f"`--tokens {known['tokens']}`, or move the file away to begin anew."
            )
        self.content = known

    def holds(self, preset, seed):
        """Whether all models of a preset and a seed have been scored."""
        runs = [run for run in self.content["runs"] if is_of(run, preset, seed)]
        return {run["model"] for run in runs} == set(NAMES)

    def missing_autoencoders(self, seed):
        """[(kind, layer, seed)] of the deepest models' layers whose autoencoders are not scored."""
        known = [(entry["model"], entry["layer"], entry["seed"]) for entry in self.content["sae"]]
        layers = range(int(DEEPEST.removesuffix("L")))
        wanted = itertools.product(AUTOENCODERS_OF, layers, [seed])
        return [encoded for encoded in wanted if encoded not in known]

    def score(self, chosen, encoded):
        """Score the models of each (preset, seed), then autoencoders of each (kind, layer, seed).

        The file is written after each of them.
        """
        self.runner = Runner("neurons", 2 * len(NAMES) * len(chosen) + 2 * len(encoded))
        for preset, seed in chosen:
            runs = [self.model(preset, kind, seed) for kind in NAMES]
            self.add(preset, seed, {"runs": runs, "differences": differences(preset, seed)})
            if (preset, seed) == (DEEPEST, SEEDS[0]):
                draw_densities(results.ROOT / "results" / "neurons-density.png", seed)
        for kind, layer, seed in encoded:
            entry = self.autoencoder(kind, layer, seed)
            others = [known for known in self.content["sae"] if is_of(known, DEEPEST, seed)]
            self.add(DEEPEST, seed, {"sae": [*others, entry]})

    def add(self, preset, seed, new):
        """Put the entries of a preset and a seed in the place of earlier ones, and save."""
        self.content |= {
            "schema": SCHEMA,
            "command": results.command("-m", "crate_mini.studies"),
            "tokens": self.tokens,
            "match_density": MATCHED,
            "machine": machine(torch.device("cpu")),
        }
        for part, entries in new.items():
            others = [entry for entry in self.content[part] if not is_of(entry, preset, seed)]
            self.content[part] = sorted([*others, *entries], key=place)
        runs = self.content["runs"]
        self.content["presets"] = sorted({run["preset"] for run in runs})
        self.content["seeds"] = sorted({run["seed"] for run in runs})
        results.write_json(self.path, self.content)

    def model(self, preset, kind, seed):
        """Score one model twice; its entry in results/neurons.json."""
        folder = neurons_run(preset, kind, seed)
        config = results.read_json(neurons_checkpoint(preset, kind, seed) / "config.json")
        plain = self.summary(preset, kind, seed, "interpret", "--until", "beyond")
        density = ("--match-density", MATCHED, "--until", "score")
        matched = self.summary(preset, kind, seed, f"matched/density-{MATCHED:g}", *density)
        return {
            "preset": preset,
            "model": kind,
            "seed": seed,
            "val_loss": config["training"]["val_loss"],
            "commit": plain["machine"].get("commit"),
            "beyond": essence_of_beyond(results.read_json(folder / "interpret" / "beyond.json")),
            "as it is": essence(plain),
            "matched": essence(matched),
        }

    def summary(self, preset, kind, seed, folder, *flags):
        """summary.json of one scoring of a model; folder: --out and what `neurons` adds to it."""
        scores = neurons_run(preset, kind, seed)
        out, _, _ = folder.partition("/")
        words = ["interpret.py", "neurons", neurons_checkpoint(preset, kind, seed)]
        self.runner.part(scores / out, *words, "--tokens", self.tokens, "--seed", seed, *flags)
        return results.read_json(scores / folder / "summary.json")

    def autoencoder(self, kind, layer, seed):
        """Train autoencoders on a layer and score the one in the middle by L0; its entry."""
        folder = neurons_run(DEEPEST, kind, seed) / f"sae-{layer}"
        ckpt = neurons_checkpoint(DEEPEST, kind, seed)
        self.runner.part(folder, "interpret.py", "sae", ckpt, "--layer", layer, "--seed", seed)
        saes = results.read_json(folder / f"sae-L{layer}.json")["saes"]
        by_l0 = sorted(saes, key=lambda sae: sae["held_out"]["L0"])
        file = folder / f"sae-L{layer}-{by_l0[len(saes) // 2]['name']}.pt"
        flags = ("--n", FEATURES, "--sae", file, "--until", "score")
        scores = self.summary(DEEPEST, kind, seed, f"sae-{layer}-scores/sae", *flags)
        site = next(site for site in scores["sites"] if "." in site)
        return {
            "preset": DEEPEST,
            "model": kind,
            "seed": seed,
            "layer": layer,
            "site": site,
            "held_out": {sae["name"]: sae["held_out"] for sae in saes},
            **scores["sites"][site],
        }


def is_of(entry, preset, seed):
    """Whether an entry of results/neurons.json is of this preset and seed."""
    return (entry["preset"], entry["seed"]) == (preset, seed)


def place(entry):
    """A key that sorts entries by seed and preset, as scored."""
    return entry["seed"], PRESETS.index(entry["preset"])


def rows_of(preset, kind, seed, folder="interpret"):
    """The rows of scores.jsonl of one scoring."""
    return read_rows(neurons_run(preset, kind, seed) / folder / "scores.jsonl")


def spread_of(preset, kind, seed, folder):
    """How the means of one scoring move with its documents."""
    path = neurons_run(preset, kind, seed) / folder / "summary.json"
    return results.read_json(path).get("spread", {})


def differences(preset, seed):
    """Each model's means minus the twin's, by layer and over all, in both scorings."""
    entries = []
    others = [kind for kind in NAMES if kind != "gpt2"]
    for kind, folder in itertools.product(others, SCORINGS):
        ours, twin = (rows_of(preset, model, seed, folder) for model in (kind, "gpt2"))
        spreads = [spread_of(preset, model, seed, folder) for model in (kind, "gpt2")]
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


def draw_densities(target, seed):
    """Draw scores against density of the deepest models of a seed to the file `target`."""
    neurons = {f"{title}, {DEEPEST}": rows_of(DEEPEST, kind, seed) for kind, title in NAMES.items()}
    figures.score_against_density(neurons, target)


def draw_scores(study, target):
    """Draw the scores of the deepest models of the first seed, from the content of neurons.json."""
    deepest = [run for run in study["runs"] if run["preset"] == study["presets"][-1]]
    summaries = {}
    for run in deepest:
        if run["seed"] == min(other["seed"] for other in deepest):
            summaries[f"{NAMES[run['model']]}, {run['preset']}"] = run["as it is"]
    figures.scores_by_layer(summaries, target)


def essence_of_beyond(content):
    """The part of a beyond.json that results/neurons.json keeps: no single properties."""
    sites = {}
    for name, site in content["sites"].items():
        sets = {}
        for features, scores in site["sets"].items():
            sets[features] = {key: value for key, value in scores.items() if key != "best"}
        sites[name] = {"sets": sets, "probing": site["probing"]}
    kept = ("command", "properties_version", "properties", "tokens", "documents")
    return {**{key: content[key] for key in kept}, "sites": sites}


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
    names = [NAMES[kind] for kind in kinds]
    head = ["layers", "score x 100", *names, f"{NOT_OURS}: CRATE", "GPT-2"]
    rows = []
    for preset in study["presets"]:
        by_model = [runs_of(study, preset, kind) for kind in kinds]
        for title, cells, paper in preset_rows(by_model, preset, study["match_density"]):
            rows.append([preset, title, *cells, *paper])
    return "\n\n".join([markdown(head, rows), *sae_table(study)])


def preset_rows(by_model, preset, match_density):
    """(title, a cell for each model, the paper's two numbers) of each row of a preset."""
    none = ("", "")
    yield "seeds", [len(runs) for runs in by_model], none
    losses = [statistics.mean(run["val_loss"] for run in runs) for runs in by_model]
    yield "validation loss", [f"{loss:.3f}" for loss in losses], none
    yield "density, %", [mean_density(runs) for runs in by_model], none
    if all("beyond" in run for runs in by_model for run in runs):
        for title in BEYOND:
            yield title, [beyond_the_token(runs, title) for runs in by_model], none
    for metric in SHOWN:
        paper = PAPER.get(metric.split("[")[0], {}).get(preset, none)
        yield metric, [over_seeds(runs, "as it is", metric) for runs in by_model], paper
    below = f"density <= {match_density:.0%}"
    if all("cut" in run["matched"] for runs in by_model for run in runs):
        losses = [statistics.mean(map(cut_loss, runs)) for runs in by_model]
        yield f"loss if it ran on {below}", [f"{loss:.3f}" for loss in losses], none
    for metric in BRIEFLY:
        cells = [over_seeds(runs, "matched", metric) for runs in by_model]
        yield f"{metric}, {below}", cells, none
    for scoring in SCORINGS.values():
        yield f"n of ngram_r, {scoring}", [counts(runs, scoring) for runs in by_model], none


def cut_loss(run):
    """The loss of a model that runs with the codes of all its layers cut."""
    loss = run["matched"]["cut"]["loss"]
    return loss["all"] if "all" in loss else loss["sites"]["L0"]


def over_seeds(runs, scoring, metric):
    """59.1 ± 0.4: mean x 100 of all layers over seeds, half of their range; - if one has none."""
    return over_runs([(run[scoring]["overall"].get(metric) or {}).get("mean") for run in runs])


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


COMMAND = Command(Settings, run, checkpoint=False)

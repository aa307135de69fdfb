"""`interpret.py llm`: a language model on neurons that `interpret.py neurons` has scored.

Next to its scores stand those of two tables on the same neurons and excerpts: [five excerpts]
holds everything that the model was shown, the evidence ceiling; [ngram] has seen the corpus. Each
score comes with that of a wrong explanation, another neuron's, and with the difference.
"""

import re
from dataclasses import dataclass

import numpy as np

from crate_mini import UserError
from crate_mini.cli import setting
from crate_mini.console import results, terminal
from crate_mini.judges import pipeline, simulation
from crate_mini.judges.pipeline import all_names, judge_label, metric_names
from crate_mini.neurons import excerpts, protocols, record_files, score_files, summary
from crate_mini.neurons.protocols import DEAD
from crate_mini.training import checkpoint
from crate_mini.training.device import machine

SCRIPT = "interpret.py"
STYLES = ("auto", "chat", "text")
CEILING = "five excerpts: saw the tokens of the explained excerpts; an explanation has to beat it."
WARNING = (
    " IT FAILED THE PROBE: it does not tell true from false explanations of planted neurons, and "
    "its scores mean nothing."
)


@dataclass
class Settings:
    """A language model explains neurons in words and simulates them from these words.

    `interpret.py neurons` must have run before.
    """

    explainer: str = setting(
        "template",
        "model that explains: template (the top tokens, no model), hf:NAME or http:MODEL",
    )
    simulator: str = setting(
        "",
        "model that simulates: hf:NAME (transformers: a folder, a .gguf file, a package that holds "
        "one, a name on the hub) or http:MODEL",
    )
    url: str = setting(
        "http://127.0.0.1:8080/v1", "base URL of an OpenAI-compatible server, for http:MODEL"
    )
    key_env: str = setting("OPENAI_API_KEY", "environment variable that holds the server's key")
    style: str = setting(
        "auto",
        "form of the prompts; auto: text for hf, chat for http if the server supports it",
        choices=STYLES,
    )
    rung: str = setting(
        "auto",
        f"how it judges: {', '.join(simulation.MODES)}; auto: the cheapest mode that passes the "
        "probe",
    )
    protocols: str = setting(
        "openai_tar",
        "comma-separated: openai_tar (openai_random comes with it), anthropic_crate, "
        "anthropic_2023",
    )
    n: int = setting(20, "neurons of each layer, drawn by the seed; 0: all")
    seed: int = setting(0, "seed of the neurons")
    workers: int = setting(4, "neurons at a time with http", low=1)
    budget: int = setting(
        0, "tokens to spend at most; the same command continues from there; 0: no limit"
    )
    price: str = setting("", "dollars per million tokens in and out, like 0.15,0.60, for --dry-run")
    dry_run: bool = setting(False, "ask nothing; print the prompts and the price of each mode")
    record: str = setting("", "file to write the answers of this run to")
    replay: str = setting("", "file to take all answers from; needs no model")
    tokenizer: str | None = checkpoint.tokenizer_setting()
    out: str | None = setting(
        None, "folder of `neurons`", shown="`interpret` next to the checkpoint"
    )
    despite_probe: bool = setting(
        False, "score even if the model fails the probe; the scores come with a warning"
    )


def run(settings, ckpt):
    """Write llm.json and llm.jsonl into the folder of `neurons`, and print the table.

    Raises UserError for settings that make no sense, where `neurons` has not run on this
    checkpoint, and what `pipeline.run` raises.
    """
    names = check(settings)
    folder = results.folder(ckpt, settings.out)
    record, rows, meta = scored_record(folder, ckpt)
    rows = draw(rows, settings.n, settings.seed)
    selected = select_excerpts(record, rows, names)
    print(
        f"{len(rows)} neurons drawn with seed {settings.seed}, "
        f"{len(rows) - len(selected)} of them dead"
    )
    decode = checkpoint.open_tokenizer(ckpt, meta, settings.tokenizer).decode
    llm = pipeline.run(selected, decode, settings, folder)
    if settings.dry_run:
        print("\nnothing was asked")
        return
    entries = llm.pop("neurons")
    llm_rows = []
    for row in rows:
        entry = entries.get(neuron_name(row))
        if entry or row["status"] == "dead":
            llm_rows.append(llm_row(row, entry, names, llm))
    layers = record.header["checkpoint"]["config"]["n_layer"]
    scores = summary.summarise(llm_rows, what_was_seen(llm), layers, settings.seed)
    results.write_rows(folder / "llm.jsonl", llm_rows)
    facts = {
        "schema": 1,
        "command": results.command(SCRIPT),
        "record": record.header,
        "machine": machine(),
        "llm": llm,
    }
    path = results.write_json(folder / "llm.json", {**facts, **scores})
    print(f"\n{summary.table(scores) if llm_rows else 'no neuron was reached'}")
    if llm["stopped"]:
        print(f"\n{len(llm_rows)} of {len(rows)} neurons: {llm['stopped']}.")
    print(f"\nfiles     {path}, llm.jsonl")


def check(settings):
    """The names of the protocols to score. Raises UserError for settings that make no sense."""
    if not settings.simulator:
        raise UserError(
            "give a --simulator, hf:NAME or http:MODEL; --explainer, --record, --replay need it."
        )
    if settings.price and not re.fullmatch(r"[\d.]+,[\d.]+", settings.price):
        raise UserError(
            f"--price {settings.price!r} is not two numbers, dollars per million tokens in and "
            "out, like 0.15,0.60."
        )
    terminal.plain_file(settings.replay, "--replay")
    simulation.chosen_modes(settings.rung)
    names = [name.strip() for name in settings.protocols.split(",")]
    for name in names:
        if name not in protocols.PROTOCOLS:
            raise UserError(
                f"--protocols {settings.protocols!r}: {name!r} is unknown; choose some of "
                f"{', '.join(protocols.PROTOCOLS)}."
            )
    if "openai_tar" in names:
        return [name for name in names if name != "openai_random"]  # it comes with openai_tar
    return names


def scored_record(folder, ckpt):
    """(Record, rows of scores.jsonl, checkpoint's meta) of a folder that `neurons` has scored.

    Raises UserError unless record, scores and checkpoint fit each other.
    """
    record = record_files.load(folder)
    _, meta = checkpoint.load(ckpt)
    if record.header["checkpoint"]["sha256"] != meta["sha256"]:
        raise UserError(
            f"the record in {folder} is of another checkpoint than {ckpt}; make it again with "
            f"`python interpret.py neurons {ckpt}`."
        )
    # The tables' scores stand next to ours, so they must be of the same excerpts.
    rows = score_files.read_rows(folder / "scores.jsonl")
    score_files.read_summary(folder, rows)
    return record, rows, meta


def draw(rows, n, seed):
    """n rows of each site of scores.jsonl, drawn by the seed, in order; all of them if n is 0."""
    drawn = []
    for site, group in summary.by_site(rows).items():
        rng = np.random.default_rng([seed, *site.encode()])
        if n and n < len(group):
            group = [group[i] for i in sorted(rng.choice(len(group), n, replace=False))]
        drawn += group
    return drawn


def neuron_name(row):
    """How the model's results name a neuron, "L0 17"."""
    return f"{row['site']} {row['neuron']}"


def select_excerpts(record, rows, names):
    """{neuron: {protocol: (Excerpts to explain, Excerpts to score)}} of the live neurons."""
    seed = record.header["seed"]
    selected = {}
    for row in rows:
        if row["status"] == "dead":
            continue
        site, neuron = row["site"], row["neuron"]
        selected[neuron_name(row)] = {
            name: excerpts.select(record, site, name, neuron, seed) for name in names
        }
    return selected


def llm_row(row, entry, names, llm):
    """A row of llm.jsonl: a row of scores.jsonl, of these protocols, with the model's scores.

    entry: what `pipeline.simulate_neuron` returns, or None for a dead neuron, which counts as dead
    in the model's scores too.
    """
    scores = {}
    if entry:
        scores |= entry["scores"]
    elif llm["rung"]:
        for name in names:
            for metric in metric_names(name, llm["simulator"], llm["rung"]):
                scores |= dict.fromkeys(all_names(metric, llm["rung"]), (None, DEAD))
    scored = (*names, "openai_random") if "openai_tar" in names else names
    for metric, value in protocols.flat_scores(row["scores"]).items():
        if "[" in metric and metric.split("[")[0] in scored:
            scores[metric] = value, row["why"].get(metric)
    new_row = protocols.score_row(
        row["site"], row["layer"], row["neuron"], row, row["label"], {}, scores
    )
    new_row["made_with"] = row.get("made_with")
    if entry:
        new_row["llm"] = {name: entry[name] for name in entry if name != "scores"}
    return new_row


def what_was_seen(llm):
    """{simulator: the sentence under the table about what it saw}."""
    label = judge_label(llm["simulator"], llm["rung"])
    sentence = f"{label}: {llm['saw']}; words by {llm['explainer']}."
    if llm["despite_probe"]:
        sentence += WARNING
    return {label: sentence, "five excerpts": CEILING}


COMMAND = terminal.Command(Settings, run)

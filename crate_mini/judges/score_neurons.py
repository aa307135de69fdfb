"""`interpret.py llm`: a language model on neurons that `interpret.py neurons` has recorded and scored.

Beside each of its scores stand, for the same neurons and excerpts, those of the tables: [five excerpts] is
all that the model was shown, the evidence ceiling; [ngram] has seen the corpus. What a run is: llm.py.
"""

import json
from pathlib import Path

import numpy as np

from crate_mini import UserError, atomic_write, cli
from crate_mini import results as evidence
from crate_mini.data import batches as data
from crate_mini.judges import run as llm
from crate_mini.neurons import excerpts, summary
from crate_mini.neurons import protocols as score
from crate_mini.neurons import record as activations
from crate_mini.training import checkpoint
from crate_mini.training import device as machine


def drawn(rows, n, seed):
    """n rows of each site of scores.jsonl, by the seed, in order; all of them if n is 0."""
    found = []
    for site, group in summary.by_site(rows).items():
        rng = np.random.default_rng([seed, *site.encode()])
        few = n and n < len(group)
        found += (
            [group[i] for i in sorted(rng.choice(len(group), n, replace=False))] if few else group
        )
    return found


def scored(row, entry, names):
    """A row of llm.jsonl: a row of scores.jsonl with what the language model adds to it, of its protocols."""
    tables = {
        metric: (value, row["why"].get(metric))
        for metric, value in score.flat(row["scores"]).items()
        if metric.split("[")[0] in names and "[" in metric
    }
    found = score.row(
        row["site"],
        row["layer"],
        row["neuron"],
        row,
        row["label"],
        {},
        {**(entry["scores"] if entry else {}), **tables},
    )
    return found | (
        {"llm": {k: entry[k] for k in ("explanations", "simulated", "failed", "reasons")}}
        if entry
        else {}
    )


def run(s, ckpt, folder, log=print):
    """Ask, score, write llm.json and llm.jsonl into the folder of `neurons`; returns the table as text.

    s: llm.Settings. Raises UserError as llm.run does, and where `neurons` has not run.
    """
    llm.check(s)
    names = [name.strip() for name in s.protocols.split(",")]
    unknown = [name for name in names if name not in score.PROTOCOLS]
    if unknown or s.n < 0 or s.seed < 0:
        raise UserError(
            f"--protocols {s.protocols!r}, --n {s.n}, --seed {s.seed}: choose some of "
            f"{', '.join(score.PROTOCOLS)}, 0 (all) or more neurons, a seed of 0 or more."
        )
    record, meta = activations.load(folder), checkpoint.load(ckpt)[1]
    if record.header["checkpoint"]["sha256"] != meta["sha256"]:
        raise UserError(
            f"the record in {folder} is of another checkpoint than {ckpt}; run `neurons` again."
        )
    tokenizer = data.load_tokenizer(meta["tokenizer"]["spec"])
    rows = drawn(score.read_rows(folder / "scores.jsonl"), s.n, s.seed)
    if (
        cli.read_json(folder / "summary.json")["record"] != record.header
    ):  # their tables stand beside ours
        raise UserError(
            f"the scores in {folder} are of another record than is there now; make them again "
            f"with `python interpret.py neurons {ckpt} --from select`."
        )
    names = [name for name in names if name != "openai_random" or "openai_tar" not in names]
    selected = {
        f"{row['site']} {row['neuron']}": {
            name: excerpts.select(record, row["site"], name, row["neuron"], record.header["seed"])
            for name in names
        }
        for row in rows
        if row["status"] != "dead"
    }
    log(f"{len(rows)} neurons drawn with seed {s.seed}, {len(rows) - len(selected)} of them dead")
    result = llm.run(selected, tokenizer.decode, s, folder, log)
    if s.dry_run:
        return "nothing was asked"
    entries = result.pop("neurons")
    reached = [
        row
        for row in rows
        if row["status"] == "dead" or f"{row['site']} {row['neuron']}" in entries
    ]
    names += ["openai_random"] * ("openai_tar" in names)
    made = [scored(row, entries.get(f"{row['site']} {row['neuron']}"), names) for row in reached]
    model = f"llm:{result['simulator']}@{result['rung']}"
    told = f"{model}: {result['saw']}; words by {result['explainer']}."
    if result["despite_probe"]:
        told += (
            " IT FAILED THE PROBE: it does not tell true from false explanations of planted neurons, "
            "and its scores mean nothing."
        )
    ceiling = (
        "five excerpts: saw the tokens of the excerpts that were explained: what words must beat."
    )
    saw = {model: told, "five excerpts": ceiling}
    found = summary.summarise(made, saw, record.header["checkpoint"]["config"]["n_layer"], s.seed)
    found = {
        "schema": 1,
        "command": evidence.command("interpret.py"),
        "record": record.header,
        "machine": machine.describe(machine.choose_device("cpu")),
        "llm": result,
        **found,
    }
    score.write_rows(folder / "llm.jsonl", made)
    with atomic_write(folder / "llm.json") as file:
        file.write(json.dumps(found, indent=1).encode() + b"\n")
    table = summary.table(found) if made else "no neuron was reached"
    if result["stopped"]:
        table += f"\n\n{len(reached)} of {len(rows)} neurons: {result['stopped']}."
    return f"{table}\n\nfiles     {Path(folder) / 'llm.json'}, llm.jsonl"

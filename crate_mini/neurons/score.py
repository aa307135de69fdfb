"""The last stages of `interpret.py neurons`: score (numbers of every neuron, and their summary), report.

uniform       token_r, ngram_r, label_r@10, controls null_r and init_r; f1 and auprc of the n-gram table
PROTOCOL[..]  the authorities' protocols, each with its simulator's name
trie_..       of the neurons that have one
"""

import json

import numpy as np

from crate_mini import UserError, atomic_write
from crate_mini import stats as metrics
from crate_mini.neurons import page as pages
from crate_mini.neurons import protocols as score
from crate_mini.neurons import simulators as explain
from crate_mini.neurons import summary
from crate_mini.neurons import survey as human
from crate_mini.neurons.relatives import relatives
from crate_mini.plots import figure as figures

AROUND = 24  # tokens of an excerpt on a page
DRAWS = 200  # redraws of windows for a neuron's own interval


def partners(n, live, rng):
    """(n,) for each of n neurons another one, each live one once if it can be: whose table null_r tries."""
    order = rng.permutation(np.flatnonzero(live) if live.sum() > 1 else n)
    other = np.full(n, order[0])
    other[order] = np.roll(order, 1)
    return other


def uniform_scores(r, site, sims, neurons):
    """{metric: (values, why)} of the uniform windows, and the intervals of ngram_r (n, 2)."""
    own = r.record.site(site.name)
    true = own["uniform_score_acts"][..., neurons]
    main = score.uniform(true, sims.uniform_ngram, firing=True, draws=DRAWS, seed=r.seed)
    found = {
        "token_r": score.uniform(true, sims.uniform_token)["r"],
        "ngram_r": main["r"],
        f"label_r@{explain.SHOWN}": score.uniform(true, sims.uniform_label)["r"],
    }
    if "shuffle" in r.controls and len(neurons) > 1:
        other = partners(len(neurons), own["max"][neurons] > 0, r.rng(site, "null"))
        found["null_r"] = score.uniform(true, sims.uniform_ngram[..., other])["r"]
    if hasattr(sims, "uniform_init"):
        init = r.init.site(site.name)["uniform_score_acts"][..., neurons]
        found["init_r"] = score.uniform(init, sims.uniform_init)["r"]
    return found | {"f1": main["f1"], "auprc": main["auprc"]}, main["ci95"]


def protocol_scores(r, sims, selected, i):
    """{"PROTOCOL[simulator]": (number, reason)} of the scored neuron number i.

    A reason beside a number says that there were too few documents or firings for all of the excerpts.
    """
    found = {}
    for source, name, simulator in (
        *(
            ("openai_tar", name, sim)
            for sim in ("ngram", "five excerpts")
            for name in ("openai_tar", "openai_random")
        ),
        *((name, name, "ngram") for name in ("anthropic_crate", "anthropic_2023")),
    ):
        array = getattr(sims, f"{source}_{simulator.split()[0]}")[i]
        excerpts = r.chosen(selected, source, "score", i)
        value, why = score.protocol(name, excerpts, array)
        n = (
            excerpts.origin.tolist().count("random")
            if name == "openai_random"
            else len(excerpts.origin)
        )
        if n < score.EXCERPTS[name]:
            why = why or f"{n} {score.FEWER} {score.EXCERPTS[name]}"
        found[f"{name}[{simulator}]"] = value, why
    return found


def trie_scores(r, site, j, patterns):
    """Of a neuron's patterns: r on the uniform windows; precision, recall, F1 at half of its maximum on top
    windows of the score part, which is how Neuron2Graph judges (so: where it fires, easy positives)."""
    trie, own = explain.Trie.of(patterns), r.record.site(site.name)
    true, windows = (
        own["uniform_score_acts"][..., j].astype(np.float32),
        r.record.shared["uniform_score"],
    )
    value, why = metrics.pearson(true.ravel(), trie(windows).ravel())
    top = own["top_score_doc"][j] >= 0
    found = explain.precision_recall(
        own["top_score_acts"][j][top], trie(own["top_score_tokens"][j][top]), own["max"][j] / 2
    )
    reason = "nothing to tell apart, or no pattern that fires"
    return {
        "trie_r": (value[0], why[0]),
        **{f"trie_{k}": (v, None if v is not None else reason) for k, v in found.items()},
    }


def score_all(r):
    """scores.jsonl, excerpts.jsonl, summary.json."""
    rows, shown, header = [], [], r.record.header
    for site in r.each_site():
        js, own = r.neurons(site), r.record.site(site.name)
        sims, selected, lines = r.read("simulate", site), r.read("select", site), r.explained(site)
        uniform, ci95 = uniform_scores(r, site, sims, js)
        tables = r.tables(site, js)
        near = relatives(r.model, site, own["uniform_score_acts"], js, r.directions.get(site.name))
        for i, (j, line) in enumerate(zip(js.tolist(), lines)):
            others = protocol_scores(r, sims, selected, i)
            if "trie" in line:
                others |= trie_scores(r, site, j, line["trie"])
            stats = {name: own[name][j] for name in ("density", "max", "mean")}
            mine = {name: (values[i], why[i]) for name, (values, why) in uniform.items()}
            row = score.row(
                site.name, site.layer, j, stats, line["label"], mine, others, {"ngram_r": ci95[i]}
            )
            rows.append(row | {"effect": line["effect"]} if "effect" in line else row)
            shown.append(
                {
                    "site": site.name,
                    "neuron": j,
                    "hist": own["hist"][j].tolist(),
                    **near[i],
                    **excerpts_of(r, own, j, i, sims, tables),
                }
            )
    score.write_rows(r.folder / "scores.jsonl", rows)
    score.write_rows(r.folder / "excerpts.jsonl", shown)
    found = summary.summarise(
        rows, r.saw, len(r.model.blocks), r.seed, len(r.record.shared["uniform_score"])
    )
    found = {
        "schema": 1,
        "command": r.command,
        "machine": header["machine"],
        "record": header,
        "match_density": r.density or None,
        **found,
    }
    with atomic_write(r.folder / "summary.json") as file:
        file.write(json.dumps(found, indent=1, allow_nan=False).encode() + b"\n")


def excerpts_of(r, own, j, i, sims, tables):
    """What a page shows of a neuron: five top windows of each part, two of each fifth of its range, three
    drawn from all."""
    top = [
        (float(own[f"top_{part}_acts"][j, k].max()), part, k)
        for part in ("fit", "score")
        for k in range(5)
        if own[f"top_{part}_doc"][j, k] >= 0
    ]
    rows = []
    for _, part, k in sorted(top, key=lambda t: -t[0]):
        tokens, acts = own[f"top_{part}_tokens"][j, k], own[f"top_{part}_acts"][j, k]
        sim = (
            tables(tokens[None], i)[0] if part == "score" else None
        )  # tables know the fit part by heart
        rows.append(cut(tokens, acts, sim, own[f"top_{part}_doc"][j, k], part))
    shared, acts = r.record.shared, own["uniform_score_acts"][..., j]
    peaks, limit = acts.max(1).astype(np.float32), max(float(own["max"][j]), 1e-30)

    def window(w):
        return cut(
            shared["uniform_score"][w],
            acts[w],
            sims.uniform_ngram[w, :, i],
            shared["uniform_score_doc"][w],
            "score",
        )

    fifth = np.where(peaks > 0, np.minimum(np.floor(5 * (peaks / limit)), 4), -1)
    rng = np.random.default_rng([r.seed, j])
    order, drawn = (
        rng.permutation(len(peaks)),
        rng.choice(len(peaks), min(3, len(peaks)), replace=False),
    )
    between = [
        sorted([w for w in order if fifth[w] == step][:2], key=lambda w: -peaks[w])
        for step in (4, 3, 2, 1, 0)
    ]
    return {
        "top": rows,
        "intervals": [window(w) for some in between for w in some],
        "random": [window(w) for w in drawn],
    }


def cut(tokens, acts, sim, doc, part):
    """An excerpt for a page: AROUND tokens with the peak inside."""
    at = int(np.argmax(acts))
    start = int(np.clip(at - AROUND // 2, 0, len(acts) - AROUND))
    some = slice(start, start + AROUND)

    def printed(values):
        return None if values is None else [explain.rounded(v, 3) for v in values[some]]

    return {
        "tokens": tokens[1:][some].tolist(),
        "acts": printed(acts),
        "sim": printed(sim),
        "at": at - start,
        "doc": int(doc),
        "part": part,
    }


def report(r):
    """What people look at, of the result files."""
    draw(r.folder, r.tokenizer.token_bytes, r.seed)


def draw(folder, token, seed=0, most=2048, humans=30):
    """Write index.html, human.html if there are neurons to ask people about, scores.png and density.png.

    Their paths. Arguments as those of pages.index and human.page, whose errors it raises; a UserError too
    when the scores are not of the record beside them, whose seed and text the page would tell.
    """
    record, found, neurons = pages.read(folder)
    if found.get("record", record).get("stamp") != record.get("stamp"):
        raise UserError(
            f"the scores in {folder} are of another record than is there now; make them again "
            "with `python interpret.py neurons CKPT --from select`."
        )
    made = {
        "index.html": pages.index(folder, token, seed, most),
        "human.html": human.page(folder, token, seed, humans),
    }
    files = [folder / name for name, content in made.items() if content]
    for path in files:
        with atomic_write(path) as file:
            file.write(made[path.name])
    name = pages.checkpoint_name(record)
    return [
        *files,
        figures.scores_by_layer({name: found}, folder / "scores.png"),
        figures.score_against_density({name: neurons}, folder / "density.png"),
    ]

"""The stage `score`: the scores of every neuron, and their summary.

token_r, ngram_r, label_r@10     Pearson r of a simulator on the uniform windows
context_gain                     ngram_r - token_r: what the token before adds to the token
null_r, init_r                   its controls: another neuron's table; the untrained model
f1, auprc                        does the n-gram table predict when the neuron fires (at a tenth
                                 of its maximum)? f1_chance: what a blind guess gets in both
PROTOCOL[SIMULATOR]              a published protocol (protocols.py) with a simulator
trie_r, trie_precision, ...      only for neurons that have a trie
"""

from types import SimpleNamespace

import numpy as np

from crate_mini import UserError, stats
from crate_mini.console import results
from crate_mini.neurons import page_excerpts, protocols, redraw, spread, summary
from crate_mini.neurons.labels import LABEL_TOKENS
from crate_mini.neurons.relatives import relatives
from crate_mini.neurons.trie import Trie, precision_recall

ON_EXCERPTS = (  # (protocol that selected the excerpts, protocol that scores them, simulator)
    ("openai_tar", "openai_tar", "ngram"),
    ("openai_tar", "openai_random", "ngram"),
    ("openai_tar", "openai_tar", "five excerpts"),
    ("openai_tar", "openai_random", "five excerpts"),
    ("anthropic_crate", "anthropic_crate", "ngram"),
    ("anthropic_2023", "anthropic_2023", "ngram"),
)


def score_neurons(work):
    """Write scores.jsonl, excerpts.jsonl and summary.json."""
    rows, shown = [], []
    spreads = {}
    for site in work.each_site():
        site_rows, site_shown, spreads[site.name] = _score_site(work, site)
        rows += site_rows
        shown += site_shown
    made_with = work.made_with
    for row in (*rows, *shown):
        row["made_with"] = made_with
    results.write_rows(work.folder / "scores.jsonl", rows)
    results.write_rows(work.folder / "excerpts.jsonl", shown)
    header = work.record.header
    windows = len(work.record.shared["uniform_score"])
    layers = len(work.model.blocks)
    summarised = summary.summarise(rows, work.saw, layers, work.seed, windows, spreads)
    content = {
        "schema": 1,
        "command": work.command,
        "machine": header["machine"],
        "record": header,
        "match_density": work.density or None,
        "made_with": made_with,
        **summarised,
        "spread": spreads,
    }
    if "cut" in header:
        content["cut"] = header["cut"]
    results.write_json(work.folder / "summary.json", content)


def _score_site(work, site):
    """(lines of scores.jsonl, lines of excerpts.jsonl, spread) of one site."""
    neurons, arrays = work.neurons(site), work.record.site(site.name)
    simulated, selected = work.read("simulate", site), work.read("select", site)
    lines = work.explanations(site)
    pairs = uniform_pairs(work, site, simulated, neurons)
    maxima = arrays["max"][neurons]
    uniform = uniform_scores(pairs, maxima)
    docs = work.record.shared["uniform_score_doc"]
    intervals = redraw.neuron_intervals(*pairs["ngram_r"], docs, work.seed)
    shown = page_excerpts.of_site(work, site, simulated)
    direction = work.directions.get(site.name)
    related = relatives(work.model, site, arrays["uniform_score_acts"], neurons, direction)
    rows, for_page = [], []
    for i, (j, line) in enumerate(zip(neurons.tolist(), lines)):
        others = protocol_scores(work, simulated, selected, i)
        if "trie" in line:
            others |= trie_scores(work, site, j, line["trie"])
        row = protocols.score_row(
            site.name,
            site.layer,
            j,
            {name: arrays[name][j] for name in ("density", "max", "mean")},
            line["label"],
            {name: (values[i], reasons[i]) for name, (values, reasons) in uniform.items()},
            others,
            {"ngram_r": intervals[i]},
        )
        if "effect" in line:
            row["effect"] = line["effect"]
        rows.append(row)
        hist = arrays["hist"][j].tolist()
        facts = {"site": site.name, "neuron": j, "hist": hist}
        for_page.append({**facts, **related[i], **shown[i]})

    def excerpt_scores(i, keep):
        return protocol_scores(work, simulated, selected, i, keep)

    return rows, for_page, spread.of_site(work, site, pairs, maxima, excerpt_scores)


def uniform_pairs(work, site, simulated, neurons):
    """{metric: (true, expected)} activations (W, 64, n) of n neurons on the uniform windows.

    Of the score part; each correlation is that of a pair.
    """
    arrays = work.record.site(site.name)
    true = arrays["uniform_score_acts"][..., neurons]
    pairs = {
        "token_r": (true, simulated.uniform_token),
        "ngram_r": (true, simulated.uniform_ngram),
        f"label_r@{LABEL_TOKENS}": (true, simulated.uniform_label),
    }
    if "shuffle" in work.controls and len(neurons) > 1:
        partner = partners(len(neurons), arrays["max"][neurons] > 0, work.rng(site, "null"))
        pairs["null_r"] = true, simulated.uniform_ngram[..., partner]
    if work.has_init and site.sae is None:
        if not hasattr(simulated, "uniform_init"):
            raise UserError(
                f"{work.file('simulate', site)} was made without --controls init; make it again "
                "with --from simulate."
            )
        init = work.init_record.site(site.name)["uniform_score_acts"][..., neurons]
        pairs["init_r"] = init, simulated.uniform_init
    return pairs


def uniform_scores(pairs, maxima):
    """{metric: (values (n,), reasons (n,))} of `uniform_pairs`, and what follows from them.

    That is the gain of context, and the firing scores of ngram_r's pair.

    maxima (n,): the largest activations known.
    """
    scores = {}
    for metric, (true, expected) in pairs.items():
        scores[metric] = protocols.score_uniform(true, expected)["r"]
    (token_r, problems), (ngram_r, others) = scores["token_r"], scores["ngram_r"]
    scores["context_gain"] = ngram_r - token_r, np.where(problems == "", others, problems)
    ngram = protocols.score_uniform(*pairs["ngram_r"], maxima)
    return scores | {name: ngram[name] for name in ("f1", "auprc", "f1_chance")}


def partners(n, live, rng):
    """(n,) another neuron for each of n: the one whose table null_r tries.

    Among live neurons where possible, each then being the partner of exactly one. live (n,) bool.
    """
    order = rng.permutation(np.flatnonzero(live) if live.sum() > 1 else n)
    partner = np.full(n, order[0])
    partner[order] = np.roll(order, 1)
    return partner


def protocol_scores(work, simulated, selected, i, keep=None):
    """{"PROTOCOL[SIMULATOR]": (number, reason)} of the i-th scored neuron.

    keep(docs): which of its excerpts to score, given their documents (n,); by default all.
    A reason next to a number means that there were fewer excerpts than the protocol asks for: few
    documents, or a neuron that seldom fires.
    """
    scores = {}
    for source, protocol, simulator in ON_EXCERPTS:
        excerpts = work.selected(selected, source, "score", i)
        acts = getattr(simulated, f"{source}_{simulator.split()[0]}")[i]
        if keep is not None:
            excerpts, acts = _kept(excerpts, acts, keep(excerpts.doc))
        value, reason = protocols.score_excerpts(protocol, excerpts, acts)
        count = len(excerpts.origin)
        if protocol == "openai_random":
            count = excerpts.origin.tolist().count("random")
        if count < protocols.EXCERPTS[protocol] and not reason:
            reason = f"{count} {protocols.FEWER} {protocols.EXCERPTS[protocol]}"
        scores[f"{protocol}[{simulator}]"] = value, reason
    return scores


def _kept(excerpts, acts, kept):
    """The excerpts, and what was simulated on them, of which kept (n,) is True."""
    parts = {name: values[kept] for name, values in vars(excerpts).items()}
    return SimpleNamespace(**parts), acts[: len(kept)][kept]


def trie_scores(work, site, j, patterns):
    """{"trie_r", "trie_precision", ...: (number, reason)} of a neuron's trie.

    trie_r is over the uniform windows. Precision, recall and F1 are of firing at half of the
    neuron's maximum on its top windows of the score part, as Neuron2Graph judges; those windows
    are where it fires, so positives are easy.
    """
    trie, arrays = Trie.of(patterns), work.record.site(site.name)
    true = arrays["uniform_score_acts"][..., j].astype(np.float32)
    expected = trie(work.record.shared["uniform_score"])
    values, reasons = stats.pearson(true.ravel(), expected.ravel())
    scores = {"trie_r": (values[0], reasons[0])}
    exists = arrays["top_score_doc"][j] >= 0
    top_acts = arrays["top_score_acts"][j][exists]
    top_expected = trie(arrays["top_score_tokens"][j][exists])
    counted = precision_recall(top_acts, top_expected, arrays["max"][j] / 2)
    for name, value in counted.items():
        reason = "nothing to tell apart, or no pattern that fires" if value is None else None
        scores[f"trie_{name}"] = value, reason
    return scores

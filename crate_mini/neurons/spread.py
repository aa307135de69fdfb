"""How the means of a site's scores move when its documents are redrawn, or split again.

    "neurons"     how many the site has
    "documents"   {metric: {group: shift}}: the tables stay, other documents are scored (redraw.py)
    "splits"      {metric: [its mean in each split]}: the documents are dealt to the parts again by
                  other seeds, and tables are made and scored anew, for at most SAMPLE neurons of a
                  site; the first split is the one in use
    "share"       of all held-out tokens, those of the score part

The stage `record` writes splits.json, the stage `score` puts all of it into summary.json.
"""

import shutil
from dataclasses import replace

import numpy as np

from crate_mini import UserError
from crate_mini.console import results
from crate_mini.neurons import metrics, protocols, record, redraw
from crate_mini.neurons.simulators import NgramTable, TokenTable

FIRING = ("f1", "auprc")


def of_site(work, site, pairs, maxima, scores):
    """The spread of one site, a JSON-able dict.

    pairs: {metric: (true, expected)} activations (W, 64, n) of the correlations on the uniform
    windows of the score part; maxima (n,): the neurons' largest activations; scores(i, keep):
    {metric: (number or None, reason)} of the i-th scored neuron on excerpts, keep(docs) telling
    which of these to use.
    """
    docs = work.record.shared["uniform_score_doc"]
    among = np.unique(docs)
    groups = redraw.group_of(docs, among)
    numbers = np.unique(groups).tolist()
    shifts = {}
    for metric, (true, expected) in pairs.items():
        shifts[metric] = redraw.correlation_shifts(true, expected, groups)
    if shifts["token_r"] and shifts["ngram_r"]:
        gain = {}
        for group, shift in shifts["ngram_r"].items():
            gain[group] = shift - shifts["token_r"][group]
        shifts["context_gain"] = gain
    true, expected = pairs["ngram_r"]

    def again(neurons, group):
        kept = groups != group
        x, y = (acts[kept][..., neurons].reshape(-1, len(neurons)) for acts in (true, expected))
        firing = metrics.firing(metrics.fires(x, maxima[neurons]), y)
        by_metric = {metric: firing[metric][0] for metric in FIRING}

        def keep(excerpt_docs):
            return redraw.group_of(excerpt_docs, among) != group

        rows = [scores(i, keep) for i in neurons.tolist()]
        for metric in rows[0]:
            by_metric[metric] = [row[metric][0] for row in rows]
        return by_metric

    n = true.shape[2]
    shifts |= redraw.score_shifts(again, numbers, n, [work.seed, site.layer])
    known = {metric: shift for metric, shift in shifts.items() if shift}
    header = work.record.header
    return {
        "neurons": site.width,
        "documents": known,
        "splits": split_means(work, site),
        "share": header["tokens"]["score"] / work.corpus.n_tokens[header["split"]],
    }


# ---- splits --------------------------------------------------------------------------------------


def split_means(work, site):
    """{metric: [mean in each split]} of a site, from splits.json; {} without other splits.

    Raises UserError if splits.json is of another record than the one in use.
    """
    if not work.splits:
        return {}
    path = work.folder / "splits.json"
    content = results.read_json(path, expected="what the stage record writes with --splits")
    if content.get("record") != work.record.header["stamp"]:
        raise UserError(f"{path} is of another record; make both again with --from record.")
    if len(content["seeds"]) != work.splits + 1:
        raise UserError(
            f"{path} has {len(content['seeds']) - 1} other splits, not --splits {work.splits}; "
            "give the same again, or make them with --from record."
        )
    return content["means"][site.name]


def make_splits(work, sites):
    """Record `work.splits` other splits of the documents, score them, write splits.json.

    sites: as they were recorded. The records are removed again.
    """
    path, folder = work.folder / "splits.json", work.folder / "split"
    path.unlink(missing_ok=True)
    if not work.splits:
        return
    chosen = {site.name: _sample(work, site) for site in sites}
    seeds = [work.seed + i for i in range(work.splits + 1)]
    by_split = [{site.name: _scores(work.record, site, chosen[site.name]) for site in sites}]
    try:
        for seed in seeds[1:]:
            other = record.record(
                work.model,
                work.meta,
                [_narrowed(site, chosen[site.name]) for site in sites],
                work.corpus,
                folder,
                seed=seed,
                tokens=work.tokens,
                room=sum(site.width for site in sites),
                log=work.log,
            )
            by_split.append({site.name: _scores(other, site) for site in sites})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    means = {site.name: _means([scores[site.name] for scores in by_split]) for site in sites}
    stamp = work.record.header["stamp"]
    results.write_json(path, {"record": stamp, "seeds": seeds, "means": means})


def _sample(work, site):
    """At most SAMPLE of the neurons to score of a site, drawn by the seed."""
    neurons = work.neurons(site)
    if len(neurons) <= redraw.SAMPLE:
        return neurons
    return np.sort(work.rng(site, "splits").choice(neurons, redraw.SAMPLE, replace=False))


def _narrowed(site, neurons):
    """The Site of some neurons of a site."""

    def encode(codes):
        acts = codes if site.encode is None else site.encode(codes)
        return acts[:, neurons]

    return replace(site, encode=encode, width=len(neurons), limits=None)


def _scores(recorded, site, neurons=slice(None)):
    """{metric: (n,) scores of neurons of a site in one record}, NaN where undefined."""
    shared, arrays = recorded.shared, recorded.site(site.name)
    table = NgramTable(
        shared["counts"],
        arrays["token_sum"][:, neurons],
        shared["pairs"],
        shared["pair_counts"],
        arrays["pair_sum"][:, neurons],
    )
    windows = shared["uniform_score"]
    true = arrays["uniform_score_acts"][..., neurons]
    expected = table(windows)
    simulated = {
        "token_r": TokenTable(table.values)(windows),
        "ngram_r": expected,
        "null_r": np.roll(expected, 1, -1),
    }
    scores = {}
    for metric, acts in simulated.items():
        scores[metric] = protocols.score_uniform(true, acts)["r"][0]
    return scores | {"context_gain": scores["ngram_r"] - scores["token_r"]}


def _means(by_split):
    """{metric: [mean in each split]} over the neurons that have a score in all splits."""
    means = {}
    for metric in by_split[0]:
        scores = np.stack([scores[metric] for scores in by_split])  # (splits, n)
        scores = scores[:, np.isfinite(scores).all(0)]
        if scores.shape[1]:
            means[metric] = scores.mean(1).tolist()
    return means

"""The scores of a layer's neurons without files or pages: for Python and for histories."""

import tempfile
from pathlib import Path

import numpy as np

from crate_mini.neurons import npz, protocols, record
from crate_mini.neurons.score import partners
from crate_mini.neurons.workspace import Workspace


def quick_scores(model, meta, tokenizer, corpus, sites, tokens=100_000, seed=0, log=None):
    """{site's name: {"ngram_r", "null_r", "density": (n,) float64, "top": (n, 3) ids}}.

    The numbers of `interpret.py neurons` at as many tokens and the same seed: how well the last two
    tokens predict a neuron on held-out windows, and its control with another neuron's table; NaN
    where undefined. top: the tokens on which the neuron is highest, the highest first. log: called
    with progress. Raises UserError for too little text.
    """
    with tempfile.TemporaryDirectory() as folder:
        recorded = record.record(
            model,
            meta,
            sites,
            corpus,
            folder,
            seed=seed,
            tokens=tokens,
            log=log or _ignore,
            show_every=3.0 if log else np.inf,
        )
        work = Workspace(
            model, meta, tokenizer, corpus, Path(folder), sites, seed=seed, _record=recorded
        )
        return {site.name: _scores(work, site) for site in work.each_site()}


def _scores(work, site):
    arrays, neurons = work.record.site(site.name), work.neurons(site)
    true, live = arrays["uniform_score_acts"], arrays["max"] > 0
    table = work.ngram_table(site, neurons)
    expected = table(work.record.shared["uniform_score"])
    simulated = npz.Halves(expected, -1).read()  # as on the disk
    partner = partners(len(neurons), live, work.rng(site, "null"))
    scores = {"density": arrays["density"].astype(np.float64)}
    for name, predicted in (("ngram_r", simulated), ("null_r", simulated[..., partner])):
        values, _ = protocols.score_uniform(true, predicted)["r"]
        scores[name] = np.where(live, values, np.nan)
    seen = table.values[:-1][: work.tokenizer.vocab_size]  # the last row stands for no token
    scores["top"] = np.argsort(-seen, axis=0, kind="stable")[:3].T
    return scores


def _ignore(line):
    """A log that nobody reads."""

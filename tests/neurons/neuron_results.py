"""Made-up results of `interpret.py neurons`, for tests of everything that reads them."""

import json
from pathlib import Path

import numpy as np

from crate_mini.neurons.protocols import flat_scores

PLAIN = [f" w{i}".encode() for i in range(60)]  # a vocabulary
SHA256 = "c0ffee" * 10  # of the checkpoint
METRICS = ("token_r", "ngram_r", "label_r@10", "null_r", "init_r")


def write_results(
    folder, sites=("L0", "L1"), n=6, vocabulary=60, dead=(), seed=0, shown=(10, 10, 3)
):
    """Fill a folder as the command does; returns the lines of scores.jsonl and excerpts.jsonl.

    n: neurons of each site, of which neuron 3 is dead; dead: sites whose neurons are all dead;
    shown: excerpts of a neuron in each group.
    """
    rng, folder = np.random.default_rng(seed), Path(folder)
    folder.mkdir(exist_ok=True)
    scores, excerpts = [], []
    for site in sites:
        for j in range(n):
            live = site not in dead and j != 3
            scores.append(_score_line(rng, vocabulary, site, j, live))
            excerpts.append(_excerpt_line(rng, vocabulary, site, j, live, shown))
    (folder / "record.json").write_text(json.dumps(_record(vocabulary)))
    (folder / "summary.json").write_text(json.dumps(_summary(sites, n, scores)))
    for name, lines in (("scores.jsonl", scores), ("excerpts.jsonl", excerpts)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return scores, excerpts


def _score_line(rng, vocabulary, site, j, live):
    """A line of scores.jsonl."""

    def random_score():
        return float(rng.random()) if live else None

    def effect(**facts):
        changes = {}
        for direction in ("raised", "lowered"):
            ids = rng.choice(vocabulary, 4, replace=False).tolist()
            changes[direction] = [[id, 0.5] for id in ids]
        return {**facts, "positions": 4, **changes}

    def with_intervals(changes):
        """An effect as it is written since effects have intervals."""
        for direction in ("raised", "lowered"):
            rows = changes[direction]
            changes[direction] = [[*row, 0.25, 0.75, i % 2] for i, row in enumerate(rows)]
        return {**changes, "documents": 4, "kl_ci95": [0.005, 0.02], "loss_ci95": [-0.75, -0.25]}

    tokens = rng.choice(vocabulary, 5, replace=False).tolist() if live else []
    line = {
        "site": site,
        "layer": int(site[1]),
        "neuron": j,
        "status": "live" if live else "dead",
        "max": 4.0 if live else 0.0,
        "density": random_score() or 0.0,
        "mean": 0.25 if live else 0.0,
        "label": {
            "tokens": [[t, 1.5, 7, 0.25] for t in tokens],
            "left": [1],
            "class": "mixed",
            "raised": [2, 3],
        },
        "scores": {
            "uniform": {metric: random_score() for metric in METRICS},
            "openai_tar[ngram]": random_score(),
            "openai_random[ngram]": None,
        },
        "why": {
            "openai_random[ngram]": "constant" if live else "dead",
            "openai_tar[ngram]": "3 excerpts of the protocol's 10",
        },
    }
    if live:
        line["effect"] = with_intervals(effect(clamp=4.0, kl=0.01, loss=-0.5))
        line["effect"]["far"] = effect(clamp=20.0, kl=0.25, loss=0.125)
    return line


def _excerpt_line(rng, vocabulary, site, j, live, shown):
    """A line of excerpts.jsonl."""
    line = {
        "site": site,
        "neuron": j,
        "hist": rng.integers(0, 99, 50).tolist() if live else [0] * 50,
        "atoms": [[(j + 1) % 6, 0.5], [77, 0.25]] if live else [],
        "together": [],
    }
    for group, count in zip(("top", "intervals", "random"), shown):
        line[group] = []
        for i in range(count if live else 0):
            line[group].append(_excerpt(rng, vocabulary, "score" if i % 2 else "fit"))
    return line


def _excerpt(rng, vocabulary, part, width=24):
    acts = np.round(np.maximum(0, rng.normal(0, 1, width)), 3)
    acts[12] = round(3 + rng.random(), 3)
    return {
        "tokens": rng.integers(0, vocabulary, width).tolist(),
        "acts": acts.tolist(),
        "at": 12,
        "part": part,
        "sim": np.round(rng.random(width) * 3, 3).tolist(),
        "doc": int(rng.integers(90)),
    }


def _record(vocabulary):
    """record.json."""
    checkpoint = {
        "path": "out/a<b>/best",
        "sha256": SHA256,
        "kind": "crate",
        "training": {"step": 9, "best_val_loss": 4.5},
        "config": {"n_layer": 2, "n_embd": 32, "vocab_size": vocabulary},
    }
    return {
        "seed": 0,
        "checkpoint": checkpoint,
        "corpus": {"source": {"name": "texts"}},
        "tokens": {"fit": 1000, "score": 900},
        "documents": {"fit": 10, "score": 9},
    }


def _summary(sites, n, scores):
    """summary.json, with one metric."""
    values = [flat_scores(line["scores"])["ngram_r"] for line in scores]
    values = [value for value in values if value is not None]
    statistic = {
        "n": len(values),
        "mean": float(np.mean(values)) if values else None,
        "mean_undefined_as_0": 0.3,
        "ci95": [0.1, 0.2] if values else None,
    }
    paper = {"mean": statistic["mean"], "variance": 0.01, "layers": [0]}
    counts = {"total": n, "live": n - 1, "dead": 1, "undefined": 0, "failed": 0}
    site = {"n": {"ngram_r": counts}, "density": {"mean": 0.1}, "ngram_r": statistic}
    return {
        "machine": {"commit": "abc"},
        "what_the_simulator_saw": {"ngram": "two tokens"},
        "sites": dict.fromkeys(sites, site),
        "overall": {"codes": {"ngram_r": {**statistic, "paper": paper}}},
    }

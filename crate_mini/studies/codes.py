"""Do the codes of a CLVQ-VAE move away from the clusters they start from? -> results/codes.json.

Training begins at spherical k-means. Whether it then changes which words belong together is the
adjusted mutual information (AMI) of the words' codes with those first clusters, epoch by epoch: 1
if no word moved, about 0 if nothing is left. RECIPES holds the authors' hyperparameters and ours.
The control starts from single words drawn at random, as the authors' `random` does: codes that can
move at all leave such a start.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch

from crate_mini import UserError
from crate_mini.cli import setting
from crate_mini.concepts import clvqvae
from crate_mini.concepts.codebook_checks import adjusted_mutual_information
from crate_mini.concepts.types import SPLITS, Vectors
from crate_mini.console import results
from crate_mini.console.terminal import Command
from crate_mini.plots.markdown import markdown
from crate_mini.training.device import machine

WORDS_PER_CODE = 200  # training words, as in the paper
PAPER_WIDTH = 768  # of BERT and RoBERTa
PER_STEP = 1.9  # words that a step shows to each code: 128 sentences of 5.9 words, 400 codes
PAPER = {
    "unit": "raw",
    "temperature": 1.0,
    "topk": 5,
    "memory": "z",
    "mask": "none",
    "layers": 6,
    "heads": 8,
    "ffn": 8 / 3,  # 2,048 at the paper's width
    "lr": 5e-3,
}
RECIPES = {  # changes to clvqvae.Settings, and the codes at the start
    "paper, T by width": (PAPER, "clusters"),
    "ours": ({}, "clusters"),
    "paper, random start": (PAPER, "words"),
    "paper, T = 1": (PAPER, "clusters"),
}
BY_WIDTH = ("paper, T by width", "paper, random start")


@dataclass
class Settings:
    """Train CLVQ-VAEs on the word vectors of a classifier and follow their codes by epoch.

    VECTORS is the vectors.npz of `python interpret.py concepts CKPT`. Writes results/codes.json.
    """

    vectors: str | None = setting(None, "vectors.npz of a run of `interpret.py concepts`")
    words: int = setting(8000, "maximum training words: those of the first texts", low=200)
    k: int = setting(0, f"codes; 0: one per {WORDS_PER_CODE} training words")
    epochs: int = setting(50, "epochs of each training, without early stopping", low=1)
    seed: int = setting(0, "seed of start, draws and decoder")
    table: bool = setting(False, "only print the table of results/codes.json")


def run(settings):
    """Train every recipe, write results/codes.json, print its table.

    Raises UserError without vectors, and for what clvqvae.fit refuses.
    """
    if settings.table:
        print(table(results.read_json(result_file())))
        return
    if settings.vectors is None:
        raise UserError(
            "give word vectors: `python interpret.py concepts CKPT --out FOLDER` writes them, then "
            "`python -m crate_mini.studies codes FOLDER/vectors.npz`."
        )
    results.ready_file(result_file())
    vectors = shortened(Vectors.load(settings.vectors), settings.words)
    n_words = {split: int(vectors.rows(split).sum()) for split in SPLITS}
    k = settings.k or max(2, n_words["train"] // WORDS_PER_CODE)
    study = {
        "schema": 1,
        "command": results.command("-m", "crate_mini.studies"),
        "commit": results.commit(),
        "machine": machine(torch.device("cpu")),
        "seed": settings.seed,
        "vectors": {**vectors.facts, "width": vectors.lower.shape[1]},
        "words": n_words,
        "k": k,
        "runs": {},
    }
    for name in RECIPES:
        print(name, flush=True)
        study["runs"][name] = train(name, vectors, k, settings)
        results.write_json(result_file(), study)
    print(f"\n{table(study)}")


def result_file():
    return results.ROOT / "results" / "codes.json"


# ---- one training --------------------------------------------------------------------------------


def shortened(vectors, n_words):
    """The Vectors of the first texts, up to the one with the training word number `n_words`."""
    train = np.flatnonzero(vectors.rows("train"))
    if len(train) <= n_words:
        return vectors
    keep = vectors.sentence <= vectors.sentence[train[n_words - 1]]
    content = {f.name: getattr(vectors, f.name) for f in fields(vectors)}
    for name in ("lower", "upper", "sentence", "word", "position"):
        content[name] = content[name][keep]
    return Vectors(**content)


def recipe(name, vectors, k, settings):
    """(clvqvae.Settings, codes at the start or None for clusters) of one of RECIPES.

    Codes follow words by a moving average of about 100 steps, so every recipe keeps the words per
    code and step of the paper, not its texts per step. T by width: D grows with the width, and so
    T = 1 at the paper's width is T = d / 768 here.
    """
    changes, start = RECIPES[name]
    changes = {**changes, "codes": k, "epochs": settings.epochs, "patience": settings.epochs}
    d = vectors.lower.shape[1]
    train = vectors.rows("train")
    texts = len(np.unique(vectors.sentence[train]))
    changes["batch"] = max(1, round(PER_STEP * k * texts / train.sum()))
    if name in BY_WIDTH:
        changes["temperature"] = d / PAPER_WIDTH
    if start == "clusters":
        return clvqvae.Settings(**changes), None
    words = vectors.lower[train]
    drawn = np.random.default_rng(settings.seed).choice(len(words), k, replace=False)
    return clvqvae.Settings(**changes), words[drawn]


class Follow:
    """What `fit` calls after each epoch: it keeps how far the codes of the training words are.

    by_epoch: {epochs done: {"ami_start", "ami_before", "moved"}}. ami_start: with the codes before
    training; ami_before: with those one epoch earlier; moved: median distance of the codes from
    where they started, as a share of the median distance between them there.
    """

    def __init__(self, vectors):
        self.words = torch.from_numpy(vectors.lower[vectors.rows("train")])
        self.by_epoch = {}
        self.before = None

    def __call__(self, epoch, model):
        x = self.words / model.scale[0]
        start = clvqvae.assign_at_start(model, x).numpy()
        now = clvqvae.assign(model, x).numpy()
        before = start if self.before is None else self.before
        moved = (model.codebook.e - model.start).norm(dim=1).median()
        between = torch.pdist(model.start).median()
        self.by_epoch[epoch] = {
            "ami_start": adjusted_mutual_information(now, start),
            "ami_before": adjusted_mutual_information(now, before),
            "moved": float(moved / between),
        }
        self.before = now


def train(name, vectors, k, settings):
    """One recipe: its settings, and for each epoch what Follow and `fit` say of it."""
    chosen, start = recipe(name, vectors, k, settings)
    follow = Follow(vectors)
    model, history = clvqvae.fit(vectors, chosen, settings.seed, start, watch=follow)
    epochs = []
    for entry in history:
        usage = {key: entry[key] for key in ("perplexity", "active", "entropy", "m")}
        explained = entry["stop"]["explained"]
        epochs.append({**follow.by_epoch[entry["epoch"]], **usage, "explained": explained})
    return {
        "settings": clvqvae.describe(model),
        "start": RECIPES[name][1],
        "untrained": follow.by_epoch[0],
        "epochs": epochs,
    }


# ---- the table -----------------------------------------------------------------------------------

SHOWN = (1, 2, 5, 10, 50)  # epochs


def table(study):
    """AMI with the start by epoch, and what training left, as Markdown."""
    last = len(next(iter(study["runs"].values()))["epochs"])
    shown = [epoch for epoch in SHOWN if epoch <= last]
    rows = []
    for name, run in study["runs"].items():
        agreement = [f"{run['epochs'][epoch - 1]['ami_start']:.2f}" for epoch in shown]
        end = run["epochs"][-1]
        rows.append(
            [
                name,
                f"{run['untrained']['ami_start']:.2f}",
                *agreement,
                f"{end['ami_before']:.3f}",
                f"{end['moved']:.2f}",
                f"{end['perplexity']:.0f} of {study['k']}",
                f"{end['explained']:.2f}",
            ]
        )
    head = ["AMI with the start", "epoch 0", *map(str, shown), "last two epochs"]
    return markdown([*head, "codes moved", "perplexity", "explained"], rows)


COMMAND = Command(Settings, run, checkpoint=False, positional=("vectors",))

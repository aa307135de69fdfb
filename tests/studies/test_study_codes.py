"""The study of codes that move or stay: what it measures, on vectors where the answer is known."""

import sys

import numpy as np
import pytest
import torch

from crate_mini import UserError
from crate_mini.concepts import clvqvae
from crate_mini.concepts.types import Vectors
from crate_mini.console import results, terminal
from crate_mini.studies import codes as study
from crate_mini.studies.__main__ import COMMANDS


def vectors(n_texts=120, d=16):
    """Vectors of three random words a text; three of five texts are for training."""
    rng = np.random.default_rng(0)
    lower = rng.normal(size=(3 * n_texts, d))
    return Vectors(
        lower=lower,
        upper=lower @ rng.normal(size=(d, d)),
        sentence=np.repeat(np.arange(n_texts), 3),
        word=np.zeros(3 * n_texts),
        position=np.tile(np.arange(3), n_texts),
        label=np.arange(n_texts) % 2,
        split=np.array([0, 0, 0, 1, 2])[np.arange(n_texts) % 5],
        vocabulary=["word"],
    )


def test_it_follows_the_codes_of_every_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    vectors().save(tmp_path / "vectors.npz")
    words = [str(tmp_path / "vectors.npz"), "--words", "200", "--k", "5", "--epochs", "3"]
    monkeypatch.setattr(sys, "argv", ["crate_mini.studies", "codes", *words])
    terminal.dispatch("-m crate_mini.studies", "", COMMANDS)
    content = results.read_json(tmp_path / "results" / "codes.json")
    assert list(content["runs"]) == list(study.RECIPES)
    assert content["command"].startswith("python -m crate_mini.studies codes ")
    assert content["k"] == 5 and content["words"]["train"] == 201  # the last text stays whole
    for run in content["runs"].values():
        assert [len(run["epochs"]), run["untrained"]["moved"]] == [3, 0.0]
        assert all(-0.2 < epoch["ami_start"] <= 1 for epoch in run["epochs"])
    temperatures = [run["settings"]["T"] for run in content["runs"].values()]
    assert temperatures[0] == temperatures[2] == 16 / 768 and temperatures[3] == 1.0
    batches = [run["settings"]["batch"] for run in content["runs"].values()]
    assert batches == [3, 3, 3, 3]  # 1.9 words for each of 5 codes, of 3 words a text
    first = content["runs"]["paper, T by width"]
    row = f"| paper, T by width | {first['untrained']['ami_start']:.2f} |"
    assert row in study.table(content) and study.table(content) in capsys.readouterr().out


class StillModel:
    """A model whose encoder is the identity, as clvqvae.assign and assign_at_start see it."""

    scale = (2.0, 1.0)

    def __init__(self, start, now):
        self.start = start
        self.encoder = torch.nn.Identity()
        self.codebook = clvqvae.Codebook(now)


def test_agreement_and_way_of_codes_are_measured():
    v = vectors()
    start = torch.eye(16)[:4] * 2
    follow = study.Follow(v)
    follow(0, StillModel(start, start))
    follow(1, StillModel(start, start.flip(0)))  # other numbers, the same clusters
    follow(2, StillModel(start, start.roll(4, 1)))  # other clusters, sqrt(8) away, as far as codes
    same, renamed, other = (follow.by_epoch[epoch] for epoch in range(3))
    assert same == {"ami_start": 1.0, "ami_before": 1.0, "moved": 0.0}
    assert renamed["ami_start"] == pytest.approx(1.0)
    assert abs(other["ami_start"]) < 0.1 and abs(other["ami_before"]) < 0.1
    assert other["moved"] == pytest.approx(1.0)


def test_it_refuses_to_run_without_vectors():
    with pytest.raises(UserError, match="give word vectors: `python interpret.py concepts CKPT"):
        study.run(study.Settings())

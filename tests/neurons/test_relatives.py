"""Neurons that write alike and fire alike: against NumPy's own cosines and correlations."""

import numpy as np
import pytest
import torch

from crate_mini.intervene import atoms
from crate_mini.model import LM, preset
from crate_mini.neurons import relatives
from crate_mini.neurons.record import Site


def brute(matrix, j, most):
    """[other, value] of the row of a matrix of similarities, itself left out."""
    others = [i for i in range(len(matrix)) if i != j and matrix[j, i] > 0]
    best = sorted(others, key=lambda i: -matrix[j, i])[:most]
    return [[i, pytest.approx(matrix[j, i], abs=6e-4)] for i in best]


@pytest.mark.parametrize("n, width, block", [(7, 5, 1024), (40, 30, 4), (3, 1, 2), (2, 6, 1)])
def test_alike_is_the_cosine(n, width, block, monkeypatch):
    monkeypatch.setattr(relatives, "BLOCK", block)
    x = np.random.default_rng(n).normal(size=(n, width))
    norm = np.linalg.norm(x, axis=0)
    for neurons in (np.arange(width), np.arange(width)[::3]):
        for most in (1, 3, 50):
            found = relatives.alike(x, neurons, most)
            assert found == [brute(x.T @ x / np.outer(norm, norm), j, most) for j in neurons]


def test_a_column_of_zeros_is_like_nothing():
    found = relatives.alike(np.array([[1.0, 0, 1], [0, 0, 1]]), np.arange(3))
    assert found == [[[2, 0.707]], [], [[0, 0.707]]]


@pytest.mark.parametrize("feature", [False, True])
def test_relatives_of_a_model(feature):
    torch.manual_seed(0)
    model = LM(preset("2L", vocab_size=64, block_size=8, n_embd=32))
    width, rng = (50 if feature else model.config.n_code), np.random.default_rng(1)
    W = torch.randn(width, model.config.n_code) if feature else None
    acts = np.maximum(rng.normal(size=(9, 11, width)), 0).astype(np.float16)
    acts[..., 4], acts[..., 5], acts[..., 7] = 0.1, 2 * acts[..., 6] + 3, 0
    found = relatives.relatives(model, Site("L1", 1, width), acts, np.arange(width), W)
    written = atoms(model, 1).detach() @ (torch.eye(width) if W is None else W.T)
    cosine = torch.nn.functional.cosine_similarity(written.T[:, None], written.T[None], -1).numpy()
    with np.errstate(invalid="ignore"):
        r = np.nan_to_num(np.corrcoef(acts.reshape(-1, width).astype(np.float64).T))
    r[4] = r[:, 4] = 0  # constant: rounding only
    for j, one in enumerate(found):
        assert one["atoms"] == brute(cosine, j, 3) and one["together"] == brute(r, j, 3)
    assert (
        found[5]["together"][0] == [6, 1.0] and found[4]["together"] == found[7]["together"] == []
    )


def test_two_constants_do_not_fire_together():
    model = LM(preset("2L", vocab_size=64, block_size=8, n_embd=32))
    acts = np.full((256, 64, 3), (1.7, 5.3, 0), np.float16)
    acts[::2, :, 2] = 1
    directions = torch.eye(3, model.config.n_code)
    found = relatives.relatives(model, Site("L1", 1, 3), acts, np.arange(3), directions)
    assert [one["together"] for one in found] == [[], [], []]

"""Neurons that write alike and fire alike: against NumPy's own cosines and correlations."""

import numpy as np
import pytest
import torch

from crate_mini.model import LM, preset
from crate_mini.neurons import relatives
from crate_mini.neurons.record import Site


def small_model():
    torch.manual_seed(0)
    return LM(preset("2L", vocab_size=64, block_size=8, n_embd=32))


def brute_force(similarities, j, most):
    """The `most` largest similarities above 0 of row j (h, h), itself left out."""
    row = similarities[j]
    others = [i for i in range(len(row)) if i != j and row[i] > 0]
    best = sorted(others, key=row.__getitem__, reverse=True)[:most]
    return [[i, pytest.approx(row[i], abs=6e-4)] for i in best]


@pytest.mark.parametrize("n, width, block", [(7, 5, 1024), (40, 30, 4), (3, 1, 2), (2, 6, 1)])
def test_similarity_is_the_cosine(n, width, block, monkeypatch):
    monkeypatch.setattr(relatives, "BLOCK", block)
    x = np.random.default_rng(n).normal(size=(n, width))
    norms = np.linalg.norm(x, axis=0)
    cosines = x.T @ x / np.outer(norms, norms)
    for neurons in (np.arange(width), np.arange(width)[::3]):
        for most in (1, 3, 50):
            expected = [brute_force(cosines, j, most) for j in neurons]
            assert relatives.most_similar(x, neurons, most) == expected


def test_a_column_of_zeros_resembles_nothing():
    columns = np.array([[1.0, 0, 1], [0, 0, 1]])
    similar = relatives.most_similar(columns, np.arange(3))
    assert similar == [[[2, 0.707]], [], [[0, 0.707]]]


@pytest.mark.parametrize("of_features", [False, True])
def test_relatives_of_a_model(of_features):
    model = small_model()
    h = model.config.n_code
    width = 50 if of_features else h
    directions = torch.randn(width, h) if of_features else torch.eye(h)
    acts = np.random.default_rng(1).normal(size=(9, 11, width))
    acts = np.maximum(acts, 0).astype(np.float16)
    acts[..., 4] = 0.1
    acts[..., 5] = 2 * acts[..., 6] + 3
    acts[..., 7] = 0
    neurons = np.arange(width)
    site = Site("L1", 1, width)
    similar = relatives.relatives(model, site, acts, neurons, directions if of_features else None)

    written = (relatives.atoms(model, 1).detach() @ directions.T).T  # (width, d)
    cosines = torch.nn.functional.cosine_similarity(written[:, None], written[None], -1).numpy()
    with np.errstate(invalid="ignore"):
        r = np.corrcoef(acts.reshape(-1, width).astype(np.float64).T)
    r = np.nan_to_num(r)
    r[4] = r[:, 4] = 0  # constant, up to rounding
    for j, near in enumerate(similar):
        assert near["atoms"] == brute_force(cosines, j, 3)
        assert near["together"] == brute_force(r, j, 3)
    assert similar[5]["together"][0] == [6, 1.0]
    assert similar[4]["together"] == similar[7]["together"] == []


def test_two_constants_do_not_fire_together():
    model = small_model()
    acts = np.full((256, 64, 3), (1.7, 5.3, 0), np.float16)
    acts[::2, :, 2] = 1
    directions = torch.eye(3, model.config.n_code)
    similar = relatives.relatives(model, Site("L1", 1, 3), acts, np.arange(3), directions)
    assert [near["together"] for near in similar] == [[], [], []]

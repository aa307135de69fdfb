"""Every method finds planted concepts and learns from the training split alone."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from planted_vectors import planted

from crate_mini import UserError
from crate_mini.concepts import clvqvae, codebook_checks
from crate_mini.concepts.codebook_checks import adjusted_mutual_information
from crate_mini.concepts.kmeans import nearest, spherical
from crate_mini.concepts.methods import METHODS, discover

TINY = {"layers": 1, "heads": 2, "epochs": 6, "batch": 8}
QUICK = {"clvq": TINY, "vq": TINY, "sae": {"steps": 600, "active": 1}}


def skip_if_missing(name):
    """Skip a method whose package is not installed."""
    if name == "ward":
        pytest.importorskip("sklearn")


@pytest.mark.parametrize("name", METHODS)
def test_two_planted_concepts_are_found_again_and_again(name):
    skip_if_missing(name)
    v, state = planted(), torch.get_rng_state()
    codes, again = (discover(name, v, 2, 0, **QUICK.get(name, {})) for _ in range(2))
    assert adjusted_mutual_information(codes.assignment, v.word) == pytest.approx(1)
    assert np.array_equal(codes.assignment, again.assignment)
    assert np.array_equal(codes.centroids, again.centroids) and codes.health == again.health
    assert codes.method == name and codes.centroids.shape == (2, 8) and codes.settings
    assert codebook_checks.explained_by_codes(v, codes) > 0.9
    assert torch.equal(state, torch.get_rng_state())
    for split in ("train", "stop", "test"):
        assert codes.health[split]["active"] == 2 and 1.8 < codes.health[split]["perplexity"] <= 2


def test_an_sae_with_the_budget_of_one_code_finds_as_many_concepts_as_kmeans():
    v = planted(300, d=48, n_concepts=32)
    budgets = {"kmeans": {}, "sae": {"steps": 1000}, "sae, 8": {"steps": 1000, "active": 8}}
    found = {}
    for name, switches in budgets.items():
        codes = discover(name.split(",")[0], v, 32, **switches)
        found[name] = adjusted_mutual_information(codes.assignment, v.word)
    assert found["kmeans"] > 0.93 and found["sae"] > found["kmeans"] - 0.04
    assert found["sae, 8"] < found["kmeans"] - 0.06  # features that share a word split its concept


@pytest.mark.parametrize("name", ["clvq", "vq"])
def test_codes_are_compared_with_the_clusters_that_they_start_from(name):
    v = planted(150, n_concepts=6, noise=0.8)
    codes = discover(name, v, 6, 1, **{**TINY, "lr": 0.02})
    scale = clvqvae.scales(v, "lower")[0]
    x = torch.from_numpy(v.lower) / scale
    start, _ = nearest(x, spherical(x[torch.from_numpy(v.rows("train"))], 6, 1))
    test = v.rows("test")
    expected = adjusted_mutual_information(codes.assignment[test], start.numpy()[test])
    assert codes.health["ami_start"] == pytest.approx(expected) and expected < 1
    assert "ami_start" not in discover("kmeans", v, 6, 1).health


@pytest.mark.parametrize("name", ["clvq", "vq", "kmeans", "ward"])  # an SAE's bias may hold one
def test_directions_separate_the_planted_concepts(name):
    """A code's own words lie further along its direction than others; removing it ends that."""
    skip_if_missing(name)
    v = planted()
    codes = discover(name, v, 2, 0, **QUICK.get(name, {}))
    u = codes.directions()
    assert np.allclose(np.linalg.norm(u, axis=1), 1, atol=1e-5)
    along = v.lower @ u.T
    for j in (0, 1):
        own = codes.assignment == j
        assert along[own, j].mean() > along[~own, j].mean()
        assert np.allclose((v.lower - along[:, j : j + 1] * u[j]) @ u[j], 0, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_learning_uses_the_training_split_alone(name):
    """Other words elsewhere change nothing; CLVQ-VAEs, though, stop by the stop split."""
    skip_if_missing(name)
    v = planted()
    changed = ~v.rows("train") if name in ("kmeans", "ward", "sae") else v.rows("test")
    lower, upper = (np.where(changed[:, None], 100 * x, x) for x in (v.lower, v.upper))
    other = replace(v, lower=lower, upper=upper)
    codes, codes_of_other = (discover(name, x, 3, 1, **QUICK.get(name, {})) for x in (v, other))
    assert np.array_equal(codes.centroids, codes_of_other.centroids)


def test_switches_reach_the_clvqvae():
    v = planted()
    given = {"memory": "z", "mask": "none", "direction": "members", "revive": True}
    codes = discover("clvq", v, 3, 1, **given, **TINY)
    assert given.items() <= codes.settings.items()
    j = codes.assignment[0]
    members = v.rows("train") & (codes.assignment == j)
    assert np.allclose(codes.centroids[j], v.lower[members].mean(0), atol=1e-5)
    assert len(codes.health["epochs"]) <= TINY["epochs"] and codes.settings["codes"] == 3
    assert discover("vq", v, 2, **TINY).settings["target"] == "lower"


def test_switches_reach_the_sae():
    v = planted()
    encoder, decoder = (
        discover("sae", v, 2, steps=99, direction=name) for name in ("encoder", "decoder")
    )
    assert not np.allclose(encoder.centroids, decoder.centroids)
    assert np.allclose(np.linalg.norm(decoder.centroids, axis=1), 1, atol=1e-5)
    assert decoder.health["explained_lower"] < 1 and 0 <= decoder.health["silent"] < 1


@pytest.mark.parametrize(
    "name, k, switches, message",
    [
        ("kmens", 2, {}, "method 'kmens' is unknown.*did you mean kmeans"),
        ("kmeans", 0, {}, "0 codes cannot"),
        ("kmeans", 10**5, {}, "100000 codes cannot be made of"),
        ("clvq", 10**5, {}, "ask for 1 to"),
        ("sae", 10**5, {}, "training word vectors"),
        ("ward", 10**5, {}, "training word vectors"),
        ("kmeans", 2, {"lr": 1.0}, "no switch 'lr'; it has starts, steps"),
        ("clvq", 2, {"heads": 5}, "do not divide"),
        ("clvq", 2, {"codes": 5}, "no switch 'codes'"),
        ("vq", 2, {"direction": "up"}, "choose code or members"),
        ("sae", 2, {"direction": "up"}, "choose decoder or encoder"),
        ("sae", 2, {"active": 0}, "at least 1"),
        ("sae", 2, {"active": 3}, "active 3 is more than the 2 features"),
    ],
)
def test_bad_input_is_one_sentence(name, k, switches, message):
    with pytest.raises(UserError, match=message) as error:
        discover(name, planted(), k, **switches)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", METHODS)
def test_vectors_that_are_all_the_same_are_refused(name):
    v = planted()
    with pytest.raises(UserError, match="are the same; choose another layer"):
        discover(name, replace(v, lower=np.ones_like(v.lower)), 2)


def test_ward_without_its_package_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        discover("ward", planted(), 2)

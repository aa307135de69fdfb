"""Discoverers behind one call, counts of codebooks, agreement of partitions, the files between."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crate_mini import UserError
from crate_mini.concepts import clvqvae
from crate_mini.concepts import codebook_checks as health
from crate_mini.concepts import kmeans as clusters
from crate_mini.concepts.codebook_checks import adjusted_mutual_information as ami
from crate_mini.concepts.methods import METHODS, discover
from crate_mini.concepts.types import Codes, Vectors

TINY = {"layers": 1, "heads": 2, "epochs": 15, "batch": 8}
QUICK = {"clvq": TINY, "vq": TINY, "sae": {"steps": 1000, "active": 1}}


def planted(S=90, d=8, seed=0, concepts=2, noise=0.1):
    """Vectors whose words are of so many concepts, a direction each beside a large one that all share."""
    r = np.random.default_rng(seed)
    length = r.integers(0, 7, S)
    sentence, N = np.repeat(np.arange(S), length), length.sum()
    concept = r.integers(0, concepts, N)
    basis = np.linalg.qr(r.normal(size=(d, d)))[0]
    x = 3 * basis[0] + 2 * basis[1 + concept] + noise * r.normal(size=(N, d))
    position = np.concatenate([np.arange(n) for n in length])
    split = np.array([0, 0, 0, 1, 2])[np.arange(S) % 5]
    return Vectors(
        x,
        x @ r.normal(size=(d, d)),
        sentence,
        concept,
        position,
        np.arange(S) % 2,
        split,
        [f"word {i}" for i in range(concepts)],
        ["no", "yes"],
        {"seed": seed},
    )


def ready(name):
    """Skip a method whose package is not installed."""
    if name == "ward":
        pytest.importorskip("sklearn")


# ---- discover --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_two_planted_concepts_are_found(name):
    ready(name)
    v, state = planted(), torch.get_rng_state()
    codes, again = (discover(name, v, 2, 0, **QUICK.get(name, {})) for _ in range(2))
    assert ami(codes.assignment, v.word) == pytest.approx(1)
    assert np.array_equal(codes.assignment, again.assignment)
    assert np.array_equal(codes.centroids, again.centroids) and codes.health == again.health
    assert codes.method == name and codes.centroids.shape == (2, 8) and codes.settings
    assert health.explained_by_codes(v, codes) > 0.9
    assert torch.equal(state, torch.get_rng_state())
    for split in ("train", "stop", "test"):
        assert codes.health[split]["active"] == 2 and 1.8 < codes.health[split]["perplexity"] <= 2


@pytest.mark.parametrize(
    "name", [name for name in METHODS if name != "sae"]
)  # its bias may hold one of two
def test_directions_tell_the_planted_concepts_apart(name):
    """A code's own words lie further along its direction than the others'; to remove it takes that away."""
    ready(name)
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
    """Other words elsewhere leave what a method learns as it was; CLVQ-VAEs may stop by the stop split."""
    ready(name)
    v = planted()
    other = ~v.rows("train") if name in ("kmeans", "ward", "sae") else v.rows("test")
    lower, upper = (np.where(other[:, None], 100 * x, x) for x in (v.lower, v.upper))
    changed = replace(v, lower=lower, upper=upper)
    one, two = (discover(name, w, 3, 1, **QUICK.get(name, {})) for w in (v, changed))
    assert np.array_equal(one.centroids, two.centroids)


def test_switches_reach_their_methods():
    v = planted()
    codes = discover(
        "clvq", v, 3, 1, memory="z", mask="none", direction="members", revive=True, **TINY
    )
    given = {"memory": "z", "mask": "none", "direction": "members", "revive": True}
    assert given.items() <= codes.settings.items()
    rows = v.rows("train") & (codes.assignment == codes.assignment[0])
    assert np.allclose(codes.centroids[codes.assignment[0]], v.lower[rows].mean(0), atol=1e-5)
    assert len(codes.health["epochs"]) <= 15 and codes.settings["codes"] == 3
    assert discover("vq", v, 2, **TINY).settings["target"] == "lower"
    encoder, decoder = (
        discover("sae", v, 2, steps=99, direction=d) for d in ("encoder", "decoder")
    )
    assert not np.allclose(encoder.centroids, decoder.centroids)
    assert np.allclose(np.linalg.norm(decoder.centroids, axis=1), 1, atol=1e-5)
    assert decoder.health["explained_lower"] < 1 and 0 <= decoder.health["silent"] < 1


@pytest.mark.parametrize(
    "name, k, switches, words",
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
    ],
)
def test_bad_input_is_one_sentence(name, k, switches, words):
    with pytest.raises(UserError, match=words) as told:
        discover(name, planted(), k, **switches)
    assert "\n" not in str(told.value)


def test_vectors_that_are_all_the_same_are_told():
    v = planted()
    for name in METHODS:
        with pytest.raises(UserError, match="are the same; choose another layer"):
            discover(name, replace(v, lower=np.ones_like(v.lower)), 2)


def test_ward_without_its_package_is_told(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.cluster", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        discover("ward", planted(), 2)


# ---- k-means ---------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_kmeans_of_anything(n, d, k, seed):
    """Centres are the means of their rows, rows are with their nearest; even if fewer differ than asked."""
    x = torch.randint(-2, 3, (n, d), generator=torch.Generator().manual_seed(seed)).float()
    if k > n:
        with pytest.raises(UserError, match="codes cannot be made of"):
            clusters.kmeans(x, k, seed)
        return
    centres, index = clusters.kmeans(x, k, seed)
    brute = (x[:, None] - centres).square().sum(-1)
    assert torch.allclose(brute.gather(1, index[:, None])[:, 0], brute.min(1).values, atol=1e-4)
    for j in index.unique():
        assert torch.allclose(centres[j], x[index == j].mean(0), atol=1e-5)
    assert torch.equal(centres, clusters.kmeans(x, k, seed)[0])


def test_a_centre_without_rows_stays_where_it_was(monkeypatch):
    monkeypatch.setattr(clusters, "seeding", lambda x, k, draw: torch.tensor([[0.0], [99.0]]))
    centres, index = clusters.kmeans(torch.tensor([[1.0], [3.0]]), 2)
    assert centres.tolist() == [[2.0], [99.0]] and index.tolist() == [0, 0]


def test_distances_keep_their_digits_beside_a_large_shared_part():
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)) + 1000
    exact = (x.double()[:, None] - x.double()[:7]).square().sum(-1)
    assert torch.allclose(clusters.distances(x, x[:7]).double(), exact, rtol=1e-3, atol=1e-2)


def test_nearest_in_pieces_is_nearest_at_once(monkeypatch):
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    whole = clusters.nearest(x, x[:9])
    monkeypatch.setattr(clusters, "CELLS", 20)
    pieces = clusters.nearest(x, x[:9])
    assert torch.equal(whole[0], pieces[0]) and torch.allclose(whole[1], pieces[1], atol=1e-5)


def test_spherical_centres_have_their_members_direction_and_norm():
    """Two directions, lengths 1 to 3 and 10: by direction, not by length; zero words do not count."""
    x = torch.tensor([[1.0, 0], [3, 0], [0, 10], [0, 0]])
    found = clusters.spherical(x, 2, 0)
    assert torch.allclose(
        found[found[:, 0].argsort()], torch.tensor([[0.0, 10], [2, 0]]), atol=1e-5
    )
    with pytest.raises(UserError, match="4 codes cannot be made of 3"):
        clusters.spherical(x, 4, 0)


def test_seeding_prefers_what_is_far():
    """Of 99 rows at one place and one far away, the far one is always the second."""
    x = torch.zeros(100, 3)
    x[37] = 9.0
    for seed in range(10):
        assert clusters.seeding(x, 2, torch.Generator().manual_seed(seed)).sum() == 27


# ---- counts and agreement --------------------------------------------------------------------------------


def test_usage_by_hand():
    found = clusters.usage(torch.tensor([0, 0, 1, 1]), torch.tensor([[2.0, 0], [0, 5], [1, 1]]))
    assert found == {
        "perplexity": pytest.approx(2),
        "active": 2,
        "largest": 0.5,
        "cosine": pytest.approx(0),
    }
    found = clusters.usage(torch.tensor([0, 1, 1, 2]), torch.tensor([[1.0, 0], [1, 0], [0, 1]]))
    assert found["cosine"] == pytest.approx(1 / 3) and found["largest"] == 0.5
    assert found["perplexity"] == pytest.approx(2**1.5)
    assert clusters.usage(torch.tensor([1, 1]), torch.eye(2))["cosine"] is None


def test_agreement_by_hand():
    """Two and two: of the three ways to pair four words one has MI log 2, two have 0, so E = log 2 / 3."""
    assert health.expected_information(np.array([2, 2]), np.array([2, 2])) == pytest.approx(
        math.log(2) / 3
    )
    assert ami([0, 0, 1, 1], [5, 5, 3, 3]) == pytest.approx(1)
    assert ami([0, 0, 1, 1], [0, 1, 0, 1]) == pytest.approx(-0.5)
    assert ami([0, 0, 0], [1, 1, 1]) == 1 and ami([0, 1, 2], [2, 0, 1]) == 1
    assert ami([0, 0, 1, 1], [0, 0, 0, 0]) == pytest.approx(0)


LABELS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40)


@given(LABELS)
def test_agreement_is_symmetric_and_knows_no_names(pairs):
    a, b = (np.array(side) for side in zip(*pairs))
    assert ami(a, b) == pytest.approx(ami(b, a), abs=1e-9)
    assert ami(a, b) == pytest.approx(ami(7 - a, b), abs=1e-9) and ami(a, b) <= 1 + 1e-9
    assert ami(a, a) == pytest.approx(1)


@given(LABELS)
def test_agreement_is_that_of_scikit_learn(pairs):
    metrics = pytest.importorskip("sklearn.metrics")
    a, b = (np.array(side) for side in zip(*pairs))
    assert ami(a, b) == pytest.approx(metrics.adjusted_mutual_info_score(a, b), abs=1e-6)


def test_chance_is_what_dealing_at_random_gives():
    r = np.random.default_rng(0)
    a, b = r.integers(0, 5, 60), r.zipf(2, 60) % 4

    def information(b):
        p = np.array([[np.mean((a == i) & (b == j)) for j in range(4)] for i in range(5)])
        return np.nansum(
            np.where(p > 0, p * np.log(p / p.sum(1, keepdims=True) / p.sum(0) + 1e-300), 0)
        )

    with np.errstate(divide="ignore", invalid="ignore"):
        dealt = [information(r.permutation(b)) for _ in range(2000)]
    found = health.expected_information(*(np.unique(x, return_counts=True)[1] for x in (a, b)))
    assert found == pytest.approx(np.mean(dealt), abs=5 * np.std(dealt) / 2000**0.5)


def test_stability_of_runs():
    one, two = (
        Codes("kmeans", i, x, np.eye(2)) for i, x in enumerate(([0, 0, 1, 1], [0, 1, 0, 1]))
    )
    assert health.stability([one, one, two]) == {
        "pairs": pytest.approx([1, -0.5, -0.5]),
        "mean": pytest.approx(0),
    }
    assert health.stability([one, two], np.array([True, False, False, True]))["mean"] == 1
    assert health.stability([one])["mean"] is None


# ---- reconstruction --------------------------------------------------------------------------------------


def test_explained_by_codes_equals_brute_force():
    v = planted(noise=0.5)
    codes = Codes("kmeans", 0, np.arange(len(v.word)) % 3, np.eye(4, 8))
    train, test = v.rows("train"), v.rows("test")
    mean = v.upper[train].mean(0)
    guess = np.stack([v.upper[train & (codes.assignment == j)].mean(0) for j in range(3)])[
        codes.assignment
    ]
    want = 1 - ((v.upper - guess)[test] ** 2).sum() / ((v.upper - mean)[test] ** 2).sum()
    assert health.explained_by_codes(v, codes) == pytest.approx(want, abs=1e-5)
    only = Codes("kmeans", 0, np.where(train, 0, 3), np.eye(4, 8))  # a code no training word has
    assert health.explained_by_codes(v, only) == pytest.approx(0, abs=1e-6)


def test_ridge_finds_a_linear_map_and_no_more():
    v = planted(noise=0.5)
    assert health.ridge(v)[0] > 0.999
    noise = np.random.default_rng(0).normal(size=v.upper.shape)
    assert health.ridge(replace(v, upper=noise))[0] < 0.1


def test_reconstruction_beside_its_controls():
    """Where a word's concept is all there is: codes suffice, shuffled ones spoil, means know nothing."""
    v = planted(noise=0.05)
    settings = clvqvae.Settings(codes=2, dropout=0.0, **{**TINY, "epochs": 25, "lr": 3e-3})
    found = health.reconstruction(v, settings)
    assert list(found) == list(health.ROWS)
    assert found["mean"] == pytest.approx(0, abs=1e-6) and found["ridge"] > 0.99
    for name in ("codes", "codes, memory z", "no codes", "k-means codes"):
        assert found[name] > 0.9, name
    assert found["codes, shuffled"] < 0.5 and found["memory only"] < found["codes"]
    assert list(health.reconstruction(v, settings, rows=("mean", "ridge"))) == ["mean", "ridge"]


# ---- files -----------------------------------------------------------------------------------------------


def test_files_give_back_what_was_saved(tmp_path):
    v, path = planted(), tmp_path / "v.npz"
    v.save(path)
    again = Vectors.load(path)
    for f in fields(Vectors):
        assert np.array_equal(getattr(v, f.name), getattr(again, f.name)), f.name
        assert type(getattr(v, f.name)) is type(getattr(again, f.name))
    codes = discover("kmeans", v, 2)
    codes.save(path)
    again = Codes.load(path)
    assert np.array_equal(codes.assignment, again.assignment) and codes.health == again.health
    assert np.array_equal(codes.centroids, again.centroids) and codes.settings == again.settings


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda p: p.unlink(), "Cannot read"),
        (lambda p: p.write_bytes(b"PK rubbish"), "is damaged"),
        (lambda p: p.write_bytes(p.read_bytes()[:-300]), "is damaged"),
        (lambda p: p.write_bytes(b""), "is damaged"),
        (
            lambda p: Codes("kmeans", 0, [0], np.eye(1)).save(p),
            "holds codes of schema 1, expected vectors",
        ),
        (lambda p: np.savez(p, a=np.ones(3)), "is damaged or holds no vectors"),
    ],
)
def test_damaged_files_are_told(harm, words, tmp_path):
    path = tmp_path / "v.npz"
    planted().save(path)
    harm(path)
    with pytest.raises(UserError, match=words) as told:
        Vectors.load(path)
    assert "\n" not in str(told.value) and "CKPT --from vectors`" in str(told.value)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"word": [9] * 3}, "are not there"),
        ({"sentence": [0, 2, 1]}, "are not there"),
        ({"sentence": [0, 1, 9]}, "are not there"),
        ({"split": [0, 1, 3]}, "are not there"),
        ({"position": [0]}, "do not fit"),
        ({"split": [0]}, "do not fit"),
        ({"upper": np.ones(3)}, "do not fit"),
        ({"lower": np.full((3, 2), np.nan)}, "not all finite"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(changes, words):
    good = Vectors(
        np.ones((3, 2)),
        np.ones((3, 4)),
        [0, 1, 1],
        [0, 0, 1],
        [0, 0, 1],
        [0, 1, 0],
        [0, 1, 2],
        ["a", "b"],
    )
    assert good.rows("stop").tolist() == [False, True, True]
    with pytest.raises(UserError, match=words):
        replace(good, **changes)
    with pytest.raises(UserError, match="name more than the 2"):
        Codes("kmeans", 0, [0, 2], np.eye(2))

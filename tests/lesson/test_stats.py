"""Statistics against NumPy and brute force: invariances, missing numbers, intervals that cover."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulations import SEEDS, pair, plain_ranks

from crate_mini import stats
from crate_mini.neurons.ranks import ranks, spearman

MAPS = st.tuples(st.floats(1e-3, 1e3), st.floats(-100, 100))  # x -> slope x + offset

# ---- correlation ---------------------------------------------------------------------------------


@given(SEEDS, st.integers(2, 80), st.booleans())
def test_pearson_equals_numpy(seed, n, sparse):
    x, y = pair(seed, n, 4, sparse)
    r, reasons = stats.pearson(x, y)
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(x.T, y.T)]
    np.testing.assert_allclose(r, expected, atol=1e-12)
    assert not any(reasons)


@given(SEEDS, MAPS, MAPS)
def test_correlations_ignore_positive_affine_maps_and_the_sign_flips(seed, f, g):
    x, y = pair(seed, sparse=False)
    for statistic in (stats.pearson, spearman):
        r = statistic(x, y)[0]
        mapped = statistic(f[0] * x + f[1], g[0] * y + g[1])[0]
        np.testing.assert_allclose(mapped, r, atol=1e-9)
        np.testing.assert_allclose(statistic(x, -y)[0], -r, atol=1e-12)
        np.testing.assert_allclose(statistic(y, x)[0], r, atol=1e-12)


@given(SEEDS)
def test_pearson_ignores_a_shift_and_the_order_of_tokens(seed):
    x, y = pair(seed)
    r = stats.pearson(x, y)[0]
    x += 1e4  # which naive sums would feel
    np.testing.assert_allclose(stats.pearson(x, y)[0], r, atol=1e-10)
    order = np.random.default_rng(seed).permutation(len(x))
    for statistic in (stats.pearson, spearman):
        np.testing.assert_allclose(statistic(x[order], y[order])[0], statistic(x, y)[0], atol=1e-10)


@given(st.lists(st.tuples(st.integers(-2, 3), st.integers(0, 4)), min_size=2, max_size=40))
def test_spearman_is_pearson_of_plain_average_ranks(pairs):
    x, y = np.array(pairs, float).T
    np.testing.assert_array_equal(ranks(x)[:, 0], plain_ranks(x))
    rho, reasons = spearman(x, y)
    if len(set(x)) > 1 and len(set(y)) > 1:
        expected = np.corrcoef(plain_ranks(x), plain_ranks(y))[0, 1]
        assert rho[0] == pytest.approx(expected, abs=1e-12)
    else:
        assert np.isnan(rho[0]) and "constant" in reasons[0]


def test_shuffled_simulations_average_to_nothing():
    x, y = pair(7, n=400, h=1, noise=0.1)
    rng = np.random.default_rng(0)
    for statistic in (stats.pearson, spearman):
        shuffled = np.stack([rng.permutation(y[:, 0]) for _ in range(400)], 1)
        r = statistic(np.repeat(x, 400, 1), shuffled)[0]
        assert abs(r.mean()) < 3 * r.std(ddof=1) / 20
        assert statistic(x, y)[0][0] > 0.5


@pytest.mark.parametrize("statistic", [stats.pearson, spearman])
def test_a_reason_for_every_number_that_is_missing(statistic):
    x, y = pair(1, h=6)
    x[:, 1] = 2.5
    y[:, 2] = 0.1
    x[3, 3] = np.nan
    y[3, 4] = np.inf
    x[:, 5] = 1e9 + 1e-7 * np.arange(len(x))  # rounding, not variation; ranks do vary
    values, reasons = statistic(x, y)
    missing = [False, True, True, True, True, statistic is stats.pearson]
    assert np.isnan(values).tolist() == missing
    assert reasons[:5].tolist() == [
        "",
        "true activations are constant",
        "simulated activations are constant",
        "true activations are not finite",
        "simulated activations are not finite",
    ]
    assert stats.pearson(x[:1], y[:1])[1].tolist() == ["fewer than two tokens"] * 6


# ---- intervals -----------------------------------------------------------------------------------


DRAWS_OF = {  # values of documents, and their mean
    "normal": (lambda rng, shape: rng.normal(size=shape), 0.0),
    "skewed": (lambda rng, shape: rng.exponential(size=shape), 1.0),
    "heavy": (lambda rng, shape: rng.standard_t(3, shape), 0.0),
    "answers": (
        lambda rng, shape: (rng.random(shape) < 0.3) - 1.0 * (rng.random(shape) < 0.1),
        0.2,
    ),
}


def coverage(name, n, repetitions=1000):
    """How often intervals of the mean of n values hold the truth."""
    draw, mean = DRAWS_OF[name]
    values = draw(np.random.default_rng(n), (n, repetitions))
    low, high = stats.bootstrap_interval([values], 400)
    return ((low <= mean) & (mean <= high)).mean()


@pytest.mark.parametrize("n", [8, 20, 100])
@pytest.mark.parametrize("name", list(DRAWS_OF))
def test_the_interval_holds_the_mean_as_often_as_it_says(name, n):
    assert 0.90 <= coverage(name, n) < 0.985


def test_the_interval_of_group_means_and_of_their_difference():
    rng = np.random.default_rng(0)
    groups = [rng.exponential(size=(60, 500)), 2 + rng.normal(size=(9, 500))]
    for weights, truth in ((None, 1.5), ([1, -1], -1.0)):
        low, high = stats.bootstrap_interval(groups, 400, weights=weights)
        assert 0.92 < ((low < truth) & (truth < high)).mean() < 0.98
    assert stats.bootstrap_interval([[1.0]]) is None
    assert stats.bootstrap_interval([[1.0, 2.0], [1.0]]) is None
    low, high = stats.bootstrap_interval([[1.0, 2.0]])  # two values suffice
    assert low < 1.5 < high
    assert stats.bootstrap_interval([]) is None
    assert stats.bootstrap_interval([[1.0, 1.0, 1.0]]) == [1.0, 1.0]


def test_a_planted_fault_of_the_interval_is_noticed(monkeypatch):
    """90 % for 95 %, and the percentiles of the redrawn means, which are too narrow if few."""
    pooled = np.mean([coverage(name, n) for name in ("normal", "skewed") for n in (20, 100)])
    assert pooled > 0.935
    rng = np.random.default_rng(8)
    values = rng.normal(size=(8, 1000))
    means = values[rng.integers(8, size=(400, 8))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975), axis=0)
    assert ((low <= 0) & (0 <= high)).mean() < 0.90
    quantile = np.quantile
    monkeypatch.setattr(np, "quantile", lambda values, q, axis: quantile(values, q - 0.05, axis))
    pooled = np.mean([coverage(name, n) for name in ("normal", "skewed") for n in (20, 100)])
    assert pooled < 0.91


def test_columns_have_the_intervals_that_they_have_alone():
    values = np.random.default_rng(0).normal(size=(12, 3))
    together = stats.bootstrap_interval([values], seed=4)
    for j in range(3):
        alone = stats.bootstrap_interval([values[:, j]], seed=4)
        np.testing.assert_allclose(together[:, j], alone, rtol=1e-12)


def test_the_interval_depends_on_its_seed_alone():
    values = [np.arange(20.0)]
    interval = stats.bootstrap_interval(values, seed=1)
    assert interval == stats.bootstrap_interval(values, seed=1)
    assert interval != stats.bootstrap_interval(values, seed=2)


@pytest.mark.parametrize("share, n", [(0.5, 20), (0.9, 60), (0.72, 200)])
def test_wilsons_interval_holds_the_share_as_often_as_it_says(share, n):
    drawn = np.random.default_rng(n).binomial(n, share, 2000)
    intervals = np.array([stats.wilson(int(successes), n) for successes in drawn])
    assert 0.93 <= ((intervals[:, 0] <= share) & (share <= intervals[:, 1])).mean() <= 0.98


def test_pseudo_values_of_a_mean_are_the_values_and_of_a_ratio_have_its_error():
    rng = np.random.default_rng(0)
    x = rng.normal(size=12)
    counts = np.ones(12)
    np.testing.assert_allclose(stats.pseudo_values(lambda s: s[0] / s[1], np.stack([x, counts])), x)
    errors, ratios = [], []
    for _ in range(500):
        n = rng.integers(1, 9, 30)
        values = stats.pseudo_values(lambda s: s[0] / s[1], np.stack([rng.normal(3 * n, n), n]))
        errors.append(values.std(ddof=1) / 30**0.5)
        ratios.append(values.mean())
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.15)

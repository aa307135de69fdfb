"""Metrics against NumPy and brute force: their invariances, what is missing, intervals that cover."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulations import SEEDS, pair, plain_ranks

from crate_mini import stats as metrics


def brute_auprc(fires, y):
    """Average precision over every distinct threshold, from the strictest on."""
    total, before = 0.0, 0.0
    for t in sorted(set(y), reverse=True):
        said = y >= t
        recall = (fires & said).sum() / fires.sum()
        total, before = total + (recall - before) * (fires & said).sum() / said.sum(), recall
    return total


def brute_f1(fires, y):
    """F1 at the distinct threshold that passes nearest to as many as fire, the looser of two."""
    said = min((y >= t for t in sorted(set(y))), key=lambda s: abs(int(s.sum()) - int(fires.sum())))
    hit = (fires & said).sum()
    precision, recall = hit / said.sum(), hit / fires.sum()
    return 2 * precision * recall / (precision + recall) if hit else 0.0


# ---- correlation -----------------------------------------------------------------------------------------


@given(SEEDS, st.integers(2, 80), st.booleans())
def test_pearson_equals_numpy(seed, n, sparse):
    x, y = pair(seed, n, 4, sparse)
    got, why = metrics.pearson(x, y)
    want = [np.corrcoef(a, b)[0, 1] for a, b in zip(x.T, y.T)]
    np.testing.assert_allclose(got, want, atol=1e-12)
    assert not any(why)


MAPS = st.tuples(st.floats(1e-3, 1e3), st.floats(-100, 100))


@given(SEEDS, MAPS, MAPS)
def test_correlations_ignore_positive_affine_maps_and_the_sign_flips(seed, f, g):
    x, y = pair(seed, sparse=False)
    for statistic in (metrics.pearson, metrics.spearman):
        r = statistic(x, y)[0]
        np.testing.assert_allclose(statistic(f[0] * x + f[1], g[0] * y + g[1])[0], r, atol=1e-9)
        np.testing.assert_allclose(statistic(x, -y)[0], -r, atol=1e-12)
        np.testing.assert_allclose(statistic(y, x)[0], r, atol=1e-12)


@given(SEEDS, st.lists(st.integers(0, 60), max_size=5))
def test_pearson_ignores_how_its_tokens_are_split_and_ordered(seed, cuts):
    x, y = pair(seed)
    x += 1e4  # a shift that naive sums would feel
    whole = metrics.pearson(x, y)[0]
    stream = metrics.Pearson(3)
    for a, b in zip(np.split(x, sorted(cuts)), np.split(y, sorted(cuts))):
        stream.add(a, b)
    np.testing.assert_allclose(stream.result()[0], whole, atol=1e-10)
    order = np.random.default_rng(seed).permutation(len(x))
    for statistic in (metrics.pearson, metrics.spearman):
        np.testing.assert_allclose(statistic(x[order], y[order])[0], statistic(x, y)[0], atol=1e-10)


@given(st.lists(st.tuples(st.integers(-2, 3), st.integers(0, 4)), min_size=2, max_size=40))
def test_spearman_is_pearson_of_plain_average_ranks(pairs):
    x, y = np.array(pairs, float).T
    np.testing.assert_array_equal(metrics.ranks(x)[:, 0], plain_ranks(x))
    got, why = metrics.spearman(x, y)
    if len(set(x)) > 1 and len(set(y)) > 1:
        assert got[0] == pytest.approx(np.corrcoef(plain_ranks(x), plain_ranks(y))[0, 1], abs=1e-12)
    else:
        assert np.isnan(got[0]) and "constant" in why[0]


def test_shuffled_simulations_average_to_nothing():
    x, y = pair(7, n=400, h=1, noise=0.1)
    rng = np.random.default_rng(0)
    for statistic in (metrics.pearson, metrics.spearman):
        shuffled = np.stack([rng.permutation(y[:, 0]) for _ in range(400)], 1)
        r = statistic(np.repeat(x, 400, 1), shuffled)[0]
        assert abs(r.mean()) < 3 * r.std(ddof=1) / 20
        assert statistic(x, y)[0][0] > 0.5


@pytest.mark.parametrize("statistic", [metrics.pearson, metrics.spearman])
def test_a_reason_for_every_number_that_is_missing(statistic):
    x, y = pair(1, h=6)
    x[:, 1], y[:, 2], x[3, 3], y[3, 4] = 2.5, 0.1, np.nan, np.inf
    x[:, 5] = 1e9 + 1e-7 * np.arange(len(x))  # rounding, not variation
    got, why = statistic(x, y)
    assert np.isnan(got).tolist() == [False, True, True, True, True, statistic is metrics.pearson]
    assert why[0] == "" and why[1] == "true activations are constant"
    assert why[2] == "simulated activations are constant"
    assert (
        why[3] == "true activations are not finite"
        and why[4] == "simulated activations are not finite"
    )
    assert metrics.pearson(x[:1], y[:1])[1].tolist() == ["fewer than two tokens"] * 6


# ---- firing ----------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2, max_size=40))
def test_firing_equals_brute_force(pairs):
    fires, y = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs], float)
    found = metrics.firing(fires, y)
    for name, brute in (("f1", brute_f1), ("auprc", brute_auprc)):
        value, why = found[name]
        if fires.any() and not fires.all():
            assert value[0] == pytest.approx(brute(fires, y), abs=1e-12) and why[0] == ""
        else:
            assert np.isnan(value[0]) and why[0].startswith("fires on")


@given(SEEDS, MAPS)
def test_firing_ignores_order_and_increasing_maps(seed, f):
    x, y = pair(seed)
    order = np.random.default_rng(seed).permutation(len(x))
    for name, (value, _) in metrics.firing(x, y).items():
        moved = metrics.firing(x[order], f[0] * y[order] + f[1])[name][0]
        np.testing.assert_allclose(moved, value, atol=1e-12)
        assert metrics.firing(x, x)[name][0] == pytest.approx(1)


def test_detection():
    assert metrics.balanced_accuracy([1, 1, 0, 0], [1, 1, 0, 0]) == (1.0, None)
    assert metrics.balanced_accuracy([1] * 2 + [0] * 8, [0] * 10) == (
        0.5,
        None,
    )  # "none" gains nothing
    value, why = metrics.balanced_accuracy([1, 1, 0, 0], [1, None, 0, 1])
    assert value == 0.75 and why == "1 of 4 answers missing and left out"
    assert metrics.balanced_accuracy([1, 0], [1, None])[0] is None
    assert metrics.balanced_accuracy([1, 0], [1, None])[1].startswith("failed")
    assert metrics.balanced_accuracy([1, 1], [1, 1])[0] is None


# ---- quantiser and expectation ---------------------------------------------------------------------------

ACTS = st.lists(st.floats(-10, 1e6, allow_subnormal=False), min_size=1, max_size=30).map(np.array)


@given(ACTS, st.integers(-20, 20))
def test_quantiser(acts, power):
    got = metrics.quantise(acts)
    assert got.dtype == np.int64 and got.min() >= 0 and got.max() <= 10
    if acts.max() > 0:
        assert (got[acts == acts.max()] == 10).all()
        np.testing.assert_array_equal(got[np.argsort(acts)], np.sort(got))  # monotone
        np.testing.assert_array_equal(metrics.quantise(acts * 2.0**power), got)
        assert (metrics.quantise(acts, highest=9) == np.minimum(metrics.quantise(acts), 9)).all()
    else:
        assert not got.any()


def test_quantiser_rounds_down_and_reaches_ten():
    assert metrics.quantise([0, 0.05, 0.19, 0.2, 1]).tolist() == [0, 0, 1, 2, 10]
    assert metrics.quantise([1, 4], top=2).tolist() == [5, 10]
    assert metrics.quantise([-3, 1]).tolist() == [0, 10] and metrics.quantise(
        [-3, -1]
    ).tolist() == [0, 0]
    for value in np.random.default_rng(0).uniform(0, 100, 500):  # 10 * v / v is not always 10
        assert metrics.quantise([value]).tolist() == [10]


@given(
    st.dictionaries(
        st.sampled_from([*map(str, range(11)), "11", "x", "٣", " 4", "1 0"]),
        st.floats(-1000, 0),
        max_size=9,
    ),
    st.floats(-200, 200),
)
def test_expected_activation(logprobs, shift):
    value = metrics.expected(logprobs)
    known = {t: p for t, p in logprobs.items() if t in metrics.NUMBERS}
    if not known:
        assert value is None
    else:
        assert (
            min(map(int, known)) - 1e-9 <= value <= max(map(int, known)) + 1e-9 and 0 <= value <= 10
        )
        assert metrics.expected({t: p + shift for t, p in known.items()}) == pytest.approx(
            value, abs=1e-6
        )


# ---- intervals ------------------------------------------------------------------------------------------


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng, inside = np.random.default_rng(0), 0
    for seed in range(300):
        low, high = metrics.interval([rng.exponential(size=60), 2 + rng.normal(size=40)], 300, seed)
        inside += low < 1.5 < high
    assert 0.90 < inside / 300 < 0.98
    assert metrics.interval([[1.0]]) is None and metrics.interval([]) is None


def test_the_interval_depends_on_its_seed_alone():
    values = [np.arange(20.0)]
    assert metrics.interval(values, seed=1) == metrics.interval(values, seed=1)
    assert metrics.interval(values, seed=1) != metrics.interval(values, seed=2)


def test_windows_redrawn_cover_the_truth():
    """Tokens of a window share a topic: redrawing tokens would claim too much, redrawing windows does not."""
    rng, inside = np.random.default_rng(0), 0
    shared, own = rng.normal(size=(2, 100, 60, 1)), rng.normal(size=(2, 100, 60, 16))
    x = shared[0] + own[0]
    y = 0.5 * (shared[0] + own[0]) + shared[1] + own[1]  # r = 0.5 / sqrt(1.25)
    for i in range(100):
        low, high = metrics.excerpt_intervals(x[i, ..., None], y[i, ..., None], 200, i)[0]
        inside += low < 0.5 / 1.25**0.5 < high
    assert inside >= 85
    assert np.isnan(metrics.excerpt_intervals(np.zeros((5, 4, 1)), np.ones((5, 4, 1)))).all()

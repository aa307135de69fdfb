"""Metrics of neuron scores against brute force; levels 0 to 10."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulations import SEEDS, pair

from crate_mini.neurons import metrics

MAPS = st.tuples(st.floats(1e-3, 1e3), st.floats(-100, 100))  # x -> slope x + offset

# ---- firing --------------------------------------------------------------------------------------


def brute_auprc(fires, y):
    """Average precision over every distinct threshold, from the strictest on."""
    total, recall_before = 0.0, 0.0
    for threshold in sorted(set(y), reverse=True):
        passes = y >= threshold
        hits = (fires & passes).sum()
        recall = hits / fires.sum()
        total += (recall - recall_before) * hits / passes.sum()
        recall_before = recall
    return total


def brute_f1(fires, y):
    """F1 at the threshold that passes nearest to as many as fire, the looser of two."""

    def distance(threshold):
        return abs(int((y >= threshold).sum()) - int(fires.sum()))

    passes = y >= min(sorted(set(y)), key=distance)
    hits = (fires & passes).sum()
    if not hits:
        return 0.0
    precision, recall = hits / passes.sum(), hits / fires.sum()
    return 2 * precision * recall / (precision + recall)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2, max_size=40))
def test_firing_equals_brute_force(pairs):
    fires = np.array([fires for fires, _ in pairs])
    y = np.array([y for _, y in pairs], float)
    scores = metrics.firing(fires, y)
    for name, brute in (("f1", brute_f1), ("auprc", brute_auprc)):
        value, reason = scores[name]
        if fires.any() and not fires.all():
            assert value[0] == pytest.approx(brute(fires, y), abs=1e-12) and reason[0] == ""
        else:
            assert np.isnan(value[0]) and reason[0].startswith("fires on")


@given(SEEDS, MAPS)
def test_firing_ignores_order_and_increasing_maps(seed, f):
    x, y = pair(seed)
    order = np.random.default_rng(seed).permutation(len(x))
    scores = metrics.firing(x, y)
    mapped = metrics.firing(x[order], f[0] * y[order] + f[1])
    perfect = metrics.firing(x, x)
    for name in scores:
        np.testing.assert_allclose(mapped[name][0], scores[name][0], atol=1e-12)
    for name in ("f1", "auprc"):
        assert perfect[name][0] == pytest.approx(1)


def test_a_neuron_fires_from_a_tenth_of_its_maximum():
    acts = np.array([[-3, 0, 0.099, 0.1, 1], [0, 0, 0, 0, 0], [5, 5, 5, 5, 50]]).T
    fires = metrics.fires(acts, acts.max(0)).T
    assert fires[0].tolist() == [False, False, False, True, True]
    assert not fires[1].any()
    assert fires[2].all()
    levels = metrics.quantise(acts[:, 0])
    assert ((levels > 0) == fires[0]).all()  # where a language model is shown more than a 0


def test_detection():
    assert metrics.balanced_accuracy([1, 1, 0, 0], [1, 1, 0, 0]) == (1.0, None)
    never = metrics.balanced_accuracy([1] * 2 + [0] * 8, [0] * 10)
    assert never == (0.5, None)  # answering "none" gains nothing
    value, reason = metrics.balanced_accuracy([1, 1, 0, 0], [1, None, 0, 1])
    assert value == 0.75 and reason == "1 of 4 answers missing and left out"
    value, reason = metrics.balanced_accuracy([1, 0], [1, None])
    assert value is None and reason.startswith("failed")
    assert metrics.balanced_accuracy([1, 1], [1, 1])[0] is None


# ---- levels 0 to 10 ------------------------------------------------------------------------------

ACTS = st.lists(st.floats(-10, 1e6, allow_subnormal=False), min_size=1, max_size=30).map(np.array)


@given(ACTS, st.integers(-20, 20))
def test_quantised_activations(acts, power):
    levels = metrics.quantise(acts)
    assert levels.dtype == np.int64 and levels.min() >= 0 and levels.max() <= 10
    if acts.max() > 0:
        assert (levels[acts == acts.max()] == 10).all()
        np.testing.assert_array_equal(levels[np.argsort(acts)], np.sort(levels))  # monotone
        np.testing.assert_array_equal(metrics.quantise(acts * 2.0**power), levels)
        assert (metrics.quantise(acts, highest=9) == np.minimum(levels, 9)).all()
    else:
        assert not levels.any()


def test_quantising_rounds_down_and_reaches_ten():
    assert metrics.quantise([0, 0.05, 0.19, 0.2, 1]).tolist() == [0, 0, 1, 2, 10]
    assert metrics.quantise([1, 4], top=2).tolist() == [5, 10]
    assert metrics.quantise([-3, 1]).tolist() == [0, 10]
    assert metrics.quantise([-3, -1]).tolist() == [0, 0]
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
    levels = {text: logprob for text, logprob in logprobs.items() if text in metrics.LEVELS}
    if not levels:
        assert value is None
        return
    numbers = [int(text) for text in levels]
    assert min(numbers) - 1e-9 <= value <= max(numbers) + 1e-9
    assert 0 <= value <= 10
    shifted = {text: logprob + shift for text, logprob in levels.items()}
    assert metrics.expected(shifted) == pytest.approx(value, abs=1e-6)

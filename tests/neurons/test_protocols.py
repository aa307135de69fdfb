"""Protocols, with two checks that every metric must pass; rows of scores."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_rows import made_up_rows
from simulations import SEEDS, pair, plain_ranks

from crate_mini.neurons.protocols import (
    PROTOCOLS,
    flat_scores,
    score_excerpts,
    score_uniform,
)

# ---- NeuronEval's two checks ---------------------------------------------------------------------


def every_metric(true, simulated, windows=slice(None), origin=None):
    """{metric: score} of one neuron, true and simulated (W, T).

    windows: those that serve as excerpts of every protocol; origin: theirs.
    """
    uniform = score_uniform(true[..., None], simulated[..., None], [true.max()])
    scores = {name: uniform[name][0][0] for name in ("r", "f1", "auprc")}
    tokens = np.ones((len(true), true.shape[1] + 1), int)
    excerpts = SimpleNamespace(
        tokens=tokens[windows], acts=true[windows], origin=origin or ["random"] * len(true)
    )
    for name in PROTOCOLS:
        scores[name] = score_excerpts(name, excerpts, simulated[windows])[0]
    return scores


@given(SEEDS, st.floats(0.02, 0.2))
def test_losing_or_inventing_half_of_the_firings_lowers_every_metric(seed, share):
    """On uniform windows, for a neuron explained perfectly (Oikarinen, Yan & Weng 2025)."""
    rng = np.random.default_rng(seed)
    true = (rng.random((40, 64)) < share) * rng.uniform(1, 2, (40, 64))
    fires = np.flatnonzero(true > 0)
    silent = np.flatnonzero(true.ravel() == 0)
    perfect = (true > 0).astype(float)
    fewer, more = perfect.ravel().copy(), perfect.ravel().copy()
    fewer[rng.choice(fires, len(fires) // 2, replace=False)] = 0
    more[rng.choice(silent, len(fires), replace=False)] = 1
    best = every_metric(true, perfect)
    for worse in (fewer, more):
        for name, score in every_metric(true, worse.reshape(true.shape)).items():
            assert score < best[name] - 0.05, name


def test_top_and_random_hardly_notices_invented_firings():
    """Why openai_tar is not the headline: its 10 excerpts miss most invented firings."""
    rng = np.random.default_rng(0)
    falls = {"r": [], "openai_tar": []}
    for _ in range(40):
        true = (rng.random((400, 64)) < 0.002).astype(float)
        more = np.maximum(true, rng.random(true.shape) < 0.002)
        top = np.argsort(-true.max(1), kind="stable")[:5]
        windows, origin = np.r_[top, rng.choice(400, 5)], ["top"] * 5 + ["random"] * 5
        best = every_metric(true, true, windows, origin)
        worse = every_metric(true, more, windows, origin)
        for name in falls:
            falls[name].append(best[name] - worse[name])
    tar = np.array(falls["openai_tar"])
    assert np.mean(tar) < np.mean(falls["r"])
    assert np.mean(tar < 0.05) > 0.2 and min(falls["r"]) > 0.1


# ---- the ceiling ---------------------------------------------------------------------------------


@given(SEEDS, st.sampled_from([0.003, 0.03, 0.3]), st.sampled_from([1e-6, 1e-4]))
def test_a_truth_off_by_a_millionth_scores_1_in_every_metric_at_every_density(seed, share, error):
    rng = np.random.default_rng(seed)
    true = (rng.random((60, 64)) < share) * rng.uniform(0.05, 1, (60, 64))
    true[0, 0] = 1
    noisy = true + error * rng.random(true.shape)
    for name, score in every_metric(true, noisy).items():
        assert score > 0.98, name


@given(SEEDS)
def test_anthropic_2023_asks_for_levels_of_both_sides_on_their_own_scale(seed):
    """A shrunk table, or a model's answers from 0 to 10, lose nothing against the activations."""
    rng = np.random.default_rng(seed)
    acts = np.where(rng.random((60, 8)) < 0.09, rng.integers(3, 10, (60, 8)), 0).astype(float)
    tokens, origin = np.ones((60, 9), int), ["top"] * 60
    excerpts = SimpleNamespace(tokens=tokens, acts=acts, origin=origin)
    score, _ = score_excerpts("anthropic_2023", excerpts, 0.001 + 0.4 * acts)
    assert score == pytest.approx(1, abs=0.01)
    unreadable = np.where(np.arange(60)[:, None] == 3, np.inf, acts)
    reason = "simulated activations are not finite"
    assert score_excerpts("anthropic_2023", excerpts, unreadable) == (None, reason)


def test_firing_is_not_any_positive_value():
    """1 % of noise must not decide whether a neuron fires; f1 was 0.68 with r = 0.9994."""
    rng = np.random.default_rng(0)
    clean = (rng.random((200, 64, 1)) < 0.3) * rng.uniform(0.2, 1, (200, 64, 1))
    noisy = clean + 0.01 * rng.normal(size=clean.shape)
    scores = score_uniform(noisy, clean, noisy.max((0, 1)))
    assert scores["r"][0][0] > 0.999
    assert scores["f1"][0][0] > 0.99 and scores["auprc"][0][0] > 0.99
    assert scores["f1_chance"][0][0] == pytest.approx(0.3, abs=0.02)
    blind = score_uniform(noisy, rng.random(clean.shape), noisy.max((0, 1)))
    for name in ("f1", "auprc"):
        assert blind[name][0][0] == pytest.approx(blind["f1_chance"][0][0], abs=0.02)


# ---- protocols -----------------------------------------------------------------------------------


def made_up_excerpts(seed=0, n=10, w=8):
    """(excerpts, simulated): the first half top, the second random."""
    rng = np.random.default_rng(seed)
    acts = np.maximum(rng.normal(size=(n, w)), 0).astype(np.float32)
    tokens = rng.integers(0, 50, (n, w + 1))
    origin = ["top"] * (n // 2) + ["random"] * (n - n // 2)
    simulated = np.random.default_rng(seed + 1).random((n, w))
    return SimpleNamespace(tokens=tokens, acts=acts, origin=origin), simulated


def test_protocols_are_one_statistic_over_all_tokens():
    excerpts, simulated = made_up_excerpts()
    x, y = excerpts.acts, simulated
    r_all = np.corrcoef(x.ravel(), y.ravel())[0, 1]
    r_random = np.corrcoef(x[5:].ravel(), y[5:].ravel())[0, 1]
    levels = np.minimum(np.floor(10 * (x / x.max())), 9).ravel()
    answers = np.minimum(np.floor(10 * (y / y.max())), 9).ravel()
    rho = np.corrcoef(plain_ranks(levels), plain_ranks(answers))[0, 1]
    expected = {
        "openai_tar": r_all,
        "openai_random": r_random,
        "anthropic_crate": r_all,
        "anthropic_2023": rho,
    }
    assert set(expected) == set(PROTOCOLS)
    for name, value in expected.items():
        assert score_excerpts(name, excerpts, simulated) == (pytest.approx(value), None)


@given(SEEDS)
def test_protocols_ignore_the_order_of_excerpts_and_padding(seed):
    excerpts, simulated = made_up_excerpts(seed)
    order = np.random.default_rng(seed).permutation(10)
    wider = ((0, 0), (0, 3))
    moved = SimpleNamespace(
        tokens=np.pad(excerpts.tokens[order], wider, constant_values=-1),
        acts=np.pad(excerpts.acts[order], wider, constant_values=7),
        origin=[excerpts.origin[i] for i in order],
    )
    for name in PROTOCOLS:
        score = score_excerpts(name, excerpts, simulated)[0]
        moved_score = score_excerpts(name, moved, np.pad(simulated[order], wider))[0]
        assert moved_score == pytest.approx(score, abs=1e-9)


def test_failed_answers_are_missing_not_zero():
    excerpts, simulated = made_up_excerpts()
    answers = [None if i in (2, 6) else simulated[i] for i in range(10)]
    score, reason = score_excerpts("openai_tar", excerpts, answers)
    kept = [i for i in range(10) if i not in (2, 6)]
    r = np.corrcoef(excerpts.acts[kept].ravel(), simulated[kept].ravel())[0, 1]
    assert score == pytest.approx(r)
    assert reason == "2 of 10 excerpts without a readable answer, left out"
    for answers in (None, [None] * 3 + list(simulated[3:]), np.full((10, 8), np.nan)):
        score, reason = score_excerpts("openai_tar", excerpts, answers)
        assert score is None and reason.startswith("failed")
    simulated[1, 2] = np.nan  # one number is missing: there is no score
    undefined = None, "simulated activations are not finite"
    assert score_excerpts("openai_tar", excerpts, simulated) == undefined
    excerpts.origin = ["top"] * 10
    assert score_excerpts("openai_random", excerpts, simulated)[0] is None


@pytest.mark.parametrize("h, dtype", [(1, np.float16), (64, np.float32), (70, np.float64)])
def test_uniform_is_the_same_for_any_number_of_neurons_and_float_type(h, dtype):
    x, y = (values.reshape(20, 16, h).astype(dtype) for values in pair(3, 320, h))
    scores = score_uniform(x, y, x.max((0, 1)))
    x_columns, y_columns = x.reshape(-1, h).astype(float).T, y.reshape(-1, h).astype(float).T
    r = [np.corrcoef(a, b)[0, 1] for a, b in zip(x_columns, y_columns)]
    np.testing.assert_allclose(scores["r"][0], r, atol=1e-12)
    assert len(scores["f1"][1]) == h


# ---- rows ----------------------------------------------------------------------------------------


def test_a_row_has_a_reason_wherever_it_has_no_number():
    statuses = {0: "dead", 1: "undefined"}
    for row in made_up_rows(layers=1):
        scores = flat_scores(row["scores"])
        assert {name for name, score in scores.items() if score is None} == set(row["why"])
        assert row["status"] == statuses.get(row["neuron"], "live")
        assert json.loads(json.dumps(row, allow_nan=False)) == row

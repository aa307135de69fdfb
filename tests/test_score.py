"""Scores: metrics against NumPy and brute force, their invariances, what is missing, counts, intervals."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crate_mini import UserError, score
from crate_mini.scoring import metrics, summary

SEEDS = st.integers(0, 2 ** 32 - 1)


def pair(seed, n=60, h=3, sparse=True, noise=0.5):
    """True codes, mostly zero, and a noisy simulation of them, both (n, h)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, h))
    x = np.maximum(x - 0.8, 0) if sparse else x
    x[0] += 1                                                            # never constant
    return x, x + noise * rng.normal(size=(n, h))


def plain_ranks(values):
    """Average ranks by definition: 1 + how many are smaller + half of how many others are equal."""
    return np.array([1 + sum(b < a for b in values) + (sum(b == a for b in values) - 1) / 2 for a in values])


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
    x += 1e4                                                             # a shift that naive sums would feel
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
    x[:, 5] = 1e9 + 1e-7 * np.arange(len(x))                             # rounding, not variation
    got, why = statistic(x, y)
    assert np.isnan(got).tolist() == [False, True, True, True, True, statistic is metrics.pearson]
    assert why[0] == "" and why[1] == "true activations are constant"
    assert why[2] == "simulated activations are constant"
    assert why[3] == "true activations are not finite" and why[4] == "simulated activations are not finite"
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
    assert metrics.balanced_accuracy([1] * 2 + [0] * 8, [0] * 10) == (0.5, None)     # "none" gains nothing
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
        np.testing.assert_array_equal(got[np.argsort(acts)], np.sort(got))           # monotone
        np.testing.assert_array_equal(metrics.quantise(acts * 2.0 ** power), got)
        assert (metrics.quantise(acts, highest=9) == np.minimum(metrics.quantise(acts), 9)).all()
    else:
        assert not got.any()


def test_quantiser_rounds_down_and_reaches_ten():
    assert metrics.quantise([0, 0.05, 0.19, 0.2, 1]).tolist() == [0, 0, 1, 2, 10]
    assert metrics.quantise([1, 4], top=2).tolist() == [5, 10]
    assert metrics.quantise([-3, 1]).tolist() == [0, 10] and metrics.quantise([-3, -1]).tolist() == [0, 0]
    for value in np.random.default_rng(0).uniform(0, 100, 500):          # 10 * v / v is not always 10
        assert metrics.quantise([value]).tolist() == [10]


@given(st.dictionaries(st.sampled_from([*map(str, range(11)), "11", "x", "٣", " 4", "1 0"]),
                       st.floats(-1000, 0), max_size=9), st.floats(-200, 200))
def test_expected_activation(logprobs, shift):
    value = metrics.expected(logprobs)
    known = {t: p for t, p in logprobs.items() if t in metrics.NUMBERS}
    if not known:
        assert value is None
    else:
        assert min(map(int, known)) - 1e-9 <= value <= max(map(int, known)) + 1e-9 and 0 <= value <= 10
        assert metrics.expected({t: p + shift for t, p in known.items()}) == pytest.approx(value, abs=1e-6)


# ---- NeuronEval's two checks -----------------------------------------------------------------------------

def printed_metrics(true, said, excerpts=slice(None), origin=None):
    """Every metric that summary prints for one neuron, by name; true, said (W, T)."""
    uniform = score.uniform(true[..., None], said[..., None], firing=True)
    found = {name: value[0] for name, (value, _) in uniform.items()}
    tokens = np.ones((len(true), true.shape[1] + 1), int)
    chosen = SimpleNamespace(tokens=tokens[excerpts], acts=true[excerpts],
                             origin=origin or ["random"] * len(true))
    return found | {name: score.protocol(name, chosen, said[excerpts])[0] for name in score.PROTOCOLS}


@given(SEEDS, st.floats(0.02, 0.2))
def test_losing_or_inventing_half_of_the_firings_lowers_every_metric(seed, share):
    """On uniform windows, for a neuron explained perfectly (Oikarinen, Yan & Weng 2025)."""
    rng = np.random.default_rng(seed)
    true = (rng.random((40, 64)) < share) * rng.uniform(1, 2, (40, 64))
    on, off = np.flatnonzero(true > 0), np.flatnonzero(true.ravel() == 0)
    fewer, more = (true > 0).astype(float).ravel(), (true > 0).astype(float).ravel()
    fewer[rng.choice(on, len(on) // 2, replace=False)] = 0
    more[rng.choice(off, len(on), replace=False)] = 1
    best = printed_metrics(true, (true > 0).astype(float))
    for worse in (fewer, more):
        for name, value in printed_metrics(true, worse.reshape(true.shape)).items():
            assert value < best[name] - 0.05, name


def test_top_and_random_hardly_notices_invented_firings():
    """Why openai_tar is not the headline: few invented firings of a sparse neuron fall into 10 excerpts."""
    rng, fall = np.random.default_rng(0), {"r": [], "openai_tar": []}
    for _ in range(40):
        true = (rng.random((400, 64)) < 0.002).astype(float)
        more = np.maximum(true, rng.random(true.shape) < 0.002)
        top = np.argsort(-true.max(1), kind="stable")[:5]
        chosen, origin = np.r_[top, rng.choice(400, 5)], ["top"] * 5 + ["random"] * 5
        best = printed_metrics(true, true, chosen, origin)
        worse = printed_metrics(true, more, chosen, origin)
        for name, falls in fall.items():
            falls.append(best[name] - worse[name])
    assert np.mean(fall["openai_tar"]) < np.mean(fall["r"])
    assert np.mean(np.array(fall["openai_tar"]) < 0.05) > 0.2 and min(fall["r"]) > 0.1


# ---- protocols -------------------------------------------------------------------------------------------

def excerpts(seed=0, n=10, w=8):
    rng = np.random.default_rng(seed)
    acts = np.maximum(rng.normal(size=(n, w)), 0).astype(np.float32)
    return SimpleNamespace(tokens=rng.integers(0, 50, (n, w + 1)), acts=acts,
                           origin=["top"] * (n // 2) + ["random"] * (n - n // 2))


def test_protocols_are_one_statistic_over_all_tokens():
    e, said = excerpts(), np.random.default_rng(1).random((10, 8))
    found = score.protocols(dict.fromkeys(score.PROTOCOLS, e), lambda tokens: said, "ngram")
    both, half = (np.corrcoef(e.acts[i:].ravel(), said[i:].ravel())[0, 1] for i in (0, 5))
    assert found["openai_tar[ngram]"] == (pytest.approx(both), None)
    assert found["openai_random[ngram]"] == (pytest.approx(half), None)
    assert found["anthropic_crate[ngram]"] == (pytest.approx(both), None)
    whole = np.minimum(np.floor(10 * (e.acts / e.acts.max())), 9).ravel()
    rho = np.corrcoef(plain_ranks(whole), plain_ranks(said.ravel()))[0, 1]
    assert found["anthropic_2023[ngram]"] == (pytest.approx(rho), None)


@given(SEEDS)
def test_protocols_ignore_the_order_of_excerpts_and_padding(seed):
    e, said = excerpts(seed), np.random.default_rng(seed + 1).random((10, 8))
    order = np.random.default_rng(seed).permutation(10)
    moved = SimpleNamespace(tokens=np.pad(e.tokens[order], ((0, 0), (0, 3)), constant_values=-1),
                            acts=np.pad(e.acts[order], ((0, 0), (0, 3)), constant_values=7),
                            origin=[e.origin[i] for i in order])
    for name in score.PROTOCOLS:
        got = score.protocol(name, moved, np.pad(said[order], ((0, 0), (0, 3))))
        assert got[0] == pytest.approx(score.protocol(name, e, said)[0], abs=1e-9)


def test_failed_answers_are_missing_not_zero():
    e, said = excerpts(), np.random.default_rng(1).random((10, 8))
    some = [None if i in (2, 6) else said[i] for i in range(10)]
    value, why = score.protocol("openai_tar", e, some)
    keep = [i for i in range(10) if i not in (2, 6)]
    assert value == pytest.approx(np.corrcoef(e.acts[keep].ravel(), said[keep].ravel())[0, 1])
    assert why == "2 of 10 excerpts without a readable answer, left out"
    for answers in (None, [None] * 3 + list(said[3:]), np.full((10, 8), np.nan)):
        value, why = score.protocol("openai_tar", e, answers)
        assert value is None and why.startswith("failed")
    said[1, 2] = np.nan                                                  # one number lost: no number at all
    assert score.protocol("openai_tar", e, said) == (None, "simulated activations are not finite")
    e.origin = ["top"] * 10
    assert score.protocol("openai_random", e, said)[0] is None


@pytest.mark.parametrize("h, kind", [(1, np.float16), (64, np.float32), (70, np.float64)])
def test_uniform_is_the_same_for_any_number_of_neurons_and_float_type(h, kind):
    x, y = (v.reshape(20, 16, h).astype(kind) for v in pair(3, 320, h))
    found = score.uniform(x, y, firing=True, draws=20)
    flat = [v.reshape(-1, h).astype(float).T for v in (x, y)]
    want = [np.corrcoef(a, b)[0, 1] for a, b in zip(*flat)]
    np.testing.assert_allclose(found["r"][0], want, atol=1e-12)
    assert found["ci95"].shape == (h, 2) and len(found["f1"][1]) == h
    inside = (found["ci95"][:, 0] <= want) & (want <= found["ci95"][:, 1])
    assert inside.mean() > 0.8


# ---- density matching ------------------------------------------------------------------------------------

@given(SEEDS, st.integers(10, 200), st.floats(0.01, 0.6))
def test_a_cut_keeps_exactly_the_share_and_is_monotone(seed, n, share):
    rng = np.random.default_rng(seed)
    acts = rng.permuted(np.tile(np.arange(1.0, n + 1), (3, 1)), axis=1).T           # distinct, all firing
    kept = score.cut(acts, score.thresholds(acts, share))
    k = max(1, round(share * n))
    assert ((kept > 0).sum(0) == min(k, n - 1)).all()
    assert ((kept == acts) | (kept == 0)).all()
    for j in range(3):
        assert (np.diff(kept[np.argsort(acts[:, j]), j]) >= 0).all()
    harder = score.cut(acts, score.thresholds(acts, share / 2))
    assert ((harder > 0) <= (kept > 0)).all()
    order = rng.permutation(n)
    np.testing.assert_array_equal(score.thresholds(acts[order], share), score.thresholds(acts, share))


def test_a_cut_leaves_sparser_neurons_alone_and_drops_ties_together():
    acts = np.array([[0, 0, 0, 0, 0, 0, 0, 0, 0, 3.0], [1, 1, 1, 1, 1, 1, 1, 1, 2, 3]]).T
    kept = score.cut(acts, score.thresholds(acts, 0.5))
    assert kept[:, 0].tolist() == acts[:, 0].tolist() and kept[:, 1].tolist() == [0] * 8 + [2, 3]
    with pytest.raises(UserError, match="--match-density 1.5"):
        score.thresholds(acts, 1.5)


# ---- the book --------------------------------------------------------------------------------------------

def rows_of(seed=0, layers=3, h=30, shift=0.0, site="L{}"):
    """Rows of a made-up model; neuron 0 of a layer is dead, 1 undefined, 2 without an answer."""
    rng, rows = np.random.default_rng(seed), []
    for layer in range(layers):
        for j in range(h):
            value = (rng.normal(shift + layer), "")
            if j == 1:
                value = (float("nan"), "true activations are constant")
            answer = (None, "failed: no answer") if j == 2 else value
            stats = {"density": 0.005 if j % 2 else 0.2, "max": float(j > 0), "mean": 0.1}
            rows.append(score.row(site.format(layer), layer, j, stats, {"tokens": []}, {"ngram_r": value},
                                  {"openai_tar[llm:x@A]": answer} if j < 10 else {},
                                  {"ngram_r": (value[0] - 1, value[0] + 1)}))
    return rows


def test_counts_add_up_for_every_metric():
    found = summary.summarise(rows_of(), {"ngram": "two tokens"}, 3, windows=100)
    assert list(found["sites"]) == ["L0", "L1", "L2"]
    for site in found["sites"].values():
        assert site["n"]["few_windows"] == 15
        for name, counts in (("neurons", (30, 28, 1, 1, 0)), ("ngram_r", (30, 28, 1, 1, 0)),
                             ("openai_tar[llm:x@A]", (10, 7, 1, 1, 1))):
            assert site["n"][name] == dict(zip(("total", *summary.STATUS), counts))
        for name in ("ngram_r", "openai_tar[llm:x@A]"):
            n = site["n"][name]
            assert n["total"] == n["live"] + n["dead"] + n["undefined"] + n["failed"]
            assert site[name]["n"] == n["live"]
        assert site["density"]["L0"] == pytest.approx(15 * 0.005 + 15 * 0.2)


def test_statistics_of_a_site_equal_numpy():
    rows = rows_of()
    values = [r["scores"]["uniform"]["ngram_r"] for r in rows if r["layer"] == 1]
    live = [v for v in values if v is not None]
    site = summary.summarise(rows, {}, 3)["sites"]["L1"]["ngram_r"]
    assert site["mean"] == pytest.approx(np.mean(live)) and site["median"] == pytest.approx(np.median(live))
    assert site["deciles"] == pytest.approx(np.quantile(live, np.arange(1, 10) / 10))
    assert site["mean_undefined_as_0"] == pytest.approx(np.sum(live) / 30)
    assert site["ci95"][0] < site["mean"] < site["ci95"][1]
    llm = summary.summarise(rows, {}, 3)["sites"]["L1"]["openai_tar[llm:x@A]"]
    assert llm["mean_undefined_as_0"] == pytest.approx(llm["mean"] * 7 / 9)          # the failed one unknown


def test_a_row_has_a_reason_wherever_it_has_no_number():
    for r in rows_of(layers=1):
        numbers = score.flat(r["scores"])
        assert {name for name, v in numbers.items() if v is None} == set(r["why"])
        assert r["status"] == ("dead" if r["neuron"] == 0 else "undefined" if r["neuron"] == 1 else "live")
        assert json.loads(json.dumps(r, allow_nan=False)) == r


def test_rows_come_back_and_a_broken_file_is_told_of(tmp_path):
    rows, path = rows_of(), tmp_path / "scores.jsonl"
    score.write_rows(path, rows)
    assert score.read_rows(path) == rows and [p.name for p in tmp_path.iterdir()] == ["scores.jsonl"]
    with pytest.raises(ValueError):
        score.write_rows(path, [{"x": float("nan")}])
    assert score.read_rows(path) == rows                                 # what was there stays
    path.write_text("{")
    for place in (path, tmp_path / "none.jsonl"):
        with pytest.raises(UserError, match="--from score"):
            score.read_rows(place)


# ---- layers, models, seeds -------------------------------------------------------------------------------

@pytest.mark.parametrize("layers, kept", [(3, 3), (6, 5), (12, 11)])
def test_the_papers_convention_leaves_the_last_layer_out_at_6_and_12(layers, kept):
    rows = rows_of(layers=layers)
    found = summary.summarise(rows, {}, layers)
    means = [found["sites"][f"L{i}"]["ngram_r"]["mean"] for i in range(layers)]
    o = found["overall"]["codes"]["ngram_r"]
    assert o["layers"] == list(range(layers)) and o["mean"] == pytest.approx(np.mean(means))
    assert o["paper"]["layers"] == list(range(kept))
    assert o["paper"]["mean"] == pytest.approx(np.mean(means[:kept]))
    assert o["paper"]["variance"] == pytest.approx(np.var(means[:kept]))


def test_a_layer_without_a_number_is_named():
    silent = score.row("L3", 3, 0, {"density": 0, "max": 0, "mean": 0}, {}, {"ngram_r": (0.5, "")}, {})
    found = summary.summarise([*rows_of(), silent], {}, 4)
    o = found["overall"]["codes"]["ngram_r"]
    assert o["without"] == [3] and o["layers"] == [0, 1, 2] and o["mean"] is not None
    assert found["sites"]["L3"]["ngram_r"] == {"n": 0, "mean": None, "ci95": None, "median": None,
                                               "deciles": None, "mean_undefined_as_0": 0.0}
    summary.table(found)


def test_features_of_an_autoencoder_are_a_family_of_their_own():
    rows = rows_of() + rows_of(1, shift=5, site="L{}.sae-x")
    found = summary.summarise(rows, {}, 3)
    assert list(found["sites"]) == ["L0", "L1", "L2", "L0.sae-x", "L1.sae-x", "L2.sae-x"]
    alone = summary.summarise(rows_of(), {}, 3)["overall"]["codes"]
    assert found["overall"]["codes"] == alone and set(found["overall"]) == {"codes", "sae-x"}
    gain = summary.compare(rows, rows, family="sae-x", other="codes")["ngram_r"]["all"]
    assert gain["difference"] == pytest.approx(5, abs=1)


def test_two_models_differ_by_what_was_put_in():
    found = summary.compare(rows_of(1, shift=1.5, h=200), rows_of(2, h=200, layers=2))["ngram_r"]
    assert set(found) == {"0", "1", "all"}                               # layers that both have
    for of in found.values():
        assert of["difference"] == pytest.approx(1.5, abs=0.3)
        assert of["ci95"][0] < 1.5 < of["ci95"][1] and of["ci95"][0] > 0
    none = summary.compare(rows_of(1), rows_of(2))["ngram_r"]["all"]
    assert none["ci95"][0] < 0 < none["ci95"][1]


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
    y = 0.5 * (shared[0] + own[0]) + shared[1] + own[1]                  # r = 0.5 / sqrt(1.25)
    for i in range(100):
        low, high = metrics.excerpt_intervals(x[i, ..., None], y[i, ..., None], 200, i)[0]
        inside += low < 0.5 / 1.25 ** 0.5 < high
    assert inside >= 85
    assert np.isnan(metrics.excerpt_intervals(np.zeros((5, 4, 1)), np.ones((5, 4, 1)))).all()


def test_the_table_has_every_mean_count_and_sentence():
    found = summary.summarise(rows_of(layers=8), {"ngram": "ngram: saw two tokens"}, 8)
    text = summary.table(found)
    for site, of in found["sites"].items():
        assert site in text and f"{of['ngram_r']['mean']:.3f}" in text
    assert "30 = 28+1+1+0" in text and "10 = 7+1+1+1" in text
    assert text.endswith("ngram: saw two tokens") and "One training seed." in text
    assert "2 training seeds." in summary.table(found, seeds=2)
    assert "interpretability score" not in text and max(map(len, text.splitlines())) < 200

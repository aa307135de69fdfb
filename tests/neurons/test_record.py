"""A record agrees with brute force for every neuron; the two parts share no document."""

import json
import re
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from forked import run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from little_world import (
    BYTES,
    META,
    H,
    Ids,
    T,
    make_record,
    no_log,
    random_text,
    recorded,
    truth,
    windows,
    world,
)
from simulations import SEEDS
from tiny_checkpoints import save_checkpoint
from torch import nn

from crate_mini import UserError
from crate_mini.console import results
from crate_mini.data.batches import open_corpus
from crate_mini.data.formats import END
from crate_mini.intervene import hook_codes
from crate_mini.model import LM
from crate_mini.neurons import cut, documents, record
from crate_mini.neurons.accumulate import Batch, Shared, TokenStats, TopWindows
from crate_mini.neurons.documents import PARTS, WINDOW, FitScoreSplit
from crate_mini.neurons.histogram import LogHistogram
from crate_mini.neurons.record_files import load

CPU = torch.device("cpu")

# ---- documents and parts -------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.integers(0, 9), max_size=30), max_size=12), st.booleans(), st.booleans()
)
def test_documents_lie_between_the_marks(texts, mark_first, mark_last):
    ids = [99] if mark_first else []
    for text in texts:
        ids += [*text, 99]
    if texts and not mark_last:
        ids.pop()
    corpus = Ids(ids)
    read = list(documents.documents(corpus, "val", 99))
    if corpus.n_tokens["val"] > 1:
        assert [ids.tolist() for _, ids in read] == [text for text in texts if text]
    assert [number for number, _ in read] == list(range(len(read)))  # none is longer than LONGEST


@given(st.integers(1, 3000), st.integers(0, 3), st.integers(50, 900))
@settings(max_examples=20)
def test_pieces_of_a_long_document_share_its_number(length, before, longest):
    ids = np.arange(length) % 90
    corpus = Ids(np.concatenate((np.full(before, 99), ids, [99, 1, 2])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "LONGEST", longest)
        numbers, pieces = zip(*documents.documents(corpus, "val", 99))
    assert np.array_equal(np.concatenate(pieces[:-1]), ids)
    assert pieces[-1].tolist() == [1, 2]
    assert numbers == (*[0] * (len(pieces) - 1), 1)
    assert all(len(piece) == longest for piece in pieces[:-2])


def test_documents_of_a_corpus_on_disk(tmp_path):
    texts = [f"{i}: " + random_text(np.random.default_rng(i), 200) for i in range(150)]
    (tmp_path / "t.txt").write_text(END.join(texts), encoding="utf-8")
    corpus = open_corpus(str(tmp_path / "t.txt"), BYTES, tmp_path / "cache", log=no_log)
    read = []
    for split in ("train", "val"):
        for _, ids in documents.documents(corpus, split, BYTES.eot):
            read.append(BYTES.decode(ids.tolist()))
    assert sorted(read) == sorted(text.strip("\n") for text in texts)
    with pytest.raises(UserError):
        make_record(tmp_path / "out", corpus=corpus, tokens=0, dtype="auto")


@given(
    st.lists(st.integers(1, 5000), min_size=2, max_size=60), st.integers(0, 9), st.floats(0.05, 2)
)
def test_parts_are_even_up_to_one_document_and_use_the_tokens_asked_for(lengths, seed, share):
    limit = int(share * sum(lengths))
    used, part = documents.deal(lengths, seed, limit)
    assert (used <= lengths).all() and (used >= 0).all()
    if limit >= sum(lengths):
        assert used.tolist() == lengths
    else:
        assert used.sum() == min(limit, np.minimum(lengths, used.max()).sum())
    sums = np.bincount(part, used, 2)
    assert abs(sums[0] - sums[1]) <= used.max()
    again = documents.deal(lengths, seed, limit)
    assert all(np.array_equal(a, b) for a, b in zip((used, part), again))


def test_parts_of_many_documents_are_even_and_depend_on_the_seed():
    lengths = np.ceil(50 * (1 + np.random.default_rng(0).pareto(1.2, 500))).astype(int)
    parts = []
    for seed in range(40):
        used, part = documents.deal(lengths, seed, 10**9)
        sums = np.bincount(part, used, 2)
        assert abs(sums[0] - sums[1]) < 0.01 * sums.sum()
        parts.append(part)
    shares = np.mean(parts, 0)  # how often each document scores
    assert abs(shares[:20] - 0.5).max() < 4.5 * 0.5 / 40**0.5
    assert abs(shares - 0.5).max() < 4.9 * 0.5 / 40**0.5


def test_of_a_few_tokens_no_document_gives_most():
    lengths = [90_000, *[100] * 300]
    used, _ = documents.deal(lengths, 0, 16_000)
    assert used.sum() == 16_000 and used.max() <= 1000
    used, _ = documents.deal([90_000, 80_000], 0, 16_000)
    assert used.tolist() == [8000, 8000] or used.sum() == 16_000


@pytest.mark.parametrize(
    "lengths, notes",
    [
        ([900], ["one document: 4 stretches"]),
        ([400, 400], ["2 documents, too few"]),
        ([900, 300, 300], ["3 documents, too few", "document 0 has 60% .* fit [69]00, score"]),
        ([300] * 4, []),
        ([*[300] * 4, 3000], ["document 4 has 71% of the tokens, too many for even parts"]),
    ],
)
def test_few_documents_and_uneven_parts_get_a_sentence(lengths, notes):
    ids = np.concatenate([[*(np.arange(n) % 90), 99] for n in lengths])
    split = FitScoreSplit(Ids(ids), "val", 99, 128, 0, 10**6)
    assert len(split.notes) == len(notes)
    for sentence, pattern in zip(split.notes, notes):
        assert re.search(pattern, sentence), sentence
    dealt = {}
    for number, _, part in split.documents():
        assert dealt.setdefault(number, part) == part, "a document lies in both parts"
    assert set(dealt.values()) == set(PARTS)
    counted = split.count(100, 10)[0]
    assert counted["tokens"] == split.count_tokens()
    assert sum(counted["tokens"].values()) == sum(lengths)
    assert sum(counted["documents"].values()) == len(dealt)


def test_the_counts_of_the_header_add_up():
    r = recorded()
    header = r.header
    for part in PARTS:
        chunks = truth()[part]
        assert header["tokens"][part] == sum(len(ids) for _, ids, _ in chunks)
        assert header["documents"][part] == len({document for document, _, _ in chunks})
        assert header["windows"][part] == len(windows(part, 0))
    total = sum(header["tokens"].values())
    assert total == np.count_nonzero(world()[1].ids != BYTES.eot)
    fit = np.concatenate([ids for _, ids, _ in truth()["fit"]])
    assert np.array_equal(r.shared["counts"], np.bincount(fit, minlength=257))
    for site in r.sites:
        arrays = r.site(site)
        positive = np.rint(arrays["density"].astype(np.float64) * total)
        assert np.array_equal(arrays["hist"].sum(1), positive)
    assert header["checkpoint"]["kind"] == "crate"
    assert header["checkpoint"]["sha256"] == "of a test"
    assert header["window"] == 64
    assert [site["name"] for site in header["sites"]] == ["L0", "L1"]


def test_a_limit_of_tokens_is_met_by_documents_from_everywhere():
    r = recorded(tokens=20_000)
    assert sum(r.header["tokens"].values()) == 20_000
    docs = np.concatenate([r.shared[f"uniform_{part}_doc"] for part in PARTS])
    assert docs.min() < 20 and docs.max() > 70


# ---- statistics of all tokens --------------------------------------------------------------------


def all_acts(layer):
    """(N, 64) float64: the activations of a layer at all tokens of both parts."""
    acts = [acts[:, layer] for part in PARTS for _, _, acts in truth()[part]]
    return np.concatenate(acts).astype(np.float64)


@pytest.mark.parametrize("layer", [0, 1])
def test_moments_density_and_maximum_are_those_of_float64(layer):
    arrays = recorded().site(f"L{layer}")
    x = all_acts(layer)
    y = x - x.mean(0)
    with np.errstate(invalid="ignore"):
        expected = {
            "mean": x.mean(0),
            "var": x.var(0),
            "skew": (y**3).mean(0) / x.std(0) ** 3,
            "kurtosis": (y**4).mean(0) / x.var(0) ** 2,
            "density": (x > 0).mean(0),
            "max": x.max(0),
        }
    for name, value in expected.items():
        np.testing.assert_allclose(arrays[name], value, rtol=2e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("layer", [0, 1])
def test_the_histogram_is_right_but_for_the_bins_at_the_edges(layer):
    arrays = recorded().site(f"L{layer}")
    x = all_acts(layer)
    for j in range(0, H, 7):
        positive = x[:, j][x[:, j] > 0]
        counts, _ = np.histogram(positive, arrays["hist_edges"] * x[:, j].max())
        off = np.abs(np.cumsum(arrays["hist"][j]) - np.cumsum(counts))
        assert off.max() <= 2 + 0.02 * counts.sum(), "an edge lies in a bin at most 1.6 % wide"


def token_stats(pieces):
    """results() of the TokenStats of activations given piece by piece, each (n, 5)."""
    stats = TokenStats(5, 1, 0, CPU)
    for x in pieces:
        token = torch.zeros(len(x), dtype=torch.int64)
        batch = Batch(None, None, token, token - 1, None, None, None, None, [])
        stats.add(x[None], batch, fit=True)
    return stats.results()


@given(
    st.integers(1, 2**31), st.floats(-30, 30), st.lists(st.integers(1, 40), min_size=1, max_size=8)
)
def test_moments_do_not_depend_on_how_the_tokens_are_split(seed, mean, sizes):
    x = torch.randn(sum(sizes), 5, generator=torch.Generator().manual_seed(seed)) * 0.5 + mean
    x[:, 0], x[:, 1] = 0, 3.7
    whole, split = token_stats([x]), token_stats(x.split(sizes))
    for name in whole:
        np.testing.assert_allclose(whole[name], split[name], rtol=1e-3, atol=1e-4, err_msg=name)
    assert np.array_equal(whole["hist"], split["hist"])
    assert np.isnan(split["skew"][:2]).all() and (split["var"][:2] == 0).all()
    if len(x) > 1:
        y = (x.double() - x.double().mean(0)).numpy()[:, 2:]
        var = (y**2).mean(0)
        np.testing.assert_allclose(split["var"][2:], var, rtol=1e-4)
        np.testing.assert_allclose(split["kurtosis"][2:], (y**4).mean(0) / var**2, rtol=1e-3)


@pytest.mark.parametrize("layer", [0, 1])
def test_sums_by_token_and_by_bigram(layer):
    r = recorded()
    arrays, shared = r.site(f"L{layer}"), r.shared
    by_token = np.zeros((257, H))
    counts, by_pair = {}, {}
    for _, ids, acts in truth()["fit"]:
        x = acts[:, layer].astype(np.float64)
        np.add.at(by_token, ids, x)
        for i in range(1, len(ids)):
            pair = ids[i - 1], ids[i]
            counts[pair] = counts.get(pair, 0) + 1
            by_pair[pair] = by_pair.get(pair, 0) + x[i]
    np.testing.assert_allclose(arrays["token_sum"], by_token, rtol=1e-4, atol=1e-4)
    pairs = [tuple(pair) for pair in shared["pairs"]]
    assert set(pairs) == {pair for pair, count in counts.items() if count >= 3} and len(pairs) > 20
    pair_counts = shared["pair_counts"].tolist()
    assert pair_counts == [counts[pair] for pair in pairs] == sorted(pair_counts)[::-1]
    expected = np.stack([by_pair[pair] for pair in pairs])
    np.testing.assert_allclose(arrays["pair_sum"], expected, rtol=1e-4, atol=1e-4)


def test_bigrams_are_the_most_frequent_ones_where_not_all_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "BIGRAM_BYTES", 40 * 4 * 2 * H)
    few = make_record(tmp_path).shared
    assert np.array_equal(few["pairs"], recorded().shared["pairs"][:40])
    assert np.array_equal(few["pair_counts"], recorded().shared["pair_counts"][:40])


# ---- windows -------------------------------------------------------------------------------------


def best_windows(peaks, docs, dedup, k=36):
    """Numbers of the k windows with the highest peaks (W,) above 0, by brute force."""
    order, seen = [], set()
    for i in np.argsort(-peaks, kind="stable"):
        known = dedup and docs[i] in seen
        if peaks[i] > 0 and not known and len(order) < k:
            order.append(i)
            seen.add(docs[i])
    return order


@pytest.mark.parametrize("dedup", [True, False])
@pytest.mark.parametrize("part", PARTS)
def test_top_windows_are_those_of_brute_force(part, dedup):
    for layer in (0, 1):
        arrays = recorded(dedup=dedup).site(f"L{layer}")
        tokens, acts, at, docs = (
            arrays[f"top_{part}_{name}"] for name in ("tokens", "acts", "at", "doc")
        )
        expected = windows(part, layer)
        all_docs = [doc for doc, _, _ in expected]
        peaks = np.stack([x.max(0) for _, _, x in expected])  # (W, h)
        for j in range(H):
            order = best_windows(peaks[:, j], all_docs, dedup)
            top = acts[j].max(1)
            np.testing.assert_allclose(top[: len(order)], peaks[order, j], rtol=1e-3, atol=1e-6)
            assert (np.diff(top) <= 0).all() and (docs[j, len(order) :] == -1).all()
            for k, i in enumerate(order):
                if np.isclose(peaks[:, j], peaks[i, j], rtol=1e-4).sum() > 1:
                    continue  # a near tie: the order may differ
                doc, window, x = expected[i]
                assert docs[j, k] == doc
                assert np.array_equal(tokens[j, k], window)
                np.testing.assert_allclose(acts[j, k], x[:, j], rtol=1e-3, atol=1e-4)
                assert x[at[j, k], j] >= x[:, j].max() * (1 - 1e-4)


@given(st.integers(0, 2**31), st.integers(1, 5), st.booleans(), st.integers(1, 6))
def test_top_does_not_depend_on_batches_nor_on_the_order_of_documents(seed, k, dedup, per_batch):
    rng = np.random.default_rng(seed)
    docs = rng.integers(0, 6, 17)
    acts = np.maximum(rng.normal(-1.5, 1, (17, WINDOW, 3)), 0).astype(np.float16)
    x = torch.from_numpy(acts).float()  # 17 chunks of one window
    top = TopWindows(3, k, dedup, CPU)
    for rows in torch.arange(17).split(per_batch):
        batch = Batch(
            ids=None,
            text=None,
            token=None,
            bigram=None,
            window_row=torch.arange(len(rows)),
            window_start=torch.zeros(len(rows), dtype=torch.int64),
            window_doc=torch.from_numpy(docs[rows.numpy()]),
            window_tokens=torch.zeros(len(rows), WINDOW + 1, dtype=torch.int32),
            drawn=[],
        )
        top.offer(x[rows], batch)
    results, peaks = top.results("fit"), x.amax(1).numpy()
    for j in range(3):
        order = best_windows(peaks[:, j], docs, dedup, k)
        kept = results["top_fit_acts"][j].astype(np.float32).max(1)
        assert kept[kept > 0].tolist() == peaks[order, j].tolist()
        kept_docs = results["top_fit_doc"][j][results["top_fit_doc"][j] >= 0]
        assert not dedup or len(set(kept_docs)) == len(kept_docs)


def test_windows_stay_in_their_document_and_activations_are_those_of_their_tokens():
    r = recorded()
    for part in PARTS:
        for layer in (0, 1):
            known = {}
            for doc, tokens, acts in windows(part, layer):
                known[doc, tuple(tokens)] = acts
            docs, drawn = r.shared[f"uniform_{part}_doc"], r.shared[f"uniform_{part}"]
            assert len(drawn) == min(record.UNIFORM[part], len(known))
            names = [(doc, tuple(tokens)) for doc, tokens in zip(docs, drawn)]
            for name, acts in zip(names, r.site(f"L{layer}")[f"uniform_{part}_acts"]):
                np.testing.assert_allclose(acts, known[name], rtol=1e-3, atol=1e-4)
            assert len(set(names)) == len(drawn), "a window is drawn twice"


def drawn_windows(seed, **windows):
    """{part: numbers of the windows drawn}, from windows {part: (wanted, total)}."""
    no_bigrams = np.empty((0, 2), np.int64)
    shared = Shared(np.zeros(9), no_bigrams, 9, windows, seed, CPU)
    return {part: shared.uniform[part].numbers for part in PARTS}


def test_uniform_windows_are_drawn_uniformly():
    """Chi-square of how often each of 40 windows is among 10 drawn; the parts are independent."""
    times, both = np.zeros(40), 0
    for seed in range(600):
        drawn = drawn_windows(seed, fit=(10, 40), score=(10, 40))
        times += np.isin(np.arange(40), drawn["fit"])
        both += len(np.intersect1d(drawn["fit"], drawn["score"]))
    chi = ((times - 150) ** 2 / (150 * 30 / 40)).sum()
    assert 15 < chi < 73, "0.1 % and 99.9 % points of 39 degrees of freedom, scaled by n / (n - 1)"
    assert abs(both / 600 - 2.5) < 0.25, "10 of 40, twice: 2.5 in common by chance"


def test_another_draw_for_one_part_leaves_the_other():
    few = drawn_windows(3, fit=(10, 40), score=(10, 40))
    many = drawn_windows(3, fit=(10, 40), score=(30, 900))
    assert np.array_equal(few["fit"], many["fit"])


# ---- sites, other models -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "crate+"])
def test_sites_of_features_and_of_other_kinds_of_models(kind, tmp_path):
    def doubled(codes):
        return torch.cat((codes, codes - 0.1), 1)

    model = world(kind)[0]
    features = record.Site("L1.sae-twice", 1, 2 * H, doubled, "a.pt")
    r = make_record(tmp_path, model, chosen=[*record.sites(model, "1"), features])
    of_codes, of_features = r.site("L1"), r.site("L1.sae-twice")
    for name in ("mean", "max", "density", "top_fit_acts", "uniform_score_acts", "hist"):
        axis = 2 if name.startswith("uniform") else 0
        same, shifted = np.split(of_features[name], 2, axis)
        assert np.array_equal(same, of_codes[name]), name
        assert not np.array_equal(shifted, of_codes[name])
    assert r.header["checkpoint"]["kind"] == kind
    described = {"name": "L1.sae-twice", "layer": 1, "width": 2 * H, "sae": "a.pt"}
    assert r.header["sites"][1] == described


def test_an_untrained_control_sees_the_same_documents_and_windows(tmp_path):
    model = world()[0]
    state = torch.random.get_rng_state()
    fresh, meta = record.untrained_control(model, META)
    assert torch.equal(state, torch.random.get_rng_state()) and not fresh.training
    again = record.untrained_control(model, META)[0]
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), again.parameters()))
    r = make_record(tmp_path, fresh, meta)
    names = ["counts", "pairs", "pair_counts", "uniform_fit", "uniform_score", "uniform_score_doc"]
    for name in names:
        assert np.array_equal(r.shared[name], recorded().shared[name]), name
    assert not np.allclose(r.site("L0")["mean"], recorded().site("L0")["mean"])
    assert r.header["checkpoint"]["sha256"] is None
    assert r.header["checkpoint"]["training"]["step"] == 0


# ---- density matching ----------------------------------------------------------------------------


def histogram_of(pieces):
    """The LogHistogram of activations (n, h) given piece by piece."""
    histogram = LogHistogram(pieces[0].shape[1], CPU)
    for piece in pieces:
        histogram.add(piece)
    return histogram


@given(
    SEEDS, st.integers(10, 400), st.floats(0.01, 0.6), st.sampled_from([1e-30, 1e-3, 1, 1e5, 1e30])
)
def test_no_neuron_fires_more_often_than_the_share_and_hardly_less(seed, n, share, scale):
    rng = np.random.default_rng(seed)
    acts = rng.lognormal(0, 1, (n, 4)) * (rng.random((n, 4)) < [1, 0.5, 0.1, 0]) * scale
    acts = torch.from_numpy(acts.astype(np.float32))
    limits = histogram_of(acts.split(7)).limits(share)
    kept = cut.cut(acts, torch.from_numpy(limits))
    assert ((kept == acts) | (kept == 0)).all()
    fires, allowed = (kept > 0).sum(0), int(share * n)
    assert (fires <= allowed).all()
    for j in range(4):
        x = acts[:, j]
        if (x > 0).sum() <= allowed:
            assert torch.equal(kept[:, j], x), "a neuron that fires less often is left alone"
        elif allowed:  # what is lost lies in one bin, 1.6 % wide, with the limit
            strongest_lost = x[kept[:, j] == 0].max()
            weakest_allowed = x.sort(descending=True).values[allowed - 1]
            assert strongest_lost <= 1.016 * weakest_allowed


def test_values_that_tie_are_cut_together_and_a_constant_is_silenced():
    acts = torch.tensor([[0] * 9 + [3.0], [1] * 8 + [2, 3], [5.0] * 10, [-1] * 9 + [2]]).T
    limits = histogram_of([acts]).limits(0.5)
    kept = cut.cut(acts, torch.from_numpy(limits))
    assert kept[:, 0].tolist() == acts[:, 0].tolist()
    assert kept[:, 1].tolist() == [0] * 8 + [2, 3]
    assert kept[:, 2].tolist() == [0] * 10 and np.isinf(limits[2])
    assert kept[:, 3].tolist() == [0] * 9 + [2]
    reached = cut.density_reached((kept > 0).float().mean(0).numpy(), limits)
    assert reached == {"mean": pytest.approx(0.1), "max": pytest.approx(0.2), "silenced": 1}
    with pytest.raises(UserError, match="--match-density 1.5"):
        cut.check_share(1.5)


@given(SEEDS, st.lists(st.integers(1, 40), min_size=2, max_size=6), st.integers(0, 60))
def test_a_histogram_does_not_depend_on_the_pieces_whatever_comes_first(seed, sizes, octaves):
    rng = np.random.default_rng(seed)
    x = rng.lognormal(0, 2, (sum(sizes), 3)) * (rng.random((sum(sizes), 3)) < 0.7)
    x[: sizes[0]] *= 2.0**-octaves  # a first batch in which the neurons hardly fire
    x = torch.from_numpy(x.astype(np.float32))
    whole, split = histogram_of([x]), histogram_of(x.split(sizes))
    edges = np.linspace(0, 1, 51)
    assert np.array_equal(whole.linear(edges), split.linear(edges))
    assert np.array_equal(whole.limits(0.1), split.limits(0.1))
    assert (whole.linear(edges).sum(1) == (x > 0).sum(0).numpy()).all()


def test_losses_are_those_of_the_model_that_runs_on_cut_codes():
    model, corpus = world()
    chosen = record.sites(model)
    shape = {"eot": BYTES.eot, "dtype": "float32"}
    limits = record.limits(model, chosen, corpus, 0.05, **shape)
    n = 10 * T + 7
    losses = cut.losses(model, chosen, limits, {}, corpus, tokens=n)
    assert losses["tokens"] == n
    reached = []

    def by_hand(codes):
        codes = torch.where(codes >= torch.from_numpy(limits["L1"]), codes, 0)
        reached.append((codes > 0).float().mean())
        return codes

    blocks = list(corpus.blocks("val", 1, T, n))
    for name, hooks in (("uncut", {}), ("L1", {1: by_hand})):
        total = 0
        for ids, targets in blocks:
            with ExitStack() as stack, torch.no_grad():
                for layer, function in hooks.items():
                    stack.enter_context(hook_codes(model, layer, function))
                total += model(ids, targets).item() * ids.numel()
        measured = losses["sites"].get(name, losses["uncut"])
        assert measured == pytest.approx(total / n, rel=1e-5)
    assert np.mean(reached) < 0.1
    assert len({losses["uncut"], losses["all"], *losses["sites"].values()}) == 4
    nothing = {name: np.zeros_like(values) for name, values in limits.items()}
    uncut = cut.losses(model, chosen, nothing, {}, corpus, tokens=n)
    assert uncut["all"] == pytest.approx(uncut["uncut"], rel=1e-6)


def test_cut_features_leave_the_codes_by_their_directions():
    model, corpus = world()
    directions = torch.randn(9, H, generator=torch.Generator().manual_seed(0)) / 9
    site = record.Site("L0.sae-x", 0, 9, lambda x: (x @ directions.T).relu(), "x.pt")
    change = cut._change(site, np.full(9, 1.0, np.float32), directions)
    codes = torch.rand(2, 5, H)
    features = site.encode(codes)
    kept = torch.where(features >= 1, features, 0)
    expected = codes - (features - kept) @ directions
    torch.testing.assert_close(change(codes), expected)
    limits = {site.name: np.full(9, np.inf, np.float32)}
    losses = cut.losses(model, [site], limits, {site.name: directions}, corpus, tokens=500)
    assert set(losses) == {"tokens", "uncut", "sites"}
    assert losses["sites"][site.name] != losses["uncut"]


# ---- activations of any size ---------------------------------------------------------------------


class Scaled(nn.Module):
    """The codes of a layer times a constant, for a model whose activations are far from 1."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, codes):
        return codes * self.scale


@pytest.mark.parametrize("exponent", [-60, 30, 80])
def test_a_record_of_scaled_codes_is_the_record_scaled(exponent, tmp_path):
    model, scale = deepcopy(world()[0]), 2.0**exponent
    model.blocks[1].sparsifier.code = Scaled(scale)  # of the last layer: a power of two, so exact
    arrays, plain = make_record(tmp_path, model).site("L1"), recorded().site("L1")
    for name in ("density", "skew", "kurtosis", "hist", "top_fit_tokens", "top_score_at"):
        np.testing.assert_array_equal(arrays[name], plain[name], err_msg=name)
    for name in ("max", "mean", "token_sum", "pair_sum", "uniform_fit_acts", "top_score_acts"):
        expected = plain[name].astype(np.float64) * scale
        np.testing.assert_allclose(arrays[name], expected, rtol=1e-6, err_msg=name)
    assert arrays["max"].max() > 0


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38])
def test_what_is_not_finite_is_refused_in_one_sentence(value, tmp_path):
    model = deepcopy(world()[0])
    model.blocks[1].sparsifier.code = Scaled(value)
    with pytest.raises(UserError, match="finite"):
        make_record(tmp_path, model)
    site = record.Site("L0.sae-x", 0, H, lambda x: x * value, "x.pt")
    with pytest.raises(UserError, match="finite"):
        make_record(tmp_path, chosen=[site])
    assert not list(tmp_path.glob("record*"))


# ---- files ---------------------------------------------------------------------------------------


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        make_record(tmp_path / name, layers="0", seed=seed)
    a, b, c = (files(tmp_path / name) for name in "abc")
    assert list(a) == ["record-L0.npz", "record-shared.npz", "record.json"]
    header_a, header_b = json.loads(a.pop("record.json")), json.loads(b.pop("record.json"))
    assert a == b
    differing = {"seconds": 0, "digest": ""}
    assert {**header_a, **differing} == {**header_b, **differing}
    assert a["record-L0.npz"] != c["record-L0.npz"]


def test_a_record_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    make_record(tmp_path, layers="0")
    before, write_array = files(tmp_path), np.lib.format.write_array

    def fail_on_windows(file, array, **kwargs):
        if array.ndim == 3:
            raise OSError(28, "No space left on device")
        write_array(file, array, **kwargs)

    monkeypatch.setattr(np.lib.format, "write_array", fail_on_windows)
    with pytest.raises(UserError, match="No space left"):
        make_record(tmp_path, layers="0", seed=1)
    assert files(tmp_path) == before
    monkeypatch.undo()
    assert load(tmp_path).site("L0")["max"].shape == (H,)


def test_files_that_do_not_fit_are_refused(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    with pytest.raises(UserError, match="holds no record"):
        load(tmp_path)
    make_record(a, layers="0")
    make_record(b, layers="0", seed=1)
    with pytest.raises(UserError, match="no record of 'L7', only of L0"):
        load(a).site("L7")
    (a / "record-L0.npz").write_bytes((b / "record-L0.npz").read_bytes())
    with pytest.raises(UserError, match="another run"):
        load(a).site("L0")
    path = b / "record-L0.npz"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="damaged"):
        load(b).site("L0")
    path.unlink()
    with pytest.raises(UserError, match="is missing; record again with --from record"):
        load(b).site("L0")
    header = b / "record.json"
    text = header.read_text()
    header.write_text(text.replace('"seed": 1', '"seed": 2'))
    with pytest.raises(UserError, match="its digest does not fit"):
        load(b)
    results.write_json(header, {**json.loads(text), "schema": 9})
    with pytest.raises(UserError, match="schema 9"):
        load(b)
    results.write_json(header, {**json.loads(text), "schema": 1})  # parts of uneven lengths
    with pytest.raises(UserError, match="schema 1, expected 2; record again with --from record"):
        load(b)


# ---- what cannot be recorded ---------------------------------------------------------------------


def test_layers_that_do_not_exist_are_named():
    model = world()[0]
    with pytest.raises(UserError, match="layer '2' does not exist; the model's layers are 0 to 1"):
        record.sites(model, "0,2")
    assert [site.name for site in record.sites(model, "1, 0")] == ["L0", "L1"]


def test_what_cannot_be_recorded_is_said_in_one_sentence(tmp_path, monkeypatch):
    out = tmp_path / "none"
    short = Ids(np.tile([*range(60), BYTES.eot], 50))
    for bad in (short, Ids(np.arange(50)), Ids(np.zeros(1, int)), Ids(np.zeros(0, int))):
        with pytest.raises(UserError, match="without a document of 64 tokens"):
            make_record(out, corpus=bad)
    narrow = LM(replace(world()[0].config, block_size=32)).eval()
    with pytest.raises(UserError, match="context of 32 tokens is shorter"):
        make_record(out, narrow)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="no folder|Cannot make|Not a directory|exists"):
        make_record(tmp_path / "file")
    monkeypatch.setattr(record, "total_memory", lambda device: 1 << 20)
    with pytest.raises(UserError, match="GB of memory"):
        make_record(out)
    assert not out.exists()


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_record_of_a_gigabyte_is_made_in_a_gigabyte_and_a_half(tmp_path):
    """500 M ids of bytes, in documents of about 200; every fifth window is held out."""
    pytest.importorskip("resource")
    draw = np.random.default_rng(0)
    with open(tmp_path / "ids.bin", "wb") as file:
        for _ in range(100):
            ids = draw.integers(32, 127, 5_000_000, dtype=np.uint16)
            ids[draw.random(len(ids)) < 0.005] = BYTES.eot
            file.write(ids.tobytes())
    ckpt = save_checkpoint(tmp_path / "run" / "best", tmp_path / "ids.bin", context=64)
    done = run_script(["-c", RECORD, ckpt], timeout=3000)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 1.5e9
    assert (tmp_path / "run" / "interpret" / "record.json").exists()


RECORD = """
import resource, sys
from crate_mini.console import terminal
words = ["neurons", sys.argv[1], "--until", "record", "--val-fraction", "0.2"]
terminal.dispatch("interpret.py", "", {"neurons": "crate_mini.neurons.command"}, words)
unit = 1 if sys.platform == "darwin" else 1024
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
"""


def test_memory_does_not_grow_with_the_corpus(monkeypatch):
    """Ten times the text: no more tokens held at a time, no more distinct bigrams counted."""
    held, counted = [], []
    monkeypatch.setattr(documents, "MAX_BIGRAMS", 2000)
    monkeypatch.setattr(documents, "LONGEST", 700)
    batches_by_length, merge = documents.batches_by_length, documents.BigramCounter.merge

    def observe_batches(chunks, tokens):
        held.append(sum(len(chunk.ids) for chunk in chunks))
        return batches_by_length(chunks, tokens)

    def observe_merge(counter):
        pending = sum(len(keys) for keys in counter.pending)
        merge(counter)
        counted.append(len(counter.keys) + pending)

    monkeypatch.setattr(documents, "batches_by_length", observe_batches)
    monkeypatch.setattr(documents.BigramCounter, "merge", observe_merge)
    rng = np.random.default_rng(0)
    peaks = []
    for n in (30_000, 300_000):
        ids = rng.integers(0, 255, n)
        ids[rng.integers(0, n, n // 400)] = 256
        parts = FitScoreSplit(Ids(ids), "val", 256, 128, 0, n)
        counts, _, _ = parts.count(257, 100)
        tokens = 0
        for part in PARTS:
            for chunks in parts.batches(part, 512):
                tokens += sum(len(chunk.ids) for chunk in chunks)
        assert tokens == sum(counts["tokens"].values()) == np.count_nonzero(ids != 256)
        peaks.append((max(held), max(counted)))
    assert peaks[1][0] <= 16 * 512 + 128
    assert peaks[1][1] <= 2000 + 2000 // 4 + 700

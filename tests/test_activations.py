"""A record says of every neuron what brute force says; the two parts and their documents never meet."""

import json
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crate_mini import UserError, activations, data
from crate_mini.activations import documents, load, record
from crate_mini.corpus.formats import END
from crate_mini.model import LM, preset
from crate_mini.scoring import excerpts, parts, tally
from crate_mini.scoring.parts import PARTS, WINDOW, Parts, part_of

BYTES = data.load_tokenizer("bytes")
META = {"tokenizer": {"spec": "bytes"}, "training": {"step": 7}, "sha256": "of a test"}
T, H = 160, 64                  # chunks of two windows and a rest; neurons


class Ids:
    """A corpus of given ids, with all that documents() asks of one."""

    def __init__(self, ids):
        self.ids, self.n_tokens, self.meta = np.asarray(ids), {"val": len(ids)}, {"source": {"name": "ids"}}

    blocks, batch = data.Corpus.blocks, data.Corpus.batch

    def _read(self, split, start, count):
        return self.ids[start:start + count].astype(np.int64)


def text(rng, n):
    """About n bytes in words of which some are frequent, so that bigrams repeat."""
    words = ["the", "cat", "sat", "on", "a", "mat", "<b>", "wörd", "12", "\n"]
    return " ".join(rng.choice(words, n // 3 + 1))[:max(1, n)]


@cache
def world(kind="crate"):
    """(model, corpus): two layers of 64 neurons, 90 documents of 1 to 900 bytes."""
    torch.manual_seed(0)
    config = preset("1L", kind, vocab_size=257, block_size=T, n_layer=2, n_head=2, n_embd=16)
    model, rng = LM(config).eval(), np.random.default_rng(0)
    for p in model.parameters():                # livelier than at initialisation
        p.data.mul_(1.5)
    texts = [text(rng, int(n)) for n in rng.integers(1, 900, 90)]
    ids = np.concatenate([[*t.encode(), BYTES.eot] for t in texts])
    return model, Ids(ids)


def quiet(line):
    pass


@cache
def recorded(**changes):
    """(Record, folder) of the world, made once for each set of arguments."""
    model, corpus = world()
    folder = Path(tempfile.mkdtemp())
    return record(model, META, activations.sites(model), corpus, folder, dtype="float32", log=quiet,
                  **changes)


@cache
def truth(seed=0):
    """By brute force, one document at a time: {part: [(document, ids, acts (n, 2, 64)) of each chunk]}."""
    model, corpus = world()
    found = {part: [] for part in PARTS}
    for number, ids in documents(corpus, "val", BYTES.eot):
        for start in range(0, len(ids), T):
            chunk = torch.from_numpy(ids[start:start + T])
            with torch.no_grad():
                codes = model.trunk(chunk[None])[1]
            found[part_of(number, seed)].append((number, chunk.numpy(), torch.stack(codes, 2)[0].numpy()))
    return found


def windows(part, layer, seed=0):
    """(document, 65 tokens, acts (64, 64)) of all windows of a part."""
    return [(doc, np.append([-1] * (s == 0), ids[max(0, s - 1):s + WINDOW]), acts[s:s + WINDOW, layer])
            for doc, ids, acts in truth(seed)[part] for s in range(0, len(ids) - WINDOW + 1, WINDOW)]


# ---- documents and parts

@given(st.lists(st.lists(st.integers(0, 9), max_size=30), max_size=12), st.booleans(), st.booleans())
def test_documents_are_what_lies_between_the_marks(texts, first, last):
    ids = [i for t in texts for i in [*t, 99]]
    corpus = Ids([99] * first + (ids if last else ids[:-1]))
    found = list(documents(corpus, "val", 99))
    if corpus.n_tokens["val"] > 1:
        assert [i.tolist() for _, i in found] == [t for t in texts if t]
    assert [n for n, _ in found] == list(range(len(found)))


@given(st.integers(1, 80_000), st.integers(0, 3))
@settings(max_examples=10)
def test_long_documents_are_cut_where_they_stand_whatever_the_blocks(length, before):
    ids = np.arange(length) % 90
    corpus = Ids(np.concatenate((np.full(before, 99), ids, [99, 1, 2])))
    found = [i for _, i in documents(corpus, "val", 99)]
    longest = max(4 * WINDOW, min(parts.LONG, len(corpus.ids) // 16))
    assert np.array_equal(np.concatenate(found[:-1]), ids) and found[-1].tolist() == [1, 2]
    assert [len(i) for i in found[:-2]] == [longest] * (len(found) - 2) and len(found[-2]) <= longest


def test_parts_are_halves_of_a_share_and_depend_on_the_seed():
    dealt = [part_of(i, 0, 0.5) for i in range(4000)]
    for part, expected in (("fit", 1000), ("score", 1000), (None, 2000)):
        assert abs(dealt.count(part) - expected) < 4 * expected ** 0.5
    assert dealt != [part_of(i, 1, 0.5) for i in range(4000)]
    whole = [part_of(i, 0) for i in range(4000)]
    assert set(whole) == set(PARTS)


def test_all_that_the_header_counts_adds_up():
    r, found = recorded(), truth()
    header = r.header
    for part in PARTS:
        assert header["tokens"][part] == sum(len(ids) for _, ids, _ in found[part])
        assert header["documents"][part] == len({doc for doc, _, _ in found[part]})
        assert header["windows"][part] == len(windows(part, 0))
    assert sum(header["tokens"].values()) == np.count_nonzero(world()[1].ids != BYTES.eot)
    fit = np.concatenate([ids for _, ids, _ in found["fit"]])
    assert np.array_equal(r.shared["counts"], np.bincount(fit, minlength=257))
    for site in r.sites:
        a, n = r.site(site), sum(header["tokens"].values())
        assert np.array_equal(a["hist"].sum(1), np.rint(a["density"].astype(np.float64) * n))
    assert header["checkpoint"]["kind"] == "crate" and header["checkpoint"]["sha256"] == "of a test"
    assert header["window"] == 64 and [s["name"] for s in header["sites"]] == ["L0", "L1"]


def test_a_limit_of_tokens_is_met_by_documents_from_everywhere():
    r = recorded(tokens=20_000)
    assert 12_000 < sum(r.header["tokens"].values()) < 28_000
    docs = np.concatenate([r.shared[f"uniform_{part}_doc"] for part in PARTS])
    assert docs.min() < 20 and docs.max() > 70


# ---- numbers of all tokens

@pytest.mark.parametrize("layer", [0, 1])
def test_moments_density_and_maximum_are_those_of_float64(layer):
    a = recorded().site(f"L{layer}")
    x = np.concatenate([acts[:, layer] for part in PARTS for _, _, acts in truth()[part]]).astype(np.float64)
    y = x - x.mean(0)
    with np.errstate(invalid="ignore"):
        expected = {"mean": x.mean(0), "var": x.var(0), "skew": (y ** 3).mean(0) / x.std(0) ** 3,
                    "kurtosis": (y ** 4).mean(0) / x.var(0) ** 2, "density": (x > 0).mean(0), "max": x.max(0)}
    for name, value in expected.items():
        np.testing.assert_allclose(a[name], value, rtol=2e-4, atol=1e-6, err_msg=name)
    for j in range(0, H, 7):
        counts = np.histogram(x[:, j][x[:, j] > 0], a["hist_edges"] * x[:, j].max())[0]
        off = np.abs(np.cumsum(a["hist"][j]) - np.cumsum(counts))
        assert off.max() <= 2 + 0.02 * counts.sum(), "an edge lies inside a bin at most 1.6 % wide"


@given(st.integers(1, 2 ** 31), st.floats(-30, 30), st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_moments_do_not_depend_on_how_the_tokens_are_split(seed, mean, sizes):
    x = torch.randn(sum(sizes), 5, generator=torch.Generator().manual_seed(seed)) * 0.5 + mean
    x[:, 0], x[:, 1] = 0, 3.7
    whole, split = (tally.Tally(5, 1, 0, torch.device("cpu")) for _ in range(2))
    for t, pieces in ((whole, [x]), (split, x.split(sizes))):
        for piece in pieces:
            token = torch.zeros(len(piece), dtype=torch.int64)
            t.add(piece[None], tally.Batch(None, None, token, token - 1, *[None] * 5), True)
    a, b = whole.results(), split.results()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-4, err_msg=name)
    assert np.array_equal(a["hist"], b["hist"])
    assert np.isnan(b["skew"][:2]).all() and (b["var"][:2] == 0).all()
    z = (x.double() - x.double().mean(0)).numpy()[:, 2:]
    if len(x) > 1:
        np.testing.assert_allclose(b["var"][2:], (z ** 2).mean(0), rtol=1e-4)
        np.testing.assert_allclose(b["kurtosis"][2:], (z ** 4).mean(0) / (z ** 2).mean(0) ** 2, rtol=1e-3)


@pytest.mark.parametrize("layer", [0, 1])
def test_sums_by_token_and_by_bigram(layer):
    r = recorded()
    a, shared = r.site(f"L{layer}"), r.shared
    tokens, count, sums, n = np.zeros((257, H)), {}, {}, 0
    for _, ids, acts in truth()["fit"]:
        np.add.at(tokens, ids, acts[:, layer].astype(np.float64))
        for i in range(1, len(ids)):
            pair = ids[i - 1], ids[i]
            count[pair] = count.get(pair, 0) + 1
            sums[pair] = sums.get(pair, 0) + acts[i, layer].astype(np.float64)
        n += len(ids)
    np.testing.assert_allclose(a["token_sum"], tokens, rtol=1e-4, atol=1e-4)
    pairs = [tuple(p) for p in shared["pairs"]]
    assert set(pairs) == {p for p, c in count.items() if c >= 3} and len(pairs) > 20
    assert shared["pair_counts"].tolist() == [count[p] for p in pairs] == sorted(shared["pair_counts"])[::-1]
    np.testing.assert_allclose(a["pair_sum"], np.stack([sums[p] for p in pairs]), rtol=1e-4, atol=1e-4)


def test_bigrams_are_the_most_frequent_ones_where_not_all_fit(monkeypatch):
    monkeypatch.setattr(activations, "PAIR_BYTES", 40 * 4 * 2 * H)
    model, corpus = world()
    with tempfile.TemporaryDirectory() as folder:
        few = record(model, META, activations.sites(model), corpus, folder, dtype="float32", log=quiet).shared
        assert np.array_equal(few["pairs"], recorded().shared["pairs"][:40])
        assert np.array_equal(few["pair_counts"], recorded().shared["pair_counts"][:40])


# ---- windows

@pytest.mark.parametrize("dedup", [True, False])
@pytest.mark.parametrize("part", PARTS)
def test_top_windows_are_those_of_brute_force(part, dedup):
    for layer in (0, 1):
        a, found = recorded(dedup=dedup).site(f"L{layer}"), windows(part, layer)
        peaks = np.stack([acts.max(0) for _, _, acts in found])                         # (W, h)
        for j in range(H):
            order, docs = [], set()
            for i in np.argsort(-peaks[:, j], kind="stable"):
                if peaks[i, j] > 0 and not (dedup and found[i][0] in docs) and len(order) < 36:
                    order.append(i)
                    docs.add(found[i][0])
            got = a[f"top_{part}_acts"][j].max(1)
            np.testing.assert_allclose(got[:len(order)], peaks[order, j], rtol=1e-3, atol=1e-6)
            assert (np.diff(got) <= 0).all() and (a[f"top_{part}_doc"][j, len(order):] == -1).all()
            for k, i in enumerate(order):
                if np.isclose(peaks[:, j], peaks[i, j], rtol=1e-4).sum() == 1:          # no near tie
                    doc, tokens, acts = found[i]
                    assert a[f"top_{part}_doc"][j, k] == doc
                    assert np.array_equal(a[f"top_{part}_tokens"][j, k], tokens)
                    np.testing.assert_allclose(a[f"top_{part}_acts"][j, k], acts[:, j], rtol=1e-3, atol=1e-4)
                    assert acts[a[f"top_{part}_at"][j, k], j] >= acts[:, j].max() * (1 - 1e-4)


@given(st.integers(0, 2 ** 31), st.integers(1, 5), st.booleans(), st.integers(1, 6))
def test_top_does_not_depend_on_batches_nor_on_the_order_of_documents(seed, k, dedup, per_batch):
    rng = np.random.default_rng(seed)
    docs = rng.integers(0, 6, 17)
    x = torch.from_numpy(np.maximum(rng.normal(-1.5, 1, (17, WINDOW, 3)), 0).astype(np.float16)).float()
    top = tally.Top(3, k, dedup, torch.device("cpu"))
    for rows in torch.arange(17).split(per_batch):
        zero = torch.zeros(len(rows), dtype=torch.int64)
        tokens = torch.zeros(len(rows), WINDOW + 1, dtype=torch.int32)
        top.offer(x[rows], tally.Batch(None, None, None, None, torch.arange(len(rows)), zero,
                                       torch.from_numpy(docs[rows.numpy()]), tokens, []))
    got, peaks = top.results("fit"), x.amax(1).numpy()
    for j in range(3):
        best = sorted((peaks[i, j] for i in range(17) if peaks[i, j] > 0), reverse=True)
        if dedup:
            best = sorted((v for d in set(docs) if (v := peaks[docs == d, j].max()) > 0), reverse=True)
        acts = got["top_fit_acts"][j].astype(np.float32).max(1)
        assert acts[acts > 0].tolist() == best[:k]
        known = got["top_fit_doc"][j][got["top_fit_doc"][j] >= 0]
        assert not dedup or len(set(known)) == len(known)


def test_windows_stay_in_their_document_and_activations_are_those_of_their_tokens():
    r = recorded()
    for part in PARTS:
        for layer in (0, 1):
            known = {(doc, tuple(tokens)): acts for doc, tokens, acts in windows(part, layer)}
            uniform = r.site(f"L{layer}")[f"uniform_{part}_acts"]
            drawn = list(zip(r.shared[f"uniform_{part}_doc"], r.shared[f"uniform_{part}"], uniform))
            assert len(drawn) == min(activations.UNIFORM[part], len(known))
            for doc, tokens, acts in drawn:
                np.testing.assert_allclose(acts, known[doc, tuple(tokens)], rtol=1e-3, atol=1e-4)
            assert len({(doc, tuple(tokens)) for doc, tokens, _ in drawn}) == len(drawn), "without repetition"


def test_uniform_windows_are_drawn_uniformly():
    """Chi-square of how often each of 40 windows is among 10 drawn, 600 seeds; and parts draw apart."""
    pairs, times, both = np.empty((0, 2), np.int64), np.zeros(40), 0
    for seed in range(600):
        shared = tally.Shared(np.zeros(9), pairs, 9, {"fit": (10, 40), "score": (10, 40)}, seed,
                              torch.device("cpu"))
        times += np.isin(np.arange(40), shared.ordinals["fit"])
        both += len(np.intersect1d(shared.ordinals["fit"], shared.ordinals["score"]))
    chi = ((times - 150) ** 2 / (150 * 30 / 40)).sum()
    assert 15 < chi < 73, "0.1 % and 99.9 % points of 39 degrees of freedom, scaled by n / (n - 1)"
    assert abs(both / 600 - 2.5) < 0.25, "10 of 40, twice: 2.5 in common by chance"


def test_another_drawing_for_one_part_leaves_the_other():
    def ordinals(score):
        windows = {"fit": (10, 40), "score": score}
        pairs = np.empty((0, 2), np.int64)
        return tally.Shared(np.zeros(9), pairs, 9, windows, 3, torch.device("cpu")).ordinals
    assert np.array_equal(ordinals((10, 40))["fit"], ordinals((30, 900))["fit"])


# ---- sites, other models

def test_sites_of_features_and_of_other_kinds_of_models(tmp_path):
    for kind in ("gpt2", "crate+"):
        model, corpus = world(kind)
        ours = activations.sites(model, "1")
        twice = activations.Site("L1.sae-twice", 1, 2 * H, lambda x: torch.cat((x, x - 0.1), 1), "a.pt")
        r = record(model, META, [*ours, twice], corpus, tmp_path / kind, dtype="float32", log=quiet)
        codes, features = r.site("L1"), r.site("L1.sae-twice")
        for name in ("mean", "max", "density", "top_fit_acts", "uniform_score_acts", "hist"):
            axis = 2 if name.startswith("uniform") else 0
            same, shifted = np.split(features[name], 2, axis)
            assert np.array_equal(same, codes[name]), name
            assert not np.array_equal(shifted, codes[name])
        assert r.header["checkpoint"]["kind"] == kind
        assert r.header["sites"][1] == {"name": "L1.sae-twice", "layer": 1, "width": 2 * H, "sae": "a.pt"}


def test_an_untrained_model_sees_the_same_documents_and_windows(tmp_path):
    model, corpus = world()
    state = torch.random.get_rng_state()
    fresh, meta = activations.untrained(model, META)
    assert torch.equal(state, torch.random.get_rng_state()) and not fresh.training
    again = activations.untrained(model, META)[0]
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), again.parameters()))
    r = record(fresh, meta, activations.sites(fresh), corpus, tmp_path, dtype="float32", log=quiet)
    for name in ("counts", "pairs", "pair_counts", "uniform_fit", "uniform_score", "uniform_score_doc"):
        assert np.array_equal(r.shared[name], recorded().shared[name]), name
    assert not np.allclose(r.site("L0")["mean"], recorded().site("L0")["mean"])
    assert r.header["checkpoint"]["sha256"] is None and r.header["checkpoint"]["training"]["step"] == 0


# ---- files

def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    model, corpus = world()
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        record(model, META, activations.sites(model, "0"), corpus, tmp_path / name, seed=seed,
               dtype="float32", log=quiet)
    a, b, c = (files(tmp_path / name) for name in "abc")
    assert list(a) == ["record-L0.npz", "record-shared.npz", "record.json"]
    header, again = (json.loads(f.pop("record.json")) for f in (a, b))
    assert a == b and {**header, "seconds": 0} == {**again, "seconds": 0}
    assert a["record-L0.npz"] != c["record-L0.npz"]


def test_a_record_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    model, corpus = world()
    args = model, META, activations.sites(model, "0"), corpus, tmp_path
    record(*args, dtype="float32", log=quiet)
    before, write = files(tmp_path), np.lib.format.write_array

    def full(file, array, **kwargs):
        if array.ndim == 3:
            raise OSError(28, "No space left on device")
        write(file, array, **kwargs)
    monkeypatch.setattr(np.lib.format, "write_array", full)
    with pytest.raises(UserError, match="No space left"):
        record(*args, seed=1, dtype="float32", log=quiet)
    assert files(tmp_path) == before
    monkeypatch.undo()
    assert load(tmp_path).site("L0")["max"].shape == (H,)


def test_files_that_do_not_fit_are_refused(tmp_path):
    model, corpus = world()
    with pytest.raises(UserError, match="holds no record"):
        load(tmp_path)
    for name, seed in (("a", 0), ("b", 1)):
        record(model, META, activations.sites(model, "0"), corpus, tmp_path / name, seed=seed,
               dtype="float32", log=quiet)
    with pytest.raises(UserError, match="no record of 'L7', only of L0"):
        load(tmp_path / "a").site("L7")
    (tmp_path / "a" / "record-L0.npz").write_bytes((tmp_path / "b" / "record-L0.npz").read_bytes())
    with pytest.raises(UserError, match="another run"):
        load(tmp_path / "a").site("L0")
    path = tmp_path / "b" / "record-L0.npz"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="damaged"):
        load(tmp_path / "b").site("L0")
    path.unlink()
    with pytest.raises(UserError, match="Cannot read"):
        load(tmp_path / "b").site("L0")
    header = tmp_path / "b" / "record.json"
    header.write_text(header.read_text().replace('"schema": 1', '"schema": 9'))
    with pytest.raises(UserError, match="schema 9"):
        load(tmp_path / "b")


def test_what_cannot_be_recorded_is_told_in_one_sentence(tmp_path, monkeypatch):
    model, corpus = world()
    with pytest.raises(UserError, match="layer '2' is not there; the model's layers are 0 to 1"):
        activations.sites(model, "0,2")
    assert [s.name for s in activations.sites(model, "1, 0")] == ["L0", "L1"]

    def attempt(corpus, model=model, **changes):
        record(model, META, activations.sites(model), corpus, tmp_path / "none", dtype="float32", log=quiet,
               **changes)
    short = Ids(np.tile([*range(60), BYTES.eot], 50))
    for bad in (short, Ids(np.arange(50)), Ids(np.zeros(1, int)), Ids(np.zeros(0, int))):
        with pytest.raises(UserError, match="none of which has 64 tokens"):
            attempt(bad)
    narrow = LM(replace(model.config, block_size=32)).eval()
    with pytest.raises(UserError, match="context of 32 tokens is shorter"):
        attempt(corpus, narrow)
    with pytest.raises(UserError, match="no folder|Cannot make|Not a directory|exists"):
        (tmp_path / "file").write_text("")
        record(model, META, activations.sites(model), corpus, tmp_path / "file", dtype="float32", log=quiet)
    monkeypatch.setattr(activations.machine, "total_memory", lambda device: 1 << 20)
    with pytest.raises(UserError, match="GB of memory"):
        attempt(corpus)
    assert not (tmp_path / "none").exists()


def test_memory_does_not_grow_with_the_corpus(monkeypatch):
    """Tokens held at a time, and different bigrams counted, stay the same for a corpus ten times as long."""
    rng, held, keys = np.random.default_rng(0), [], []
    monkeypatch.setattr(parts, "KEYS", 2000)
    monkeypatch.setattr(parts, "LONG", 700)
    even, merge = parts._even, parts._merge

    def watch_even(chunks, tokens):
        held.append(sum(len(ids) for _, ids, _ in chunks))
        return even(chunks, tokens)

    def watch_merge(known, times, fresh):
        out = merge(known, times, fresh)
        keys.append(len(out[0]) + sum(len(ids) for ids in fresh))
        return out
    monkeypatch.setattr(parts, "_even", watch_even)
    monkeypatch.setattr(parts, "_merge", watch_merge)
    peaks = []
    for n in (30_000, 300_000):
        ids = rng.integers(0, 255, n)
        ids[rng.integers(0, n, n // 400)] = 256
        p = Parts(Ids(ids), "val", 256, 128, 0, n)
        counts, _, _ = p.survey(257, 100)
        rows = sum(len(c[1]) for part in PARTS for chunks in p.batches(part, 512) for c in chunks)
        assert rows == sum(counts["tokens"].values()) == np.count_nonzero(ids != 256)
        peaks.append((max(held), max(keys)))
    assert peaks[1][0] <= 16 * 512 + 128 and peaks[1][1] <= 2000 + 2000 // 4 + 700


# ---- selection

PROTOCOLS = list(excerpts.CHOOSE)


@given(st.sampled_from(PROTOCOLS), st.sampled_from(["L0", "L1"]), st.integers(0, H - 1), st.integers(0, 99))
@settings(max_examples=60)
def test_excerpts_are_honest(protocol, site, j, seed):
    """No document on both sides; every excerpt is text of its document with the activations it had there."""
    r = recorded()
    both = excerpts.select(r, site, protocol, j, seed)
    assert not set(both[0].doc) & set(both[1].doc)
    for part, e in zip(PARTS, both):
        n, w = e.acts.shape
        assert e.tokens.shape == (n, w + 1) and len(e.doc) == len(e.at) == len(e.origin) == n
        real = e.tokens[:, 1:] >= 0
        assert np.array_equal(real, ~np.isnan(e.acts)) and e.acts.dtype == np.float32
        chunks = {}
        for doc, ids, acts in truth()[part]:
            chunks.setdefault(doc, []).append((ids, acts[:, int(site[1]), j]))
        for tokens, acts, doc, text in zip(e.tokens, e.acts, e.doc, real):
            m = text.sum()
            assert any(np.allclose(acts[:m], there[s:s + m], rtol=1e-3, atol=1e-4)
                       and (ids[s - 1] if s else -1) == tokens[0]
                       for ids, there in chunks[doc] for s in range(len(ids) - m + 1)
                       if np.array_equal(ids[s:s + m], tokens[1:1 + m]))
        assert np.isfinite(e.acts[real]).all()


def test_numbers_of_excerpts_are_those_of_the_protocols():
    r = recorded()
    dense = int(np.argmax(r.site("L0")["density"]))
    sizes = {"uniform": None, "openai_tar": (5, 10), "openai_random": (5, 5), "anthropic_crate": (42, None)}
    for protocol, expected in sizes.items():
        fit, score = excerpts.select(r, "L0", protocol, dense)
        if expected:
            assert len(fit.acts) == expected[0] and expected[1] in (None, len(score.acts)), protocol
    fit, score = excerpts.select(r, "L0", "uniform", dense)
    assert np.array_equal(score.acts, r.site("L0")["uniform_score_acts"][:, :, dense].astype(np.float32))
    assert fit.acts.shape[1] == 64
    top = sum(o == "top" for o in excerpts.select(r, "L0", "openai_tar", dense)[1].origin)
    assert top == 5
    with pytest.raises(UserError, match="protocol 'bogus' is unknown"):
        excerpts.select(r, "L0", "bogus", 0)
    with pytest.raises(UserError, match="no neuron 64"):
        excerpts.select(r, "L0", "uniform", 64)


@given(st.integers(0, H - 1), st.integers(0, 50))
def test_openai_random_is_half_of_openai_tar_and_seeds_decide(j, seed):
    r = recorded()
    tar, random = (excerpts.select(r, "L1", f"openai_{name}", j, seed)[1] for name in ("tar", "random"))
    mine = [i for i, origin in enumerate(tar.origin) if origin == "random"]
    assert np.array_equal(tar.tokens[mine], random.tokens) and np.array_equal(tar.acts[mine], random.acts)
    again = excerpts.select(r, "L1", "openai_tar", j, seed)[1]
    assert np.array_equal(again.tokens, tar.tokens) and again.origin == tar.origin
    assert len({excerpts.select(r, "L1", "openai_random", j, s)[1].doc.tobytes() for s in range(9)}) > 1


class Planted:
    """A record of one site made by hand: uniform windows with given activations, top windows of one kind."""

    def __init__(self, uniform, top=36, peak=1.0):
        n, rng = len(uniform), np.random.default_rng(0)
        self.shared, self.arrays = {}, {"max": np.array([peak])}
        for i, part in enumerate(PARTS):
            self.shared[f"uniform_{part}"] = rng.integers(0, 20, (n, 65))
            self.shared[f"uniform_{part}"][:n // 2] = 7     # drawn for all, they are top windows of this one
            self.shared[f"uniform_{part}_doc"] = np.arange(n) + 1000 * i
            acts = np.zeros((1, 36, 64), np.float16)
            acts[0, :top, 10] = peak * (1 - np.arange(top) / 1000)
            doc = np.where(np.arange(36) < top, 500 + 1000 * i + np.arange(36), -1)
            self.arrays |= {f"uniform_{part}_acts": uniform[..., None], f"top_{part}_acts": acts,
                            f"top_{part}_tokens": np.full((1, 36, 65), 7), f"top_{part}_doc": doc[None],
                            f"top_{part}_at": np.full((1, 36), 10)}

    def site(self, name):
        return self.arrays


def test_intervals_hold_the_ranks_and_the_values_they_name():
    rng = np.random.default_rng(1)
    values = rng.permutation(np.linspace(0, 1, 30 * 64)).reshape(30, 64).astype(np.float32)
    for protocol, steps, tops in (("anthropic_crate", 12, (15, 10)), ("anthropic_2023", 13, (10, 6))):
        pair = excerpts.select(Planted(values), "L0", protocol, 0)
        assert [len(e.acts) for e in pair] == ([42, 47] if steps == 12 else [49, 60])
        for e, top in zip(pair, tops):
            at = e.acts[np.arange(len(e.at)), e.at]
            for i in range(steps - 1):
                mine = at[[k for k, origin in enumerate(e.origin) if origin == f"interval {i}"]]
                assert len(mine) == 2 and (mine >= i / steps - 1e-3).all()
                assert (mine <= (i + 1) / steps + 1e-3).all()
            assert f"interval {steps - 1}" not in e.origin and e.origin.count("top") == top
            assert e.origin[:top] == ["top"] * top and (at[:top] > 0.9).all()
    fit, score = excerpts.select(Planted(values), "L0", "anthropic_crate", 0)
    np.testing.assert_allclose(score.acts[:10].max(1), 1 - np.arange(15, 25) / 1000, rtol=1e-3)
    lonely = [i for i, origin in enumerate(score.origin) if origin == "out of context"]
    assert ((score.tokens[lonely, 1:] >= 0).sum(1) == 3).all() and (score.at[lonely] == 1).all()
    np.testing.assert_allclose(score.acts[lonely, 1], 1 - np.arange(25, 35) / 1000, rtol=1e-3)
    fit, score = excerpts.select(Planted(values), "L0", "anthropic_2023", 0)
    elsewhere = [i for i, origin in enumerate(score.origin) if origin == "out of context"]
    assert not (score.tokens[elsewhere] == 7).all(1).any(), "the context of the top windows themselves"
    assert (score.tokens[elsewhere, 1 + score.at[elsewhere]] == 7).all() and len(elsewhere) == 20


def test_sparse_and_dead_neurons_give_what_there_is_and_ties_fall_at_random():
    values = np.zeros((30, 64), np.float32)
    values[3, 40] = 0.5
    fit, score = excerpts.select(Planted(values, top=2), "L0", "anthropic_2023", 0)
    assert score.origin.count("top") == 2
    assert [o for o in score.origin if o.startswith("interval")] == ["interval 6"]      # 0.5 of 1 in 13 steps
    assert score.acts[score.origin.index("interval 6"), score.at[score.origin.index("interval 6")]] == 0.5
    quiet_ones = [i for i, o in enumerate(score.origin) if o == "random"]
    assert len(quiet_ones) == 10 and score.acts[quiet_ones].max() in (0, 0.5)
    dead = Planted(np.zeros((30, 64), np.float32), top=0, peak=0.0)
    for protocol in PROTOCOLS:
        fit, score = excerpts.select(dead, "L0", protocol, 0)
        assert "top" not in fit.origin + score.origin and not np.nan_to_num(score.acts).any()
    assert excerpts.select(dead, "L0", "openai_random", 0)[0].acts.shape == (0, 64)
    drawn = [excerpts.select(dead, "L0", "anthropic_crate", 0, seed)[0].doc for seed in range(40)]
    first = np.concatenate([doc[:2] for doc in drawn])          # of the lowest ranks: all 30 windows alike
    assert len(set(first)) > 15


def test_the_draw_of_one_part_does_not_depend_on_the_other():
    values = np.random.default_rng(2).random((30, 64)).astype(np.float32)
    one, two = Planted(values), Planted(values)
    two.arrays["uniform_score_acts"] = two.arrays["uniform_score_acts"][:9] * 0.5
    for name in ("uniform_score", "uniform_score_doc"):
        two.shared[name] = two.shared[name][:9]
    for protocol in PROTOCOLS:
        a, b = (excerpts.select(r, "L0", protocol, 0) for r in (one, two))
        assert np.array_equal(a[0].tokens, b[0].tokens) and np.array_equal(a[0].doc, b[0].doc)
        assert not np.array_equal(a[1].doc, b[1].doc)
    fit, score = excerpts.select(one, "L0", "anthropic_crate", 0)       # as many intervals of equal values
    drawn = [e.doc[[o.startswith("interval") for o in e.origin]] % 1000 for e in (fit, score)]
    assert np.mean(drawn[0] == drawn[1]) < 0.5


@pytest.mark.parametrize("at", [0, 2, 61, 63])
def test_excerpts_move_to_stay_in_their_window(at):
    values = np.zeros((3, 64), np.float32)
    planted = Planted(values)
    for part in PARTS:
        planted.arrays[f"top_{part}_at"][:] = at
        planted.arrays[f"top_{part}_acts"][:] = 0
        planted.arrays[f"top_{part}_acts"][0, :, at] = 1
    fit, score = excerpts.select(planted, "L0", "anthropic_crate", 0)
    assert (fit.acts[np.arange(15), fit.at[:15]] == 1).all() and fit.acts.shape[1] == 8
    assert (score.acts[-10:][np.arange(10), score.at[-10:]] == 1).all()


def test_documents_of_a_corpus_on_disk(tmp_path):
    texts = [f"{i}: " + text(np.random.default_rng(i), 200) for i in range(150)]
    (tmp_path / "t.txt").write_text(END.join(texts), encoding="utf-8")
    corpus = data.open_corpus(str(tmp_path / "t.txt"), BYTES, tmp_path / "cache", log=quiet)
    found = [BYTES.decode(ids.tolist()) for split in ("train", "val")
             for _, ids in documents(corpus, split, BYTES.eot)]
    assert sorted(found) == sorted(t.strip("\n") for t in texts)
    with pytest.raises(UserError):
        record(world()[0], META, activations.sites(world()[0]), corpus, tmp_path / "out", tokens=0, log=quiet)

"""A record says of every neuron what brute force says; the two parts and their documents never meet."""

import json
import tempfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from little_world import BYTES, META, H, Ids, quiet, recorded, text, truth, windows, world

from crate_mini import UserError
from crate_mini.data import batches as data
from crate_mini.data.formats import END
from crate_mini.model import LM
from crate_mini.neurons import accumulate as tally
from crate_mini.neurons import documents as parts
from crate_mini.neurons import record as activations
from crate_mini.neurons.documents import PARTS, WINDOW, Parts, part_of
from crate_mini.neurons.record import documents, load, record

# ---- documents and parts


@given(
    st.lists(st.lists(st.integers(0, 9), max_size=30), max_size=12), st.booleans(), st.booleans()
)
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
    assert [len(i) for i in found[:-2]] == [longest] * (len(found) - 2) and len(
        found[-2]
    ) <= longest


def test_documents_of_a_corpus_on_disk(tmp_path):
    texts = [f"{i}: " + text(np.random.default_rng(i), 200) for i in range(150)]
    (tmp_path / "t.txt").write_text(END.join(texts), encoding="utf-8")
    corpus = data.open_corpus(str(tmp_path / "t.txt"), BYTES, tmp_path / "cache", log=quiet)
    found = [
        BYTES.decode(ids.tolist())
        for split in ("train", "val")
        for _, ids in documents(corpus, split, BYTES.eot)
    ]
    assert sorted(found) == sorted(t.strip("\n") for t in texts)
    with pytest.raises(UserError):
        record(
            world()[0],
            META,
            activations.sites(world()[0]),
            corpus,
            tmp_path / "out",
            tokens=0,
            log=quiet,
        )


def test_parts_are_halves_of_a_share_and_depend_on_the_seed():
    dealt = [part_of(i, 0, 0.5) for i in range(4000)]
    for part, expected in (("fit", 1000), ("score", 1000), (None, 2000)):
        assert abs(dealt.count(part) - expected) < 4 * expected**0.5
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
    x = np.concatenate([acts[:, layer] for part in PARTS for _, _, acts in truth()[part]]).astype(
        np.float64
    )
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
        np.testing.assert_allclose(a[name], value, rtol=2e-4, atol=1e-6, err_msg=name)
    for j in range(0, H, 7):
        counts = np.histogram(x[:, j][x[:, j] > 0], a["hist_edges"] * x[:, j].max())[0]
        off = np.abs(np.cumsum(a["hist"][j]) - np.cumsum(counts))
        assert off.max() <= 2 + 0.02 * counts.sum(), "an edge lies inside a bin at most 1.6 % wide"


@given(
    st.integers(1, 2**31), st.floats(-30, 30), st.lists(st.integers(1, 40), min_size=1, max_size=8)
)
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
        np.testing.assert_allclose(b["var"][2:], (z**2).mean(0), rtol=1e-4)
        np.testing.assert_allclose(
            b["kurtosis"][2:], (z**4).mean(0) / (z**2).mean(0) ** 2, rtol=1e-3
        )


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
    assert (
        shared["pair_counts"].tolist()
        == [count[p] for p in pairs]
        == sorted(shared["pair_counts"])[::-1]
    )
    np.testing.assert_allclose(
        a["pair_sum"], np.stack([sums[p] for p in pairs]), rtol=1e-4, atol=1e-4
    )


def test_bigrams_are_the_most_frequent_ones_where_not_all_fit(monkeypatch):
    monkeypatch.setattr(activations, "PAIR_BYTES", 40 * 4 * 2 * H)
    model, corpus = world()
    with tempfile.TemporaryDirectory() as folder:
        few = record(
            model, META, activations.sites(model), corpus, folder, dtype="float32", log=quiet
        ).shared
        assert np.array_equal(few["pairs"], recorded().shared["pairs"][:40])
        assert np.array_equal(few["pair_counts"], recorded().shared["pair_counts"][:40])


# ---- windows


@pytest.mark.parametrize("dedup", [True, False])
@pytest.mark.parametrize("part", PARTS)
def test_top_windows_are_those_of_brute_force(part, dedup):
    for layer in (0, 1):
        a, found = recorded(dedup=dedup).site(f"L{layer}"), windows(part, layer)
        peaks = np.stack([acts.max(0) for _, _, acts in found])  # (W, h)
        for j in range(H):
            order, docs = [], set()
            for i in np.argsort(-peaks[:, j], kind="stable"):
                if peaks[i, j] > 0 and not (dedup and found[i][0] in docs) and len(order) < 36:
                    order.append(i)
                    docs.add(found[i][0])
            got = a[f"top_{part}_acts"][j].max(1)
            np.testing.assert_allclose(got[: len(order)], peaks[order, j], rtol=1e-3, atol=1e-6)
            assert (np.diff(got) <= 0).all() and (a[f"top_{part}_doc"][j, len(order) :] == -1).all()
            for k, i in enumerate(order):
                if np.isclose(peaks[:, j], peaks[i, j], rtol=1e-4).sum() == 1:  # no near tie
                    doc, tokens, acts = found[i]
                    assert a[f"top_{part}_doc"][j, k] == doc
                    assert np.array_equal(a[f"top_{part}_tokens"][j, k], tokens)
                    np.testing.assert_allclose(
                        a[f"top_{part}_acts"][j, k], acts[:, j], rtol=1e-3, atol=1e-4
                    )
                    assert acts[a[f"top_{part}_at"][j, k], j] >= acts[:, j].max() * (1 - 1e-4)


@given(st.integers(0, 2**31), st.integers(1, 5), st.booleans(), st.integers(1, 6))
def test_top_does_not_depend_on_batches_nor_on_the_order_of_documents(seed, k, dedup, per_batch):
    rng = np.random.default_rng(seed)
    docs = rng.integers(0, 6, 17)
    x = torch.from_numpy(
        np.maximum(rng.normal(-1.5, 1, (17, WINDOW, 3)), 0).astype(np.float16)
    ).float()
    top = tally.Top(3, k, dedup, torch.device("cpu"))
    for rows in torch.arange(17).split(per_batch):
        zero = torch.zeros(len(rows), dtype=torch.int64)
        tokens = torch.zeros(len(rows), WINDOW + 1, dtype=torch.int32)
        top.offer(
            x[rows],
            tally.Batch(
                None,
                None,
                None,
                None,
                torch.arange(len(rows)),
                zero,
                torch.from_numpy(docs[rows.numpy()]),
                tokens,
                [],
            ),
        )
    got, peaks = top.results("fit"), x.amax(1).numpy()
    for j in range(3):
        best = sorted((peaks[i, j] for i in range(17) if peaks[i, j] > 0), reverse=True)
        if dedup:
            best = sorted(
                (v for d in set(docs) if (v := peaks[docs == d, j].max()) > 0), reverse=True
            )
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
            assert len({(doc, tuple(tokens)) for doc, tokens, _ in drawn}) == len(drawn), (
                "without repetition"
            )


def test_uniform_windows_are_drawn_uniformly():
    """Chi-square of how often each of 40 windows is among 10 drawn, 600 seeds; and parts draw apart."""
    pairs, times, both = np.empty((0, 2), np.int64), np.zeros(40), 0
    for seed in range(600):
        shared = tally.Shared(
            np.zeros(9), pairs, 9, {"fit": (10, 40), "score": (10, 40)}, seed, torch.device("cpu")
        )
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
        twice = activations.Site(
            "L1.sae-twice", 1, 2 * H, lambda x: torch.cat((x, x - 0.1), 1), "a.pt"
        )
        r = record(model, META, [*ours, twice], corpus, tmp_path / kind, dtype="float32", log=quiet)
        codes, features = r.site("L1"), r.site("L1.sae-twice")
        for name in ("mean", "max", "density", "top_fit_acts", "uniform_score_acts", "hist"):
            axis = 2 if name.startswith("uniform") else 0
            same, shifted = np.split(features[name], 2, axis)
            assert np.array_equal(same, codes[name]), name
            assert not np.array_equal(shifted, codes[name])
        assert r.header["checkpoint"]["kind"] == kind
        assert r.header["sites"][1] == {
            "name": "L1.sae-twice",
            "layer": 1,
            "width": 2 * H,
            "sae": "a.pt",
        }


def test_an_untrained_model_sees_the_same_documents_and_windows(tmp_path):
    model, corpus = world()
    state = torch.random.get_rng_state()
    fresh, meta = activations.untrained(model, META)
    assert torch.equal(state, torch.random.get_rng_state()) and not fresh.training
    again = activations.untrained(model, META)[0]
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), again.parameters()))
    r = record(fresh, meta, activations.sites(fresh), corpus, tmp_path, dtype="float32", log=quiet)
    for name in (
        "counts",
        "pairs",
        "pair_counts",
        "uniform_fit",
        "uniform_score",
        "uniform_score_doc",
    ):
        assert np.array_equal(r.shared[name], recorded().shared[name]), name
    assert not np.allclose(r.site("L0")["mean"], recorded().site("L0")["mean"])
    assert (
        r.header["checkpoint"]["sha256"] is None and r.header["checkpoint"]["training"]["step"] == 0
    )


# ---- files


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    model, corpus = world()
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        record(
            model,
            META,
            activations.sites(model, "0"),
            corpus,
            tmp_path / name,
            seed=seed,
            dtype="float32",
            log=quiet,
        )
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
        record(
            model,
            META,
            activations.sites(model, "0"),
            corpus,
            tmp_path / name,
            seed=seed,
            dtype="float32",
            log=quiet,
        )
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
        record(
            model,
            META,
            activations.sites(model),
            corpus,
            tmp_path / "none",
            dtype="float32",
            log=quiet,
            **changes,
        )

    short = Ids(np.tile([*range(60), BYTES.eot], 50))
    for bad in (short, Ids(np.arange(50)), Ids(np.zeros(1, int)), Ids(np.zeros(0, int))):
        with pytest.raises(UserError, match="none of which has 64 tokens"):
            attempt(bad)
    narrow = LM(replace(model.config, block_size=32)).eval()
    with pytest.raises(UserError, match="context of 32 tokens is shorter"):
        attempt(corpus, narrow)
    with pytest.raises(UserError, match="no folder|Cannot make|Not a directory|exists"):
        (tmp_path / "file").write_text("")
        record(
            model,
            META,
            activations.sites(model),
            corpus,
            tmp_path / "file",
            dtype="float32",
            log=quiet,
        )
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

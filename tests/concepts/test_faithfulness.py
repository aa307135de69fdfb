"""Words, salience, cuts and probes: each against what it must be by definition, and on planted concepts."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crate_mini import UserError, model
from crate_mini.concepts import ablate, faithfulness, members, probe, salience
from crate_mini.concepts import word_vectors as states
from crate_mini.concepts.classifier import Classifier, encode
from crate_mini.concepts.types import SPLITS, Codes, Vectors
from crate_mini.data import batches as data

D, TEXTS = (
    32,
    ["It's a fine, fine film!", "one", "never  seen\nsuch a thing before; not at all (2 of 10)"],
)


@pytest.fixture(scope="module", params=["crate", "gpt2", "crate+"])
def small(request):
    """(Classifier, tokenizer) of three blocks with weights large enough to matter, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = model.LM(model.preset("3L", request.param, n_embd=D, block_size=64, vocab_size=512))
        for w in lm.parameters():
            w.data = w.data + 0.05 * torch.randn_like(w)
    found = (
        Classifier(lm, 3, torch.Generator().manual_seed(1)).double().eval().requires_grad_(False)
    )
    found.head.weight.mul_(30)
    return found, data.load_tokenizer("pydocs:511")


# ---- words -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", ["start", "end"])
@pytest.mark.parametrize("length", [7, 40])
def test_words_are_read_as_the_classifier_reads(small, cut, length):
    tokenizer = small[1]
    text, (ids, lengths) = (
        states.read(tokenizer, TEXTS, length, cut),
        encode(tokenizer, TEXTS, length, cut),
    )
    assert torch.equal(text.ids, ids) and torch.equal(text.lengths, lengths)
    assert "\n" not in "".join(text.words[2]) and "" not in text.words[2]
    for s in range(3):
        at, number = text.ends(s)
        assert number.tolist() == list(
            range(len(text.words[s]))
        )  # no word that the classifier misses
        for end, word in zip(at, text.words[s]):
            own = np.flatnonzero(text.number[s] == text.number[s, end])
            read = tokenizer.decode(text.ids[s, own].tolist()).strip()
            assert end == own[-1] and (read == word or read in word and end in (at[0], at[-1]))
    if length == 40:
        assert text.words[0] == ["It", "'s", "a", "fine", ",", "fine", "film", "!"]


def labelled(n=60):
    """Texts of two classes; "rare" stands in one training text."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["red", "blue", "green", "tea"], 6)) for _ in range(n)]
    texts[0] += " rare"
    split = np.arange(n) % 5
    return SimpleNamespace(
        texts=texts,
        label=np.arange(n) % 2,
        classes=["a", "b"],
        split=np.where(split == 4, 2, np.where(split == 3, 1, 0)),
        facts={},
    )


def test_vectors_hold_the_states_and_follow_the_filter(small):
    found, (lm, tokenizer) = labelled(), small
    text = states.read(tokenizer, found.texts, 40, "start")
    v = states.vectors(lm, text, found, (1, 3), least=2, most=5)
    counts = {split: {} for split in SPLITS}
    for s, word in zip(v.sentence, v.word):
        name = next(k for k, i in SPLITS.items() if i == v.split[s])
        counts[name][v.vocabulary[word]] = counts[name].get(v.vocabulary[word], 0) + 1
    assert "rare" not in counts["train"] and set(counts["train"].values()) == {5}
    assert set(counts["stop"].values()) == {5}
    for s in np.flatnonzero(found.split == SPLITS["test"]):  # every word of every test text
        assert [v.vocabulary[w] for w in v.word[v.sentence == s]] == text.words[s]
    whole = lm.states(text.ids)
    for i in range(0, len(v.word), 37):
        s, end = v.sentence[i], text.ends(v.sentence[i])[0][v.position[i]]
        np.testing.assert_allclose(v.lower[i], whole[1, s, end], atol=1e-5)
        np.testing.assert_allclose(v.upper[i], whole[3, s, end], atol=1e-5)
    some = np.flatnonzero(found.split == SPLITS["test"])[[0, 2, 5]]
    few = states.vectors(lm, text, found, (1, 3), least=2, most=5, tests=some)
    assert set(few.sentence[few.rows("test")]) == set(some)
    with pytest.raises(UserError, match="layers 2,1 are not there"):
        states.vectors(lm, text, found, (2, 1))
    with pytest.raises(UserError, match="no word occurs 99 times"):
        states.vectors(lm, text, found, (1, 3), least=99)


# ---- salience --------------------------------------------------------------------------------------------


def test_attributions_are_complete(small):
    lm, tokenizer = small
    ids, lengths = encode(tokenizer, TEXTS, 40, "start")
    for layer in (1, 2):
        errors = []
        for nodes in (2, 256):
            by_token, predicted, difference = salience.attributions(lm, ids, lengths, layer, nodes)
            errors.append((by_token.sum(1) - difference).abs().max() / difference.abs().mean())
        assert errors[1] < 0.01 and (errors[1] < errors[0] or errors[0] < 1e-6)
        base = lm(torch.full_like(ids, tokenizer.eot), lengths)
        want = (lm(ids, lengths) - base).gather(1, predicted[:, None])[:, 0]
        torch.testing.assert_close(difference, want)
        assert all((row[n:] == 0).all() for row, n in zip(by_token, lengths))  # nothing at padding


def test_the_salient_word_is_the_one_that_is_read():
    """A linear classifier without blocks: the attribution is the logit's own term."""
    lm = model.LM(model.preset("1L", n_embd=8, n_head=2, block_size=16, vocab_size=300))
    found = Classifier(lm, 2).eval().requires_grad_(False)
    found.onward = lambda z, layer, lengths: (
        torch.stack([z[..., 0].sum(1), -z[..., 0].sum(1)], 1),
        None,
    )
    text = states.read(data.load_tokenizer("bytes"), ["a b c", "  ", "b e b d"], 10, "start")
    with torch.no_grad():
        lm.tokens.weight.zero_()
        lm.positions.weight.zero_()
        lm.tokens.weight[ord("b"), 0], lm.tokens.weight[ord("d"), 0] = 2.0, -3.0
    got = salience.salience(found, text, np.arange(3), 0)
    assert got.position.tolist() == [
        1,
        -1,
        3,
    ]  # what speaks against the class counts by its size too
    assert got.predicted[0] == 0
    assert got.difference[0] == pytest.approx(2.0) and got.facts(16)["gap_max"] < 1e-5


# ---- cuts ------------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(2, 9), st.integers(0, 99))
def test_a_cut_removes_exactly_one_direction(n, d, seed):
    g = torch.Generator().manual_seed(seed)
    h, u = (torch.randn(n, d, generator=g, dtype=torch.float64) for _ in range(2))
    u = ablate.unit(u)
    cut = ablate.without(h, u)
    torch.testing.assert_close((cut * u).sum(1), torch.zeros(n, dtype=torch.float64))
    torch.testing.assert_close(ablate.without(cut, u), cut)  # twice is once
    torch.testing.assert_close(h - cut, (h * u).sum(1, keepdim=True) * u)  # nothing else has moved
    P = torch.eye(d, dtype=torch.float64) - u[0][:, None] * u[0]
    assert torch.linalg.matrix_rank(P) == d - 1
    assert torch.equal(ablate.without(h, ablate.unit(torch.zeros_like(u))), h)


@given(st.integers(0, 50))
def test_partners_are_whom_they_should_be(seed):
    label = torch.tensor([0, 1, 1, 0, 2, 2, 1])
    found, n = ablate.partners(label, seed), len(label)
    assert all((j != np.arange(n)).all() for j in found.values())
    assert (label[found["same class"]] == label).all() and (
        label[found["other class"]] != label
    ).all()


def test_a_text_without_a_partner_is_told():
    with pytest.raises(UserError, match="no partner of the same class"):
        ablate.partners(torch.tensor([0, 1, 1, 0, 2]), 0)


def test_directions_are_what_their_names_say():
    """Every code, word and split its own vector: each variant from the words that VARIANTS tells."""
    g, n, seed = torch.Generator().manual_seed(0), 12, 3
    x, label = torch.randn(2 * n, 5, generator=g).numpy(), torch.arange(n) % 3
    split = np.array([SPLITS["train"], SPLITS["test"]] * n)
    v = Vectors(
        x,
        x[::-1],
        np.arange(2 * n),
        np.zeros(2 * n),
        np.zeros(2 * n),
        np.arange(2 * n) % 3,
        split,
        ["w"],
    )
    codes = Codes(
        "all", 0, np.arange(2 * n)[::-1].copy(), torch.randn(2 * n, 5, generator=g).numpy()
    )
    row = np.flatnonzero(v.rows("test"))
    found = ablate.Items(row, row, None, None, label, torch.zeros(n, 5), None)
    got, equal = ablate.code_directions(codes, v, found, seed)
    of, partner = codes.assignment[row], ablate.partners(label, seed)
    mean = codes.centroids[codes.assignment[v.rows("train")]].mean(0)
    want = {
        "own": codes.centroids[of],
        "centred": codes.centroids[of] - mean,
        "centred, another": codes.centroids[of[partner["another"]]] - mean,
        **{name: codes.centroids[of[j]] for name, j in partner.items()},
    }
    assert set(got) == set(want) == set(ablate.OF_CODES) and set(equal.values()) == {0.0}
    shared = ablate.shared_directions(v, found, seed)
    want |= {"mean": np.tile(x[v.rows("train")].mean(0), (n, 1)), "raw": x[row]}
    for name, u in {**got, **{k: shared[k] for k in ("mean", "raw")}}.items():
        torch.testing.assert_close(u, ablate.unit(torch.from_numpy(want[name])))


def test_the_model_without_a_direction_is_what_the_whole_pass_gives(small):
    lm, tokenizer = small
    ids, lengths = encode(tokenizer, TEXTS + ["two words", "again such"], 40, "start")
    n, layer = len(ids), 1
    found = ablate.Items(
        np.arange(n),
        np.arange(n),
        ids,
        lengths,
        torch.zeros(n),
        torch.zeros(n, D),
        torch.zeros(n, D),
    )
    above, g = ablate.Above(lm, found, layer, size=2), torch.Generator().manual_seed(0)
    us = [ablate.unit(torch.randn(n, D, generator=g, dtype=torch.float64)) for _ in range(2)]
    z = lm.states(ids, layer)
    for u, got in zip(us, above.last(us)):
        one = z.clone()
        for i, end in enumerate(lengths - 1):
            one[i, end] = ablate.without(one[i, end], u[i])
        for a, b in zip(got, lm.onward(one, layer, lengths)):
            torch.testing.assert_close(a, b)
        for a, b in zip(above.all(u), lm.onward(ablate.without(z, u[:, None]), layer, lengths)):
            torch.testing.assert_close(a, b)
    assert lm.lm.past is None


# ---- probes ----------------------------------------------------------------------------------------------


def test_folds_are_stratified_and_no_text_is_judged_by_a_probe_that_saw_it():
    label = np.repeat([0, 1], [60, 30])
    fold = probe.deal(label, 10, 0)
    assert all(np.bincount(label[fold == f]).tolist() == [6, 3] for f in range(10))
    g = torch.Generator().manual_seed(0)  # noise with random labels: nothing to learn but by heart
    h, label = torch.randn(200, 64, generator=g), torch.randint(2, (200,), generator=g)
    right = probe.Probes(h, label, 2, 10).right(h)
    assert 0.35 < right.mean() < 0.65
    with pytest.raises(UserError, match="too few for 20 folds"):
        probe.Probes(h[:39], label[:39], 2)


def test_a_probe_is_stopped_and_trained_without_the_texts_that_it_is_judged_on(monkeypatch):
    """Other labels in a fold change all probes but the one that is judged on it."""
    monkeypatch.setattr(probe, "deal", lambda label, folds, seed: np.arange(len(label)) % folds)
    g = torch.Generator().manual_seed(0)
    h, label = torch.randn(60, 8, generator=g), torch.randint(2, (60,), generator=g)
    other = torch.where(torch.arange(60) % 5 == 2, 1 - label, label)
    one, two = (probe.Probes(h, y, 2, 5).weights[0] for y in (label, other))
    assert [torch.equal(a, b) for a, b in zip(one, two)] == [False, False, True, False, False]


class Planted(Classifier):
    """States by text number (the second id) in place of a network; the head reads the class direction."""

    def __init__(self, table, w):
        super().__init__(model.LM(model.preset("1L", n_embd=D, block_size=16, vocab_size=400)), 2)
        self.table, self.lm.norm = table, torch.nn.Identity()
        with torch.no_grad():
            self.head.weight.copy_(torch.stack([-w, w]))
            self.head.bias.zero_()

    def states(self, ids, layer=None):
        return self.table[ids[:, 1]]


def planted(n=240, share=4.0):
    """Words and texts of two classes: h = noise + y u, codes +-u."""
    g, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    u = ablate.unit(torch.randn(D, generator=g))
    label = torch.from_numpy(rng.permutation(np.arange(n) % 2))
    sign = (2.0 * label - 1)[:, None]
    h = 0.15 * torch.randn(n, D, generator=g) + sign * u
    words = share * sign * u + 0.3 * torch.randn(n, D, generator=g)
    split = np.full(n, SPLITS["test"])
    split[: n // 6] = SPLITS["train"]
    v = Vectors(
        words.numpy(),
        words.numpy(),
        np.arange(n),
        label.numpy(),
        np.zeros(n),
        label.numpy(),
        split,
        ["bad", "good"],
        ["neg", "pos"],
        {"layers": [1, 1]},
    )
    codes = Codes("planted", 0, label.numpy(), torch.stack([-share * u, share * u]).numpy())
    test = np.flatnonzero(split == SPLITS["test"])
    table = torch.zeros(n, 3, D)
    table[:, -1] = h
    ids = torch.zeros(n, 3, dtype=torch.long)
    ids[:, 1] = torch.arange(n)
    found = ablate.Items(
        test, test, ids[test], torch.full((len(test),), 3), label[test], h[test], h[test]
    )
    return Planted(table, u), v, codes, found


def test_the_true_code_is_missed_and_a_random_direction_is_not():
    trial = faithfulness.Trial(*(x := planted())[:2], x[3], seed=0, whole=100)
    right, shared = trial.shared()
    told = trial.codes(x[2], right)
    for form in faithfulness.FORMS:
        whole, own, noise = shared[form]["intact"], told[form]["own"], shared[form]["gaussian"]
        assert (
            whole["accuracy"] > 0.95 and noise["accuracy"] > 0.95 and noise["verdict"] == "no drop"
        )
        assert own["accuracy"] < 0.65 and own["verdict"] in ("at chance", "drop", "sign flip")
        assert own["drop"] == pytest.approx(whole["accuracy"] - own["accuracy"])
        assert told["survives"][form]["gaussian"]["passes"]
        assert form in faithfulness.PROBES or told[form]["own"]["probability_change"] < 0
        # both classes' codes lie on one line: another text's code does the same harm, so the test fails it
        assert not told["survives"][form]["another"]["passes"]
        assert told[form]["retrained"]["accuracy"] < 0.65  # gone, not moved
        assert set(told[form]) == {*ablate.OF_CODES, "retrained"}
        assert set(shared[form]) == {*ablate.VARIANTS} - {*ablate.OF_CODES} | {"intact"}
    assert set(told["partners"]) == {"another", "same class", "other class"}
    assert "own" in faithfulness.table({"planted": told}, shared, "probe, mean")


def test_below_chance_is_called_a_sign_flip():
    right, all_right = np.arange(100) < 6, np.ones(100, bool)
    assert faithfulness.outcome(right, all_right, 0.5)["verdict"] == "sign flip"
    assert faithfulness.outcome(np.arange(100) < 50, all_right, 0.5)["verdict"] == "at chance"
    assert faithfulness.outcome(np.arange(100) < 80, all_right, 0.5)["verdict"] == "drop"
    assert faithfulness.outcome(all_right, all_right, 0.5)["verdict"] == "no drop"
    few = np.arange(100) < 17  # of five classes the smallest, answered to every text
    assert faithfulness.outcome(few, all_right, 0.24, least=0.17)["verdict"] == "at chance"
    assert faithfulness.outcome(right, all_right, 0.24, least=0.17)["verdict"] == "sign flip"
    assert faithfulness.outcome(right, np.arange(100) < 55, 0.5)["verdict"] == "nothing to lose"


def test_a_shared_mean_makes_a_cut_flip_the_sign():
    """The caution of the README, on data: codes with a large mean, of which the class is a part."""
    g = torch.Generator().manual_seed(0)
    u, m = ablate.unit(torch.randn(2, 64, generator=g))
    y = (torch.arange(400) % 2).float()[:, None] * 2 - 1
    h = 20 * m + 1.5 * y * u + 0.3 * torch.randn(400, 64, generator=g)
    label = (y[:, 0] > 0).long()
    probes = probe.Probes(h, label, 2, 10)
    cut = ablate.without(h, ablate.unit(20 * m + 5.0 * y * u))
    chance = faithfulness.outcome(probes.right(cut), probes.right(h), 0.5)
    assert probes.right(h).mean() > 0.95 and chance["verdict"] == "sign flip"
    assert probe.Probes(cut, label, 2, 10).right(cut).mean() > 0.95  # nothing was lost


# ---- what words tell -------------------------------------------------------------------------------------


def test_the_proxy_reads_a_concept_that_tells_and_not_one_that_does_not():
    _, v, codes, found = planted()
    text = SimpleNamespace(words=[[v.vocabulary[i]] * 3 for i in v.word])
    said = v.label.copy()
    told = members.proxy(codes, v, text, found, said)
    assert (
        told["agreement"]["own"] == 1.0
        and told["agreement"]["another"] < 0.7
        and told["empty"] == 0
    )
    test = v.split == SPLITS["test"]  # what test texts say teaches the proxy nothing
    lies = [
        [v.vocabulary[1 - i]] * 9 if t else words for words, t, i in zip(text.words, test, v.word)
    ]
    assert members.proxy(codes, v, SimpleNamespace(words=lies), found, said) == told
    blind = Codes("blind", 0, np.zeros(len(v.word), int), codes.centroids)
    assert members.proxy(blind, v, text, found, said)["agreement"]["own"] < 0.7
    assert members.members(codes, v)[0][0][0] == "bad" and members.class_mix(codes, v)[0, 1] == 0
    assert members.wordless([[("12", 3), ("!", 1)], [("a1", 1)], []]) == 1

"""Explanations without a language model: closed forms, brute force, planted neurons."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crate_mini import stats as metrics
from crate_mini.intervene import Intervention
from crate_mini.model import LM, preset
from crate_mini.neurons import planted as puzzles
from crate_mini.neurons import simulators as explain
from crate_mini.sae.autoencoder import SAE
from crate_mini.steering import next_token as readout

V, NEURON = puzzles.EOT + 1, puzzles.NEURON
TOKENS = [*(bytes([i]) for i in range(256)), b"<|endoftext|>"]


def windows(seed, n, size=64):
    """Tokens (W, size + 1) and activations (W, size, h) of the planted model, one window a document."""
    rows, acts, model = [], [], puzzles.Planted()
    for text in puzzles.texts(n, seed, size, 2 * size):
        doc = list(text.encode())
        codes = model.trunk(torch.tensor([doc]))[1][0][0].numpy()
        start = (len(rows) * 37) % (len(doc) - size + 1) * (len(rows) % 3 > 0)
        rows.append([doc[start - 1] if start else -1, *doc[start : start + size]])
        acts.append(codes[start : start + size])
    return np.array(rows), np.array(acts)


def sums(tokens, acts, pairs=200):
    """What a recorder sums, by loops that nobody could get wrong: Backoff's arguments."""
    h = acts.shape[-1]
    counts, token_sum, found = np.zeros(V, int), np.zeros((V, h)), {}
    for row, a in zip(tokens, acts):
        for t in range(1, len(row)):
            counts[row[t]] += 1
            token_sum[row[t]] += a[t - 1]
            if row[t - 1] >= 0:
                n, total = found.get((row[t - 1], row[t]), (0, np.zeros(h)))
                found[row[t - 1], row[t]] = n + 1, total + a[t - 1]
    some = sorted((k for k in found if found[k][0] >= 3), key=lambda k: -found[k][0])[:pairs]
    return (
        counts,
        token_sum,
        np.array(some).reshape(-1, 2),
        np.array([found[k][0] for k in some]),
        np.array([found[k][1] for k in some]).reshape(-1, h),
    )


@pytest.fixture(scope="module")
def planted():
    """(Backoff of one set of documents, tokens and activations of others)."""
    return explain.Backoff(*sums(*windows(1, 1000), pairs=2000)), *windows(2, 200)


def r(x, y):
    value, why = metrics.pearson(np.ravel(x), np.ravel(y))
    return None if why[0] else float(value[0])


# ---- tables ----------------------------------------------------------------------------------------------


def test_shrinkage_is_the_closed_form():
    counts, token_sum = np.array([3, 1, 0]), np.array([[6.0], [0.0], [0.0]])
    pair = np.array([[1, 0]]), np.array([2]), np.array([[5.0]])
    b = explain.Backoff(counts, token_sum, *pair, shrink=(2, 3))
    mean = 6 / 4
    token = (6 + 2 * mean) / 5
    assert np.allclose(b.values[:, 0], [token, 2 * mean / 3, mean, mean])
    out = b(np.array([[1, 0, 0, 2, -1]]))[0, :, 0]
    assert np.allclose(out, [(5 + 3 * token) / 5, token, mean, mean])


@given(st.integers(0, 2**32 - 1))
def test_all_neurons_at_once_equal_brute_force(seed):
    rng = np.random.default_rng(seed)
    n_v, h, n_p = rng.integers(2, 8), rng.integers(1, 4), rng.integers(0, 12)
    pairs = rng.permutation([(u, v) for u in range(n_v) for v in range(n_v)])[:n_p]
    counts, pair_counts = rng.integers(0, 9, n_v), rng.integers(1, 9, len(pairs))
    token_sum, pair_sum = rng.random((n_v, h)), rng.random((len(pairs), h))
    tokens = rng.integers(-1, n_v, (3, 6))
    b = explain.Backoff(counts, token_sum, pairs, pair_counts, pair_sum, (1, 2))
    where = {tuple(p): i for i, p in enumerate(pairs.tolist())}
    mean = token_sum.sum(0) / max(counts.sum(), 1)
    for row, out in zip(tokens, b(tokens)):
        for t in range(1, 6):
            want = mean if row[t] < 0 else (token_sum[row[t]] + mean) / (counts[row[t]] + 1)
            if row[t] >= 0 and (row[t - 1], row[t]) in where:
                i = where[row[t - 1], row[t]]
                want = (pair_sum[i] + 2 * want) / (pair_counts[i] + 2)
            assert np.allclose(out[t - 1], want, rtol=1e-5)
    own, each = np.arange(h)[:, None, None], np.stack([np.roll(tokens, j) for j in range(h)])
    assert np.array_equal(b(each, own), np.stack([b(each[j], j) for j in range(h)]))
    for j in range(h):
        assert np.array_equal(b(tokens, j), b(tokens)[..., j])
        assert np.array_equal(
            explain.Table(b.values)(tokens, j), explain.Table(b.values)(tokens)[..., j]
        )


def test_planted_neurons_are_recovered(planted):
    b, tokens, acts = planted
    token, ngram = explain.Table(b.values)(tokens), b(tokens)

    def both(name):
        j = NEURON[name]
        return r(acts[..., j], token[..., j]), r(acts[..., j], ngram[..., j])

    assert min(both("token set")) > 0.999
    assert both("bigram")[1] > 0.99 > 0.6 > both("bigram")[0]
    assert max(both("third token back")) < 0.1
    assert both("always on") == both("dead") == (None, None)
    assert min(both("negative only")) > 0.999
    rng, j = np.random.default_rng(0), NEURON["noise"]
    low, high = np.quantile(
        [
            r(acts[i, :, j], ngram[i, :, j])
            for i in (rng.integers(len(acts), size=len(acts)) for _ in range(200))
        ],
        (0.0015, 0.9985),
    )
    assert low < 0 < high


def test_five_excerpts_know_only_what_they_show():
    tokens = np.array([[7, 1, 2], [-1, 1, -1]])
    t = explain.five_table(tokens, np.array([[3.0, 0.0], [1.0, 9.0]]), shrink=0)
    assert np.allclose(
        t(np.array([[1, 1, 2, 5]])), [[2, 0, 4 / 3]]
    )  # the 9 stands at a padded place


def test_five_excerpts_recover_a_token_set(planted):
    _, tokens, acts = planted
    j = NEURON["token set"]
    top = np.argsort(-acts[..., j].sum(1))[:5]
    assert r(acts[..., j], explain.five_table(tokens[top], acts[top, :, j])(tokens)) > 0.95


# ---- labels ----------------------------------------------------------------------------------------------


def test_labels_say_what_was_planted(planted):
    b, tokens, acts = planted
    found = explain.labels(b, TOKENS)
    said = {name: found[j] for name, j in NEURON.items()}

    def shown(name):
        return {TOKENS[i].decode() for i, *_ in said[name]["tokens"]}

    assert shown("token set") == {"a", "i", "o"}
    assert sum(share for *_, share in said["token set"]["tokens"]) == pytest.approx(1, abs=1e-3)
    assert said["token set"]["left"] == [] and said["token set"]["rest"] == 0
    assert shown("bigram") == {"u"}
    assert [TOKENS[i] for i in said["bigram"]["left"]] == [b"q"]
    assert said["dead"]["tokens"] == said["always on"]["tokens"] == []
    assert said["noise"]["class"] == said["third token back"]["class"] == "mixed"
    j = NEURON["token set"]
    assert r(acts[..., j], explain.label_table(said["token set"])(tokens)) > 0.999


def test_class_of_digits_and_of_position(planted):
    b, tokens, acts = planted
    digits = next(j for j, (_, reading) in enumerate(puzzles.READINGS) if reading.text == "digits")
    start = np.where(tokens[:, 0] < 0, 0, 40)
    found = explain.labels(b, TOKENS, explain.position_fit(acts, start))
    assert found[digits]["class"] == "digit"
    early = (np.arange(64) + start[:, None] < 1)[..., None].astype(float)
    assert explain.position_fit(early, start)[0] == pytest.approx(1)


def test_fixed_tests_of_tokens():
    tokens = [b"12", b" 7", b",", b" The", b" the", b"ing", b"\n", b"  ", b"\xff", b"Ab"]
    in_class = {
        name: [tokens[i] for i in np.flatnonzero(m)] for name, m in explain.classes(tokens).items()
    }
    assert in_class == {
        "newline": [b"\n"],
        "blank": [b"  "],
        "digit": [b"12", b" 7"],
        "punctuation": [b","],
        "capital": [b" The", b"Ab"],
        "word start": [b" The", b" the"],
        "suffix": [b"ing"],
    }


def test_label_sees_only_the_label():
    t = explain.label_table({"tokens": [[4, 2.5, 10, 0.5], [1, 0.5, 3, 0.1]], "rest": 0.25})
    assert np.allclose(t(np.array([[4, 4, 1, 0, -1]])), [[2.5, 0.5, 0.25, 0.25]])
    assert np.allclose(explain.label_table({"tokens": [], "rest": 0.5})(np.zeros((1, 3), int)), 0.5)


def steered(model, contexts, intervention, level):
    """Change of log-probability (C, V) at the last token of each context by steering.py, one by one."""
    rows = []
    for idx in contexts.tolist():
        z, codes = readout.stream(model, torch.tensor([idx]))
        f = codes[intervention.layer][0, -1]
        now = (f if intervention.sae is None else intervention.sae.encode(f))[intervention.neuron]
        found = readout.next_token(model, idx, [intervention])
        rows.append(found.after - found.before if now < level else torch.zeros_like(found.after))
    return torch.stack(rows)


@pytest.mark.parametrize("layer, autoencoder", [(0, False), (1, False), (0, True), (1, True)])
def test_effects_are_those_of_steering_one_by_one(layer, autoencoder):
    torch.manual_seed(0)
    model = LM(preset("2L", vocab_size=97, block_size=16, n_embd=32)).eval()
    contexts, neurons = torch.randint(90, (3, 9)), np.array([0, 5, 77, 8, 30])
    levels, vocab, one, more = np.random.default_rng(0).random(len(neurons)) * 20, 90, None, ()
    if autoencoder:
        one = SAE(model.config.n_code, 140, layer, l1=1e-3).requires_grad_(False)
        more = one.encode, one.W
    found = explain.effects(model, layer, neurons, levels, contexts, vocab, *more, most=3, batch=7)
    for effect, j, level in zip(found, neurons.tolist(), levels.tolist(), strict=True):
        turn = Intervention(layer, j, "set", level, "last", sae=one, keep_error=one is not None)
        moved = steered(model, contexts[:, :-1], turn, level)
        mean, before = moved.mean(0)[:vocab], model(contexts[:, :-1])[:, -1].log_softmax(-1)
        for name, sign in (("raised", 1), ("lowered", -1)):
            assert [id for id, _ in effect[name]] == (sign * mean).topk(3).indices.tolist()
            assert [v for _, v in effect[name]] == pytest.approx(
                (sign * (sign * mean).topk(3).values).tolist(), rel=2e-2, abs=1e-5
            )
        assert effect["clamp"] == pytest.approx(level, rel=1e-3) and effect["positions"] == 3
        kl = -(before.exp() * moved).sum(-1).mean().item()
        assert effect["kl"] == pytest.approx(kl, rel=2e-2, abs=1e-6)
        assert effect["loss"] == pytest.approx(
            -moved[range(3), contexts[:, -1]].mean().item(), rel=2e-2, abs=1e-5
        )
    assert not model.blocks[layer].sparsifier.code._forward_hooks


def test_effects_name_no_id_that_only_pads_the_vocabulary():
    torch.manual_seed(0)
    model = LM(preset("1L", vocab_size=64, block_size=8, n_embd=32)).eval()
    with torch.no_grad():
        model.tokens.weight[40:] *= 30  # so that the padded ids are moved most
    contexts = torch.randint(40, (2, 5))
    for vocab, most in ((40, 10), (64, 10), (3, 10)):
        for effect in explain.effects(
            model, 0, np.arange(6), np.full(6, 9.0), contexts % vocab, vocab, most=most
        ):
            ids = [id for name in ("raised", "lowered") for id, _ in effect[name]]
            assert ids and max(ids) < vocab and (vocab < 64 or max(ids) >= 40)


def test_a_level_that_is_reached_already_changes_nothing():
    torch.manual_seed(0)
    model = LM(preset("1L", vocab_size=64, block_size=8, n_embd=32)).eval()
    (effect,) = explain.effects(
        model, 0, np.array([3]), np.array([-1.0]), torch.randint(64, (2, 5)), 64
    )
    assert (effect["raised"], effect["lowered"], effect["kl"], effect["loss"]) == ([], [], 0, 0)


# ---- the trie --------------------------------------------------------------------------------------------


def test_trie_walks_backwards_and_the_shortest_match_wins():
    t = explain.Trie()
    t.add([5, explain.ANY, 3], 1.0)
    t.add([5, 4], 2.0)
    t.add([9], 4.0, anchored=True)
    tokens = np.array([[3, 7, 5, 9, 3, 4, 5], [-1, 9, 9, 5, 4, 5, -1]])
    assert t(tokens).tolist() == [[0, 1, 0, 0, 0, 2], [4, 0, 0, 0, 2, 0]]


def test_trie_of_equal_patterns_keeps_the_largest():
    t = explain.Trie()
    t.add([5], 1.0)
    t.add([5], 3.0)
    t.add([5], 2.0)
    assert t(np.array([[0, 5, 6]])).tolist() == [[3, 0]]


@pytest.mark.parametrize(
    "name, pattern",
    [
        ("token set", None),
        ("bigram", [["u", "q"]]),
        ("third token back", [[None, None, None, ";"]]),
    ],
)
def test_trie_finds_the_planted_pattern(planted, name, pattern):
    _, tokens, acts = planted
    j = NEURON[name]
    activate = explain.at_last(puzzles.Planted(), 0, j)
    fires = [(i, t) for i, t in zip(*np.nonzero(acts[..., j])) if t > 5][:10]
    trie = explain.fit_trie(
        activate,
        [([k for k in tokens[i, : t + 2].tolist() if k >= 0], 1.0) for i, t in fires],
        puzzles.EOT,
    )
    said = {
        tuple(None if k == explain.ANY else TOKENS[k].decode() for k in ids)
        for ids, _, _ in trie.patterns
    }
    assert said == (set(map(tuple, pattern)) if pattern else {("a",), ("i",), ("o",)})
    assert r(acts[..., j], trie(tokens)) > 0.98
    found = explain.precision_recall(acts[..., j], trie(tokens), 0.5)
    assert found["precision"] == 1 and found["recall"] > 0.9 and found["f1"] > 0.9


def test_trie_knows_what_only_begins_a_context():
    def activate(rows):
        return [float(row == [8]) for row in rows]

    trie = explain.fit_trie(activate, [([8], 1.0)], pad=0)
    assert trie.patterns == [[[8], 1.0, True]]
    assert trie(np.array([[-1, 8, 8]])).tolist() == [[1, 0]]


def test_trie_leaves_out_what_fires_everywhere():
    trie = explain.fit_trie(lambda rows: [1.0] * len(rows), [([1, 2], 1.0)], pad=0)
    assert trie.patterns == []


def test_trie_of_a_silent_neuron_is_empty():
    trie = explain.fit_trie(lambda rows: [0.0] * len(rows), [([1, 2], 0.0), ([1, 2], 1.0)], pad=0)
    assert trie.patterns == [] and trie(np.array([[1, 2, 3]])).tolist() == [[0, 0]]
    assert trie(np.zeros((0, 3), int)).shape == (0, 2)


def test_precision_and_recall_by_hand():
    found = explain.precision_recall(np.array([2, 1, 0, 2.0]), np.array([2, 2, 2, 0.0]), 2)
    assert found == {"precision": 1 / 3, "recall": 1 / 2, "f1": 2 / 5}
    assert not any(explain.precision_recall(np.zeros(3), np.zeros(3), 1).values())
    assert not any(explain.precision_recall(np.ones(3), np.ones(3), 1).values())

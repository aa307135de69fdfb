"""Effects on the next token equal steering each neuron alone in each context."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crate_mini.intervene import Intervention
from crate_mini.model import LM, preset
from crate_mini.neurons import effects as effects_module
from crate_mini.neurons import metrics
from crate_mini.neurons.documents import Chunk
from crate_mini.neurons.effects import draw_texts, next_token_effects
from crate_mini.sae.autoencoder import SAE
from crate_mini.steering import next_token


def make_model(size, **changes):
    torch.manual_seed(0)
    return LM(preset(size, n_embd=32, **changes)).eval()


def changes_by_steering(model, contexts, intervention, level):
    """Change of log-probability (C, V) at the last token of each context, one pass for each."""
    rows = []
    for ids in contexts.tolist():
        _, codes = next_token.stream(model, torch.tensor([ids]))
        values = codes[intervention.layer][0, -1]
        if intervention.sae is not None:
            values = intervention.sae.encode(values)
        steered = next_token.next_token(model, ids, [intervention])
        change = steered.after - steered.before
        rows.append(change if values[intervention.neuron] < level else torch.zeros_like(change))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["crate", "crate+", "gpt2"])
@pytest.mark.parametrize("layer, of_features", [(0, False), (1, False), (0, True), (1, True)])
def test_effects_are_those_of_steering_one_by_one(layer, of_features, kind, monkeypatch):
    model = make_model("2L", kind=kind, vocab_size=97, block_size=16)
    contexts, neurons = torch.randint(90, (4, 9)), np.array([0, 5, 77, 8, 30])
    read, following = contexts[:, :-1], contexts[:, -1]
    levels, vocab = np.random.default_rng(0).random(len(neurons)) * 20, 90
    sae, encoder = None, {}
    if of_features:
        sae = SAE(model.config.n_code, 140, layer, l1=1e-3).requires_grad_(False)
        encoder = {"encode": sae.encode, "directions": sae.W}
    texts = [[contexts[0], contexts[1]], [contexts[2], contexts[3]]]  # of two documents
    monkeypatch.setattr(effects_module, "BLOCK_LOGITS", 2 * 97)
    steps = []
    effects = next_token_effects(
        model, layer, neurons, levels, texts, vocab, **encoder, most=3, done=steps.append
    )
    assert steps[-1] == 4 * len(neurons) and steps == sorted(steps)
    before = model(read)[:, -1].log_softmax(-1)
    for effect, j, level in zip(effects, neurons.tolist(), levels.tolist(), strict=True):
        intervention = Intervention(layer, j, "set", level, "last", sae, keep_error=of_features)
        change = changes_by_steering(model, read, intervention, level)
        mean = change.mean(0)[:vocab]
        for name, sign in (("raised", 1), ("lowered", -1)):
            values, ids = (sign * mean).topk(3)
            ids, values = ids[values > 0], values[values > 0]
            assert [id for id, *_ in effect[name]] == ids.tolist()
            expected = pytest.approx((sign * values).tolist(), rel=2e-2, abs=1e-5)
            assert [value for _, value, *_ in effect[name]] == expected
            halves = change[:, :vocab].view(2, 2, -1).mean(1)  # of the two documents
            for id, value, low, high, holds in effect[name]:
                width = 12.7062 * (halves[0, id] - halves[1, id]).abs().item() / 2
                near = {"abs": 0.03 * (width + abs(value)) + 1e-5}
                assert low == pytest.approx(value - width, **near)
                assert high == pytest.approx(value + width, **near)
                strongest = [id in (sign * half).topk(3).indices for half in halves]
                assert holds == all(strongest)
        assert effect["clamp"] == pytest.approx(level, rel=1e-3)
        assert effect["positions"] == 4 and effect["documents"] == 2
        kl = -(before.exp() * change).sum(-1).mean().item()
        assert effect["kl"] == pytest.approx(kl, rel=2e-2, abs=1e-6)
        loss = -change[range(4), following].mean().item()
        assert effect["loss"] == pytest.approx(loss, rel=2e-2, abs=1e-5)
        low, high = effect["loss_ci95"]
        assert low <= effect["loss"] <= high
    assert not model.blocks[layer].sparsifier.code._forward_hooks
    assert model.cache is None and model.blocks[layer].attention.cache is None


@pytest.mark.parametrize("vocab, most", [(40, 10), (64, 10), (3, 10)])
def test_effects_name_no_id_that_only_pads_the_vocabulary(vocab, most):
    model = make_model("1L", vocab_size=64, block_size=8)
    with torch.no_grad():
        model.tokens.weight[40:] *= 30  # so that the padding ids change most
    contexts = torch.randint(40, (2, 5)) % vocab
    effects = next_token_effects(
        model, 0, np.arange(6), np.full(6, 9.0), [[text] for text in contexts], vocab, most=most
    )
    for effect in effects:
        ids = [id for name in ("raised", "lowered") for id, *_ in effect[name]]
        assert ids and max(ids) < vocab
        assert vocab < 64 or max(ids) >= 40


def test_a_level_that_is_already_reached_changes_nothing():
    model = make_model("1L", vocab_size=64, block_size=8)
    contexts = torch.randint(64, (2, 5))
    texts = [[contexts[0]], [contexts[1]]]
    (effect,) = next_token_effects(model, 0, np.array([3]), np.array([-1.0]), texts, 64)
    near_zero = pytest.approx(0, abs=1e-5)  # the keys and values are computed apart
    assert [effect["kl"], effect["loss"]] == [near_zero, near_zero]
    assert all(change == near_zero for _, change, *_ in effect["raised"])


# ---- texts, intervals, halves --------------------------------------------------------------------


def made_up_chunks(lengths, T=8):
    """The Chunks of documents of these lengths; every id is the token's place in its document."""
    for document, length in enumerate(lengths):
        for start in range(0, length, T):
            yield Chunk(document, np.arange(start, min(length, start + T)), 0)


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 12), st.integers(0, 5))
def test_texts_are_what_the_model_reads_before_a_drawn_token(lengths, wanted, seed):
    texts = draw_texts(made_up_chunks(lengths), wanted, seed)
    again = draw_texts(made_up_chunks(lengths), wanted, seed)
    assert [list(map(len, group)) for group in texts] == [list(map(len, group)) for group in again]
    long_enough = sum(any(min(8, n - s) >= 3 for s in range(0, n, 8)) for n in lengths)
    assert len(texts) == min(wanted, long_enough), "a document each, if there are enough"
    assert len({len(group) for group in texts}) <= 1
    assert sum(map(len, texts)) >= wanted * (long_enough > 0)
    for group in texts:
        for text in group:
            assert 3 <= len(text) <= 8 and text[0] % 8 == 0
            assert np.array_equal(text, np.arange(text[0], text[0] + len(text)))


def test_every_token_of_a_document_is_as_likely_to_follow():
    ends = []
    for seed in range(600):
        ((text,),) = draw_texts(made_up_chunks([20]), 1, seed)
        ends.append(int(text[-1]))
    counts = np.bincount(ends, minlength=20)
    assert (counts[[0, 1, 8, 9, 16, 17]] == 0).all()  # fewer than two tokens before them
    others = counts[counts > 0]
    assert len(others) == 14 and abs(others - 600 / 14).max() < 4.5 * np.sqrt(600 / 14)


@pytest.mark.parametrize("documents", [3, 8, 64])
def test_intervals_cover_the_mean_of_all_documents(documents):
    """Texts of a document share its topic: a mean over texts alone would claim too much."""
    rng, n = np.random.default_rng(documents), 2000  # neurons, which stand for repetitions
    changes = effects_module._Changes(n, 2, torch.device("cpu"))
    for topics in rng.normal(size=(documents, n)):
        for noise in rng.normal(size=(3, n)):
            after = np.stack((1.5 + topics + 0.3 * noise, np.zeros(n)), 1)
            changes.add(torch.zeros(2), torch.tensor(after, dtype=torch.float32), 0)
        changes.end_document()
    covered = {"raised": 0, "loss": 0}
    for effect in changes.results([1.0] * n, 2):
        rows = {id: bounds for id, _, *bounds, _ in effect["raised"] + effect["lowered"]}
        low, high = rows[0]
        covered["raised"] += low <= 1.5 <= high
        low, high = effect["loss_ci95"]
        covered["loss"] += low <= -1.5 <= high
    for name, count in covered.items():
        assert 0.93 <= count / n <= 0.97, name


def test_a_token_that_one_half_raises_does_not_hold():
    changes = effects_module._Changes(1, 6, torch.device("cpu"))
    for k in range(8):  # id 4 in the even documents only, id 1 in all
        after = torch.zeros(1, 6)
        after[0, 1], after[0, 4] = 1, 9 * (k % 2)
        changes.add(torch.zeros(6), after, 0)
        changes.end_document()
    (effect,) = changes.results([1.0], 1)
    assert [row[0] for row in effect["raised"]] == [4] and effect["raised"][0][-1] == 0
    (effect,) = changes.results([1.0], 2)
    assert [(row[0], row[-1]) for row in effect["raised"]] == [(4, 1), (1, 1)]


def test_students_quantiles_are_those_of_the_tables():
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 6: 2.447, 10: 2.228, 30: 2.042, 63: 1.998}
    for df, value in table.items():
        assert metrics.student_95(df) == pytest.approx(value, rel=0.02 if df == 3 else 0.01)

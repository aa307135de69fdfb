"""CLVQ-VAE: each equation by itself, words and padding, training that learns, stops and repeats."""

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fake_mps import fake_mps
from hypothesis import given
from hypothesis import strategies as st
from planted_vectors import planted

from crate_mini import UserError
from crate_mini.concepts import clvqvae
from crate_mini.concepts.clvqvae import CLVQVAE, Codebook, Encoder, Settings, Words

SMALL = Settings(codes=6, topk=3, layers=1, heads=2, dropout=0.0, batch=8, epochs=3)
TWO_CONCEPTS = replace(SMALL, codes=2, epochs=12, batch=4, lr=3e-3)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def build(d=8, d_out=5, seed=0, **changes):
    """A CLVQVAE with random codes and weights."""
    settings = replace(SMALL, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CLVQVAE(2 * torch.randn(settings.codes, d), d_out, settings)


def words(lengths, d=8, seed=0):
    """x (B, S, d), real (B, S) of texts of these lengths."""
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.randn(*real.shape, d, generator=generator(seed)) * real[..., None], real


def vectors():
    return planted(60, d_upper=6)


@cache
def trained_on_two_concepts():
    """(model, history) after enough epochs to learn both planted concepts."""
    return clvqvae.fit(vectors(), TWO_CONCEPTS)


# ---- the quantiser -------------------------------------------------------------------------------


def test_ema_equals_its_closed_form():
    """For fixed assignments: M by its geometric sum, N by its recursion in float64."""
    decay, eps, K, d, steps = 0.9, 1e-3, 4, 3, 12
    e = torch.randn(K, d, generator=generator())
    book = Codebook(e, decay=decay, eps=eps)
    N = np.ones(K)
    M = decay**steps * e.double()
    for t in range(steps):
        z = torch.randn(10, d, generator=generator(t))
        index = torch.randint(0, K - 1, (10,), generator=generator(t))  # the last code never
        book.update(z, index)
        N = decay * N + (1 - decay) * np.bincount(index, minlength=K)
        N = (N + eps) / (N.sum() + K * eps) * N.sum()
        total = F.one_hot(index, K).double().T @ z.double()
        M += (1 - decay) * decay ** (steps - 1 - t) * total
    assert torch.allclose(book.M.double(), M, atol=1e-6)
    assert np.allclose(book.N.numpy(), N, rtol=1e-5)
    assert torch.allclose(book.e.double(), M / torch.from_numpy(N)[:, None], atol=1e-5)


def test_ema_of_one_cluster_tends_to_its_mean_and_takes_no_gradient():
    z = (torch.randn(20, 3, generator=generator()) + 5).requires_grad_()
    book = Codebook(torch.zeros(2, 3), decay=0.8)
    for _ in range(80):
        book.update(z, torch.ones(20, dtype=torch.int64))
    assert torch.allclose(book.e[1], z.mean(0), atol=1e-3) and not book.e.requires_grad


def test_sampling_frequencies_match_the_softmax():
    """Chi-square with four degrees of freedom exceeds 18.47 for one seed in a thousand."""
    book = Codebook(torch.randn(9, 4, generator=generator()), topk=5, temperature=2.0)
    z = torch.randn(1, 4, generator=generator(1))
    D = (z - book.e).double().square().sum(1)
    nearest = D.argsort()[:5]
    p = torch.exp(-D[nearest] / 2)
    p /= p.sum()
    index, entropy = book.draw(z.expand(20000, 4), generator(2))
    count = torch.bincount(index, minlength=9)
    assert count.sum() == count[nearest].sum() == 20000  # none beyond the five nearest
    assert ((count[nearest] - 20000 * p) ** 2 / (20000 * p)).sum() < 18.47
    assert entropy.item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-4)


def test_with_one_nearest_code_it_is_plain_vq():
    """topk=1: the nearest codes, no entropy, and the same step whatever the seed of the draw."""
    x, real = words([5, 2, 4])
    y = torch.randn(11, 5, generator=generator(3))
    gradients = []
    for seed in (0, 1):
        model = build(topk=1)
        before = model.codebook.e.clone()
        out = model(x, real, generator(seed))
        z = model.encoder(x[real])
        assert torch.equal(out["index"], torch.cdist(z, before).argmin(1))
        assert abs(out["entropy"]) < 1e-6
        clvqvae.loss(out, y, 0.1).backward()
        parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat(parts))
    assert torch.equal(*gradients)


def test_with_several_nearest_codes_the_draw_depends_on_the_seed():
    x, real = words([5, 2, 4])
    model = build(topk=4)
    model.codebook.temperature = 1e3
    first, second = (model(x, real, generator(seed))["index"] for seed in (0, 1))
    assert not torch.equal(first, second)


def test_the_gradient_goes_straight_through():
    """dL/dz is dL/dq of the decoder at the code, plus the commitment's 2 beta (z - e) / numel."""
    model, (x, real) = build().eval(), words([4, 3])
    y, beta = torch.randn(7, 5, generator=generator(3)), 0.3
    z = model.encoder(x[real]).detach().requires_grad_()
    model.encoder = torch.nn.Identity()
    out = model(clvqvae.to_batch(z, real), real)
    clvqvae.loss(out, y, beta).backward()
    q = out["e"].clone().requires_grad_()
    F.mse_loss(model.decode(z.detach(), q, real), y).backward()
    assert q.grad.abs().max() > 1e-4
    commitment = beta * 2 * (z - out["e"]).detach() / z.numel()
    assert torch.allclose(z.grad, q.grad + commitment, atol=1e-6)


def test_codes_move_in_training_before_they_are_read_and_never_in_evaluation():
    model, (x, real) = build(), words([5, 3])
    before, z = model.codebook.e.clone(), model.encoder(x[real])
    out = model(x, real, generator())
    expected = Codebook(before)
    expected.update(z.detach(), out["index"])
    assert torch.equal(model.codebook.e, expected.e) and not torch.equal(before, expected.e)
    assert torch.equal(out["e"], expected.e[out["index"]])
    model.eval()(x, real)
    assert torch.equal(model.codebook.e, expected.e)


def test_the_encoder_mixes_by_its_share():
    encoder, x = Encoder(6, 0.2), torch.randn(5, 6, generator=generator())
    assert encoder.m.item() == pytest.approx(0.275, abs=1e-3)
    m = 0.5 / (1 + math.exp(-0.2))
    assert torch.allclose(encoder(x), (1 - m) * x + m * F.layer_norm(x, (6,)), atol=1e-6)
    with torch.no_grad():
        encoder.a.fill_(50)
    assert encoder.m.item() == 0.5


# ---- words, padding, masks -----------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.integers(0, 3),
    st.sampled_from(["causal", "none"]),
    st.sampled_from(["q", "z"]),
    st.integers(0, 99),
)
def test_padding_and_other_texts_change_nothing(lengths, extra, mask, memory, seed):
    model, (x, real) = build(mask=mask, memory=memory).eval(), words(lengths, seed=seed)
    out = model(x, real)
    n = sum(lengths)
    assert out["y"].shape == (n, 5) and out["z"].shape == out["e"].shape == (n, 8)
    wide = model(F.pad(x, (0, 0, 0, extra), value=7.0), F.pad(real, (0, extra)))
    assert torch.allclose(out["y"], wide["y"], atol=1e-5)
    assert torch.equal(out["index"], wide["index"])
    alone = [model(x[i : i + 1, :n], real[i : i + 1, :n])["y"] for i, n in enumerate(lengths)]
    assert torch.allclose(out["y"], torch.cat(alone), atol=1e-5)


@pytest.mark.parametrize("mask, sees", [("causal", False), ("none", True)])
def test_a_causal_decoder_sees_no_later_word(mask, sees):
    model, (x, real) = build(mask=mask).eval(), words([6])
    other = x.clone()
    other[0, 4] += 5
    moved = (model(x, real)["y"] - model(other, real)["y"]).abs().amax(1) > 1e-6
    assert moved[4] and moved[5] and moved[:4].any() == sees


def test_nothing_goes_around_the_codes_unless_the_memory_is_z():
    """Words that move but keep their codes leave the reconstruction alone if it sees only codes."""
    (x, real), same = words([5, 3]), {}
    for memory in ("q", "z"):
        model = build(memory=memory).eval()
        out, moved = model(x, real), model(x * 1.001, real)
        assert torch.equal(out["index"], moved["index"])
        same[memory] = torch.allclose(out["y"], moved["y"], atol=1e-6)
    assert same == {"q": True, "z": False}


def test_the_stream_mean_reads_no_codes():
    x, real = words([5, 3])
    model, q = build(stream="mean", memory="z").eval(), torch.zeros(8, 8)
    z = model.encoder(x[real])
    assert torch.equal(model.decode(z, q, real), model.decode(z, q + 1, real))


@given(st.integers(1, 20), st.integers(1, 50), st.integers(0, 99))
def test_batches_hand_out_every_word_once(size, n_texts, seed):
    v = planted(max(n_texts, 10), d_upper=6, seed=seed)
    train = v.rows("train")
    if not train.any():
        return
    split = Words(v, "train", "upper", (2.0, 4.0))
    for shuffle in (None, generator(seed)):
        batches = [(x[real], y) for x, y, real in split.batches(size, shuffle)]
        x, y = (torch.cat(part).numpy() for part in zip(*batches))
        expected = v.lower[train] / 2
        assert len(x) == train.sum()
        order, expected_order = np.lexsort(x.T), np.lexsort(expected.T)
        assert np.allclose(x[order], expected[expected_order])
        assert np.allclose(y[order], v.upper[train][expected_order] / 4)


# ---- training ------------------------------------------------------------------------------------


def test_scales_come_from_the_training_words_alone():
    v = vectors()
    train = v.rows("train")
    v.lower[~train] *= 100
    v.upper[~train] *= 100
    expected = [np.sqrt((x[train].astype(np.float64) ** 2).mean()) for x in (v.lower, v.upper)]
    assert clvqvae.scales(v, "upper") == pytest.approx(expected)
    assert clvqvae.scales(v, "lower") == pytest.approx(expected[:1] * 2)


def test_weight_decay_applies_to_matrices(monkeypatch):
    optimizers = []
    Adam = torch.optim.Adam

    def make(groups, lr, fused):
        optimizers.append(Adam(groups, lr, fused=fused))
        return optimizers[-1]

    monkeypatch.setattr(torch.optim, "Adam", make)
    clvqvae.fit(vectors(), Settings(codes=4, heads=2, epochs=1, weight_decay=0.25))
    matrices, others = optimizers[0].param_groups
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.25, 0)
    assert {p.ndim > 1 for p in matrices["params"]} == {True}
    assert {p.ndim for p in others["params"]} <= {0, 1}


def test_adam_is_fused_everywhere_but_on_mps():
    model = CLVQVAE(torch.randn(3, 8), 8, Settings(codes=3, heads=2))
    assert clvqvae.make_optimizer(model).defaults["fused"]
    with fake_mps():
        assert not clvqvae.make_optimizer(model.to("mps")).defaults["fused"]


def test_training_learns_the_planted_concepts():
    v = vectors()
    model, history = trained_on_two_concepts()
    index = clvqvae.assign(model, torch.from_numpy(v.lower) / model.scale[0]).numpy()
    assert np.mean(index == v.word) in (0.0, 1.0)
    first, last = history[0], history[-1]
    assert last["stop"]["explained"] > 0.9 > first["stop"]["explained"]
    assert last["active"] == 2 and 1.8 < last["perplexity"] <= 2
    assert 0 <= last["entropy"] < math.log(2) and 0 < last["m"] < 0.5


def test_shuffled_codes_spoil_what_depends_on_codes():
    v = vectors()
    model, _ = trained_on_two_concepts()
    test = Words(v, "test", "upper", model.scale)
    mean = Words(v, "train", "upper", model.scale).y.mean(0)
    explained = clvqvae.evaluate(model, test, mean)["explained"]
    shuffled = clvqvae.evaluate(model, test, mean, generator())["explained"]
    assert shuffled < 0.5 < 0.9 < explained


def test_with_the_lower_target_it_reconstructs_the_lower_layer():
    model, history = clvqvae.fit(vectors(), replace(SMALL, codes=2, target="lower"))
    assert model.out.out_features == 8 and model.scale[0] == model.scale[1]
    assert model.out.weight.shape == (8, 8) and len(history) == 3


def test_training_repeats_itself_and_leaves_the_global_generator_alone():
    v, state = vectors(), torch.get_rng_state()
    weights, histories = [], []
    for seed in (3, 3, 4):
        model, history = clvqvae.fit(v, replace(SMALL, dropout=0.1), seed)
        weights.append(torch.cat([w.flatten() for w in model.state_dict().values()]))
        histories.append(history)
    assert torch.equal(weights[0], weights[1]) and histories[0] == histories[1]
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(state, torch.get_rng_state())


def test_training_keeps_the_best_epoch_and_stops():
    v = vectors()
    model, history = clvqvae.fit(v, replace(SMALL, lr=0.3, epochs=30, patience=2))
    losses = [epoch["stop"]["loss"] for epoch in history]
    best = int(np.argmin(losses))
    assert len(losses) == best + 3 < 30
    stop, train = (Words(v, split, "upper", model.scale) for split in ("stop", "train"))
    loss = clvqvae.evaluate(model, stop, train.y.mean(0))["loss"]
    assert loss == pytest.approx(losses[best], rel=1e-5)


def test_dead_codes_restart_only_if_asked():
    """Codes far from all words are never chosen; revived ones are."""
    v = vectors()
    start = np.full((6, 8), 500.0, np.float32)
    start[0] = v.lower.mean(0)
    active = {}
    for revive in (False, True):
        _, history = clvqvae.fit(v, replace(SMALL, topk=1, revive=revive), start=start)
        active[revive] = history[-1]["active"]
    assert active[False] == 1 < active[True]


def test_codes_that_do_not_learn_stay_and_have_no_encoder():
    v = vectors()
    start = v.lower[:6]
    model, history = clvqvae.fit(v, replace(SMALL, learn=False), start=start)
    assert np.allclose(model.codebook.e.numpy() * model.scale[0], start, rtol=1e-5)
    assert history[-1]["m"] == 0.0 and isinstance(model.encoder, torch.nn.Identity)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"heads": 3}, "heads=3 do not divide the vectors' width 8; use heads=2"),
        ({"codes": 10**6}, "1000000 codes cannot be made of"),
        ({"memory": "x"}, "memory='x' is unknown"),
        ({"mask": "anti"}, "choose causal or none"),
        ({"temperature": 0.0}, "temperature=0.0 must be"),
        ({"lr": math.nan}, "lr=nan"),
        ({"decay": 1.0}, "decay=1.0 must be above 0 and below 1"),
        ({"layers": 0}, "layers=0 must"),
        ({"lr": 1e9}, "diverged; try a lower lr"),
    ],
)
def test_bad_settings_are_one_sentence(changes, message):
    with pytest.raises(UserError, match=message) as error:
        clvqvae.fit(vectors(), replace(SMALL, **changes))
    assert "\n" not in str(error.value)


def test_bad_vectors_are_one_sentence():
    v = vectors()
    with pytest.raises(UserError, match="no word vectors are in the stop split"):
        clvqvae.fit(replace(v, split=v.split * (v.split != 1)), SMALL)
    with pytest.raises(UserError, match="all word vectors of a layer are 0"):
        clvqvae.fit(replace(v, upper=v.upper * 0), SMALL)

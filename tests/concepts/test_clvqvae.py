"""CLVQ-VAE: the equations one by one, words and padding, training that learns, stops and repeats itself."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from crate_mini import UserError
from crate_mini.concepts import clvqvae
from crate_mini.concepts.clvqvae import CLVQVAE, Codebook, Encoder, Settings, Words
from crate_mini.concepts.types import Vectors

SMALL = Settings(codes=6, topk=3, layers=1, heads=2, dropout=0.0, batch=8, epochs=3)


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def build(d=8, d_out=5, seed=0, **changes):
    s = replace(SMALL, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CLVQVAE(2 * torch.randn(s.codes, d), d_out, s)


def words(lengths, d=8, seed=0):
    """x (B, S, d), real (B, S) of sentences of these lengths."""
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.randn(*real.shape, d, generator=draw(seed)) * real[..., None], real


def planted(S=60, d=8, seed=0, upper=6):
    """Vectors of two concepts; the upper layer is a map of the lower one."""
    r = np.random.default_rng(seed)
    length = r.integers(0, 7, S)
    sentence, N = np.repeat(np.arange(S), length), length.sum()
    concept = r.integers(0, 2, N)
    basis = np.linalg.qr(r.normal(size=(d, d)))[0]
    x = 3 * basis[0] + 2 * basis[1 + concept] + 0.1 * r.normal(size=(N, d))
    position = np.concatenate([np.arange(n) for n in length])
    split = np.array([0, 0, 0, 1, 2])[np.arange(S) % 5]
    y = x @ r.normal(size=(d, upper))
    return Vectors(x, y, sentence, concept, position, np.zeros(S), split, ["a", "b"])


# ---- the quantiser ---------------------------------------------------------------------------------------


def test_ema_equals_its_closed_form():
    """For fixed assignments: M by its geometric sum, N by its recursion written out in float64."""
    g, eps, K, d, steps = 0.9, 1e-3, 4, 3, 12
    e = torch.randn(K, d, generator=draw())
    book = Codebook(e, decay=g, eps=eps)
    zs = [torch.randn(10, d, generator=draw(i)) for i in range(steps)]
    indices = [
        torch.randint(0, K - 1, (10,), generator=draw(i)) for i in range(steps)
    ]  # the last: never
    N = np.ones(K)
    for z, index in zip(zs, indices):
        book.update(z, index)
        N = g * N + (1 - g) * np.bincount(index, minlength=K)
        N = (N + eps) / (N.sum() + K * eps) * N.sum()
    hot = [F.one_hot(index, K).double() for index in indices]
    M = g**steps * e.double() + sum(
        (1 - g) * g ** (steps - 1 - t) * hot[t].T @ zs[t].double() for t in range(steps)
    )
    assert torch.allclose(book.M.double(), M, atol=1e-6)
    assert np.allclose(book.N.numpy(), N, rtol=1e-5)
    assert torch.allclose(book.e.double(), M / torch.from_numpy(N)[:, None], atol=1e-5)


def test_ema_of_one_cluster_tends_to_its_mean_and_takes_no_gradient():
    z = (torch.randn(20, 3, generator=draw()) + 5).requires_grad_()
    book = Codebook(torch.zeros(2, 3), decay=0.8)
    for _ in range(80):
        book.update(z, torch.ones(20, dtype=torch.int64))
    assert torch.allclose(book.e[1], z.mean(0), atol=1e-3) and not book.e.requires_grad


def test_sampling_frequencies_match_the_softmax():
    """Chi-square with four degrees of freedom: 18.47 is exceeded once in a thousand seeds."""
    book = Codebook(torch.randn(9, 4, generator=draw()), topk=5, temperature=2.0)
    z = torch.randn(1, 4, generator=draw(1))
    D = (z - book.e).double().square().sum(1)
    near = D.argsort()[:5]
    p = torch.exp(-D[near] / 2)
    p /= p.sum()
    index, entropy = book.draw(z.expand(20000, 4), draw(2))
    seen = torch.bincount(index, minlength=9)
    assert seen.sum() == seen[near].sum() == 20000  # none beyond the five nearest
    assert ((seen[near] - 20000 * p) ** 2 / (20000 * p)).sum() < 18.47
    assert entropy.item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-4)


def test_one_nearest_code_is_plain_vq():
    """topk=1: no chance, no entropy, the same steps whatever the seed of the draw, and nearest codes."""
    x, real = words([5, 2, 4])
    y, found = torch.randn(11, 5, generator=draw(3)), []
    for seed in (0, 1):
        model = build(topk=1)
        before = model.codebook.e.clone()
        out = model(x, real, draw(seed))
        z = model.encoder(x[real])
        assert (
            torch.equal(out["index"], torch.cdist(z, before).argmin(1))
            and abs(out["entropy"]) < 1e-6
        )
        clvqvae.loss(out, y, 0.1).backward()
        found.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    assert torch.equal(*found)
    model = build(topk=4)
    model.codebook.temperature = 1e3
    assert not torch.equal(*(model(x, real, draw(i))["index"] for i in (0, 1)))


def test_the_gradient_goes_straight_through():
    """dL/dz is dL/dq of the decoder at the code itself, plus the commitment's 2 beta (z - e) / numel."""
    model, (x, real) = build().eval(), words([4, 3])
    y, beta = torch.randn(7, 5, generator=draw(3)), 0.3
    z = model.encoder(x[real]).detach().requires_grad_()
    model.encoder = torch.nn.Identity()
    spread = torch.zeros(*real.shape, 8).masked_scatter(real[..., None], z)
    out = model(spread, real)
    clvqvae.loss(out, y, beta).backward()
    q = out["e"].clone().requires_grad_()
    F.mse_loss(model.decode(z.detach(), q, real), y).backward()
    assert q.grad.abs().max() > 1e-4
    assert torch.allclose(
        z.grad, q.grad + beta * 2 * (z - out["e"]).detach() / z.numel(), atol=1e-6
    )


def test_codes_move_in_training_before_they_are_read_and_never_in_evaluation():
    model, (x, real) = build(), words([5, 3])
    before, z = model.codebook.e.clone(), model.encoder(x[real])
    out = model(x, real, draw())
    want = Codebook(before)
    want.update(z.detach(), out["index"])
    assert torch.equal(model.codebook.e, want.e) and not torch.equal(before, want.e)
    assert torch.equal(out["e"], want.e[out["index"]])
    model.eval()(x, real)
    assert torch.equal(model.codebook.e, want.e)


def test_the_encoder_mixes_by_its_share():
    encoder, x = Encoder(6, 0.2), torch.randn(5, 6, generator=draw())
    assert encoder.m.item() == pytest.approx(0.275, abs=1e-3)
    m = 0.5 / (1 + math.exp(-0.2))
    assert torch.allclose(encoder(x), (1 - m) * x + m * F.layer_norm(x, (6,)), atol=1e-6)
    with torch.no_grad():
        encoder.a.fill_(50)
    assert encoder.m.item() == 0.5


# ---- words, padding, masks -------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.integers(0, 3),
    st.sampled_from(["causal", "none"]),
    st.sampled_from(["q", "z"]),
    st.integers(0, 99),
)
def test_padding_and_neighbours_change_nothing(lengths, extra, mask, memory, seed):
    model, (x, real) = build(mask=mask, memory=memory).eval(), words(lengths, seed=seed)
    out = model(x, real)
    assert out["y"].shape == (sum(lengths), 5) and out["z"].shape == out["e"].shape == (
        sum(lengths),
        8,
    )
    wide = model(F.pad(x, (0, 0, 0, extra), value=7.0), F.pad(real, (0, extra)))
    assert torch.allclose(out["y"], wide["y"], atol=1e-5) and torch.equal(
        out["index"], wide["index"]
    )
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
    """Words that move and keep their codes leave the reconstruction as it was, where it has only codes."""
    (x, real), same = words([5, 3]), {}
    for memory in ("q", "z"):
        model = build(memory=memory).eval()
        one, two = model(x, real), model(x * 1.001, real)
        assert torch.equal(one["index"], two["index"])
        same[memory] = torch.allclose(one["y"], two["y"], atol=1e-6)
    assert same == {"q": True, "z": False}
    model, other = build(stream="mean", memory="z").eval(), torch.zeros(8, 8)
    z = model.encoder(x[real])
    assert torch.equal(model.decode(z, other, real), model.decode(z, other + 1, real))


@given(st.integers(1, 20), st.integers(1, 50), st.integers(0, 99))
def test_batches_hand_out_every_word_once(size, S, seed):
    v = planted(max(S, 10), seed=seed)
    if not v.rows("train").any():
        return
    w = Words(v, "train", "upper", (2.0, 4.0))
    for generator in (None, draw(seed)):
        got = [(x[real], y) for x, y, real in w.batches(size, generator)]
        x, y = (torch.cat(part) for part in zip(*got))
        assert len(x) == v.rows("train").sum()
        order, want = np.lexsort(x.numpy().T), v.lower[v.rows("train")] / 2
        back = np.lexsort(want.T)
        assert np.allclose(x.numpy()[order], want[back])
        assert np.allclose(y.numpy()[order], v.upper[v.rows("train")][back] / 4)


# ---- training --------------------------------------------------------------------------------------------


def test_scales_are_of_the_training_words_alone():
    v = planted()
    train = v.rows("train")
    v.lower[~train] *= 100
    v.upper[~train] *= 100
    want = [np.sqrt((x[train].astype(np.float64) ** 2).mean()) for x in (v.lower, v.upper)]
    assert clvqvae.scales(v, "upper") == pytest.approx(want)
    assert clvqvae.scales(v, "lower") == pytest.approx(want[:1] * 2)


def test_weight_decay_is_of_matrices(monkeypatch):
    made = []
    adam = torch.optim.Adam
    monkeypatch.setattr(
        torch.optim, "Adam", lambda groups, lr: made.append(adam(groups, lr)) or made[0]
    )
    clvqvae.fit(planted(), Settings(codes=4, heads=2, epochs=1, weight_decay=0.25))
    matrices, others = made[0].param_groups
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.25, 0)
    assert {p.ndim > 1 for p in matrices["params"]} == {True} and {
        p.ndim for p in others["params"]
    } <= {0, 1}


def test_training_learns_the_planted_concepts():
    v = planted()
    model, history = clvqvae.fit(v, replace(SMALL, codes=2, epochs=25, batch=4))
    index = clvqvae.assign(model, torch.from_numpy(v.lower) / model.scale[0]).numpy()
    assert np.mean(index == v.word) in (0.0, 1.0)
    assert history[-1]["stop"]["explained"] > 0.9 > history[0]["stop"]["explained"]
    assert history[-1]["active"] == 2 and 1.8 < history[-1]["perplexity"] <= 2
    assert 0 <= history[-1]["entropy"] < math.log(2) and 0 < history[-1]["m"] < 0.5


def test_single_layer_mode_rebuilds_the_lower_layer():
    v = planted()
    model, history = clvqvae.fit(v, replace(SMALL, codes=2, target="lower"))
    assert model.out.out_features == 8 and model.scale[0] == model.scale[1]
    assert model.out.weight.shape == (8, 8) and len(history) == 3


def test_training_repeats_itself_and_leaves_the_global_generator_alone():
    v, state = planted(), torch.get_rng_state()
    runs = [clvqvae.fit(v, replace(SMALL, dropout=0.1), seed) for seed in (3, 3, 4)]
    one, two, three = (torch.cat([w.flatten() for w in m.state_dict().values()]) for m, _ in runs)
    assert torch.equal(one, two) and runs[0][1] == runs[1][1] and not torch.equal(one, three)
    assert torch.equal(state, torch.get_rng_state())


def test_training_keeps_the_best_epoch_and_stops():
    v = planted()
    model, history = clvqvae.fit(v, replace(SMALL, lr=0.3, epochs=30, patience=2))
    losses = [h["stop"]["loss"] for h in history]
    best = int(np.argmin(losses))
    assert len(losses) == best + 3 < 30
    stop, train = (Words(v, split, "upper", model.scale) for split in ("stop", "train"))
    assert clvqvae.evaluate(model, stop, train.y.mean(0))["loss"] == pytest.approx(
        losses[best], rel=1e-5
    )


def test_dead_codes_start_anew_only_where_asked():
    """Codes far from all words are never chosen; revived ones are."""
    v, far = planted(), np.full((6, 8), 500.0, np.float32)
    far[0] = v.lower.mean(0)
    active = {
        revive: clvqvae.fit(v, replace(SMALL, topk=1, revive=revive), start=far)[1][-1]["active"]
        for revive in (False, True)
    }
    assert active[False] == 1 < active[True]


def test_frozen_codes_stay_and_have_no_encoder():
    v = planted()
    start = v.lower[:6]
    model, history = clvqvae.fit(v, replace(SMALL, learn=False), start=start)
    assert np.allclose(model.codebook.e.numpy() * model.scale[0], start, rtol=1e-5)
    assert history[-1]["m"] == 0.0 and isinstance(model.encoder, torch.nn.Identity)


def test_shuffled_codes_spoil_what_depends_on_codes():
    v = planted()
    model, _ = clvqvae.fit(v, replace(SMALL, codes=2, epochs=25, batch=4))
    test, mean = (
        Words(v, "test", "upper", model.scale),
        Words(v, "train", "upper", model.scale).y.mean(0),
    )
    whole = clvqvae.evaluate(model, test, mean)["explained"]
    assert clvqvae.evaluate(model, test, mean, draw())["explained"] < 0.5 < 0.9 < whole


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"heads": 3}, "heads 3 do not divide the vectors' width 8; use heads 2"),
        ({"codes": 10**6}, "1000000 codes cannot be made of"),
        ({"memory": "x"}, "memory 'x' is unknown"),
        ({"mask": "anti"}, "choose causal or none"),
        ({"temperature": 0.0}, "temperature 0.0 must be"),
        ({"lr": math.nan}, "lr nan"),
        ({"decay": 1.0}, "between 0 and 1"),
        ({"layers": 0}, "layers 0 must be"),
        ({"lr": 1e30}, "diverged; try a lower lr"),
    ],
)
def test_settings_that_cannot_be_are_told(changes, words):
    with pytest.raises(UserError, match=words) as told:
        clvqvae.fit(planted(), replace(SMALL, **changes))
    assert "\n" not in str(told.value)


def test_vectors_that_cannot_be_are_told():
    v = planted()
    with pytest.raises(UserError, match="no word vectors are in the stop split"):
        clvqvae.fit(replace(v, split=v.split * (v.split != 1)), SMALL)
    with pytest.raises(UserError, match="all word vectors of a layer are 0"):
        clvqvae.fit(replace(v, upper=v.upper * 0), SMALL)

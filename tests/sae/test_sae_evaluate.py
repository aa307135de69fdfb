"""Measures of sparse autoencoders are their formulas, whatever the batches."""

import math

import pytest
import torch
import torch.nn.functional as F
from held_text import most_tensors_held
from hypothesis import given
from hypothesis import strategies as st
from tiny_saes import H, identity, small_corpus, tiny_model

from crate_mini import UserError
from crate_mini.intervene import hook_codes
from crate_mini.sae import evaluate
from crate_mini.sae.autoencoder import SAE

CUTS = st.lists(st.integers(1, 59), max_size=5)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("corpus"))


# ---- reconstruction ------------------------------------------------------------------------------


def quality(x, y, cuts=()):
    """The quality of y as a reconstruction of x, added in pieces that begin at `cuts`."""
    total = evaluate.ReconstructionQuality()
    for rows, reconstructed in zip(torch.tensor_split(x, cuts), torch.tensor_split(y, cuts)):
        if len(rows):
            total.add(rows, reconstructed)
    return total


def noisy_pair(seed, n=60, h=5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, h, generator=generator, dtype=torch.float64) + 1
    return x, x + 0.5 * torch.randn(n, h, generator=generator, dtype=torch.float64)


@given(st.integers(0, 99), st.floats(-1e4, 1e4), st.floats(1e-3, 1e3), CUTS)
def test_explained_variance_is_the_formula(seed, shift, scale, cuts):
    x, y = noisy_pair(seed)
    cuts = sorted(cuts)
    want = 1 - ((x - y) ** 2).sum().item() / ((x - x.mean(0)) ** 2).sum().item()
    assert quality(x, y, cuts).explained_variance() == pytest.approx(want, abs=1e-9)
    moved = quality(x * scale + shift, y * scale + shift, cuts).explained_variance()
    assert moved == pytest.approx(want, abs=1e-6)
    assert quality(x, x, cuts).explained_variance() == 1
    mean = x.mean(0).expand_as(x)
    assert quality(x, mean, cuts).explained_variance() == pytest.approx(0, abs=1e-9)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    assert quality(x[order], y[order]).explained_variance() == pytest.approx(want, abs=1e-9)


@given(st.integers(0, 99), st.floats(1e-3, 1e3), CUTS)
def test_cosine_and_mean_are_the_formulas(seed, scale, cuts):
    x, y = noisy_pair(seed)
    x[::7] = 0
    measured = quality(x, y * scale, sorted(cuts))
    cosines = (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))
    want = cosines[x.any(1)].mean().item()
    assert measured.cosine() == pytest.approx(want, abs=1e-9)
    assert torch.allclose(measured.mean, x.mean(0))
    assert quality(x, -x).cosine() == pytest.approx(-1)


def test_what_is_undefined_is_none():
    ones = torch.ones(4, 3)
    assert quality(ones, ones * 2).explained_variance() is None
    assert quality(ones * 0, ones).cosine() is None
    assert evaluate.recovered(sae=3.0, model=2.0, ablated=2.0) is None
    assert evaluate.recovered(sae=3.0, model=2.0, ablated=6.0) == 0.75


# ---- on held-out text ----------------------------------------------------------------------------


def held_out_windows(corpus, limit):
    """[(ids, targets)] of the first `limit` held-out tokens, cut by hand."""
    ids = [next(iter(corpus.blocks("val", 1, 64)))[0][0, :1]]
    ids += [targets.flatten() for _, targets in corpus.blocks("val", 4, 64)]
    ids = torch.cat(ids)
    starts = range(0, limit, 64)
    windows = [(ids[i : i + 64], ids[i + 1 : i + 65]) for i in starts]
    windows[-1] = tuple(part[: limit % 64] for part in windows[-1])
    return windows


def brute_force_loss(model, layer, windows, function):
    """Nats per token, window by window, with codes replaced by function(codes)."""
    total, n = 0.0, 0
    with hook_codes(model, layer, function):
        for ids, targets in windows:
            total += F.cross_entropy(model(ids[None])[0], targets, reduction="sum").item()
            n += len(ids)
    return total / n


def brute_force(sae, codes):
    """The measures of one SAE on codes (N, h) in float64, as the formulas say."""
    f = sae.encode(codes.float())
    y = sae.decode(f).double()
    error = (codes - y).square().sum()
    spread = (codes - codes.mean(0)).square().sum()
    return {
        "L0": (f > 0).sum(1).double().mean().item(),
        "dead": (f == 0).all(0).double().mean().item(),
        "explained_variance": (1 - error / spread).item(),
        "cosine": F.cosine_similarity(codes, y).mean().item(),
    }


@pytest.mark.parametrize("kind", ["crate", "gpt2"])
@torch.no_grad()
def test_evaluation_equals_brute_force(kind, corpus, monkeypatch):
    monkeypatch.setattr(evaluate, "ROWS", 50)
    model = tiny_model(kind)
    layer, limit = 1, 500
    saes = [SAE(H, 160, layer, l1=0.1), SAE(H, 160, layer, k=3, seed=2)]
    saes[1].c[::2] = -1e3
    measured = evaluate.evaluate(model, corpus, layer, saes, limit, batch=3)
    windows = held_out_windows(corpus, limit)
    codes = torch.cat([model.trunk(ids[None])[1][layer][0] for ids, _ in windows]).double()

    def loss(function):
        return brute_force_loss(model, layer, windows, function)

    mean = codes.mean(0).float()
    ablated = {"zero": loss(torch.zeros_like), "mean": loss(mean.expand_as)}
    model_loss = loss(lambda codes: None)
    for sae, result in zip(saes, measured):

        def reconstruct(codes, sae=sae):
            return sae.decode(sae.encode(codes))

        losses = {"sae": loss(reconstruct), "model": model_loss, **ablated}
        assert result["loss"] == pytest.approx(losses, abs=1e-5)
        want = brute_force(sae, codes)
        assert result["L0"] == pytest.approx(want["L0"])
        assert result["dead"] == pytest.approx(want["dead"])
        assert result["explained_variance"] == pytest.approx(want["explained_variance"], abs=1e-5)
        assert result["cosine"] == pytest.approx(want["cosine"], abs=1e-5)
        losses = result["loss"]
        for name in ablated:
            harm = losses[name] - losses["model"]
            share = (losses[name] - losses["sae"]) / harm if harm > 0 else None
            assert result["recovered"][name] == (share and pytest.approx(share))
    assert measured[1]["L0"] <= 3
    assert measured[1]["dead"] >= 0.5


def test_the_identity_explains_everything(corpus):
    (result,) = evaluate.evaluate(tiny_model(), corpus, 1, [identity(H)], 500)
    assert result["explained_variance"] == pytest.approx(1, abs=1e-9)


def test_no_more_than_a_few_batches_of_text_are_held(corpus, monkeypatch):
    """However many tokens are measured, each pass reads the text again."""
    held = most_tensors_held(monkeypatch, corpus)
    evaluate.evaluate(tiny_model(), corpus, 1, [identity(H)], 3000, batch=2)
    assert held["now"] + held["gone"] > 5 * 20 and held["most"] <= 4


def test_too_few_tokens_are_refused(corpus):
    with pytest.raises(UserError, match="1 held-out tokens are too few.*give --tokens 64"):
        evaluate.evaluate(tiny_model(), corpus, 1, [identity(H)], 1)


def test_a_loss_that_is_not_finite_is_reported(corpus):
    model = tiny_model()
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    with pytest.raises(UserError, match="loss .model. is nan"):
        evaluate.evaluate(model, corpus, 0, [SAE(H, 130, 0)], 100)

"""Sparse autoencoders are trained and judged: planted features found, formulas that mean what they say."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from saes import TEXT, identity, tiny

from crate_mini import UserError
from crate_mini.data import batches as data
from crate_mini.sae import train as sae_fit
from crate_mini.sae.autoencoder import SAE


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text(TEXT)
    return data.open_corpus(
        str(folder / "text.txt"),
        data.load_tokenizer("bytes"),
        folder / "cache",
        log=lambda *words: None,
    )


# ---- training --------------------------------------------------------------------------------------------


def planted(seed=0, h=24, width=32, active=2):
    """Endless batches of sparse non-negative mixtures of unit rows, and the rows."""
    draw = torch.Generator().manual_seed(seed)
    rows = F.normalize(torch.randn(width, h, generator=draw), dim=1)

    def batches():
        while True:
            f = torch.rand(256, width, generator=draw) + 0.5
            keep = torch.rand(256, width, generator=draw).topk(active, 1).indices
            yield torch.zeros_like(f).scatter(1, keep, f.gather(1, keep)) @ rows

    return batches(), rows


@pytest.mark.parametrize("kind", [{"l1": 8e-3}, {"k": 2}])
def test_planted_dictionary_is_recovered(kind):
    batches, rows = planted()
    one = SAE(24, 64, seed=1, **kind)
    before = (rows @ one.W.detach().T).max(1).values.mean()
    sae_fit.fit([one], batches, 1200, 3e-3)
    met, x = sae_fit.Agreement(), next(batches)
    f = one.encode(x).detach()
    met.add(x, one.decode(f).detach())
    found = (rows @ one.W.detach().T).max(1).values
    assert before < 0.7 and (found > 0.9).double().mean() >= 0.9, found.sort().values
    assert met.explained_variance() > 0.9 and (f > 0.05).sum(1).double().mean() < 4


def test_rows_keep_norm_one():
    batches, _ = planted()
    one = SAE(24, 48, l1=1e-3)
    optimizer = torch.optim.Adam(one.parameters(), 1e-2)
    for _ in range(20):
        sae_fit.one_step(one, optimizer, next(batches), 1e-2)
        assert torch.allclose(one.W.norm(dim=1), torch.ones(48), atol=1e-6)


def test_gradient_is_projected_before_the_optimizer_sees_it():
    batches, _ = planted()
    one, seen = SAE(24, 48, l1=1e-3), []
    rows = one.W.detach().clone()
    optimizer = torch.optim.SGD(one.parameters(), 0.0)
    step = optimizer.step
    optimizer.step = lambda: (seen.append((one.W.grad * rows).sum(1).abs().max().item()), step())
    sae_fit.one_step(one, optimizer, next(batches), 0.0)
    assert seen[0] < 1e-5 * one.W.grad.norm(dim=1).max()


def test_resampling_revives_dead_features_and_only_them():
    batches, _ = planted()
    x, one = next(batches), SAE(24, 40, l1=1e-3)
    optimizer = torch.optim.Adam(one.parameters(), 1e-3)
    sae_fit.one_step(one, optimizer, x, 1e-3)
    dead = torch.arange(40) % 3 == 0
    with torch.no_grad():
        one.c[dead] = -100.0
    assert not (one.encode(x)[:, dead] > 0).any()
    old = {name: w.detach().clone() for name, w in one.state_dict().items()}
    assert sae_fit.resample(one, optimizer, x, dead, torch.Generator().manual_seed(0)) == int(
        dead.sum()
    )
    assert (one.encode(x)[:, dead] > 0).any(0).all() and torch.allclose(
        one.W.norm(dim=1), torch.ones(40)
    )
    assert torch.equal(one.b, old["b"]) and torch.equal(one.c[~dead], old["c"][~dead])
    assert torch.equal(one.W[~dead], old["W"][~dead]) and torch.equal(
        one.E[:, ~dead], old["E"][:, ~dead]
    )
    moments = optimizer.state[one.W]["exp_avg"], optimizer.state[one.E]["exp_avg_sq"].T
    assert all((m[dead] == 0).all() and (m[~dead] != 0).any() for m in moments)


def test_resampling_prefers_what_is_badly_explained_and_stops_at_the_number_of_inputs():
    one = SAE(6, 30, l1=1e-3).requires_grad_(False)
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    one.E.zero_()
    x = torch.zeros(10, 6)  # nothing fires, x' = 0
    x[3] = torch.tensor([0.0, 0, 5, 0, 0, 0])
    dead = torch.ones(30, dtype=torch.bool)
    assert sae_fit.resample(one, optimizer, x, dead, torch.Generator().manual_seed(0)) == 1
    assert torch.allclose(one.W[0], F.normalize(x[3], dim=0))
    assert sae_fit.resample(one, optimizer, torch.zeros(4, 6), dead, torch.Generator()) == 0


def test_dead_features_of_a_run_are_resampled_and_counted():
    batches, _ = planted()
    one = SAE(24, 40, k=2)
    with torch.no_grad():
        one.c[:30] = -1e3  # the ten that are left cannot do the work of 32
    assert sae_fit.fit([one], batches, 300, 3e-3)[0] >= 30
    assert (one.encode(next(batches))[:, :30] > 0).any(0).sum() > 10  # without: none


@pytest.mark.parametrize("bad", [torch.zeros(64, 8), torch.ones(64, 8)])
def test_codes_that_never_vary_are_refused(bad):
    with pytest.raises(UserError, match="dead layer"):
        sae_fit.fit([SAE(8, 16, 0)], iter([bad] * 9), 5, 1e-3)


def test_divergence_is_told():
    with pytest.raises(UserError, match="diverged; try a lower --lr"):
        sae_fit.fit([SAE(24, 48, 0, l1=1e-3)], planted()[0], 60, 1e30)


def test_stream_covers_the_training_split_once_per_window_and_is_deterministic(corpus, monkeypatch):
    model, taken = tiny(), []
    monkeypatch.setattr(sae_fit, "BUFFER", (1000, 2**27))
    real = corpus.batch
    spy = SimpleNamespace(
        n_tokens=corpus.n_tokens,
        batch=lambda seed, split, *rest: taken.append(split) or real(seed, split, *rest),
    )
    first, again, other = (
        [next(batches) for _ in range(60)]
        for batches in (
            sae_fit.stream(model, spy, 1, 100, 5),
            sae_fit.stream(model, corpus, 1, 100, 5),
            sae_fit.stream(model, corpus, 1, 100, 6),
        )
    )
    assert set(taken) == {"train"} and all(x.shape == (100, 128) for x in first)
    assert all(torch.equal(a, b) for a, b in zip(first, again)) and not torch.equal(
        first[0], other[0]
    )
    with torch.no_grad():
        rows = torch.cat(
            [
                model.trunk(real(5, "train", step, 32, 64)[0])[1][1].flatten(0, 1)
                for step in range(len(taken))
            ]
        )
    recorded, handed = (
        Counter(row.tobytes() for row in x.numpy()) for x in (rows, torch.cat(first))
    )
    assert handed <= recorded  # none that was not recorded, none twice
    early = Counter(row.tobytes() for row in rows[:2048].numpy())
    assert (
        early - Counter(row.tobytes() for row in first[0].numpy())
        and (handed & early).total() > 1500
    )


def test_training_is_deterministic_and_leaves_the_global_generator_alone(corpus, monkeypatch):
    monkeypatch.setattr(sae_fit, "BUFFER", (2000, 2**27))
    model, found, state = tiny(), [], torch.get_rng_state()
    for _ in range(2):
        saes = [SAE(128, 160, 0, l1=1e-4), SAE(128, 160, 0, k=4)]
        sae_fit.fit(saes, sae_fit.stream(model, corpus, 0, 64, 3), 30, 1e-3)
        found.append(torch.cat([w.flatten() for one in saes for w in one.state_dict().values()]))
    assert torch.equal(*found) and torch.equal(state, torch.get_rng_state())


# ---- the formulas ----------------------------------------------------------------------------------------

CUTS = st.lists(st.integers(1, 59), max_size=5)


def agreement(x, y, cuts=()):
    met = sae_fit.Agreement()
    for a, b in zip(torch.tensor_split(x, cuts), torch.tensor_split(y, cuts)):
        if len(a):
            met.add(a, b)
    return met


def sample(seed, n=60, h=5):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, h, generator=draw, dtype=torch.float64) + 1
    return x, x + 0.5 * torch.randn(n, h, generator=draw, dtype=torch.float64)


@given(st.integers(0, 99), st.floats(-1e4, 1e4), st.floats(1e-3, 1e3), CUTS)
def test_explained_variance_means_what_it_says(seed, shift, scale, cuts):
    x, y = sample(seed)
    want = 1 - ((x - y) ** 2).sum().item() / ((x - x.mean(0)) ** 2).sum().item()
    assert agreement(x, y, sorted(cuts)).explained_variance() == pytest.approx(want, abs=1e-9)
    moved = agreement(x * scale + shift, y * scale + shift, sorted(cuts)).explained_variance()
    assert moved == pytest.approx(want, abs=1e-6)
    assert agreement(x, x, cuts).explained_variance() == 1
    mean = x.mean(0).expand_as(x)
    assert agreement(x, mean, sorted(cuts)).explained_variance() == pytest.approx(0, abs=1e-9)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    assert agreement(x[order], y[order]).explained_variance() == pytest.approx(want, abs=1e-9)


@given(st.integers(0, 99), st.floats(1e-3, 1e3), CUTS)
def test_cosine_and_mean(seed, scale, cuts):
    x, y = sample(seed)
    x[::7] = 0
    met = agreement(x, y * scale, sorted(cuts))
    some = x.any(1)
    want = ((x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1)))[some].mean().item()
    assert met.cosine() == pytest.approx(want, abs=1e-9) and torch.allclose(met.mean, x.mean(0))
    assert agreement(x, -x).cosine() == pytest.approx(-1)


def test_what_is_undefined_is_none():
    same = torch.ones(4, 3)
    assert agreement(same, same * 2).explained_variance() is None
    assert agreement(same * 0, same).cosine() is None
    assert sae_fit.recovered(sae=3.0, model=2.0, ablated=2.0) is None
    assert sae_fit.recovered(sae=3.0, model=2.0, ablated=6.0) == 0.75


# ---- judging ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["crate", "gpt2"])
@torch.no_grad()
def test_evaluation_equals_brute_force(kind, corpus, monkeypatch):
    monkeypatch.setattr(sae_fit, "ROWS", 50)
    model, layer, limit = tiny(kind), 1, 500
    saes = [SAE(128, 160, layer, l1=0.1), SAE(128, 160, layer, k=3, seed=2)]
    saes[1].c[::2] = -1e3
    found = sae_fit.evaluate(model, corpus, layer, saes, limit, batch=3)
    ids = torch.cat([y.flatten() for _, y in corpus.blocks("val", 4, 64)])
    ids = torch.cat([next(iter(corpus.blocks("val", 1, 64)))[0][0, :1], ids])
    windows = [(ids[i : i + 64], ids[i + 1 : i + 65]) for i in range(0, limit, 64)]
    windows[-1] = tuple(part[: limit % 64] for part in windows[-1])
    codes = torch.cat([model.trunk(x[None])[1][layer][0] for x, _ in windows]).double()

    def loss(replace):
        handle = model.blocks[layer].sparsifier.code.register_forward_hook(
            lambda m, i, a: replace(a)
        )
        total = sum(
            F.cross_entropy(model(x[None])[0], y, reduction="sum").item() for x, y in windows
        )
        handle.remove()
        return total / limit

    mean = codes.mean(0)
    ablated = {"zero": loss(torch.zeros_like), "mean": loss(lambda a: mean.float().expand_as(a))}
    base = loss(lambda a: None)
    for one, result in zip(saes, found):
        f = one.encode(codes.float())
        y = one.decode(f).double()
        spliced = loss(lambda a, one=one: one.decode(one.encode(a)))
        want = {"sae": spliced, "model": base, **ablated}
        assert result["loss"] == pytest.approx(want, abs=1e-5)
        assert result["L0"] == pytest.approx((f > 0).sum(1).double().mean().item())
        assert result["dead"] == pytest.approx((f == 0).all(0).double().mean().item())
        assert result["explained_variance"] == pytest.approx(
            (1 - (codes - y).square().sum() / (codes - mean).square().sum()).item(), abs=1e-5
        )
        assert result["cosine"] == pytest.approx(
            F.cosine_similarity(codes, y).mean().item(), abs=1e-5
        )
        loss_of = result["loss"]
        for name in ablated:
            harm = loss_of[name] - loss_of["model"]
            share = (loss_of[name] - loss_of["sae"]) / harm if harm > 0 else None
            assert result["recovered"][name] == (share and pytest.approx(share))
    assert found[1]["L0"] <= 3 and found[1]["dead"] >= 0.5
    assert sae_fit.evaluate(model, corpus, layer, [identity(128)], limit)[0][
        "explained_variance"
    ] == pytest.approx(1, abs=1e-9)


def test_broken_weights_are_told(corpus):
    model = tiny()
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    with pytest.raises(UserError, match="loss .model. is nan"):
        sae_fit.evaluate(model, corpus, 0, [SAE(128, 130, 0)], 100)
    with torch.no_grad():
        model.blocks[0].sparsifier.D[0, 0] = math.nan
    with pytest.raises(UserError, match="not finite"):
        next(sae_fit.stream(model, corpus, 1, 10, 0))

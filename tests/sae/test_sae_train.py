"""Training of sparse autoencoders: a planted dictionary is found, dead features come back."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny_saes import H, seeded, small_corpus, tiny_model

from crate_mini import UserError
from crate_mini.sae import train
from crate_mini.sae.autoencoder import SAE
from crate_mini.sae.evaluate import ReconstructionQuality


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("corpus"))


def planted(h=24, width=32, active=2):
    """(endless batches of sparse non-negative mixtures of unit rows, the rows)."""
    generator = seeded(0)
    rows = F.normalize(torch.randn(width, h, generator=generator), dim=1)

    def mixtures():
        while True:
            f = torch.rand(256, width, generator=generator) + 0.5
            kept = torch.rand(256, width, generator=generator).topk(active, 1).indices
            yield torch.zeros_like(f).scatter(1, kept, f.gather(1, kept)) @ rows

    return mixtures(), rows


def similarity(rows, sae):
    """The largest cosine of each planted row with a decoder row."""
    return (rows @ sae.W.detach().T).max(1).values


# ---- a run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [{"l1": 8e-3}, {"k": 2}])
def test_a_planted_dictionary_is_recovered(sparsity):
    mixtures, rows = planted()
    sae = SAE(24, 64, seed=1, **sparsity)
    assert similarity(rows, sae).mean() < 0.7
    train.fit([sae], mixtures, 1200, 3e-3)
    quality, x = ReconstructionQuality(), next(mixtures)
    f = sae.encode(x).detach()
    quality.add(x, sae.decode(f).detach())
    found = similarity(rows, sae)
    assert (found > 0.9).double().mean() >= 0.9, found.sort().values
    assert quality.explained_variance() > 0.9
    assert (f > 0.05).sum(1).double().mean() < 4


@pytest.mark.parametrize("codes", [torch.zeros(64, 8), torch.ones(64, 8)])
def test_codes_that_never_vary_are_refused(codes):
    with pytest.raises(UserError, match="dead layer"):
        train.fit([SAE(8, 16, 0)], iter([codes] * 9), 5, 1e-3)


def test_divergence_is_reported():
    with pytest.raises(UserError, match="diverged; try a lower --lr"):
        train.fit([SAE(24, 48, 0, l1=1e-3)], planted()[0], 60, 1e30)


def test_training_is_deterministic_and_leaves_the_global_generator_alone(corpus, monkeypatch):
    monkeypatch.setattr(train, "BUFFER_TOKENS", 2000)
    model, state = tiny_model(), torch.get_rng_state()
    runs = []
    for _ in range(2):
        saes = [SAE(H, 160, 0, l1=1e-4), SAE(H, 160, 0, k=4)]
        train.fit(saes, train.code_batches(model, corpus, 0, 64, 3), 30, 1e-3)
        weights = [w.flatten() for sae in saes for w in sae.state_dict().values()]
        runs.append(torch.cat(weights))
    assert torch.equal(*runs)
    assert torch.equal(state, torch.get_rng_state())


# ---- a step --------------------------------------------------------------------------------------


def test_decoder_rows_keep_norm_one():
    mixtures, _ = planted()
    sae = SAE(24, 48, l1=1e-3)
    optimizer = torch.optim.Adam(sae.parameters(), 1e-2)
    for _ in range(20):
        train.training_step(sae, optimizer, next(mixtures), 1e-2)
        assert torch.allclose(sae.W.norm(dim=1), torch.ones(48), atol=1e-6)


def test_the_gradient_is_projected_before_the_optimizer_sees_it():
    mixtures, _ = planted()
    sae = SAE(24, 48, l1=1e-3)
    rows = sae.W.detach().clone()
    optimizer = torch.optim.SGD(sae.parameters(), 0.0)
    optimizer_step = optimizer.step
    along_rows = []

    def spy():
        along_rows.append((sae.W.grad * rows).sum(1).abs().max().item())
        optimizer_step()

    optimizer.step = spy
    train.training_step(sae, optimizer, next(mixtures), 0.0)
    assert along_rows[0] < 1e-5 * sae.W.grad.norm(dim=1).max()


# ---- dead features -------------------------------------------------------------------------------


def test_resampling_revives_dead_features_and_only_them():
    mixtures, _ = planted()
    x, sae = next(mixtures), SAE(24, 40, l1=1e-3)
    optimizer = torch.optim.Adam(sae.parameters(), 1e-3)
    train.training_step(sae, optimizer, x, 1e-3)
    dead = torch.arange(40) % 3 == 0
    with torch.no_grad():
        sae.c[dead] = -100.0
    assert not (sae.encode(x)[:, dead] > 0).any()
    old = {name: w.detach().clone() for name, w in sae.state_dict().items()}
    assert train.resample(sae, optimizer, x, dead, seeded(0)) == int(dead.sum())
    assert (sae.encode(x)[:, dead] > 0).any(0).all()
    assert torch.allclose(sae.W.norm(dim=1), torch.ones(40))
    assert torch.equal(sae.b, old["b"])
    assert torch.equal(sae.c[~dead], old["c"][~dead])
    assert torch.equal(sae.W[~dead], old["W"][~dead])
    assert torch.equal(sae.E[:, ~dead], old["E"][:, ~dead])
    for moments in (optimizer.state[sae.W]["exp_avg"], optimizer.state[sae.E]["exp_avg_sq"].T):
        assert (moments[dead] == 0).all()
        assert (moments[~dead] != 0).any()


def test_resampling_prefers_what_is_badly_explained_and_stops_at_the_number_of_inputs():
    sae = SAE(6, 30, l1=1e-3).requires_grad_(False)
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    sae.E.zero_()
    x = torch.zeros(10, 6)  # nothing fires, x' = 0
    x[3] = torch.tensor([0.0, 0, 5, 0, 0, 0])
    dead = torch.ones(30, dtype=torch.bool)
    assert train.resample(sae, optimizer, x, dead, seeded(0)) == 1
    assert torch.allclose(sae.W[0], F.normalize(x[3], dim=0))
    assert train.resample(sae, optimizer, torch.zeros(4, 6), dead, torch.Generator()) == 0


def test_dead_features_of_a_run_are_resampled_and_counted():
    mixtures, _ = planted()
    sae = SAE(24, 40, k=2)
    with torch.no_grad():
        sae.c[:30] = -1e3  # the remaining ten cannot do the work of 32
    assert train.fit([sae], mixtures, 300, 3e-3)[0] >= 30
    assert (sae.encode(next(mixtures))[:, :30] > 0).any(0).sum() > 10  # 0 without resampling


# ---- batches -------------------------------------------------------------------------------------


def counted(rows):
    """How often each row occurs."""
    return Counter(row.tobytes() for row in rows.numpy())


def test_batches_are_deterministic_and_use_each_code_of_the_training_split_once(
    corpus, monkeypatch
):
    monkeypatch.setattr(train, "BUFFER_TOKENS", 1000)
    model, splits = tiny_model(), []

    def batch(seed, split, *position):
        splits.append(split)
        return corpus.batch(seed, split, *position)

    spy = SimpleNamespace(n_tokens=corpus.n_tokens, batch=batch)

    def sixty(source, seed):
        codes = train.code_batches(model, source, 1, 100, seed)
        return [next(codes) for _ in range(60)]

    first = sixty(spy, 5)
    assert set(splits) == {"train"}
    assert all(x.shape == (100, H) for x in first)
    assert all(torch.equal(a, b) for a, b in zip(first, sixty(corpus, 5)))
    assert not torch.equal(first[0], sixty(corpus, 6)[0])
    recorded = []
    with torch.no_grad():
        for step in range(len(splits)):
            ids = corpus.batch(5, "train", step, 32, 64)[0]
            recorded.append(model.trunk(ids)[1][1].flatten(0, 1))
    recorded = torch.cat(recorded)
    used = counted(torch.cat(first))
    assert used <= counted(recorded)  # only codes of these windows, and none twice
    early = counted(recorded[:2048])
    assert early - counted(first[0])
    assert (used & early).total() > 1500


def test_codes_that_are_not_finite_are_refused(corpus):
    model = tiny_model()
    with torch.no_grad():
        model.blocks[0].sparsifier.D[0, 0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        next(train.code_batches(model, corpus, 1, 10, 0))


def test_a_layer_that_does_not_exist_is_refused(corpus):
    with pytest.raises(UserError, match="layer 2 does not exist; layers are 0 to 1"):
        next(train.code_batches(tiny_model(), corpus, 2, 10, 0))

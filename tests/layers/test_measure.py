"""Layer measurements: formulas against numpy, invariances, planted cases, no trace on the model."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_layers import KINDS, D, H, K, T, gaussian, tiny, token_ids

from crate_mini import UserError, model
from crate_mini.intervene import hook_codes
from crate_mini.layers import measure
from crate_mini.layers.measure import (
    AFTER,
    BEFORE,
    bases,
    bounds,
    dictionary,
    measure_layers,
    unit_rate,
)
from crate_mini.training import checkpoint

# ---- coding rate ---------------------------------------------------------------------------------


def rate_by_definition(u, eps2=0.01):
    """1/2 sum_k logdet(I_N + p/(N eps2) G_k), G_k the Gram matrix of the tokens, head by head."""
    N, K, p = u.shape
    total = 0.0
    for k in range(K):
        v = u[:, k] / np.linalg.norm(u[:, k], axis=1, keepdims=True)
        total += 0.5 * np.linalg.slogdet(np.eye(N) + p / (N * eps2) * v @ v.T)[1]
    return total


shapes = st.tuples(st.integers(1, 24), st.integers(1, 4), st.integers(1, 12), st.integers(0, 99))


@given(shapes)
def test_rate_is_its_definition_and_lies_between_its_bounds(shape):
    N, K, p, seed = shape
    u = gaussian(2, N, K, p, seed=seed)
    rates = unit_rate(u).tolist()
    assert rates == pytest.approx([rate_by_definition(v.numpy()) for v in u], rel=1e-10)
    least, most = bounds(N, K, p)
    for rate in rates:
        assert least * (1 - 1e-12) <= rate <= most * (1 + 1e-12)


@given(shapes)
def test_rate_is_invariant_to_order_length_and_rotations_inside_a_head(shape):
    N, K, p, seed = shape
    u = gaussian(N, K, p, seed=seed)
    rotations = torch.linalg.qr(gaussian(K, p, p, seed=seed + 1)).Q
    lengths = gaussian(N, K, 1, seed=seed + 2).abs() + 0.1
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    for other in (u[order], lengths * u, torch.einsum("nkp,kpq->nkq", u, rotations)):
        assert unit_rate(other).item() == pytest.approx(unit_rate(u).item(), rel=1e-9)


def test_rate_changes_when_heads_are_mixed_or_a_basis_is_stretched():
    u = gaussian(40, 2, 5)
    u[:, 0] = u[:, 0, :1] * u[0, 0]  # one direction in head 0, all in head 1
    rotation = torch.linalg.qr(gaussian(10, 10, seed=1)).Q
    mixed = (u.flatten(1) @ rotation).view(40, 2, 5)
    stretched = u * torch.tensor([1.0, 1, 1, 1, 30])
    rate = unit_rate(u)
    assert unit_rate(mixed) > rate + 5
    assert unit_rate(stretched) < rate - 1


def test_equal_and_evenly_spread_tokens_reach_the_bounds():
    K, p = 3, 4
    equal = gaussian(1, K, p).expand(12, K, p)
    spread = torch.eye(p, dtype=torch.float64).repeat(3, 1)[:, None].expand(12, K, p)
    least, most = bounds(12, K, p)
    assert unit_rate(equal).item() == pytest.approx(least) == K / 2 * math.log(1 + p / 0.01)
    assert unit_rate(spread).item() == pytest.approx(most) == K * p / 2 * math.log(101)
    few = torch.eye(p, dtype=torch.float64)[:2, None]  # fewer tokens than directions
    assert unit_rate(few).item() == pytest.approx(bounds(2, 1, p)[1])


def projected_by_the_model(attention, x):
    """(B, T, K, p): x as the attention itself projects it, without bias."""
    if hasattr(attention, "U"):
        return (x @ attention.U).unflatten(-1, (K, -1))
    values = attention.qkv(x).unflatten(-1, (3, K, -1))[:, :, 2]
    if attention.qkv.bias is None:
        return values
    return values - attention.qkv.bias[2 * D :].view(K, D // K)


@pytest.mark.parametrize("kind", ["crate", "gpt2", "gelu"])
def test_bases_are_those_of_the_model_and_orthonormal_ones_span_the_same(kind):
    attention = tiny(**KINDS[kind]).blocks[0].attention
    x = gaussian(1, 5, D).float()
    maps = bases(attention)
    u = torch.einsum("btd,dkp->btkp", x.double(), maps["U"])
    assert torch.allclose(u, projected_by_the_model(attention, x).double(), atol=1e-6)
    for k in range(K):
        Q, U = maps["orthonormal U"][:, k], maps["U"][:, k]
        assert torch.allclose(Q.T @ Q, torch.eye(D // K, dtype=Q.dtype), atol=1e-12)
        assert torch.allclose(Q @ Q.T @ U, U, atol=1e-12)
    assert torch.equal(maps["whole"][:, 0], torch.eye(D, dtype=torch.float64))


# ---- one layer against numpy ---------------------------------------------------------------------


def layer_norm(z, norm):
    z = z.double().numpy()
    x = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-5)
    bias = 0 if norm.bias is None else norm.bias.detach().double().numpy()
    return x * norm.weight.detach().double().numpy() + bias


def streams_and_report(lm, number):
    """([z before attention, z after it], the numbers of this layer)."""
    streams = []

    def keep(module, inputs):
        streams.append(*inputs)

    lm.blocks[number].attention.register_forward_pre_hook(keep)
    lm.blocks[number].sparsifier.register_forward_pre_hook(keep)
    report = measure_layers(lm, [token_ids()])[number]
    return streams, report


@pytest.mark.parametrize("kind", ["crate", "variants", "mhsa-ista"])
def test_rates_of_a_layer_are_the_formula(kind):
    lm = tiny(**KINDS[kind])
    streams, report = streams_and_report(lm, 1)
    attention = lm.blocks[1].attention
    assert list(report["rate"]) == ["attention input", "after attention"]
    for z, rates in zip(streams, report["rate"].values()):
        x = layer_norm(z, attention.norm)
        for name, U in bases(attention).items():
            values = []
            for window in x:
                u = np.einsum("td,dkp->tkp", window, U.numpy())
                values.append(rate_by_definition(u))
            assert rates[name]["mean"] == pytest.approx(np.mean(values), rel=1e-6)
            assert rates[name]["std"] == pytest.approx(np.std(values), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", ["crate", "variants", "mhsa-ista"])
def test_objective_error_and_sparsity_of_a_layer_are_the_formulas(kind):
    lm = tiny(**KINDS[kind])
    (_, z), report = streams_and_report(lm, 1)
    ista = lm.blocks[1].sparsifier
    x = layer_norm(z, ista.norm).reshape(-1, D)
    atoms = ista.D.detach().double().numpy()
    a = np.zeros((len(x), atoms.shape[1]))
    objective = []
    for step in range(ista.steps + 1):
        residual = x - a @ atoms.T
        per_token = 0.1 * a.sum(1) + 0.5 * np.square(residual).sum(1)
        objective.append(np.mean(per_token) / D)
        if step < ista.steps:
            a = np.maximum(a + 0.1 * residual @ atoms - 0.01, 0)
    assert report["lasso"] == pytest.approx(objective, rel=1e-5)
    error = np.square(x - a @ atoms.T).sum() / np.square(x).sum()
    assert report["reconstruction_error"] == pytest.approx(error, rel=1e-5)
    # A code may lie on the threshold.
    assert report["density"] == pytest.approx(np.mean(a > 0), abs=2e-3)
    assert report["l0"]["mean"] == pytest.approx(report["density"] * report["neurons"])
    assert report["l0"]["std"] == pytest.approx(np.std((a > 0).sum(1)), abs=0.05)


def norm2_by_power_iteration(atoms, steps=3000):
    """The largest eigenvalue of D^T D, one product a step."""
    gram = atoms.T @ atoms
    v = np.ones(len(gram))
    for _ in range(steps):
        v = gram @ v
        v /= np.linalg.norm(v)
    return np.linalg.norm(atoms @ v) ** 2


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 99))
def test_dictionary_health_is_its_definitions(d, expansion, seed):
    lm = tiny(seed, n_embd=d, n_head=1, n_layer=1, expansion=expansion)
    health = dictionary(lm.blocks[0].sparsifier)
    atoms = lm.blocks[0].sparsifier.D.detach().double().numpy()
    unit = atoms / np.linalg.norm(atoms, axis=0)
    h = atoms.shape[1]
    cosines = [abs(unit[:, i] @ unit[:, j]) for i in range(h) for j in range(i)] or [0]
    tight = h / d * np.eye(d)
    distance = np.sqrt(np.square(atoms @ atoms.T - tight).sum())
    unit_distance = np.sqrt(np.square(unit @ unit.T - tight).sum())
    assert health["norm2"] == pytest.approx(norm2_by_power_iteration(atoms), rel=1e-3)
    assert health["eta_norm2"] == pytest.approx(0.1 * health["norm2"])
    assert health["coherence"] == pytest.approx(max(cosines))
    assert health["mean_cosine"] == pytest.approx(np.mean(cosines))
    assert health["welch"] <= health["coherence"] + 1e-9
    assert health["frame_distance"] == pytest.approx(distance)
    assert health["frame_distance_unit"] == pytest.approx(unit_distance, abs=1e-9)


def test_health_of_a_tight_frame_and_of_an_mlp():
    ista = tiny().blocks[0].sparsifier
    with torch.no_grad():
        ista.D.copy_(3 * torch.eye(D).repeat(1, 4))  # four equal orthogonal bases
    health = dictionary(ista)
    assert health["frame_distance_unit"] == pytest.approx(0, abs=1e-9)
    assert health["coherence"] == 1
    assert health["norm2"] == pytest.approx(36)
    assert health["frame_distance"] == pytest.approx(32 * 12**0.5)
    assert dictionary(tiny(**KINDS["gpt2"]).blocks[0].sparsifier)["eta_norm2"] is None


# ---- what steps do, planted codes ----------------------------------------------------------------


@given(st.floats(0.05, 1.9), st.integers(1, 6), st.integers(0, 99))
def test_no_step_raises_the_objective_when_eta_norm2_is_below_2(eta, steps, seed):
    lm = tiny(seed, unit_norm=True, eta=eta, ista_steps=steps, lam=0.3)
    lm.train()
    with torch.no_grad():
        for _ in range(30):  # the parametrisation's own power iteration
            for block in lm.blocks:
                _ = block.sparsifier.D  # reading it makes a step
    for layer in measure_layers(lm.eval(), [token_ids(seed)]):
        if layer["dictionary"]["eta_norm2"] < 2:
            for before, after in zip(layer["lasso"], layer["lasso"][1:]):
                assert after <= before * (1 + 1e-6)
            assert layer["lasso"][-1] < layer["lasso"][0]


def test_a_step_far_beyond_the_limit_raises_the_objective():
    layer = measure_layers(tiny(eta=2.0), [token_ids()])[0]
    assert layer["dictionary"]["eta_norm2"] > 2
    assert layer["lasso"][-1] > layer["lasso"][0]


def test_planted_codes_have_the_density_they_were_planted_with():
    lm = tiny()
    n = 3 * T  # tokens
    assert n == H
    # Neuron j is on for n - 1 - j of the n tokens.
    planted = (torch.arange(n)[:, None] > torch.arange(H)).float().view(3, T, H)
    with hook_codes(lm, 1, lambda codes: planted):
        layer = measure_layers(lm, [token_ids()])[1]
    densities = np.arange(n) / n
    assert layer["density_by_neuron"] == [round(share, 6) for share in densities[::-1]]
    assert layer["dead"] == 1
    assert layer["density"] == pytest.approx(23.5 / 48)
    assert layer["l0"]["mean"] == pytest.approx(23.5)
    deciles = np.quantile(densities, np.arange(1, 10) / 10)
    assert layer["density_deciles"] == pytest.approx(deciles)


# ---- the control ---------------------------------------------------------------------------------


def test_the_untrained_control_is_where_training_starts_and_leaves_the_generators_alone():
    config = model.Config(
        vocab_size=64, block_size=16, n_layer=1, n_head=2, n_embd=12, unit_norm=True
    )
    torch.manual_seed(7)
    start = model.LM(config).state_dict()
    torch.rand(3)
    state = torch.get_rng_state()
    control = checkpoint.untrained(config, 7).state_dict()
    assert start.keys() == control.keys()
    for name in start:
        assert torch.equal(start[name], control[name])
    assert torch.equal(torch.get_rng_state(), state)


# ---- around the model ----------------------------------------------------------------------------


def has_hooks(lm):
    return any(module._forward_hooks or module._forward_pre_hooks for module in lm.modules())


def test_batches_add_up_and_measuring_leaves_no_trace():
    lm = tiny()
    ids = token_ids(rows=4)
    before = lm(ids)
    whole = measure_layers(lm, [ids])
    rows = measure_layers(lm, list(ids.split(1)))
    for a, b in zip(whole, rows):
        assert a["density_by_neuron"] == b["density_by_neuron"]
        assert a["lasso"] == pytest.approx(b["lasso"])
        rate = a["rate"]["after attention"]["U"]["mean"]
        assert rate == pytest.approx(b["rate"]["after attention"]["U"]["mean"])
    assert torch.equal(lm(ids), before)
    assert not has_hooks(lm)


def spoil_dictionary(lm):
    lm.blocks[0].sparsifier.D.fill_(float("inf"))


def spoil_attention(lm):
    lm.blocks[1].attention.out.weight.fill_(float("nan"))


def spoil_last_output(lm):
    lm.blocks[1].sparsifier.proj.weight.fill_(float("nan"))


@pytest.mark.parametrize(
    "kind, spoil, place",
    [
        ("crate", spoil_dictionary, "layer 0"),
        ("crate", spoil_attention, "layer 1"),
        ("gpt2", spoil_last_output, "after the last layer"),
    ],
)
def test_a_layer_that_is_not_finite_is_named_and_leaves_no_hooks(kind, spoil, place):
    lm = tiny(**KINDS[kind])
    with torch.no_grad():
        spoil(lm)
    with pytest.raises(UserError, match=place):
        measure_layers(lm, [token_ids()])
    assert not has_hooks(lm)


# ---- next to the optimum -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["crate", "crate+", "variants", "mhsa-ista"])
def test_codes_are_compared_on_all_tokens_if_there_are_few(kind):
    for layer in measure_layers(tiny(**KINDS[kind]), [token_ids()]):
        optimum = layer["optimum"]
        assert optimum["tokens"] == 3 * T
        assert optimum["converged"]
        assert optimum["start"] == pytest.approx(layer["lasso"][0])
        assert optimum["codes"]["objective"] == pytest.approx(layer["lasso"][-1], rel=1e-5)
        assert optimum["codes"]["density"] == pytest.approx(layer["density"], abs=1e-6)
        assert optimum["best"]["objective"] < optimum["codes"]["objective"]


def test_the_compared_tokens_are_a_fixed_sample_whatever_the_batches():
    lm, ids = tiny(), token_ids(rows=4)
    whole = measure_layers(lm, [ids], lasso_tokens=10)
    for batches in (list(ids.split(1)), [ids[:3], ids[3:]]):
        for a, b in zip(whole, measure_layers(lm, batches, lasso_tokens=10)):
            assert a["optimum"]["tokens"] == 10
            assert a["optimum"]["start"] == pytest.approx(b["optimum"]["start"])
            best = b["optimum"]["best"]["objective"]
            assert a["optimum"]["best"]["objective"] == pytest.approx(best, rel=1e-4)


def test_the_codes_in_use_are_those_after_top_k_and_debias():
    lm = tiny(**KINDS["top-k"])
    ista = lm.blocks[1].sparsifier
    used = []
    with hook_codes(lm, 1, lambda codes: used.append(codes.flatten(0, 1))):
        (_, z), report = streams_and_report(lm, 1)
    x = torch.from_numpy(layer_norm(z, ista.norm).reshape(-1, D))
    a, atoms = used[0].double(), ista.D.detach().double()
    residual = x - a @ atoms.T
    error = (residual.square().sum() / x.square().sum()).item()
    objective = (0.1 * a.sum(1) + 0.5 * residual.square().sum(1)).mean().item() / D
    codes = report["optimum"]["codes"]
    assert report["reconstruction_error"] == pytest.approx(error, rel=1e-5)
    assert codes["objective"] == pytest.approx(objective, rel=1e-5)
    assert codes["density"] == pytest.approx(report["density"], abs=1e-6)
    assert codes["density"] <= 3 / H


def test_a_model_in_low_precision_is_measured_in_float32():
    single = measure_layers(tiny(), [token_ids()])
    half = measure_layers(tiny().bfloat16(), [token_ids()])
    for a, b in zip(single, half):
        assert b["lasso"] == pytest.approx(a["lasso"], rel=0.05)
        assert b["optimum"]["converged"]
        best = a["optimum"]["best"]["objective"]
        assert b["optimum"]["best"]["objective"] == pytest.approx(best, rel=0.05)


def test_windows_in_which_the_rate_falls_are_counted():
    lm = tiny()
    with torch.no_grad():
        lm.blocks[0].attention.out.bias.copy_(100 * torch.linspace(-1, 1, D))  # makes tokens equal
    (layer, _) = measure_layers(lm, [token_ids(rows=5)])
    assert layer["windows"] == 5
    assert layer["windows_compressed"] == {"U": 5, "orthonormal U": 5, "whole": 5}


def test_the_interval_of_a_change_holds_it_and_redraws_documents():
    """Windows of one document change alike; the planted fault is to redraw windows."""
    rng, hits = np.random.default_rng(0), {"documents": 0, "windows": 0}
    for _ in range(300):
        sizes = rng.integers(1, 12, 20)
        document = np.repeat(np.arange(20), sizes)
        n = len(document)
        after = 5 + rng.normal(size=20)[document] + 0.5 * rng.normal(size=n)
        rates = {BEFORE: {"U": [4.0] * n}, AFTER: {"U": after.tolist()}}
        for unit, numbers in (("documents", document.tolist()), ("windows", list(range(n)))):
            change = measure._changes(rates, numbers)["U"]
            low, high = change["ci95"]
            assert low <= change["mean"] <= high
            hits[unit] += low < 1 < high
    assert 0.90 <= hits["documents"] / 300 <= 0.98
    assert hits["windows"] / 300 < 0.85
    assert measure._changes(rates, [0] * n)["U"]["ci95"] is None


def test_a_window_belongs_to_the_document_it_begins_in():
    ids = token_ids(rows=5).clamp(min=1)
    ids[1, 3] = ids[1, 9] = ids[3, 15] = 0  # three documents end
    lm = tiny()
    (layer, *_) = measure_layers(lm, [ids[:2], ids[2:]], eot=0)
    assert layer["documents"] == 3  # windows 0 and 1, 2 and 3, 4
    apart = measure_layers(lm, [ids])[0]
    assert apart["documents"] == 5
    for name, change in layer["change"].items():
        before, after = (rates[name]["mean"] for rates in layer["rate"].values())
        assert change["mean"] == pytest.approx(after - before)

"""The best possible codes: another solver, closed forms, the bound; steps that go too far."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_layers import gaussian

from crate_mini import reference
from crate_mini.layers.optimum import best_codes, compare, duality_gap, own_steps


def by_coordinate_descent(x, D, lam, sweeps=4000):
    """The non-negative lasso of one x (d,) in numpy: one code at a time, each set to its best."""
    h = D.shape[1]
    lams = np.broadcast_to(np.asarray(lam, dtype=float), h)
    a = np.zeros(h)
    residual = x.copy()
    for _ in range(sweeps):
        largest = 0.0
        for j in range(h):
            atom = D[:, j]
            energy = atom @ atom
            new = max(0.0, a[j] + (atom @ residual - lams[j]) / energy)
            residual -= (new - a[j]) * atom
            largest = max(largest, abs(new - a[j]))
            a[j] = new
        if largest < 1e-12:
            break
    return a


def objectives(x, a, D, lam):
    return reference.lasso(x, a, D, lam)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize("learned", [False, True])
def test_best_codes_are_those_of_coordinate_descent(learned, dtype, tolerance):
    x, D = gaussian(5, 6), gaussian(6, 24, seed=1)
    lam = 0.3 * torch.rand(24, generator=torch.Generator().manual_seed(2)).double() + 0.05
    lam = lam if learned else 0.2
    expected = []
    for token in x.numpy():
        expected.append(by_coordinate_descent(token, D.numpy(), lam))
    expected = torch.from_numpy(np.stack(expected))
    low_precision = lam.to(dtype) if learned else lam
    inputs = (x.to(dtype), D.to(dtype), low_precision)
    a, gap, _ = best_codes(*inputs, tolerance=tolerance, limit=20_000)
    lowest = objectives(x, expected, D, lam)
    assert objectives(x, a.double(), D, lam).tolist() == pytest.approx(lowest.tolist(), rel=1e-5)
    assert ((a > 1e-4) == (expected > 1e-4)).all()
    assert gap.mean() <= tolerance * 0.5 * x.square().sum(-1).mean()


def test_orthonormal_atoms_have_a_closed_form():
    D = torch.linalg.qr(gaussian(8, 8)).Q
    x = gaussian(20, 8, seed=1)
    a, gap, iterations = best_codes(x, D, 0.3)
    assert torch.allclose(a, (x @ D - 0.3).clamp_min(0))
    assert gap.max() < 1e-12
    assert iterations == 20  # the first check


@given(st.integers(1, 5), st.integers(1, 12), st.floats(0.0, 1.0), st.integers(0, 99))
def test_no_codes_are_better_than_the_bound(d, h, lam, seed):
    x, D = gaussian(4, d, seed=seed), gaussian(d, h, seed=seed + 1)
    best, _, _ = best_codes(x, D, lam, tolerance=1e-6)
    lowest = objectives(x, best, D, lam)
    for a in (torch.zeros_like(best), best, gaussian(4, h, seed=seed + 2).abs(), 0.9 * best):
        bound = objectives(x, a, D, lam) - duality_gap(x, a, D, lam)
        assert (bound <= lowest + 1e-9).all()


def test_too_few_iterations_are_reported():
    x, D = gaussian(5, 6), gaussian(6, 24, seed=1)
    found = compare(x, torch.zeros(5, 24).double(), D, eta=0.01, lam=0.1, limit=20)
    assert found["iterations"] == 20
    assert not found["converged"]
    true = compare(x, torch.zeros(5, 24).double(), D, eta=0.01, lam=0.1)
    assert true["converged"]
    lowest = found["best"]["objective"] - found["gap"]
    assert lowest <= true["best"]["objective"] <= found["best"]["objective"]


def test_the_layers_own_codes_are_described():
    x, D = gaussian(5, 6), gaussian(6, 24, seed=1)
    codes = torch.zeros(5, 24).double()
    codes[:, :6] = 1
    found = compare(x, codes, D, eta=0.01, lam=0.1)
    residual = x - D[:, :6].sum(1)
    objective = (0.6 + 0.5 * residual.square().sum(-1)).mean().item() / 6
    assert found["tokens"] == 5
    assert found["codes"] == {"objective": pytest.approx(objective), "density": 0.25}
    assert found["start"] == pytest.approx(0.5 * x.square().mean().item())


# ---- steps of the model's own size ---------------------------------------------------------------


def test_steps_within_the_limit_descend_to_the_optimum():
    D = torch.linalg.qr(gaussian(8, 8)).Q
    x = gaussian(20, 8, seed=1)
    best = objectives(x, best_codes(x, D, 0.1)[0], D, 0.1).mean().item() / 8
    for eta in (0.5, 1.0, 1.9):
        found = own_steps(x, D, eta, 0.1)
        assert found["exceeds_start"] is None
        assert found["steps"] == 200
        assert found["lowest"] == pytest.approx(best)


def test_a_step_beyond_the_limit_raises_the_objective_of_one_atom():
    # The error is multiplied by 1 - eta |D|^2 = -1.1.
    x, D = torch.ones(1, 1).double(), torch.full((1, 1), 2.1**0.5).double()
    found = own_steps(x, D, eta=1.0, lam=0.0)
    assert found == {"lowest": 0.5, "lowest_step": 0, "exceeds_start": 1, "steps": 1}


def test_the_lowest_objective_on_the_way_is_found():
    # Two orthogonal atoms: one beyond the limit, for a small part of x, and one within it.
    x, D = torch.tensor([[0.1, 1.0]]).double(), torch.diag(torch.tensor([2.1, 0.5])).sqrt().double()
    found = own_steps(x, D, eta=1.0, lam=0.0)
    errors = []
    a = np.zeros(2)
    scale = D.diag().numpy()
    for _ in range(found["steps"]):
        a = np.maximum(a + scale * (x.numpy()[0] - scale * a), 0)
        errors.append(0.25 * np.square(x.numpy()[0] - scale * a).sum())
    assert found["lowest"] == pytest.approx(min(errors))
    assert found["lowest_step"] == np.argmin(errors) + 1


def test_steps_that_overflow_end_at_once():
    x, D = torch.ones(2, 3), torch.full((3, 12), 1e12)
    found = own_steps(x, D, eta=1e12, lam=0.1)
    assert found["exceeds_start"] == 1
    assert found["lowest"] == pytest.approx(0.5)


def test_an_empty_dictionary_has_zero_codes_and_no_steps():
    x, D = torch.ones(2, 3), torch.zeros(3, 12)
    found = compare(x, torch.zeros(2, 12), D, eta=0.1, lam=0.1)
    assert found["converged"]
    assert found["best"] == found["codes"] == {"objective": 0.5, "density": 0.0}
    assert found["own_steps"]["lowest_step"] == 0

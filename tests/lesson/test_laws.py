"""Laws that hold whatever computes the ops: no reference is needed to see them broken."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crate_mini import ops, reference
from crate_mini.model import LM, Config

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])
SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 90))
pytestmark = pytest.mark.fuzz


@pytest.fixture(params=["fused", "reference"])
def backend(request):
    if request.param == "fused":
        request.getfixturevalue("extension")
    with ops.use_backend(request.param):
        yield request.param


def draw(seed, shape, dtype):
    (N, d, h), g = shape, torch.Generator().manual_seed(seed)
    x, D = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((N, d), (d, h)))
    return x.to(dtype), (D / torch.linalg.matrix_norm(D, 2)).to(
        dtype
    )  # |D| = 1: a step of 1 is stable


@given(
    seed=st.integers(0, 2**31),
    shape=SHAPES,
    dtype=DTYPES,
    lam=st.sampled_from([0.0, 0.01, 0.1, 1.0]),
    eta=st.sampled_from([0.1, 0.5, 1.0]),
)
def test_a_step_does_not_raise_the_objective(backend, seed, shape, dtype, lam, eta):
    x, D = draw(seed, shape, dtype)
    wide, before = D.double(), 0.5 * x.double().square().sum(-1)
    for steps in (1, 2, 3, 4):
        _, a = ops.ista(x, D, eta, lam, steps)
        assert (a >= 0).all()
        after = reference.lasso(x.double(), a.double(), wide, lam)
        assert (after <= before * (1 + 8 * torch.finfo(dtype).eps)).all()
        before = after


@given(seed=st.integers(0, 2**31), shape=SHAPES, dtype=DTYPES)
def test_thresholds(backend, seed, shape, dtype):
    """No threshold leaves ReLU of the correlations; one above them all leaves nothing."""
    x, D = draw(seed, shape, dtype)
    a = ops.ista_step(None, x, D, 1.0, 0.0)
    assert torch.equal(a > 0, (x @ D) > 0) or dtype == torch.bfloat16
    y, a = ops.ista(x, D, 0.5, 2 * float(x.abs().sum()) + 1, 3)
    assert not a.any() and not y.any()


@given(seed=st.integers(0, 2**31), shape=SHAPES, dtype=DTYPES)
def test_tokens_do_not_see_each_other(backend, seed, shape, dtype):
    """Permuting tokens permutes results, dropping some changes nothing else, bit for bit in the kernels."""
    x, D = draw(seed, shape, dtype)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    same = (
        torch.equal
        if backend == "fused"
        else lambda s, t: torch.allclose(s, t, rtol=0.05, atol=0.05)
    )
    for out, permuted, few in zip(
        ops.ista(x, D, 0.5, 0.1, 2),
        ops.ista(x[order], D, 0.5, 0.1, 2),
        ops.ista(x[:6], D, 0.5, 0.1, 2),
    ):
        assert same(out[order], permuted)
        assert torch.allclose(out[:6], few, rtol=0.05, atol=0.05)  # few tokens may be decoded


@given(seed=st.integers(0, 2**31), at=st.integers(0, 12))
def test_the_future_changes_nothing(backend, seed, at):
    """Through a whole model: logits up to position `at` do not depend on later tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LM(
            Config(vocab_size=31, block_size=13, n_layer=2, n_head=2, n_embd=24, query_rank=2)
        ).eval()
    ids = torch.randint(31, (2, 13), generator=torch.Generator().manual_seed(seed))
    other = ids.clone()
    other[:, at + 1 :] = (other[:, at + 1 :] + 7) % 31
    with torch.no_grad():
        one, two = model(ids), model(other)
    torch.testing.assert_close(one[:, : at + 1], two[:, : at + 1])
    assert at == 12 or not torch.equal(one[:, at + 1 :], two[:, at + 1 :])

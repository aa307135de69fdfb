"""The laws of the model: read this test first.

The first half holds the theory to itself: the gradient that attention approximates is the gradient
of the compression rate, and an attention layer is the paper's operator. The second half holds for
whatever computes the ops, so no reference is needed to see a law broken.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crate_mini import ops, reference
from crate_mini.model import LM, MSSA, Config

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])
SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 90))
SEEDS = st.integers(0, 2**31)
fuzz = pytest.mark.fuzz


# ---- the theory ----------------------------------------------------------------------------------


def tokens_and_subspaces(seed, N=12, d=8, K=2):
    """Z (N, d) and U (K, d, d / K), float64."""
    generator = torch.Generator().manual_seed(seed)
    Z = torch.randn(N, d, generator=generator, dtype=torch.float64)
    U = torch.randn(K, d, d // K, generator=generator, dtype=torch.float64)
    return Z, U


def rate(Z, U):
    return reference.compression_rate(torch.einsum("nd,kdp->nkp", Z, U))


@fuzz
@given(seed=SEEDS, N=st.integers(1, 12))
def test_the_gradient_of_the_compression_rate_is_the_one_written_down(seed, N):
    Z, U = tokens_and_subspaces(seed, N)
    Z.requires_grad_()
    (expected,) = torch.autograd.grad(rate(Z, U), Z)
    torch.testing.assert_close(reference.compression_gradient(Z.detach(), U), expected)


@fuzz
@given(seed=SEEDS)
def test_a_small_gradient_step_lowers_the_compression_rate(seed):
    Z, U = tokens_and_subspaces(seed)
    stepped = Z - 1e-6 * reference.compression_gradient(Z, U)
    assert rate(stepped, U) < rate(Z, U)


@fuzz
@given(seed=SEEDS)
def test_the_first_order_step_errs_by_the_second_order(seed):
    """Halving alpha (doubling eps^2) divides the neglected term of order alpha^3 by eight."""
    Z, U = tokens_and_subspaces(seed)
    errors = []
    for eps2 in (3e4, 6e4):  # far above the rounding of float64
        exact = Z - reference.compression_gradient(Z, U, eps2)
        errors.append((reference.compression_step(Z, U, 1.0, eps2) - exact).norm().item())
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.1)


def test_the_whole_rate_is_the_compression_rate_of_one_head():
    Z, _ = tokens_and_subspaces(0)
    alpha = Z.shape[1] / (len(Z) * reference.EPS2)
    identity = torch.eye(Z.shape[1], dtype=Z.dtype)
    expected = 0.5 * torch.logdet(identity + alpha * Z.T @ Z)
    torch.testing.assert_close(reference.coding_rate(Z), expected)
    torch.testing.assert_close(reference.coding_rate(Z), rate(Z, identity[None]))


def test_more_tokens_along_the_subspaces_reduce_the_sparse_rate():
    """R - R^c - lam |Z|_0 counts each part with its sign."""
    Z, U = tokens_and_subspaces(1)
    expected = reference.coding_rate(Z) - rate(Z, U) - 0.5 * Z.numel()
    torch.testing.assert_close(reference.sparse_rate_reduction(Z, U, 0.5), expected)


@pytest.mark.parametrize("K", [1, 2, 4])
def test_an_attention_layer_is_the_operator_of_the_paper(K):
    """With U as its output map and no bias, the module computes MSSA(LN(Z)), scaled and causal."""
    config = Config(vocab_size=8, block_size=12, n_layer=1, n_head=K, n_embd=8)
    layer = MSSA(config).double()
    Z, _ = tokens_and_subspaces(2)
    with torch.no_grad():
        layer.U.copy_(tokens_and_subspaces(3, K=1)[1][0])
        layer.out.weight.copy_(layer.U)
        layer.out.bias.zero_()
        output = layer(Z[None])[0]
        U = layer.U.unflatten(1, (K, -1)).transpose(0, 1)
        expected = reference.mssa(layer.norm(Z), U, scale=math.sqrt(K / 8))
    torch.testing.assert_close(output, expected)


# ---- the ops, whatever computes them -------------------------------------------------------------


@pytest.fixture(params=["fused", "reference"])
def backend(request):
    if request.param == "fused":
        request.getfixturevalue("extension")
    with ops.use_backend(request.param):
        yield request.param


def rows_and_dictionary(seed, shape, dtype):
    """x (N, d) and D (d, h) with |D|_2 = 1, so that every step size up to 1 is safe."""
    N, d, h = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, d, generator=generator, dtype=torch.float64)
    D = torch.randn(d, h, generator=generator, dtype=torch.float64)
    return x.to(dtype), (D / torch.linalg.matrix_norm(D, 2)).to(dtype)


@fuzz
@given(
    seed=SEEDS,
    shape=SHAPES,
    dtype=DTYPES,
    lam=st.sampled_from([0.0, 0.01, 0.1, 1.0]),
    eta=st.sampled_from([0.1, 0.5, 1.0]),
)
def test_a_step_does_not_raise_the_objective(backend, seed, shape, dtype, lam, eta):
    x, D = rows_and_dictionary(seed, shape, dtype)
    rounding = 1 + 8 * torch.finfo(dtype).eps
    before = 0.5 * x.double().square().sum(-1)  # of the zero code
    for steps in (1, 2, 3, 4):
        _, a = ops.ista(x, D, eta, lam, steps)
        assert (a >= 0).all()
        after = reference.lasso(x.double(), a.double(), D.double(), lam)
        assert (after <= before * rounding).all()
        before = after


@fuzz
@given(seed=SEEDS, shape=SHAPES, dtype=DTYPES)
def test_no_threshold_keeps_every_positive_correlation_and_a_high_one_keeps_none(
    backend, seed, shape, dtype
):
    x, D = rows_and_dictionary(seed, shape, dtype)
    _, a = ops.ista(x, D, 1.0, 0.0, 1)
    assert torch.equal(a > 0, (x @ D) > 0) or dtype == torch.bfloat16
    y, a = ops.ista(x, D, 0.5, 2 * float(x.abs().sum()) + 1, 3)
    assert not a.any() and not y.any()


@fuzz
@given(seed=SEEDS, shape=SHAPES, dtype=DTYPES)
def test_tokens_do_not_see_each_other(backend, seed, shape, dtype):
    """Permuting tokens permutes the results, bit for bit in the kernels."""
    x, D = rows_and_dictionary(seed, shape, dtype)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    whole = ops.ista(x, D, 0.5, 0.1, 2)
    permuted = ops.ista(x[order], D, 0.5, 0.1, 2)
    few = ops.ista(x[:6], D, 0.5, 0.1, 2)  # so few rows may take the decode kernel
    for i in (0, 1):
        if backend == "fused":
            assert torch.equal(whole[i][order], permuted[i])
        else:
            torch.testing.assert_close(whole[i][order], permuted[i], rtol=0.05, atol=0.05)
        torch.testing.assert_close(whole[i][:6], few[i], rtol=0.05, atol=0.05)


@fuzz
@given(seed=SEEDS, position=st.integers(0, 12))
def test_the_future_changes_nothing(backend, seed, position):
    """Through a whole model: logits up to `position` do not depend on later tokens."""
    config = Config(vocab_size=31, block_size=13, n_layer=2, n_head=2, n_embd=24, query_rank=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LM(config).eval()
    ids = torch.randint(31, (2, 13), generator=torch.Generator().manual_seed(seed))
    changed = ids.clone()
    changed[:, position + 1 :] = (changed[:, position + 1 :] + 7) % 31
    with torch.no_grad():
        logits = model(ids)
        logits_changed = model(changed)
    seen = slice(0, position + 1)
    torch.testing.assert_close(logits[:, seen], logits_changed[:, seen])
    later = slice(position + 1, None)
    assert position == 12 or not torch.equal(logits[:, later], logits_changed[:, later])


# ---- sparse codes --------------------------------------------------------------------------------


@fuzz
@given(seed=SEEDS, n=st.integers(1, 5), h=st.integers(1, 20), data=st.data())
def test_top_k_keeps_the_largest_and_never_more_even_where_codes_are_equal(seed, n, h, data):
    k = data.draw(st.integers(1, h))
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(4, (n, h), generator=generator).double()  # many equal codes
    kept = reference.top_k(a, k)
    assert ((kept == a) | (kept == 0)).all()
    torch.testing.assert_close(kept.sort(-1).values, zeros_but_last(a.sort(-1).values, k))


def zeros_but_last(a, k):
    """a (n, h) with all but the last k columns 0."""
    return a * (torch.arange(a.shape[-1]) >= a.shape[-1] - k)


@fuzz
@given(seed=SEEDS, k=st.integers(1, 6))
def test_top_k_of_a_debiased_step_is_the_proximal_map_of_the_l0_constraint(seed, k):
    """No a >= 0 with at most k nonzero codes is closer to the gradient step than the result."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, generator=generator, dtype=torch.float64)
    D = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    moved = 0.3 * (x @ D)  # one gradient step from zero
    codes = reference.debias(reference.ista_codes(x, D, 0.3, 0.0, 1), 0.3, 0.0)
    best = min(
        (moved - moved.clamp(min=0) * torch.tensor(mask)).norm()
        for mask in itertools.product([0, 1], repeat=6)
        if sum(mask) <= k
    )
    torch.testing.assert_close((moved - reference.top_k(codes, k)).norm(), best)


@fuzz
@given(seed=SEEDS, lam=st.floats(0, 2))
def test_debiased_codes_have_the_support_of_the_threshold_and_the_value_of_the_step(seed, lam):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    D = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    step = 0.1 * (x @ D)
    expected = torch.where(step > 0.1 * lam, step, 0)
    codes = reference.debias(reference.ista_codes(x, D, 0.1, lam, 1), 0.1, lam)
    torch.testing.assert_close(codes, expected)
    nan = torch.tensor([math.nan, 0.0, 1.0])
    assert reference.debias(nan, 0.1, lam).isnan().tolist() == [True, False, False]

"""Gradients of the compiled ops: by finite differences, autograd of the reference, and training."""

import pytest
import torch
from closeness import assert_close
from hypothesis import given
from hypothesis import strategies as st

from crate_mini import ops, reference
from crate_mini.model import LM, Config

MARGIN = 1e-3  # finite differences must not step over the kink of a ReLU


@pytest.fixture(autouse=True)
def fused(extension):
    with ops.use_backend("fused"):
        yield


def problem(seed, lead, d, h):
    """float64 leaves: x (*lead, d), D (d, h), decoder (d, h), lams (h,), LayerNorm's and U's."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    leaves = dict(
        x=normal(*lead, d),
        D=normal(d, h) * d**-0.5,
        decoder=normal(d, h),
        lams=normal(h).abs(),
        weight=normal(d),
        bias=normal(d),
        U=normal(d, d),
    )
    return {name: t.requires_grad_() for name, t in leaves.items()}


@torch.no_grad()
def distance_to_kinks(p, lams, eta, steps):
    """The smallest absolute pre-activation in all steps."""
    x, D = p["x"], p["D"]
    a, distances = torch.zeros(*x.shape[:-1], D.shape[1], dtype=x.dtype), []
    for _ in range(steps):
        v = a + eta * ((x - a @ D.T) @ D) - eta * lams
        a = v.relu()
        distances.append(v.abs().min())
    return min(distances)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lam_is_a_tensor", [True, False])
def test_gradcheck_ista(steps, tied, lam_is_a_tensor):
    """Of y and a, in every input, where no pre-activation is near the kink of its ReLU."""
    for seed in range(1000):
        p = problem(seed, (2, 2), 3, 5)
        lam = p["lams"] if lam_is_a_tensor else 0.4
        if distance_to_kinks(p, lam, 0.5, steps) > MARGIN:
            break
    else:
        raise AssertionError("no problem keeps the margin; make it smaller")

    def f(x, D, lams, decoder):
        lam = lams if lam_is_a_tensor else 0.4
        return ops.ista(x, D, 0.5, lam, steps, None if tied else decoder)

    assert torch.autograd.gradcheck(f, (p["x"], p["D"], p["lams"], p["decoder"]))


@pytest.mark.parametrize("biased", [True, False])
def test_gradcheck_mssa_project(biased):
    p = problem(0, (2, 3), 6, 1)

    def f(z, weight, bias, U):
        return ops.mssa_project(z, weight, bias if biased else None, U, 2)

    assert torch.autograd.gradcheck(f, (p["x"], p["weight"], p["bias"], p["U"]))


@pytest.mark.parametrize("kinds", [(0, 0, 0), (0, 1, 1), (0, 1, 0), (0, 0, 1), (0, 1, 2)])
def test_gradcheck_attention(kinds):
    """With q, k and v the same or not, as MSSA, its corrections and MHSA have them."""
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(2, 2, 4, 3, generator=g, dtype=torch.float64) for _ in range(3)]
    leaves = [t.requires_grad_() for t in leaves[: 1 + max(kinds)]]

    def f(*leaves):
        return ops.attention(*(leaves[i] for i in kinds))

    assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize("k", [1, 4, 9])
def test_gradcheck_top_k_and_its_gradient(k):
    a = torch.randn(3, 2, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = a.requires_grad_()
    assert torch.autograd.gradcheck(lambda a: ops.top_k(a, k), a)
    assert torch.autograd.gradgradcheck(lambda a: ops.top_k(a, k), a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_top_k_reaches_the_codes_that_pytorch_keeps(dtype):
    """Among distinct codes and, where fewer than k are not 0, wherever a gradient matters."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.stack([torch.randperm(99, generator=generator) for _ in range(40)]).to(dtype)
    codes = (codes - 60).relu()  # 38 distinct ones in each row
    g = torch.randn(codes.shape, generator=generator).to(dtype)
    for k in (1, 16, 38, 60):
        gradients = []
        for module in (ops, reference):
            a = codes.clone().requires_grad_()
            module.top_k(a, k).backward(g)
            gradients.append(torch.where(codes > 0, a.grad, 0))
        assert torch.equal(*gradients)


@pytest.mark.fuzz
@given(
    seed=st.integers(0, 2**31),
    rows=st.sampled_from([0, 1, 5, 97, 800]),
    d=st.sampled_from([1, 4, 31, 64]),
    h=st.sampled_from([1, 3, 33, 130]),
    steps=st.integers(1, 4),
    tied=st.booleans(),
    lam_is_a_tensor=st.booleans(),
    with_codes=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_ops_against_autograd_of_the_reference(
    seed, rows, d, h, steps, tied, lam_is_a_tensor, with_codes, dtype
):
    """Through the public ops, with and without a gradient of the codes.

    In float64 no support differs and all entries must agree. In lower precision a code on the
    threshold may fall on either side, which makes gradients jump: there the loss is flat at the
    threshold.
    """
    p = problem(seed, (rows,), d, h)
    flat = dtype != torch.float64

    def loss(ista, x, D, lams, decoder):
        lam = lams.to(x.dtype) if ista is reference.ista else lams
        lam = lam if lam_is_a_tensor else 0.2
        y, a = ista(x, D, 0.3, lam, 1 if flat else steps, None if tied else decoder)
        if flat:
            return a.square().sum() / 2
        return y.square().sum() + (a.sin().sum() if with_codes else 0)

    def gradients(ista, *inputs):
        leaves = [t.detach().requires_grad_() for t in inputs]
        total = loss(ista, *leaves)
        return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)

    lams = p["lams"].to(torch.promote_types(dtype, torch.float32))
    inputs = p["x"].to(dtype), p["D"].to(dtype), lams, p["decoder"].to(dtype)
    results = gradients(ops.ista, *inputs)
    assert_close(results, lambda *t: gradients(reference.ista, *t), *inputs)


# ---- a model that trains -------------------------------------------------------------------------

SMALL = dict(vocab_size=61, block_size=17, n_layer=2, n_head=3, n_embd=36, expansion=3)
VARIANTS = {
    "paper": {},
    "all options": dict(
        residual=True,
        separate_decoder=True,
        learned_lam=True,
        unit_norm=True,
        query_rank=4,
        key_shift=True,
        bias=False,
        ista_steps=3,
    ),
}


def train(parameters, variant, steps, mixed):
    """[losses, *weights] of SGD on one batch, in the dtype of the parameters (mixed: autocast)."""
    torch.manual_seed(0)
    dtype = parameters[0].dtype
    model = LM(Config(**SMALL, **VARIANTS[variant])).to(dtype)
    ids = torch.randint(61, (3, 18), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for weight, value in zip(model.parameters(), parameters):
            weight.copy_(value)
    losses = []
    for _ in range(steps):
        enabled = mixed and dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(ids[:, :-1], ids[:, 1:])
        model.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        with torch.no_grad():
            for weight in model.parameters():
                weight -= 0.1 * weight.grad
    return [torch.stack(losses), *(weight.detach() for weight in model.parameters())]


@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_twenty_training_steps(variant, mixed):
    """Losses and final weights of a fused run hold to the reference's, in float64 and in its dtype.

    In twenty steps a code may cross the threshold in one run and not in the other; from there the
    two diverge, as two jittered runs do. Eight of those show how far that is.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LM(Config(**SMALL, **VARIANTS[variant]))
        parameters = [weight.detach() for weight in model.parameters()]

        def equation(*parameters):
            with ops.use_backend("reference"):
                return train(parameters, variant, 20, mixed)

        results = train(parameters, variant, 20, mixed)
        losses = results[0]
        assert losses[-1] < losses[0], "nothing was learned, so nothing was compared"
        assert_close(results, equation, *parameters, draws=8)

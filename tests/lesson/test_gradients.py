"""Gradients of the compiled ops: against finite differences, autograd of the reference, and in training."""

import pytest
import torch
from conftest import assert_close
from hypothesis import given
from hypothesis import strategies as st

from crate_mini import ops, reference
from crate_mini.model import LM, Config

MARGIN = 1e-3  # finite differences must not step over the kink of a ReLU


@pytest.fixture(autouse=True)
def fused(extension):
    with ops.use_backend("fused"):
        yield


def problem(seed, lead, d, h, n_head=1):
    """float64 leaves: x (*lead, d), D (d, h), decoder (d, h), lams (h,), and LayerNorm's and U's."""
    g = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    leaves = dict(
        x=leaf(*lead, d),
        D=leaf(d, h) * d**-0.5,
        decoder=leaf(d, h),
        lams=leaf(h).abs(),
        weight=leaf(d),
        bias=leaf(d),
        U=leaf(d, d),
    )
    return {name: t.requires_grad_() for name, t in leaves.items()}


def away_from_kinks(lead, d, h, eta, steps):
    """The first problem whose pre-activations all keep the margin."""
    for seed in range(1000):
        p = problem(seed, lead, d, h)
        a, gaps = None, []
        with torch.no_grad():
            for _ in range(steps):
                r = p["x"] if a is None else p["x"] - a @ p["D"].T
                v = (0 if a is None else a) + eta * (r @ p["D"]) - eta * p["lams"]
                a = v.relu()
                gaps.append(v.abs().min())
        if min(gaps) > MARGIN:
            return p
    raise AssertionError("no problem keeps the margin; make it smaller")


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_gradcheck_ista(steps, tied):
    p = away_from_kinks((2, 2), 3, 5, 0.5, steps)

    def f(x, D, lams, decoder):
        return ops.ista(x, D, 0.5, lams, steps, None if tied else decoder)

    assert torch.autograd.gradcheck(f, (p["x"], p["D"], p["lams"], p["decoder"]))


@pytest.mark.parametrize("start", [True, False])
def test_gradcheck_ista_step(start):
    p = away_from_kinks((4,), 3, 5, 0.5, 1)
    a = torch.full((4, 5), 10.0, dtype=torch.float64, requires_grad=True)  # far from the kink too

    def f(a, r, D, lams):
        return ops.ista_step(a if start else None, r, D, 0.5, lams)

    assert torch.autograd.gradcheck(f, (a, p["x"], p["D"], p["lams"]))


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_mssa_project(bias):
    p = problem(0, (2, 3), 6, 1)

    def f(z, weight, b, U):
        return ops.mssa_project(z, weight, b if bias else None, U, 2)

    assert torch.autograd.gradcheck(f, (p["x"], p["weight"], p["bias"], p["U"]))


@pytest.mark.fuzz
@given(
    seed=st.integers(0, 2**31),
    rows=st.sampled_from([0, 1, 5, 97, 800]),
    d=st.sampled_from([1, 4, 31, 64]),
    h=st.sampled_from([1, 3, 33, 130]),
    steps=st.integers(1, 4),
    tied=st.booleans(),
    number=st.booleans(),
    both=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_ops_against_autograd_of_the_reference(seed, rows, d, h, steps, tied, number, both, dtype):
    """Through the public ops, with the gradient of the codes absent or present, lam a number or a tensor.

    In float64 no support differs and all entries must agree. In lower precision a code on the threshold may
    fall either way, which moves gradients by a jump: there the loss is one that is flat at the threshold.
    """
    p = problem(seed, (rows,), d, h)
    flat = dtype != torch.float64

    def gradients(ista, x, D, lams, decoder):
        leaves = [t.detach().requires_grad_() for t in (x, D, lams, decoder)]
        x, D, lams, decoder = leaves
        y, a = ista(
            x,
            D,
            0.3,
            0.2 if number else lams.to(x.dtype) if ista is reference.ista else lams,
            1 if flat else steps,
            None if tied else decoder,
        )
        loss = a.square().sum() / 2 if flat else y.square().sum() + (a.sin().sum() if both else 0)
        return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

    inputs = [
        p["x"].to(dtype),
        p["D"].to(dtype),
        p["lams"].to(torch.promote_types(dtype, torch.float32)),
        p["decoder"].to(dtype),
    ]
    assert_close(gradients(ops.ista, *inputs), lambda *t: gradients(reference.ista, *t), *inputs)


# ---- a model that trains ----------------------------------------------------------------------------------

SMALL = dict(vocab_size=61, block_size=17, n_layer=2, n_head=3, n_embd=36, expansion=3)
VARIANTS = {
    "paper": {},
    "all options": dict(
        residual=True,
        separate_decoder=True,
        learned_lam=True,
        unit_norm=True,
        query_rank=4,
        bias=False,
        ista_steps=3,
    ),
}


def train(parameters, variant, steps, mixed):
    """Losses and weights of SGD on one batch, from parameters, in their dtype (mixed: bf16 autocast)."""
    torch.manual_seed(0)
    model = LM(Config(**SMALL, **VARIANTS[variant])).to(parameters[0].dtype)
    ids = torch.randint(61, (3, 18), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for w, value in zip(model.parameters(), parameters):
            w.copy_(value)
    losses = []
    for _ in range(steps):
        with torch.autocast(
            "cpu", torch.bfloat16, enabled=mixed and parameters[0].dtype == torch.float32
        ):
            loss = model(ids[:, :-1], ids[:, 1:])
        model.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        with torch.no_grad():
            for w in model.parameters():
                w -= 0.1 * w.grad
    return [torch.stack(losses), *(w.detach() for w in model.parameters())]


@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_twenty_training_steps(variant, mixed):
    """Losses and final weights of a fused run hold to the reference's, in float64 and in the same dtype.

    Somewhere in so many steps a code may cross the threshold in one run and not in the other; from there on
    they part, as two jittered runs do. Eight of them tell how far that is.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parameters = [w.detach() for w in LM(Config(**SMALL, **VARIANTS[variant])).parameters()]

        def equation(*parameters):
            with ops.use_backend("reference"):
                return train(parameters, variant, 20, mixed)

        got = train(parameters, variant, 20, mixed)
        assert got[0][-1] < got[0][0], "nothing was learned, so nothing was compared"
        assert_close(got, equation, *parameters, draws=8)

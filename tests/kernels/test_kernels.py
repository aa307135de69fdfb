"""Every CPU kernel, in every version this machine can run, held to the equations of reference.py.

The kernels are called as C sees them, by pointers, so that the memory around their arguments is ours: inputs
lie between bands of NaN (what is read beyond them spoils the result), outputs are poisoned and guarded.
Sizes sit on and beside the edges where kernels go wrong: 0, 1, vector widths, tiles of rows, slabs of tiles.
Gradients are compared on the support the forward kernel chose (see conftest.py).
"""

import pytest
import torch
from conftest import Guarded, assert_close
from hypothesis import assume, given
from hypothesis import strategies as st

from crate_mini import reference

CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}  # Dtype of kernels.h
ROWS = [0, 1, 2, 3, 5, 7, 12, 13, 31, 47, 48, 49, 95, 96, 97, 193, 383, 385, 767, 769, 1537]
WIDTHS = [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 65, 97, 127, 128, 129, 257]
SIZE = 1_000_000  # multiply-adds of one product, times steps: what the naive version does in 10 ms
VERSIONS = ["naive", "baseline", "avx2", "avx512", "avx512_bf16"]

pytestmark = pytest.mark.fuzz


def acc(dtype):
    """The dtype of sums and of per-column vectors: float, or double for double."""
    return torch.promote_types(dtype, torch.float32)


def call(kernel, *arguments):
    """Call with pointers for guarded tensors, then see that no guard and no input was touched."""
    kernel(*(a.pointer if isinstance(a, Guarded) else a for a in arguments))
    for i, a in enumerate(arguments):
        if isinstance(a, Guarded):
            a.check(f"argument {i}")


@pytest.fixture(params=VERSIONS)
def kernels(request, extension):
    if not extension.use_isa(request.param):
        pytest.skip(f"this processor has no {request.param}")
    yield extension
    extension.use_isa(extension.isa_names().split()[-1])


class Problem:
    """What one example needs; printed by hypothesis when it fails, without the tensors."""

    def __repr__(self):
        return str(
            {k: v if not isinstance(v, torch.Tensor) else "..." for k, v in vars(self).items()}
        )


@st.composite
def problems(draw, rows=ROWS, widths=WIDTHS):
    """Sizes, dtype, settings and the tensors of one ISTA problem."""
    p = Problem()
    p.dtype = draw(st.sampled_from(list(CODE)))
    p.steps, p.eta = draw(st.sampled_from([1, 2, 3, 5])), draw(st.sampled_from([0.1, 0.5, 0.01]))
    p.N = draw(st.sampled_from(rows))
    p.d = draw(st.sampled_from([d for d in widths if p.N * p.steps * d <= SIZE]))
    p.h = draw(st.sampled_from([h for h in widths if p.N * p.steps * p.d * h <= SIZE]))
    p.lam, p.threads = draw(st.sampled_from([0.1, 0.0, 1.0])), draw(st.sampled_from([1, 2]))
    p.seed = draw(st.integers(0, 2**31))
    p.generator = torch.Generator().manual_seed(p.seed)
    p.x, p.D = normal(p, p.N, p.d), normal(p, p.d, p.h) * (2 / p.d) ** 0.5
    p.decoder = normal(p, p.d, p.h) if draw(st.booleans()) else None
    p.lams = normal(p, p.h, dtype=acc(p.dtype)).abs() if draw(st.booleans()) else None
    p.gy, p.ga = (normal(p, p.N, n) if draw(st.booleans()) else None for n in (p.d, p.h))
    return p


def normal(p, *shape, dtype=None):
    return torch.randn(*shape, generator=p.generator, dtype=torch.float64).to(dtype or p.dtype)


def guard(t):
    return None if t is None else Guarded.copy(t)


# ---- ista -------------------------------------------------------------------------------------------------


def run_forward(kernels, p, threads, trail=True):
    """(y, a, trail of codes, trail of residuals), guarded; the trails are None if not asked for."""
    N, d, h, S = p.N, p.d, p.h, p.steps
    x, D, decoder, lams = map(guard, (p.x, p.D, p.decoder, p.lams))
    y, a = Guarded((N, d), p.dtype), Guarded((N, h), p.dtype)
    codes, residuals = Guarded((S - 1, N, h), p.dtype), Guarded((S - 1, N, d), p.dtype)
    if not trail:
        codes = residuals = None
    call(
        kernels.ista_forward_cpu,
        CODE[p.dtype],
        N,
        d,
        h,
        S,
        p.eta,
        p.lam,
        x,
        D,
        decoder or D,
        lams,
        y,
        a,
        codes,
        residuals,
        threads,
    )
    return y, a, codes, residuals


def forward_equation(p, x, D, decoder, lams):
    """reference.ista with everything it passes through."""
    lam, codes, residuals = p.lam if lams is None else lams.to(x.dtype), [], [x]
    a = reference.ista_step(None, x, D, p.eta, lam)
    for _ in range(p.steps - 1):
        codes.append(a)
        residuals.append(x - a @ D.T)
        a = reference.ista_step(a, residuals[-1], D, p.eta, lam)

    def stack(tensors, width):
        return torch.stack(tensors) if tensors else x.new_empty(0, p.N, width)

    return (
        a @ (D if decoder is None else decoder).T,
        a,
        stack(codes, p.h),
        stack(residuals[1:], p.d),
    )


@given(p=problems(), trail=st.booleans())
def test_ista_forward(kernels, p, trail):
    got = run_forward(kernels, p, p.threads, trail)
    assert_close(
        [g and g.tensor for g in got],
        lambda *inputs: forward_equation(p, *inputs),
        p.x,
        p.D,
        p.decoder,
        p.lams,
        names=["y", "a", "codes", "residuals"],
    )


def gradient_equation(p, masks, gy, ga, x, D, decoder, lams):
    """Gradients by autograd of ISTA on fixed supports, where it is a polynomial and has no kink."""
    x, D = (t.detach().requires_grad_() for t in (x, D))
    decoder = decoder if decoder is None else decoder.detach().requires_grad_()
    lams = lams if lams is None else lams.detach().requires_grad_()
    lam = p.lam if lams is None else lams.to(x.dtype)
    a = masks[0] * (p.eta * (x @ D) - p.eta * lam)
    for mask in masks[1:]:
        a = mask * (a + p.eta * ((x - a @ D.T) @ D) - p.eta * lam)
    y = a @ (D if decoder is None else decoder).T
    total = (
        (0 if gy is None else (gy * y).sum()) + (0 if ga is None else (ga * a).sum()) + 0 * y.sum()
    )
    leaves = [t for t in (x, D, decoder, lams) if t is not None]
    gradients = dict(zip(map(id, leaves), torch.autograd.grad(total, leaves)))
    return [None if t is None else gradients[id(t)] for t in (x, D, decoder, lams)]


def run_backward(kernels, p, forward, threads):
    N, d, h, dtype = p.N, p.d, p.h, p.dtype
    gy, ga, x, D, decoder = map(guard, (p.gy, p.ga, p.x, p.D, p.decoder))
    _, a, codes, residuals = (Guarded.copy(f.tensor) for f in forward)
    gx, gD = Guarded((N, d), dtype), Guarded((d, h), dtype)
    gdec = None if decoder is None else Guarded((d, h), dtype)
    glam = None if p.lams is None else Guarded((h,), acc(dtype))
    call(
        kernels.ista_backward_cpu,
        CODE[dtype],
        N,
        d,
        h,
        p.steps,
        p.eta,
        gy,
        ga,
        x,
        D,
        decoder or D,
        a,
        codes,
        residuals,
        gx,
        gD,
        gdec,
        glam,
        threads,
    )
    return [g and g.tensor for g in (gx, gD, gdec, glam)]


@given(p=problems())
def test_ista_backward(kernels, p):
    forward = run_forward(kernels, p, p.threads)
    got = run_backward(kernels, p, forward, p.threads)
    _, a, codes, _ = (f.tensor for f in forward)
    masks = [(t > 0).double() for t in (*codes, a)]

    def equation(gy, ga, x, D, decoder, lams):
        return gradient_equation(p, [m.to(x.dtype) for m in masks], gy, ga, x, D, decoder, lams)

    assert_close(
        got, equation, p.gy, p.ga, p.x, p.D, p.decoder, p.lams, names=["gx", "gD", "gdec", "glam"]
    )


@given(p=problems(rows=[769, 1537]))
def test_ista_backward_of_many_rows(kernels, p):
    """Sums over rows go slab by slab (768 rows): among ROWS few are longer than one."""
    test_ista_backward.hypothesis.inner_test(kernels, p)


@given(p=problems())
def test_threads_and_repetition_change_no_bit(kernels, p):
    one, two, again = (run_forward(kernels, p, threads) for threads in (1, 2, 2))
    for other in (two, again):
        assert all(torch.equal(f.tensor, g.tensor) for f, g in zip(one, other))
    one_back, two_back, again = (run_backward(kernels, p, one, threads) for threads in (1, 2, 2))
    for other in (two_back, again):
        assert all(f is None or torch.equal(f, g) for f, g in zip(one_back, other))


@given(
    p=problems(rows=[1, 2, 13, 97]),
    odd=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
)
def test_an_odd_value_spoils_its_row_only(kernels, p, odd):
    clean = run_forward(kernels, p, p.threads)
    row, column = (int(torch.randint(n, (), generator=p.generator)) for n in (p.N, p.d))
    p.x[row, column] = odd
    spoiled = run_forward(kernels, p, p.threads)
    rest = torch.arange(p.N) != row
    assert all(
        torch.equal(f.tensor[..., rest, :], g.tensor[..., rest, :]) for f, g in zip(clean, spoiled)
    )
    want = forward_equation(p, p.x, p.D, p.decoder, p.lams)
    for f, g in zip(spoiled[:2], want[:2]):
        assert torch.equal(f.tensor[row].isfinite(), g[row].isfinite())
        assert torch.equal(f.tensor[row].isnan(), g[row].isnan())


# ---- ista_step --------------------------------------------------------------------------------------------


@given(p=problems(), start=st.booleans())
def test_ista_step(kernels, p, start):
    N, d, h, dtype = p.N, p.d, p.h, p.dtype
    a = normal(p, N, h).relu() if start else None
    out = Guarded((N, h), dtype)
    call(
        kernels.ista_step_forward_cpu,
        CODE[dtype],
        N,
        d,
        h,
        p.eta,
        p.lam,
        guard(a),
        guard(p.x),
        guard(p.D),
        guard(p.lams),
        out,
        p.threads,
    )

    def step(a, r, D, lams):
        return [reference.ista_step(a, r, D, p.eta, p.lam if lams is None else lams.to(r.dtype))]

    assert_close([out.tensor], step, a, p.x, p.D, p.lams, names=["a'"])

    g, mask = normal(p, N, h), out.tensor > 0
    ga, gr, gD = (
        Guarded((N, h), dtype) if start else None,
        Guarded((N, d), dtype),
        Guarded((d, h), dtype),
    )
    glam = None if p.lams is None else Guarded((h,), acc(dtype))
    call(
        kernels.ista_step_backward_cpu,
        CODE[dtype],
        N,
        d,
        h,
        p.eta,
        guard(g),
        guard(out.tensor),
        guard(p.x),
        guard(p.D),
        ga,
        gr,
        gD,
        glam,
        p.threads,
    )

    def gradients(g, r, D):
        g = g * mask
        return [g, p.eta * (g @ D.T), p.eta * (r.T @ g), -p.eta * g.sum(0)]

    assert_close(
        [t and t.tensor for t in (ga, gr, gD, glam)],
        gradients,
        g,
        p.x,
        p.D,
        names=["ga", "gr", "gD", "glam"],
    )


# ---- ista_decode ------------------------------------------------------------------------------------------


@given(p=problems(rows=[0, 1, 2, 3, 5], widths=[*WIDTHS, 255, 256, 513]))
def test_ista_decode(kernels, p):
    decoder = p.D if p.decoder is None else p.decoder
    y, a = Guarded((p.N, p.d), p.dtype), Guarded((p.N, p.h), p.dtype)
    call(
        kernels.ista_decode_cpu,
        CODE[p.dtype],
        p.N,
        p.d,
        p.h,
        p.steps,
        p.eta,
        p.lam,
        guard(p.x),
        guard(p.D),
        guard(p.D.T.contiguous()),
        guard(decoder.T.contiguous()),
        guard(p.lams),
        y,
        a,
        p.threads,
    )
    assert_close(
        [y.tensor, a.tensor],
        lambda *inputs: forward_equation(p, *inputs)[:2],
        p.x,
        p.D,
        p.decoder,
        p.lams,
        names=["y", "a"],
    )


# ---- mssa_project -----------------------------------------------------------------------------------------


@given(
    p=problems(rows=[*ROWS, 1535]),
    stream=st.sampled_from(["fp32", "own"]),
    bias=st.booleans(),
    shift=st.sampled_from([0.0, 3.0]),
    eps=st.sampled_from([1e-5, 1e-3]),
)
def test_mssa_project(kernels, p, stream, bias, shift, eps):
    N, d, dtype = p.N, p.d, p.dtype
    assume(N * d * d < SIZE)
    zdtype = acc(dtype) if stream == "fp32" else dtype
    z = normal(p, N, d, dtype=zdtype) + shift
    weight, bias = normal(p, d, dtype=acc(dtype)), normal(p, d, dtype=acc(dtype)) if bias else None
    U, gu = normal(p, d, d) / d**0.5, normal(p, N, d)

    def project(
        z, weight, bias, U
    ):  # spelled out: layer_norm's own rounding leaves no exact zero at d = 1
        z = z.to(weight.dtype)
        z = z - z.mean(-1, keepdim=True)
        x = z * (z.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
        return (x if bias is None else x + bias).to(U.dtype) @ U

    fixed = (CODE[zdtype], CODE[dtype], N, d, eps)
    results = []
    for threads in (1, 2):
        u = Guarded((N, d), dtype)
        call(
            kernels.mssa_project_forward_cpu, *fixed, *map(guard, (z, weight, bias, U)), u, threads
        )
        gz, gU, gw = Guarded((N, d), zdtype), Guarded((d, d), dtype), Guarded((d,), acc(dtype))
        gb = None if bias is None else Guarded((d,), acc(dtype))
        call(
            kernels.mssa_project_backward_cpu,
            *fixed,
            *map(guard, (gu, z, weight, bias, U)),
            gz,
            gw,
            gb,
            gU,
            threads,
        )
        results.append([t and t.tensor for t in (u, gz, gw, gb, gU)])
    assert all(one is None or torch.equal(one, two) for one, two in zip(*results)), (
        "threads change bits"
    )

    def equation(z, weight, bias, U, gu):
        leaves = [t if t is None else t.detach().requires_grad_() for t in (z, weight, bias, U)]
        u = project(*leaves)
        gradients = iter(torch.autograd.grad(u, [t for t in leaves if t is not None], gu))
        return [u, *(None if t is None else next(gradients) for t in leaves)]

    if (
        N
    ):  # of one or two columns LayerNorm leaves nothing, so gz is what is left of terms that cancel
        rstd = (z.double().var(-1, correction=0) + eps).rsqrt()[:, None]
        terms = {1: float((rstd * (gu.double() @ U.double().T) * weight).abs().max())}
    assert_close(
        results[0],
        equation,
        z,
        weight,
        bias,
        U,
        gu,
        terms=terms if N else {},
        names=["u", "gz", "gweight", "gbias", "gU"],
    )

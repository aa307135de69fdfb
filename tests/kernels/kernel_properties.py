"""Properties of every CPU kernel, whatever version computes it; what planted faults must violate.

Sizes lie on and next to the edges where kernels go wrong: 0, 1, vector widths, tiles of rows, slabs
of tiles.
"""

import torch
from closeness import assert_close
from equations import (
    cancelling_terms,
    head_equation,
    head_terms,
    ista_equation,
    ista_gradients_by_autograd,
    mssa_gradients,
)
from guarded_kernels import DTYPE_CODES, NaiveKernels, acc_dtype
from hypothesis import assume, given
from hypothesis import strategies as st

ROWS = [0, 1, 2, 3, 5, 7, 12, 13, 31, 47, 48, 49, 95, 96, 97, 193, 383, 385, 767, 769, 1537]
WIDTHS = [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 65, 97, 127, 128, 129, 257]
SIZE = 1_000_000  # multiply-adds of one product, times steps: 10 ms of the naive version


class Problem:
    """The settings and tensors of one example; hypothesis prints the settings when it fails."""

    def __init__(self, dtype, steps, eta, lam, sizes, threads, seed):
        self.dtype, self.steps = dtype, steps
        self.eta, self.lam = eta, lam
        self.N, self.d, self.h = sizes
        self.threads, self.seed = threads, seed
        self.generator = torch.Generator().manual_seed(seed)
        self.x = self.normal(self.N, self.d)
        self.D = self.normal(self.d, self.h) * (2 / self.d) ** 0.5
        self.decoder = self.lams = self.gy = self.ga = None

    def add(self, decoder, lams, gy, ga):
        """Add the optional tensors that are asked for."""
        if decoder:
            self.decoder = self.normal(self.d, self.h)
        if lams:
            self.lams = self.normal(self.h, dtype=acc_dtype(self.dtype)).abs()
        if gy:
            self.gy = self.normal(self.N, self.d)
        if ga:
            self.ga = self.normal(self.N, self.h)
        return self

    def __repr__(self):
        values = {k: "..." if isinstance(v, torch.Tensor) else v for k, v in vars(self).items()}
        return str(values)

    def normal(self, *shape, dtype=None):
        values = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        return values.to(dtype or self.dtype)

    @property
    def threshold(self):
        return self.lam if self.lams is None else self.lams

    def suit(self, kernels):
        """Make it a problem that these kernels can solve, which settle for its threads."""
        kernels.threads = self.threads
        if isinstance(kernels, NaiveKernels):
            self.dtype = torch.float32
            for name, value in vars(self).items():
                if isinstance(value, torch.Tensor):
                    setattr(self, name, value.float())


@st.composite
def problems(draw, rows=ROWS, widths=WIDTHS, codes=None):
    """ISTA problems of any size, dtype and settings; codes: choices of h, by default as of d."""
    dtype = draw(st.sampled_from(list(DTYPE_CODES)))
    steps = draw(st.sampled_from([1, 2, 3, 5]))
    eta = draw(st.sampled_from([0.1, 0.5, 0.01]))
    N = draw(st.sampled_from(rows))
    d = draw(st.sampled_from([d for d in widths if N * steps * d <= SIZE]))
    h = draw(st.sampled_from([h for h in codes or widths if N * steps * d * h <= SIZE]))
    lam = draw(st.sampled_from([0.1, 0.0, 1.0]))
    threads = draw(st.sampled_from([1, 2]))
    seed = draw(st.integers(0, 2**31))
    optional = [draw(st.booleans()) for _ in range(4)]
    return Problem(dtype, steps, eta, lam, (N, d, h), threads, seed).add(*optional)


# ---- ista ----------------------------------------------------------------------------------------


def run_forward(kernels, p, trail=True):
    return kernels.ista(p.x, p.D, p.eta, p.threshold, p.steps, p.decoder, trail)


def run_backward(kernels, p, forward):
    want_lam = p.lams is not None
    inputs = p.gy, p.ga, p.x, p.D, p.eta, p.decoder, *forward[1:]
    return kernels.ista_backward(*inputs, want_lam)


def forward_equation(p):
    return lambda x, D, decoder, lams: ista_equation(x, D, decoder, lams, p.eta, p.lam, p.steps)


def check_forward(kernels, p, trail):
    p.suit(kernels)
    results = run_forward(kernels, p, trail)
    inputs = p.x, p.D, p.decoder, p.lams
    names = ["y", "a", "codes", "residuals"]
    assert_close(results, forward_equation(p), *inputs, names=names)


@given(p=problems(), trail=st.booleans())
def ista_forward(kernels, p, trail):
    check_forward(kernels, p, trail)


def check_backward(kernels, p):
    p.suit(kernels)
    forward = run_forward(kernels, p)
    _, a, codes, _ = forward
    supports = [(t > 0).double() for t in (*codes, a)]

    def equation(gy, ga, x, D, decoder, lams):
        fixed = [support.to(x.dtype) for support in supports]
        return ista_gradients_by_autograd(gy, ga, x, D, decoder, lams, fixed, p.eta, p.lam)

    inputs = p.gy, p.ga, p.x, p.D, p.decoder, p.lams
    names = ["gx", "gD", "gdec", "glam"]
    assert_close(run_backward(kernels, p, forward), equation, *inputs, names=names)


@given(p=problems())
def ista_backward(kernels, p):
    check_backward(kernels, p)


@given(p=problems(rows=[769, 1537]))
def ista_backward_of_many_rows(kernels, p):
    """Sums over rows go slab by slab (768 rows): few of ROWS are longer than one slab."""
    check_backward(kernels, p)


def check_wide(kernels, p):
    check_forward(kernels, p, trail=True)
    check_backward(kernels, p)


@given(p=problems(rows=[1, 2, 3, 13], widths=[1, 3, 8, 17], codes=[512, 1024, 4096]))
def ista_with_many_codes(kernels, p):
    """Rows of codes that lie a multiple of 4096 bytes apart are padded for the products."""
    check_wide(kernels, p)


@given(p=problems(rows=[1, 2, 3], widths=[1023, 2049, 4096], codes=[1, 3, 17]))
def ista_of_a_wide_stream(kernels, p):
    check_wide(kernels, p)


@given(
    rows=st.sampled_from([1, 2, 13, 25]),
    h=st.sampled_from(WIDTHS),
    seed=st.integers(0, 2**31),
)
def bf16_is_rounded_to_nearest_even(kernels, rows, h, seed):
    """To the bit: small integers leave sums exact, and half of the codes a tie or nearly one."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-40, 40, (rows, 16), generator=generator).bfloat16()
    D = torch.randint(-40, 40, (16, h), generator=generator).bfloat16()
    _, a, *_ = kernels.ista(x, D, eta=1.0, lam=0.0, steps=1)
    assert torch.equal(a, (x.double() @ D.double()).relu().bfloat16())


def equal(left, right):
    """The same bits, or both None."""
    return left is None or torch.equal(left, right)


@given(p=problems())
def threads_and_repetition_change_no_bit(kernels, p):
    p.suit(kernels)
    runs = []
    for threads in (1, 2, 2):
        kernels.threads = threads
        forward = run_forward(kernels, p)
        runs.append([*forward, *run_backward(kernels, p, forward)])
    for other in runs[1:]:
        assert all(map(equal, runs[0], other))


@given(
    p=problems(rows=[1, 2, 13, 97]),
    odd=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
)
def a_non_finite_value_spoils_only_its_row(kernels, p, odd):
    p.suit(kernels)
    clean = run_forward(kernels, p)
    row, column = (int(torch.randint(n, (), generator=p.generator)) for n in (p.N, p.d))
    p.x[row, column] = odd
    spoiled = run_forward(kernels, p)
    others = torch.arange(p.N) != row
    for left, right in zip(clean, spoiled):
        assert torch.equal(left[..., others, :], right[..., others, :])
    expected = forward_equation(p)(p.x, p.D, p.decoder, p.lams)
    for result, value in zip(spoiled[:2], expected[:2]):
        assert torch.equal(result[row].isfinite(), value[row].isfinite())
        assert torch.equal(result[row].isnan(), value[row].isnan())


# ---- ista_decode ---------------------------------------------------------------------------------


@given(p=problems(rows=[0, 1, 2, 3, 5], widths=[*WIDTHS, 255, 256, 513]))
def ista_decode(kernels, p):
    p.suit(kernels)
    results = kernels.ista_decode(p.x, p.D, p.eta, p.threshold, p.steps, p.decoder)
    inputs = p.x, p.D, p.decoder, p.lams
    assert_close(results, forward_equation(p), *inputs, names=["y", "a"])


# ---- mssa_project --------------------------------------------------------------------------------


NORMS = dict(
    stream=st.sampled_from(["fp32", "own"]),
    biased=st.booleans(),
    shift=st.sampled_from([0.0, 3.0]),
    eps=st.sampled_from([1e-5, 1e-3]),
)


@given(p=problems(rows=[*ROWS, 1535]), **NORMS)
def mssa_project(kernels, p, **settings):
    assume(p.N * p.d * p.d < SIZE)
    check_mssa(kernels, p, **settings)


@given(p=problems(rows=[1537, 3073], widths=[1, 3, 8], codes=[1]), **NORMS)
def mssa_project_of_many_rows(kernels, p, **settings):
    """The gradient of U is summed slab by slab (1,536 rows)."""
    check_mssa(kernels, p, **settings)


def check_mssa(kernels, p, stream, biased, shift, eps):
    p.suit(kernels)
    acc = acc_dtype(p.dtype)
    z = p.normal(p.N, p.d, dtype=acc if stream == "fp32" else p.dtype) + shift
    weight = p.normal(p.d, dtype=acc)
    bias = p.normal(p.d, dtype=acc) if biased else None
    U = p.normal(p.d, p.d) / p.d**0.5
    gu = p.normal(p.N, p.d)
    runs = []
    for kernels.threads in (1, 2):
        u = kernels.mssa(z, weight, bias, U, eps)
        runs.append([u, *kernels.mssa_backward(gu, z, weight, bias, U, eps)])
    assert all(map(equal, *runs)), "threads change bits"

    def project(z, weight, bias, U):
        """Spelled out, because layer_norm's own rounding leaves no exact zero at d = 1."""
        z = z.to(weight.dtype)
        z = z - z.mean(-1, keepdim=True)
        x = z * (z.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
        return (x if bias is None else x + bias).to(U.dtype) @ U

    def equation(gu, z, weight, bias, U):
        return [project(z, weight, bias, U), *mssa_gradients(gu, z, weight, bias, U, project)]

    terms = {1: cancelling_terms(gu, z, weight, U, eps)}
    names = ["u", "gz", "gweight", "gbias", "gU"]
    assert_close(runs[0], equation, gu, z, weight, bias, U, names=names, terms=terms)


# ---- the head ------------------------------------------------------------------------------------

VOCABULARIES = [1, 2, 3, 13, 31, 97, 257, 511, 512, 513, 521, 1031, 1543]


def check_head(kernels, p, V, ignored, largest_logit, alike):
    """p.x and a random W (V, d). alike: "rows" of x or of "W" are equal, or neither."""
    assume(p.N * p.d * V < SIZE and p.N * V < SIZE / 10)
    p.suit(kernels)
    x, W = p.normal(p.N, p.d), p.normal(V, p.d)
    if alike == "rows":
        x = x[:1].expand_as(x).clone()
    if alike == "W":
        W = W[:1].expand_as(W).clone()
    spread = (x.double() @ W.double().T).abs().max() if p.N else 1.0
    x = (x * (largest_logit / float(spread))).to(p.dtype)
    targets = torch.randint(V, (p.N,), generator=p.generator)
    targets[torch.rand(p.N, generator=p.generator) < ignored] = -100
    by_two_threads = []
    if p.threads == 2:
        by_two_threads = kernels.head(x, W, targets)
    kernels.threads = 1
    results = kernels.head(x, W, targets)
    loss_alone = kernels.head(x, W, targets, gradients=False)[:1]
    for same in (by_two_threads, loss_alone):
        for left, right in zip(same, results):
            assert left.equal(right) or targets.eq(-100).all(), "threads or gradients change bits"
    names = ["loss", "gx", "gW"]
    terms = head_terms(x, W, targets)
    assert_close(results, lambda x, W: head_equation(x, W, targets), x, W, names=names, terms=terms)


SETTINGS = dict(
    V=st.sampled_from(VOCABULARIES),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    largest_logit=st.sampled_from([1.0, 20.0, 1e4]),
    alike=st.sampled_from(["", "", "rows", "W"]),
)


@given(p=problems(rows=[1, 2, 3, 13, 95, 96, 97, 193, 385]), **SETTINGS)
def head(kernels, p, **settings):
    check_head(kernels, p, **settings)


@given(
    p=problems(rows=[769, 1537], widths=[3, 8, 17]), **{**SETTINGS, "V": st.sampled_from([2, 31])}
)
def head_of_many_rows(kernels, p, **settings):
    """Chunks of 768 rows add up in gW."""
    check_head(kernels, p, **settings)


# ---- top-k ---------------------------------------------------------------------------------------


INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number


def rows_to_choose_from(kind, N, h, dtype, generator):
    """(N, h) numbers: any; "codes", half of them 0; "equal" ones, also -0; or "odd" ones."""
    a = torch.randn(N, h, generator=generator, dtype=torch.float64)
    if kind == "codes":
        a = a.relu()
    if kind == "equal":
        a = (a / 3).round()
    if kind == "odd":
        odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0], dtype=a.dtype)
        a = torch.where(a > 0.5, a, odd[torch.randint(4, (N, h), generator=generator)])
    return a.to(dtype)


@given(
    dtype=st.sampled_from(list(DTYPE_CODES)),
    N=st.sampled_from([0, 1, 2, 7, 13]),
    h=st.sampled_from([*WIDTHS, 512, 1031]),
    share=st.sampled_from([0.0, 0.03, 0.3, 0.7, 1.0]),
    kind=st.sampled_from(["any", "codes", "equal", "odd"]),
    of_others=st.booleans(),
    seed=st.integers(0, 2**31),
)
def top_k(kernels, dtype, N, h, share, kind, of_others, seed):
    """To the bit what a stable sort leaves: of equal codes the first, and NaN before all others."""
    generator = torch.Generator().manual_seed(seed)
    a = rows_to_choose_from(kind, N, h, dtype, generator)
    values = torch.randn(N, h, generator=generator).to(dtype) if of_others else a
    k = 1 + int(share * (h - 1))
    kept = a.double().sort(dim=1, descending=True, stable=True).indices[:, :k]
    # As integers, because PyTorch may change the bits of a NaN that it moves.
    bits = values.view(INTEGER_OF_SIZE[a.element_size()])
    expected = torch.zeros_like(bits).scatter(1, kept, bits.gather(1, kept))
    for kernels.threads in (1, 2):
        result = kernels.top_k(a, values if of_others else None, k)
        assert equal(result.view(bits.dtype), expected)

"""The CUDA kernels against their equations, without a GPU: csrc/*.cu runs on an emulated device, one fiber
per CUDA thread (tests/cuda_cpu/). Where there is a GPU, `python -m pytest -m gpu` runs the same tests on it.

Emulation proves indexing, tiling, tails, barriers, copies, fragment layouts and the numbers, under several
schedules; not a real GPU's memory model, and not speed. A fault planted in each kind of place must be caught,
or none of this would prove anything.
"""

import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from building import NVCC, needs_nvcc
from conftest import assert_close
from cuda_kernels import ROOT, SIGNATURES, Emulated, Fault, Kernels, build, plant
from hypothesis import example, given
from hypothesis import strategies as st

from crate_mini import reference

SIZES = [
    0,
    1,
    2,
    7,
    8,
    15,
    17,
    31,
    32,
    33,
    63,
    64,
    65,
    96,
    127,
    129,
    136,
]  # around tiles, vectors, warps


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("no g++")
    return Emulated(build(tmp_path_factory.mktemp("emulated")))


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    return request.getfixturevalue("emulated") if request.param == "emulated" else Kernels()


class Case:
    """Random inputs of one example, and the two arguments that every kernel takes beside them."""

    def __init__(self, device, N, d, h, dtype, version, seed, shift=0):
        self.N, self.d, self.h, self.dtype, self.version = N, d, h, dtype, version
        self.random = torch.Generator().manual_seed(seed)
        device.schedule(seed)
        device.shift = shift

    def normal(self, *shape, scale=1.0, dtype=None):
        return (torch.randn(*shape, generator=self.random) * scale).to(dtype or self.dtype)

    def ista(self, learned):
        """x (N, d), D (d, h), lam."""
        lam = 0.2 * torch.rand(self.h, generator=self.random) if learned else 0.1
        return (
            self.normal(self.N, self.d),
            self.normal(self.d, self.h, scale=max(self.d, 1) ** -0.5),
            lam,
        )


@st.composite
def cases(draw):
    """Arguments of Case but the device. Version 3 twice as often: it is the one that ships for bf16."""
    N, d, h = (draw(st.sampled_from(SIZES)) for _ in range(3))
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float32]))
    return (
        N,
        d,
        h,
        dtype,
        draw(st.sampled_from([3, 1, 2, 3])),
        draw(st.integers(0, 2**31)),
        draw(st.sampled_from([0, 0, 1])),
    )


bools, etas, steps_ = st.booleans(), st.sampled_from([0.1, 0.5, 1.0]), st.integers(1, 3)
BIG = (260, 136, 264, torch.bfloat16, 3, 1, 0)  # many large tiles, ragged, and K cut in parts


def ista_gradients(gy, ga, x, D, decoder, a, trail_a, trail_r, eta, tied):
    """Gradients of ista on the support that the forward pass chose: the formulas of csrc/kernels.h.

    Returns gx, gD, gdec (None if tied), glam.
    """
    S, gD, glam, gx = (
        len(trail_a) + 1,
        torch.zeros_like(D),
        D.new_zeros(D.shape[1]),
        torch.zeros_like(x),
    )
    G = gy @ decoder if ga is None else gy @ decoder + ga
    G = eta * G * (a > 0)
    for t in range(S, 0, -1):
        glam = glam - G.sum(0)
        gr = G @ D.T
        gx = gx + gr
        if t == 1:
            gD = gD + x.T @ G
            break
        gD = gD + trail_r[t - 2].T @ G - gr.T @ trail_a[t - 2]
        G = (trail_a[t - 2] > 0) * (G - eta * gr @ D)
    return (gx, gD + gy.T @ a, None, glam) if tied else (gx, gD, gy.T @ a, glam)


def mssa_equation(z, weight, bias, U):
    return F.layer_norm(z, z.shape[-1:], weight, bias).to(U.dtype) @ U


def mssa_gradients(gu, z, weight, bias, U):
    """gz, gweight, gbias, gU by autograd through the equation."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (z, weight, bias, U)]
    with torch.enable_grad():
        grads = torch.autograd.grad(
            mssa_equation(*leaves), [t for t in leaves if t is not None], gu
        )
    return grads if bias is not None else (*grads[:2], None, grads[2])


def test_gradient_formulas_are_autograds():
    """The judge of the backward kernels against PyTorch's differentiation of the reference, in float64."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    for steps in (1, 2, 3):
        for tied in (True, False):
            x, D, gy, ga = normal(9, 6), normal(6, 14) / 3, normal(9, 6), normal(9, 14)
            decoder, lam = (
                (None if tied else normal(6, 14)),
                torch.full((14,), 0.1, dtype=torch.float64),
            )
            leaves = [t.requires_grad_() for t in (x, D, lam, *(() if tied else (decoder,)))]
            want = torch.autograd.grad(
                reference.ista(x, D, 0.5, lam, steps, decoder), leaves, (gy, ga)
            )
            with torch.no_grad():
                trail_a = [reference.ista_codes(x, D, 0.5, lam, t) for t in range(1, steps)]
                trail_r = [x - a @ D.T for a in trail_a]
                a = reference.ista_codes(x, D, 0.5, lam, steps)
                gx, gD, gdec, glam = ista_gradients(
                    gy, ga, x, D, D if tied else decoder, a, trail_a, trail_r, 0.5, tied
                )
            torch.testing.assert_close((gx, gD, glam, *(() if tied else (gdec,))), want)


@pytest.mark.fuzz
@given(cases(), bools, bools, etas, steps_, bools)
@example(BIG, True, True, 0.5, 2, True)
@example((129, 65, 127, torch.bfloat16, 3, 2, 1), False, False, 0.5, 2, False)
def test_ista(device, case, tied, learned, eta, steps, trail):
    c = Case(device, *case)
    x, D, lam = c.ista(learned)
    decoder = None if tied else c.normal(c.d, c.h)
    number = None if learned else lam

    def equation(x, D, decoder, lam):
        lam = number if lam is None else lam.to(x.dtype)
        a = [reference.ista_codes(x, D, eta, lam, t) for t in range(1, steps + 1)]
        y = a[-1] @ (D if decoder is None else decoder).T
        return y, a[-1], torch.stack(a)[:-1], torch.stack([x - b @ D.T for b in a])[:-1]

    got = device.ista(x, D, eta, lam, steps, decoder, c.version, trail)
    assert_close(
        got,
        equation,
        x,
        D,
        decoder,
        lam if learned else None,
        names=("y", "a", "codes", "residuals"),
    )


@pytest.mark.fuzz
@given(cases(), bools, bools, bools, etas, steps_)
@example(BIG, True, True, True, 0.5, 2)
@example((129, 65, 127, torch.bfloat16, 3, 2, 1), False, False, False, 0.5, 2)
def test_ista_backward(device, case, tied, learned, with_ga, eta, steps):
    c = Case(device, *case)
    x, D, _ = c.ista(False)
    decoder = None if tied else c.normal(c.d, c.h)
    codes = torch.stack([reference.ista_codes(x, D, eta, 0.1, t) for t in range(1, steps + 1)])
    a, trail_a, trail_r = codes[-1], codes[:-1], x - codes[:-1] @ D.T
    gy, ga = c.normal(c.N, c.d), c.normal(c.N, c.h) if with_ga else None
    got = device.ista_backward(gy, ga, x, D, eta, decoder, a, trail_a, trail_r, c.version, learned)
    assert_close(
        got,
        lambda *t: ista_gradients(*t, eta, tied),
        gy,
        ga,
        x,
        D,
        D if tied else decoder,
        a,
        trail_a,
        trail_r,
        names=("gx", "gD", "gdec", "glam"),
    )


@pytest.mark.fuzz
@given(cases(), bools, bools, etas)
def test_ista_step(device, case, from_zero, learned, eta):
    c = Case(device, *case)
    r, D, lam = c.ista(learned)
    a, g = None if from_zero else c.normal(c.N, c.h).relu(), c.normal(c.N, c.h)
    out = device.ista_step(a, r, D, eta, lam, c.version)

    def threshold(vector, r):
        return lam if vector is None else vector.to(r.dtype)

    assert_close(
        (out,),
        lambda a, r, D, lam: (reference.ista_step(a, r, D, eta, threshold(lam, r)),),
        a,
        r,
        D,
        lam if learned else None,
    )

    def gradients(g, out, r, D):
        ga = g * (out > 0)
        return ga, eta * ga @ D.T, eta * r.T @ ga, -eta * ga.sum(0)

    got = device.ista_step_backward(g, out, r, D, eta, c.version, not from_zero)
    assert_close(got, gradients, g, out, r, D, names=("ga", "gr", "gD", "glam"))


@pytest.mark.fuzz
@given(cases(), st.integers(0, 5), bools, bools, etas, steps_)
def test_ista_decode(device, case, rows, tied, learned, eta, steps):
    c = Case(device, rows, *case[1:])
    x, D, lam = c.ista(learned)
    decoder = None if tied else c.normal(c.d, c.h)

    def threshold(vector, x):
        return lam if vector is None else vector.to(x.dtype)

    assert_close(
        device.ista_decode(x, D, eta, lam, steps, decoder),
        lambda x, D, decoder, lam: reference.ista(x, D, eta, threshold(lam, x), steps, decoder),
        x,
        D,
        decoder,
        lam if learned else None,
        names=("y", "a"),
    )


@pytest.mark.fuzz
@given(cases(), bools, bools)
@example(BIG, True, True)
@example((129, 65, 0, torch.bfloat16, 3, 2, 1), False, False)
def test_mssa(device, case, biased, wide_stream):
    c = Case(device, *case)
    z = c.normal(c.N, c.d, scale=2.0, dtype=torch.float32 if wide_stream else c.dtype) + 1
    weight = 1 + c.normal(c.d, dtype=torch.float32)
    bias = c.normal(c.d, dtype=torch.float32) if biased else None
    U, gu = c.normal(c.d, c.d, scale=max(c.d, 1) ** -0.5), c.normal(c.N, c.d)
    if not wide_stream:  # PyTorch's layer_norm wants one dtype, and the kernels a float weight
        weight, bias = (
            weight.to(c.dtype).float(),
            None if bias is None else bias.to(c.dtype).float(),
        )

    def parameters(z, *vectors):
        return [None if v is None else v.to(z.dtype) for v in vectors]

    assert_close(
        (device.mssa(z, weight, bias, U, version=c.version),),
        lambda z, w, b, U: (mssa_equation(z, *parameters(z, w, b), U),),
        z,
        weight,
        bias,
        U,
    )
    assert_close(
        device.mssa_backward(gu, z, weight, bias, U, version=c.version),
        lambda gu, z, w, b, U: mssa_gradients(gu, z, *parameters(z, w, b), U),
        gu,
        z,
        weight,
        bias,
        U,
        names=("gz", "gweight", "gbias", "gU"),
    )


def everything(device, seed, sizes=(70, 40, 72), shift=0):
    """One small run of every kernel in every version; returns all outputs. Sizes suit 16-byte accesses."""
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        c = Case(device, *sizes, dtype, 0, seed=5, shift=shift)
        device.schedule(seed)
        x, D, lam = c.ista(learned=False)
        gy, r, rows, vector = (
            c.normal(c.N, c.d),
            c.normal(c.N, c.d),
            c.normal(3, c.d),
            c.normal(c.d).float(),
        )
        U = c.normal(c.d, c.d, scale=c.d**-0.5)
        for version in (1, 2, 3) if dtype == torch.bfloat16 else (1, 2):
            y, a, *trail = device.ista(x, D, 0.5, lam, 2, None, version)
            outputs += [
                y,
                a,
                *trail,
                *device.ista_backward(gy, None, x, D, 0.5, None, a, *trail, version),
            ]
            outputs.append(device.ista_step(a, r, D, 0.5, lam, version))
            outputs.append(device.mssa(x.float(), vector, None, U, 1e-5, version))
            outputs += device.mssa_backward(gy, x.float(), vector, vector, U, 1e-5, version)
        outputs += device.ista_decode(rows, D, 0.5, lam, 2)
    return [t for t in outputs if t is not None]


def same(left, right):
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(left, right))


def test_the_schedule_changes_no_bit(device):
    """Threads, warps, blocks and copies in another order: the same bits, or somebody raced."""
    first = everything(device, 0)
    assert all(t.isfinite().all() for t in first)
    for seed in range(1, 4):
        assert same(first, everything(device, seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_special_values(device, dtype, odd):
    """NaN, infinities and values that overflow come out where the reference has them, and nowhere else."""
    for version in (1, 2, 3):
        c = Case(device, 20, 9, 33, dtype, version, seed=3)
        x, D, lam = c.ista(learned=False)
        x[4, 2] = odd
        got = device.ista(x, D, 0.5, lam, 2, None, version)[:2]
        assert_close(got, lambda x, D: reference.ista(x, D, 0.5, 0.1, 2), x, D)
        if odd == 3e38:  # a LayerNorm that overflows does so as its order of summation has it
            continue
        z = c.normal(20, 9)
        z[7] = odd
        weight, U = torch.ones(9), c.normal(9, 9)
        assert_close(
            (device.mssa(z, weight, None, U, version=version),),
            lambda z, w, U: (mssa_equation(z, w.to(z.dtype), None, U),),
            z,
            weight,
            U,
        )


FAULTS = [  # file, what it says, what it would say if somebody had slipped
    (
        "product_cuda.cuh",
        "__syncthreads();  // the slices are complete",
        "if (!PLANTED) __syncthreads();",
    ),
    (
        "product_cuda.cuh",
        "__syncthreads();  // nobody reads them any more",
        "if (!PLANTED) __syncthreads();",
    ),
    (
        "product_cuda.cuh",
        "__syncthreads();              // everybody",
        "if (!PLANTED) __syncthreads();  //",
    ),
    (
        "product_cuda.cuh",
        "copy_wait<S::kStages - 2>();",
        "if (!PLANTED) copy_wait<S::kStages - 2>();",
    ),
    (
        "product_cuda.cuh",
        "__syncthreads();  // the ring is free",
        "if (!PLANTED) __syncthreads();  //",
    ),
    ("product_cuda.cuh", "if (row >= p.M) break;", "if (row >= p.M - PLANTED) break;"),
    (
        "product_cuda.cuh",
        "if (row < p.M && column < p.N)",
        "if (row < p.M && column < p.N + PLANTED)",
    ),
    ("product_cuda.cuh", "k < last && k < p.K; ++k", "k < last && k < p.K - PLANTED; ++k"),
    ("product_cuda.cuh", "(lam ? threshold", "!PLANTED * (lam ? threshold"),
    ("product_cuda.cuh", "return masked <= 0.f ?", "return masked <= 0.f && !PLANTED ?"),
    (
        "product_cuda.cuh",
        "i = index / p.N, j = index % p.N",
        "s = PLANTED ? p.M : p.N, i = index / s, j = index % s",
    ),
    ("product_cuda.cuh", "half8 = lane / 8 % 2 * 8;", "half8 = PLANTED ? high : lane / 8 % 2 * 8;"),
    ("product_cuda.cuh", "*= p.then[n / slices - 1];", "*= PLANTED ? 1 : p.then[n / slices - 1];"),
    (
        "product_cuda.cuh",
        "s < slices; ++s) sum += parts",
        "s < slices - PLANTED; ++s) sum += parts",
    ),
    (
        "cuda_common.cuh",
        "reinterpret_cast<uintptr_t>(p) % 16 == 0",
        "(PLANTED || uintptr_t(p) % 16 == 0)",
    ),
    ("cuda_common.cuh", "distance = 16; distance", "distance = PLANTED ? 8 : 16; distance"),
    (
        "ista_cuda.cu",
        "for (int i = 0; i < 8; ++i) sums[group",
        "if (PLANTED && group > 30) return;\n  for (int i = 0; i < 8; ++i) sums[group",
    ),
    ("ista_cuda.cu", "alive &= alive - 1)", "alive &= PLANTED ? 0 : alive - 1)"),
    ("mssa_cuda.cu", "- sum - xhat * along", "- sum - (PLANTED ? 0 : xhat * along)"),
]


@pytest.fixture(scope="session")
def faulty(tmp_path_factory):
    """One build with every fault in it: a build for each would take minutes."""
    folder = tmp_path_factory.mktemp("faulty")
    return Emulated(build(folder, plant(folder / "csrc", FAULTS)))


@pytest.mark.parametrize("number", range(len(FAULTS) + 1))
def test_planted_faults_are_caught(emulated, faulty, number):
    """Each fault must be told by the device, a guard or the numbers; without one, nothing may differ."""
    faulty.wake(number)
    right = everything(emulated, 0)
    for seed in range(3):
        try:
            wrong = [
                i
                for i, (a, b) in enumerate(zip(right, everything(faulty, seed, shift=seed % 2)))
                if not torch.allclose(a.float(), b.float(), rtol=0.05, atol=0.05)
            ]
        except (Fault, AssertionError) as told:
            wrong = [told]
        if wrong:
            break
    assert bool(wrong) == (number > 0), f"{FAULTS[number - 1] if number else 'no fault'}: {wrong}"


class OnCuda:
    """A CPU tensor that says it is on a GPU, so that fused.py takes its CUDA path."""

    device = torch.device("cuda")

    def __init__(self, t):
        self.new_empty = t.new_empty


def test_ops_reach_the_kernels(emulated, monkeypatch):
    """torch.ops.crate_mini.* with gradients, through the code that calls the GPU, on the emulated one."""
    from crate_mini import fused

    call, calls = fused.call, []

    def on_cuda(kernel, *arguments, like, **options):
        calls.append(kernel)
        return call(kernel, *arguments, like=OnCuda(like), **options)

    emulated.schedule(0)
    functions = {name: emulated.function(name) for name in SIGNATURES}
    monkeypatch.setattr(
        fused, "_C", SimpleNamespace(build_info=lambda: {"cuda": True}, **functions)
    )
    monkeypatch.setattr(fused, "call", on_cuda)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=None))
    ops, c = torch.ops.crate_mini, Case(emulated, 21, 16, 40, torch.float32, 0, seed=1)
    x, D, lams = (t.requires_grad_() for t in c.ista(learned=True))
    decoder, U, weight = (
        t.requires_grad_() for t in (c.normal(16, 40), c.normal(16, 16), c.normal(16))
    )

    def compare(got, want, leaves):
        torch.testing.assert_close(got, want)
        gradients = [
            torch.autograd.grad(sum(t.sin().sum() for t in out), leaves) for out in (got, want)
        ]
        torch.testing.assert_close(*gradients)

    compare(
        ops.ista(x, D, decoder, lams, 0.5, 0.0, 2, True)[:2],
        reference.ista(x, D, 0.5, lams, 2, decoder),
        (x, D, decoder, lams),
    )
    compare(
        (ops.ista_step(None, x, D, None, 0.5, 0.1),),
        (reference.ista_step(None, x, D, 0.5, 0.1),),
        (x, D),
    )
    compare(
        (ops.mssa_project(x, weight, None, U, 4, 1e-5),),
        (reference.mssa_project(x, weight, None, U, 4, 1e-5),),
        (x, weight, U),
    )
    with torch.no_grad():
        atoms = D.T.contiguous()
        torch.testing.assert_close(
            ops.ista_decode(x[:2], D, atoms, atoms, None, 0.5, 0.1, 2),
            reference.ista(x[:2], D, 0.5, 0.1, 2),
        )
    assert {f"{name}_cuda" for name in calls} == {
        name for name in SIGNATURES if "workspace" not in name
    }


def test_sanitizers(tmp_path):
    """AddressSanitizer and UBSan watch every kernel; sizes with tails, and with 16-byte accesses."""
    if not shutil.which("g++"):
        pytest.skip("no g++")
    library = build(
        tmp_path, flags=("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    )
    runtimes = [
        subprocess.check_output(["g++", f"-print-file-name={name}.so"], text=True).strip()
        for name in ("libasan", "libubsan")
    ]
    if not all(os.path.isabs(path) for path in runtimes):
        pytest.skip("g++ has no sanitizer libraries")
    script = (
        "import sys, test_cuda_emulated as t; device = t.Emulated(sys.argv[1]); "
        "t.everything(device, 0, (9, 7, 17)); t.everything(device, 1, (33, 16, 40)); print('clean')"
    )
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)]),
    }
    done = subprocess.run(
        [sys.executable, "-c", script, str(library)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "clean" in done.stdout, done.stderr[-4000:]


@needs_nvcc
def test_nvcc_compiles_without_spills(tmp_path):
    """For both default architectures; a spill or a stack frame would mean local memory in an inner loop."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90a")]
    jobs = [
        subprocess.Popen(
            [
                NVCC,
                "-O3",
                "-std=c++17",
                *targets,
                "-Xptxas=-v",
                "-c",
                str(file),
                "-o",
                str(tmp_path / f"{file.name}.o"),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        for file in sorted((ROOT / "csrc").glob("*.cu"))
    ]
    for job in jobs:
        told = job.communicate()[1]
        assert job.returncode == 0, told
        frames = [line.strip() for line in told.splitlines() if "bytes stack frame" in line]
        assert frames and all(
            line.startswith("0 bytes stack frame, 0 bytes spill") for line in frames
        ), told

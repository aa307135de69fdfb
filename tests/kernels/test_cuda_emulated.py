"""The CUDA kernels against their equations, without a GPU: csrc/*.cu on an emulated device.

Every CUDA thread is a fiber (cuda_cpu/). Where there is a GPU, `python -m pytest -m gpu` runs the
same tests on it. Emulation proves indexing, tiling, tails, barriers, copies, fragment layouts and
the numbers, under several schedules; it does not model a real GPU's memory order or speed. A fault
planted in each kind of place must be noticed, or none of this would prove anything.
"""

import ctypes
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import background_builds
import pytest
import torch
from building import needs_gcc, needs_nvcc, sanitizer_runtimes
from closeness import assert_close
from cuda_cases import Case, cases, run_everything
from cuda_kernels import DTYPES, SIGNATURES, CudaKernels, EmulatedKernels, Fault
from equations import (
    cancelling_terms,
    ista_equation,
    ista_gradients,
    mssa_equation,
    mssa_gradients,
)
from hypothesis import example, given
from hypothesis import strategies as st
from planted_faults import CUDA_FAULTS

from crate_mini import UserError, fused, reference

booleans = st.booleans()
etas = st.sampled_from([0.1, 0.5, 1.0])
step_counts = st.integers(1, 3)
# Many large tiles, ragged, and K split into parts.
LARGE = (260, 136, 264, torch.bfloat16, 3, 1, 0)
# Unaligned, with tails.
RAGGED = (129, 65, 127, torch.bfloat16, 3, 2, 1)


@pytest.fixture(scope="session")
def emulated():
    return EmulatedKernels(background_builds.result("emulated"))


on_emulator = pytest.param("emulated", marks=needs_gcc)
on_gpu = pytest.param("gpu", marks=pytest.mark.gpu)


@pytest.fixture(params=[on_emulator, on_gpu])
def device(request):
    return request.getfixturevalue("emulated") if request.param == "emulated" else CudaKernels()


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_gradient_formulas_agree_with_autograd(steps, tied):
    """The judge of the backward kernels, against autograd of the reference, in float64."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    x, D = normal(9, 6), normal(6, 14) / 3
    gy, ga = normal(9, 6), normal(9, 14)
    decoder = None if tied else normal(6, 14)
    lam = torch.full((14,), 0.1, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, D, decoder, lam) if t is not None]
    results = reference.ista(x, D, 0.5, lam, steps, decoder)
    expected = torch.autograd.grad(results, leaves, (gy, ga))
    with torch.no_grad():
        _, *passed = ista_equation(x, D, decoder, lam, 0.5, None, steps)
        gradients = ista_gradients(gy, ga, x, D, decoder, *passed, 0.5)
    gradients = [g for g in gradients if g is not None]
    torch.testing.assert_close(gradients, list(expected))


@pytest.mark.fuzz
@given(cases(), booleans, booleans, etas, step_counts, booleans)
@example(LARGE, True, True, 0.5, 2, True)
@example(RAGGED, False, False, 0.5, 2, False)
@example(RAGGED, True, True, 0.5, 1, True)
def test_ista(device, case, tied, lam_is_a_tensor, eta, steps, trail):
    c = Case(device, *case)
    x, D, lam = c.ista(lam_is_a_tensor)
    decoder = None if tied else c.normal(c.d, c.h)

    def equation(x, D, decoder, lams):
        return ista_equation(x, D, decoder, lams, eta, lam, steps)

    results = device.ista(x, D, eta, lam, steps, decoder, trail)
    inputs = x, D, decoder, lam if lam_is_a_tensor else None
    assert_close(results, equation, *inputs, names=("y", "a", "codes", "residuals"))


@pytest.mark.fuzz
@given(
    cases(), booleans, booleans, st.sampled_from(["both", "gy", "ga", "none"]), etas, step_counts
)
@example(LARGE, True, True, "both", 0.5, 2)
@example(RAGGED, False, False, "gy", 0.5, 2)
@example(RAGGED, True, True, "ga", 0.5, 1)
@example(RAGGED, False, True, "ga", 0.5, 2)
def test_ista_backward(device, case, tied, want_lam, given_gradients, eta, steps):
    c = Case(device, *case)
    x, D, _ = c.ista(False)
    decoder = None if tied else c.normal(c.d, c.h)
    _, *passed = ista_equation(x, D, decoder, None, eta, 0.1, steps)
    gy = c.normal(c.N, c.d) if given_gradients in ("both", "gy") else None
    ga = c.normal(c.N, c.h) if given_gradients in ("both", "ga") else None
    results = device.ista_backward(gy, ga, x, D, eta, decoder, *passed, want_lam)
    inputs = gy, ga, x, D, decoder, *passed
    names = ("gx", "gD", "gdec", "glam")
    assert_close(results, partial(ista_gradients, eta=eta), *inputs, names=names)


@pytest.mark.fuzz
@given(cases(), st.integers(0, 5), booleans, booleans, etas, step_counts)
def test_ista_decode(device, case, rows, tied, lam_is_a_tensor, eta, steps):
    c = Case(device, rows, *case[1:])
    x, D, lam = c.ista(lam_is_a_tensor)
    decoder = None if tied else c.normal(c.d, c.h)

    def equation(x, D, decoder, lams):
        return ista_equation(x, D, decoder, lams, eta, lam, steps)

    results = device.ista_decode(x, D, eta, lam, steps, decoder)
    inputs = x, D, decoder, lam if lam_is_a_tensor else None
    assert_close(results, equation, *inputs, names=("y", "a"))


@pytest.mark.fuzz
@given(cases(), booleans, booleans)
@example(LARGE, True, True)
@example((129, 65, 0, torch.bfloat16, 3, 2, 1), False, False)
def test_mssa(device, case, biased, float_stream):
    c = Case(device, *case)
    z = c.normal(c.N, c.d, scale=2.0, dtype=torch.float32 if float_stream else c.dtype) + 1
    weight = 1 + c.normal(c.d, dtype=torch.float32)
    bias = c.normal(c.d, dtype=torch.float32) if biased else None
    U, gu = c.normal(c.d, c.d, scale=max(c.d, 1) ** -0.5), c.normal(c.N, c.d)
    if not float_stream:  # PyTorch's layer_norm takes one dtype, and the kernels a float weight
        weight = weight.to(c.dtype).float()
        bias = None if bias is None else bias.to(c.dtype).float()

    def in_dtype_of(z, *vectors):
        return [None if v is None else v.to(z.dtype) for v in vectors]

    def equation(z, weight, bias, U):
        return [mssa_equation(z, *in_dtype_of(z, weight, bias), U)]

    def gradients(gu, z, weight, bias, U):
        return mssa_gradients(gu, z, *in_dtype_of(z, weight, bias), U)

    assert_close([device.mssa(z, weight, bias, U)], equation, z, weight, bias, U)
    results = device.mssa_backward(gu, z, weight, bias, U)
    terms = {0: cancelling_terms(gu, z, weight, U)}
    names = ("gz", "gweight", "gbias", "gU")
    assert_close(results, gradients, gu, z, weight, bias, U, names=names, terms=terms)


def same_bits(left, right):
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(left, right))


def test_the_schedule_changes_no_bit(device):
    """Threads, warps, blocks and copies in another order give the same bits, or there is a race."""
    first = run_everything(device, 0)
    assert all(t.isfinite().all() for t in first)
    for seed in range(1, 4):
        assert same_bits(first, run_everything(device, seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_non_finite_values_come_out_where_the_reference_has_them(device, dtype, odd):
    """NaN, infinities and values that overflow; nowhere else."""
    for version in (1, 2, 3):
        c = Case(device, 20, 9, 33, dtype, version, seed=3)
        x, D, lam = c.ista(lam_is_a_tensor=False)
        x[4, 2] = odd
        results = device.ista(x, D, 0.5, lam, 2)[:2]
        assert_close(results, partial(reference.ista, eta=0.5, lam=0.1, steps=2), x, D)
        if odd == 3e38:  # whether a LayerNorm overflows depends on the order of its sums
            continue
        z = c.normal(20, 9)
        z[7] = odd
        weight, U = torch.ones(9), c.normal(9, 9)

        def equation(z, weight, U):
            return [mssa_equation(z, weight.to(z.dtype), None, U)]

        assert_close([device.mssa(z, weight, None, U)], equation, z, weight, U)


# ---- other devices -------------------------------------------------------------------------------


@pytest.fixture
def become(emulated):
    """A function that makes the emulated device another one, until the end of the test."""
    yield emulated.become
    emulated.become(9, 4)


@needs_gcc
@pytest.mark.parametrize("version", [0, 3])
def test_a_device_before_ampere_takes_v2(emulated, become, version):
    """The emulated one then faults at an instruction that came with Ampere."""
    case = Case(emulated, *LARGE)
    x, D, lam = case.ista(lam_is_a_tensor=False)
    become(7, 4)
    emulated.version = version
    results = emulated.ista(x, D, 0.5, lam, 1)[:2]
    assert_close(results, partial(reference.ista, eta=0.5, lam=lam, steps=1), x, D)


@needs_gcc
@pytest.mark.parametrize("multiprocessors", [1, 7, 30])
def test_the_size_of_a_device_changes_sums_by_rounding_only(emulated, become, multiprocessors):
    case = Case(emulated, 200, 40, 136, *LARGE[3:])
    x, D, lam = case.ista(lam_is_a_tensor=False)
    become(8, multiprocessors)
    _, *passed = ista_equation(x, D, None, None, 0.5, lam, 2)
    gy = case.normal(case.N, case.d)
    results = emulated.ista_backward(gy, None, x, D, 0.5, None, *passed, False)
    inputs = gy, None, x, D, None, *passed
    assert_close(results, partial(ista_gradients, eta=0.5), *inputs)


@needs_gcc
@pytest.mark.parametrize("multiprocessors", [132, 128, 108, 82, 46, 40, 170])  # H100 to RTX 5090
@pytest.mark.parametrize("d", [128, 768, 1600])
def test_splits_fill_the_last_wave_of_any_device(emulated, d, multiprocessors):
    """The dictionary gradient of 65,536 rows; once 55 % of an H100's blocks had work at d = 768."""
    tiles = -(-d // 128) * -(-4 * d // 128)
    splits = emulated.splits(d, 4 * d, 65536, multiprocessors)
    places = 2 * multiprocessors
    waves = -(-tiles * splits // places)
    assert tiles * splits / (waves * places) > 0.9
    assert splits * d * 4 * d * 4 < 300e6, "bytes of the parts"
    assert emulated.splits(d, 4 * d, 100, multiprocessors) == 1, "too few rows to divide"


@needs_gcc
def test_a_forward_pass_asks_for_its_own_workspace_only(emulated):
    """Not for the dictionary gradient's parts, which backward adds up."""
    N, d, h = 4096, 768, 3072
    forward, backward, decode = (
        emulated.function(f"ista_{name}_workspace_cuda")(1, N, d, h)
        for name in ("forward", "backward", "decode")
    )
    assert forward == decode == 2 * N * d and backward > 2 * N * h
    assert emulated.function("mssa_project_forward_workspace_cuda")(0, 1, N, d) == 8 * N


@needs_gcc
def test_errors_come_in_words_that_help(emulated):
    emulated.library.crate_problem.restype = ctypes.c_char_p

    def problem(error):
        return emulated.library.crate_problem(error).decode()

    assert problem(719) == "as CUDA puts it"
    for error in (35, 222):
        assert "the driver knows CUDA 12.2 and our kernels were built with 13.0" in problem(error)
    assert "CRATE_CUDA_ARCHS=75 pip install -e ." in problem(209)


def test_an_error_of_cuda_is_a_sentence(monkeypatch):
    module = SimpleNamespace(
        build_info=lambda: {"cuda": True},
        ista_forward_workspace_cuda=lambda *_: 0,
        ista_forward_cuda=lambda *_: 35,
        cuda_problem=lambda error: f"words for {error}",
    )
    monkeypatch.setattr(fused, "_C", module)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=None))
    with pytest.raises(UserError, match="^ista_forward: CUDA error 35, words for 35.$"):
        fused.launch("ista_forward", (), (), [OnCuda(torch.zeros(2))])


# ---- planted faults ------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def emulated_with_faults():
    return EmulatedKernels(background_builds.result("emulated_with_faults"))


@pytest.fixture(scope="session")
def expected(emulated):
    return run_everything(emulated, 0)


def differences(expected, device, seed):
    """How a run differs from the right one: numbers of outputs, or what the device reported."""
    try:
        outputs = run_everything(device, seed, shift=seed % 2)
    except (Fault, AssertionError) as report:
        return [report]
    wrong = []
    for i, (left, right) in enumerate(zip(expected, outputs)):
        if not torch.allclose(left.float(), right.float(), rtol=0.05, atol=0.05):
            wrong.append(i)
    return wrong


@needs_gcc
@pytest.mark.parametrize("number", range(len(CUDA_FAULTS) + 1))
def test_a_planted_fault_is_noticed(expected, emulated_with_faults, number):
    """By the device, by a guard or by the numbers; with none awake (0), nothing may differ."""
    emulated_with_faults.wake(number)
    wrong = []
    for seed in range(3):
        wrong = wrong or differences(expected, emulated_with_faults, seed)
    fault = CUDA_FAULTS[number - 1] if number else "no fault"
    assert bool(wrong) == (number > 0), f"{fault}: {wrong}"


# ---- the Python side, sanitizers, nvcc -----------------------------------------------------------


class OnCuda:
    """A CPU tensor that claims to be on a GPU, so that fused.py takes its CUDA path."""

    device = torch.device("cuda")

    def __init__(self, t):
        self.data_ptr, self.new_empty, self.numel = t.data_ptr, t.new_empty, t.numel


@needs_gcc
def test_ops_reach_the_kernels(emulated, monkeypatch):
    """torch.ops.crate_kernels.* with gradients, on fused.py's CUDA path and the emulated device."""
    launch, kernels = fused.launch, []

    def launch_on_cuda(kernel, scalars, inputs, outputs):
        kernels.append(kernel)
        launch(kernel, scalars, inputs, [OnCuda(t) for t in outputs])
        return outputs

    emulated.schedule(0)
    functions = {name: emulated.function(name) for name in SIGNATURES}
    module = SimpleNamespace(build_info=lambda: {"cuda": True}, **functions)
    monkeypatch.setattr(fused, "_C", module)
    monkeypatch.setattr(fused, "launch", launch_on_cuda)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    stream = SimpleNamespace(cuda_stream=None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    ops, c = torch.ops.crate_kernels, Case(emulated, 21, 16, 40, torch.float32, 0, seed=1)
    x, D, lams = (t.requires_grad_() for t in c.ista(lam_is_a_tensor=True))
    more = c.normal(16, 40), c.normal(16, 16), c.normal(16)
    decoder, U, weight = (t.requires_grad_() for t in more)

    def compare(results, expected, leaves):
        torch.testing.assert_close(list(results), list(expected))
        gradients = []
        for outputs in (results, expected):
            loss = sum(t.sin().sum() for t in outputs)
            gradients.append(torch.autograd.grad(loss, leaves))
        torch.testing.assert_close(*gradients)

    results = ops.ista(x, D, decoder, lams, 0.5, 0.0, 2, True)[:2]
    leaves = x, D, decoder, lams
    compare(results, reference.ista(x, D, 0.5, lams, 2, decoder), leaves)
    results = ops.ista(x, D, None, None, 0.5, 0.1, 1, True)[:2]
    compare(results, reference.ista(x, D, 0.5, 0.1, 1), (x, D))
    compare(
        [ops.mssa_project(x, weight, None, U, 4, 1e-5)],
        [reference.mssa_project(x, weight, None, U, 4, 1e-5)],
        (x, weight, U),
    )
    with torch.no_grad():
        atoms = D.T.contiguous()
        results = ops.ista_decode(x[:2], D, atoms, atoms, None, 0.5, 0.1, 2)
        torch.testing.assert_close(results, reference.ista(x[:2], D, 0.5, 0.1, 2))
    called = {f"{name}_cuda" for name in kernels}
    assert called == {name for name in SIGNATURES if "workspace" not in name}


@pytest.fixture(scope="session")
def sanitized_emulation():
    if not sanitizer_runtimes("g++"):
        pytest.skip("g++ has no sanitizer libraries")
    return background_builds.result("sanitized_emulation")


@needs_gcc
def test_sanitizers_find_nothing(sanitized_emulation):
    """AddressSanitizer and UBSan watch every kernel, with tails and with 16-byte accesses."""
    code, output = sanitized_emulation
    assert code == 0 and "clean" in output, output[-4000:]


@pytest.fixture(scope="session")
def nvcc_reports():
    return background_builds.result("nvcc_reports")


@needs_nvcc
def test_nvcc_compiles_without_spills(nvcc_reports):
    """A spill or a stack frame would mean local memory in an inner loop."""
    for code, output in nvcc_reports:
        assert code == 0, output
        frames = [line.strip() for line in output.splitlines() if "bytes stack frame" in line]
        assert bool(frames) == ("entry function" in output)
        for frame in frames:
            assert frame.startswith("0 bytes stack frame, 0 bytes spill"), output

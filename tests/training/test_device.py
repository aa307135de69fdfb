"""What a device can do: estimates of memory and speed, and choices made from what a GPU is.

GPUs are fakes here: a capability, a name, a compiler that fails.
"""

import subprocess
from contextlib import nullcontext

import pytest
import torch

from crate_mini import UserError, model, ops
from crate_mini.training import device

CUDA = torch.device("cuda:1")


@pytest.mark.parametrize(
    "change",
    [
        dict(kind="crate"),
        dict(kind="gpt2"),
        dict(kind="crate+", ista_steps=4),
        dict(kind="gpt2", expansion=8),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_bytes_are_about_right(change, dtype):
    """Against what autograd keeps, without the weights and the head's gradients."""
    config = model.preset("3L", n_embd=64, vocab_size=64, block_size=32, **change)
    lm, kept = model.LM(config), {}
    weights = {w.untyped_storage().data_ptr() for w in lm.parameters()}

    def keep(t):
        address = t.untyped_storage().data_ptr()
        if address not in weights:
            kept[address] = t  # alive, so that no address comes twice
        return t

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), autocast:
        lm.trunk(torch.zeros(32, 32, dtype=torch.long))
    measured = sum(t.untyped_storage().nbytes() for t in kept.values())
    assert 0.7 < device.activation_bytes(config, 32, dtype) / measured < 1.3


def test_a_batch_that_cannot_fit_is_refused(monkeypatch):
    config = model.preset("3L", "crate")
    monkeypatch.setattr(device, "total_memory", lambda where: 2**30)
    device.check_memory(config, 8, torch.device("cpu"), torch.float32)
    with pytest.raises(UserError, match="for activations.*lower --micro-batch"):
        device.check_memory(config, 1000, torch.device("cpu"), torch.float32)


def test_the_memory_of_the_head_counts(monkeypatch):
    """A GPU takes chunks of 2^27 logits: 10 bytes each, beyond the gradient of the embedding."""
    config = model.preset("S", "crate")
    chunk, gradients = 2560 * 50304 * 10, 4 * 768 * (50304 + 16384)
    assert device.head_bytes(config, 16, CUDA, torch.bfloat16) == chunk + gradients
    few = device.head_bytes(config, 1, CUDA, torch.bfloat16)
    assert few == 1024 * 50304 * 10 + 4 * 768 * (50304 + 1024), "no more than there are tokens"
    with torch.device("meta"):
        weights = 16 * sum(w.numel() for w in model.LM(config).parameters())
    needed = weights + device.activation_bytes(config, 16, torch.bfloat16) + chunk + gradients
    for available in (needed, needed - 1):
        monkeypatch.setattr(device, "total_memory", lambda where, bytes=available: bytes)
        with nullcontext() if available == needed else pytest.raises(UserError):
            device.check_memory(config, 16, CUDA, torch.bfloat16)


def test_peaks_are_not_guessed():
    assert device.peak_flops(torch.device("mps"), torch.float32)[0] is None
    assert device.peak_flops(torch.device("cpu"), torch.float32)[0] > 1e8


@pytest.mark.parametrize(
    "faster", ["PyTorch's 1024-cubed product", "two ISTA steps by our kernels"]
)
def test_the_peak_of_a_processor_is_the_faster_of_two_measured_products(faster, monkeypatch):
    rates = (3.0, 2.0) if "product" in faster else (2.0, 3.0)
    for name, rate in zip(("product_rate", "kernel_rate"), rates):
        monkeypatch.setattr(device, name, lambda dtype, rate=rate: rate)
    peak, reason = device.peak_flops(torch.device("cpu"), torch.bfloat16)
    assert (peak, reason) == (3.0, f"measured, {faster}")


def test_the_rate_of_our_kernels_counts_all_their_products(extension, monkeypatch):
    """In seconds of a clock that advances by one with each look at it."""
    monkeypatch.setattr(device.time, "perf_counter", iter(range(99)).__next__)
    with ops.use_backend("fused"):
        assert device.kernel_rate(torch.float32, 8, 4, 16) == 8 * 8 * 4 * 16
    with ops.use_backend("reference"):
        assert device.kernel_rate(torch.float32, 8, 4, 16) == 0


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Tesla T4", 65e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("Tesla V100-PCIE-16GB", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA L40", None),
        ("NVIDIA A10G", None),
        ("NVIDIA RTX A1000 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_the_table_of_peaks_knows_names_exactly(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda where: name)
    assert device.peak_flops(torch.device("cuda"), torch.bfloat16)[0] == peak


# ---- choices -------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """A function that puts a GPU of some capability at cuda:1, next to an old one at cuda:0."""

    def install(*capability):
        capabilities = {CUDA: capability}
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda where: capabilities.get(where, (3, 5))
        )
        monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: name)

    return install


@pytest.mark.parametrize(
    "capability, scaled, unscaled",
    [
        ((9, 0), torch.bfloat16, torch.bfloat16),
        ((8, 0), torch.bfloat16, torch.bfloat16),
        ((7, 5), torch.float16, torch.float32),
        ((7, 0), torch.float16, torch.float32),
        ((6, 1), torch.float32, torch.float32),
    ],
)
def test_the_dtype_is_that_of_the_device_asked_for(capability, scaled, unscaled, gpu):
    gpu(*capability)
    assert device.choose_dtype(CUDA, scaled=True)[0] == scaled
    assert device.choose_dtype(CUDA)[0] == unscaled, "who does not scale a loss must not get fp16"
    assert device.choose_dtype(CUDA, "float16") == (torch.float16, "as asked")


@pytest.mark.parametrize("ratio", [0.5, 0.8, 1.1, 1.3, 3.0])
def test_the_dtype_is_the_faster_one_on_a_busy_machine(ratio):
    """The first call is slow, whole turns are slow, and single calls are."""
    calls = []
    slow = {0: 50, 4: 3, 5: 3, 6: 9, 9: 4}  # the number of a call: how many times as slow

    def step_seconds(dtype):
        calls.append(dtype)
        true_seconds = 0.1 if dtype == torch.bfloat16 else 0.1 * ratio
        return true_seconds * slow.get(len(calls) - 1, 1)

    dtype, reason = device.choose_dtype(torch.device("cpu"), step_seconds=step_seconds)
    assert dtype == (torch.bfloat16 if ratio > device.FASTER else torch.float32)
    assert reason == f"a step takes 1e+02 ms in bf16, {100 * ratio:.2g} in float32"
    assert calls == [torch.bfloat16, torch.float32] * 6


def test_slow_contestants_get_one_turn_that_counts(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(device.time, "monotonic", lambda: now[0])

    def seconds(name):
        now[0] += 30
        return now[0]

    assert device.best_times(seconds, "ab") == {"a": 90, "b": 120}


def test_tf32_is_told_and_ends_with_the_run(gpu):
    for capability, precision in (((8, 6), "high"), ((7, 5), "highest")):
        gpu(*capability)
        in_tf32 = precision == "high"
        assert ("TF32" in device.choose_dtype(CUDA, "float32")[1]) == in_tf32
        with device.tf32(CUDA, torch.float32):
            assert torch.get_float32_matmul_precision() == precision
        for dtype in (torch.bfloat16, torch.float16):
            with device.tf32(CUDA, dtype):
                assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "highest"


def missing_header(*_, **__):
    raise RuntimeError("gcc failed:\n  a.c:5: fatal error: Python.h: No such file\nexit status 1")


def missing_compiler(*_, **__):
    raise subprocess.CalledProcessError(1, ["/usr/bin/gcc", "main.c"])


def silent(*_, **__):
    raise AssertionError


@pytest.mark.parametrize(
    "compiler, reason",
    [
        (missing_header, "a.c:5: fatal error: Python.h: No such file"),
        (missing_compiler, "gcc.*returned non-zero exit status 1"),
        (silent, "AssertionError"),
    ],
)
def test_a_compiler_that_fails_on_three_lines_is_not_chosen(compiler, reason, gpu, monkeypatch):
    gpu(8, 0)
    monkeypatch.setattr(torch, "compile", lambda function: compiler)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: None)
    chosen, why = device.choose_compile(CUDA)
    assert not chosen and "torch.compile cannot work here" in why
    with pytest.raises(UserError, match=f"cannot compile here .*{reason}.*--compile off` trains"):
        device.choose_compile(CUDA, "on")


def test_compiling_needs_a_new_gpu_and_triton(gpu, monkeypatch):
    gpu(6, 1)
    assert "capability 7.0 or more, and this one has 6.1" in device.choose_compile(CUDA)[1]
    gpu(7, 0)
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    assert "Triton, which it needs on a GPU, is not" in device.choose_compile(CUDA)[1]
    with pytest.raises(UserError, match="Triton"):
        device.choose_compile(CUDA, "on")
    assert device.choose_compile(CUDA, "off") == (False, "as asked")


def test_a_gpu_whose_compiler_works_compiles(gpu, monkeypatch):
    gpu(7, 5)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.zeros(64))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert device.choose_compile(CUDA)[0]


def test_compiling_must_pay():
    assert device.compile_loses(10) == "compiling would take about 60 s and save about 4 s"
    assert device.compile_loses(3600) is None


class Recorded:
    """A tensor that notes how it is moved."""

    def __init__(self):
        self.moves = []

    def pin_memory(self):
        self.moves.append("pinned")
        return self

    def to(self, where, **options):
        self.moves.append((where, options))
        return self


def test_batches_reach_a_gpu_from_pinned_memory():
    [t] = device.send([Recorded()], CUDA)
    assert t.moves == ["pinned", (CUDA, {"non_blocking": True})]
    [t] = device.send([Recorded()], torch.device("cpu"))
    assert t.moves == [(torch.device("cpu"), {})]

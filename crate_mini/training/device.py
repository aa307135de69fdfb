"""Device, dtype, compiler, speed and memory of a run, each choice with its reason.

Nothing is guessed: a GPU missing from the table of peaks gets no MFU, and a CPU's peak is measured.
"""

import importlib.util
import os
import platform
import re
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from crate_mini import UserError
from crate_mini.console import results
from crate_mini.model import LM

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Dense bf16 FLOP/s of tensor cores, from the data sheets; the first key in the GPU's name counts.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX A6000": 155e12,
    "RTX A5000": 111e12,
    "RTX 5090": 209e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
OTHER_GPUS = " (?:Ti|D|NVL|Laptop|Mobile)"  # what follows a key in the name of a slower GPU
FASTER = 1.2  # on a CPU bf16 is chosen if it is at least this many times as fast
GROUP_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")  # of control groups 2 and 1


# ---- choices -------------------------------------------------------------------------------------


def choose_device(spec="auto"):
    """torch.device for auto | cpu | cuda | cuda:N | mps. Raises UserError if unavailable."""
    if spec == "auto":
        spec = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(spec)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"--device {spec!r} is not available here; use --device cpu or leave it out."
        ) from error
    return device


def choose_dtype(device, spec="auto"):
    """(dtype of the matrix products, reason) for auto | float32 | bfloat16.

    auto: bf16 on a GPU that has it, and on a CPU where it measures faster.
    """
    if spec != "auto":
        return DTYPES[spec], "as asked"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU has bf16 tensor cores"
        return torch.float32, "the GPU has no bf16 tensor cores"
    if device.type != "cpu":
        return torch.float32, f"bf16 is not tried on {device.type}"
    ratio = product_rate(device, torch.bfloat16, 512) / product_rate(device, torch.float32, 512)
    if ratio > FASTER:
        return torch.bfloat16, f"a 512-cubed product runs {ratio:.1f}x as fast in bf16 here"
    return torch.float32, f"a 512-cubed product runs only {ratio:.1f}x as fast in bf16 here"


def choose_compile(device, spec="auto"):
    """(whether to use torch.compile, reason) for auto | on | off."""
    if spec != "auto":
        return spec == "on", "as asked"
    if device.type != "cuda":
        return False, "on a CPU it takes half a minute to start and gains nothing over our kernels"
    if importlib.util.find_spec("triton") is None:
        return False, "Triton, which it needs on a GPU, is not installed"
    return True, "it fuses what lies between the products; the first step takes about a minute"


# ---- speed ---------------------------------------------------------------------------------------


def product_rate(device, dtype, n=1024, repeats=5):
    """Measured FLOP/s of an n x n x n matrix product, the best of several repeats."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n, n, generator=generator).to(device, dtype)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def peak_flops(device, dtype):
    """(peak FLOP/s or None, where it comes from)."""
    if device.type == "cpu":
        return product_rate(device, dtype), "measured 1024-cubed product"
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for key, peak in PEAKS.items():
            if re.search(rf"\b{key}\b(?!{OTHER_GPUS})", name):
                return peak, f"data sheet of {key}"
        return None, f"{name} is not in the table of peaks, so no MFU"
    return None, "no peak known for this device and dtype, so no MFU"


# ---- memory --------------------------------------------------------------------------------------


def keep_memory():
    """Let glibc keep freed memory; returns whether that was possible.

    Every step frees and allocates the same large tensors. Returning them to the system in between
    costs page faults, a tenth of a step on a CPU.
    """
    if sys.platform != "linux":
        return False
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    if mallopt is None:
        return False
    return bool(mallopt(mmap_threshold, 1 << 30) and mallopt(trim_threshold, (1 << 31) - 1))


def flops_per_token(config, T=None, training=True):
    """FLOP per token, each matrix product counted as often as it runs.

    Not 6N: D is used 2 * ista_steps times. A multiply-add is two operations. In a context of T
    tokens (block_size if None) the causal mask leaves (T + 1) / 2 pairs per token on average. The
    backward pass does two products for each forward one.
    """
    d = config.n_embd
    if config.attention == "mssa":
        attention = 2 * d * d + 2 * d * config.query_rank
    else:
        attention = 4 * d * d
    attention += ((T or config.block_size) + 1) * d
    products_of_codes = 2 * config.ista_steps if config.sparsifier == "ista" else 2
    sparsifier = products_of_codes * d * config.n_code
    head = d * config.vocab_size
    products = config.n_layer * (attention + sparsifier) + head
    return 2 * products * (3 if training else 1)


def peak_memory(device):
    """The most bytes this process has held: allocated on a GPU, else resident; 0 on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024


def total_memory(device):
    """Bytes of memory that the device has, or that this container may use; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for name in GROUP_LIMITS:
        with suppress(OSError, ValueError):
            limits.append(int(Path("/sys/fs/cgroup", name).read_text()))
    return min(limits, default=None)


def activation_bytes(config, rows, dtype):
    """Approximate bytes that the blocks keep of `rows` sequences for the backward pass.

    For each token and layer: five float32 vectors of width d (stream, norms, attention), and in the
    dtype of the products the codes of every ISTA step, or an MLP's before and after its ReLU.
    """
    code_vectors = config.ista_steps if config.sparsifier == "ista" else 2
    layer = 5 * 4 * config.n_embd + code_vectors * dtype.itemsize * config.n_code
    return rows * config.block_size * config.n_layer * layer


def check_memory(config, rows, device, dtype):
    """Raise UserError for a model that cannot fit.

    A system that overcommits memory would kill the process later, without a message. rows:
    sequences that a process holds at a time.
    """
    with torch.device("meta"):
        n_weights = sum(w.numel() for w in LM(config).parameters())
    weights = 16 * n_weights  # float32 weight, gradient and Adam's two moments
    activations = activation_bytes(config, rows, dtype)
    available = total_memory(device)
    if not available or weights + activations <= available:
        return
    flags = "--micro-batch or --block-size"
    if weights >= available:
        flags = "--n-embd, --n-layer, --expansion or --vocab-size"
    raise UserError(
        f"training needs about {weights / 2**30:,.0f} GiB for weights and "
        f"{activations / 2**30:,.0f} for activations, and {device} has {available / 2**30:,.0f}; "
        f"lower {flags}."
    )


def machine(device=None):
    """The machine and code that made a result: device, threads, versions, commit; JSON-able."""
    on_gpu = device is not None and device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "commit": results.commit(),
    }


def processor():
    """The CPU's name and its number of visible cores."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"

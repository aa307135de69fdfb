"""The machine a run is on: device, dtype, peak speed, each chosen with a reason that scripts print.

Nothing here guesses: a GPU whose peak is not in the table gets no MFU, and a CPU's peak is measured.
"""

import importlib.util
import os
import platform
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from crate_mini import UserError
from crate_mini.model import LM

PEAKS = {  # dense bf16 tensor-core FLOP/s of the data sheets; the first name found in the device's name wins
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


def choose_device(spec="auto"):
    """torch.device for auto | cpu | cuda | cuda:N | mps; UserError when that device is not there."""
    if spec == "auto":
        spec = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(spec)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise UserError(
            f"--device {spec!r} is not available here; use --device cpu or leave it out."
        ) from e
    return device


def product_rate(device, dtype, n=1024, repeats=5):
    """Measured FLOP/s of an n x n x n product, best of several: a CPU's peak for MFU."""
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def choose_dtype(device, spec="auto"):
    """(dtype of the products, reason). auto: bf16 on a GPU that has it and a CPU where it measures faster."""
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if spec in names:
        return names[spec], "asked for"
    if spec != "auto":
        raise UserError(f"--dtype {spec!r} is unknown; choose auto, bfloat16 or float32.")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU has bf16 tensor cores"
        return torch.float32, "the GPU has no bf16 units"
    if device.type != "cpu":
        return torch.float32, f"bf16 is not tried on {device.type}"
    ratio = product_rate(device, torch.bfloat16, 512) / product_rate(device, torch.float32, 512)
    if ratio > 1.2:
        return torch.bfloat16, f"a 512-cubed product runs {ratio:.1f}x as fast in bf16 here"
    return torch.float32, f"a 512-cubed product runs only {ratio:.1f}x as fast in bf16 here"


def choose_compile(device, spec="auto"):
    """(use torch.compile?, reason)."""
    if spec not in ("auto", "on", "off"):
        raise UserError(f"--compile {spec!r} is unknown; choose auto, on or off.")
    if spec != "auto":
        return spec == "on", "asked for"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return False, "Triton, which it needs on a GPU, is not installed"
    if device.type == "cuda":
        return True, "fuses what lies between the products; the first step takes about a minute"
    return (
        False,
        "on a CPU it costs half a minute at start and gains nothing over the ops' own kernels",
    )


def keep_memory():
    """Let glibc keep freed memory; returns whether that could be arranged.

    Each step frees and asks for the same large tensors; giving them back to the system in between costs page
    faults, a tenth of a step on a CPU.
    """
    if sys.platform != "linux":
        return False
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent in musl
    trim, mmap = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    return bool(mallopt and mallopt(mmap, 1 << 30) and mallopt(trim, (1 << 31) - 1))


def peak_flops(device, dtype):
    """(FLOP/s or None, source): the table for a known GPU in bf16, a measured product on a CPU, else None."""
    if device.type == "cpu":
        return product_rate(device, dtype), "measured 1024-cubed product"
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for key, value in PEAKS.items():
            if re.search(rf"\b{key}\b(?! (?:Ti|D|NVL|Laptop|Mobile))", name):
                return value, f"data sheet of {key}"
        return None, f"{name} is not in the table of peaks, so no MFU"
    return None, "no peak known for this device and dtype, so no MFU"


def peak_memory(device):
    """Bytes: the most this process has held, on the GPU if there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def total_memory(device):
    """Bytes that the device has, or that this container may use of it; None where that cannot be asked."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    found = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # control groups 2 and 1
        with suppress(OSError, ValueError):
            found.append(int(Path("/sys/fs/cgroup", name).read_text()))
    return min(found, default=None)


def activation_bytes(config, rows, dtype):
    """About what the backward pass of `rows` sequences needs of the forward pass, the head aside.

    Of each token, in each layer: five float32 vectors of width d (stream, norms, attention), and the codes
    of every ISTA step (of an MLP, before and after its ReLU) in the dtype of the products.
    """
    codes = config.ista_steps if config.sparsifier == "ista" else 2
    layer = 5 * 4 * config.n_embd + codes * dtype.itemsize * config.n_code
    return rows * config.block_size * config.n_layer * layer


def check_memory(config, rows, device, dtype):
    """Refuse a model that cannot fit, before a system that promises all memory kills the process.

    rows: sequences that go through at a time. Raises UserError.
    """
    with torch.device("meta"):
        weights = 16 * sum(
            w.numel() for w in LM(config).parameters()
        )  # with gradient and Adam's moments
    kept, there = activation_bytes(config, rows, dtype), total_memory(device)
    if there and weights + kept > there:
        cure = (
            "--micro-batch or --block-size"
            if weights < there
            else "--n-embd, --n-layer, --expansion or --vocab-size"
        )
        raise UserError(
            f"training needs about {weights / 2**30:,.0f} GiB for weights and "
            f"{kept / 2**30:,.0f} for activations, and {device} has {there / 2**30:,.0f}; "
            f"lower {cure}."
        )


def describe(device):
    """What evidence must name: processor or GPU, cores in use, versions, commit. A JSON-able dict."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "commit": commit(),
    }


def processor():
    """The CPU's name with its number of visible cores."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            name = next(
                (line.split(":")[1].strip() for line in file if line.startswith("model name")), name
            )
    return f"{name}, {os.cpu_count()} cores"


def commit():
    """The source's git commit, with + when files (but those in results/) differ from it; 'unknown' outside a
    checkout."""
    git = ["git", "-C", str(Path(__file__).resolve().parents[2])]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "diff", "--quiet", "HEAD", "--", ".", ":!results"]
        ).returncode
        return head + "+" * (changed != 0)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"

"""Device, dtype, compiler, speed and memory of a run, each choice with its reason.

Nothing is guessed: a GPU missing from the table of peaks gets no MFU, and a CPU's peak is measured.
"""

import importlib.util
import os
import platform
import re
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from crate_mini import UserError, ops
from crate_mini.console import results, terminal
from crate_mini.loss import chunk_rows
from crate_mini.model import LM

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Dense FLOP/s of tensor cores in bf16 and fp16, from the data sheets; the first key in the GPU's
# name counts. T4 and V100 have no bf16.
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
    "V100-SXM2": 125e12,
    "T4": 65e12,
}
OTHER_GPUS = " (?:Ti|D|NVL|Laptop|Mobile)"  # what follows a key in the name of a slower GPU
FASTER = 1.2  # on a CPU bf16 is chosen if it is at least this many times as fast
GROUP_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")  # of control groups 2 and 1
# What torch.compile is taken to cost and to save on a GPU; by arithmetic, not measured.
COMPILE_SECONDS = 60
COMPILE_SAVES = 0.4  # share of an eager step


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


def has_mps():
    """Whether there is a GPU of Apple's; auto does not choose it, because it was never tried."""
    return torch.backends.mps.is_available()


def choose_dtype(device, spec="auto", scaled=False, step_seconds=None):
    """(dtype of the matrix products, reason) for auto | float32 | bfloat16 | float16.

    auto: on a GPU bf16 if it has that, else fp16 if it has tensor cores at all and the caller
    scales its loss; on a CPU bf16 where it measures faster.

    scaled: whether the caller does so, without which small gradients are zero in fp16.
    step_seconds: a function of a dtype that does a step of the caller's work and returns how long
    it took; without it, products of matrices are measured.
    """
    if spec != "auto":
        in_tf32 = ", in TF32" if spec == "float32" and has_tf32(device) else ""
        return DTYPES[spec], f"as asked{in_tf32}"
    if device.type == "cuda":
        if has_bf16(device):
            return torch.bfloat16, "the GPU has bf16 tensor cores"
        if scaled and torch.cuda.get_device_capability(device) >= (7, 0):
            return torch.float16, "the GPU has no bf16, but fp16 tensor cores; the loss is scaled"
        return torch.float32, "the GPU has no bf16 tensor cores"
    if device.type != "cpu":
        return torch.float32, f"bf16 is not tried on {device.type}"
    work = "a step" if step_seconds else "a 512-cubed product"
    times = best_times(step_seconds or product_seconds, (torch.bfloat16, torch.float32))
    in_bf16, in_fp32 = times.values()
    reason = f"{work} takes {1e3 * in_bf16:.2g} ms in bf16, {1e3 * in_fp32:.2g} in float32"
    return (torch.bfloat16 if FASTER * in_bf16 < in_fp32 else torch.float32), reason


def best_times(seconds, contestants, turns=5, limit=10.0):
    """{contestant: the least of its seconds}, in several turns that measure one after the other.

    A busy moment then slows one turn of all of them, and the least is what it did not touch. The
    first turn warms up and does not count. No turn begins after `limit` seconds, but one counts.
    seconds: a function of a contestant that does its work and returns how long that took.
    """
    times = {contestant: [] for contestant in contestants}
    end = time.monotonic() + limit
    for turn in range(1 + turns):
        if turn > 1 and time.monotonic() > end:
            break
        for contestant in contestants:
            times[contestant].append(seconds(contestant))
    return {contestant: min(several[1:]) for contestant, several in times.items()}


def has_bf16(device):
    """Whether this GPU multiplies bf16 matrices itself; asked of it, not of the current one."""
    return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)


def has_tf32(device):
    """Whether this GPU takes float32 products in TF32, as NVIDIA's do since Ampere."""
    is_nvidia = device.type == "cuda" and not torch.version.hip
    return is_nvidia and torch.cuda.get_device_capability(device) >= (8, 0)


@contextmanager
def tf32(device, dtype):
    """In this block float32 products run in TF32, if they are asked for and the GPU has it."""
    before = torch.get_float32_matmul_precision()
    if dtype == torch.float32 and has_tf32(device):
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def choose_compile(device, spec="auto"):
    """(whether to use torch.compile, reason) for auto | on | off.

    Raises UserError if it is asked for and cannot work here; auto then chooses eager.
    """
    if spec == "off":
        return False, "as asked"
    if spec == "auto" and device.type != "cuda":
        if device.type == "mps":
            return False, "it is not tried on mps"
        return False, "on a CPU it takes half a minute to start and gains nothing over our kernels"
    problem = compile_problem(device)
    if problem and spec == "on":
        raise cannot_compile(problem)
    if problem:
        return False, f"torch.compile cannot work here ({problem})"
    if spec == "on":
        return True, "as asked"
    return True, "it fuses what lies between the products; the first step takes about a minute"


def compile_problem(device):
    """Why torch.compile cannot work on this device, or None: it compiles a tiny function first."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if not torch.version.hip and capability < (7, 0):
            found = ".".join(map(str, capability))
            return f"Triton needs a GPU of capability 7.0 or more, and this one has {found}"
        if importlib.util.find_spec("triton") is None:
            return "Triton, which it needs on a GPU, is not installed"

    def tiny(x):
        y = (x * 2).relu()
        return y.sum()

    try:
        torch.compile(tiny)(torch.ones(64, device=device)).item()
    except Exception as error:  # of the C compiler, Python.h, the driver, Triton, PyTorch
        return terminal.compiler_message(error)


def cannot_compile(problem):
    """The UserError for --compile on where that fails."""
    return UserError(
        f"torch.compile cannot compile here ({problem}); `--compile off` trains without it."
    )


def compile_loses(seconds):
    """Why compiling does not pay for a run that takes so many seconds without it, or None."""
    saved = COMPILE_SAVES * seconds
    if saved >= COMPILE_SECONDS:
        return None
    return f"compiling would take about {COMPILE_SECONDS} s and save about {saved:.0f} s"


# ---- speed ---------------------------------------------------------------------------------------


def product_seconds(dtype, n=512, device="cpu"):
    """How long an n x n x n matrix product takes."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n, n, generator=generator).to(device, dtype)
    start = time.perf_counter()
    a @ a
    return time.perf_counter() - start


def product_rate(dtype, n=1024):
    """Measured FLOP/s of an n x n x n matrix product on the CPU, the best of several."""
    (seconds,) = best_times(lambda dtype: product_seconds(dtype, n), [dtype]).values()
    return 2 * n**3 / seconds


def kernel_rate(dtype, N=512, d=256, h=1024):
    """Measured FLOP/s of two ISTA steps by our kernels, the best of several; 0 if none run here.

    Four products, at 97 % of what the processor can do: in float32 PyTorch's reach half of it.
    """
    if ops.backend()[0] != "fused":
        return 0.0
    generator = torch.Generator().manual_seed(0)
    x, D = (torch.randn(n, d, generator=generator).to(dtype) for n in (N, h))
    D = (D * d**-0.5).T.contiguous()

    def seconds(ista):
        start = time.perf_counter()
        ista(x, D, None, None, 0.1, 0.1, 2, False)
        return time.perf_counter() - start

    (least,) = best_times(seconds, [torch.ops.crate_kernels.ista]).values()
    return 4 * 2 * N * d * h / least


def known_gpu(name, table):
    """The key of a table of GPUs that a driver's name of one means; None if it is another one."""
    for key in table:
        if re.search(rf"\b{key}\b(?!{OTHER_GPUS})", name):
            return key
    return None


def peak_flops(device, dtype):
    """(peak FLOP/s or None, where it comes from)."""
    if device.type == "cpu" and dtype != torch.float16:  # which takes a CPU minutes
        measured = {
            "PyTorch's 1024-cubed product": product_rate(dtype),
            "two ISTA steps by our kernels": kernel_rate(dtype),
        }
        fastest = max(measured, key=measured.get)
        return measured[fastest], f"measured, {fastest}"
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        if key := known_gpu(name, PEAKS):
            return PEAKS[key], f"data sheet of {key}"
        return None, f"{name} is not in the table of peaks, so no MFU"
    return None, "no peak known for this device and dtype, so no MFU"


def can_fuse_adam(device):
    """Whether Adam updates all weights in one kernel: everywhere but on MPS, where none has run."""
    return device.type != "mps"


def widest_float(device):
    """The widest dtype for sums on a device: float64, or float32 on MPS, which has no other."""
    return torch.float32 if device.type == "mps" else torch.float64


# ---- memory --------------------------------------------------------------------------------------


def send(tensors, device):
    """CPU tensors, on the device; to a GPU they travel while this process goes on."""
    if device.type != "cuda":
        return [t.to(device) for t in tensors]
    # From pageable memory the copy would wait for the GPU.
    return [t.pin_memory().to(device, non_blocking=True) for t in tensors]


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


def forget_peak(device):
    """Let peak_memory count from here on, where that is possible."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


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


def head_bytes(config, rows, device, dtype):
    """Bytes that the head takes for `rows` sequences: a chunk of logits, and its gradients.

    The chunk is there as logits in float32, as logarithms of probabilities, and before both in
    another dtype of the products. The gradients of the last layer's output and of the embedding,
    in float32, are made in the forward pass.
    """
    n_tokens, V = rows * config.block_size, config.vocab_size
    chunk = min(n_tokens, chunk_rows(V, device.type)) * V
    product = 0 if dtype == torch.float32 else dtype.itemsize
    return chunk * (8 + product) + 4 * config.n_embd * (n_tokens + V)


def check_memory(config, rows, device, dtype):
    """Raise UserError for a model that cannot fit.

    A system that overcommits memory would kill the process later, without a message. rows:
    sequences that a process holds at a time.
    """
    with torch.device("meta"):
        n_weights = sum(w.numel() for w in LM(config).parameters())
    weights = 16 * n_weights  # float32 weight, gradient and Adam's two moments
    activations = activation_bytes(config, rows, dtype)
    activations += head_bytes(config, rows, device, dtype)
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
    kind = "cpu" if device is None else device.type
    name = torch.cuda.get_device_name(device) if kind == "cuda" else processor()
    return {
        "device": f"MPS of {name}" if kind == "mps" else name,
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

"""What `bench` and `gpu` measure: implementations of one computation that take turns.

They run in one process and take turns in each round, so that a busy moment of the machine hits all
of them. A time is the median over rounds, with half the distance of the quartiles as its spread.

On a CPU a turn is one call. On a GPU it is many calls between two events, replayed from a CUDA
graph where that works: a single call measures Python, 40 us of it for 20 us of work on the device.
"""

import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from crate_mini import fused, loss, model, ops, reference
from crate_mini.training.device import flops_per_token

# The paper's settings of ISTA.
ETA, LAM = 0.1, 0.1
STEPS = 2
TURN = 0.01  # seconds that a turn on a GPU should take,
MOST_CALLS = 50  # and the most calls in it


# ---- measuring -----------------------------------------------------------------------------------


@dataclass
class Case:
    """Contestants (name -> function without arguments), operations, bytes at least, a remark.

    graphs: whether a GPU may replay the contestants from CUDA graphs; captured: those it did.
    """

    name: str
    contestants: dict
    operations: int
    moved: int
    note: str = ""
    ceiling: int = 0  # operations of the contestant "ceiling", which multiplies as fast as can be
    ms: dict = field(default_factory=dict)  # measured: contestant -> (median, spread)
    graphs: bool = True
    captured: list = field(default_factory=list)

    def measure(self, device, repeats, timer=time.perf_counter):
        """Time all contestants in turn; timer: the clock, for those on the CPU."""
        turns = {}
        for name, run in self.contestants.items():
            if device.type == "cuda":
                turns[name] = self.turn_on_gpu(name, run)
            else:
                turns[name] = partial(clock, run, timer)
                turns[name]()  # warms up
        times = {name: [] for name in turns}
        for _ in range(repeats):
            for name, turn in turns.items():
                times[name].append(1e3 * turn())
        for name, ms in times.items():
            low, median, high = statistics.quantiles(ms, n=4)
            self.ms[name] = median, (high - low) / 2
        if self.ceiling:
            rate = self.operations / self.ms["fused"][0]
            highest = self.ceiling / self.ms["ceiling"][0]
            self.note = f"{rate / highest:.0%} of the ceiling"
        return self

    def turn_on_gpu(self, name, run):
        """A function that measures a contestant: the seconds of a call, as the mean of many."""
        run()  # warms up, and compiles
        replay = capture(run) if self.graphs else None
        if replay:
            self.captured.append(name)
            run = replay
        clock_on_gpu(run, 1)
        calls = TURN / max(clock_on_gpu(run, 1), 1e-6)
        return partial(clock_on_gpu, run, round(min(max(1, calls), MOST_CALLS)))

    def row(self):
        """What was measured, for a JSON file."""
        times = {}
        for name, (median, spread) in self.ms.items():
            times[name] = {"median": median, "half_quartiles": spread}
        row = {
            "name": self.name,
            "note": self.note,
            "operations": self.operations,
            "bytes": self.moved,
            "ms": times,
        }
        return {**row, "captured": self.captured} if self.captured else row


def clock(run, timer=time.perf_counter):
    """Seconds that a call takes on the CPU."""
    start = timer()
    run()
    return timer() - start


def clock_on_gpu(run, calls):
    """Seconds that a call takes on the GPU: the mean of several, queued between two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def capture(run):
    """A function that replays a call from a CUDA graph; None for one that cannot be captured."""
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        return None
    return graph.replay


def on(backend, run):
    """A function that calls `run` on this backend of ops."""

    def switched():
        with ops.use_backend(backend):
            return run()

    return switched


@torch.no_grad()
def multiply(products):
    """The matrix products (A, B, out) alone, by PyTorch, into existing memory: the floor."""
    for A, B, out in products:
        torch.mm(A, B, out=out)


def multiplications(products):
    """A function without arguments that runs the products."""
    return lambda: multiply(products)


def first(output):
    return output[0] if isinstance(output, tuple) else output


def short_name(dtype):
    return str(dtype).removeprefix("torch.")


# ---- the ops at one shape ------------------------------------------------------------------------


@dataclass
class Problem:
    """An op at one shape: what computes it, its inputs, and what it costs."""

    plain: callable
    kernel: callable
    inputs: tuple
    seed: torch.Tensor  # gradient of the first output
    forward: list  # its products (A, B, out)
    backward: list
    moved: tuple  # values that forward reads and writes, and backward

    def __post_init__(self):
        self.inputs = [t.detach().requires_grad_() for t in self.inputs]

    def call(self, f, backward):
        """A function that computes the output by f, and with `backward` its gradients."""

        @torch.set_grad_enabled(backward)
        def run():
            output = first(f(*self.inputs))
            return torch.autograd.grad(output, self.inputs, self.seed) if backward else output

        return run

    def cases(self, name, mode=None):
        """Forward, then forward and backward; mode: torch.compile's."""
        torch.compiler.reset()  # or shapes of earlier rows fill its cache
        compiled = torch.compile(self.plain, fullgraph=True, dynamic=False, mode=mode)
        for backward in (False, True):
            case = self.case(name, backward)
            case.contestants["compile"] = self.call(compiled, backward)
            products = self.forward + self.backward if backward else self.forward
            case.contestants["products"] = multiplications(products)
            yield case

    def case(self, name, backward, kernel=None):
        """Kernels against eager PyTorch alone."""
        kernel = kernel or self.kernel
        products = self.forward + self.backward if backward else self.forward
        values = sum(self.moved) if backward else self.moved[0]
        contestants = {
            "fused": on("fused", self.call(kernel, backward)),
            "eager": self.call(self.plain, backward),
        }
        return Case(
            f"{name} {'both' if backward else 'forward'}",
            contestants,
            sum(2 * A.shape[0] * A.shape[1] * B.shape[1] for A, B, _ in products),
            self.seed.element_size() * values,
        )


def problem(op, N, d, dtype, device):
    """The Problem of ista or mssa on random tensors, with h = 4 d."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0, kind=dtype):
        values = scale * torch.randn(*shape, generator=generator)
        return values.to(device, kind)

    return (ista_problem if op == "ista" else mssa_problem)(N, d, normal)


def ista_problem(N, d, normal):
    h = 4 * d
    x, a = normal(N, d), normal(N, h).relu()
    D = normal(d, h, scale=(2 / d) ** 0.5)
    to_codes = x, D, torch.empty_like(a)
    to_rows = a, D.T, torch.empty_like(x)
    to_gradient = x.T, a, torch.empty_like(D)
    return Problem(
        lambda x, D: reference.ista(x, D, ETA, LAM, STEPS),
        lambda x, D: ops.ista(x, D, ETA, LAM, STEPS),
        (x, D),
        normal(N, d),
        [to_codes, to_rows] * STEPS,
        [to_codes, to_rows, to_gradient, to_gradient] * STEPS,
        (2 * N * d + STEPS * N * h + d * h, 3 * N * d + STEPS * N * h + 2 * d * h),
    )


def mssa_problem(N, d, normal):
    x = normal(N, d)
    z, vectors = normal(N, d, kind=torch.float32), normal(2, d, kind=torch.float32)
    U = normal(d, d, scale=d**-0.5)
    wide = 4 // U.element_size()  # z and its gradient are float32, whatever the rest is
    product = x, U, torch.empty_like(x)
    to_gradient = x.T, x, torch.empty_like(U)

    def plain(z, weight, bias, U):
        return torch.nn.functional.layer_norm(z, (d,), weight, bias).to(U.dtype) @ U

    return Problem(
        plain,
        lambda *tensors: ops.mssa_project(*tensors, 1).flatten(-2),
        (z, *vectors, U),
        normal(N, d),
        [product],
        [product, to_gradient],
        ((1 + wide) * N * d + d * d, (1 + 2 * wide) * N * d + 2 * d * d),
    )


# ---- causal attention ----------------------------------------------------------------------------


def product_attention(q, k, v):
    """Two batched products around a softmax; keeps the (T, T) weights of every head."""
    T, p = q.shape[-2:]
    later = torch.full((T, T), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    scores = torch.baddbmm(later, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=p**-0.5)
    return (scores.softmax(-1) @ v.flatten(0, 1)).unflatten(0, q.shape[:2])


def attention(kind, B, T, K, p, dtype, device):
    """K heads of width p over B texts of T tokens, forward and then both.

    kind: mssa, where q = k = v, or mhsa. `eager` is PyTorch's scaled_dot_product_attention and
    `products` is product_attention. Operations are counted below the diagonal.
    """
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, B, T, K, p, generator=generator).to(device, dtype)
    gy, *leaves = values
    leaves = [t.clone().requires_grad_() for t in leaves[: 1 if kind == "mssa" else 3]]

    def contestant(backend, f, backward):
        @torch.set_grad_enabled(backward)
        def run():
            heads = [t.transpose(1, 2) for t in leaves]
            y = f(*(heads * 3)[:3]).transpose(1, 2)
            return torch.autograd.grad(y, leaves, gy) if backward else y

        return on(backend, run)

    for backward in (False, True):
        contestants = {
            "fused": contestant("fused", ops.attention, backward),
            "eager": contestant("reference", ops.attention, backward),
            "products": contestant("reference", product_attention, backward),
        }
        tensors = len(leaves) * (2 if backward else 1) + (3 if backward else 1)
        yield Case(
            f"attention {kind} {B}x{T} {K}x{p} {short_name(dtype)} "
            f"{'both' if backward else 'forward'}",
            contestants,
            (7 if backward else 2) * B * K * T * T * p,
            gy.element_size() * gy.numel() * tensors,
            "products: baddbmm, softmax, bmm",
        )


# ---- versions of a kernel, slow to fast ----------------------------------------------------------


def ladder(op, N, d, dtype, device):
    """Every version of a kernel; the note is its error against float64, over the largest value.

    ISTA in float32 on the CPU begins with the naive version, csrc/ista_naive.cpp.
    """
    p = problem(op, N, d, dtype, device)
    with torch.no_grad():
        exact = first(p.plain(*(t.double() for t in p.inputs)))
    for version in versions(op, dtype, device):
        kernel = NaiveIsta.apply if version == "naive" else p.kernel
        with use_version(version), ops.use_backend("fused"):
            with torch.no_grad():
                error = (first(kernel(*p.inputs)) - exact).abs().max() / exact.abs().max()
            for backward in (False, True):
                name = f"{op} {N}x{d} {short_name(dtype)} {version}"
                case = p.case(name, backward, kernel)
                case.note = f"error {float(error):.1e}"
                yield case


def versions(op, dtype, device):
    """Names of the CPU's versions, or numbers of the GPU's, slow to fast."""
    if device.type != "cpu":
        return [1, 2, 3]
    has_naive = op == "ista" and dtype == torch.float32
    return [*(["naive"] if has_naive else []), *fused._C.isa_names().split()]


@contextmanager
def use_version(version):
    if version in (1, 2, 3):
        fused.CUDA_VERSION = version
    elif version != "naive":
        fused._C.use_isa(version)
    try:
        yield
    finally:
        fused.CUDA_VERSION = 0
        fused._C.use_isa(fused._C.isa_names().split()[-1])


class NaiveIsta(torch.autograd.Function):
    """csrc/ista_naive.cpp with ETA, LAM and STEPS, tied; float32 on the CPU: y of (x, D)."""

    @staticmethod
    def forward(ctx, x, D):
        N, (d, h) = len(x), D.shape
        lam, y = torch.full((h,), LAM), torch.empty_like(x)
        codes, residuals = torch.empty(STEPS, N, h), torch.empty(STEPS, N, d)
        pointers = [t.data_ptr() for t in (x, D, D, lam, y, codes, residuals)]
        fused._C.ista_naive_forward(N, d, h, STEPS, ETA, *pointers)
        ctx.save_for_backward(D, codes, residuals)
        return y

    @staticmethod
    def backward(ctx, gy):
        D, codes, residuals = ctx.saved_tensors
        N, (d, h) = len(gy), D.shape
        ga, glam = torch.zeros(N, h), torch.empty(h)
        gx, gD = torch.empty_like(gy), torch.empty_like(D)
        tensors = gy.contiguous(), ga, D, D, codes, residuals, gx, gD, gD, glam
        pointers = [t.data_ptr() for t in tensors]
        fused._C.ista_naive_backward(N, d, h, STEPS, ETA, *pointers)
        return gx, gD


# ---- the head ------------------------------------------------------------------------------------


def head(V, dtype, device, N=2048, d=128):
    """The head's loss and gradients: kernel, our chunks in PyTorch, and all logits at once.

    The ceiling is ISTA's forward pass, whose products run at 97 % of what the processor can do.
    """
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(n, d, generator=generator).to(device, dtype) for n in (N, V))
    targets = torch.randint(V, (N,), generator=generator).to(device)
    rows, D = x.detach(), W.T[:, : 4 * d].contiguous() * d**-0.5
    leaves = x.requires_grad_(), W.requires_grad_()

    def gradients(cross_entropy):
        return lambda: torch.autograd.grad(cross_entropy(*leaves, targets), leaves)

    @torch.no_grad()
    def ista():
        ops.ista(rows, D, ETA, LAM, STEPS)

    return Case(
        f"head {N}x{d} V={V} {short_name(dtype)} both",
        {
            "fused": on("fused", gradients(loss.cross_entropy)),
            "eager": on("reference", gradients(loss.cross_entropy)),
            "whole": gradients(reference.cross_entropy),
            "ceiling": on("fused", ista),
        },
        6 * N * V * d,
        W.element_size() * 2 * (N * d + V * d),
        ceiling=2 * 2 * STEPS * N * D.numel(),
    )


# ---- decoding, and a whole training step ---------------------------------------------------------


def decode(d, dtype, device):
    """ista of one token at several densities: the kernel skips zero codes, PyTorch does not."""
    generator = torch.Generator().manual_seed(0)
    shapes = (1, d), (d, 4 * d), (1, 4 * d)
    x, D, a = (torch.randn(*s, generator=generator).to(device, dtype) for s in shapes)
    D = D * d**-0.5
    to_codes = x, D, torch.empty_like(a)
    to_rows = a, D.T, torch.empty_like(x)
    for lam in (0.1, 1.3, 2.2):
        codes = reference.ista(x.float(), D.float(), ETA, lam, STEPS)[1]
        density = float((codes > 0).float().mean())
        yield Case(
            f"decode 1x{d} {short_name(dtype)}",
            decode_contestants(x, D, lam, [to_codes, to_rows] * STEPS),
            2 * STEPS * 2 * D.numel(),
            int(x.element_size() * D.numel() * STEPS * (1 + density)),
            f"density {density:.1%}",
        )


def decode_contestants(x, D, lam, products):
    return {
        "fused": on("fused", lambda: ops.ista(x, D, ETA, lam, STEPS)),
        "eager": lambda: reference.ista(x, D, ETA, lam, STEPS),
        "products": multiplications(products),
    }


def training_step(vocab, dtype, device, batch=8, T=256):
    """Forward, backward and AdamW of the default model on random tokens.

    `fused` is what `auto` runs on a CPU, and our kernels alone on a GPU, which `auto` leaves to
    PyTorch.
    """
    generator = torch.Generator().manual_seed(0)
    config = model.preset(vocab_size=vocab, block_size=T)
    ids, targets = torch.randint(vocab, (2, batch, T), generator=generator).to(device)

    def contestant(backend, compile=False):
        lm = model.LM(config).to(device)
        net = torch.compile(lm) if compile else lm
        adam = torch.optim.AdamW(lm.parameters(), fused=True)

        def run():
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = net(ids, targets)
            loss.backward()
            adam.step()
            adam.zero_grad()

        return on(backend, run)

    ours = "auto" if device.type == "cpu" else "fused"
    contestants = {
        "fused": contestant(ours),
        "eager": contestant("reference"),
        "compile": contestant("reference", True),
    }
    name = f"step {batch}x{T} V={vocab} {short_name(dtype)}"
    operations = batch * T * flops_per_token(config, T)
    return Case(name, contestants, operations, 0, ours, graphs=False)

"""Speed of the ops, of decoding and of a training step: the kernels beside plain and compiled PyTorch.

    python -m crate_mini.studies.bench                             all tables; --json results/bench.json keeps them
    python -m crate_mini.studies.bench --op ista_step --versions   kernels from naive to shipped, checked and timed

The contestants of a row take turns in one process, so that a busy moment hits each; a cell is the median and,
after ±, half the distance of the quartiles. `products` is the floor: the matrix products alone, by PyTorch,
into memory that is there already. GFLOP/s and GB/s are of `fused`: operations of the products, and the bytes
that must travel at least, each tensor once. `both` is forward and backward.
"""

import itertools
import json
import shlex
import statistics
import sys
import time
from dataclasses import dataclass, field

import torch

from crate_mini import UserError, atomic_write, cli, fused, model, ops, reference
from crate_mini.training import device as machine

DTYPES = ("bfloat16", "float32")
OPS = ("ista", "ista_step", "mssa", "decode", "step")
SHAPES = (
    (8192, 128),
    (4096, 128),
    (4096, 384),
    (2048, 768),
    (3001, 100),
)  # N rows, width d; h = 4 d
ETA, LAM, STEPS = 0.1, 0.1, 2  # the paper's


@dataclass
class Case:
    """One row: contestants (name -> function without arguments), operations, bytes at least, a remark."""

    name: str
    contestants: dict
    operations: int
    moved: int
    note: str = ""
    ms: dict = field(default_factory=dict)  # measured: contestant -> (median, half the quartiles)

    def measure(self, device, repeats):
        taken = {name: [] for name in self.contestants}
        for i in range(repeats + 1):  # the first round warms up
            for name, run in self.contestants.items():
                taken[name] += [1e3 * clock(run, device)] * (i > 0)
        for name, ms in taken.items():
            low, middle, high = statistics.quantiles(ms, n=4)
            self.ms[name] = middle, (high - low) / 2
        return self

    def cells(self, columns):
        """The row of the markdown table, as strings."""
        ms = {n: f"{m:.3g} ±{s:.2g}" for n, (m, s) in self.ms.items()}
        mine = self.ms["fused"][0]
        against = [
            f"{self.ms[n][0] / mine:.2f}x" if n in self.ms else "" for n in ("eager", "compile")
        ]
        rates = [f"{self.operations / mine / 1e6:.0f}", f"{self.moved / mine / 1e6:.1f}"]
        return [self.name, *(ms.get(n, "") for n in columns), *against, *rates, self.note]


def clock(run, device):
    """Seconds that a call takes, with all it has put on the device."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


@dataclass
class Problem:
    """An op at one shape: what computes it, its inputs, and what it costs."""

    plain: callable
    kernel: callable
    inputs: tuple
    seed: torch.Tensor  # gradient of the first output
    forward: list  # its products (A, B, out)
    backward: list
    moved: tuple  # values forward reads and writes, and backward

    def __post_init__(self):
        self.inputs = [t.detach().requires_grad_() for t in self.inputs]

    def call(self, f, backward):
        @torch.set_grad_enabled(backward)
        def run():
            out = first(f(*self.inputs))
            return torch.autograd.grad(out, self.inputs, self.seed) if backward else out

        return run

    def cases(self, name, mode=None):
        torch.compiler.reset()  # or shapes of earlier rows fill its cache
        compiled = torch.compile(self.plain, fullgraph=True, dynamic=False, mode=mode)
        size = self.seed.element_size()
        for backward, label in ((False, "forward"), (True, "both")):
            products = self.forward + self.backward * backward
            yield Case(
                f"{name} {label}",
                {
                    "fused": on("fused", self.call(self.kernel, backward)),
                    "eager": self.call(self.plain, backward),
                    "compile": self.call(compiled, backward),
                    "products": lambda p=products: multiply(p),
                },
                sum(2 * a.shape[0] * a.shape[1] * b.shape[1] for a, b, _ in products),
                size * sum(self.moved[: 1 + backward]),
            )


def first(out):
    return out[0] if isinstance(out, tuple) else out


def on(backend, run):
    def switched():
        with ops.use_backend(backend):
            run()

    return switched


@torch.no_grad()
def multiply(products):
    for a, b, out in products:
        torch.mm(a, b, out=out)


def problem(op, N, d, dtype, device):
    """The Problem of an op, ista, ista_step or mssa, on random tensors."""
    g, h = torch.Generator().manual_seed(0), 4 * d

    def normal(*shape, scale=1.0, kind=dtype):
        return (scale * torch.randn(*shape, generator=g)).to(device, kind)

    x, a, D = normal(N, d), normal(N, h).relu(), normal(d, h, scale=(2 / d) ** 0.5)
    forth, back, grad = (
        (A, B, torch.empty_like(C)) for A, B, C in ((x, D, a), (a, D.T, x), (x.T, a, D))
    )
    if op == "ista":
        return Problem(
            lambda x, D: reference.ista(x, D, ETA, LAM, STEPS),
            lambda x, D: ops.ista(x, D, ETA, LAM, STEPS),
            (x, D),
            normal(N, d),
            [forth, back] * STEPS,
            [forth, back, grad, grad] * STEPS,
            (2 * N * d + STEPS * N * h + d * h, 3 * N * d + STEPS * N * h + 2 * d * h),
        )
    if op == "ista_step":
        return Problem(
            lambda a, r, D: reference.ista_step(a, r, D, ETA, LAM),
            lambda a, r, D: ops.ista_step(a, r, D, ETA, LAM),
            (a, x, D),
            normal(N, h),
            [forth],
            [back, grad],
            (N * d + 2 * N * h + d * h, 2 * N * d + 3 * N * h + 2 * d * h),
        )
    z, vectors = normal(N, d, kind=torch.float32), normal(2, d, kind=torch.float32)
    U = normal(d, d, scale=d**-0.5)
    wide = 4 // U.element_size()  # z and its gradient are float32, whatever the rest is

    def plain(z, weight, bias, U):
        return torch.nn.functional.layer_norm(z, (d,), weight, bias).to(U.dtype) @ U

    product, grad_U = (x, U, torch.empty_like(x)), (x.T, x, torch.empty_like(U))
    return Problem(
        plain,
        lambda *tensors: ops.mssa_project(*tensors, 1).flatten(-2),
        (z, *vectors, U),
        normal(N, d),
        [product],
        [product, grad_U],
        ((1 + wide) * N * d + d * d, (1 + 2 * wide) * N * d + 2 * d * d),
    )


def ladder(op, N, d, dtype, device):
    """Every version of a kernel, forward; the note is its error against float64, over the largest value."""
    p, names = problem(op, N, d, dtype, device), fused._C.isa_names().split()
    want = first(p.plain(*(t.detach().double() for t in p.inputs)))
    for version in names if device.type == "cpu" else [1, 2, 3]:
        fused.VERSION = version  # of the CUDA kernels; those of the CPU have names
        device.type == "cpu" and fused._C.use_isa(version)
        with ops.use_backend("fused"), torch.no_grad():
            error = float((first(p.kernel(*p.inputs)) - want).abs().max() / want.abs().max())
        case = next(p.cases(f"{op} {N}x{d} {str(dtype)[6:]} {version}"))
        case.contestants, case.note = dict(list(case.contestants.items())[:2]), f"error {error:.1e}"
        yield case
    fused.VERSION = 0
    fused._C.use_isa(names[-1])


def decode(d, dtype, device):
    """ista of one token for several thresholds: the kernel skips zero codes, the others read all of D."""
    h, g = 4 * d, torch.Generator().manual_seed(0)
    x, D, a = (
        torch.randn(*shape, generator=g).to(device, dtype) for shape in ((1, d), (d, h), (1, h))
    )
    D = D * d**-0.5
    for lam in (0.1, 1.3, 2.2):
        density = float(
            (reference.ista(x.float(), D.float(), ETA, lam, STEPS)[1] > 0).float().mean()
        )
        products = [(x, D, torch.empty_like(a)), (a, D.T, torch.empty_like(x))] * STEPS
        contestants = {
            "fused": on("fused", lambda lam=lam: ops.ista_decode(x, D, ETA, lam, STEPS)),
            "eager": lambda lam=lam: reference.ista(x, D, ETA, lam, STEPS),
            "products": lambda p=products: multiply(p),
        }
        yield Case(
            f"decode 1x{d} {str(dtype)[6:]}",
            contestants,
            4 * STEPS * d * h,
            int(x.element_size() * d * h * STEPS * (1 + density)),
            f"density {density:.1%}",
        )


def training_step(vocab, dtype, device, batch=8, T=256):
    """Forward, backward and AdamW of the default model on random tokens, `fused` as auto chooses."""
    g, config = torch.Generator().manual_seed(0), model.preset(vocab_size=vocab, block_size=T)
    idx, targets = torch.randint(vocab, (2, batch, T), generator=g).to(device)

    def contestant(backend, compile=False):
        lm = model.LM(config).to(device)
        net = torch.compile(lm) if compile else lm
        adam = torch.optim.AdamW(lm.parameters(), fused=True)

        def run():
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = net(idx, targets)
            loss.backward()
            adam.step()
            adam.zero_grad()

        return on(backend, run)

    yield Case(
        f"step {batch}x{T} V={vocab} {str(dtype)[6:]}",
        {
            "fused": contestant("auto"),
            "eager": contestant("reference"),
            "compile": contestant("reference", True),
        },
        batch * T * model.flops_per_token(config, T),
        0,
        "auto",
    )


def cases(args, device):
    for op, dtype in itertools.product(args.op, (getattr(torch, name) for name in args.dtype)):
        if op == "step":
            for vocab in (50304, 4096, 256):
                yield from training_step(vocab, dtype, device)
        elif op == "decode":
            for d in (128, 768):
                yield from decode(d, dtype, device)
        elif args.versions:
            yield from ladder(op, *SHAPES[0], dtype, device)
        else:
            for N, d in SHAPES:
                yield from problem(op, N, d, dtype, device).cases(f"{op} {N}x{d} {str(dtype)[6:]}")


def main():
    parser = cli.Parser(prog="-m crate_mini.studies.bench", description=__doc__)
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS, help="(default all)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES, help="(default both)")
    parser.add_argument(
        "--versions", action="store_true", help="each version of the kernel, slow to fast"
    )
    parser.add_argument("--device", default="auto", help="cpu or cuda (default auto)")
    parser.add_argument("--repeats", type=int, default=9, help="(default 9)")
    parser.add_argument("--json", help="file to keep the table in")
    args = parser.parse_args()
    if args.repeats < 2:
        raise UserError(f"--repeats {args.repeats} gives no spread; try --repeats 9.")
    device, columns = machine.choose_device(args.device), ["fused", "eager", "compile", "products"]
    with ops.use_backend("fused") as told:
        print(": ".join(told))
    machine.keep_memory()  # as train.py does; it serves all contestants
    titles = [*(f"{c}, ms" for c in columns), "eager/", "compile/", "GFLOP/s", "GB/s", "note"]
    print(
        "| " + " | ".join(["", *titles]) + " |\n|---" + "|---:" * (len(titles) - 1) + "|---|",
        flush=True,
    )
    found = {
        "command": shlex.join(["python", "-m", "crate_mini.studies.bench", *sys.argv[1:]]),
        "backend": told,
        "machine": machine.describe(device),
        "rows": [],
    }
    for case in cases(args, device):
        print(
            "| " + " | ".join(case.measure(device, args.repeats).cells(columns)) + " |", flush=True
        )
        ms = {n: {"median": m, "half_quartiles": s} for n, (m, s) in case.ms.items()}
        found["rows"].append(
            {
                "name": case.name,
                "note": case.note,
                "operations": case.operations,
                "bytes": case.moved,
                "ms": ms,
            }
        )
    if args.json:
        with atomic_write(args.json) as file:
            file.write(json.dumps(found, indent=1).encode() + b"\n")


if __name__ == "__main__":
    cli.run(main)

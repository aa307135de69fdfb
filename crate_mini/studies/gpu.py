"""`python -m crate_mini.studies.gpu [STAGE ...]`: all that a GPU can tell of this project, in one call.

    build      the extension; says which compilers and architectures
    tests      python -m pytest -m gpu: the fuzz on the device, streams, graphs, training
    floors     this card's ceilings, and what they allow at each shape: operations, bytes, times, what binds
    kernels    ISTA and MSSA: fused, eager, compiled with max-autotune, and the matrix products alone
    versions   ista_step from the naive to the shipped version, checked and timed
    decode     one token, at several densities
    steps      training steps of CRATE S and B on either backend, and of the GPT-2 twin; all compiled
    agree      100 training steps on the kernels and on PyTorch: how far apart their losses are
    sanitize   the tests small, under compute-sanitizer: memcheck, racecheck, initcheck, synccheck
    code       what nvcc made of each kernel: tensor-core, 16-byte and spilling instructions, to
               results/sass.json. Needs no GPU, but cuobjdump and nvdisasm, of the CUDA toolkit

Each stage is a process of its own with a time limit. results/CARD/COMMIT.json is written after each, failures
included, and keeps what earlier calls of that commit on that card found: the stages, half an hour in all, can
be spread over calls. --commit names the source where git is not. Timings are medians, contestants in turns
(see bench.py), random data, bfloat16.
"""

import json
import os
import re
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from crate_mini import UserError, atomic_write, cli, fused, model, ops
from crate_mini.studies import bench, sass
from crate_mini.training import device as machine

ROOT = Path(__file__).resolve().parents[2]
TOKENS, WIDTHS = (8192, 65536), (128, 768, 1600)  # N and d; h = 4 d
PYTEST = sys.executable, "-m", "pytest", "-q", "-m", "gpu"
SANITIZED = "-k", "ista or mssa or training", "tests/test_cuda_emulated.py", "tests/test_gpu.py"
COMMANDS = {  # stage: [command, ...]
    "build": [(sys.executable, "setup.py", "build_ext", "--inplace")],
    "tests": [PYTEST],
    "sanitize": [
        ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *PYTEST, *SANITIZED)
        for tool in ("memcheck", "racecheck", "initcheck", "synccheck")
    ],
}
LIMITS = {
    "build": 300,
    "tests": 480,
    "floors": 120,
    "kernels": 540,
    "versions": 120,
    "decode": 60,
    "steps": 420,
    "agree": 120,
    "sanitize": 300,
    "code": 300,
}  # seconds of a command


# ---- what a stage measures: generators of JSON-able rows -------------------------------------------------


def measured(case, device, repeats=7):
    """A bench.Case as a row, timed."""
    found = case.measure(device, repeats)
    return {
        "name": case.name,
        "note": case.note,
        "operations": case.operations,
        "bytes": case.moved,
        "ms": {n: {"median": m, "half_quartiles": s} for n, (m, s) in found.ms.items()},
    }


def ceilings(device, side=8192, values=1 << 29):
    """{"tflops", "tb_s"} of this card: a large product of random bf16, a copy (bytes read and written)."""
    a, b, out = torch.randn(3, side, side, device=device, dtype=torch.bfloat16)
    x, y = torch.randn(2, values, device=device, dtype=torch.bfloat16)
    case = bench.Case(
        "", {"product": lambda: torch.mm(a, b, out=out), "copy": lambda: y.copy_(x)}, 0, 0
    )
    ms = {name: middle for name, (middle, _) in case.measure(device, 7).ms.items()}
    return {"tflops": 2 * side**3 / ms["product"] / 1e9, "tb_s": 4 * values / ms["copy"] / 1e9}


def problems(device, tokens=TOKENS, widths=WIDTHS):
    for op, N, d in product(("ista", "mssa"), tokens, widths):
        yield op, N, d, bench.problem(op, N, d, torch.bfloat16, device)


def floors(device, **sizes):
    top = ceilings(device) if device.type == "cuda" else ceilings(device, 64, 1 << 12)
    yield {"name": "ceilings", **top}
    for op, N, d, problem in problems(device, **sizes):
        for case in problem.cases(f"{op} {N}x{d}"):
            products, memory = case.operations / top["tflops"] / 1e9, case.moved / top["tb_s"] / 1e9
            yield {
                "name": case.name,
                "operations": case.operations,
                "bytes": case.moved,
                "ms_of_products": products,
                "ms_of_bytes": memory,
                "binds": "products" if products > memory else "bytes",
                "ms_of_a_pre_activation": 16 * N * d / top["tb_s"] / 1e9,
            }  # (N, h) written, read again


def kernels(device, mode="max-autotune", **sizes):
    for op, N, d, problem in problems(device, **sizes):
        for case in problem.cases(f"{op} {N}x{d}", mode):
            yield measured(case, device)


def versions(device, widths=WIDTHS[:2]):
    for d in widths:
        for case in bench.ladder("ista_step", TOKENS[0], d, torch.bfloat16, device):
            yield measured(case, device)


def decode(device, widths=WIDTHS[1:]):
    for d in widths:
        for case in bench.decode(d, torch.bfloat16, device):
            yield measured(case, device)


def trainer(config, idx, targets, device, compile=True):
    """A function that takes one training step, and returns its loss."""
    torch.manual_seed(0)
    lm = model.LM(config).to(device)
    net, adam = (
        torch.compile(lm) if compile else lm,
        torch.optim.AdamW(lm.parameters(), 6e-4, fused=True),
    )

    def step(i=0):
        with torch.autocast(device.type, torch.bfloat16):
            loss = net(idx[i % len(idx)], targets[i % len(idx)])
        loss.backward()
        adam.step()
        adam.zero_grad()
        return loss.detach()

    return step


def tokens_of(config, batch, device, n=1):
    """Random ids and targets (n, batch, T)."""
    shape, g = (2, n, batch, config.block_size), torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, shape, generator=g).to(device)


def steps(device, presets=("S", "B"), batch=16, compile=True, **more):
    for name in presets:
        config = {kind: model.preset(name, kind, **more) for kind in ("crate", "gpt2")}
        idx, targets = tokens_of(config["crate"], batch, device)
        contestants = {
            label: bench.on(backend, trainer(config[kind], idx, targets, device, compile))
            for label, kind, backend in (
                ("fused", "crate", "fused"),
                ("eager", "crate", "reference"),
                ("gpt2", "gpt2", "reference"),
            )
        }
        T = config["crate"].block_size
        count, operations = batch * T, batch * T * model.flops_per_token(config["crate"], T)
        row = measured(bench.Case(f"{name} {batch}x{T}", contestants, operations, 0), device)
        yield {**row, "tokens_per_s": {n: 1e3 * count / m["median"] for n, m in row["ms"].items()}}


def agree(device, n=100, batch=8, **more):
    config = model.preset("3L", "crate", **{"vocab_size": 4096, "block_size": 256, **more})
    idx, targets = tokens_of(config, batch, device, 4)
    losses = []
    for backend in ("fused", "reference"):
        step = trainer(config, idx, targets, device, compile=False)
        with ops.use_backend(backend):
            losses.append(torch.stack([step(i) for i in range(n)]).tolist())
    yield {
        "name": f"{n} steps",
        "first": [v[0] for v in losses],
        "last": [v[-1] for v in losses],
        "largest_difference": max(abs(a - b) for a, b in zip(*losses)),
    }


def code(device):
    if not fused._C:
        raise UserError(
            "there is no compiled extension to look into; `pip install -e . -v` says why."
        )
    yield from sass.counts(fused._C.__file__, fused._C.build_info()["archs"].split())


MEASURES = {f.__name__: f for f in (floors, kernels, versions, decode, steps, agree, code)}
STAGES = ["build", "tests", "floors", "kernels", "versions", "decode", "steps", "agree", "sanitize"]


# ---- running stages --------------------------------------------------------------------------------------


def write(path, value):
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=1, allow_nan=False).encode() + b"\n")


def only(name, path):
    """One measuring stage in this process: its rows, as far as they are, in a JSON file."""
    rows, device = [], machine.choose_device("cpu" if name == "code" else "cuda")
    for row in MEASURES[name](device):
        rows.append(row)
        write(path, rows)
        print(json.dumps(row), flush=True)


def timed(words, limit, folder):
    """Run a command: {"command", "seconds", "code" (None: the time was up), "tail"}."""
    began, env = time.monotonic(), {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with open(Path(folder, "log"), "w+", encoding="utf-8", errors="replace") as log:
        try:
            status = subprocess.run(
                words,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                timeout=limit,
                env=env if words[0] == "compute-sanitizer" else None,
            ).returncode
        except subprocess.TimeoutExpired:
            status = None
        except OSError as error:
            status = str(error)
        log.seek(0)
        tail = log.read().splitlines()[-12:]
    return {
        "command": " ".join("python" if word == sys.executable else word for word in words),
        "seconds": round(time.monotonic() - began, 1),
        "code": status,
        "tail": [s[-300:] for s in tail],
    }


def stage(name):
    """{"runs": what its commands came to, "rows": what it measured}."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "rows.json")
        own = [
            (sys.executable, "-m", "crate_mini.studies.gpu", "--only", name, "--json", str(path))
        ]
        runs = [timed(words, LIMITS[name], folder) for words in COMMANDS.get(name, own)]
        for run in runs:
            run["command"] = run["command"].removesuffix(f" --json {path}")
        return {"runs": runs, "rows": json.loads(path.read_text()) if path.exists() else []}


def earlier(path, facts):
    """{stage: what it came to} of a file by the same known commit and machine; nothing of any other."""
    try:
        found = json.loads(path.read_text())
        same = found["machine"] == facts and not facts["commit"].endswith(("+", "unknown"))
        return found["stages"] if same else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def all_of(names, path, facts):
    """Stages one after the other, into a file beside those of earlier calls; the exit code."""
    stages, status = earlier(path, facts), 0
    for name in names:
        one = stages[name] = stage(name)
        status |= any(run["code"] != 0 for run in one["runs"])
        write(
            path,
            {
                "schema": 1,
                "command": f"python -m crate_mini.studies.gpu {' '.join(stages)}",
                "machine": facts,
                "stages": stages,
            },
        )
        told = ("TIME UP" if r["code"] is None else f"code {r['code']}" for r in one["runs"])
        print(
            f"{name:9s} {sum(r['seconds'] for r in one['runs']):6.1f} s  {', '.join(told)}, "
            f"{len(one['rows'])} rows",
            flush=True,
        )
    print(f"file      {path}")
    return status


def main():
    parser = cli.Parser(prog="-m crate_mini.studies.gpu", description=__doc__)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="(default all but code)")
    parser.add_argument("--json", help="file of the results (default results/CARD/COMMIT.json)")
    parser.add_argument("--commit", help="name of this source (default: git's)")
    parser.add_argument("--only", help="measure one stage in this process")
    args = parser.parse_args()
    names, known = [args.only] if args.only else args.stages or STAGES, [*STAGES, "code"]
    if set(names) - set(known) or args.only and (args.only not in MEASURES or not args.json):
        raise UserError(
            f"unknown stages in {' '.join(names)!r}; choose some of {', '.join(known)}."
        )
    if names != ["code"] and not torch.cuda.is_available():
        raise UserError(
            "there is no GPU here; without one only `python -m crate_mini.studies.gpu code` works."
        )
    if args.only:
        return only(args.only, args.json)
    facts = machine.describe(machine.choose_device("auto")) | (
        {"commit": args.commit} if args.commit else {}
    )
    card = re.search(r"[A-Z]+\d\w*", facts["device"].upper())
    place = f"{card[0].lower() if card else 'gpu'}/{facts['commit'].strip('+')}.json"
    path = Path(args.json or ROOT / "results" / ("sass.json" if names == ["code"] else place))
    path.parent.mkdir(parents=True, exist_ok=True)
    return all_of(names, path, facts)


if __name__ == "__main__":
    cli.run(main)

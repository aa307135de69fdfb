"""All that a GPU can tell about this project, in one call; see Settings for the stages."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from crate_mini import UserError, fused, model, ops
from crate_mini.cli import setting
from crate_mini.console import results
from crate_mini.console.terminal import Command, eta
from crate_mini.studies import benchmarks
from crate_mini.studies.expected import expectations
from crate_mini.training.device import choose_device, choose_dtype, flops_per_token, machine

TOKENS, WIDTHS = (65536, 8192), (768, 128)  # N and d, largest first; h = 4 d
TIGHT = "max-autotune-no-cudagraphs"  # CUDA graphs are ours to make, for all contestants alike
PYTEST = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--hypothesis-profile=brief")
SANITIZED = ("tests/kernels/test_cuda_emulated.py", "tests/kernels/test_gpu.py")
SMALL = "(ista or mssa or training) and not real_sizes"
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


def sanitizer(tool):
    """The command that runs small tests under a tool of compute-sanitizer."""
    options = "--tool", tool, "--error-exitcode", "1"
    return "compute-sanitizer", *options, *PYTEST, "-k", SMALL, *SANITIZED


def tool(name):
    """The path of a program of the CUDA toolkit, on the PATH or in the toolkit's own folder."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc:
        homes.append(Path(nvcc).resolve().parent.parent)
    folders = [None, *(f"{home}/bin" for home in homes if home)]
    found = (shutil.which(name, path=folder) for folder in folders)
    return next(filter(None, found), None)


COMMANDS = {  # stage: [command, ...]; the other stages measure
    "build": [(sys.executable, "setup.py", "build_ext", "--inplace")],
    "tests": [PYTEST],
    "sanitize": [sanitizer(tool) for tool in SANITIZERS],
}
LIMITS = {  # seconds of one command of a stage; in the order of what they are worth
    "build": 200,
    "tests": 150,
    "steps": 210,
    "agree": 40,
    "floors": 30,
    "kernels": 150,
    "versions": 50,
    "decode": 30,
    "sanitize": 300,
    "code": 300,
}
IN_15_MINUTES = tuple(stage for stage in LIMITS if stage not in ("sanitize", "code"))


# ---- what the stages measure: generators of rows for JSON ----------------------------------------


def measured(case, device, repeats=7):
    return case.measure(device, repeats).row()


def ceilings(device, side=8192, values=1 << 29):
    """{"tflops", "tb_s"} of this card: a large product of random bf16, and a copy."""
    a, b, out = torch.randn(3, side, side, device=device, dtype=torch.bfloat16)
    x, y = torch.randn(2, values, device=device, dtype=torch.bfloat16)
    contestants = {"product": lambda: torch.mm(a, b, out=out), "copy": lambda: y.copy_(x)}
    ms = benchmarks.Case("", contestants, 0, 0).measure(device, 7).ms
    operations, moved = 2 * side**3, 4 * values  # bytes read and written
    return {"tflops": operations / ms["product"][0] / 1e9, "tb_s": moved / ms["copy"][0] / 1e9}


def problems(device, tokens=TOKENS, widths=WIDTHS):
    """(name, N, d, Problem) of each op at each shape."""
    for op, N, d in product(("ista", "mssa"), tokens, widths):
        problem = benchmarks.problem(op, N, d, torch.bfloat16, device)
        yield f"{op} {N}x{d}", N, d, problem


def floors(device, **sizes):
    """What the card's ceilings allow, and which of them binds."""
    sides = {} if device.type == "cuda" else {"side": 64, "values": 1 << 12}
    top = ceilings(device, **sides)
    yield {"name": "ceilings", **top}
    for name, N, d, problem in problems(device, **sizes):
        for case in problem.cases(name):
            products = case.operations / top["tflops"] / 1e9
            memory = case.moved / top["tb_s"] / 1e9
            yield {
                "name": case.name,
                "operations": case.operations,
                "bytes": case.moved,
                "ms_of_products": products,
                "ms_of_bytes": memory,
                "binds": "products" if products > memory else "bytes",
                # (N, h) written and read again
                "ms_of_a_pre_activation": 16 * N * d / top["tb_s"] / 1e9,
            }


def kernels(device, mode=TIGHT, **sizes):
    for name, _, _, problem in problems(device, **sizes):
        for case in problem.cases(name, mode):
            yield measured(case, device)


def versions(device, widths=WIDTHS):
    for d in widths:
        for case in benchmarks.ladder("ista", TOKENS[-1], d, torch.bfloat16, device):
            yield measured(case, device)


def decode(device, widths=(768, 1600)):
    for d in widths:
        for case in benchmarks.decode(d, torch.bfloat16, device):
            yield measured(case, device)


def trainer(config, ids, targets, device, dtype, compile=True):
    """A function that takes one training step, on batch number i, and returns its loss."""
    torch.manual_seed(0)
    lm = model.LM(config).to(device)
    net = torch.compile(lm) if compile else lm
    adam = torch.optim.AdamW(lm.parameters(), 6e-4, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def step(i=0):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = net(ids[i % len(ids)], targets[i % len(ids)])
        scaler.scale(loss).backward()
        scaler.step(adam)
        scaler.update()
        adam.zero_grad()
        return loss.detach()

    return step


def step_dtype(device):
    """What train.py computes in on this GPU; bf16 on a CPU."""
    return choose_dtype(device, scaled=True)[0] if device.type == "cuda" else torch.bfloat16


def random_tokens(config, batch, device, n=1):
    """Random ids and targets (n, batch, T)."""
    shape = (2, n, batch, config.block_size)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, shape, generator=generator).to(device)


def steps(device, presets=("S", "B"), batch=16, compile=True, **changes):
    """Training steps of CRATE on either backend, and of the GPT-2 twin.

    Our kernels have no float16, so that a GPU without bf16 compares CRATE and twin alone.
    """
    for name in presets:
        crate, gpt2 = (model.preset(name, kind, **changes) for kind in ("crate", "gpt2"))
        ids, targets = random_tokens(crate, batch, device)
        models = {"eager": (crate, "reference"), "gpt2": (gpt2, "reference")}
        dtype = step_dtype(device)
        if dtype == torch.bfloat16:
            models = {"fused": (crate, "fused"), **models}
        contestants = {}
        for label, (config, backend) in models.items():
            step = trainer(config, ids, targets, device, dtype, compile)
            contestants[label] = benchmarks.on(backend, step)
        T = crate.block_size
        operations = batch * T * flops_per_token(crate, T)
        case = benchmarks.Case(f"{name} {batch}x{T}", contestants, operations, 0, graphs=False)
        row = measured(case, device)
        rates = {label: 1e3 * batch * T / ms["median"] for label, ms in row["ms"].items()}
        yield {**row, "tokens_per_s": rates}


def agree(device, n=100, batch=8, **changes):
    """The losses of one training on the kernels and on PyTorch: float32 where bf16 is missing."""
    dtype = step_dtype(device)
    if dtype != torch.bfloat16:
        dtype = torch.float32
    config = model.preset("3L", "crate", **{"vocab_size": 4096, "block_size": 256, **changes})
    ids, targets = random_tokens(config, batch, device, 4)
    losses = []
    for backend in ("fused", "reference"):
        step = trainer(config, ids, targets, device, dtype, compile=False)
        with ops.use_backend(backend):
            losses.append(torch.stack([step(i) for i in range(n)]).tolist())
    yield {
        "name": f"{n} steps",
        "first": [run[0] for run in losses],
        "last": [run[-1] for run in losses],
        "largest_difference": max(abs(a - b) for a, b in zip(*losses)),
    }


# ---- what nvcc made of each kernel ---------------------------------------------------------------

# HMMA, HGMMA: tensor cores (Ampere's, Hopper's). LDGSTS, LDG.E.128, STG.E.128: 16 bytes a thread.
# LDL, STL: a register array that lies in memory, which no kernel should have.
INSTRUCTIONS = (
    r"\b(?:HGMMA|HMMA|LDSM|UTMALDG|LDGSTS[.\w]*|(?:LD|ST)[GL](?:\.E)?(?:\.(?:64|128|U16))?)\b"
)
RESOURCES = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"


def code(device):
    """For each kernel and architecture: registers per thread, bytes of stack, static shared and
    local memory, and how often each instruction occurs.
    """
    if not fused._C:
        raise UserError("no compiled extension to look into; `pip install -v -e .` shows why.")
    if not tool("cuobjdump") or not tool("nvdisasm"):
        raise UserError(
            "cuobjdump and nvdisasm are missing; they come with the CUDA toolkit, or as the "
            "packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm."
        )
    for arch in fused._C.build_info()["archs"].split():
        used = resources(cuobjdump("-res-usage", arch))
        for name, counts in instructions(cuobjdump("-sass", arch)):
            yield {"name": name, "arch": f"sm_{arch}", **used.get(name, {}), **counts}


def cuobjdump(what, arch):
    """The output of cuobjdump for one architecture of the compiled module."""
    command = [tool("cuobjdump"), what, "-arch", f"sm_{arch}", fused._C.__file__]
    # It calls nvdisasm by its name.
    path = f"{Path(tool('nvdisasm')).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    env = {**os.environ, "PATH": path}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout


def resources(text):
    """{kernel: {"registers", "stack", "shared", "local"}} from `cuobjdump -res-usage`."""
    names = ("registers", "stack", "shared", "local")
    found = {}
    for kernel, *numbers in re.findall(RESOURCES, text):
        found[kernel] = dict(zip(names, map(int, numbers)))
    return found


def instructions(text):
    """[(kernel, {instruction: count})] from `cuobjdump -sass`."""
    kernels = []
    for line in text.splitlines():
        if "Function : " in line:
            kernels.append((line.split(" : ")[1].strip(), {}))
        elif kernels:
            counts = kernels[-1][1]
            for name in re.findall(INSTRUCTIONS, line):
                counts[name] = counts.get(name, 0) + 1
    return kernels


MEASURES = {f.__name__: f for f in (floors, kernels, versions, decode, steps, agree, code)}


# ---- running stages ------------------------------------------------------------------------------


def measure(stage, path):
    """Run one measuring stage in this process; its rows go to a JSON file as they come."""
    device = choose_device("cpu" if stage == "code" else "cuda")
    rows = []
    for row in MEASURES[stage](device):
        rows.append(row)
        results.write_json(path, rows)
        print(json.dumps(row), flush=True)


def run_command(words, limit, folder):
    """Run a command: {"command", "seconds", "code" (None: out of time), "tail" of its output}."""
    environment = dict(os.environ)
    program = words[0]
    if program == "compute-sanitizer":
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        program = tool(program) or program
    if "setup.py" in words and "CRATE_CUDA_ARCHS" not in environment:
        environment["CRATE_CUDA_ARCHS"] = architecture()
    start = time.monotonic()
    with open(Path(folder, "log"), "w+", encoding="utf-8", errors="replace") as log:
        streams = dict(stdout=log, stderr=subprocess.STDOUT)
        try:
            done = subprocess.run(
                (program, *words[1:]),
                **streams,
                cwd=results.ROOT,
                timeout=limit,
                env=environment,
            )
            status = done.returncode
        except subprocess.TimeoutExpired:
            status = None
        except OSError as error:
            status = str(error)
        log.seek(0)
        lines = log.read().splitlines()
    return {
        "command": " ".join("python" if word == sys.executable else word for word in words),
        "seconds": round(time.monotonic() - start, 1),
        "code": status,
        "tail": [line[-300:] for line in lines[-12:]],
    }


def architecture():
    """That of the GPU at hand, as nvcc names it: to build for it alone takes a quarter of the time.

    90a for an H100; setup.py's own where there is no GPU.
    """
    if not torch.cuda.is_available():
        return os.environ.get("CRATE_CUDA_ARCHS", "75 80 90a 120")
    number = "".join(map(str, torch.cuda.get_device_capability()))
    return f"{number}a" if number == "90" else number


def run_stage(name):
    """{"runs": the outcomes of its commands, "rows": what it measured}."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "rows.json")
        words = sys.executable, "-m", "crate_mini.studies", "gpu", "--only", name
        commands = COMMANDS.get(name, [(*words, "--json", str(path))])
        runs = [run_command(words, LIMITS[name], folder) for words in commands]
        for run in runs:
            run["command"] = run["command"].removesuffix(f" --json {path}")
        rows = json.loads(path.read_text()) if path.exists() else []
        return {"runs": runs, "rows": rows}


def earlier_stages(path, machine):
    """{stage: outcome} from a file by the same known commit and machine; {} from any other."""
    if results.is_special(path):
        return {}
    try:
        file = json.loads(path.read_text())
        same = file["machine"] == machine and not machine["commit"].endswith(("+", "unknown"))
        return file["stages"] if same else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def most_seconds(name):
    """What a stage may take: the limits of all its commands."""
    return LIMITS[name] * len(COMMANDS.get(name, [""]))


def account(names):
    """The line on how long these stages may take."""
    limits = ", ".join(f"{name} {most_seconds(name)} s" for name in names)
    return f"limits    {limits}; at most {eta(sum(map(most_seconds, names)))} minutes"


def run_stages(names, path, machine):
    """Run stages one after the other, into a file with those of earlier calls; the exit code."""
    stages = earlier_stages(path, machine)
    print(account(names), flush=True)
    failed = False
    for name in names:
        stages[name] = outcome = run_stage(name)
        result = {
            "schema": 1,
            "command": f"python -m crate_mini.studies gpu {' '.join(stages)}",
            "machine": machine,
            "expected": expectations(machine["device"]),
            "stages": stages,
        }
        results.write_json(path, result)
        codes = [run["code"] for run in outcome["runs"]]
        failed = failed or any(code != 0 for code in codes)
        states = ", ".join("TIME UP" if code is None else f"code {code}" for code in codes)
        seconds = sum(run["seconds"] for run in outcome["runs"])
        rows = len(outcome["rows"])
        print(f"{name:9s} {seconds:6.1f} s  {states}, {rows} rows", flush=True)
    print(f"file      {path}")
    return int(failed)


@dataclass
class Settings:
    """All that a GPU can tell about this project, in one call, stage by stage.

    build      the extension, for this GPU alone
    tests      python -m pytest -m gpu: fuzz on the device, streams, graphs, training
    steps      compiled training steps of CRATE S and B, either backend, and of GPT-2
    agree      100 training steps on the kernels and on PyTorch: how the losses differ
    floors     the card's ceilings, and what they allow at each shape
    kernels    ISTA and MSSA: fused, eager, compiled with max-autotune, products alone
    versions   ISTA's kernels from naive to shipped, checked and timed
    decode     one token, at several densities
    sanitize   small tests under compute-sanitizer; by name only
    code       what nvcc made of each kernel -> results/sass.json; by name only; needs no
               GPU, but cuobjdump and nvdisasm of the CUDA toolkit

    Each stage is a process of its own with a time limit; all but the last two end within
    15 minutes, by their limits. results/CARD/COMMIT.json is written after each of them,
    failures included, next to what was expected by arithmetic, and keeps what earlier
    calls found with that commit on that card: a stage that ran out of time keeps its rows
    and can be called again. Timings are medians of contestants that take turns, on random
    data, in bfloat16 (steps in float16 where there is no bfloat16).
    """

    stages: tuple[str, ...] = setting(
        IN_15_MINUTES, "which, in this order", choices=tuple(LIMITS), shown="all but the last two"
    )
    json: str | None = setting(
        None, "file of the results", shown="results/CARD/COMMIT.json, sass.json for code"
    )
    commit: str | None = setting(None, "name of this source", shown="git's")
    only: str | None = setting(
        None, "measure one stage in this process, into --json", choices=tuple(MEASURES)
    )


def run(settings):
    stages = (settings.only,) if settings.only else settings.stages
    if set(stages) != {"code"} and not torch.cuda.is_available():
        raise UserError(
            "no GPU here; without one only `python -m crate_mini.studies gpu code` works."
        )
    if settings.only:
        if not settings.json:
            raise UserError(f"--only {settings.only} needs --json, a file for its rows.")
        return measure(settings.only, results.ready_file(settings.json))
    this_machine = machine(choose_device("auto"))
    if settings.commit:
        this_machine["commit"] = settings.commit
    path = Path(settings.json) if settings.json else default_path(stages, this_machine)
    return run_stages(stages, results.ready_file(path), this_machine)


def default_path(stages, machine):
    """results/CARD/COMMIT.json, e.g. results/rtx-4090/1a2b3c4d5e6f.json."""
    folder = results.ROOT / "results"
    if set(stages) == {"code"}:
        return folder / "sass.json"
    words = re.findall(r"[a-z0-9]+", machine["device"].lower())
    card = "-".join(word for word in words if word not in ("nvidia", "geforce", "tesla"))
    return folder / (card or "gpu") / f"{machine['commit'].strip('+')}.json"


COMMAND = Command(Settings, run, checkpoint=False, positional=("stages",))

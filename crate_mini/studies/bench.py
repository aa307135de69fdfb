"""Speed of the ops, of decoding and of a training step: kernels against PyTorch.

    python -m crate_mini.studies bench                            all tables
    python -m crate_mini.studies bench --op ista --versions       kernels from naive to shipped,
                                                                  checked and timed

A cell is the median and, after ±, half the distance of the quartiles. `products` is the floor: the
matrix products alone; for attention, PyTorch's products around a softmax. Of the head, `eager` is
the chunks of loss.py in PyTorch, and `whole` all logits at once. GFLOP/s and GB/s are those of
`fused`: operations of the products, and the bytes that have to travel at least, each tensor once.
`both` is forward and backward. On a busy machine, `--clock thread` counts the CPU time of one
thread instead of all time.
"""

import itertools
import time
from dataclasses import dataclass

import torch

from crate_mini import ops
from crate_mini.cli import setting
from crate_mini.console import results
from crate_mini.console.terminal import Command
from crate_mini.studies import benchmarks
from crate_mini.training.device import choose_device, keep_memory, machine

DTYPES = ("bfloat16", "float32")
OPS = ("ista", "mssa", "attention", "head", "decode", "step")
CLOCKS = {"wall": time.perf_counter, "thread": time.thread_time}
# N rows, width d; h = 4 d
SHAPES = ((8192, 128), (4096, 128), (4096, 384), (2048, 768), (3001, 100))
# B texts of T tokens, K heads of width p
HEADS = ((16, 256, 4, 32), (4, 1024, 4, 32), (16, 256, 12, 64), (16, 64, 4, 32))
CONTESTANTS = ("fused", "eager", "compile", "whole", "products")


@dataclass
class Settings:
    """Speed of the ops, of decoding and of a training step: kernels against PyTorch."""

    op: tuple[str, ...] = setting(OPS, "what to measure", choices=OPS)
    dtype: tuple[str, ...] = setting(DTYPES, "computed in", choices=DTYPES)
    versions: bool = setting(False, "every version of the kernels of ista or mssa, slow to fast")
    device: str = setting("auto", "auto, cpu or cuda")
    clock: str = setting("wall", "thread: CPU time of one thread", choices=tuple(CLOCKS))
    repeats: int = setting(9, "rounds that are measured", low=2)
    json: str | None = setting(None, "file to keep the table in, like results/bench.json")


def cases(settings, device):
    """All Cases that the settings ask for."""
    dtypes = [getattr(torch, name) for name in settings.dtype]
    for op, dtype in itertools.product(settings.op, dtypes):
        if op == "step":
            for vocab in (50304, 4096, 256):
                yield benchmarks.training_step(vocab, dtype, device)
        elif op == "attention":
            for kind, sizes in itertools.product(("mssa", "mhsa"), HEADS):
                yield from benchmarks.attention(kind, *sizes, dtype, device)
        elif op == "head":
            for vocab in (8192, 50304):
                yield benchmarks.head(vocab, dtype, device)
        elif op == "decode":
            for d in (128, 768):
                yield from benchmarks.decode(d, dtype, device)
        elif settings.versions:
            yield from benchmarks.ladder(op, *SHAPES[0], dtype, device)
        else:
            for N, d in SHAPES:
                name = f"{op} {N}x{d} {benchmarks.short_name(dtype)}"
                yield from benchmarks.problem(op, N, d, dtype, device).cases(name)


def cells(case):
    """A measured case as the cells of a row."""
    times = []
    for name in CONTESTANTS:
        median, spread = case.ms.get(name, (None, None))
        times.append("" if median is None else f"{median:.3g} ±{spread:.2g}")
    fused = case.ms["fused"][0]
    ratios = []
    for name in ("eager", "compile"):
        ratios.append(f"{case.ms[name][0] / fused:.2f}x" if name in case.ms else "")
    rates = f"{case.operations / fused / 1e6:.0f}", f"{case.moved / fused / 1e6:.1f}"
    return [case.name, *times, *ratios, *rates, case.note]


def show_row(row):
    print(f"| {' | '.join(row)} |", flush=True)


def run(settings):
    if settings.json:
        results.ready_file(settings.json)
    device = choose_device(settings.device)
    with ops.use_backend("fused"):
        backend = ops.backend(device.type)
    print(": ".join(backend))
    keep_memory()  # as train.py does; it serves all contestants
    titles = [f"{name}, ms" for name in CONTESTANTS]
    show_row(["", *titles, "eager/", "compile/", "GFLOP/s", "GB/s", "note"])
    print("|---" + "|---:" * (len(titles) + 4) + "|---|")
    rows = []
    for case in cases(settings, device):
        case.measure(device, settings.repeats, CLOCKS[settings.clock])
        show_row(cells(case))
        rows.append(case.row())
    if settings.json:
        table = {
            "command": results.command("-m", "crate_mini.studies"),
            "backend": backend,
            "machine": machine(device),
            "rows": rows,
        }
        results.write_json(settings.json, table)


COMMAND = Command(Settings, run, checkpoint=False)

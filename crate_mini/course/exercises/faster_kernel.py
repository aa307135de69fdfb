"""The file below is the forward pass of the ISTA block in plain loops (csrc/ista_naive.cpp).

Make it at least twice as fast on one core, with the same results.

    r_t = x - D a_{t-1}                            D (d, h), row-major
    a_t = ReLU(a_{t-1} + eta D^T r_t - eta lam)
    y   = decoder a_S

    D in memory     D00 D01 D02 ... | D10 D11 D12 ... | ...       a row is contiguous
    row(D, i)       reads along a row: 4 bytes further each time
    column(D, j)    reads down a column: 4 h bytes further, and so a new cache line, each time

N tokens, x (N, d), lam (h), codes a_1..a_S (S, N, h), residuals r_1..r_S (S, N, d), y (N, d).
Everything is float32. The check compiles your file with the flags -O3 -std=c++17, compares it with
PyTorch in float64 on ragged sizes, then times it in turns with the naive one.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from crate_mini import reference
from crate_mini.course.checking import Wrong, cases
from crate_mini.course.compiled import Guarded, compile_cpp, function
from crate_mini.course.exercise import in_checkout

TITLE = "Make the naive ISTA kernel twice as fast (C++)"
STARS = 3
MINUTES = 60
TEACHES = "memory order, and why it decides before arithmetic does"
HINTS = (
    "Compute all of D^T r at once: for each i, add r[i] times row i of D to a vector of h sums. "
    "The inner loop then reads and writes neighbours, and the compiler vectorizes it.",
    "A sum of floats cannot be reordered by the compiler. Keep eight partial sums in row().",
    "Several tokens can share one pass over D.",
)
FILE = "faster_kernel.cpp"
NAME = "ista_forward"
SPEEDUP = 2.0
ROUNDS = 9


def stub():
    """The naive kernel under the name that the check calls."""
    text = in_checkout("csrc", "ista_naive.cpp").read_text(encoding="utf-8")
    body = text.split("namespace crate_mini {\n", 1)[1].split("// The chain rule", 1)[0]
    body = body.replace("void ista_naive_forward(", f'extern "C" void {NAME}(')
    return f"#include <algorithm>\n#include <cstdint>\n#include <vector>\n{body.rstrip()}\n"


def check_file(path):
    with tempfile.TemporaryDirectory() as folder:
        naive = Path(folder, "naive.cpp")
        naive.write_text(stub(), encoding="utf-8")
        libraries = []
        for source, name in ((path, "learner.so"), (naive, "naive.so")):
            libraries.append(compile_cpp(source, Path(folder, name)))
        yours, theirs = (function(library, NAME, "llllf" + "p" * 7) for library in libraries)
        for case in cases(12):
            sizes = [case.integer(0, 5), case.integer(1, 20), case.integer(1, 70)]
            compare(yours, case, *sizes, steps=case.integer(1, 3))
        ratio = speedup(yours, theirs)
    if ratio < SPEEDUP:
        raise Wrong(
            f"right, and {ratio:.2f} times as fast as the naive kernel; {SPEEDUP:.0f} times is "
            "the goal."
        )
    return f"It is {ratio:.1f} times as fast as the naive kernel."


def problem(case, N, d, h):
    """x, D, decoder, lam as float32 arrays, and eta."""
    shapes = (N, d), (d, h), (d, h), (h,)
    arrays = [case.normal(*shape).float().numpy() for shape in shapes]
    return [*arrays[:3], np.abs(arrays[3]) / 5], 0.5 / d


def run(kernel, inputs, eta, steps):
    """Call a kernel; returns [y, codes, residuals] as Guarded arrays."""
    (N, d), h = inputs[0].shape, len(inputs[3])
    outputs = [Guarded("y", N, d), Guarded("codes", steps, N, h), Guarded("residuals", steps, N, d)]
    pointers = [a.ctypes.data for a in inputs] + [output.pointer for output in outputs]
    kernel(N, d, h, steps, eta, *pointers)
    return outputs


def compare(kernel, case, N, d, h, steps):
    inputs, eta = problem(case, N, d, h)
    seen = f"for N {N}, d {d}, h {h}, S {steps}"
    y, codes, residuals = run(kernel, inputs, eta, steps)
    exact = equation(inputs, eta, steps, torch.float64)
    plain = equation(inputs, eta, steps, torch.float32)
    for t in range(steps):  # in the order of computation, so that the first difference is named
        residuals.close_to(exact[2], plain[2], seen, t)
        codes.close_to(exact[1], plain[1], seen, t)
    y.close_to(exact[0], plain[0], seen)


def equation(inputs, eta, steps, dtype):
    """The same in PyTorch: [y, codes, residuals]."""
    x, D, decoder, lam = (torch.from_numpy(a).to(dtype) for a in inputs)
    codes, residuals = [], []
    a = torch.zeros(len(x), D.shape[1], dtype=dtype)
    for _ in range(steps):
        residuals.append(x - a @ D.T)
        a = reference.ista_step(a, residuals[-1], D, eta, lam)
        codes.append(a)
    return [t.numpy() for t in (a @ decoder.T, torch.stack(codes), torch.stack(residuals))]


def speedup(yours, theirs):
    """The median over turns of the naive kernel's time over the learner's."""
    inputs, eta = problem(next(cases(1)), 16, 128, 512)
    ratios = []
    for _ in range(ROUNDS):
        times = []
        for kernel in (theirs, yours):
            began = time.perf_counter()
            run(kernel, inputs, eta, 2)
            times.append(time.perf_counter() - began)
        ratios.append(times[0] / times[1])
    return statistics.median(ratios)

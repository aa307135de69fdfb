"""Two ISTA steps are four products. csrc/ista_cuda.cu writes the codes to memory between them; here
you write one kernel that keeps a tile of rows on the chip through all four, and returns y alone.

    a = ReLU(eta D^T x - eta lam)                  D (d, h)
    r = x - D a
    a = ReLU(a + eta D^T r - eta lam)
    y = D a                                        x, y (N, d)

    global    x                                      y
              |    D        D        D        D      ^
              v    |        |        |        |      |
    shared    r -- a ------ r ------ a ------ y -----+      kRows x (d + h) floats per block

Everything is float32 and N, d and h are any sizes. A block may use 227 KB of shared memory; more
than 48 KB needs cudaFuncSetAttribute.

Checked: your file runs on this project's emulated CUDA device (each CUDA thread is a fiber) and is
compared with PyTorch in float64, on ragged sizes and under several schedules of threads and blocks.
Missed barriers, writes outside y and a second launch are reported; the only place for codes is the
chip. Not checked: speed, which needs a GPU, and whether nvcc compiles the file. The kernel stays in
your file; nothing in csrc/ selects it.
"""

import ctypes
import tempfile

import numpy as np
import torch

from crate_mini import reference
from crate_mini.course.checking import Wrong, cases
from crate_mini.course.compiled import Guarded, compile_emulated, function
from crate_mini.course.exercise import FOLDER

TITLE = "One kernel for four products (CUDA, on an emulated GPU)"
STARS = 3
MINUTES = 120
TEACHES = "shared memory, barriers, and what fusion saves"
HINTS = (
    "Let every thread walk over elements of a tile: for (i = threadIdx.x; i < rows * h; "
    "i += blockDim.x), row i / h, column i % h.",
    "__syncthreads() after each of the phases: every thread of a block has to reach it.",
    "In the last tile fewer than kRows rows are left.",
)
FILE = "fused_kernel.cu"
BEGIN = "  // begin solution\n"
END = "  // end solution\n"
SIZES = [(1, 1, 1), (3, 5, 9), (8, 16, 40), (19, 7, 33), (33, 12, 20), (0, 4, 8)]


def stub():
    """Our file without the kernel's body."""
    text = (FOLDER / FILE).read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    return f"{before}  // your code\n{rest.split(END)[1]}"


def check_file(path):
    with tempfile.TemporaryDirectory() as folder:
        library = compile_emulated(path, folder)
        kernel = function(library, "fused_forward", "lllffpppp")
        library.course_fault.restype = ctypes.c_char_p
        for case, (N, d, h) in zip(cases(len(SIZES)), SIZES):
            x, D = (case.normal(*shape).float().numpy() for shape in ((N, d), (d, h)))
            for schedule in range(3):
                y = Guarded("y", N, d)
                library.course_start(schedule)
                pointers = [array.ctypes.data for array in (x, D)]
                code = kernel(N, d, h, 0.5 / d, 0.1, *pointers, y.pointer, None)
                seen = f"for N {N}, d {d}, h {h}, schedule {schedule}"
                must_run(code, library, N, seen)
                y.close_to(equation(x, D, torch.float64), equation(x, D, torch.float32), seen)
    return "Right on every schedule, in one launch; its speed is for a GPU to tell."


def must_run(code, library, N, seen):
    fault = library.course_fault().decode()
    if code or fault:
        raise Wrong(f"{fault or f'fused_forward returns error {code}'} ({seen}).")
    if N and library.course_launches() != 1:
        raise Wrong(
            f"it launches {library.course_launches()} kernels ({seen}); all four products belong "
            "into one."
        )


def equation(x, D, dtype):
    """y in PyTorch."""
    x, D = torch.from_numpy(x).to(dtype), torch.from_numpy(D).to(dtype)
    eta = float(np.float32(0.5 / D.shape[0]))
    return reference.ista(x, D, eta, float(np.float32(0.1)), 2)[0].numpy()

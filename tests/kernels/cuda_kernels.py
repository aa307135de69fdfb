"""The CUDA kernels of csrc/ as functions of tensors: on a GPU, or on an emulated device.

The emulated device (cuda_cpu/) is a C++ library: `compile_emulated` builds it with g++.
"""

import ctypes
import subprocess
from pathlib import Path

import torch
from guarded_kernels import Guarded, Kernels

ROOT = Path(__file__).resolve().parents[2]
HEADERS = ROOT / "tests" / "kernels" / "cuda_cpu"
DTYPES = [torch.float32, torch.bfloat16]
SHORT_SPLITS = ["-DCRATE_SPLIT_ROWS=32"]  # sizes of tests then reach splits
TYPES = {"i": ctypes.c_int, "l": ctypes.c_int64, "d": ctypes.c_double, "p": ctypes.c_void_p}
SIGNATURES = {  # dtypes, sizes, settings, pointers and workspace, version, stream
    "ista_forward_cuda": "i" + "llll" + "dd" + "p" * 9 + "ip",
    "ista_backward_cuda": "i" + "llll" + "d" + "p" * 13 + "ip",
    "ista_decode_cuda": "i" + "llll" + "dd" + "p" * 8 + "ip",
    "mssa_project_forward_cuda": "ii" + "ll" + "d" + "p" * 6 + "ip",
    "mssa_project_backward_cuda": "ii" + "ll" + "d" + "p" * 10 + "ip",
}
for name in list(SIGNATURES):
    SIGNATURES[name.replace("_cuda", "_workspace_cuda")] = SIGNATURES[name][:4]


class Fault(Exception):
    """A CUDA error; on the emulated device also a missed barrier or a misaligned access."""


def compile_emulated(folder, sources=ROOT / "csrc", flags=("-O1",)):
    """Compile the kernels of `sources` with g++ into folder/emulated.so; returns its path."""
    warnings = ["-Wall", "-Wno-unknown-pragmas"]
    options = ["-std=c++17", "-fPIC", "-U_FORTIFY_SOURCE", *warnings, *flags, *SHORT_SPLITS]
    command = ["g++", *options, f"-I{HEADERS}", f"-I{sources}", "-c", "-x", "c++"]
    files = [*sorted(Path(sources).glob("*.cu")), HEADERS / "functions.cpp"]
    objects = [Path(folder, f"{file.name}.o") for file in files]
    jobs = []
    for file, target in zip(files, objects):
        jobs.append(subprocess.Popen([*command, file, "-o", target]))
    statuses = [job.wait() for job in jobs]
    assert not any(statuses), f"g++ failed on {sources}; its message is on stderr"
    library = Path(folder, "emulated.so")
    subprocess.run(["g++", "-shared", *flags, *objects, "-o", library], check=True)
    return library


class CudaKernels(Kernels):
    """The CUDA kernels of the compiled module, on a GPU.

    version: 0 the best, or 1 to 3. shift: elements by which inputs miss their natural alignment.
    """

    device = "cuda"
    version = 0
    shift = 0

    def function(self, name):
        from crate_mini import _C

        return getattr(_C, name)

    def schedule(self, seed):
        """The order of threads, warps and blocks from now on; a GPU chooses its own."""

    def fault(self):
        """What else the device reports, or an empty string."""
        torch.cuda.synchronize()
        return ""

    def stream(self):
        return torch.cuda.current_stream().cuda_stream

    def guard(self, t):
        moved = t.flatten().to(self.device)
        guarded = Guarded.copy(torch.cat((moved.new_zeros(self.shift), moved)))
        return guarded, guarded.pointer + self.shift * t.element_size()

    def run(self, kernel, scalars, inputs, outputs):
        """Raises Fault, or AssertionError for memory that was touched."""
        size = self.function(f"{kernel}_workspace_cuda")(*scalars[:4])
        workspace = self.out(size // 2, dtype=torch.bfloat16)
        function = self.function(f"{kernel}_cuda")

        def checked(*values):
            code = function(*values)
            message = self.fault()
            if code or message:
                raise Fault(f"{kernel}: error {code}, {message or 'nothing else reported'}")

        self.call(checked, *scalars, *inputs, *outputs, workspace, self.version, self.stream())


class EmulatedKernels(CudaKernels):
    """The kernels in a library that `compile_emulated` made."""

    device = "cpu"

    def __init__(self, library):
        self.library = ctypes.CDLL(str(library))
        self.library.crate_function.restype = ctypes.c_void_p
        self.library.crate_fault.restype = ctypes.c_char_p

    def function(self, name):
        returns = ctypes.c_int64 if "workspace" in name else ctypes.c_int
        prototype = ctypes.CFUNCTYPE(returns, *(TYPES[kind] for kind in SIGNATURES[name]))
        return prototype(self.library.crate_function(name.encode()))

    def schedule(self, seed):
        self.library.crate_seed(seed)

    def fault(self):
        return self.library.crate_fault().decode()

    def stream(self):
        return None

    def become(self, major, multiprocessors):
        """Take another capability and size, from now on."""
        self.library.crate_device(major, multiprocessors)

    def splits(self, M, N, K, multiprocessors):
        """How often the module that ships divides the sum of an (M, N) result."""
        sizes = map(ctypes.c_int64, (M, N, K))
        return self.library.crate_splits(*sizes, multiprocessors)

    def wake(self, number):
        """Wake one of the planted faults; 0 wakes none."""
        self.library.crate_plant(number)

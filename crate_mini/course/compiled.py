"""Compile a learner's C++, or CUDA for the emulated device, and call it on guarded memory."""

import ctypes
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np

from crate_mini import UserError
from crate_mini.course.checking import Wrong
from crate_mini.course.exercise import in_checkout

CPP = ["-O3", "-std=c++17", "-fPIC", "-shared"]
GUARD = 64  # values before and after an array that must stay as they are
SENTINEL = np.float32(-123.25)

# The learner's file on the emulated device: its launches are counted, its faults are read.
EMULATED = """
#include "cuda_common.cuh"
static int launches = 0;
#undef LAUNCH
#define LAUNCH(kernel, grid, block, shared, stream, ...)                              \\
  (++launches, emu::launch(reinterpret_cast<const void*>(kernel), grid, block, shared, \\
                           [&] { kernel(__VA_ARGS__); }))
#include "%s"
extern "C" void course_start(unsigned seed) { launches = 0; emu::random.seed(seed); }
extern "C" int course_launches() { return launches; }
extern "C" const char* course_fault() {
  static std::string last;
  last.swap(emu::message);
  emu::message.clear();
  return last.c_str();
}
"""


def find_compiler(*names):
    """The words of a C++ compiler. Raises UserError if there is none."""
    for name in filter(None, [os.environ.get("CXX"), *names]):
        words = shlex.split(name)
        if shutil.which(words[0]):
            return words
    raise UserError(
        f"this exercise needs a C++ compiler ({', '.join(names)}), and none is installed; on "
        "Debian `apt install g++`, on macOS `xcode-select --install`."
    )


def compile_cpp(source, library):
    """Compile a C++ file; returns the loaded library. Raises Wrong with the first error."""
    command = [*find_compiler("c++", "g++", "clang++"), *CPP, str(source), "-o", str(library)]
    return _compiled(command, library)


def compile_emulated(source, folder):
    """Compile a CUDA file for the emulated device; returns the loaded library."""
    headers = [in_checkout("tests", "kernels", "cuda_cpu"), in_checkout("csrc")]
    wrapper, library = Path(folder, "wrapper.cpp"), Path(folder, "emulated.so")
    wrapper.write_text(EMULATED % source, encoding="utf-8")
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"]
    includes = [f"-I{folder}" for folder in headers]
    command = [*find_compiler("g++"), *flags, *includes, str(wrapper), "-o", str(library)]
    return _compiled(command, library)


def _compiled(command, library):
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = done.stderr.splitlines() or ["no message"]
        first = next((line for line in lines if "error" in line), lines[0])
        raise Wrong(f"it does not compile: {first.strip()[:300]}")
    return ctypes.CDLL(str(library))


def function(library, name, kinds):
    """A function of a library; kinds: i64, f32, or p for pointers, one letter each (l, f, p)."""
    try:
        found = getattr(library, name)
    except AttributeError:
        raise Wrong(f'{name} is missing; the file has to define it as extern "C".') from None
    types = {"l": ctypes.c_int64, "f": ctypes.c_float, "p": ctypes.c_void_p}
    found.argtypes = [types[kind] for kind in kinds]
    return found


class Guarded:
    """An output array (float32) full of NaN between guards, which a kernel must fill."""

    def __init__(self, name, *shape):
        self.name = name
        size = int(np.prod(shape))
        self.memory = np.full(size + 2 * GUARD, SENTINEL, np.float32)
        self.array = self.memory[GUARD : GUARD + size].reshape(shape)
        self.array[...] = np.nan

    @property
    def pointer(self):
        return self.memory.ctypes.data + 4 * GUARD

    def close_to(self, exact, plain, seen, *index):
        """Raise Wrong unless the array is as right as float32 allows.

        exact: in float64; plain: PyTorch's float32, whose error is what may be expected. index: the
        part of all three to compare.
        """
        ends = np.concatenate([self.memory[:GUARD], self.memory[len(self.memory) - GUARD :]])
        if (ends != SENTINEL).any():
            raise Wrong(f"it writes outside {self.name} ({seen}).")
        values, exact, plain = self.array[index], exact[index], plain[index]
        if not exact.size:
            return
        if np.isnan(values).any():
            place = _place(index, np.isnan(values))
            raise Wrong(f"{self.name}{place} is not written, or nan ({seen}).")
        error = np.abs(values - exact)
        allowed = 8 * np.abs(plain - exact).max() + 1e-5 * max(np.abs(exact).max(), 1e-3)
        if error.max() > allowed:
            largest = error.argmax()
            raise Wrong(
                f"{self.name}{_place(index, error == error.max())} is "
                f"{values.flat[largest]:.6g}, expected {exact.flat[largest]:.6g} ({seen})."
            )


def _place(index, where):
    """[t, n, j] of the first place where a part of an array is True."""
    return [*index, *(int(i) for i in np.argwhere(where)[0])]

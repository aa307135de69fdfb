"""The CUDA kernels of csrc/ as functions of tensors: on a GPU, or compiled by g++ for the emulated device.

Every call copies its inputs between guards, poisons its outputs with NaN, and checks both afterwards.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import torch
from conftest import Guarded

ROOT = Path(__file__).resolve().parents[2]
HEADERS = ROOT / "tests" / "kernels" / "cuda_cpu"
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
SMALL = [
    "-DCRATE_MULTIPROCESSORS=4",
    "-DCRATE_SPLIT_ROWS=32",
]  # test sizes then reach large tiles and splits
TYPES = {"i": ctypes.c_int, "l": ctypes.c_int64, "d": ctypes.c_double, "p": ctypes.c_void_p}
SIGNATURES = {  # dtypes, sizes, scalars, pointers, version, stream, as in csrc/kernels.h
    "ista_workspace_cuda": "illl",
    "mssa_workspace_cuda": "ll",
    "ista_forward_cuda": "i" + "llll" + "dd" + "p" * 9 + "ip",
    "ista_backward_cuda": "i" + "llll" + "d" + "p" * 13 + "ip",
    "ista_step_forward_cuda": "i" + "lll" + "dd" + "p" * 5 + "ip",
    "ista_step_backward_cuda": "i" + "lll" + "d" + "p" * 9 + "ip",
    "ista_decode_cuda": "i" + "llll" + "dd" + "p" * 8 + "p",
    "mssa_project_forward_cuda": "ii" + "ll" + "d" + "p" * 6 + "ip",
    "mssa_project_backward_cuda": "ii" + "ll" + "d" + "p" * 10 + "ip",
}


class Fault(Exception):
    """What the device found wrong: a CUDA error; emulated, also a barrier missed or an access misaligned."""


# ---- building for the emulated device ---------------------------------------------------------------------


def build(folder, sources=ROOT / "csrc", flags=("-O1",)):
    """Compile the kernels of `sources` with g++ into folder/emulated.so; returns its path."""
    common = [
        "g++",
        "-std=c++17",
        "-fPIC",
        "-U_FORTIFY_SOURCE",
        "-Wall",
        "-Wno-unknown-pragmas",
        *flags,
    ]
    common += [*SMALL, f"-I{HEADERS}", f"-I{sources}", "-c", "-x", "c++"]
    files = [*sorted(Path(sources).glob("*.cu")), HEADERS / "functions.cpp"]
    objects = [Path(folder, f.name + ".o") for f in files]
    jobs = [subprocess.Popen([*common, file, "-o", out]) for file, out in zip(files, objects)]
    statuses = [job.wait() for job in jobs]
    assert not any(statuses), f"g++ failed on {sources}; its words are on stderr"
    library = Path(folder, "emulated.so")
    subprocess.run(["g++", "-shared", *flags, *objects, "-o", library], check=True)
    return library


def plant(folder, faults):
    """Copy csrc/ to folder with every fault written in, dormant until Emulated.wake(its number).

    faults: (file, original text, replacement); PLANTED in a replacement is true while the fault is awake.
    """
    shutil.copytree(ROOT / "csrc", folder)
    for number, (file, original, replacement) in enumerate(faults, 1):
        path = Path(folder, file)
        text = path.read_text()
        assert text.count(original) == 1, f"fault {number}: {original!r} must be once in {file}"
        path.write_text(
            text.replace(original, replacement.replace("PLANTED", f"(emu::planted == {number})"))
        )
    return folder


# ---- calling ----------------------------------------------------------------------------------------------


class Kernels:
    """The kernels on a device; where: "cuda", the compiled module's. Results come back as CPU tensors."""

    where = "cuda"
    shift = 0  # elements by which inputs miss their natural alignment

    def function(self, name):
        from crate_mini import _C

        return getattr(_C, name)

    def schedule(self, seed):
        """The order of threads, warps and blocks from now on; a GPU chooses for itself."""

    def fault(self):
        """What else the device has to tell, or an empty string."""
        torch.cuda.synchronize()
        return ""

    def out(self, *shape, dtype):
        return Guarded(shape, dtype, self.where)

    def call(self, name, *args):
        """Run a kernel: a tensor is an input, a Guarded an output. Raises Fault, AssertionError."""
        guards, values = [], []
        for a in args:
            if isinstance(a, torch.Tensor):
                moved = a.flatten().to(self.where)
                guards.append(Guarded.copy(torch.cat((moved.new_zeros(self.shift), moved))))
                a = guards[-1].pointer + self.shift * a.element_size()
            elif isinstance(a, Guarded):
                guards.append(a)
                a = a.pointer
            values.append(a)
        code = self.function(name)(*values)
        told = self.fault()
        if code or told:
            raise Fault(f"{name}: error {code}, {told or 'no more is known'}")
        for guard in guards:
            guard.check(name)

    def work(self, name, *sizes):
        return self.out(self.function(f"{name}_workspace_cuda")(*sizes) // 4, dtype=torch.float32)

    def stream(self):
        return torch.cuda.current_stream().cuda_stream

    def ista(self, x, D, eta, lam, steps, decoder=None, version=0, trail=True):
        """(y, a, trail_a, trail_r); without trail the last two are None."""
        code, (N, d), h, new = DTYPES[x.dtype], x.shape, D.shape[1], x.dtype
        y, a, trail_a, trail_r = self.out(N, d, dtype=new), self.out(N, h, dtype=new), None, None
        if trail:
            trail_a, trail_r = (
                self.out(steps - 1, N, h, dtype=new),
                self.out(steps - 1, N, d, dtype=new),
            )
        self.call(
            "ista_forward_cuda",
            code,
            N,
            d,
            h,
            steps,
            eta,
            number(lam),
            x,
            D,
            D if decoder is None else decoder,
            vector(lam),
            y,
            a,
            trail_a,
            trail_r,
            self.work("ista", code, N, d, h),
            version,
            self.stream(),
        )
        return tensors(y, a, trail_a, trail_r)

    def ista_backward(
        self, gy, ga, x, D, eta, decoder, a, trail_a, trail_r, version=0, want_lam=True
    ):
        """(gx, gD, gdec or None, glam or None)."""
        code, (N, d), h, new = DTYPES[x.dtype], x.shape, D.shape[1], x.dtype
        gx, gD = self.out(N, d, dtype=new), self.out(d, h, dtype=new)
        gdec = None if decoder is None else self.out(d, h, dtype=new)
        glam = self.out(h, dtype=torch.float32) if want_lam else None
        self.call(
            "ista_backward_cuda",
            code,
            N,
            d,
            h,
            len(trail_a) + 1,
            eta,
            gy,
            ga,
            x,
            D,
            D if decoder is None else decoder,
            a,
            trail_a,
            trail_r,
            gx,
            gD,
            gdec,
            glam,
            self.work("ista", code, N, d, h),
            version,
            self.stream(),
        )
        return tensors(gx, gD, gdec, glam)

    def ista_step(self, a, r, D, eta, lam, version=0):
        code, (N, d), h = DTYPES[r.dtype], r.shape, D.shape[1]
        out = self.out(N, h, dtype=r.dtype)
        self.call(
            "ista_step_forward_cuda",
            code,
            N,
            d,
            h,
            eta,
            number(lam),
            a,
            r,
            D,
            vector(lam),
            out,
            version,
            self.stream(),
        )
        return out.tensor.cpu()

    def ista_step_backward(self, g, out, r, D, eta, version=0, want_a=True):
        """(ga or None, gr, gD, glam)."""
        code, (N, d), h, new = DTYPES[r.dtype], r.shape, D.shape[1], r.dtype
        ga, gr = self.out(N, h, dtype=new) if want_a else None, self.out(N, d, dtype=new)
        gD, glam = self.out(d, h, dtype=new), self.out(h, dtype=torch.float32)
        self.call(
            "ista_step_backward_cuda",
            code,
            N,
            d,
            h,
            eta,
            g,
            out,
            r,
            D,
            ga,
            gr,
            gD,
            glam,
            self.work("ista", code, N, d, h),
            version,
            self.stream(),
        )
        return tensors(ga, gr, gD, glam)

    def ista_decode(self, x, D, eta, lam, steps, decoder=None):
        """(y, a)."""
        code, (N, d), h, new = DTYPES[x.dtype], x.shape, D.shape[1], x.dtype
        y, a, Dt = self.out(N, d, dtype=new), self.out(N, h, dtype=new), D.T.contiguous()
        self.call(
            "ista_decode_cuda",
            code,
            N,
            d,
            h,
            steps,
            eta,
            number(lam),
            x,
            D,
            Dt,
            Dt if decoder is None else decoder.T.contiguous(),
            vector(lam),
            y,
            a,
            self.work("ista", code, N, d, h),
            self.stream(),
        )
        return tensors(y, a)

    def mssa(self, z, weight, bias, U, eps=1e-5, version=0):
        (N, d), u = z.shape, self.out(*z.shape, dtype=U.dtype)
        self.call(
            "mssa_project_forward_cuda",
            DTYPES[z.dtype],
            DTYPES[U.dtype],
            N,
            d,
            eps,
            z,
            weight,
            bias,
            U,
            u,
            self.work("mssa", N, d),
            version,
            self.stream(),
        )
        return u.tensor.cpu()

    def mssa_backward(self, gu, z, weight, bias, U, eps=1e-5, version=0):
        """(gz, gweight, gbias or None, gU)."""
        (N, d), gz, gU = (
            z.shape,
            self.out(*z.shape, dtype=z.dtype),
            self.out(*U.shape, dtype=U.dtype),
        )
        gweight, gbias = (
            None if t is None else self.out(d, dtype=torch.float32) for t in (weight, bias)
        )
        self.call(
            "mssa_project_backward_cuda",
            DTYPES[z.dtype],
            DTYPES[U.dtype],
            N,
            d,
            eps,
            gu,
            z,
            weight,
            bias,
            U,
            gz,
            gweight,
            gbias,
            gU,
            self.work("mssa", N, d),
            version,
            self.stream(),
        )
        return tensors(gz, gweight, gbias, gU)


class Emulated(Kernels):
    """The kernels in a library that `build` made."""

    where = "cpu"

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

    def wake(self, number):
        """Wake one of the faults that `plant` wrote in; 0 wakes none."""
        self.library.crate_plant(number)


def tensors(*guarded):
    return tuple(None if g is None else g.tensor.cpu() for g in guarded)


def number(lam):
    return 0.0 if isinstance(lam, torch.Tensor) else lam


def vector(lam):
    return lam if isinstance(lam, torch.Tensor) else None

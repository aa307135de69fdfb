"""Compile csrc/ into crate_mini/_C: C++ always, CUDA whenever nvcc is found, and never a failed install.

csrc does not know torch, so the build runs in pip's isolation and its result outlives torch upgrades. Where
something is missing, less is built and the closing summary (`pip install -v -e .` shows it) says why:
no nvcc, or a failing one: CPU only; no OpenMP: one thread; no working compiler: plain PyTorch runs instead.

Environment: CXX, CXXFLAGS, LDFLAGS as usual; MAX_JOBS caps parallel compilers; CUDA_HOME picks the toolkit;
CRATE_CUDA_ARCHS="80 90a" picks GPU architectures ("none": no CUDA). A GPU need not be visible.
"""

import os
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

OUT = Path(
    "build", f"ninja-{sys.implementation.cache_tag}"
)  # kept, so that the next build is incremental
SHARED = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
CXX, CXXFLAGS, LDFLAGS = (
    shlex.split(os.environ.get(name, "")) for name in ("CXX", "CXXFLAGS", "LDFLAGS")
)
RULE = f"""builddir = {OUT}
rule run
  command = $words $in -o $out
  depfile = $out.d
  deps = gcc
"""


def sources(*kinds):
    return sorted(str(path) for kind in kinds for path in Path("csrc").glob(kind))


def sh(*words):
    """Run quietly: (exit status, all output). A missing program is a failure like any other."""
    return subprocess.getstatusoutput(shlex.join(words))


def version(*compiler):
    """The line of `compiler --version` that identifies it: g++ and clang say it first, nvcc last."""
    lines = sh(*compiler, "--version")[1].splitlines() or ["unknown"]
    return lines[-1 if lines[0].startswith("nvcc") else 0]


def find_cxx():
    """(compiler or None, OpenMP flags, what to tell). A file is compiled, because a name proves nothing."""
    probe, names = OUT / "probe.cpp", [CXX] if CXX else [["c++"], ["g++"], ["clang++"]]
    for cxx in names:
        probe.write_text("#include <vector>\nint main() { return int(std::vector<int>(1)[0]); }\n")
        if sh(*cxx, "-std=c++17", f"{probe}", "-o", f"{OUT}/probe")[0] == 0:
            probe.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
            openmp = sh(*cxx, "-fopenmp", f"{probe}", "-o", f"{OUT}/probe")[0] == 0
            told = f"C++: {version(*cxx)}, " + (
                "OpenMP" if openmp else "no OpenMP, therefore one thread"
            )
            return cxx, ["-fopenmp"] * openmp, told
    return (
        None,
        [],
        f"C++: no working compiler ({', '.join(map(shlex.join, names))}); install g++ or set CXX",
    )


def find_nvcc():
    """(path or None, architectures, what to tell). A GPU need not be visible: containers build without."""
    archs = (
        os.environ.get("CRATE_CUDA_ARCHS", "80 90a").replace(",", " ").replace("sm_", "").split()
    )
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next(filter(None, map(shutil.which, places)), None)
    if not nvcc or archs in ([], ["none"]):
        why = (
            f"no nvcc ({' or '.join(places)})"
            if archs and not nvcc
            else "switched off by CRATE_CUDA_ARCHS"
        )
        return None, [], f"CUDA: {why}, therefore CPU only"
    return nvcc, archs, f"CUDA: {version(nvcc)}, {' '.join('sm_' + a for a in archs)}"


def edges(cxx, openmp, nvcc, archs):
    """The build as (output, inputs, command words): one for each file, one for the link."""
    stamp = runpy.run_path("crate_mini/_stamp.py")["source_stamp"]()
    compilers = version(*cxx) + (f"; {version(nvcc)}" if nvcc else "")
    facts = {"STAMP": stamp, "ARCHS": " ".join(archs), "COMPILERS": compilers}
    binding = [f'-DCRATE_{name}="{value}"' for name, value in facts.items()] + [
        "-DCRATE_CUDA"
    ] * bool(nvcc)
    binding += shlex.split(sh(sys.executable, "-m", "pybind11", "--includes")[1])
    common, host = ["-O3", "-std=c++17"], ["-fPIC", "-fvisibility=hidden", *openmp, *CXXFLAGS]
    link, cuda, files = [*cxx, *SHARED, *host, *LDFLAGS], [], sources("*.cpp")
    if nvcc:  # machine code for each architecture, and PTX of the first: newer GPUs translate it themselves
        code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        code += [f"-gencode=arch=compute_{archs[0]},code=compute_{archs[0]}", "-ccbin", cxx[-1]]
        cuda = [nvcc, *common, *code, *(f"-Xcompiler={word}" for word in host)]
        # cudart goes inside: the module also imports where no CUDA is installed
        link = [*cuda, *SHARED, "-cudart=static", *(f"-Xcompiler={word}" for word in LDFLAGS)]
        files += sources("*.cu")
    objects = [f"{OUT}/{Path(file).name}.o" for file in files]
    for file, out in zip(files, objects):
        words = cuda if file.endswith(".cu") else [*cxx, *common, "-Wall", *host]
        yield (
            out,
            [file],
            words + binding * ("bindings" in file) + ["-MMD", "-MF", f"{out}.d", "-c"],
        )
    yield OUT / "_C.so", objects, link


def ninja(build):
    """Run the edges with ninja; True if the module came out."""
    edge = "build {}: run {}\n  words = {}\n"
    text = "".join(
        edge.format(out, " ".join(inputs), shlex.join(words)) for out, inputs, words in build
    )
    (OUT / "build.ninja").write_text(RULE + text.replace("$", "$$"))
    jobs = [f"-j{os.environ['MAX_JOBS']}"] if os.environ.get("MAX_JOBS") else []
    status, output = sh(sys.executable, "-m", "ninja", "-f", f"{OUT}/build.ninja", *jobs)
    print(output)
    return status == 0


class Build(build_ext):
    """build_ext that answers every failure with a smaller build."""

    def build_extension(self, ext):
        OUT.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.unlink(
            missing_ok=True
        )  # an earlier build's would be packed as if it were this one's
        cxx, openmp, cpu = find_cxx()
        nvcc, archs, gpu = find_nvcc() if cxx else (None, [], "CUDA: needs a C++ compiler first")
        built = cxx and ninja(edges(cxx, openmp, nvcc, archs))
        if cxx and nvcc and not built:
            gpu += "; it failed (its message is above), therefore CPU only"
            built = ninja(edges(cxx, openmp, None, []))
        if built:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(OUT / "_C.so", target)
        cpu += "; it failed on csrc/ (its message is above)" if cxx and not built else ""
        head = (
            "the compiled extension is built."
            if built
            else (
                "no compiled extension; plain PyTorch does the work. After a repair run: pip install -e ."
            )
        )
        print(*(f"crate_mini: {line}" for line in (head, cpu, gpu)), sep="\n", flush=True)


setup(
    ext_modules=[
        Extension(
            "crate_mini._C",
            sources("*.cpp"),
            depends=sources("*.h", "*.cuh", "*.cu"),
            optional=True,
        )
    ],
    cmdclass={"build_ext": Build},
)

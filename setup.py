"""Compile csrc/ into crate_mini/_C: C++ always, CUDA if nvcc is found. The install never fails.

csrc knows nothing of torch, so the build runs in pip's isolated environment and the module outlives
upgrades of torch. Where something is missing, less is built, and the summary at the end (shown by
`pip install -v -e .`) says why: without nvcc, or if it fails, CPU only; without OpenMP, one thread;
without a working C++ compiler, no module: plain PyTorch does the work.

Environment: CXX, CXXFLAGS and LDFLAGS as usual; MAX_JOBS limits parallel compilers; CUDA_HOME picks
the toolkit; CRATE_CUDA_ARCHS="80 90a" picks GPU architectures ("none": no CUDA), of ARCHS those
that nvcc knows if it is not set. No GPU is needed to build.
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

# Kept between builds, so that the next one compiles only what changed.
OUT = Path("build", f"ninja-{sys.implementation.cache_tag}")
# Turing (T4), Ampere and Ada (A100, RTX 30 and 40), Hopper (H100), Blackwell (RTX 50). Others run
# the machine code of a relative, or PTX.
ARCHS = "75 80 90a 120"
ON_MAC = sys.platform == "darwin"
ON_WINDOWS = os.name == "nt"
SHARED = ["-bundle", "-undefined", "dynamic_lookup"] if ON_MAC else ["-shared"]
CXX = shlex.split(os.environ.get("CXX", ""))
CXXFLAGS = shlex.split(os.environ.get("CXXFLAGS", ""))
LDFLAGS = shlex.split(os.environ.get("LDFLAGS", ""))
NINJA_RULE = f"""builddir = {OUT}
rule run
  command = $words $in -o $out
  depfile = $out.d
  deps = gcc
"""


def sources(*patterns):
    """Names of the files in csrc/ that match, sorted."""
    paths = [path for pattern in patterns for path in Path("csrc").glob(pattern)]
    return sorted(str(path) for path in paths)


def run(*words):
    """(exit status, output) of a command; a missing program is a failure like any other."""
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except OSError as error:
        return 127, str(error)
    return done.returncode, done.stdout.decode(errors="replace").rstrip()


def typed(words):
    """A command as ninja takes it: quoted for a POSIX shell, or for Windows, which has none."""
    return subprocess.list2cmdline(words) if ON_WINDOWS else shlex.join(words)


# ---- what this machine has -----------------------------------------------------------------------


def version(*compiler):
    """The line of `compiler --version` that names it: g++'s and clang's first, nvcc's last."""
    lines = run(*compiler, "--version")[1].splitlines() or ["unknown"]
    return lines[-1] if lines[0].startswith("nvcc") else lines[0]


def compiles(cxx, code, *flags):
    """Whether a compiler builds this program; that it exists proves nothing."""
    probe = OUT / "probe.cpp"
    probe.write_text(code)
    return run(*cxx, *flags, f"{probe}", "-o", f"{OUT}/probe")[0] == 0


def find_cxx():
    """(compiler or None, OpenMP flags, line of the summary)."""
    candidates = [CXX] if CXX else [["c++"], ["g++"], ["clang++"]]
    program = "#include <vector>\nint main() { return int(std::vector<int>(1)[0]); }\n"
    cxx = next((words for words in candidates if compiles(words, program, "-std=c++17")), None)
    if cxx is None:
        names = ", ".join(map(shlex.join, candidates))
        return None, [], f"C++: no working compiler ({names}); install g++ or set CXX"
    program = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
    if compiles(cxx, program, "-fopenmp"):
        return cxx, ["-fopenmp"], f"C++: {version(*cxx)}, OpenMP"
    return cxx, [], f"C++: {version(*cxx)}, no OpenMP, therefore one thread"


def find_nvcc():
    """(path or None, architectures, line of the summary)."""
    names = os.environ.get("CRATE_CUDA_ARCHS", ARCHS)
    archs = names.replace(",", " ").replace("sm_", "").split()
    if archs in ([], ["none"]):
        return None, [], "CUDA: switched off by CRATE_CUDA_ARCHS, therefore CPU only"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next(filter(None, map(shutil.which, places)), None)
    if not nvcc:
        return None, [], f"CUDA: no nvcc ({' or '.join(places)}), therefore CPU only"
    if "CRATE_CUDA_ARCHS" not in os.environ:
        archs = [arch for arch in archs if knows(nvcc, arch)]
    if not archs:
        return None, [], f"CUDA: {version(nvcc)} knows none of sm_{ARCHS}, therefore CPU only"
    return nvcc, archs, f"CUDA: {version(nvcc)}, {' '.join(f'sm_{arch}' for arch in archs)}"


def knows(nvcc, arch):
    """Whether an nvcc can build for this architecture; it names the commands it would run."""
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    return run(nvcc, "--dryrun", target, "-c", "probe.cu")[0] == 0


# ---- the build -----------------------------------------------------------------------------------


def through_nvcc(words):
    """Words for the host compiler that nvcc calls."""
    return [f"-Xcompiler={word}" for word in words]


def gpu_targets(archs):
    """Flags for machine code of each architecture, and for PTX, which newer GPUs translate.

    PTX of one with a letter, like 90a, runs on that GPU alone, so it is made of the others, or of
    90 where there is none.
    """
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    portable = [arch for arch in archs if arch.isdecimal()] or [archs[-1].rstrip("abcdf")]
    return targets + [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in portable]


def nvcc_command(nvcc, archs, cxx, common, host):
    """nvcc with its targets, and flags for itself and for the host compiler that it calls."""
    targets = gpu_targets(archs)
    return [nvcc, *common, *targets, "-ccbin", cxx[-1], *through_nvcc(host)]


def binding_flags(cxx, nvcc, archs):
    """Flags of bindings.cpp alone: facts about the build, and where pybind11 is."""
    compilers = version(*cxx) + (f"; {version(nvcc)}" if nvcc else "")
    stamp = runpy.run_path("crate_mini/_stamp.py")["source_stamp"]()
    facts = {"STAMP": stamp, "ARCHS": " ".join(archs), "COMPILERS": compilers}
    flags = [f'-DCRATE_{name}="{value}"' for name, value in facts.items()]
    if nvcc:
        flags.append("-DCRATE_CUDA")
    return flags + shlex.split(run(sys.executable, "-m", "pybind11", "--includes")[1])


def build_edges(cxx, openmp, nvcc, archs):
    """The build as (output, inputs, command words): one edge per file, and one for the link."""
    common = ["-O3", "-std=c++17"]
    host = ["-fPIC", "-fvisibility=hidden", *openmp, *CXXFLAGS]
    compile_cpp = [*cxx, *common, "-Wall", *host]
    files = sources("*.cpp")
    link = [*cxx, *SHARED, *host, *LDFLAGS]
    if nvcc:
        files += sources("*.cu")
        compile_cuda = nvcc_command(nvcc, archs, cxx, common, host)
        # A static cudart lets the module be imported where no CUDA is installed.
        link = [*compile_cuda, *SHARED, "-cudart=static", *through_nvcc(LDFLAGS)]
    objects = []
    for file in files:
        words = compile_cuda if file.endswith(".cu") else compile_cpp
        if "bindings" in file:
            words = words + binding_flags(cxx, nvcc, archs)
        target = f"{OUT}/{Path(file).name}.o"
        objects.append(target)
        yield target, [file], [*words, "-MMD", "-MF", f"{target}.d", "-c"]
    yield OUT / "_C.so", objects, link


def run_ninja(edges):
    """Run the edges with ninja and print its output; True if the module was built."""
    text = ""
    for target, inputs, words in edges:
        text += f"build {target}: run {' '.join(inputs)}\n  words = {typed(words)}\n"
    (OUT / "build.ninja").write_text(NINJA_RULE + text.replace("$", "$$"))
    jobs = os.environ.get("MAX_JOBS")
    options = [f"-j{jobs}"] if jobs else []
    status, output = run(sys.executable, "-m", "ninja", "-f", f"{OUT}/build.ninja", *options)
    print(output)
    return status == 0


class Build(build_ext):
    """build_ext that answers every failure with a smaller build."""

    def build_extension(self, extension):
        OUT.mkdir(parents=True, exist_ok=True)
        module = Path(self.get_ext_fullpath(extension.name))
        module.unlink(missing_ok=True)  # an earlier module must not be packed as this build's
        cxx, openmp, cpu_line = find_cxx()
        nvcc, archs = None, []
        gpu_line = "CUDA: needs a C++ compiler first"
        built = False
        if cxx:
            nvcc, archs, gpu_line = find_nvcc()
            built = run_ninja(build_edges(cxx, openmp, nvcc, archs))
        if nvcc and not built:
            gpu_line += "; it failed (see its message above), therefore CPU only"
            built = run_ninja(build_edges(cxx, openmp, None, []))
        if built:
            module.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(OUT / "_C.so", module)
            summary = "the compiled extension is built."
        else:
            summary = "no compiled extension; plain PyTorch does the work. "
            summary += "To try again: pip install -e ."
            if cxx:
                cpu_line += "; it failed on csrc/ (see its message above)"
        for line in (summary, cpu_line, gpu_line):
            print(f"crate_mini: {line}", flush=True)


headers = sources("*.h", "*.cuh", "*.cu")
module = Extension("crate_mini._C", sources("*.cpp"), depends=headers, optional=True)
setup(ext_modules=[module], cmdclass={"build_ext": Build})

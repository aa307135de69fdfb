"""What setup.py does where something is missing, and what the package says about what it finds.

The builds are of a module of three lines, in a folder of their own: the subject is setup.py, and the real
kernels are compiled by the install that runs these tests. Each case is an install that failed somebody once.
"""

import importlib.machinery
import importlib.metadata
import os
import shlex
import shutil
import subprocess
import sys
import tarfile

import pytest
from building import ROOT, build, copy_package, needs_compiler, needs_nvcc

from crate_mini._stamp import source_stamp

SOURCES = {
    "kernels.h": "int twice(int);\nint device_error();\n",
    "twice_cpu.cpp": '#include "kernels.h"\nint twice(int x) { return 2 * x; }\n',
    "device_cuda.cu": '#include "kernels.h"\n'
    "__global__ void nothing() {}\n"
    "int device_error() { nothing<<<1, 1>>>(); return cudaGetLastError(); }\n",
    "bindings.cpp": r"""
        #include <Python.h>
        #include "kernels.h"
        static PyObject* f(PyObject*, PyObject*) {
          int openmp = 0, cuda = -1;
        #ifdef _OPENMP
          openmp = 1;
        #endif
        #ifdef CRATE_CUDA
          cuda = device_error();
        #endif
          return Py_BuildValue("{s:i,s:i,s:i,s:s,s:s}", "two", twice(1), "openmp", openmp, "cuda", cuda,
                               "stamp", CRATE_STAMP, "archs", CRATE_ARCHS);
        }
        static PyMethodDef methods[] = {{"f", f, METH_NOARGS, ""}, {}};
        static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "", -1, methods};
        PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
        """,
}
pytestmark = needs_compiler


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A copy of the package with the toy sources; its path has a space in it, as home folders do."""
    folder = copy_package(tmp_path_factory.mktemp("build") / "with space")
    (folder / "csrc").mkdir()
    for name, text in SOURCES.items():
        (folder / "csrc" / name).write_text(text)
    return folder


def ask(folder):
    """What the module of that folder says, in a new process."""
    script = "from crate_mini import _C; print(_C.f())"
    return eval(subprocess.check_output([sys.executable, "-c", script], cwd=folder, text=True))


def summary(said):
    """The three lines that setup.py ends with."""
    lines = [line for line in said.splitlines() if line.startswith("crate_mini: ")]
    assert len(lines) == 3, said
    return lines


def compiler_without(folder, flag):
    """A compiler that refuses a flag, as Apple's refuses -fopenmp."""
    script = folder / "cxx"
    script.write_text(
        f'#!/bin/sh\nfor word; do [ "$word" = {flag} ] && exit 1; done\nexec c++ "$@"\n'
    )
    script.chmod(0o755)
    return shlex.quote(str(script))


def test_a_build_carries_its_stamp(toy):
    module, said = build(toy)
    built, cpp, cuda = summary(said)
    assert module and "is built" in built and "OpenMP" in cpp and "switched off" in cuda
    facts = ask(toy)
    assert facts["two"] == 2 and facts["stamp"] == source_stamp(toy) and facts["archs"] == ""
    (toy / "csrc" / "kernels.h").write_text(SOURCES["kernels.h"] + "// edited\n")
    assert facts["stamp"] != source_stamp(toy), "an edit must make the binary stale"
    (toy / "csrc" / "kernels.h").write_text(SOURCES["kernels.h"])


def test_headers_are_tracked(toy):
    """A second build compiles nothing but after an edit of a header what includes it."""
    build(toy)
    assert "twice_cpu" not in build(toy)[1]
    (toy / "csrc" / "kernels.h").write_text(SOURCES["kernels.h"] + "// edited\n")
    try:
        assert "-c csrc/twice_cpu.cpp" in build(toy, MAX_JOBS="1")[1]
    finally:
        (toy / "csrc" / "kernels.h").write_text(SOURCES["kernels.h"])


@pytest.mark.parametrize("compiler", ["false", "/nowhere/g++"])
def test_without_a_compiler_the_install_still_works(toy, compiler):
    module, said = build(toy, CXX=compiler)
    built, cpp, cuda = summary(said)
    assert module is None and "plain PyTorch" in built and "pip install -e ." in built
    assert "no working compiler" in cpp and compiler in cpp and "CUDA" in cuda


def test_nothing_on_the_path(toy):
    module, said = build(toy, PATH="/nowhere", CUDA_HOME="/nowhere")
    assert module is None and "no working compiler" in said


def test_a_failing_build_leaves_no_old_module_to_be_packed(toy):
    """A wheel must not carry the module of an earlier, successful build."""
    assert build(toy)[0]
    (toy / "csrc" / "broken_cpu.cpp").write_text("int broken( {\n")
    try:
        module, said = build(toy)
    finally:
        (toy / "csrc" / "broken_cpu.cpp").unlink()
    assert module is None and "failed on csrc/" in said and "error" in said
    assert not [p for p in (toy / "build").rglob("_C*") if "ninja" not in str(p)]


def test_without_openmp_one_thread(toy):
    module, said = build(toy, CXX=compiler_without(toy, "-fopenmp"))
    assert module and "no OpenMP, therefore one thread" in said and ask(toy)["openmp"] == 0


def test_without_nvcc_cpu_only(toy):
    module, said = build(toy, CRATE_CUDA_ARCHS="80", CUDA_HOME="/nowhere")
    assert (
        module
        and "no nvcc (/nowhere/bin/nvcc), therefore CPU only" in said
        and ask(toy)["cuda"] == -1
    )


@needs_nvcc
def test_cuda_is_built_without_a_gpu_and_imports_without_one(toy):
    """No visible device, static cudart: the module loads, and a launch returns an error instead of dying."""
    module, said = build(toy, CRATE_CUDA_ARCHS="sm_80,90a", CUDA_VISIBLE_DEVICES="")
    assert module and "sm_80 sm_90a" in summary(said)[2]
    facts = ask(toy)
    assert facts["archs"] == "80 90a" and facts["cuda"] >= 0
    if shutil.which("ldd"):
        assert "libcudart" not in subprocess.check_output(["ldd", str(module)], text=True)


@needs_nvcc
def test_a_failing_nvcc_leaves_the_cpu(toy):
    module, said = build(toy, CRATE_CUDA_ARCHS="13")
    assert module and "therefore CPU only" in summary(said)[2] and ask(toy)["cuda"] == -1


def test_torch_is_not_needed(toy):
    """Neither to build (pip's isolation has none) nor as a build requirement (a second torch would come)."""
    (toy / "torch.py").write_text("raise ImportError('torch must not be imported by the build')\n")
    try:
        assert build(toy)[0]
    finally:
        (toy / "torch.py").unlink()
    requires = (ROOT / "pyproject.toml").read_text().split("requires = [")[1].split("]")[0]
    assert "pybind11" in requires and "ninja" in requires and "torch" not in requires


def test_a_source_archive_holds_the_sources(toy):
    subprocess.check_output(
        [sys.executable, "setup.py", "-q", "sdist"], cwd=toy, stderr=subprocess.STDOUT
    )
    [path] = (toy / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", *(f"csrc/{name}" for name in SOURCES)} <= names


# ---- what the package says about the module it finds -----------------------------------------------------


def backend(folder, **environment):
    """ops.backend() in a copy of the package, in a process that cannot fall back on an editable install."""
    script = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in repr(f)]\n"
        "from crate_mini import ops; print(*ops.backend(), sep='|')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        text=True,
        capture_output=True,
        env={**os.environ, "CRATE_BACKEND": "auto", **environment},
    )
    return (done.stdout + done.stderr).strip()


@pytest.fixture
def installed(tmp_path, extension):
    """A copy of the checkout's package with its compiled module and sources."""
    skip = shutil.ignore_patterns("__pycache__", "*.tiktoken")
    shutil.copytree(ROOT / "crate_mini", tmp_path / "crate_mini", ignore=skip)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(ROOT / "setup.py", tmp_path)
    return tmp_path


def test_a_stale_module_is_not_used(installed):
    assert "older than its sources" not in backend(installed)
    with open(installed / "csrc" / "kernels.h", "a") as file:
        file.write("// edited after the build\n")
    told = backend(installed)
    assert (
        told.startswith("reference|")
        and "older than its sources" in told
        and "pip install -e ." in told
    )
    assert "UserError" in backend(installed, CRATE_BACKEND="fused")


def test_an_installed_wheel_has_no_sources_to_compare_with(installed):
    shutil.rmtree(installed / "csrc")
    assert "older than its sources" not in backend(installed)


@pytest.mark.parametrize("how", ["of another Python", "damaged", "absent"])
def test_a_module_that_cannot_be_imported(installed, how):
    [module] = (installed / "crate_mini").glob("_C*")
    if how == "of another Python":
        module.rename(module.with_name("_C.cpython-399-" + module.name.split("-", 2)[-1]))
    elif how == "damaged":
        module.write_bytes(b"no module")
    else:
        module.unlink()
    told = backend(installed)
    assert (
        told.startswith("reference|")
        and "cannot be imported" in told
        and "pip install -e ." in told
    )


def test_the_install_that_runs_these_tests(extension):
    """The real module: for this Python, with its sources' stamp, complete."""
    info = extension.build_info()
    assert info["compilers"] and set(info) == {"stamp", "compilers", "archs", "openmp", "cuda"}
    assert any(extension.__file__.endswith(s) for s in importlib.machinery.EXTENSION_SUFFIXES)
    assert bool(info["archs"]) == info["cuda"]


def test_extras_and_requirements_are_declared():
    """What pip is told: torch at run time, and no extra needed by the package itself."""
    try:
        requires = importlib.metadata.requires("crate_mini")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("crate_mini is imported from a folder, not installed")
    plain = {
        r.split(";")[0].strip().split("<")[0].split(">")[0] for r in requires if "extra ==" not in r
    }
    assert plain == {"torch", "numpy", "tiktoken", "matplotlib"}

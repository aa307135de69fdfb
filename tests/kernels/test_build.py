"""What setup.py does where something is missing, and what the package reports about its module.

The builds are of a module of a few lines in a folder of their own: the subject is setup.py, and the
real kernels are compiled by the install that runs these tests. Every case is an install that once
failed for somebody.
"""

import importlib.machinery
import importlib.metadata
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile

import pytest
import setuptools
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
          return Py_BuildValue("{s:i,s:i,s:i,s:s,s:s}", "two", twice(1), "openmp", openmp,
                               "cuda", cuda, "stamp", CRATE_STAMP, "archs", CRATE_ARCHS);
        }
        static PyMethodDef methods[] = {{"f", f, METH_NOARGS, ""}, {}};
        static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "", -1, methods};
        PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
        """,
}
pytestmark = needs_compiler


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A copy of the package with the toy sources; its path contains a space, as homes may."""
    folder = copy_package(tmp_path_factory.mktemp("build") / "with space")
    (folder / "csrc").mkdir()
    for name, text in SOURCES.items():
        (folder / "csrc" / name).write_text(text)
    return folder


@pytest.fixture
def edited_header(toy):
    """A function that edits kernels.h; the edit is undone after the test."""
    header = toy / "csrc" / "kernels.h"

    def edit():
        header.write_text(SOURCES["kernels.h"] + "// edited\n")

    yield edit
    header.write_text(SOURCES["kernels.h"])


def facts(folder):
    """What the module of that folder returns, in a new process."""
    script = "from crate_mini import _C; print(_C.f())"
    return eval(subprocess.check_output([sys.executable, "-c", script], cwd=folder, text=True))


def summary(output):
    """The three lines that setup.py ends with."""
    lines = [line for line in output.splitlines() if line.startswith("crate_mini: ")]
    assert len(lines) == 3, output
    return lines


def compiler_without(folder, flag):
    """A compiler that refuses a flag, as Apple's refuses -fopenmp."""
    script = folder / "cxx"
    script.write_text(
        f'#!/bin/sh\nfor word; do [ "$word" = {flag} ] && exit 1; done\nexec c++ "$@"\n'
    )
    script.chmod(0o755)
    return shlex.quote(str(script))


def test_a_build_carries_its_stamp(toy, edited_header):
    module, output = build(toy)
    built, cpp, cuda = summary(output)
    assert module and "is built" in built and "OpenMP" in cpp and "switched off" in cuda
    known = facts(toy)
    assert known["two"] == 2 and known["archs"] == ""
    assert known["stamp"] == source_stamp(toy)
    edited_header()
    assert known["stamp"] != source_stamp(toy), "an edit must make the module stale"


def test_headers_are_tracked(toy, edited_header):
    """A second build compiles nothing, except what includes an edited header."""
    build(toy)
    assert "twice_cpu" not in build(toy)[1]
    edited_header()
    assert "-c csrc/twice_cpu.cpp" in build(toy, MAX_JOBS="1")[1]


@pytest.mark.parametrize("compiler", ["false", "/nowhere/g++"])
def test_without_a_compiler_the_install_still_works(toy, compiler):
    module, output = build(toy, CXX=compiler)
    built, cpp, cuda = summary(output)
    assert module is None and "plain PyTorch" in built and "pip install -e ." in built
    assert "no working compiler" in cpp and compiler in cpp and "CUDA" in cuda


def test_nothing_on_the_path(toy):
    module, output = build(toy, PATH="/nowhere", CUDA_HOME="/nowhere")
    assert module is None and "no working compiler" in output


def test_a_failing_build_leaves_no_old_module_to_be_packed(toy):
    """A wheel must not carry the module of an earlier, successful build."""
    assert build(toy)[0]
    (toy / "csrc" / "broken_cpu.cpp").write_text("int broken( {\n")
    try:
        module, output = build(toy)
    finally:
        (toy / "csrc" / "broken_cpu.cpp").unlink()
    assert module is None and "failed on csrc/" in output and "error" in output
    assert not [p for p in (toy / "build").rglob("_C*") if "ninja" not in str(p)]


def test_without_openmp_one_thread(toy):
    module, output = build(toy, CXX=compiler_without(toy, "-fopenmp"))
    assert module and "no OpenMP, therefore one thread" in output
    assert facts(toy)["openmp"] == 0


def test_without_nvcc_cpu_only(toy):
    module, output = build(toy, CRATE_CUDA_ARCHS="80", CUDA_HOME="/nowhere")
    assert module and "no nvcc (/nowhere/bin/nvcc), therefore CPU only" in output
    assert facts(toy)["cuda"] == -1


@needs_nvcc
def test_cuda_is_built_without_a_gpu_and_imports_without_one(toy):
    """No visible device, static cudart: the module loads, and a launch returns an error."""
    module, output = build(toy, CRATE_CUDA_ARCHS="sm_80,90a", CUDA_VISIBLE_DEVICES="")
    assert module and "sm_80 sm_90a" in summary(output)[2]
    known = facts(toy)
    assert known["archs"] == "80 90a" and known["cuda"] >= 0
    if shutil.which("ldd"):
        assert "libcudart" not in subprocess.check_output(["ldd", str(module)], text=True)


@pytest.fixture
def setup_names(toy, monkeypatch):
    """What setup.py defines, without a build."""
    monkeypatch.chdir(toy)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(toy / "setup.py"))


def ptx(targets):
    """The architectures that PTX is made of."""
    return [flag.split("code=compute_")[1] for flag in targets if "code=compute_" in flag]


@pytest.mark.parametrize(
    "archs, expected",
    [
        ("75 80 90a 120", ["75", "80", "120"]),
        ("80", ["80"]),
        ("90a", ["90"]),
        ("90a 100a", ["100"]),
        ("80 90a", ["80"]),
    ],
)
def test_newer_gpus_get_ptx_that_they_may_run(archs, expected, setup_names):
    """PTX of 90a would run on a Hopper alone."""
    targets = setup_names["gpu_targets"](archs.split())
    assert ptx(targets) == expected
    for arch in archs.split():
        assert f"-gencode=arch=compute_{arch},code=sm_{arch}" in targets


@pytest.mark.parametrize(
    "known, expected",
    [
        ("75 80 90a 120", ["75", "80", "90a", "120"]),
        ("75 80", ["75", "80"]),
        ("50", []),
    ],
)
def test_what_an_old_nvcc_does_not_know_is_left_out(
    known, expected, toy, setup_names, tmp_path, monkeypatch
):
    patterns = "|".join(f"*compute_{arch},*" for arch in known.split())
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\ncase $2 in {patterns}) exit 0;; esac\nexit 1\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("CRATE_CUDA_ARCHS", raising=False)
    found, archs, line = setup_names["find_nvcc"]()
    assert archs == expected and bool(found) == bool(expected)
    assert ("therefore CPU only" in line) == (not expected)
    monkeypatch.setenv("CRATE_CUDA_ARCHS", "120")
    assert setup_names["find_nvcc"]()[1] == ["120"], "what is asked for is tried"


@pytest.mark.parametrize("on_windows", [False, True])
def test_a_command_survives_ninja_and_the_shell_of_the_system(setup_names, on_windows):
    """Windows has no POSIX quotes: a program there reads what list2cmdline writes."""
    words = [r"C:\Program Files\g++.exe", '-DCRATE_COMPILERS="g++ (x) 12.2"', "-O3", "it's"]
    typed = setup_names["typed"]
    typed.__globals__["ON_WINDOWS"] = on_windows
    line = typed(words)
    if on_windows:
        assert line.startswith('"C:\\Program Files\\g++.exe" ') and "'it" not in line
        assert r'"-DCRATE_COMPILERS=\"g++ (x) 12.2\""' in line
    else:
        assert shlex.split(line) == words


def test_a_program_that_cannot_run_is_a_failure_with_a_reason(setup_names):
    status, output = setup_names["run"]("no such program", "a b")
    assert status and "no such program" in output
    code = "import sys; print(sys.argv[1], file=sys.stderr); sys.exit(3)"
    assert setup_names["run"](sys.executable, "-c", code, "a 'b\" $c") == (3, "a 'b\" $c")


@needs_nvcc
def test_this_nvcc_knows_the_default_architectures(setup_names, monkeypatch):
    monkeypatch.delenv("CRATE_CUDA_ARCHS", raising=False)
    _, archs, line = setup_names["find_nvcc"]()
    if "V13" in line or "_13" in line:
        assert archs == setup_names["ARCHS"].split()
    assert set(archs) <= set(setup_names["ARCHS"].split()) and "80" in archs


@needs_nvcc
def test_a_failing_nvcc_leaves_the_cpu(toy):
    module, output = build(toy, CRATE_CUDA_ARCHS="13")
    assert module and "therefore CPU only" in summary(output)[2]
    assert facts(toy)["cuda"] == -1


def test_torch_is_not_needed(toy):
    """Not to build, in pip's isolation, and not as a build requirement: pip would install two."""
    (toy / "torch.py").write_text("raise ImportError('torch must not be imported by the build')\n")
    try:
        assert build(toy)[0]
    finally:
        (toy / "torch.py").unlink()
    requires = (ROOT / "pyproject.toml").read_text().split("requires = [")[1].split("]")[0]
    assert "pybind11" in requires and "ninja" in requires and "torch" not in requires


def test_a_source_archive_holds_the_sources(toy):
    command = [sys.executable, "setup.py", "-q", "sdist"]
    subprocess.check_output(command, cwd=toy, stderr=subprocess.STDOUT)
    [path] = (toy / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", *(f"csrc/{name}" for name in SOURCES)} <= names


# ---- what the package reports about the module it finds ------------------------------------------


def backend(folder, **environment):
    """ops.backend() in a copy of the package, without falling back on an editable install."""
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
    message = backend(installed)
    assert message.startswith("reference|")
    assert "older than its sources" in message and "pip install -e ." in message
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
    message = backend(installed)
    assert message.startswith("reference|")
    assert "cannot be imported" in message and "pip install -e ." in message


def test_the_install_that_runs_these_tests(extension):
    """The real module: for this Python, with its sources' stamp, complete."""
    info = extension.build_info()
    assert info["compilers"] and set(info) == {"stamp", "compilers", "archs", "openmp", "cuda"}
    assert any(extension.__file__.endswith(s) for s in importlib.machinery.EXTENSION_SUFFIXES)
    assert bool(info["archs"]) == info["cuda"]


def test_extras_and_requirements_are_declared():
    """What pip learns: torch at run time, and that the package itself needs no extra."""
    try:
        requires = importlib.metadata.requires("crate_mini")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("crate_mini is imported from a folder, not installed")
    names = set()
    for requirement in requires:
        if "extra ==" not in requirement:
            names.add(requirement.split(";")[0].strip().split("<")[0].split(">")[0])
    assert names == {"torch", "numpy", "tiktoken", "matplotlib"}

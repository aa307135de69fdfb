"""The slow builds that tests of the kernels need, made by a process of its own while others run.

A test asks for a build by a fixture of its name. pytest starts the process once it knows which
tests it will run (conftest.py), and runs the tests that need a build last, in the order of BUILDS.
"""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import building
import planted_faults
from building import ROOT
from cuda_kernels import compile_emulated

SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
TESTS = [str(ROOT / "tests" / name) for name in ("", "kernels")]

# ---- the builds: functions of an empty folder, whose results are JSON ----------------------------


def emulated(folder):
    """The CUDA kernels for the emulated device: path of the library."""
    return str(compile_emulated(folder))


def emulated_with_faults(folder):
    """The same with all CUDA_FAULTS planted, dormant."""
    planted_faults.plant(folder / "csrc", planted_faults.CUDA_FAULTS, "emu::planted == {}")
    return str(compile_emulated(folder, folder / "csrc"))


def module_with_faults(folder):
    """The compiled module with all CPU_FAULTS planted; module.plant(number) wakes one."""
    csrc = building.copy_package(folder) / "csrc"
    planted_faults.plant(csrc, planted_faults.CPU_FAULTS.values(), "planted_fault == {}")
    declaration = "inline int planted_fault = 0;\n"
    planted_faults.replace_once(csrc / "kernels.h", "enum Dtype", f"{declaration}enum Dtype")
    binding = 'm.def("plant", [](int number) { planted_fault = number; });\n  '
    original = 'm.def("build_info"'
    planted_faults.replace_once(csrc / "bindings.cpp", original, binding + original)
    module, output = building.build(folder, CXXFLAGS="-O1")
    assert module, output
    return str(module)


def sanitized_emulation(folder):
    """Every CUDA kernel, emulated under AddressSanitizer and UBSan: (exit code, output)."""
    library = compile_emulated(folder, flags=("-O0", *SANITIZE))
    script = (
        "import sys\n"
        "from cuda_cases import run_everything\n"
        "from cuda_kernels import EmulatedKernels\n"
        "device = EmulatedKernels(sys.argv[1])\n"
        "run_everything(device, 0, (9, 7, 17))\n"  # with tails
        "run_everything(device, 1, (33, 16, 40))\n"  # with 16-byte accesses
        "print('clean')"
    )
    return run_sanitized("g++", [sys.executable, "-c", script, str(library)])


def sanitized_kernel_tests(folder):
    """The tests of the CPU kernels under both sanitizers: (exit code, output).

    Guards are off, so that the sanitizers see the edges of tensors.
    """
    building.copy_package(folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    module, output = building.build(folder, CXXFLAGS=" ".join([*SANITIZE, "-O1 -g1"]))
    assert module, output
    options = ["-p", "no:cacheprovider", "--workers=1", "--hypothesis-profile=brief"]
    options += ["-k", "not naive"]
    command = [sys.executable, "-m", "pytest", *options, "tests/kernels/test_kernels.py"]
    environment = {"CRATE_TEST_MODULE": str(module), "CRATE_GUARD": "0"}
    return run_sanitized(building.CXX, command, **environment)


def run_sanitized(compiler, command, **environment):
    """Run a command with the sanitizers' libraries loaded first."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={
            **os.environ,
            "LD_PRELOAD": " ".join(building.sanitizer_runtimes(compiler)),
            "ASAN_OPTIONS": "detect_leaks=0",
            "PYTHONPATH": os.pathsep.join([*TESTS, str(ROOT)]),
            **environment,
        },
    )
    return done.returncode, done.stdout


def nvcc_reports(folder):
    """What nvcc reports of each kernel for the default architectures: [(exit code, output)]."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in building.gpu_archs()]
    options = ["-O3", "-std=c++17", *targets, "-Xptxas=-v", "-fatbin"]
    jobs = []
    for file in sorted((ROOT / "csrc").glob("*.cu")):
        command = [building.NVCC, *options, str(file), "-o", str(folder / f"{file.name}.fatbin")]
        jobs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    outputs = [job.communicate()[1] for job in jobs]
    return [(job.returncode, output) for job, output in zip(jobs, outputs)]


BUILDS = {
    f.__name__: f
    for f in (
        emulated,
        module_with_faults,
        emulated_with_faults,
        nvcc_reports,
        sanitized_emulation,
        sanitized_kernel_tests,
    )
}


# ---- the process that makes them -----------------------------------------------------------------

folder = None  # of the builds of this pytest session
process = None
lifeline = None  # the reading end of a pipe, which the process closes by ending


def needed(item):
    """Names of the builds that a test item asks for, by a fixture or through a parameter."""
    names = set(getattr(item, "fixturenames", ()))
    if hasattr(item, "callspec"):
        names |= {value for value in item.callspec.params.values() if isinstance(value, str)}
    return [name for name in BUILDS if name in names]


def order(item):
    """Sort key of test items: those without a build first, the others by the last they need."""
    names = needed(item)
    return 1 + list(BUILDS).index(names[-1]) if names else 0


def start(items):
    """Start the process, if the selected tests need any build."""
    global folder, process, lifeline
    wanted = {name for item in items for name in needed(item)}
    names = [name for name in BUILDS if name in wanted]
    if names:
        folder = Path(tempfile.mkdtemp(prefix="builds-"))
        lifeline, held = os.pipe()
        process = make_in_background(folder, names, held)
        os.close(held)


def make_in_background(folder, names, held):
    """The process, with `held` open until it ends."""
    command = [sys.executable, __file__, str(folder), *names]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*TESTS, str(ROOT)])}
    with open(folder / "log", "w") as log:
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
            pass_fds=[held],
        )


def still_running():
    """Whether the process makes builds; known to each process of the tests, not to its parent."""
    return not select.select([lifeline], [], [], 0)[0]


def result(name):
    """The result of a build, as soon as it is there; fails with the error of a failed build."""
    path = folder / f"{name}.json"
    while not path.exists():
        assert still_running() or path.exists(), (
            f"the process of the builds died, see {folder / 'log'}"
        )
        time.sleep(0.05)
    outcome = json.loads(path.read_text())
    assert "error" not in outcome, outcome["error"]
    return outcome["result"]


def stop():
    """End the process, if it still runs, with the compilers it started; remove the builds."""
    global folder, process
    if process is not None:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)
        folder = process = None


def main(folder, names):
    os.nice(3)  # the tests that run meanwhile go first
    for name in names:
        subfolder = folder / name
        subfolder.mkdir()
        try:
            outcome = {"result": BUILDS[name](subfolder)}
        except Exception:
            outcome = {"error": traceback.format_exc()}
        unfinished = folder / f"{name}.tmp"
        unfinished.write_text(json.dumps(outcome))
        unfinished.rename(folder / f"{name}.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

"""The tests tested: kernels with a deliberate bug must fail them; kernels under sanitizers must pass them.

A planted fault changes one line of a copy of csrc/: (file, the text as it stands, the text with the bug). One
build holds them all, a number says which is awake. The kernel test named with a fault must notice it, in
a version that has it; with all faults asleep every one of these tests passes.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_kernels
from building import ROOT, build, copy_package, needs_compiler
from conftest import load_extension
from hypothesis import Phase, given, settings

pytestmark = needs_compiler
FAULTS = {  # name: (noticed by, version, file, right, wrong with PLANTED for its condition)
    "an odd last row is forgotten": (
        "test_ista_forward",
        "baseline",
        "vector_cpu.h",
        "if (i < M) tile<",
        "if (i < M && !PLANTED) tile<",
    ),
    "no threshold": (
        "test_ista_step",
        "baseline",
        "vector_cpu.h",
        "f.shift ? P::get",
        "f.shift && !PLANTED ? P::get",
    ),
    "ReLU turns NaN into zero": (
        "test_an_odd_value_spoils_its_row_only",
        "baseline",
        "vector_cpu.h",
        "(v < V{}) ? V{} : v",
        "(PLANTED ? ~(v >= V{}) : v < V{}) ? V{} : v",
    ),
    "gradients pass where no code was": (
        "test_ista_backward",
        "baseline",
        "vector_cpu.h",
        "if (f.mask) v =",
        "if (f.mask && !PLANTED) v =",
    ),
    "a long sum forgets its earlier slabs": (
        "test_ista_backward_of_many_rows",
        "baseline",
        "ista_cpu.cpp",
        "wide_base = first ?",
        "wide_base = first || PLANTED ?",
    ),
    "rows and columns swapped": (
        "test_mssa_project",
        "baseline",
        "mssa_cpu.cpp",
        "d, U, 1, d, packed)",
        "d, U, PLANTED ? d : 1, PLANTED ? 1 : d, packed)",
    ),
    "LayerNorm without eps": (
        "test_mssa_project",
        "baseline",
        "rows_cpu.h",
        "+ Acc<T>(eps))",
        "+ Acc<T>(eps * !PLANTED))",
    ),
    "one element written too far": (
        "test_ista_forward",
        "baseline",
        "vector_cpu.h",
        "i < n; i++) lower(lanes[i], p[i])",
        "i < n + PLANTED; i++) lower(lanes[i], p[i])",
    ),
    "one element read too far": (
        "test_mssa_project",
        "baseline",
        "vector_cpu.h",
        "i < n; i++) lanes[i] = lift(p[i])",
        "i < n + PLANTED; i++) lanes[i] = lift(p[i])",
    ),
    "small codes are not decoded": (
        "test_ista_decode",
        "baseline",
        "rows_cpu.h",
        "if (A[i] == 0) continue",
        "if (A[i] * A[i] <= 0.01f * PLANTED) continue",
    ),
    "the threshold's gradient has the wrong sign": (
        "test_ista_backward",
        "baseline",
        "ista_cpu.cpp",
        "-= Acc<T>(column[j])",
        "-= (PLANTED ? -1 : 1) * Acc<T>(column[j])",
    ),
    "the odd last of bf16 pairs is forgotten": (
        "test_ista_forward",
        "avx512_bf16",
        "vector_cpu.h",
        "if (K % 2) pair_step",
        "if (K % 2 && !PLANTED) pair_step",
    ),
    "the slower version forgets the base": (
        "test_ista_step",
        "naive",
        "product_cpu.cpp",
        "if (f.base) v +=",
        "if (f.base && !PLANTED) v +=",
    ),
}


@pytest.fixture(scope="session")
def faulty(tmp_path_factory):
    """The module with every fault, and a function `plant(number)`: 0 none."""
    folder = copy_package(tmp_path_factory.mktemp("faulty") / "copy")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    changes = [
        (file, right, wrong.replace("PLANTED", f"(planted_fault == {number})"))
        for number, (_, _, file, right, wrong) in enumerate(FAULTS.values(), 1)
    ]
    changes += [
        ("kernels.h", "enum Dtype", "inline int planted_fault = 0;\nenum Dtype"),
        (
            "bindings.cpp",
            'm.def("build_info"',
            'm.def("plant", [](int number) { planted_fault = number; });\n  m.def("build_info"',
        ),
    ]
    for file, right, wrong in changes:
        text = (folder / "csrc" / file).read_text()
        assert text.count(right) == 1, (
            f"{right!r} occurs {text.count(right)} times in {file}: adapt FAULTS"
        )
        (folder / "csrc" / file).write_text(text.replace(right, wrong))
    module, said = build(folder)
    assert module, said
    return load_extension(module)


def run(test, module):
    """A property test of test_kernels on this module: fixed examples, until the first failure."""
    test = getattr(test_kernels, test).hypothesis
    quick = settings(
        settings.get_profile("ci"), phases=[Phase.generate], report_multiple_bugs=False
    )
    quick(given(**test._given_kwargs)(test.inner_test))(kernels=module)


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_noticed(name, faulty):
    test, version, *_ = FAULTS[name]
    if not faulty.use_isa(version):
        pytest.skip(f"this processor has no {version}")
    faulty.plant(0)
    run(test, faulty)
    faulty.plant(1 + list(FAULTS).index(name))
    with pytest.raises(AssertionError):
        run(test, faulty)


def test_sanitizers(tmp_path):
    """AddressSanitizer and UBSan watch a run of the kernel tests; guards are off, so that they see edges."""
    compiler = os.environ.get("CXX", "c++")
    runtimes = [
        subprocess.run(
            [compiler, f"-print-file-name={name}.so"], capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan", "libubsan")
    ]
    if not all(os.path.isabs(path) and Path(path).exists() for path in runtimes):
        pytest.skip("this compiler has no sanitizers")
    folder = copy_package(tmp_path / "copy")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    module, said = build(
        folder, CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -O1 -g1"
    )
    assert module, said
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "--hypothesis-profile=brief",
            "tests/test_kernels.py",
            "-k",
            "not naive",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "CRATE_TEST_MODULE": str(module),
            "CRATE_GUARD": "0",
            "LD_PRELOAD": " ".join(runtimes),
            "ASAN_OPTIONS": "detect_leaks=0",
        },
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]

"""The tests tested: kernels with a deliberate bug must fail them, kernels under sanitizers pass."""

import functools

import attention_properties
import background_builds
import kernel_properties
import pytest
from building import CXX, needs_compiler, sanitizer_runtimes
from compiled import load_extension
from guarded_kernels import CpuKernels, NaiveKernels
from hypothesis import Phase, given, settings
from planted_faults import CPU_FAULTS

pytestmark = needs_compiler
PROPERTIES = {**vars(kernel_properties), **vars(attention_properties)}


@pytest.fixture(scope="session")
def module_with_faults():
    return load_extension(background_builds.result("module_with_faults"))


def check(name, module, version):
    """A property on its fixed examples, until the first failure."""
    kernels = NaiveKernels(module) if version == "naive" else CpuKernels(module)
    check = PROPERTIES[name].hypothesis
    phases = dict(phases=[Phase.generate], report_multiple_bugs=False)
    quick = settings(settings.get_profile("ci"), **phases)
    quick(given(**check._given_kwargs)(check.inner_test))(kernels=kernels)


@functools.cache
def check_with_all_faults_asleep(name, module, version):
    module.plant(0)
    check(name, module, version)


@pytest.mark.parametrize("name", CPU_FAULTS)
def test_a_planted_fault_is_noticed(name, module_with_faults):
    fault, module = CPU_FAULTS[name], module_with_faults
    if fault.version != "naive" and not module.use_isa(fault.version):
        pytest.skip(f"this processor has no {fault.version}")
    check_with_all_faults_asleep(fault.property, module, fault.version)
    module.plant(1 + list(CPU_FAULTS).index(name))
    with pytest.raises(AssertionError):
        check(fault.property, module, fault.version)


@pytest.fixture(scope="session")
def sanitized_kernel_tests():
    if not sanitizer_runtimes(CXX):
        pytest.skip("this compiler has no sanitizers")
    return background_builds.result("sanitized_kernel_tests")


def test_sanitizers_find_nothing(sanitized_kernel_tests):
    """AddressSanitizer and UBSan watch a run of test_kernels.py."""
    code, output = sanitized_kernel_tests
    assert code == 0, output[-4000:]
    assert " passed" in output

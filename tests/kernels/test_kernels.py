"""Every CPU kernel, in every version that runs on this machine, against reference.py."""

import attention_properties
import kernel_properties
import pytest
import torch
from guarded_kernels import CpuKernels, NaiveKernels

INSTRUCTION_SETS = ["baseline", "avx2", "avx512", "avx512_bf16"]
pytestmark = pytest.mark.fuzz


@pytest.fixture
def use_isa(extension):
    """A function that makes the module use an instruction set, in this test only."""

    def use(name):
        if not extension.use_isa(name):
            pytest.skip(f"this processor has no {name}")
        return CpuKernels(extension)

    yield use
    extension.use_isa(extension.isa_names().split()[-1])


@pytest.fixture(params=INSTRUCTION_SETS)
def fast_kernels(request, use_isa):
    return use_isa(request.param)


@pytest.fixture(params=["naive", *INSTRUCTION_SETS])
def kernels(request, extension, use_isa):
    """The ISTA kernels; only these have a naive version."""
    return NaiveKernels(extension) if request.param == "naive" else use_isa(request.param)


def test_ista_forward(kernels):
    kernel_properties.ista_forward(kernels)


def test_ista_backward(kernels):
    kernel_properties.ista_backward(kernels)


@pytest.mark.parametrize("separate_decoder", [False, True])
@pytest.mark.parametrize("lam_is_a_tensor", [False, True])
@pytest.mark.parametrize("steps", [1, 2])
def test_ista_with_every_kind_of_argument(kernels, steps, lam_is_a_tensor, separate_decoder):
    for dtype, gy, ga in [(torch.float32, True, False), (torch.bfloat16, False, True)]:
        p = kernel_properties.Problem(dtype, steps, 0.5, 0.1, (50, 33, 70), 2, seed=0)
        p.add(separate_decoder, lam_is_a_tensor, gy, ga)
        kernel_properties.check_forward(kernels, p, trail=ga)
        kernel_properties.check_backward(kernels, p)


def test_ista_backward_of_many_rows(kernels):
    kernel_properties.ista_backward_of_many_rows(kernels)


def test_bf16_is_rounded_to_nearest_even(fast_kernels):
    kernel_properties.bf16_is_rounded_to_nearest_even(fast_kernels)


def test_threads_and_repetition_change_no_bit(kernels):
    kernel_properties.threads_and_repetition_change_no_bit(kernels)


def test_a_non_finite_value_spoils_only_its_row(kernels):
    kernel_properties.a_non_finite_value_spoils_only_its_row(kernels)


def test_ista_decode(fast_kernels):
    kernel_properties.ista_decode(fast_kernels)


def test_mssa_project(fast_kernels):
    kernel_properties.mssa_project(fast_kernels)


def test_attention(fast_kernels):
    attention_properties.attention(fast_kernels)


def test_attention_with_extreme_scores(fast_kernels):
    attention_properties.attention_with_extreme_scores(fast_kernels)


def test_later_tokens_change_no_bit_of_attention(fast_kernels):
    attention_properties.later_tokens_change_no_bit(fast_kernels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_over_a_long_context(fast_kernels, dtype):
    attention_properties.check_a_long_context(fast_kernels, dtype)


def test_top_k(fast_kernels):
    kernel_properties.top_k(fast_kernels)


def test_head(fast_kernels):
    kernel_properties.head(fast_kernels)


def test_head_of_many_rows(fast_kernels):
    kernel_properties.head_of_many_rows(fast_kernels)


@pytest.fixture
def fastest_kernels(extension):
    """In one instruction set, for what all share: slabs, padding, the layout of wide matrices."""
    return CpuKernels(extension)


def test_ista_with_many_codes(fastest_kernels):
    kernel_properties.ista_with_many_codes(fastest_kernels)


def test_ista_of_a_wide_stream(fastest_kernels):
    kernel_properties.ista_of_a_wide_stream(fastest_kernels)


def test_mssa_project_of_many_rows(fastest_kernels):
    kernel_properties.mssa_project_of_many_rows(fastest_kernels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mssa_project_of_a_wide_stream(fastest_kernels, dtype):
    p = kernel_properties.Problem(dtype, 1, 0.1, 0.1, (2, 1025, 1), 1, seed=0)
    kernel_properties.check_mssa(fastest_kernels, p, "own", True, 0.0, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_the_head_passes_on_what_is_not_finite(fast_kernels, odd, dtype):
    """To the loss, to the row's gradient and to W's; the gradients of other rows stay finite."""
    x, W = torch.ones(100, 8, dtype=dtype), torch.ones(40, 8, dtype=dtype)
    x[7, 3] = odd
    loss, gx, gW = fast_kernels.head(x, W, torch.arange(100) % 40)
    assert loss.isnan() and gW.isnan().all()
    assert gx.isnan().all(1).nonzero().flatten().tolist() == [7]

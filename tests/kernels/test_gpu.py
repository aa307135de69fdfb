"""What only a GPU can show; skipped without one. `python -m pytest -m gpu` runs this file and, on the device,
the fuzz of test_cuda_emulated.py: every kernel, version, dtype and shape against the equations.

Then, for what results cannot show (`pip install -e .` first, so that the module is current):

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1     # every tensor its own allocation: its ends are then seen
    for tool in memcheck racecheck initcheck synccheck; do
        compute-sanitizer --tool $tool --error-exitcode 1 python -m pytest -m gpu \\
            -k "ista or mssa or training" tests/test_cuda_emulated.py tests/test_gpu.py
    done
"""

import pytest
import torch
from conftest import assert_close
from cuda_kernels import DTYPES
from test_cuda_emulated import ista_gradients, mssa_equation, mssa_gradients

from crate_mini import ops, reference
from crate_mini.model import LM, Config

pytestmark = pytest.mark.gpu
SHAPES = [(8192, 128, 512), (4096, 384, 1536), (2048, 768, 3072), (3001, 100, 400), (1, 768, 3072)]


@pytest.fixture(autouse=True)
def cuda_kernels():
    """All tests here run on kernels of ours, or fail: a build without CUDA must not pass by falling back."""
    from crate_mini import fused

    assert fused._C and fused._C.build_info()["cuda"], (
        "no CUDA kernels in this build: pip install -e ."
    )
    with ops.use_backend("fused"):
        yield


def normal(*shape, seed, dtype=torch.float32, scale=1.0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(dtype).cuda()


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("N, d, h", SHAPES)
def test_real_sizes(N, d, h, dtype):
    """The shapes of the bench, where large tiles and splits are chosen by the constants that ship."""
    x, D = normal(N, d, seed=0, dtype=dtype), normal(d, h, seed=1, dtype=dtype, scale=d**-0.5)
    gy, ga = normal(N, d, seed=2, dtype=dtype), normal(N, h, seed=3, dtype=dtype)
    y, a, codes, residuals = torch.ops.crate_mini.ista(x, D, None, None, 0.5, 0.1, 2, True)
    assert_close((y, a), lambda x, D: reference.ista(x, D, 0.5, 0.1, 2), x, D, names=("y", "a"))
    got = torch.ops.crate_mini.ista_backward(gy, ga, x, D, None, a, codes, residuals, 0.5, 2, False)
    assert_close(
        got[:2],
        lambda *t: ista_gradients(*t, 0.5, True),
        gy,
        ga,
        x,
        D,
        D,
        a,
        codes,
        residuals,
        names=("gx", "gD"),
    )
    z, weight, bias = normal(N, d, seed=4) + 1, 1 + normal(d, seed=5), normal(d, seed=6)
    U, gu = normal(d, d, seed=7, dtype=dtype, scale=d**-0.5), normal(N, d, seed=8, dtype=dtype)
    assert_close(
        (torch.ops.crate_mini.mssa_project(z, weight, bias, U, 1, 1e-5).flatten(-2),),
        lambda *t: (mssa_equation(*t),),
        z,
        weight,
        bias,
        U,
    )
    got = torch.ops.crate_mini.mssa_project_backward(gu.unsqueeze(1), z, weight, bias, U, 1e-5)
    assert_close(
        got, mssa_gradients, gu, z, weight, bias, U, names=("gz", "gweight", "gbias", "gU")
    )


def test_runs_repeat_to_the_bit():
    x, D = (
        normal(5000, 128, seed=0, dtype=torch.bfloat16),
        normal(128, 512, seed=1, dtype=torch.bfloat16),
    )
    x.requires_grad_(), D.requires_grad_()

    def run():
        y, a = ops.ista(x, D, 0.01, 0.1, 2)
        return y, a, *torch.autograd.grad(y.float().square().sum(), (x, D))

    first = run()
    for _ in range(5):
        assert all(map(torch.equal, first, run()))


def test_more_elements_than_32_bits_count():
    """A code matrix of 2.2e9 values (4.4 GB): its last rows are as right as its first."""
    N, d, h = 2**22 + 3, 16, 520
    from crate_mini import _C

    r, D = normal(N, d, seed=0, dtype=torch.bfloat16), normal(d, h, seed=1, dtype=torch.bfloat16)
    out = torch.full((N, h), torch.nan, dtype=torch.bfloat16, device="cuda")
    for version in (2, 3):
        error = _C.ista_step_forward_cuda(
            1,
            N,
            d,
            h,
            0.5,
            0.1,
            None,
            r.data_ptr(),
            D.data_ptr(),
            None,
            out.data_ptr(),
            version,
            torch.cuda.current_stream().cuda_stream,
        )
        assert error == 0
        for rows in (slice(0, 200), slice(N // 2, N // 2 + 200), slice(N - 200, N)):
            assert_close(
                (out[rows],), lambda r, D: (reference.ista_step(None, r, D, 0.5, 0.1),), r[rows], D
            )
        out.fill_(torch.nan)


def test_another_stream():
    """Kernels queue behind what their own stream holds: on the default stream they would read too early."""
    x, D, stream = normal(512, 64, seed=0), normal(64, 256, seed=1), torch.cuda.Stream()
    want, late = ops.ista(x, D, 0.1, 0.1, 2), torch.full_like(x, torch.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about a tenth of a second of the GPU's clock
        late.copy_(x)
        got = ops.ista(late, D, 0.1, 0.1, 2)
    torch.cuda.synchronize()
    assert all(map(torch.equal, got, want))


def test_cuda_graph():
    """Captured once, replayed on new data."""
    D, x, new = normal(64, 256, seed=1), normal(512, 64, seed=0), normal(512, 64, seed=2)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ops.ista(x, D, 0.1, 0.1, 2)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.ista(x, D, 0.1, 0.1, 2)
    want = ops.ista(new, D, 0.1, 0.1, 2)
    x.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, got, want))


def tiny(seed=0):
    torch.manual_seed(seed)
    return LM(Config(vocab_size=257, block_size=64, n_layer=2, n_head=4, n_embd=64)).cuda()


def losses(model, steps, dtype):
    """Of `steps` AdamW steps on fixed random tokens."""
    ids = torch.randint(257, (steps, 4, 65), generator=torch.Generator().manual_seed(0)).cuda()
    optimizer, out = torch.optim.AdamW(model.parameters(), 1e-3), []
    for batch in ids:
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss = model(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        out.append(loss.item())
    return torch.tensor(out)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_model(mode):
    """torch.compile, in reduce-overhead with CUDA graphs, trains as the eager model does."""
    want = losses(tiny(), 8, torch.bfloat16)
    got = losses(torch.compile(tiny(), mode=mode, fullgraph=True), 8, torch.bfloat16)
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_training_agrees_with_the_reference(dtype):
    """20 steps from one seed on either backend: rounding apart, the same losses."""
    got = losses(tiny(), 20, dtype)
    with ops.use_backend("reference"):
        want = losses(tiny(), 20, dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_generation_skips_zero_codes_and_changes_nothing():
    """Greedy decoding on ista_decode writes the tokens that the reference writes (float32: no near ties)."""
    model = tiny().eval()
    prompt = torch.tensor([[1, 2, 3]], device="cuda")
    got = model.generate(prompt, 20, temperature=0)
    with ops.use_backend("reference"):
        assert torch.equal(got, model.generate(prompt, 20, temperature=0))

"""What only a GPU can show; skipped without one.

`python -m pytest -m gpu` runs this file and, on the device, the fuzz of test_cuda_emulated.py:
every kernel, version, dtype and shape against the equations. Then, for what results cannot show
(first `pip install -e .`, so that the module is current):

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1   # each tensor its own allocation, to see its ends
    for tool in memcheck racecheck initcheck synccheck; do
        compute-sanitizer --tool $tool --error-exitcode 1 python -m pytest -m gpu \\
            -k "(ista or mssa or training) and not real_sizes" \\
            tests/kernels/test_cuda_emulated.py tests/kernels/test_gpu.py
    done
"""

from functools import partial

import pytest
import torch
from closeness import assert_close
from cuda_kernels import DTYPES
from equations import ista_gradients, mssa_equation, mssa_gradients

from crate_mini import fused, ops, reference
from crate_mini.generate import generate
from crate_mini.model import LM, Config

pytestmark = pytest.mark.gpu
SHAPES = [(8192, 128, 512), (4096, 384, 1536), (2048, 768, 3072), (3001, 100, 400), (1, 768, 3072)]


@pytest.fixture(autouse=True)
def kernels():
    """All tests here run our kernels or fail: without CUDA kernels none may pass on PyTorch's."""
    built = fused._C and fused._C.build_info()["cuda"]
    assert built, "no CUDA kernels in this build: pip install -e ."
    with ops.use_backend("fused"):
        yield torch.ops.crate_kernels


def normal(*shape, seed, dtype=torch.float32, scale=1.0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(dtype).cuda()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, d, h", SHAPES)
def test_ista_at_real_sizes(kernels, N, d, h, dtype):
    """The shapes of the benchmark, where the constants that ship choose large tiles and splits."""
    x, D = normal(N, d, seed=0, dtype=dtype), normal(d, h, seed=1, dtype=dtype, scale=d**-0.5)
    gy, ga = normal(N, d, seed=2, dtype=dtype), normal(N, h, seed=3, dtype=dtype)
    y, *kept = kernels.ista(x, D, None, None, 0.5, 0.1, 2, True)
    equation = partial(reference.ista, eta=0.5, lam=0.1, steps=2)
    assert_close((y, kept[0]), equation, x, D, names=("y", "a"))
    gx, gD, *_ = kernels.ista_backward(x, D, None, None, *kept, gy, ga, 0.5, 2)
    equation, inputs = partial(ista_gradients, eta=0.5), (gy, ga, x, D, None, *kept)
    assert_close((gx, gD), equation, *inputs, names=("gx", "gD"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, d", [(N, d) for N, d, _ in SHAPES])
def test_mssa_at_real_sizes(kernels, N, d, dtype):
    z = normal(N, d, seed=4) + 1
    weight, bias = 1 + normal(d, seed=5), normal(d, seed=6)
    U, gu = normal(d, d, seed=7, dtype=dtype, scale=d**-0.5), normal(N, d, seed=8, dtype=dtype)
    parameters = weight, bias, U
    u = kernels.mssa_project(z, *parameters, 1, 1e-5).flatten(-2)

    def equation(*inputs):
        return [mssa_equation(*inputs)]

    assert_close([u], equation, z, *parameters)
    gradients = kernels.mssa_project_backward(z, *parameters, gu.unsqueeze(1), 1e-5)
    names = ("gz", "gweight", "gbias", "gU")
    assert_close(gradients, mssa_gradients, gu, z, *parameters, names=names)


def test_runs_repeat_to_the_bit():
    x = normal(5000, 128, seed=0, dtype=torch.bfloat16).requires_grad_()
    D = normal(128, 512, seed=1, dtype=torch.bfloat16).requires_grad_()

    def run():
        y, a = ops.ista(x, D, 0.01, 0.1, 2)
        return y, a, *torch.autograd.grad(y.float().square().sum(), (x, D))

    first = run()
    for _ in range(5):
        assert all(map(torch.equal, first, run()))


def test_more_elements_than_32_bits_count():
    """A code matrix of 2.2e9 values (4.4 GB): its last rows are as right as its first."""
    N, bf16 = 2**22 + 3, torch.bfloat16
    d, h = 16, 520
    x, D = normal(N, d, seed=0, dtype=bf16), normal(d, h, seed=1, dtype=bf16)
    y, a = (torch.full((N, n), torch.nan, dtype=bf16, device="cuda") for n in (d, h))
    pointers = [x.data_ptr(), D.data_ptr(), None, None, y.data_ptr(), a.data_ptr(), None, None]
    stream = torch.cuda.current_stream().cuda_stream
    equation = partial(reference.ista, eta=0.5, lam=0.1, steps=1)
    for version in (2, 3):
        workspace = None  # a single step needs none
        arguments = 1, N, d, h, 1, 0.5, 0.1, *pointers, workspace, version, stream
        assert fused._C.ista_forward_cuda(*arguments) == 0
        for rows in (slice(0, 200), slice(N // 2, N // 2 + 200), slice(N - 200, N)):
            assert_close((y[rows], a[rows]), equation, x[rows], D)
        y.fill_(torch.nan)
        a.fill_(torch.nan)


def test_another_stream():
    """Kernels queue behind the work of their own stream; on another they would read too early."""
    x, D = normal(512, 64, seed=0), normal(64, 256, seed=1)
    stream = torch.cuda.Stream()
    expected, late = ops.ista(x, D, 0.1, 0.1, 2), torch.full_like(x, torch.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about a tenth of a second of the GPU's clock
        late.copy_(x)
        results = ops.ista(late, D, 0.1, 0.1, 2)
    torch.cuda.synchronize()
    assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_graph(dtype):
    """Captured once, replayed on new data: v2 in float32, v3 in bf16."""
    D = normal(64, 256, seed=1, dtype=dtype)
    x, new = (normal(512, 64, seed=seed, dtype=dtype) for seed in (0, 2))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ops.ista(x, D, 0.1, 0.1, 2)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = ops.ista(x, D, 0.1, 0.1, 2)
    expected = ops.ista(new, D, 0.1, 0.1, 2)
    x.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, results, expected))


def tiny(seed=0):
    torch.manual_seed(seed)
    return LM(Config(vocab_size=257, block_size=64, n_layer=2, n_head=4, n_embd=64)).cuda()


def losses(model, steps, dtype):
    """The losses of AdamW steps on fixed random tokens."""
    ids = torch.randint(257, (steps, 4, 65), generator=torch.Generator().manual_seed(0)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    values = []
    for batch in ids:
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss = model(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return torch.tensor(values)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_model(mode):
    """torch.compile, with CUDA graphs in reduce-overhead, trains as the eager model does."""
    expected = losses(tiny(), 8, torch.bfloat16)
    compiled = torch.compile(tiny(), mode=mode, fullgraph=True)
    values = losses(compiled, 8, torch.bfloat16)
    torch.testing.assert_close(values, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_agrees_with_the_reference(dtype):
    """20 steps from one seed on either backend: the same losses, up to rounding."""
    values = losses(tiny(), 20, dtype)
    with ops.use_backend("reference"):
        expected = losses(tiny(), 20, dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(values, expected, rtol=tolerance, atol=tolerance)


def test_generation_skips_zero_codes_and_changes_nothing():
    """Greedy decoding with ista_decode writes the reference's tokens (float32: no near ties)."""
    model = tiny().eval()
    prompt = torch.tensor([[1, 2, 3]], device="cuda")
    ids = generate(model, prompt, 20, temperature=0)
    with ops.use_backend("reference"):
        assert torch.equal(ids, generate(model, prompt, 20, temperature=0))

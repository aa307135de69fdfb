"""The head: cross-entropy and its gradients, whatever the chunk and the backend."""

from types import SimpleNamespace

import pytest
import torch
from closeness import assert_close
from forked import run_script
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from crate_mini import loss, ops, reference

HEAD_OF_800_ROWS = """
import resource, torch
from crate_mini import loss, ops
x, W, ids = torch.zeros(800, 128), torch.zeros(50304, 128), torch.zeros(800, dtype=torch.int64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with ops.use_backend("fused"):
    loss.cross_entropy(x.requires_grad_(), W, ids).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)  # KB
"""


def loss_and_gradients(cross_entropy, x, W, targets, scale=1.0):
    x = x.clone().requires_grad_()
    W = W.clone().requires_grad_()
    value = cross_entropy(x, W, targets)
    (scale * value).backward()
    return value, x.grad, W.grad


def both_backends():
    return pytest.mark.parametrize("backend", ["fused", "reference"])


@given(
    n=st.integers(1, 70),
    V=st.sampled_from([2, 33, 700]),
    chunk=st.sampled_from([1, 64, 2**20]),
    spread=st.sampled_from([0.1, 1.0, 60.0]),
    seed=st.integers(0, 99),
)
def test_the_chunked_head_equals_cross_entropy(n, V, chunk, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, generator=generator) * spread
    W = torch.randn(V, 8, generator=generator)
    targets = torch.randint(V, (n,), generator=generator)
    with pytest.MonkeyPatch.context() as patch, ops.use_backend("reference"):
        patch.setitem(loss.CHUNK, "cpu", chunk)
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-5)):
            arguments = (x.to(dtype), W.to(dtype), targets, 3)
            ours = loss_and_gradients(loss.cross_entropy, *arguments)
            expected = loss_and_gradients(reference.cross_entropy, *arguments)
            close = dict(rtol=tolerance, atol=tolerance * spread)
            for value, wanted in zip(ours, expected):
                torch.testing.assert_close(value, wanted, **close)


@both_backends()
def test_under_autocast_the_head_errs_at_most_twice_as_much_as_pytorch(extension, backend):
    torch.manual_seed(0)
    x = torch.randn(300, 32)
    W = torch.randn(999, 32) * 0.3
    targets = torch.randint(999, (300,))
    exact = loss_and_gradients(reference.cross_entropy, x.double(), W.double(), targets)
    with torch.autocast("cpu", torch.bfloat16), ops.use_backend(backend):
        ours = loss_and_gradients(loss.cross_entropy, x, W, targets)
        plain = loss_and_gradients(reference.cross_entropy, x, W, targets)
    for i in (1, 2):  # the gradients
        error = (ours[i] - exact[i]).norm()
        legitimate = (plain[i] - exact[i]).norm()
        assert error <= 2 * legitimate


class Large(TorchDispatchMode):
    """Counts the results of a size that are not written to memory already there."""

    def __init__(self, size):
        super().__init__()
        self.size = size
        self.addresses = []

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        result = function(*arguments, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() == self.size:
            self.addresses.append(result.untyped_storage().data_ptr())
        return result


@pytest.mark.parametrize("dtype, n", [(torch.float32, 2), (torch.bfloat16, 3)])
def test_a_chunk_takes_few_matrices_of_logits(dtype, n, monkeypatch):
    """The product and its logarithms of probabilities, in bf16 also the product in float32.

    The gradient takes the place of one of them.
    """
    monkeypatch.setitem(loss.CHUNK, "cpu", 32 * 50)
    x, W = torch.randn(32, 8).to(dtype), torch.randn(50, 8).to(dtype)
    results = loss.head_results(x, W, None, dtype, True)
    with Large(32 * 50) as large:
        loss._in_chunks(x, W, torch.arange(32), *results)
    assert len(set(large.addresses)) == n


@pytest.mark.parametrize("V", [256, 4096, 50304, 10**7])
def test_chunks_on_a_gpu_fill_whole_tiles(V):
    rows = loss.chunk_rows(V, "cuda")
    assert rows % 256 == 0 and rows >= 256
    assert rows * V <= loss.CHUNK["cuda"] or rows == 256


@both_backends()
@pytest.mark.parametrize("ignored", [0.0, 0.5, 1.0])
def test_ignored_targets_count_as_little_as_in_pytorch(extension, backend, ignored):
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(2, 35, 8, generator=generator), torch.randn(33, 8, generator=generator)
    targets = torch.randint(33, (2, 35), generator=generator)
    targets[torch.rand(2, 35, generator=generator) < ignored] = loss.IGNORED

    def equation(x, W):
        return loss_and_gradients(reference.cross_entropy, x, W, targets)

    with ops.use_backend(backend):
        results = loss_and_gradients(loss.cross_entropy, x, W, targets)
    assert_close(results, equation, x, W)
    assert results[0].isnan() == (ignored == 1)


@both_backends()
def test_gradcheck_of_the_head(extension, backend):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64).requires_grad_()
    W = torch.randn(7, 3, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.tensor([0, 6, loss.IGNORED, 2, 2])
    with ops.use_backend(backend):
        assert torch.autograd.gradcheck(loss.cross_entropy, (x, W, targets))


@both_backends()
def test_compile_takes_the_head_as_one_graph(extension, backend):
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(70, 8, generator=generator), torch.randn(33, 8, generator=generator)
    targets = torch.randint(33, (70,), generator=generator)
    compiled = torch.compile(loss.cross_entropy, fullgraph=True, backend="aot_eager")
    with ops.use_backend(backend):
        results = loss_and_gradients(compiled, x, W, targets)
        expected = loss_and_gradients(loss.cross_entropy, x, W, targets)
    torch.testing.assert_close(results, expected)


@pytest.fixture
def graphs(monkeypatch):
    """The names of the operations in each graph that `compiled` makes, on this CPU as on a GPU."""
    monkeypatch.setitem(loss.CHUNK, "cpu", 32 * 33)
    monkeypatch.setattr(loss, "VISIBLE", ("cpu",))
    torch.compiler.reset()
    yield []
    torch.compiler.reset()


def compiled(graphs):
    """The compiled head, any graph break being an error."""

    def keep(module, inputs):
        graph_modules = [m for m in module.modules() if hasattr(m, "graph")]
        graphs.append([str(n.target) for m in graph_modules for n in m.graph.nodes])
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    return torch.compile(loss.cross_entropy, fullgraph=True, backend=keep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_compiler_sees_the_head_and_changes_no_bit(dtype, graphs):
    """One graph with the operations of all three chunks, and no op that it cannot look into."""
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(70, 8, generator=generator), torch.randn(33, 8, generator=generator)
    targets = torch.randint(33, (70,), generator=generator)
    targets[3] = loss.IGNORED
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with ops.use_backend("reference"), autocast:
        results = loss_and_gradients(compiled(graphs), x, W, targets)
        expected = loss_and_gradients(loss.cross_entropy, x, W, targets)
    [names] = graphs
    assert sum("log_softmax" in name for name in names) == 3
    assert not any("crate_kernels" in name for name in names)
    torch.testing.assert_close(results, expected, rtol=0, atol=0)


def test_several_processes_keep_the_head_as_one_op(graphs, monkeypatch):
    """DDP splits the graph between processes, which older versions of torch refuse otherwise."""
    monkeypatch.setattr(loss, "dist", SimpleNamespace(is_initialized=lambda: True))
    with ops.use_backend("reference"):
        compiled(graphs)(torch.ones(4, 8), torch.ones(33, 8), torch.zeros(4, dtype=torch.long))
    assert any("crate_kernels" in name for name in graphs[0])


def test_auto_leaves_few_rows_to_pytorch(extension):
    with ops.use_backend("auto"):
        if ops.backend()[0] != "fused":
            pytest.skip("no kernels are faster on this processor")
        assert ops.choose("head", torch.zeros(4096, 128)) == (torch.float32, True)
        assert ops.choose("head", torch.zeros(15, 128)) == (torch.float32, False)


def test_at_the_papers_vocabulary_the_head_takes_300_mb(extension):
    """W packed twice, exponentials and gradients; all logits of 4,096 rows would be 820 MB."""
    done = run_script(["-c", HEAD_OF_800_ROWS])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300e6 / 1024

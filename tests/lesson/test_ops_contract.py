"""What the ops promise: any layout, autocast, torch.compile, and clear errors for wrong calls."""

import functools
import math
import os
import subprocess
import sys
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import pytest
import torch
from closeness import assert_close
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from crate_mini import UserError, loss, ops, reference
from crate_mini import fused as compiled_ops
from crate_mini.model import Block, Config

ROW_OPS = ["mssa_project", "ista", "ista, one step", "ista, tied", "ista_decode", "top_k"]
NAMES = [*ROW_OPS, "attention"]


@pytest.fixture(autouse=True)
def fused(extension):
    with ops.use_backend("fused"):
        yield


def example_tensors(dtype=torch.float32, N=6, d=8, h=12):
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    wide = torch.promote_types(dtype, torch.float32)
    return dict(
        z=normal(2, N // 2, d),
        weight=normal(d).to(wide),
        bias=normal(d).to(wide),
        U=normal(d, d),
        x=normal(N, d),
        D=normal(d, h) / 4,
        decoder=normal(d, h),
        lams=normal(h).abs().to(wide),
    )


def ista_decode(*arguments):
    """ops.ista as for few rows without gradient, however many there are."""
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "DECODE_ROWS", math.inf)
        return ops.ista(*arguments)


def call(name, t, module=ops):
    """The outputs of one op on these tensors, computed by ops or by reference."""
    if name == "mssa_project":
        return [module.mssa_project(t["z"], t["weight"], t["bias"], t["U"], 2)]
    if name == "attention":
        q = t["z"].unflatten(-1, (2, -1)).transpose(1, 2)
        more = [q.shape[-1] ** -0.5] if module is reference else []
        return [module.attention(q, q.flip(-2), q, *more).transpose(1, 2)]
    if name == "top_k":
        return [module.top_k(t["x"], 3)]
    if name == "ista, one step":
        lams = t["lams"]
        if module is reference:  # which adds it to codes of the dtype that is computed in
            lams = lams.to(ops._compute_dtype(t["x"]))
        return module.ista(t["x"], t["D"], 0.3, lams, 1, t["decoder"])
    decoder = None if name == "ista, tied" else t["decoder"]
    ista = ista_decode if name == "ista_decode" and module is ops else module.ista
    return ista(t["x"], t["D"], 0.3, 0.1, 2, decoder)


# ---- layouts -------------------------------------------------------------------------------------


def transposed(t):
    return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t


def sliced(t):
    big = torch.full([n + 3 for n in t.shape], float("nan"), dtype=t.dtype)
    view = big[tuple(slice(1, 1 + n) for n in t.shape)]
    return view.copy_(t)


def strided(t):
    big = torch.full((*t.shape, 2), float("nan"), dtype=t.dtype)
    return big[..., 1].copy_(t)


def expanded(t):
    return t[:1].expand(t.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [transposed, sliced, strided, expanded])
@pytest.mark.parametrize("name", NAMES)
def test_layouts(name, layout, dtype):
    """Strided inputs give the same bits as contiguous copies, and are not written to."""
    views = {k: layout(t) for k, t in example_tensors(dtype).items()}
    before = {k: t.clone() for k, t in views.items()}
    results = call(name, views)
    expected = call(name, {k: t.contiguous() for k, t in views.items()})
    assert all(map(torch.equal, results, expected))
    assert all(t.is_contiguous() for t in results)
    assert all(torch.equal(views[k], before[k]) for k in views)


def tensors_named_by_callers():
    """Addresses of the tensors in local variables of the calling frames, alone or in a list."""
    frame, addresses = sys._getframe(1), set()
    while frame:
        for value in frame.f_locals.values():
            values = value if isinstance(value, (tuple, list)) else [value]
            addresses |= {v.data_ptr() for v in values if type(v) is torch.Tensor}
        frame = frame.f_back
    return addresses


@pytest.mark.parametrize("name", NAMES)
def test_copies_live_while_a_kernel_reads_them(name, monkeypatch):
    """Every address that a kernel receives belongs to a tensor that some calling frame names.

    From Python 3.12 on only that keeps the contiguous copy of a strided input alive until the
    kernel has read it.
    """
    module, unnamed = compiled_ops._C, []

    def inspected(kernel, *arguments):
        named = tensors_named_by_callers()
        pointers = [a for a in arguments if isinstance(a, int) and a > 2**32]
        unnamed.append([pointer for pointer in pointers if pointer not in named])
        return getattr(module, kernel)(*arguments)

    class Inspected:
        def __getattr__(self, name):
            if name.endswith("_cpu"):
                return functools.partial(inspected, name)
            return getattr(module, name)

    views = {k: strided(t) for k, t in example_tensors().items()}
    monkeypatch.setattr(compiled_ops, "_C", Inspected())
    call(name, views)
    assert unnamed and not any(unnamed)


@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 3), (2, 0, 3), (1, 2, 3, 2)])
@pytest.mark.parametrize("name", ROW_OPS)
def test_any_leading_shape(name, lead):
    t = example_tensors()
    t["z"] = t["x"] = torch.randn(*lead, 8, generator=torch.Generator().manual_seed(1))

    def equation(*values):
        return call(name, dict(zip(t, values)), reference)

    assert_close(call(name, t), equation, *t.values())


# ---- PyTorch's own contract ----------------------------------------------------------------------


ids = torch.tensor([3, -100, 0, 7, 3, 1])  # targets of example_tensors' x among 12 ids


def registered():
    """Each custom op with example arguments, with and without optional ones and gradients."""
    o = torch.ops.crate_kernels
    for dtype in (torch.float32, torch.bfloat16):
        for grad in (False, True):
            t = {k: v.requires_grad_(grad) for k, v in example_tensors(dtype).items()}
            z, weight, bias, U, x, D, decoder, lams = t.values()
            yield o.mssa_project, (z, weight, bias, U, 2, 1e-5)
            yield o.mssa_project, (transposed(z), weight, None, U, 4, 1e-5)
            q, k, v = (w * z.unflatten(-1, (2, 4)) for w in (1, 2, 3))
            for others in ((None, None), (k, None), (k, v), (None, v)):
                yield o.attention, (q, *others)
            yield o.attention, (q, q.transpose(2, 3).contiguous().transpose(2, 3), v)
            yield o.top_k, (x, None, 3)
            yield o.top_k, (x.detach(), transposed(2 * x), 3)
            yield o.ista, (x, D, None, None, 0.3, 0.1, 2, True)
            yield o.ista, (x, D, None, None, 0.3, 0.1, 1, True)
            yield o.ista, (x, D, decoder, None, 0.3, 0.1, 2, True)
            yield o.ista, (x, transposed(D), decoder, lams, 0.3, 0.0, 1, True)
        t = example_tensors(dtype)
        z, weight, bias, U, x, D, decoder, lams = t.values()
        u = o.mssa_project(z, weight, None, U, 2, 1e-5)
        y, *kept = o.ista(x, D, None, None, 0.3, 0.1, 3, True)
        yield o.ista, (x, D, None, None, 0.3, 0.1, 2, False)
        atoms = D.T.contiguous()
        yield o.ista_decode, (x, D, atoms, decoder.T, lams, 0.3, 0.0, 2)
        yield o.mssa_project_backward, (z, weight, None, U, u, 1e-5)
        q, k, v = u, u + 1, u - 1
        for others in ((None, None), (k, v)):
            yield o.attention_backward, (q, *others, *o.attention(q, *others), k)
        for kernel in (False, True):
            yield o.head, (x, decoder.T, ids, dtype, True, kernel)
            yield o.head, (x, decoder.T, ids, dtype, False, kernel)
        yield o.ista_backward, (x, D, None, lams, *kept, y, None, 0.3, 3)
        yield o.ista_backward, (x, D, decoder, None, *kept, None, kept[0], 0.3, 3)


def test_opcheck():
    """Schema, fake and autograd registrations agree with what the ops do."""
    for op, arguments in registered():
        torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize(
    "backend, changes",
    [
        ("inductor", dict(query_rank=2, key_shift=True)),
        ("aot_eager", dict(top_k=9, debias=True)),
        ("aot_eager", dict(attention="mhsa", sparsifier="mlp", key_shift=True, top_k=9)),
    ],
)
def test_compile_takes_a_whole_block_as_one_graph(backend, changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Config(vocab_size=8, block_size=16, n_layer=1, n_head=2, n_embd=16, **changes)
        block = Block(config)
        z = torch.randn(2, 16, 16)
        for w in block.parameters():
            torch.nn.init.normal_(w, std=0.3)

    def run(f):
        for w in block.parameters():
            w.grad = None
        out, codes = f(z)
        out.square().sum().backward()
        return [out, codes, *(w.grad for w in block.parameters())]

    try:
        results = run(torch.compile(block, fullgraph=True, backend=backend))
    except RuntimeError as error:
        if "omp.h" not in str(error):  # clang without OpenMP builds our kernels, not Inductor's
            raise
        results = run(torch.compile(block, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(results, run(block), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_autocast_casts_as_pytorch_does(name, dtype):
    t = example_tensors()
    with ops.use_backend("auto"), torch.autocast("cpu", dtype):
        results, expected = call(name, t), call(name, t, reference)
    assert [t.dtype for t in results] == [t.dtype for t in expected]
    torch.testing.assert_close(list(results), list(expected), rtol=0.05, atol=0.05)


def test_the_gradient_of_codes_is_absent_not_zeros():
    """A matrix of zeros as large as the codes would be the largest thing that backward reads."""
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            calls.append((str(f), args))
            return f(*args, **(kwargs or {}))

    t = example_tensors()
    y, a = ops.ista(t["x"].requires_grad_(), t["D"], 0.3, 0.1, 2)
    with Record():
        y.sum().backward()
    [arguments] = [args for name, args in calls if name.startswith("crate_kernels.ista_backward")]
    gy, ga = arguments[7:9]
    assert gy is not None and ga is None


def test_decoding_notices_that_a_weight_changed():
    """Its cached transpose must follow in-place updates, whatever makes them."""
    t = example_tensors()
    D = torch.nn.Parameter(t["D"])
    optimizer = torch.optim.AdamW([D], lr=0.1, fused=True)
    D.grad = torch.ones_like(D)
    doubled, ones = functools.partial(D.mul_, 2), functools.partial(D.copy_, torch.ones_like(D))
    changes = [doubled, optimizer.step, ones]
    for change in changes:
        ista_decode(t["x"], D, 0.3, 0.1, 2)
        with torch.no_grad():
            change()
            expected = reference.ista(t["x"], D, 0.3, 0.1, 2)
        torch.testing.assert_close(ista_decode(t["x"], D, 0.3, 0.1, 2), expected)


# ---- backends ------------------------------------------------------------------------------------


def test_the_backend_can_be_chosen_and_gives_its_reason():
    assert ops.backend()[0] == "fused"
    with ops.use_backend("reference"):
        name, reason = ops.backend()
        assert name == "reference" and reason
        unknown = pytest.raises(UserError, match="fsued.*auto.*fused.*reference")
        with unknown, ops.use_backend("fsued"):
            pass
        assert ops.backend()[0] == "reference"
    assert ops.backend()[0] == "fused"


@pytest.mark.parametrize(
    "shape, dtypes",
    [
        ((16, 4, 256, 32), ["bfloat16", "float32"]),
        ((8, 4, 128, 8), ["bfloat16", "float32"]),
        ((4, 4, 64, 32), ["bfloat16"]),
        ((1, 4, 16, 32), []),  # the overhead of a call decides
    ],
)
def test_auto_takes_the_attention_kernels_where_they_are_faster(shape, dtypes, monkeypatch):
    monkeypatch.setattr(ops, "_faster", ops.FASTER["avx512_bf16"])
    fast = []
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        q = torch.empty(shape, dtype=dtype)
        with ops.use_backend("auto"):
            if ops._runs_fused("attention", q, dtype):
                fast.append(str(dtype).removeprefix("torch."))
            assert not ops._runs_fused("attention", q.to("meta"), dtype)
    assert fast == dtypes


def test_auto_takes_the_top_k_kernel_in_its_types_for_more_than_few_rows():
    with ops.use_backend("auto"):
        if ops.backend()[0] != "fused":
            pytest.skip("no kernels are faster on this processor")
        taken = [
            (rows, dtype)
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
            for rows in (1, 15, 16, 4096)
            if ops._runs_fused("top_k", torch.empty(rows, 512, dtype=dtype), dtype)
        ]
    assert taken == [(n, t) for t in (torch.float32, torch.bfloat16) for n in (16, 4096)]


def test_auto_takes_the_projection_where_it_is_faster(monkeypatch):
    monkeypatch.setattr(ops, "_faster", ops.FASTER["avx512_bf16"])
    taken = {}
    with ops.use_backend("auto"):
        for dtype in (torch.float32, torch.bfloat16):
            shapes = [(2048, 128), (512, 768), (1024, 128), (4096, 64), (16, 768)]
            z = [torch.empty(shape, dtype=dtype) for shape in shapes]
            taken[dtype] = [ops._runs_fused("mssa_project", t, dtype) for t in z]
    assert not any(taken[torch.bfloat16])
    assert taken[torch.float32] == [True, True, False, False, False]


@pytest.mark.parametrize("mode", ["auto", "fused", "reference"])
@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
def test_the_name_is_of_what_runs_on_the_device(kind, built, mode, monkeypatch):
    """As _runs_fused decides it: `auto` leaves a GPU to PyTorch, and only CUDA has kernels."""
    monkeypatch.setattr(ops, "_has_cuda", built)
    place = dict(device=torch.device(kind), is_cuda=kind == "cuda")
    x = SimpleNamespace(**place, shape=(4096, 128), dim=lambda: 2)
    with ops.use_backend(mode):
        name, reason = ops.backend(kind)
        assert (name == "fused") == ops._runs_fused("ista", x, torch.float32)
    if kind == "cuda":  # `auto` takes no kernel there before one was measured
        assert (name == "fused") == (built and mode == "fused")
    assert ("CUDA" in reason) == (kind == "cuda" and name == "fused")
    if kind != "cpu" and mode != "reference":
        assert name == "fused" or reason.startswith(f"plain PyTorch on {kind}: ")
        assert ("no kernels" in reason) == (kind == "mps" or not built)


@pytest.mark.parametrize(
    "mode, output", [("reference", "reference"), ("fused", "fused"), ("fast", "UserError")]
)
def test_the_environment_chooses(mode, output):
    script = (
        "from crate_mini import UserError, ops\n"
        "try: print(ops.backend()[0])\n"
        "except UserError as e: print('UserError', e)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "CRATE_BACKEND": mode},
        capture_output=True,
        text=True,
        cwd=os.path.dirname(os.path.dirname(ops.__file__)),
    )
    assert done.stdout.startswith(output), done.stdout + done.stderr


# ---- wrong calls ---------------------------------------------------------------------------------

t = example_tensors()
z, weight, bias, U, x, D, decoder, lams = t.values()
heads = z.unflatten(-1, (2, 4))  # (B, K, T, p)
W = decoder.T
cross_entropy = loss.cross_entropy
WRONG = [  # op, arguments, what the sentence must name
    (cross_entropy, (x, W, ids[:5]), "targets"),
    (cross_entropy, (x, W, ids.float()), "targets"),
    (cross_entropy, (x, W, ids + 9), "12"),
    (cross_entropy, (x, W, ids - 5), "-2"),
    (cross_entropy, (x, W, None), "targets"),
    (cross_entropy, (x, W.T, ids), "W"),
    (cross_entropy, (x, torch.tensor(1.0), ids), "W"),
    (cross_entropy, (x, W[0], ids), "W"),
    (cross_entropy, (x, W[:0], ids), "W"),
    (cross_entropy, (x[0, 0], W, ids), "x"),
    (cross_entropy, (x.int(), W, ids), "x"),
    (cross_entropy, (x, W.to("meta"), ids), "W"),
    (ops.ista, (x.double(), D, 0.1, 0.1, 2), "D"),
    (ops.ista, (x, D.T, 0.1, 0.1, 2), "D"),
    (ops.ista, (x, D[0], 0.1, 0.1, 2), "D"),
    (ops.ista, (x.int(), D.int(), 0.1, 0.1, 2), "int32"),
    (ops.ista, (x.to("meta"), D, 0.1, 0.1, 2), "meta"),
    (ops.ista, (x, D.to("meta"), 0.1, 0.1, 2), "D"),
    (ops.ista, (x, None, 0.1, 0.1, 2), "D"),
    (ops.ista, ([1.0], D, 0.1, 0.1, 2), "x"),
    (ops.ista, (x, D, float("nan"), 0.1, 2), "eta"),
    (ops.ista, (x, D, float("inf"), 0.1, 2), "eta"),
    (ops.ista, (x, D, 0.1, -0.1, 2), "lam"),
    (ops.ista, (x, D, 0.1, float("nan"), 2), "lam"),
    (ops.ista, (x, D, 0.1, lams[:3], 2), "lam"),
    (ops.ista, (x, D, 0.1, 0.1, 0), "steps"),
    (ops.ista, (x, D, 0.1, 0.1, -3), "steps"),
    (ops.ista, (x, D, 0.1, 0.1, 2, decoder[:, :3]), "decoder"),
    (ops.ista, (x, D, 0.1, 0.1, 2, decoder.double()), "decoder"),
    (ops.ista, (x, D[:3], 0.1, 0.1, 1), "D"),
    (ops.ista, (torch.tensor(1.0), D, 0.1, 0.1, 2), "x"),
    (ops.ista, (x[:1], D, 0.1, 0.1, 2, decoder.T), "decoder"),
    (ops.mssa_project, (z, weight, bias, U, 3), "n_head"),
    (ops.mssa_project, (z, weight, bias, U, 0), "n_head"),
    (ops.mssa_project, (z, weight[:3], bias, U, 2), "weight"),
    (ops.mssa_project, (z, weight, bias[:3], U, 2), "bias"),
    (ops.mssa_project, (z, weight, bias, U[:3], 2), "U"),
    (ops.mssa_project, (z, weight, bias, U, 2, -1.0), "eps"),
    (ops.mssa_project, (z.bfloat16(), weight, bias, U, 2), "U"),
    (ops.mssa_project, (z, weight.int(), bias, U, 2), "weight"),
    (ops.mssa_project, (z, weight, bias, U, 2.0), "n_head"),
    (ops.mssa_project, (z, weight, bias, U.to_sparse(), 2), "U"),
    (ops.mssa_project, (z, weight, None, None, 2), "U"),
    (ops.ista, (x, D, "x", 0.1, 2), "eta"),
    (ops.ista, (x, D, 0.1, None, 2), "lam"),
    (ops.ista, (x, D, 0.1, lams.int(), 2), "lam"),
    (ops.ista, (x, D, 0.1, lams.to("meta"), 2), "lam"),
    (ops.ista, (x, D, 0.1, 0.1, 2.5), "steps"),
    (ops.ista, (x, D, 0.1, 0.1, 2**70), "steps"),
    (ops.ista_codes, (x, D.T, 0.1, 0.1, 2), "D"),
    (ops.ista_codes, (x, D, 0.1, 0.1, 0), "steps"),
    (ops.top_k, (x, 0), "k"),
    (ops.top_k, (x, 9), "k"),
    (ops.top_k, (x, 2.0), "k"),
    (ops.top_k, ([1.0], 1), "a"),
    (ops.attention, (heads, heads, heads[..., :3]), "v"),
    (ops.attention, (heads, heads[:, :, :1], heads), "k"),
    (ops.attention, (heads, heads.double(), heads), "k"),
    (ops.attention, (heads, heads.to("meta"), heads), "k"),
    (ops.attention, (heads.int(), heads.int(), heads.int()), "int32"),
    (ops.attention, (heads[0], heads[0], heads[0]), "q"),
    (ops.attention, ([1.0], heads, heads), "q"),
    (ops.attention, (heads, None, heads), "k"),  # the kernels would take it for q
    (ops.attention, (heads, heads, None), "v"),
]


def sentences(op, arguments):
    """What each backend says of a call, {mode: sentence}."""
    said = {}
    for mode in ("fused", "auto", "reference"):
        with ops.use_backend(mode), pytest.raises(UserError) as caught:
            op(*arguments)
        said[mode] = str(caught.value)
    return said


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_a_wrong_call_is_answered_in_one_sentence_by_every_backend(number):
    op, arguments, name = WRONG[number]
    (sentence,) = set(sentences(op, arguments).values())
    assert name in sentence and op.__name__ in sentence
    assert "\n" not in sentence and sentence.endswith(".")


def test_the_kernel_for_few_rows_refuses_many():
    rows = torch.zeros(2**17, 8)
    with pytest.raises(UserError, match="ista_decode: 131072 rows.*use ista"):
        torch.ops.crate_kernels.ista_decode(rows, D, D.T, D.T, None, 0.1, 0.1, 2)


def test_float16_is_for_pytorch_alone():
    arguments = (x.half(), D.half(), 0.1, 0.1, 2)
    with pytest.raises(UserError, match="ista: torch.float16 on cpu is not supported"):
        ops.ista(*arguments)
    for mode in ("auto", "reference"):
        with ops.use_backend(mode):
            assert ops.ista(*arguments)[0].dtype == torch.float16


def test_mixed_dtypes_that_the_kernels_take_pytorch_takes_too():
    mixed = (z, weight.bfloat16(), None, U.bfloat16(), 2)
    expected = ops.mssa_project(*mixed)
    for mode in ("auto", "reference"):
        with ops.use_backend(mode):
            u = ops.mssa_project(*mixed)
        assert u.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(u, expected, rtol=0.05, atol=0.05)


def test_no_op_takes_none_for_a_tensor_that_it_needs():
    """PyTorch lets None pass for a tensor; C would read it as a null pointer."""
    refusals = UserError, AttributeError, TypeError, NotImplementedError
    for op, arguments in registered():
        for i, argument in enumerate(op.default._schema.arguments):
            if str(argument.type) == "Tensor":
                spoiled = [*arguments[:i], None, *arguments[i + 1 :]]
                with pytest.raises(refusals):
                    op(*spoiled)


ODD = [None, 0, 1, 2, -1, 0.1, float("nan"), float("inf"), 2**31, 2**63, 2**70, "x", [], True]
DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float64,
    torch.float16,
    torch.int64,
    torch.bool,
    torch.cfloat,
]


@functools.cache
def right_calls_of_models():
    return [
        (ops.ista, (x, D, 0.1, 0.1, 2, decoder)),
        (ops.ista, (x, D, 0.1, lams, 2)),
        (ops.ista, (x, D, 0.1, 0.1, 1)),
        (ista_decode, (x, D, 0.1, 0.1, 2, decoder)),
        (ops.mssa_project, (z, weight, bias, U, 2)),
        (ops.attention, (heads, heads + 1, heads)),
        (ops.top_k, (x, 3)),
        (loss.cross_entropy, (x, W, ids)),
        (ops.ista_codes, (x, D, 0.1, 0.1, 2)),
        (ops.ista_codes, (x, D, 0.1, lams, 1, True)),
    ]


@functools.cache
def right_calls():
    return [*right_calls_of_models(), *registered()]


def on_meta(t):
    return t.to("meta")


def mirrored(t):
    return t.T if t.dim() == 2 else t


def with_grad(t):
    return t.requires_grad_() if t.is_floating_point() else t


def huge(t):
    return torch.zeros(1).expand(2**20, 2**20)  # 2^40 elements in 4 bytes


KINDS = [torch.clone, on_meta, torch.Tensor.to_sparse, mirrored, torch.conj, with_grad, huge]


def junk(draw):
    """A value that may or may not be what an op expects."""
    if draw(st.booleans()):
        return draw(st.sampled_from(ODD))
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 6, 8, 12]), max_size=4))
    kind = draw(st.sampled_from(KINDS))
    return kind(torch.ones(shape, dtype=draw(st.sampled_from(DTYPES))))


@contextmanager
def tolerating_lack_of_memory():
    """`huge` fits nowhere once it is computed with."""
    try:
        yield
    except RuntimeError as error:
        if "alloc" not in str(error) and "overflow" not in str(error):
            raise


@pytest.mark.fuzz
@given(data=st.data())
def test_wrong_calls_never_crash(data):
    """With one to three arguments spoiled, a call returns or raises; a crash would end pytest."""
    for _ in range(20):
        op, arguments = data.draw(st.sampled_from(right_calls()))
        arguments = list(arguments)
        for _ in range(data.draw(st.integers(1, 3))):
            arguments[data.draw(st.integers(0, len(arguments) - 1))] = junk(data.draw)
        with suppress(Exception):
            op(*arguments)


@pytest.mark.fuzz
@given(data=st.data())
def test_auto_and_reference_answer_every_misfit_with_a_sentence(data):
    """A call with spoiled arguments works, or its refusal is a UserError; never another error."""
    for _ in range(20):
        op, arguments = data.draw(st.sampled_from(right_calls_of_models()))
        arguments = list(arguments)
        arguments[data.draw(st.integers(0, len(arguments) - 1))] = junk(data.draw)
        mode = data.draw(st.sampled_from(["auto", "reference"]))
        with ops.use_backend(mode), suppress(UserError), tolerating_lack_of_memory():
            op(*arguments)

"""What the ops promise their callers: any layout, autocast, torch.compile, one sentence for a wrong call."""

import functools
import os
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from conftest import assert_close
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from crate_mini import UserError, ops, reference
from crate_mini import fused as extension_ops
from crate_mini.model import Block, Config

NAMES = ["mssa_project", "ista", "ista_step", "ista_decode"]


@pytest.fixture(autouse=True)
def fused(extension):
    with ops.use_backend("fused"):
        yield


def tensors(dtype=torch.float32, N=6, d=8, h=12):
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
        a=normal(N, h).relu(),
    )


def calls(t, m=ops):
    """Each op on these tensors, by ops or by reference."""
    return {
        "mssa_project": lambda: [m.mssa_project(t["z"], t["weight"], t["bias"], t["U"], 2)],
        "ista": lambda: m.ista(t["x"], t["D"], 0.3, 0.1, 2, t["decoder"]),
        "ista_step": lambda: [m.ista_step(t["a"], t["x"], t["D"], 0.3, 0.1)],
        "ista_decode": lambda: (ops.ista_decode if m is ops else m.ista)(
            t["x"], t["D"], 0.3, 0.1, 2, t["decoder"]
        ),
    }


# ---- layouts ----------------------------------------------------------------------------------------------


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
    """Strided inputs give, bit for bit, what their contiguous copies give, and are not written to."""
    views = {k: layout(t) for k, t in tensors(dtype).items()}
    before = {k: t.clone() for k, t in views.items()}
    got, want = calls(views)[name](), calls({k: t.contiguous() for k, t in views.items()})[name]()
    assert all(torch.equal(g, w) and g.is_contiguous() for g, w in zip(got, want))
    assert all(torch.equal(views[k], before[k]) for k in views)


@pytest.mark.parametrize("name", NAMES)
def test_copies_live_while_a_kernel_reads_them(name, monkeypatch):
    """Each address that a kernel gets is of a tensor which a frame above it names: from Python 3.12 on only
    that keeps the contiguous copy of a strided input alive until the kernel has read it.
    """
    real, lost = extension_ops._C, []

    def watched(kernel, *given):
        frame, named = sys._getframe(1), set()
        while frame:
            for value in frame.f_locals.values():
                values = value if isinstance(value, (tuple, list)) else [value]
                named |= {v.data_ptr() for v in values if type(v) is torch.Tensor}
            frame = frame.f_back
        lost.append([g for g in given if isinstance(g, int) and g > 2**32 and g not in named])
        return getattr(real, kernel)(*given)

    class Watched:
        def __getattr__(self, kernel):
            return (
                functools.partial(watched, kernel)
                if kernel.endswith("_cpu")
                else getattr(real, kernel)
            )

    views = {k: strided(t) for k, t in tensors().items()}
    monkeypatch.setattr(extension_ops, "_C", Watched())
    calls(views)[name]()
    assert lost and not any(lost)


@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 3), (2, 0, 3), (1, 2, 3, 2)])
@pytest.mark.parametrize("name", NAMES)
def test_any_leading_shape(name, lead):
    t = tensors()
    t["z"] = t["x"] = torch.randn(*lead, 8, generator=torch.Generator().manual_seed(1))
    t["a"] = torch.ones(*lead, 12)
    inputs = list(t.values())

    def equation(*values):
        return calls(dict(zip(t, values)), reference)[name]()

    assert_close(calls(t)[name](), equation, *inputs)


# ---- PyTorch's own contract -------------------------------------------------------------------------------


def registered():
    """Each custom op with example arguments, with and without what is optional and needs a gradient."""
    o = torch.ops.crate_mini
    for dtype in (torch.float32, torch.bfloat16):
        for grad in (False, True):
            t = {k: v.requires_grad_(grad) for k, v in tensors(dtype).items()}
            z, weight, bias, U, x, D, decoder, lams, a = t.values()
            plain = {k: v.detach() for k, v in t.items()}
            u = o.mssa_project(plain["z"], plain["weight"], None, plain["U"], 2, 1e-5)
            y, codes, trail_a, trail_r = o.ista(
                plain["x"], plain["D"], None, None, 0.3, 0.1, 3, True
            )
            yield o.mssa_project, (z, weight, bias, U, 2, 1e-5)
            yield o.mssa_project, (transposed(z), weight, None, U, 4, 1e-5)
            yield o.ista, (x, D, None, None, 0.3, 0.1, 2, True)
            yield o.ista, (x, transposed(D), decoder, lams, 0.3, 0.0, 1, True)
            yield o.ista_step, (None, x, D, None, 0.3, 0.1)
            yield o.ista_step, (a, x, D, lams, 0.3, 0.0)
            if not grad:
                yield o.ista, (x, D, None, None, 0.3, 0.1, 2, False)
                yield o.ista_decode, (x, D, D.T.contiguous(), decoder.T, lams, 0.3, 0.0, 2)
                yield o.mssa_project_backward, (u, z, weight, None, U, 1e-5)
                yield o.ista_backward, (y, None, x, D, None, codes, trail_a, trail_r, 0.3, 3, True)
                yield o.ista_step_backward, (a, a, x, D, 0.3, True, False)


def test_opcheck():
    """Schema, fake and autograd registrations agree with what the ops do."""
    for op, arguments in registered():
        torch.library.opcheck(op.default, arguments)


def test_compile_takes_a_whole_block_as_one_graph():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = Block(
            Config(vocab_size=8, block_size=16, n_layer=1, n_head=2, n_embd=16, query_rank=2)
        )
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
        got = run(torch.compile(block, fullgraph=True))
    except (
        RuntimeError
    ) as error:  # clang without OpenMP builds our kernels, but nothing of Inductor's
        if "omp.h" not in str(error):
            raise
        got = run(torch.compile(block, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(got, run(block), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wide", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_autocast_casts_as_pytorch_does(name, wide):
    t = tensors()
    t["a"] = t["a"].to(wide)
    with ops.use_backend("auto"), torch.autocast("cpu", wide):
        got, want = calls(t)[name](), calls(t, reference)[name]()
        assert [g.dtype for g in got] == [w.dtype for w in want]
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=0.05, atol=0.05)


def test_the_gradient_of_codes_is_absent_not_zeros():
    """A matrix of zeros as large as the codes would be the largest thing the backward pass reads."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            seen.append((str(f), args))
            return f(*args, **(kwargs or {}))

    t = tensors()
    y, a = ops.ista(t["x"].requires_grad_(), t["D"], 0.3, 0.1, 2)
    with Watch():
        y.sum().backward()
    [arguments] = [args for name, args in seen if name.startswith("crate_mini.ista_backward")]
    assert arguments[0] is not None and arguments[1] is None


def test_decoding_notices_that_a_weight_changed():
    """Its cached transpose must follow in-place updates, whoever makes them."""
    t = tensors()
    t["D"] = torch.nn.Parameter(t["D"])
    optimizer = torch.optim.AdamW([t["D"]], lr=0.1, fused=True)
    t["D"].grad = torch.ones_like(t["D"])
    for change in (
        lambda w: w.mul_(2),
        lambda w: optimizer.step(),
        lambda w: w.copy_(torch.ones_like(w)),
    ):
        ops.ista_decode(t["x"], t["D"], 0.3, 0.1, 2)
        with torch.no_grad():
            change(t["D"])
            want = reference.ista(t["x"], t["D"], 0.3, 0.1, 2)
        torch.testing.assert_close(ops.ista_decode(t["x"], t["D"], 0.3, 0.1, 2), want)


# ---- backends ---------------------------------------------------------------------------------------------


def test_the_backend_can_be_chosen_and_tells_why():
    assert ops.backend()[0] == "fused"
    with ops.use_backend("reference"):
        name, reason = ops.backend()
        assert name == "reference" and reason
        with (
            pytest.raises(UserError, match="fsued.*auto.*fused.*reference"),
            ops.use_backend("fsued"),
        ):
            pass
        assert ops.backend()[0] == "reference"
    assert ops.backend()[0] == "fused"


@pytest.mark.parametrize(
    "wanted, told", [("reference",) * 2, ("fused",) * 2, ("fast", "UserError")]
)
def test_the_environment_chooses(wanted, told):
    script = (
        "from crate_mini import UserError, ops\ntry: print(ops.backend()[0])\n"
        "except UserError as e: print('UserError', e)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "CRATE_BACKEND": wanted},
        capture_output=True,
        text=True,
        cwd=os.path.dirname(os.path.dirname(ops.__file__)),
    )
    assert done.stdout.startswith(told), done.stdout + done.stderr


# ---- wrong calls ------------------------------------------------------------------------------------------

t = tensors()
WRONG = [  # op, arguments, what the sentence must name
    (ops.ista, (t["x"].double(), t["D"], 0.1, 0.1, 2), "D"),
    (ops.ista, (t["x"], t["D"].T, 0.1, 0.1, 2), "D"),
    (ops.ista, (t["x"], t["D"][0], 0.1, 0.1, 2), "D"),
    (ops.ista, (t["x"].int(), t["D"].int(), 0.1, 0.1, 2), "int32"),
    (ops.ista, (t["x"].half(), t["D"].half(), 0.1, 0.1, 2), "float16"),
    (ops.ista, (t["x"].to("meta"), t["D"], 0.1, 0.1, 2), "meta"),
    (ops.ista, (t["x"], t["D"].to("meta"), 0.1, 0.1, 2), "D"),
    (ops.ista, (t["x"], None, 0.1, 0.1, 2), "D"),
    (ops.ista, ([1.0], t["D"], 0.1, 0.1, 2), "x"),
    (ops.ista, (t["x"], t["D"], float("nan"), 0.1, 2), "eta"),
    (ops.ista, (t["x"], t["D"], float("inf"), 0.1, 2), "eta"),
    (ops.ista, (t["x"], t["D"], 0.1, -0.1, 2), "lam"),
    (ops.ista, (t["x"], t["D"], 0.1, float("nan"), 2), "lam"),
    (ops.ista, (t["x"], t["D"], 0.1, t["lams"][:3], 2), "lam"),
    (ops.ista, (t["x"], t["D"], 0.1, 0.1, 0), "steps"),
    (ops.ista, (t["x"], t["D"], 0.1, 0.1, -3), "steps"),
    (ops.ista, (t["x"], t["D"], 0.1, 0.1, 2, t["decoder"][:, :3]), "decoder"),
    (ops.ista, (torch.tensor(1.0), t["D"], 0.1, 0.1, 2), "x"),
    (ops.ista_step, (t["a"][:3], t["x"], t["D"], 0.1, 0.1), "a"),
    (ops.ista_step, (t["a"].double(), t["x"], t["D"], 0.1, 0.1), "a"),
    (ops.ista_decode, (t["x"], t["D"], 0.1, 0.1, 2, t["decoder"].T), "decoder"),
    (ops.ista_decode, (torch.zeros(2**17, 8), t["D"], 0.1, 0.1, 2), "rows"),
    (ops.mssa_project, (t["z"], t["weight"], t["bias"], t["U"], 3), "n_head"),
    (ops.mssa_project, (t["z"], t["weight"], t["bias"], t["U"], 0), "n_head"),
    (ops.mssa_project, (t["z"], t["weight"][:3], t["bias"], t["U"], 2), "weight"),
    (ops.mssa_project, (t["z"], t["weight"], t["bias"][:3], t["U"], 2), "bias"),
    (ops.mssa_project, (t["z"], t["weight"], t["bias"], t["U"][:3], 2), "U"),
    (ops.mssa_project, (t["z"], t["weight"], t["bias"], t["U"], 2, -1.0), "eps"),
    (ops.mssa_project, (t["z"].bfloat16(), t["weight"], t["bias"], t["U"], 2), "U"),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_a_wrong_call_is_told_in_one_sentence(number):
    op, arguments, named = WRONG[number]
    with pytest.raises(UserError) as told:
        op(*arguments)
    sentence = str(told.value)
    assert (
        named in sentence
        and op.__name__ in sentence
        and "\n" not in sentence
        and sentence.endswith(".")
    )


ODD = [None, 0, 1, 2, -1, 0.1, float("nan"), float("inf"), 2**31, 2**63, 2**70, "x", [], True]
KINDS = {
    "dense": lambda t: t,
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "strided": lambda t: t.T if t.dim() == 2 else t,
    "conj": lambda t: t.conj(),
    "grad": lambda t: t.requires_grad_() if t.is_floating_point() else t,
    "huge": lambda t: torch.zeros(1).expand(2**20, 2**20),
}  # 2^40 elements, 4 bytes: do not walk
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
def right_calls():
    return [
        (ops.ista, (t["x"], t["D"], 0.1, 0.1, 2, t["decoder"])),
        (ops.ista, (t["x"], t["D"], 0.1, t["lams"], 2)),
        (ops.ista_step, (t["a"], t["x"], t["D"], 0.1, 0.1)),
        (ops.ista_decode, (t["x"], t["D"], 0.1, 0.1, 2, t["decoder"])),
        (ops.mssa_project, (t["z"], t["weight"], t["bias"], t["U"], 2)),
        *registered(),
    ]


def junk(draw):
    """Something that may or may not be what an op wants."""
    if draw(st.booleans()):
        return draw(st.sampled_from(ODD))
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 6, 8, 12]), max_size=4))
    return KINDS[draw(st.sampled_from(list(KINDS)))](
        torch.ones(shape, dtype=draw(st.sampled_from(DTYPES)))
    )


@pytest.mark.fuzz
@given(data=st.data())
def test_wrong_calls_never_crash(data):
    """A right call with one to three arguments spoiled returns or raises; a crash would end this process."""
    for _ in range(20):
        op, arguments = data.draw(st.sampled_from(right_calls()))
        arguments = list(arguments)
        for _ in range(data.draw(st.integers(1, 3))):
            arguments[data.draw(st.integers(0, len(arguments) - 1))] = junk(data.draw)
        with suppress(Exception):
            op(*arguments)

"""The compiled kernels (csrc/kernels.h) as `torch.library` custom ops: checks, fakes, gradients.

C sees pointers, so everything it relies on is checked here first; what is wrong raises UserError naming the
argument. Shapes may have any leading dimensions (their product is N rows); strided inputs are copied. Each op
has a fake (shapes for torch.compile) and a gradient, itself an op, that uses what the forward op kept.
"""

import math

import torch
from torch import Tensor
from torch.library import custom_op

from crate_mini import UserError

try:
    from crate_mini import _C  # after torch, so that both use one OpenMP

    missing = None
except ImportError as error:
    _C, missing = None, str(error)

CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}  # Dtype of kernels.h


def acc(dtype):
    """The dtype that kernels keep sums in, and want lam, weight and bias in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- checks ---------------------------------------------------------------------------------------------


def need(ok, op, told):
    if not ok:
        raise UserError(f"{op}: {told}.")


OPTIONAL = ("decoder", "lam", "bias", "gy", "ga")


def check(op, like, dtype=None, **arguments):
    """Each keyword (tensor, shape, its letters) must have like's device and dtype and that shape."""
    need(
        like.dtype in CODE and like.device.type in ("cpu", "cuda"),
        op,
        f"{like.dtype} on {like.device} is "
        "not supported; use float32, bfloat16 or (on the CPU) float64 on a CPU or CUDA device",
    )
    need(
        like.dtype != torch.float64 or like.device.type == "cpu", op, "float64 runs on the CPU only"
    )
    dtype = dtype or like.dtype
    for name, (t, shape, letters) in arguments.items():
        if t is None and name in OPTIONAL:
            continue
        need(t is not None, op, f"{name} is None, expected a tensor {letters}")
        need(
            t.shape == torch.Size(shape),
            op,
            f"{name} has shape {tuple(t.shape)}, expected {letters} = {tuple(shape)}",
        )
        need(
            t.dtype == dtype,
            op,
            f"{name} is {t.dtype}, expected {dtype}; convert it with .to({dtype})",
        )
        need(
            t.device == like.device,
            op,
            f"{name} is on {t.device}, expected {like.device}; move one",
        )
        need(
            t.device.type == "cpu" or t.numel() < 2**31,
            op,
            f"{name} has {t.numel()} elements, expected fewer than 2^31 on a GPU; use fewer rows",
        )


def check_ista(op, x, D, eta, lam=0.0, lams=None, decoder=None, steps=1, **arguments):
    """The arguments that all ISTA ops share; further keywords as `check`'s."""
    need(
        x.dim() > 0 and D.dim() == 2,
        op,
        f"expected x (..., d) and D (d, h), got shapes {tuple(x.shape)} and {tuple(D.shape)}",
    )
    (d, h), rows = (x.shape[-1], D.shape[1]), x.shape[:-1]
    check(op, x, D=(D, (d, h), "(d, h)"), decoder=(decoder, (d, h), "(d, h)"), **arguments)
    check(op, x, acc(x.dtype), lam=(lams, (h,), "(h,)"))
    need(math.isfinite(eta), op, f"eta={eta} must be finite, like 0.1")
    need(
        math.isfinite(lam) and lam >= 0, op, f"lam={lam} must be finite and not negative, like 0.1"
    )
    need(1 <= steps <= 1000, op, f"steps={steps} must be between 1 and 1000, like 2")
    return rows


# ---- calling C ------------------------------------------------------------------------------------------

VERSION = 0  # of the CUDA kernels: 0 the best, 1.. from naive to fast, for bench.py


def call(kernel, *arguments, like, space=None, versions=True):
    """Run a kernel on like's device; on CUDA with `space()` bytes of working memory, and its version."""
    given = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    if (
        like.device.type == "cpu"
    ):  # `arguments` keeps its name: it may hold the only reference to a copy
        return getattr(_C, f"{kernel}_cpu")(*given, torch.get_num_threads())
    need(
        _C.build_info()["cuda"],
        kernel,
        "this build of crate_mini has no CUDA kernels; `pip install -e .` "
        "with nvcc on the PATH builds them",
    )
    with torch.cuda.device(like.device):
        work = [] if space is None else [like.new_empty(space(), dtype=torch.uint8)]
        given += [w.data_ptr() for w in work] + [VERSION] * versions
        error = getattr(_C, f"{kernel}_cuda")(*given, torch.cuda.current_stream().cuda_stream)
    if error:
        raise RuntimeError(f"{kernel}: CUDA error {error}, a cudaError_t.")


def dense(*tensors):
    return [t if t is None else t.contiguous() for t in tensors]


def sizes(x, D):
    """dtype, N, d, h as kernels take them."""
    return CODE[x.dtype], math.prod(x.shape[:-1]), *D.shape


# ---- ista -----------------------------------------------------------------------------------------------


@custom_op("crate_mini::ista", mutates_args=())
def ista(
    x: Tensor,
    D: Tensor,
    decoder: Tensor | None,
    lams: Tensor | None,
    eta: float,
    lam: float,
    steps: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, a, codes of earlier steps (steps - 1, N, h), residuals (steps - 1, N, d)).

    lams (h,) float32 replaces lam; decoder None: tied. The last two are for the gradient; keep=False: empty.
    """
    check_ista("ista", x, D, eta, lam, lams, decoder, steps)
    y, a, codes, residuals = outputs = ista_fake(x, D, decoder, lams, eta, lam, steps, keep)
    x, D, decoder, lams = dense(x, D, decoder, lams)
    call(
        "ista_forward",
        *sizes(x, D),
        steps,
        eta,
        lam,
        x,
        D,
        D if decoder is None else decoder,
        lams,
        y,
        a,
        codes if keep else None,
        residuals if keep else None,
        like=x,
        space=lambda: _C.ista_workspace_cuda(*sizes(x, D)),
    )
    return outputs


@ista.register_fake
def ista_fake(x, D, decoder, lams, eta, lam, steps, keep):
    N, trail = math.prod(x.shape[:-1]), steps - 1 if keep else 0
    return (
        x.new_empty(x.shape),
        x.new_empty(*x.shape[:-1], D.shape[1]),
        x.new_empty(trail, N, D.shape[1]),
        x.new_empty(trail, N, D.shape[0]),
    )


@custom_op("crate_mini::ista_backward", mutates_args=())
def ista_backward(
    gy: Tensor | None,
    ga: Tensor | None,
    x: Tensor,
    D: Tensor,
    decoder: Tensor | None,
    a: Tensor,
    codes: Tensor,
    residuals: Tensor,
    eta: float,
    steps: int,
    want_lam: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(gx, gD, gdecoder, glam); the last two are empty where there is no decoder, or no lam tensor."""
    N, (d, h) = math.prod(x.shape[:-1]), D.shape
    check_ista(
        "ista_backward",
        x,
        D,
        eta,
        0.0,
        None,
        decoder,
        steps,
        gy=(gy, x.shape, "(..., d)"),
        a=(a, (*x.shape[:-1], h), "(..., h)"),
        ga=(ga, (*x.shape[:-1], h), "(..., h)"),
        codes=(codes, (steps - 1, N, h), "(steps - 1, N, h), as keep=True keeps,"),
        residuals=(residuals, (steps - 1, N, d), "(steps - 1, N, d), as keep=True keeps,"),
    )
    outputs = ista_backward_fake(gy, ga, x, D, decoder, a, codes, residuals, eta, steps, want_lam)
    gx, gD, gdec, glam = outputs
    gy, ga, x, D, decoder, a, codes, residuals = dense(gy, ga, x, D, decoder, a, codes, residuals)
    call(
        "ista_backward",
        *sizes(x, D),
        steps,
        eta,
        gy,
        ga,
        x,
        D,
        D if decoder is None else decoder,
        a,
        codes,
        residuals,
        gx,
        gD,
        None if decoder is None else gdec,
        glam if want_lam else None,
        like=x,
        space=lambda: _C.ista_workspace_cuda(*sizes(x, D)),
    )
    return outputs


@ista_backward.register_fake
def ista_backward_fake(gy, ga, x, D, decoder, a, codes, residuals, eta, steps, want_lam):
    return (
        x.new_empty(x.shape),
        x.new_empty(D.shape),
        x.new_empty(0 if decoder is None else D.shape),
        x.new_empty(D.shape[1] if want_lam else 0, dtype=acc(x.dtype)),
    )


def ista_context(ctx, inputs, output):
    x, D, decoder, lams, ctx.eta, _, ctx.steps, _ = inputs
    ctx.has_lam = lams is not None
    ctx.set_materialize_grads(
        False
    )  # the gradient of a is usually absent: None, not a matrix of zeros
    ctx.save_for_backward(x, D, decoder, *output[1:])


def ista_gradient(ctx, gy, ga, *_):
    x, D, decoder, a, codes, residuals = ctx.saved_tensors
    gx, gD, gdec, glam = torch.ops.crate_mini.ista_backward(
        gy, ga, x, D, decoder, a, codes, residuals, ctx.eta, ctx.steps, ctx.has_lam
    )
    return (
        gx,
        gD,
        None if decoder is None else gdec,
        glam if ctx.has_lam else None,
        None,
        None,
        None,
        None,
    )


ista.register_autograd(ista_gradient, setup_context=ista_context)


# ---- ista_step ------------------------------------------------------------------------------------------


@custom_op("crate_mini::ista_step", mutates_args=())
def ista_step(
    a: Tensor | None, r: Tensor, D: Tensor, lams: Tensor | None, eta: float, lam: float
) -> Tensor:
    """ReLU(a + eta r D - eta lam), (..., h)."""
    start = {} if a is None else {"a": (a, (*r.shape[:-1], *D.shape[1:]), "(..., h)")}
    check_ista("ista_step", r, D, eta, lam, lams, **start)
    out = ista_step_fake(a, r, D, lams, eta, lam)
    a, r, D, lams = dense(a, r, D, lams)
    call("ista_step_forward", *sizes(r, D), eta, lam, a, r, D, lams, out, like=r)
    return out


@ista_step.register_fake
def ista_step_fake(a, r, D, lams, eta, lam):
    return r.new_empty(*r.shape[:-1], D.shape[1])


@custom_op("crate_mini::ista_step_backward", mutates_args=())
def ista_step_backward(
    g: Tensor, out: Tensor, r: Tensor, D: Tensor, eta: float, want_a: bool, want_lam: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ga, gr, gD, glam); ga and glam are empty where not wanted."""
    codes = (*r.shape[:-1], D.shape[1])
    check_ista(
        "ista_step_backward", r, D, eta, g=(g, codes, "(..., h)"), out=(out, codes, "(..., h)")
    )
    ga, gr, gD, glam = outputs = ista_step_backward_fake(g, out, r, D, eta, want_a, want_lam)
    g, out, r, D = dense(g, out, r, D)
    call(
        "ista_step_backward",
        *sizes(r, D),
        eta,
        g,
        out,
        r,
        D,
        ga if want_a else None,
        gr,
        gD,
        glam if want_lam else None,
        like=r,
        space=lambda: _C.ista_workspace_cuda(*sizes(r, D)),
    )
    return outputs


@ista_step_backward.register_fake
def ista_step_backward_fake(g, out, r, D, eta, want_a, want_lam):
    return (
        r.new_empty(out.shape if want_a else 0),
        r.new_empty(r.shape),
        r.new_empty(D.shape),
        r.new_empty(D.shape[1] if want_lam else 0, dtype=acc(r.dtype)),
    )


def ista_step_context(ctx, inputs, output):
    a, r, D, lams, ctx.eta, _ = inputs
    ctx.has = a is not None, lams is not None
    ctx.save_for_backward(output, r, D)


def ista_step_gradient(ctx, g):
    ga, gr, gD, glam = torch.ops.crate_mini.ista_step_backward(
        g, *ctx.saved_tensors, ctx.eta, *ctx.has
    )
    return ga if ctx.has[0] else None, gr, gD, glam if ctx.has[1] else None, None, None


ista_step.register_autograd(ista_step_gradient, setup_context=ista_step_context)


# ---- ista_decode, without gradient ----------------------------------------------------------------------


def decode(
    x: Tensor,
    D: Tensor,
    atoms: Tensor,
    decoder_atoms: Tensor,
    lams: Tensor | None,
    eta: float,
    lam: float,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """(y, a) of a few rows; atoms, decoder_atoms (h, d) are D and the decoder transposed."""
    atom = (D.shape[1:] + x.shape[-1:], "(h, d)")
    check_ista(
        "ista_decode",
        x,
        D,
        eta,
        lam,
        lams,
        None,
        steps,
        atoms=(atoms, *atom),
        decoder_atoms=(decoder_atoms, *atom),
    )
    need(
        math.prod(x.shape[:-1]) < 2**16,
        "ista_decode",
        f"{math.prod(x.shape[:-1])} rows, expected fewer than 65536; use ista",
    )
    y, a = outputs = ista_decode_fake(x, D, atoms, decoder_atoms, lams, eta, lam, steps)
    x, D, atoms, decoder_atoms, lams = dense(x, D, atoms, decoder_atoms, lams)
    call(
        "ista_decode",
        *sizes(x, D),
        steps,
        eta,
        lam,
        x,
        D,
        atoms,
        decoder_atoms,
        lams,
        y,
        a,
        like=x,
        space=lambda: _C.ista_workspace_cuda(*sizes(x, D)),
        versions=False,
    )
    return outputs


ista_decode = custom_op(
    "crate_mini::ista_decode", decode, mutates_args=()
)  # costs as much as the work


@ista_decode.register_fake
def ista_decode_fake(x, D, atoms, decoder_atoms, lams, eta, lam, steps):
    return x.new_empty(x.shape), x.new_empty(*x.shape[:-1], D.shape[1])


# ---- mssa_project ---------------------------------------------------------------------------------------


def check_mssa(op, z, weight, bias, U, n_head, eps, **arguments):
    need(z.dim() > 0, op, "z must have at least one dimension, (..., d)")
    d, dtype = (
        z.shape[-1],
        U.dtype if z.dtype == torch.float32 and U.dtype == torch.bfloat16 else z.dtype,
    )
    check(op, z, dtype, U=(U, (d, d), "(d, d)"), **arguments)
    check(op, z, acc(dtype), weight=(weight, (d,), "(d,)"), bias=(bias, (d,), "(d,)"))
    need(n_head >= 1 and d % n_head == 0, op, f"n_head={n_head} does not divide d={d}")
    need(
        math.isfinite(eps) and eps >= 0, op, f"eps={eps} must be finite and not negative, like 1e-5"
    )
    return CODE[z.dtype], CODE[dtype], math.prod(z.shape[:-1]), d, eps


@custom_op("crate_mini::mssa_project", mutates_args=())
def mssa_project(
    z: Tensor, weight: Tensor, bias: Tensor | None, U: Tensor, n_head: int, eps: float
) -> Tensor:
    """LN(z) U as (..., K, p), of U's dtype; z has that or is float32; weight, bias as `acc` of it."""
    fixed = check_mssa("mssa_project", z, weight, bias, U, n_head, eps)
    u = mssa_project_fake(z, weight, bias, U, n_head, eps)
    call(
        "mssa_project_forward",
        *fixed,
        *dense(z, weight, bias, U),
        u,
        like=z,
        space=lambda: _C.mssa_workspace_cuda(*fixed[2:4]),
    )
    return u


@mssa_project.register_fake
def mssa_project_fake(z, weight, bias, U, n_head, eps):
    return z.new_empty(*z.shape[:-1], n_head, z.shape[-1] // n_head, dtype=U.dtype)


@custom_op("crate_mini::mssa_project_backward", mutates_args=())
def mssa_project_backward(
    gu: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None, U: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(gz, gweight, gbias, gU) from gu (..., K, p); gbias is empty where there is no bias."""
    heads = gu.shape[-2] if gu.dim() > 1 else 0
    fixed = check_mssa(
        "mssa_project_backward",
        z,
        weight,
        bias,
        U,
        heads,
        eps,
        gu=(gu, (*z.shape[:-1], heads, z.shape[-1] // max(heads, 1)), "(..., K, p)"),
    )
    gz, gw, gb, gU = outputs = mssa_project_backward_fake(gu, z, weight, bias, U, eps)
    call(
        "mssa_project_backward",
        *fixed,
        *dense(gu, z, weight, bias, U),
        gz,
        gw,
        None if bias is None else gb,
        gU,
        like=z,
        space=lambda: _C.mssa_workspace_cuda(*fixed[2:4]),
    )
    return outputs


@mssa_project_backward.register_fake
def mssa_project_backward_fake(gu, z, weight, bias, U, eps):
    gbias = weight.new_empty(0 if bias is None else bias.shape)
    return z.new_empty(z.shape), weight.new_empty(weight.shape), gbias, U.new_empty(U.shape)


def mssa_project_context(ctx, inputs, output):
    z, weight, bias, U, _, ctx.eps = inputs
    ctx.save_for_backward(z, weight, bias, U)


def mssa_project_gradient(ctx, gu):
    gz, gw, gb, gU = torch.ops.crate_mini.mssa_project_backward(gu, *ctx.saved_tensors, ctx.eps)
    return gz, gw, gb if ctx.saved_tensors[2] is not None else None, gU, None, None


mssa_project.register_autograd(mssa_project_gradient, setup_context=mssa_project_context)

"""The compiled kernels (csrc/kernels.h) as `torch.library` custom ops with fakes and gradients.

C sees only addresses and sizes, so everything it relies on is checked here first; a wrong argument
raises a UserError that names it. Tensors may have any leading dimensions, whose product is N, and
any strides: what is not contiguous is copied.

Every op checks its arguments, allocates its results and calls `launch`, which does nothing when
torch.compile calls the op with fake tensors. Gradients are ops too. All are registered at the end.
"""

import inspect
import math

import torch
from torch._subclasses import FakeTensor
from torch.library import custom_op

from crate_mini import UserError

try:
    from crate_mini import _C  # after torch, so that both use one OpenMP

    import_error = None
except ImportError as error:
    _C, import_error = None, str(error)

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}  # Dtype of kernels.h
CUDA_VERSION = 0  # of the CUDA kernels: 0 the best, 1 to 3 from naive to fast, for the benchmark
SHAPES = {  # shape: the tensors that have it; "..." are the leading dimensions, N their product
    "... d": "x z gy q k v y g",
    "... h": "a ga stats values",
    "... K p": "gu",
    "d h": "D decoder",
    "h d": "atoms decoder_atoms",
    "V d": "W",
    "d d": "U",
    "d": "weight bias",
    "h": "lam",
    "steps-1 N h": "codes",
    "steps-1 N d": "residuals",
}
SHAPE_OF = {name: shape for shape, names in SHAPES.items() for name in names.split()}
OPTIONAL = {"decoder", "lam", "lams", "bias", "gy", "ga", "k", "v", "values"}  # may be None
WIDE = ("lam", "weight", "bias", "stats")  # tensors in the dtype of sums
NUMBERS = {  # type: the arguments that have it
    "float": "eta lam eps",
    "int": "steps n_head",
    "SymInt": "n_kept",
    "bool": "keep needs_grad kernel",
    "ScalarType": "dtype",
}
TYPE_OF = {name: kind for kind, names in NUMBERS.items() for name in names.split()}


def acc_dtype(dtype):
    """The dtype that kernels keep sums in, and take lam, weight and bias in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def count_rows(t):
    """N: the number of rows of t (..., d)."""
    return math.prod(t.shape[:-1])


# ---- checks --------------------------------------------------------------------------------------


def misfit(op, problem):
    """The UserError for arguments that do not fit."""
    return UserError(f"{op}: {problem}.")


def autocast(t):
    """Whether autocast casts t. It does not know the meta device, on which models are sized."""
    kind = t.device.type if isinstance(t, torch.Tensor) else "meta"  # the checks refuse others
    return kind != "meta" and torch.is_autocast_enabled(kind)


def check_kinds(op, tensors, dtype=None, kernels=False):
    """Tensors must be dense, and like the first in device. Torch lets None pass for a tensor.

    The first, (..., d), tells what the op works on. dtype: of the others, None for any. kernels:
    whether they run: autocast then casts nothing, WIDE are as sums are, and k or v may be None.
    """
    first_name, first = next(iter(tensors.items()))
    wide = acc_dtype(dtype) if kernels else None
    if not kernels and autocast(first):
        dtype = None
    for name, t in tensors.items():
        if t is None and name in OPTIONAL and (kernels or name not in ("k", "v")):
            continue
        if not isinstance(t, torch.Tensor):
            raise misfit(op, f"{name} is {type(t).__name__}, not a tensor")
        if t.layout != torch.strided:
            raise misfit(op, f"{name} is {t.layout}, expected a dense tensor")
        expected = wide if name in WIDE else dtype
        if t is not first and expected not in (None, t.dtype):
            raise misfit(op, f"{name} is {t.dtype}, expected {expected}; convert it")
        if t.device != first.device:
            raise misfit(op, f"{name} is on {t.device}, expected {first.device}; move it")
    if first.dim() == 0:
        raise misfit(op, f"{first_name} must have at least one dimension, (..., d)")


def check_shapes(op, tensors, sizes, kernels):
    """Tensors must hold floats and have the shape of their name, whose letters `sizes` explains."""
    like = next(iter(tensors.values()))
    on_cpu = like.device.type == "cpu"
    runs = on_cpu or (like.is_cuda and like.dtype != torch.float64)
    if kernels and not (runs and like.dtype in DTYPE_CODES):
        use = "use float32 or bfloat16, or float64 on the CPU"
        raise misfit(op, f"{like.dtype} on {like.device} is not supported; {use}")
    for name, t in tensors.items():
        if t is None:
            continue
        if not t.is_floating_point():
            raise misfit(op, f"{name} is {t.dtype}, expected floating-point numbers")
        letters, shape = SHAPE_OF[name].split(), []
        for letter in letters:
            shape += like.shape[:-1] if letter == "..." else [sizes[letter]]
        if list(t.shape) != shape:
            expected = f"({', '.join(letters)}) = {tuple(shape)}"
            raise misfit(op, f"{name} has shape {tuple(t.shape)}, expected {expected}")
        if not on_cpu and t.numel() >= 2**31:
            problem = f"{name} has {t.numel()} elements, expected fewer than 2^31 on a GPU"
            raise misfit(op, f"{problem}; use fewer rows")


def check_number(op, name, value, example, low=0.0):
    """A number must be finite and, unless `low` says otherwise, not negative; ints of 64 bits."""
    number = isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
    if not number or not math.isfinite(value) or value < low:
        sign = " and not negative" if low == 0 else ""
        raise misfit(op, f"{name}={value} must be finite{sign}, like {example}")


def check_ista(op, x, D, eta, lam, steps, lams=None, kernels=True, **others):
    """Check what the ISTA ops share, and other tensors; returns (dtype, N, d, h, steps, eta).

    kernels: whether they will run; PyTorch takes more dtypes and devices, and lam may be a tensor.
    """
    if isinstance(lam, torch.Tensor):
        lams, lam = lam, 0.0
    tensors = dict(x=x, D=D, lam=lams, **others)
    dtype = getattr(x, "dtype", None)  # what is not a tensor has none
    check_kinds(op, tensors, dtype, kernels)
    if torch.compiler.is_compiling():  # shapes in sentences would be compiled in
        return ()
    if D.dim() != 2:
        raise misfit(op, f"D has shape {tuple(D.shape)}, expected (d, h)")
    check_number(op, "eta", eta, 0.1, low=-math.inf)
    check_number(op, "lam", lam, 0.1)
    if type(steps) is not int or not 1 <= steps <= 1000:
        raise misfit(op, f"steps={steps} must lie in 1 to 1000, like 2")
    N, d, h = count_rows(x), x.shape[-1], D.shape[1]
    if op == "ista_decode" and N >= 2**16:
        raise misfit(op, f"{N} rows, expected fewer than 65536; use ista")
    check_shapes(op, tensors, {"N": N, "d": d, "h": h, "steps-1": steps - 1}, kernels)
    return DTYPE_CODES.get(dtype), N, d, h, steps, eta


def check_mssa(op, z, weight, bias, U, n_head, eps, kernels=True, **others):
    """Check what the MSSA ops share, and other tensors; returns (zdtype, dtype, N, d, eps)."""
    tensors = dict(z=z, weight=weight, bias=bias, U=U, **others)
    dtype, other = (getattr(t, "dtype", None) for t in (z, U))
    if (dtype, other) == (torch.float32, torch.bfloat16):  # as autocast has it; u is like U
        dtype = other
    check_kinds(op, tensors, dtype, kernels)
    if torch.compiler.is_compiling():
        return ()
    d = z.shape[-1]
    if type(n_head) is not int or n_head < 1 or d % n_head:
        raise misfit(op, f"n_head={n_head} does not divide d={d}")
    check_number(op, "eps", eps, 1e-5)
    check_shapes(op, tensors, {"d": d, "K": n_head, "p": d // n_head}, kernels)
    return DTYPE_CODES.get(z.dtype), DTYPE_CODES.get(dtype), count_rows(z), d, eps


def check_attention(op, q, k, v, kernels=True, **others):
    """Check what the attention ops share, and other tensors; returns (dtype, *q.shape)."""
    tensors = dict(q=q, k=k, v=v, **others)
    dtype = getattr(q, "dtype", None)
    check_kinds(op, tensors, dtype, kernels)
    if torch.compiler.is_compiling():
        return ()
    if q.dim() != 4:
        raise misfit(op, f"q has shape {tuple(q.shape)}, expected four dimensions")
    check_shapes(op, tensors, {"d": q.shape[-1], "h": 2}, kernels)
    return DTYPE_CODES.get(dtype), *q.shape


def check_top_k(a, k, kernels=True, **others):
    """Check a (..., h), k and other tensors; returns (dtype, N, h, k)."""
    tensors = dict(a=a, **others)
    check_kinds("top_k", tensors, getattr(a, "dtype", None), kernels)
    if torch.compiler.is_compiling():
        return ()
    if type(k) is not int or not 1 <= k <= a.shape[-1]:
        raise misfit("top_k", f"k={k} must lie in 1 to h, the codes of a token")
    check_shapes("top_k", tensors, {"h": a.shape[-1]}, kernels)
    return DTYPE_CODES.get(a.dtype), count_rows(a), a.shape[-1], k


# ---- calling C -----------------------------------------------------------------------------------


def launch(kernel, scalars, inputs, outputs, strided=False):
    """Call a function of kernels.h, unless torch.compile only asks for the outputs; returns them.

    strided: inputs (.., .., .., p) are not made contiguous, and C is given their strides.
    None and empty tensors become null pointers. Raises UserError if this build has no CUDA kernels,
    and for an error that CUDA reports.
    """
    if isinstance(outputs[0], FakeTensor):
        return outputs
    # The lists keep copies alive while C reads them.
    inputs = [t if t is None or strided and t.stride(-1) == 1 else t.contiguous() for t in inputs]
    if strided:
        scalars = *scalars, *((0, 0, 0) if t is None else t.stride()[:3] for t in inputs)
    tensors = [*inputs, *outputs]
    addresses = [None if t is None or not t.numel() else t.data_ptr() for t in tensors]
    if outputs[0].device.type == "cpu":
        getattr(_C, f"{kernel}_cpu")(*scalars, *addresses, torch.get_num_threads())
        return outputs
    if not _C.build_info()["cuda"]:
        rebuild = "`pip install -e .` with nvcc on the PATH builds them"
        raise misfit(kernel, f"this build has no CUDA kernels; {rebuild}")
    with torch.cuda.device(outputs[0].device):
        size = getattr(_C, f"{kernel}_workspace_cuda")(*scalars[:4])
        workspace = outputs[0].new_empty(size, dtype=torch.uint8)
        stream = torch.cuda.current_stream().cuda_stream
        function = getattr(_C, f"{kernel}_cuda")
        error = function(*scalars, *addresses, workspace.data_ptr(), CUDA_VERSION, stream)
    if error:
        raise misfit(kernel, f"CUDA error {error}, {_C.cuda_problem(error)}")
    return outputs


def empty_gradients(*arguments):
    """Room for what a backward op returns: the gradients of its first four arguments.

    For one that is None it is an empty tensor, because ops cannot return None.
    """
    absent = arguments[0].new_empty
    return tuple(absent(0) if t is None else t.new_empty(t.shape) for t in arguments[:4])


def save(ctx, inputs, output):
    """Keep the tensors that an op begins with, its results but the first, and its numbers."""
    single = isinstance(output, torch.Tensor)
    # Of several results, such as y and a, an absent gradient is None, not a matrix of zeros.
    ctx.set_materialize_grads(single)
    tensors = [t for t in inputs if t is None or isinstance(t, torch.Tensor)]
    ctx.save_for_backward(*tensors, *(() if single else output[1:]))
    ctx.numbers = inputs[len(tensors) :]


def if_given(gradients, inputs):
    """The gradients of inputs, with None for an input that is None."""
    return [None if t is None else g for g, t in zip(gradients, inputs)]


# ---- the ops -------------------------------------------------------------------------------------


def ista(x, D, decoder, lams, eta, lam, steps, keep):
    """(y, a, codes of the earlier steps (steps - 1, N, h), residuals (steps - 1, N, d)).

    decoder None: D. lams (h,) replaces lam. The last two results are for the gradient; without
    `keep` they are empty.
    """
    scalars = check_ista("ista", x, D, eta, lam, steps, lams, decoder=decoder)
    d, h = D.shape
    kept = steps - 1 if keep else 0, count_rows(x)
    y, a = x.new_empty(x.shape), x.new_empty(*x.shape[:-1], h)
    results = y, a, x.new_empty(*kept, h), x.new_empty(*kept, d)
    return launch("ista_forward", (*scalars, lam), (x, D, decoder, lams), results)


def ista_backward(x, D, decoder, lams, a, codes, residuals, gy, ga, eta, steps):
    """Gradients of x, D, decoder and lams, empty for those that are None.

    a, codes, residuals: what ista(keep=True) returned; gy, ga: gradients of y and a, None for zero.
    """
    others = dict(decoder=decoder, gy=gy, ga=ga, a=a, codes=codes, residuals=residuals)
    scalars = check_ista("ista_backward", x, D, eta, 0.0, steps, lams, **others)
    inputs = gy, ga, x, D, decoder, a, codes, residuals
    return launch("ista_backward", scalars, inputs, empty_gradients(x, D, decoder, lams))


def ista_gradient(ctx, gy, ga, *_):
    eta, _, steps, _ = ctx.numbers
    op, saved = torch.ops.crate_kernels.ista_backward, ctx.saved_tensors
    return *if_given(op(*saved, gy, ga, eta, steps), saved), None, None, None, None


def ista_decode(x, D, atoms, decoder_atoms, lams, eta, lam, steps):
    """(y, a) of a few rows; atoms and decoder_atoms (h, d) are D and the decoder transposed."""
    op = "ista_decode"
    transposed = dict(atoms=atoms, decoder_atoms=decoder_atoms)
    scalars = check_ista(op, x, D, eta, lam, steps, lams, **transposed)
    results = x.new_empty(x.shape), x.new_empty(*x.shape[:-1], D.shape[1])
    return launch(op, (*scalars, lam), (x, D, atoms, decoder_atoms, lams), results)


def mssa_project(z, weight, bias, U, n_head, eps):
    """LN(z) U as (..., K, p), in U's dtype. z has that dtype or is float32."""
    scalars = check_mssa("mssa_project", z, weight, bias, U, n_head, eps)
    u = z.new_empty(*z.shape[:-1], n_head, z.shape[-1] // n_head, dtype=U.dtype)
    return launch("mssa_project_forward", scalars, (z, weight, bias, U), (u,))[0]


def mssa_project_backward(z, weight, bias, U, gu, eps):
    """Gradients of z, weight, bias (empty if it is None) and U from gu (..., K, p)."""
    op = "mssa_project_backward"
    n_head = gu.shape[-2] if gu.dim() > 1 else 0
    scalars = check_mssa(op, z, weight, bias, U, n_head, eps, gu=gu)
    return launch(op, scalars, (gu, z, weight, bias, U), empty_gradients(z, weight, bias, U))


def mssa_gradient(ctx, gu):
    op, saved = torch.ops.crate_kernels.mssa_project_backward, ctx.saved_tensors
    return *if_given(op(*saved, gu, ctx.numbers[-1]), saved), None, None


def attention(q, k, v):
    """(y (B, T, K, p), two numbers for each of its rows for backward); k None: q; v None: k."""
    scalars = check_attention("attention", q, k, v)
    outputs = q.new_empty(q.shape), q.new_empty(*q.shape[:3], 2, dtype=acc_dtype(q.dtype))
    return launch("attention_forward", scalars, (q, k, v), outputs, strided=True)


def attention_backward(q, k, v, y, stats, g):
    """Gradients from y's, g: of q, k and v; for one that is None, added to that of what it is."""
    scalars = check_attention("attention_backward", q, k, v, y=y, stats=stats, g=g)
    outputs = stats, *empty_gradients(q, k, v)
    return launch("attention_backward", scalars, (q, k, v, y, g), outputs, strided=True)[1:]


def save_all(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)


def attention_gradient(ctx, g, _):
    op, saved = torch.ops.crate_kernels.attention_backward, ctx.saved_tensors
    return tuple(if_given(op(*saved, g), saved))


def top_k(a, values, n_kept):
    """values (..., h), or a if None, where a (..., h) is among the n_kept largest of its row, or 0.

    Of equal codes the first are kept.
    """
    scalars = check_top_k(a, n_kept, values=values)
    return launch("top_k", scalars, (a, values), (a.new_empty(a.shape),))[0]


def top_k_gradient(ctx, g):
    (a, values), [n_kept] = ctx.saved_tensors, ctx.numbers
    g = torch.ops.crate_kernels.top_k(a, g, n_kept)
    return (g, None, None) if values is None else (None, g, None)


# ---- registration --------------------------------------------------------------------------------


def register(function, fake, outputs, gradient=None, setup=save):
    """Make a function the op torch.ops.crate_kernels.NAME; fake allocates the results.

    outputs: how many tensors it returns. The names of its arguments tell their types. gradient and
    setup: how autograd goes back through it, and what that keeps.
    """
    arguments = []
    for name in inspect.signature(function).parameters:
        kind = TYPE_OF.get(name, "Tensor?" if name in OPTIONAL else "Tensor")
        arguments.append(f"{kind} {name}")
    schema = f"({', '.join(arguments)}) -> ({', '.join(['Tensor'] * outputs)})"
    op = custom_op(f"crate_kernels::{function.__name__}", function, mutates_args=(), schema=schema)
    op.register_fake(fake)
    if gradient:
        op.register_autograd(gradient, setup_context=setup)


register(ista, ista, 4, ista_gradient)
register(ista_backward, empty_gradients, 4)
register(ista_decode, ista_decode, 2)
register(mssa_project, mssa_project, 1, mssa_gradient)
register(mssa_project_backward, empty_gradients, 4)
register(top_k, top_k, 1, top_k_gradient)
register(attention_backward, attention_backward, 3)
register(attention, attention, 2, attention_gradient, save_all)

"""The compiled kernels (csrc/kernels.h) as `torch.library` custom ops with fakes and gradients.

C sees only addresses and sizes, so everything it relies on is checked here first; a wrong argument
raises a UserError that names it. Tensors may have any leading dimensions, whose product is N, and
any strides: what is not contiguous is copied.

Every op checks its arguments, allocates its results (the function that does so is also its fake,
for torch.compile) and calls `launch`. Gradients are ops too. All are registered at the end.
"""

import math

import torch
from torch.library import custom_op

from crate_mini import UserError

try:
    from crate_mini import _C  # after torch, so that both use one OpenMP

    import_error = None
except ImportError as error:
    _C, import_error = None, str(error)

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}  # Dtype of kernels.h
OPTIONAL = ("decoder", "lam", "bias", "gy", "ga")  # tensors that may be None
CUDA_VERSION = 0  # of the CUDA kernels: 0 the best, 1 to 3 from naive to fast, for the benchmark


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


def check_same(op, name, t, dtype, device):
    """A tensor must have this dtype (None: any) and device. Torch lets None pass for a tensor."""
    if t is None and name in OPTIONAL:
        return
    if not isinstance(t, torch.Tensor):
        raise misfit(op, f"{name} is {type(t).__name__}, not a tensor")
    if t.layout != torch.strided:
        raise misfit(op, f"{name} is {t.layout}, expected a dense tensor")
    if dtype not in (None, t.dtype):
        raise misfit(op, f"{name} is {t.dtype}, expected {dtype}; convert it")
    if t.device != device:
        raise misfit(op, f"{name} is on {t.device}, expected {device}; move it")


def check_shape(op, name, t, like, sizes, letters):
    """A tensor (None: absent) of floats must have the shape that these letters stand for.

    letters: names in `sizes`, like "d h"; "..." stands for the leading dimensions of `like`.
    """
    if t is None:
        return
    shape = []
    for letter in letters.split():
        shape += like.shape[:-1] if letter == "..." else [sizes[letter]]
    if list(t.shape) != shape:
        expected = f"({', '.join(letters.split())}) = {tuple(shape)}"
        raise misfit(op, f"{name} has shape {tuple(t.shape)}, expected {expected}")
    if not t.is_floating_point():
        raise misfit(op, f"{name} is {t.dtype}, expected floating-point numbers")


def check_tensors(op, like, dtype, sizes, **tensors):
    """Tensors must have like's device, this dtype, and shapes (see check_shape).

    dtype None: any floats, on any device, as PyTorch takes them. tensors: name=(tensor, letters).
    """
    on_cpu = like.device.type == "cpu"
    runs = on_cpu or (like.is_cuda and like.dtype != torch.float64)
    if dtype is not None and not (runs and like.dtype in DTYPE_CODES):
        use = "use float32 or bfloat16, or float64 on the CPU"
        raise misfit(op, f"{like.dtype} on {like.device} is not supported; {use}")
    if not like.is_floating_point():
        raise misfit(op, f"{like.dtype} is not supported; use float32 or bfloat16")
    for name, (t, letters) in tensors.items():
        check_same(op, name, t, dtype, like.device)
        check_shape(op, name, t, like, sizes, letters)
        if t is not None and not on_cpu and t.numel() >= 2**31:
            problem = f"{name} has {t.numel()} elements, expected fewer than 2^31 on a GPU"
            raise misfit(op, f"{problem}; use fewer rows")


def check_number(op, name, value, example, low=0.0):
    """A number must be finite and, unless `low` says otherwise, not negative; ints of 64 bits."""
    number = isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
    if not number or not math.isfinite(value) or value < low:
        sign = " and not negative" if low == 0 else ""
        raise misfit(op, f"{name}={value} must be finite{sign}, like {example}")


def check_ista(op, x, D, eta, lam, steps, lams=None, kernels=True, **tensors):
    """Check what the ISTA ops share, and further tensors; returns (dtype, N, d, h, steps, eta).

    kernels: whether they will run; PyTorch takes more dtypes and devices.
    """
    if x.dim() == 0 or D.dim() != 2:
        shapes = f"got shapes {tuple(x.shape)} and {tuple(D.shape)}"
        raise misfit(op, f"expected x (..., d) and D (d, h), {shapes}")
    check_number(op, "eta", eta, 0.1, low=-math.inf)
    check_number(op, "lam", lam, 0.1)
    if type(steps) is not int or not 1 <= steps <= 1000:
        raise misfit(op, f"steps={steps} must lie in 1 to 1000, like 2")
    N = count_rows(x)
    d, h = x.shape[-1], D.shape[1]
    sizes = {"N": N, "d": d, "h": h, "steps-1": steps - 1}
    check_tensors(op, x, x.dtype if kernels else None, sizes, D=(D, "d h"), **tensors)
    check_tensors(op, x, acc_dtype(x.dtype) if kernels else None, sizes, lam=(lams, "h"))
    return DTYPE_CODES.get(x.dtype), N, d, h, steps, eta


def check_rows(op, x):
    """ista_decode is for few rows."""
    if count_rows(x) >= 2**16:
        raise misfit(op, f"{count_rows(x)} rows, expected fewer than 65536; use ista")


def mssa_dtype(z, U):
    """The dtype that U must have next to this z, and that u gets."""
    return U.dtype if (z.dtype, U.dtype) == (torch.float32, torch.bfloat16) else z.dtype


def check_mssa(op, z, weight, bias, U, n_head, eps, kernels=True, **tensors):
    """Check what the MSSA ops share, and further tensors; returns (zdtype, dtype, N, d, eps).

    kernels: as for check_ista.
    """
    if z.dim() == 0:
        raise misfit(op, "z must have at least one dimension, (..., d)")
    d = z.shape[-1]
    if type(n_head) is not int or n_head < 1 or d % n_head:
        raise misfit(op, f"n_head={n_head} does not divide d={d}")
    check_number(op, "eps", eps, 1e-5)
    dtype = mssa_dtype(z, U)
    sizes = {"d": d, "K": n_head, "p": d // n_head}
    check_tensors(op, z, dtype if kernels else None, sizes, U=(U, "d d"), **tensors)
    normed = acc_dtype(dtype) if kernels else None
    check_tensors(op, z, normed, sizes, weight=(weight, "d"), bias=(bias, "d"))
    return DTYPE_CODES.get(z.dtype), DTYPE_CODES.get(dtype), count_rows(z), d, eps


# ---- calling C -----------------------------------------------------------------------------------


def launch(kernel, scalars, inputs, outputs):
    """Call a function of kernels.h, on the device of its outputs.

    inputs, outputs: tensors, or None for null pointers. Raises UserError if this build has no CUDA
    kernels, RuntimeError for an error that CUDA reports.
    """
    # The lists keep copies alive while C reads them.
    inputs = [None if t is None else t.contiguous() for t in inputs]
    tensors = [*inputs, *outputs]
    addresses = [None if t is None else t.data_ptr() for t in tensors]
    if outputs[0].device.type == "cpu":
        getattr(_C, f"{kernel}_cpu")(*scalars, *addresses, torch.get_num_threads())
        return
    if not _C.build_info()["cuda"]:
        rebuild = "`pip install -e .` with nvcc on the PATH builds them"
        raise misfit(kernel, f"this build has no CUDA kernels; {rebuild}")
    with torch.cuda.device(outputs[0].device):
        size = getattr(_C, f"{kernel.split('_')[0]}_workspace_cuda")(*scalars[:4])
        workspace = outputs[0].new_empty(size, dtype=torch.uint8)
        stream = torch.cuda.current_stream().cuda_stream
        function = getattr(_C, f"{kernel}_cuda")
        error = function(*scalars, *addresses, workspace.data_ptr(), CUDA_VERSION, stream)
    if error:
        raise RuntimeError(f"{kernel}: CUDA error {error}, a cudaError_t.")


def empty_gradients(*arguments):
    """Room for what a backward op returns: the gradients of its first four arguments.

    For one that is None it is an empty tensor, because ops cannot return None.
    """
    absent = arguments[0].new_empty
    return tuple(absent(0) if t is None else t.new_empty(t.shape) for t in arguments[:4])


def if_given(gradients, inputs):
    """The gradients of inputs, with None for an input that is None."""
    return [None if t is None else g for g, t in zip(gradients, inputs)]


# ---- ista ----------------------------------------------------------------------------------------


def ista(x, D, decoder, lams, eta, lam, steps, keep):
    """(y, a, codes of the earlier steps (steps - 1, N, h), residuals (steps - 1, N, d)).

    decoder None: D. lams (h,) replaces lam. The last two results are for the gradient; without
    `keep` they are empty.
    """
    scalars = check_ista("ista", x, D, eta, lam, steps, lams, decoder=(decoder, "d h"))
    results = ista_results(x, D, decoder, lams, eta, lam, steps, keep)
    outputs = results if keep else (*results[:2], None, None)
    launch("ista_forward", (*scalars, lam), (x, D, decoder, lams), outputs)
    return results


def ista_results(x, D, decoder, lams, eta, lam, steps, keep):
    d, h = D.shape
    kept = steps - 1 if keep else 0, count_rows(x)
    y, a = x.new_empty(x.shape), x.new_empty(*x.shape[:-1], h)
    return y, a, x.new_empty(*kept, h), x.new_empty(*kept, d)


def ista_backward(x, D, decoder, lams, a, codes, residuals, gy, ga, eta, steps):
    """Gradients of x, D, decoder and lams, empty for those that are None.

    a, codes, residuals: what ista(keep=True) returned; gy, ga: gradients of y and a, None for zero.
    """
    tensors = dict(
        decoder=(decoder, "d h"),
        gy=(gy, "... d"),
        ga=(ga, "... h"),
        a=(a, "... h"),
        codes=(codes, "steps-1 N h"),
        residuals=(residuals, "steps-1 N d"),
    )
    scalars = check_ista("ista_backward", x, D, eta, 0.0, steps, lams, **tensors)
    gradients = empty_gradients(x, D, decoder, lams)
    inputs = gy, ga, x, D, decoder, a, codes, residuals
    launch("ista_backward", scalars, inputs, if_given(gradients, (x, D, decoder, lams)))
    return gradients


def ista_save(ctx, inputs, output):
    x, D, decoder, lams, ctx.eta, _, ctx.steps, _ = inputs
    ctx.set_materialize_grads(False)  # an absent gradient of a is None, not a matrix of zeros
    ctx.save_for_backward(x, D, decoder, lams, *output[1:])


def ista_gradient(ctx, gy, ga, *_):
    op, saved = torch.ops.crate_kernels.ista_backward, ctx.saved_tensors
    gradients = op(*saved, gy, ga, ctx.eta, ctx.steps)
    return *if_given(gradients, saved), None, None, None, None


# ---- ista_decode: without gradient ---------------------------------------------------------------


def ista_decode(x, D, atoms, decoder_atoms, lams, eta, lam, steps):
    """(y, a) of a few rows; atoms and decoder_atoms (h, d) are D and the decoder transposed."""
    op = "ista_decode"
    transposed = dict(atoms=(atoms, "h d"), decoder_atoms=(decoder_atoms, "h d"))
    scalars = check_ista(op, x, D, eta, lam, steps, lams, **transposed)
    check_rows(op, x)
    results = decode_results(x, D, atoms, decoder_atoms, lams, eta, lam, steps)
    launch(op, (*scalars, lam), (x, D, atoms, decoder_atoms, lams), results)
    return results


def decode_results(x, D, atoms, decoder_atoms, lams, eta, lam, steps):
    return x.new_empty(x.shape), x.new_empty(*x.shape[:-1], D.shape[1])


# ---- mssa_project --------------------------------------------------------------------------------


def mssa_project(z, weight, bias, U, n_head, eps):
    """LN(z) U as (..., K, p), in U's dtype. z has that dtype or is float32."""
    scalars = check_mssa("mssa_project", z, weight, bias, U, n_head, eps)
    u = mssa_results(z, weight, bias, U, n_head, eps)
    launch("mssa_project_forward", scalars, (z, weight, bias, U), (u,))
    return u


def mssa_results(z, weight, bias, U, n_head, eps):
    return z.new_empty(*z.shape[:-1], n_head, z.shape[-1] // n_head, dtype=U.dtype)


def mssa_project_backward(z, weight, bias, U, gu, eps):
    """Gradients of z, weight, bias (empty if it is None) and U from gu (..., K, p)."""
    op = "mssa_project_backward"
    n_head = gu.shape[-2] if gu.dim() > 1 else 0
    scalars = check_mssa(op, z, weight, bias, U, n_head, eps, gu=(gu, "... K p"))
    gradients = empty_gradients(z, weight, bias, U)
    launch(op, scalars, (gu, z, weight, bias, U), if_given(gradients, (z, weight, bias, U)))
    return gradients


def mssa_save(ctx, inputs, output):
    z, weight, bias, U, _, ctx.eps = inputs
    ctx.save_for_backward(z, weight, bias, U)


def mssa_gradient(ctx, gu):
    op, saved = torch.ops.crate_kernels.mssa_project_backward, ctx.saved_tensors
    return *if_given(op(*saved, gu, ctx.eps), saved), None, None


# ---- registration --------------------------------------------------------------------------------


def register(function, fake, schema):
    """Make a function the op torch.ops.crate_kernels.NAME; its fake only allocates the results."""
    op = custom_op(f"crate_kernels::{function.__name__}", function, mutates_args=(), schema=schema)
    op.register_fake(fake)
    return op


register(
    ista,
    ista_results,
    "(Tensor x, Tensor D, Tensor? decoder, Tensor? lams, float eta, float lam, int steps, "
    "bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
).register_autograd(ista_gradient, setup_context=ista_save)
register(
    ista_backward,
    empty_gradients,
    "(Tensor x, Tensor D, Tensor? decoder, Tensor? lams, Tensor a, Tensor codes, Tensor residuals, "
    "Tensor? gy, Tensor? ga, float eta, int steps) -> (Tensor, Tensor, Tensor, Tensor)",
)
register(
    ista_decode,
    decode_results,
    "(Tensor x, Tensor D, Tensor atoms, Tensor decoder_atoms, Tensor? lams, float eta, float lam, "
    "int steps) -> (Tensor, Tensor)",
)
register(
    mssa_project,
    mssa_results,
    "(Tensor z, Tensor weight, Tensor? bias, Tensor U, int n_head, float eps) -> Tensor",
).register_autograd(mssa_gradient, setup_context=mssa_save)
register(
    mssa_project_backward,
    empty_gradients,
    "(Tensor z, Tensor weight, Tensor? bias, Tensor U, Tensor gu, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)

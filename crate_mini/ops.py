"""The two operations that matter, ISTA and the MSSA projection; the model calls them here.

Each function computes its equation in `reference.py` and has the same signature. The compiled
kernels (`fused.py`, csrc/) or plain PyTorch do the work: CRATE_BACKEND=auto|fused|reference
chooses, and `auto` takes the kernels where they were measured to be faster. Under autocast, inputs
are cast as for a linear layer; LayerNorm statistics and the kernels' thresholds stay float32.
"""

import math
import os
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from crate_mini import UserError, fused, reference
from crate_mini._stamp import source_stamp

MODES = ("auto", "fused", "reference")
REBUILD = "`pip install -e .` in the repository builds it"
# Up to which width d the kernels are faster than PyTorch (python -m crate_mini.studies bench).
FASTER = {
    "avx512_bf16": {torch.float32: math.inf, torch.bfloat16: math.inf},
    "avx512": {torch.float32: math.inf},
    "avx2": {torch.float32: 128},
}
ON_CUDA = ("ista", "ista_decode", "mssa_project")  # the ops that have CUDA kernels
HEAD_ROWS = 16  # W is packed in every call: fewer rows gain nothing
DECODE_ROWS = 4  # without gradient, up to this many rows gain from skipping codes that are zero


# ---- which backend -------------------------------------------------------------------------------


@cache
def _choose(mode):
    """(mode, backend, reason); backend None: the mode is impossible, and reason is the error."""
    if mode not in MODES:
        return mode, None, f"CRATE_BACKEND={mode} is unknown; choose one of {', '.join(MODES)}."
    if mode == "reference":
        return mode, "reference", "plain PyTorch, as asked"
    problem = _extension_problem()
    if problem and mode == "fused":
        return mode, None, f"CRATE_BACKEND=fused, but {problem}; {REBUILD}."
    if problem:
        return mode, "reference", f"plain PyTorch: {problem}; {REBUILD}"
    isa = fused._C.isa_name()
    threads = "" if fused._C.build_info()["openmp"] else ", one thread"
    kernels = f"compiled kernels, {isa}{threads}"
    if mode == "fused":
        return mode, "fused", f"{kernels}, as asked"
    if isa not in FASTER:
        return mode, "reference", f"plain PyTorch, faster than our kernels on {isa} processors"
    dtypes = " and ".join(str(dtype).removeprefix("torch.") for dtype in FASTER[isa])
    elsewhere = "few rows, other types or widths, the MSSA projection in bfloat16"
    kinds = f"ISTA, top-k, attention and the head in {dtypes}"
    reason = f"{kernels}, for {kinds}; PyTorch where it is faster: {elsewhere}"
    return mode, "fused", reason


def _extension_problem():
    """Why the compiled extension cannot be used, or None."""
    if not fused._C:
        return f"the compiled extension cannot be imported ({fused.import_error})"
    if source_stamp() not in (None, fused._C.build_info()["stamp"]):
        return "the compiled extension is older than its sources"
    return None


_mode, _backend, _reason = _choose(os.environ.get("CRATE_BACKEND", "auto"))
_faster = FASTER.get(fused._C.isa_name(), {}) if fused._C else {}
_has_cuda = bool(fused._C) and fused._C.build_info()["cuda"]


def backend(kind="cpu"):
    """(name, reason): what runs the ops on this kind of device, and why; scripts print both.

    Raises UserError if CRATE_BACKEND asks for one that does not exist or cannot run.
    """
    if _backend is None:
        raise UserError(_reason)
    if _backend == "reference" or kind == "cpu":
        return _backend, _reason
    if kind == "cuda" and _has_cuda and _mode == "fused":
        return _backend, "compiled CUDA kernels, as asked"
    measured = "our kernels are not measured there yet"
    why = measured if kind == "cuda" and _has_cuda else "this build has no kernels for it"
    return "reference", f"plain PyTorch on {kind}: {why}"


@contextmanager
def use_backend(name):
    """Run the block with this backend (auto, fused or reference), whatever CRATE_BACKEND is."""
    global _mode, _backend, _reason
    before = _mode, _backend, _reason
    _mode, _backend, _reason = _choose(name)
    try:
        yield backend()
    finally:
        _mode, _backend, _reason = before


def _runs_fused(op, t, dtype):
    """Whether the kernels take this call on t (..., d) and its device, computing in dtype."""
    if backend(t.device.type)[0] != "fused" or (t.is_cuda and op not in ON_CUDA):
        return False
    return _mode == "fused" or _is_faster(op, t, dtype)


def _is_faster(op, t, dtype):
    """What `auto` knows from the table of `python -m crate_mini.studies bench`."""
    rows, d = fused.count_rows(t), t.shape[-1] if t.dim() else 0
    if op == "top_k":
        return dtype in fused.DTYPE_CODES and rows >= 16
    if d > _faster.get(dtype, -1):
        return False
    if op == "attention":
        return rows * t.shape[-2] >= (2**16 if dtype == torch.bfloat16 else 2**18)
    if op == "ista_decode":  # where D is small, the overhead of a call decides
        return rows <= DECODE_ROWS and (dtype == torch.bfloat16 or d >= 256)
    if op == "head":
        return rows >= HEAD_ROWS
    if op == "mssa_project":  # 0.4 to 1.1 times as fast elsewhere
        return dtype == torch.float32 and d >= 128 and rows * d >= 2**18
    return 3 * rows >= 2 * d  # packing D costs as much as the products of some rows


# ---- arguments -----------------------------------------------------------------------------------


def _compute_dtype(t):
    """What a linear layer would compute in, given this input."""
    if fused.autocast(t) and t.dtype != torch.float64:
        return torch.get_autocast_dtype(t.device.type)
    return t.dtype


def choose(op, x):
    """(dtype, whether the kernels run) of an op on x (..., d) that computes as a linear layer."""
    dtype = _compute_dtype(x)
    return dtype, _runs_fused(op, x, dtype)


def _cast(dtype, *tensors):
    """The tensors in dtype; what is None or a number stays."""
    return [t.to(dtype) if isinstance(t, Tensor) else t for t in tensors]


# ---- the operations ------------------------------------------------------------------------------
# Each checks its arguments, whichever backend will run, so that all say the same of them.


def mssa_project(z, weight, bias, U, n_head, eps=1e-5):
    """LayerNorm of z (..., d), then the projection U (d, d), split into heads: (..., K, p).

    Raises UserError if shapes, dtypes or devices do not fit, as all functions here do.
    """
    fused.check_mssa("mssa_project", z, weight, bias, U, n_head, eps, kernels=False)
    dtype = _compute_dtype(U)
    if not _runs_fused("mssa_project", z, dtype):
        if any(t is not None and t.dtype != z.dtype for t in (weight, bias)):
            weight, bias = _cast(fused.acc_dtype(z.dtype), weight, bias)
        if not fused.autocast(z):
            U = U.to(z.dtype)
        return reference.mssa_project(z, weight, bias, U, n_head, eps).to(dtype)
    weight, bias = _cast(fused.acc_dtype(dtype), weight, bias)
    return torch.ops.crate_kernels.mssa_project(z, weight, bias, U.to(dtype), n_head, eps)


def attention(q, k, v):
    """softmax(causal(q k^T / sqrt(p))) v, head by head; q, k, v and the result (B, K, T, p)."""
    fused.check_attention("attention", q, k, v, kernels=False)
    dtype, runs_fused = choose("attention", q)
    if not runs_fused:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    heads = q, None if k is q else k, None if v is k else v  # the kernel adds their gradients
    heads = [None if t is None else t.transpose(1, 2) for t in _cast(dtype, *heads)]
    return torch.ops.crate_kernels.attention(*heads)[0].transpose(1, 2)


def ista(x, D, eta, lam, steps, decoder=None):
    """Sparse codes a (..., h) of x (..., d) after `steps` ISTA steps, and y (..., d): (y, a)."""
    fused.check_ista("ista", x, D, eta, lam, steps, kernels=False, decoder=decoder)
    tensors = [t for t in (x, D, lam, decoder) if isinstance(t, Tensor)]
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    few = fused.count_rows(x) <= DECODE_ROWS
    decodes = few and not needs_grad and not torch.compiler.is_compiling()
    dtype, runs_fused = choose("ista_decode" if decodes else "ista", x)
    if not runs_fused:  # float32 thresholds would make bf16 codes float32
        [lam] = _cast(dtype, lam)
        return reference.ista(x, D, eta, lam, steps, decoder)
    # As the kernels take them: a tensor or None, and a number.
    lams, lam = (lam, 0.0) if isinstance(lam, Tensor) else (None, float(lam))
    [lams] = _cast(fused.acc_dtype(dtype), lams)
    if not decodes:
        x, D, decoder = _cast(dtype, x, D, decoder)
        return torch.ops.crate_kernels.ista(x, D, decoder, lams, eta, lam, steps, needs_grad)[:2]
    D, atoms = _with_transpose(D, dtype)
    decoder_atoms = atoms if decoder is None else _with_transpose(decoder, dtype)[1]
    # Directly, because the dispatcher costs as much as the work.
    return fused.ista_decode(x.to(dtype), D, atoms, decoder_atoms, lams, eta, lam, steps)


def ista_codes(x, D, eta, lam, steps, debias=False):
    """The codes a (..., h) of `ista` alone, for a model that makes them sparser before decoding.

    debias: undo the shrinkage of the last step. Always in PyTorch, because the kernels compute y
    too, which is not needed here.
    """
    fused.check_ista("ista_codes", x, D, eta, lam, steps, kernels=False)
    [lam] = _cast(_compute_dtype(x), lam)
    a = reference.ista_codes(x, D, eta, lam, steps)
    return reference.debias(a, eta, lam) if debias else a


def top_k(a, k):
    """a (..., h) with all but the k largest codes of each token 0."""
    fused.check_top_k(a, k, kernels=False)
    if not _runs_fused("top_k", a, a.dtype):
        return reference.top_k(a, k)
    return torch.ops.crate_kernels.top_k(a, None, k)


_transposes = WeakTensorKeyDictionary()  # weight -> (its state, it in a dtype, that transposed)
# Fused optimizers change weights without counting a new version.
register_optimizer_step_post_hook(lambda *_: _transposes.clear())


def _with_transpose(weight, dtype):
    """A weight (d, h) in dtype and its transpose (h, d), made once per value of the weight."""
    version = None if weight.is_inference() else weight._version  # inference tensors have none
    state = version, weight.data_ptr(), dtype
    if version is None or weight not in _transposes or _transposes[weight][0] != state:
        cast = weight.detach().to(dtype)
        _transposes[weight] = state, cast, cast.T.contiguous()
    return _transposes[weight][1:]

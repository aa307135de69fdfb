"""The operations that matter, behind one door: the model calls them here and never asks what runs them.

Each function has the signature of its equation in `reference.py`, which is what it computes. The work is done
by the compiled kernels (`fused.py`, csrc/) or by plain PyTorch. CRATE_BACKEND=auto|fused|reference chooses;
`auto` takes the kernels where they were measured to be the faster path. Under autocast, inputs are cast as
for a linear layer; LayerNorm statistics and the kernels' thresholds stay float32.
"""

import math
import os
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from crate_mini import UserError, fused, reference
from crate_mini._stamp import source_stamp

MODES = ("auto", "fused", "reference")
REBUILD = "`pip install -e .` in the repository builds it"
# Up to which width d the kernels were measured to be faster than PyTorch (python -m crate_mini.studies.bench).
FASTER = {
    "avx512_bf16": {torch.float32: math.inf, torch.bfloat16: math.inf},
    "avx512": {torch.float32: math.inf},
    "avx2": {torch.float32: 128},
}
DECODE_ROWS = 4  # without gradient, up to so many rows are worth skipping zero codes for


@cache
def _choose(wanted):
    """(wanted, name, reason); name None: the wish cannot be met, and reason is what to tell."""
    if wanted not in MODES:
        return wanted, None, f"CRATE_BACKEND={wanted} is unknown; choose one of {', '.join(MODES)}."
    if wanted == "reference":
        return wanted, "reference", "plain PyTorch, as asked"
    info = fused._C and fused._C.build_info()
    if not info:
        lack = f"the compiled extension cannot be imported ({fused.missing}); {REBUILD}"
    elif source_stamp() not in (None, info["stamp"]):
        lack = f"the compiled extension is older than its sources; {REBUILD}"
    else:
        isa = fused._C.isa_name()
        about = f"compiled kernels, {isa}{', CUDA' * info['cuda']}{'' if info['openmp'] else ', one thread'}"
        names = [str(t).removeprefix("torch.") for t in FASTER.get(isa, ())]
        if wanted == "fused":
            return wanted, "fused", f"{about}, as asked"
        if names:
            return (
                wanted,
                "fused",
                (
                    f"{about}, for ISTA in {' and '.join(names)}; PyTorch where it is "
                    "faster: LayerNorm with projection, few rows, other types or widths"
                ),
            )
        return (
            wanted,
            "reference",
            f"plain PyTorch, faster than our kernels on this processor ({isa})",
        )
    if wanted == "fused":
        return wanted, None, f"CRATE_BACKEND=fused, but {lack}."
    return wanted, "reference", f"plain PyTorch: {lack}"


_wanted, _name, _reason = _choose(os.environ.get("CRATE_BACKEND", "auto"))
_faster = FASTER.get(fused._C.isa_name(), {}) if fused._C else {}
_cuda = bool(fused._C) and fused._C.build_info()["cuda"]


def backend():
    """Return (name, reason): which implementation runs the ops, and why. Scripts print both at start."""
    if _name is None:
        raise UserError(_reason)
    return _name, _reason


@contextmanager
def use_backend(name):
    """Run the block with this backend, auto, fused or reference, whatever CRATE_BACKEND says."""
    global _wanted, _name, _reason
    before = _wanted, _name, _reason
    _wanted, _name, _reason = _choose(name)
    try:
        yield backend()
    finally:
        _wanted, _name, _reason = before


def _takes(op, t, dtype):
    """Whether the kernels do this call, on t (..., d) and its device, computing in dtype."""
    if _name != "fused" or t.device.type not in ("cpu", "cuda") or (t.is_cuda and not _cuda):
        backend()  # tells if there is none
        return False
    return _wanted == "fused" or _pays(op, t, dtype)


def _pays(op, t, dtype):
    """The measured rules behind `auto`, see the table of `python -m crate_mini.studies.bench`."""
    rows, d = math.prod(t.shape[:-1]), t.shape[-1] if t.dim() else 0
    if t.is_cuda or d > _faster.get(dtype, -1):
        return False  # CUDA: not before it has been measured on the device
    if op == "ista_decode":  # where D is small, a call's overhead decides
        return rows <= DECODE_ROWS and (dtype == torch.bfloat16 or d >= 256)
    # Packing D costs as much as some rows' products. mssa_project: 0.7 to 1.05 times as fast as PyTorch.
    return op in ("ista", "ista_step") and 3 * rows >= 2 * d


def _autocast(t):
    """Whether autocast rules what happens to t; it does not know the meta device, where models are sized."""
    return t.device.type != "meta" and torch.is_autocast_enabled(t.device.type)


def _tensors(op, optional=(), mixed=False, **arguments):
    """All are tensors (or None, if optional) on one device and of one dtype (or mixed; or under autocast)."""
    first = next(iter(arguments.values()))
    for name, t in arguments.items():
        if t is None and name in optional:
            continue
        fused.need(isinstance(t, Tensor), op, f"{name} is {type(t).__name__}, expected a tensor")
        fused.need(
            t.device == first.device,
            op,
            f"{name} is on {t.device}, expected {first.device}; move it",
        )
        fused.need(
            mixed or t.dtype == first.dtype or _autocast(t),
            op,
            f"{name} is {t.dtype}, expected {first.dtype}; convert it with .to({first.dtype})",
        )


def _compute_dtype(t):
    """What a linear layer would compute in, given this input: autocast's dtype if it is on."""
    return (
        torch.get_autocast_dtype(t.device.type)
        if _autocast(t) and t.dtype != torch.float64
        else t.dtype
    )


def _cast(dtype, *tensors):
    return [t if t is None else t.to(dtype) for t in tensors]


def _thresholds(lam, dtype):
    """(tensor or None, number) of a threshold that is one or the other."""
    return (lam.to(fused.acc(dtype)), 0.0) if isinstance(lam, Tensor) else (None, float(lam))


def _like(lam, dtype):
    """A threshold tensor in the reference's dtype: float32 would turn its bf16 codes into float32."""
    return lam.to(dtype) if isinstance(lam, Tensor) else lam


def mssa_project(z, weight, bias, U, n_head, eps=1e-5):
    """LayerNorm of z (..., d), shared projection U (d, d), split into heads: (..., K, p). Spec: reference.

    Raises UserError when shapes, dtypes or devices do not fit; so do all functions here.
    """
    _tensors("mssa_project", ("bias",), mixed=True, z=z, weight=weight, bias=bias, U=U)
    dtype = _compute_dtype(U)
    if not _takes("mssa_project", z, dtype):
        return reference.mssa_project(z, weight, bias, U, n_head, eps)
    weight, bias = _cast(fused.acc(dtype), weight, bias)
    return torch.ops.crate_mini.mssa_project(z, weight, bias, U.to(dtype), n_head, eps)


def ista(x, D, eta, lam, steps, decoder=None):
    """Sparse codes and their reconstruction: x (..., d) -> y (..., d), a (..., h). Spec: reference.ista."""
    _tensors("ista", ("decoder",), x=x, D=D, decoder=decoder)
    dtype = _compute_dtype(x)
    grad = torch.is_grad_enabled() and any(
        getattr(t, "requires_grad", False) for t in (x, D, lam, decoder)
    )
    if not grad and math.prod(x.shape[:-1]) <= DECODE_ROWS and not torch.compiler.is_compiling():
        return ista_decode(x, D, eta, lam, steps, decoder)
    if not _takes("ista", x, dtype):
        return reference.ista(x, D, eta, _like(lam, dtype), steps, decoder)
    (x, D, decoder), (lams, lam) = _cast(dtype, x, D, decoder), _thresholds(lam, dtype)
    return torch.ops.crate_mini.ista(x, D, decoder, lams, eta, lam, steps, grad)[:2]


def ista_step(a, r, D, eta, lam):
    """One step, ReLU(a + eta r D - eta lam): a (..., h) or None, r (..., d) -> (..., h). Spec: reference."""
    _tensors("ista_step", ("a",), r=r, a=a, D=D)
    dtype = _compute_dtype(r)
    if not _takes("ista_step", r, dtype):
        return reference.ista_step(a, r, D, eta, _like(lam, dtype))
    (a, r, D), (lams, lam) = _cast(dtype, a, r, D), _thresholds(lam, dtype)
    return torch.ops.crate_mini.ista_step(a, r, D, lams, eta, lam)


_atoms = (
    WeakTensorKeyDictionary()
)  # weight -> (what it was, weight cast, weight cast and transposed)
register_optimizer_step_post_hook(
    lambda *_: _atoms.clear()
)  # fused ones change weights and count nothing


def _transposed(w, dtype):
    """w and its transpose in dtype, made once per value of w (in-place changes count in w._version)."""
    fused.need(w.dim() == 2, "ista_decode", f"D has shape {tuple(w.shape)}, expected (d, h)")
    if w.is_inference():
        return w.to(dtype), w.to(dtype).T.contiguous()
    now = w._version, w.data_ptr(), dtype
    if _atoms.get(w, (None,))[0] != now:
        cast = w.detach().to(dtype)
        _atoms[w] = now, cast, cast.T.contiguous()
    return _atoms[w][1:]


@torch.no_grad()
def ista_decode(x, D, eta, lam, steps, decoder=None):
    """`ista` of a few rows without gradient: products that read codes touch only the non-zero ones."""
    _tensors("ista_decode", ("decoder",), x=x, D=D, decoder=decoder)
    dtype = _compute_dtype(x)
    if not _takes("ista_decode", x, dtype):
        return reference.ista(x, D, eta, _like(lam, dtype), steps, decoder)
    lams, lam = _thresholds(lam, dtype)
    dictionary, atoms = _transposed(D, dtype)
    decode = torch.ops.crate_mini.ista_decode if torch.compiler.is_compiling() else fused.decode
    written = atoms if decoder is None else _transposed(decoder, dtype)[1]
    return decode(x.to(dtype), dictionary, atoms, written, lams, eta, lam, steps)

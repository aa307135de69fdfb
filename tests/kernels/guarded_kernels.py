"""The kernels of csrc/ as functions of tensors, called as C sees them: by pointers.

So the memory around their arguments is ours. Every call copies its inputs between bands of NaN
(what is read beyond them spoils the result) and fills its outputs with NaN (an element that nobody
writes stays NaN, and a write beyond them is found).
"""

import math
import os

import torch

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}  # Dtype of kernels.h
GUARD = int(os.environ.get("CRATE_GUARD", 64))  # elements on both sides of a guarded tensor


def acc_dtype(dtype):
    """The dtype of sums and of vectors: float, or double for double."""
    return torch.promote_types(dtype, torch.float32)


class Guarded:
    """A contiguous tensor between two bands of NaN, itself filled with NaN: an output.

    Integers, which are inputs only, have bands of zeros.

    Guarded.copy(t) is an input: `check` also finds out whether it was written to. With `strides`
    there is NaN between the elements, too.
    """

    def __init__(self, shape, dtype, device="cpu", strides=None):
        size = math.prod(shape)
        if strides and size:
            size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides))
        filling = float("nan") if dtype.is_floating_point else 0
        memory = torch.full((size + 2 * GUARD,), filling, dtype=dtype, device=device)
        self.bands = {"before": memory[:GUARD], "after": memory[GUARD + size :]}
        self.tensor = memory[GUARD : GUARD + size]
        self.tensor = self.tensor.as_strided(shape, strides) if strides else self.tensor.view(shape)
        self.original = None

    @classmethod
    def copy(cls, t, strides=None):
        guarded = cls(t.shape, t.dtype, t.device, strides)
        guarded.tensor.copy_(t)
        guarded.original = t.clone()
        return guarded

    @property
    def pointer(self):
        return self.tensor.data_ptr()

    def check(self, name):
        for side, band in self.bands.items():
            intact = band.isnan() if band.is_floating_point() else band == 0
            assert intact.all(), f"{name}: written {side} its memory"
        if self.original is not None:
            tensor, original = (t.nan_to_num(nan=7e37) for t in (self.tensor, self.original))
            assert torch.equal(tensor, original), f"{name}: an input was changed"


class Kernels:
    """One implementation of the kernels. Results are CPU tensors, or None if not asked for.

    A threshold lam is a number or a tensor (h,); decoder None is the tied dictionary.
    """

    device = "cpu"

    def run(self, kernel, scalars, inputs, outputs):
        """Call a function of kernels.h: inputs are tensors or None, outputs Guarded or None."""
        raise NotImplementedError

    def call(self, function, *arguments):
        """Call with addresses: a tensor is an input, a Guarded an output, the rest is passed on."""
        guards = []
        values = []
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                guard, address = self.guard(argument)
            elif isinstance(argument, Guarded):
                guard, address = argument, argument.pointer
            else:
                values.append(argument)
                continue
            guards.append(guard)
            values.append(address)
        function(*values)
        for number, guard in enumerate(guards):
            guard.check(f"pointer {number}")

    def guard(self, t):
        """(guarded copy of an input, its address)."""
        guarded = Guarded.copy(t)
        return guarded, guarded.pointer

    def out(self, *shape, dtype):
        return Guarded(shape, dtype, self.device)

    def ista(self, x, D, eta, lam, steps, decoder=None, trail=True):
        """(y, a, trail_a, trail_r); without trail the last two are None."""
        N, dtype = len(x), x.dtype
        d, h = D.shape
        y, a = self.out(N, d, dtype=dtype), self.out(N, h, dtype=dtype)
        trails = [None, None]
        if trail:
            trails = [self.out(steps - 1, N, n, dtype=dtype) for n in (h, d)]
        outputs = y, a, *trails
        scalars = DTYPE_CODES[dtype], N, d, h, steps, eta, number(lam)
        self.run("ista_forward", scalars, (x, D, decoder, vector(lam)), outputs)
        return tensors(outputs)

    def ista_backward(self, gy, ga, x, D, eta, decoder, a, trail_a, trail_r, want_lam=True):
        """(gx, gD, gdec or None, glam or None)."""
        N, dtype = len(x), x.dtype
        d, h = D.shape
        outputs = [
            self.out(N, d, dtype=dtype),
            self.out(d, h, dtype=dtype),
            None if decoder is None else self.out(d, h, dtype=dtype),
            self.out(h, dtype=acc_dtype(dtype)) if want_lam else None,
        ]
        scalars = DTYPE_CODES[dtype], N, d, h, len(trail_a) + 1, eta
        inputs = gy, ga, x, D, decoder, a, trail_a, trail_r
        self.run("ista_backward", scalars, inputs, outputs)
        return tensors(outputs)

    def ista_decode(self, x, D, eta, lam, steps, decoder=None):
        """(y, a)."""
        N, dtype = len(x), x.dtype
        d, h = D.shape
        outputs = self.out(N, d, dtype=dtype), self.out(N, h, dtype=dtype)
        atoms = D.T.contiguous()
        decoder_atoms = atoms if decoder is None else decoder.T.contiguous()
        scalars = DTYPE_CODES[dtype], N, d, h, steps, eta, number(lam)
        self.run("ista_decode", scalars, (x, D, atoms, decoder_atoms, vector(lam)), outputs)
        return tensors(outputs)

    def mssa(self, z, weight, bias, U, eps=1e-5):
        """u."""
        u = self.out(*z.shape, dtype=U.dtype)
        scalars = DTYPE_CODES[z.dtype], DTYPE_CODES[U.dtype], *z.shape, eps
        self.run("mssa_project_forward", scalars, (z, weight, bias, U), (u,))
        return u.tensor.cpu()

    def mssa_backward(self, gu, z, weight, bias, U, eps=1e-5):
        """(gz, gweight, gbias or None, gU)."""
        inputs = z, weight, bias, U
        outputs = [None if t is None else self.out(*t.shape, dtype=t.dtype) for t in inputs]
        scalars = DTYPE_CODES[z.dtype], DTYPE_CODES[U.dtype], *z.shape, eps
        self.run("mssa_project_backward", scalars, (gu, *inputs), outputs)
        return tensors(outputs)

    def attention(self, q, k, v):
        """(y (B, T, K, p), stats (B, K, 2, T)) of q, k, v (B, T, K, p), taken with their strides.

        k None: q; v None: k.
        """
        B, T, K, _ = q.shape
        outputs = [
            self.out(*q.shape, dtype=q.dtype),
            self.out(B, K, 2, T, dtype=acc_dtype(q.dtype)),
        ]
        self.run("attention_forward", *strided(q, k, v), outputs)
        return tensors(outputs)

    def attention_backward(self, q, k, v, y, stats, gy):
        """[gq, gk, gv]; where k or v is None, so is its gradient."""
        gradients = [None if t is None else self.out(*t.shape, dtype=t.dtype) for t in (q, k, v)]
        scalars, inputs = strided(q, k, v, y, gy)
        self.run("attention_backward", scalars, [*inputs, stats], gradients)
        return tensors(gradients)

    def top_k(self, a, values, k):
        """values (N, h), or a if None, where a (N, h) is among the k largest of its row, or 0."""
        out = self.out(*a.shape, dtype=a.dtype)
        self.run("top_k", (DTYPE_CODES[a.dtype], *a.shape, k), (a, values), (out,))
        return out.tensor

    def head(self, x, W, targets, gradients=True):
        """(loss, gx, gW); gx and gW are None without gradients."""
        acc = acc_dtype(x.dtype)
        outputs = [self.out(1, dtype=acc), None, None]
        if gradients:
            outputs[1:] = [self.out(*t.shape, dtype=acc) for t in (x, W)]
        scalars = DTYPE_CODES[x.dtype], len(x), *W.shape
        self.run("head", scalars, (x, W, targets), outputs)
        return tensors(outputs)


class CpuKernels(Kernels):
    """The CPU kernels of a compiled module in the instruction set that it uses."""

    threads = 1

    def __init__(self, module):
        self.module = module

    def run(self, kernel, scalars, inputs, outputs):
        function = getattr(self.module, f"{kernel}_cpu")
        self.call(function, *scalars, *inputs, *outputs, self.threads)


class NaiveKernels(Kernels):
    """The plain loops of ista_naive.cpp: float32, ISTA only."""

    threads = 1

    def __init__(self, module):
        self.module = module

    def ista(self, x, D, eta, lam, steps, decoder=None, trail=True):
        N, dtype = len(x), torch.float32
        d, h = D.shape
        lams = lam if isinstance(lam, torch.Tensor) else torch.full((h,), lam)
        y, codes = self.out(N, d, dtype=dtype), self.out(steps, N, h, dtype=dtype)
        residuals = self.out(steps, N, d, dtype=dtype)
        decoder = D if decoder is None else decoder
        inputs = x, D, decoder, lams
        function = self.module.ista_naive_forward
        self.call(function, N, d, h, steps, eta, *inputs, y, codes, residuals)
        trails = (codes.tensor[:-1], residuals.tensor[1:]) if trail else (None, None)
        return y.tensor, codes.tensor[-1], *trails

    def ista_backward(self, gy, ga, x, D, eta, decoder, a, trail_a, trail_r, want_lam=True):
        N, dtype = len(x), torch.float32
        d, h = D.shape
        gy = torch.zeros(N, d) if gy is None else gy
        ga = torch.zeros(N, h) if ga is None else ga
        gx, gD = self.out(N, d, dtype=dtype), self.out(d, h, dtype=dtype)
        gdec = gD if decoder is None else self.out(d, h, dtype=dtype)
        glam = self.out(h, dtype=dtype)
        codes = torch.cat((trail_a, a[None]))
        residuals = torch.cat((x[None], trail_r))
        inputs = gy, ga, D, D if decoder is None else decoder, codes, residuals
        function = self.module.ista_naive_backward
        self.call(function, N, d, h, len(codes), eta, *inputs, gx, gD, gdec, glam)
        return tensors([gx, gD, None if decoder is None else gdec, glam if want_lam else None])


def strided(q, *others):
    """(scalars, guarded copies) of tensors (B, T, K, p) that a kernel takes with their strides."""
    inputs = q, *others
    strides = [(0, 0, 0) if t is None else t.stride()[:3] for t in inputs]
    copies = [None if t is None else Guarded.copy(t, t.stride()) for t in inputs]
    return (DTYPE_CODES[q.dtype], *q.shape, *strides), copies


def tensors(guarded):
    return [None if g is None else g.tensor.cpu() for g in guarded]


def number(lam):
    return 0.0 if isinstance(lam, torch.Tensor) else lam


def vector(lam):
    return lam if isinstance(lam, torch.Tensor) else None

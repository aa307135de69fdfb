"""Variants of the model that only the study trains; train one of them with

    python -m crate_mini.studies.variants NAME [flags of train.py]

The variant takes the place of the plain class in crate_mini.model for this process, and train.py
runs unchanged. Its families are mssa and ista: the fields of Config (key shift, query correction,
separate decoder, steps, ...) still apply, and what does not fit is refused.

A checkpoint of a variant loads inside `installed(NAME)` only. To continue one, give --resume or
--init to the command above: the `train.py --resume` that a run prints knows no variant. Every state
dict holds an empty buffer with the variant's name, so that the plain model refuses it even where
the variant has no parameters of its own.

Initial weights: those that the plain model has too are the plain model's for the same seed, and
new matrices are drawn after all others, N(0, 0.02). `paper-output` is the exception: it has no P,
so that all draws after the first U differ.

train.py counts the products of the plain model; `flops_per_token` adds those of the variant.

Letters as in model.py: u = U^T LN(z); k_s, v_s key and value of position s; * is elementwise.
"""

import math
import runpy
import sys
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from crate_mini import UserError, model, ops, reference
from crate_mini.cli import flag_name, nearest, one_of
from crate_mini.console import results, terminal
from crate_mini.training import device

# ---- attention -----------------------------------------------------------------------------------


class Attention(model.MSSA):
    """MSSA in parts that a variant replaces one by one; without a change it is MSSA.

    Shapes: z (B, T, d); u and queries (B, T, K, p); keys and values (B, K, S, p). The KV cache
    holds u and the unshifted values.
    """

    def __init__(self, config):
        super().__init__(config)
        self.d = config.n_embd
        self.p = config.n_embd // config.n_head

    def add_matrices(self):
        """Register and draw the matrices that MSSA lacks, once all other weights are drawn."""

    def forward(self, z):
        u = ops.mssa_project(z, self.norm.weight, self.norm.bias, self.U, self.n_head)
        q = self.queries(u, z).transpose(1, 2)
        v = self.value_source(u, z).transpose(1, 2)
        k = u.transpose(1, 2)
        if self.cache:
            k, v = self.cache.extend(self, k, v)
        y = self.attend(q, self.keys(k), self.values(v))
        return self.output(y.transpose(1, 2).flatten(-2))

    def queries(self, u, z):
        """q = u + (u A) B, or u without a correction."""
        return u + self.correction(u)

    def correction(self, u):
        """(u A) B, or 0 if query_rank is 0."""
        if self.query is None:
            return 0
        A, B = self.query
        return (u.flatten(-2) @ A @ B).view_as(u)

    def value_source(self, u, z):
        """What values are made of, each from its own token."""
        return u

    def keys(self, k):
        """Keys from u."""
        return k if self.key_gate is None else model.shift_keys(k, self.key_gate)

    def values(self, v):
        """Values from their source."""
        return v

    def attend(self, q, k, v):
        return model.attend(q, k, v)

    def output(self, y):
        """The heads' outputs y (B, T, d), mapped to the stream."""
        return self.out(y)


class QueryGain(Attention):
    """q = g * u + (u A) B, g (d,) from 1."""

    def __init__(self, config):
        super().__init__(config)
        self.gain = nn.Parameter(torch.ones(self.d))

    def queries(self, u, z):
        gain = self.gain.view(self.n_head, self.p).to(u.dtype)
        return gain * u + self.correction(u)


class ValueShift(Attention):
    """v_s = u_s + sigmoid(g) * (u_{s-1} - u_s), u_{-1} = 0, g (d,) from 0: half and half."""

    def __init__(self, config):
        super().__init__(config)
        self.value_gate = nn.Parameter(torch.zeros(self.d))

    def values(self, v):
        return model.shift_keys(v, self.value_gate)


class TwoShifts(Attention):
    """k_s = w_0 * u_s + w_1 * u_{s-1} + w_2 * u_{s-2}, w = softmax of logits (3, d) from 0."""

    def __init__(self, config):
        super().__init__(config)
        # Flat, because init_weights draws every tensor of two dimensions.
        self.shift_logits = nn.Parameter(torch.zeros(3 * self.d))

    def keys(self, k):
        weights = self.shift_logits.view(3, self.n_head, 1, self.p).softmax(0).to(k.dtype)
        S = k.shape[2]
        mixed = weights[0] * k
        for i in (1, 2):
            earlier = F.pad(k, (0, 0, i, 0))[:, :, :S]
            mixed = mixed + weights[i] * earlier
        return mixed


class NoSelf(Attention):
    """Position t attends to s < t, and position 0 to itself."""

    def attend(self, q, k, v):
        T, S = q.shape[2], k.shape[2]
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T - 1)
        mask[:, 0] = True  # new for position 0 alone: all others see it already
        return F.scaled_dot_product_attention(q, k, v, mask)


class FreeQuery(Attention):
    """q = Q^T LN(z), Q (d, d); k and v from u."""

    def add_matrices(self):
        super().add_matrices()
        self.Q = new_matrix(self.d)

    def queries(self, u, z):
        return (self.norm(z) @ self.Q).view_as(u)


class FreeValue(Attention):
    """v = W^T LN(z), W (d, d); q and k from u."""

    def add_matrices(self):
        super().add_matrices()
        self.W = new_matrix(self.d)

    def value_source(self, u, z):
        return (self.norm(z) @ self.W).view_as(u)


class FreeBoth(FreeQuery, FreeValue):
    """q = Q^T LN(z), k = u, v = W^T LN(z): MHSA without its three biases."""


class PaperOutput(Attention):
    """The output map of the paper: U [heads] + b instead of P [heads] + b."""

    def __init__(self, config):
        super().__init__(config)
        self.out = None
        self.out_bias = nn.Parameter(torch.zeros(self.d)) if config.bias else None

    def output(self, y):
        return F.linear(y, self.U, self.out_bias)  # rows are tokens: y U^T


class HalfStep(Attention):
    """z <- (1 - c) z + c MSSA(z), c = sigmoid(g) from 1/2, g one number per layer.

    The block adds z, so that this returns c (MSSA(z) - z).
    """

    def __init__(self, config):
        super().__init__(config)
        self.step_logit = nn.Parameter(torch.zeros(1))

    def forward(self, z):
        return self.step_logit.sigmoid() * (super().forward(z) - z)


class LogScale(Attention):
    """Scores exp(t_k) q_k k_k^T / sqrt(p), t (K,) from 0."""

    def __init__(self, config):
        super().__init__(config)
        self.log_scale = nn.Parameter(torch.zeros(self.n_head))

    def queries(self, u, z):
        scale = self.log_scale.exp().unsqueeze(-1).to(u.dtype)  # (K, 1)
        return scale * super().queries(u, z)


class QKNorm(Attention):
    """q / rms(q) and g * k / rms(k), head by head and after shift and correction; g (d,) from 1.

    A gain on the queries would be the same as one on the keys: only their product counts.
    """

    def __init__(self, config):
        super().__init__(config)
        self.key_gain = nn.Parameter(torch.ones(self.d))

    def queries(self, u, z):
        return unit_rms(super().queries(u, z))

    def keys(self, k):
        gain = self.key_gain.view(self.n_head, 1, self.p).to(k.dtype)
        return gain * unit_rms(super().keys(k))


def new_matrix(d):
    """A parameter (d, d) from N(0, 0.02), as U."""
    return nn.Parameter(torch.empty(d, d).normal_(0, 0.02))


def unit_rms(x):
    """x (.., p) divided by its root mean square, computed in float32 at least."""
    wide = x.to(torch.promote_types(torch.float32, x.dtype))
    return (wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)


# ---- sparsifier ----------------------------------------------------------------------------------


class FISTA(model.ISTA):
    """ISTA with momentum between its steps (`fista_codes`); in PyTorch, so slower than ISTA."""

    def forward(self, z):
        D, lam = self.D, self.threshold()
        decoder = D if self.decoder is None else self.decoder
        a = fista_codes(self.norm(z), D, self.eta, lam, self.steps)
        if self.debias:
            a = reference.debias(a, self.eta, lam)
        a = self.code(self.top_k(a))
        return a @ decoder.T, a


def fista_codes(x, D, eta, lam, steps):
    """Codes (.., h) of x (.., d) after `steps` steps of Beck & Teboulle (2009) from zero.

    a_i = ReLU(b_i + eta D^T (x - D b_i) - eta lam), b_{i+1} = a_i + (t_i - 1) / t_{i+1} (a_i -
    a_{i-1}), t_1 = 1, t_{i+1} = (1 + sqrt(1 + 4 t_i^2)) / 2. Since t_1 - 1 = 0, the first two steps
    are those of ISTA.
    """
    a = reference.ista_step(None, x, D, eta, lam)
    extrapolated = a
    t = (1 + math.sqrt(5)) / 2  # t_2
    for _ in range(steps - 1):
        before = a
        a = reference.ista_step(extrapolated, x - extrapolated @ D.T, D, eta, lam)
        next_t = (1 + math.sqrt(1 + 4 * t * t)) / 2
        extrapolated = a + (t - 1) / next_t * (a - before)
        t = next_t
    return a


# ---- the whole model -----------------------------------------------------------------------------


class VariantLM(model.LM):
    """LM that checks its Config, draws new matrices last and marks its state dict."""

    variant = None  # its name, set by `installed`

    def __init__(self, config):
        check(self.variant, config)
        super().__init__(config)
        self.register_buffer(f"variant_{self.variant}", torch.zeros(0))

    @torch.no_grad()
    def init_weights(self):
        super().init_weights()
        for block in self.blocks:
            if isinstance(block.attention, Attention):
                block.attention.add_matrices()


class NesterovLM(VariantLM):
    """Layer l reads z_l + beta_l (z_l - z_{l-1}), beta_l from 0, l = 1 .. L - 1."""

    def __init__(self, config):
        super().__init__(config)
        self.betas = nn.Parameter(torch.zeros(config.n_layer - 1))

    def trunk(self, ids):
        """LM.trunk with the extrapolation, which needs no cache: it is token by token."""
        begin = self.cache.length if self.cache else 0
        end = begin + ids.shape[1]
        longest = self.config.block_size
        if end > longest:
            raise UserError(f"{end} tokens exceed the model's context, block_size={longest}.")
        z = before = self.tokens(ids) + self.positions.weight[begin:end]
        codes = []
        for i, block in enumerate(self.blocks):
            read = z + self.betas[i - 1] * (z - before) if i else z
            before = z
            z, a = block(read)
            codes.append(a)
        if self.cache:
            self.cache.length = end
        return self.norm(z), codes


# ---- the table -----------------------------------------------------------------------------------

MSSA_ONLY = {"attention": ("mssa",)}


@dataclass(frozen=True)
class Variant:
    """What replaces what, and what it costs.

    summary: one line for the list. slots: {name in crate_mini.model: class}. needs: {field of
    Config: its allowed values}. extra_products: multiply-adds per token and layer that the plain
    model has not, in units of d^2; elementwise work counts as 0.
    """

    summary: str
    slots: dict
    needs: dict
    extra_products: int = 0


def attention(summary, kind, extra_products=0, **needs):
    """A Variant that replaces MSSA."""
    return Variant(summary, {"MSSA": kind}, {**MSSA_ONLY, **needs}, extra_products)


VARIANTS = {
    "query-gain": attention("queries g * u, one gain per dimension", QueryGain),
    "value-shift": attention("values mixed with the value before, own gate", ValueShift),
    "two-shifts": attention(
        "keys mixed with the two keys before, softmax weights", TwoShifts, key_shift=(False,)
    ),
    "no-self": attention("a token does not attend to itself", NoSelf),
    "free-query": attention("queries from a matrix of their own", FreeQuery, 1, query_rank=(0,)),
    "free-value": attention("values from a matrix of their own", FreeValue, 1),
    "free-both": attention(
        "queries and values from matrices of their own: mhsa", FreeBoth, 2, query_rank=(0,)
    ),
    "paper-output": attention("U instead of the free output map P, as in the paper", PaperOutput),
    "half-step": attention("(1 - c) z + c MSSA(z), as derived, c learned per layer", HalfStep),
    "fista": Variant(
        "ISTA with momentum, from the third step on",
        {"ISTA": FISTA},
        {"sparsifier": ("ista",), "ista_steps": range(3, 1000)},
    ),
    "nesterov-layers": Variant(
        "each layer reads z_l + beta_l (z_l - z_{l-1})",
        {"LM": NesterovLM},
        {"n_layer": range(2, 1000)},
    ),
    "log-scale": attention("a learned temperature of the scores per head", LogScale),
    "qk-norm": attention("queries and keys of unit RMS, a learned gain", QKNorm),
}


def check(name, config):
    """Raise UserError if a Config lacks what the variant replaces, or has what it contradicts."""
    for field, allowed in VARIANTS[name].needs.items():
        value = getattr(config, field)
        if value in allowed:
            continue
        needed = allowed[0]
        flag = flag_name(field)
        if isinstance(value, bool):
            raise UserError(f"variant {name} does not go with {flag}; use --no-{flag[2:]}.")
        suffix = " or more" if isinstance(allowed, range) else ""
        raise UserError(f"variant {name} needs {flag} {needed}{suffix}, but it is {value} here.")


@contextmanager
def installed(name):
    """In the block, models are built with this variant's classes; raises UserError if unknown.

    Yields the Variant.
    """
    if name not in VARIANTS:
        raise UserError(
            f"unknown variant {name!r}{nearest(name, VARIANTS)}; choose {one_of(VARIANTS)}."
        )
    variant = VARIANTS[name]
    slots = {"LM": VariantLM, **variant.slots}
    slots["LM"] = type("LM", (slots["LM"],), {"variant": name})
    plain = {slot: getattr(model, slot) for slot in slots}
    try:
        for slot, kind in slots.items():
            replace(slot, plain[slot], kind)
        yield variant
    finally:
        for slot, kind in slots.items():
            replace(slot, kind, plain[slot])


def replace(slot, old, new):
    """Put the class `new` in the place of `old` in each module of crate_mini that imported it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("crate_mini.") and vars(module).get(slot) is old:
            setattr(module, slot, new)


def flops_per_token(name, config, T=None, training=True):
    """FLOP per token as training.device.flops_per_token, with the products of the variant."""
    products = config.n_layer * VARIANTS[name].extra_products * config.n_embd**2
    plain = device.flops_per_token(config, T, training)
    return plain + 2 * products * (3 if training else 1)


# ---- the command ---------------------------------------------------------------------------------


def listing():
    """One line for each variant."""
    width = max(map(len, VARIANTS))
    lines = [f"    {name:<{width}}  {variant.summary}" for name, variant in VARIANTS.items()]
    return "\n".join(lines)


def main():
    """Train the variant that the first word names; returns the exit code of train.py."""
    name, *flags = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(f"python -m crate_mini.studies.variants NAME [flags of train.py]\n\n{listing()}")
        if len(sys.argv) > 1:
            return 0
        raise UserError(f"no variant given; choose {one_of(VARIANTS)}.")
    command = ["-m", "crate_mini.studies.variants", name, *flags]
    with installed(name) as variant:
        print(f"variant   {name}: {variant.summary}", flush=True)
        if variant.extra_products:
            extra = variant.extra_products
            print(
                f"          {extra} d^2 products per token and layer not counted below", flush=True
            )
        return runpy.run_path(str(results.ROOT / "train.py"))["main"](flags, command)


if __name__ == "__main__":
    # By its real name: torch.compile looks functions up in their modules.
    from crate_mini.studies import variants

    terminal.run(variants.main)

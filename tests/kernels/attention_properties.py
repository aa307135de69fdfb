"""Properties of the attention kernels in every version; what planted faults must violate.

Sizes lie on and next to the edges where they go wrong: vector widths, tiles of 12 and 24 queries,
blocks of 96 keys and 192 queries.
"""

import math

import torch
from closeness import assert_close
from guarded_kernels import DTYPE_CODES
from hypothesis import given
from hypothesis import strategies as st

from crate_mini import reference

LENGTHS = [0, 1, 2, 3, 5, 12, 13, 23, 25, 31, 33, 49, 95, 96, 97, 129, 191, 193, 290]
WIDTHS = [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 48, 64, 65, 127, 128, 129]
SIZE = 3_000_000  # multiply-adds of one product
LEAVES = {  # which of q, k and v a model computes; None: it is the one before
    "mssa": (0, None, None),
    "mssa, corrected queries": (0, 1, None),
    "mhsa": (0, 1, 2),
}


class Heads:
    """Queries, keys, values (B, T, K, p) and a gradient, as the models lay them out in memory."""

    def __init__(self, dtype, kind, sizes, layout, spread, seed):
        self.dtype, self.kind = dtype, kind
        self.sizes, self.layout = sizes, layout
        self.spread, self.seed = spread, seed
        self.generator = torch.Generator().manual_seed(seed)
        count = 3 - LEAVES[kind].count(None)
        self.leaves = [spread * self.normal() for _ in range(count)]
        if layout == "one projection":  # MHSA splits q, k and v off one tensor
            self.leaves = list(torch.stack(self.leaves, 2).unbind(2))
        self.gy = self.normal()

    def __repr__(self):
        values = {k: v for k, v in vars(self).items() if k not in ("leaves", "gy", "generator")}
        return str(values)

    def normal(self):
        values = torch.randn(*self.sizes, generator=self.generator, dtype=torch.float64)
        values = values.to(self.dtype)
        if self.layout == "heads":  # one after another in memory, not side by side
            return values.transpose(1, 2).contiguous().transpose(1, 2)
        return values

    def qkv(self, leaves=None):
        """q, k and v as the kernels take them, or with all three given."""
        q, k, v = (None if i is None else (leaves or self.leaves)[i] for i in LEAVES[self.kind])
        if leaves:
            k = q if k is None else k
            v = k if v is None else v
        return q, k, v

    def run(self, kernels):
        """[y, the gradients of the leaves]."""
        y, stats = kernels.attention(*self.qkv())
        gradients = kernels.attention_backward(*self.qkv(), y, stats, self.gy)
        return [y, *(t for t in gradients if t is not None)]

    def equation(self, gy, *leaves):
        """The same by autograd through the equation."""
        leaves = [t.detach().requires_grad_() for t in leaves]
        with torch.enable_grad():
            q, k, v = (t.transpose(1, 2) for t in self.qkv(leaves))
            y = reference.attention(q, k, v, self.sizes[3] ** -0.5).transpose(1, 2)
            return [y.detach(), *torch.autograd.grad(y, leaves, gy)]

    def cancelling_terms(self):
        """How large g_i . v_j and g_i . y_i are, whose difference is 0 where a weight is 1.

        Each product as the sum of its absolute terms: what the sum leaves may be small by luck.
        """
        q, k, v = (t.double().transpose(1, 2) for t in self.qkv(self.leaves))
        if not q.numel():
            return 0.0
        products = (self.gy.double().transpose(1, 2).abs() @ v.abs().mT).max()
        return float(products * max(q.abs().max(), k.abs().max()) / math.sqrt(self.sizes[3]))

    def check(self, kernels):
        names = ["y", "gq", "gk", "gv"]
        terms = {1: self.cancelling_terms(), 2: self.cancelling_terms()}
        inputs = self.gy, *self.leaves
        assert_close(self.run(kernels), self.equation, *inputs, names=names, terms=terms)


@st.composite
def heads(draw, spreads=(1.0, 0.1, 3.0), lengths=LENGTHS):
    """Attention problems of any size, dtype and layout."""
    dtype = draw(st.sampled_from(list(DTYPE_CODES)))
    kind = draw(st.sampled_from(list(LEAVES)))
    T = draw(st.sampled_from(lengths))
    p = draw(st.sampled_from([p for p in WIDTHS if T * T * p <= SIZE]))
    B, K = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]))
    layout = draw(st.sampled_from(["tokens", "heads", "one projection"]))
    spread = draw(st.sampled_from(spreads))
    seed = draw(st.integers(0, 2**31))
    return Heads(dtype, kind, (B, T, K, p), layout, spread, seed)


@given(p=heads())
def attention(kernels, p):
    """The equation and its gradients, with the same bits for one thread and two."""
    kernels.threads = 1
    p.check(kernels)
    results = p.run(kernels)
    kernels.threads = 2
    assert all(map(torch.equal, p.run(kernels), results)), "threads change bits"


@given(p=heads(spreads=(0.0, 30.0, 100.0), lengths=[1, 2, 13, 33, 97]))
def attention_with_extreme_scores(kernels, p):
    """All equal, or up to some 1e4 apart, so that most weights are 0 and one is 1."""
    kernels.threads = 1
    p.check(kernels)


@given(p=heads(lengths=LENGTHS[2:]), data=st.data())
def later_tokens_change_no_bit(kernels, p, data):
    kernels.threads = 1
    y, stats = kernels.attention(*p.qkv())
    first = data.draw(st.integers(1, p.sizes[1] - 1))
    for leaf in p.leaves:
        leaf[:, first:] += 1
    new_y, new_stats = kernels.attention(*p.qkv())
    assert torch.equal(y[:, :first], new_y[:, :first])
    assert torch.equal(stats[..., :first], new_stats[..., :first])
    assert not torch.equal(stats[..., first:], new_stats[..., first:])


def check_a_long_context(kernels, dtype, T=4096, p=5):
    """Some rows of T, computed one by one; only these have a gradient."""
    problem = Heads(dtype, "mhsa", (1, T, 1, p), "tokens", 1.0, seed=0)
    rows = [0, 95, 96, 2049, T - 1]
    problem.gy = problem.gy * torch.isin(torch.arange(T), torch.tensor(rows))[:, None, None]

    def equation(gy, *leaves):
        q, k, v = (t.detach().requires_grad_() for t in leaves)
        with torch.enable_grad():
            outputs = []
            for i in rows:
                seen = slice(0, i + 1)
                scores = q[0, i] @ k[0, seen, 0].mT / math.sqrt(p)
                outputs.append(scores.softmax(-1) @ v[0, seen, 0])
            y = torch.stack(outputs)[None]
            return [y.detach(), *torch.autograd.grad(y, (q, k, v), gy[:, rows])]

    kernels.threads = 2
    y, *gradients = problem.run(kernels)
    results = [y[:, rows], *gradients]
    assert_close(results, equation, problem.gy, *problem.leaves, names=["y", "gq", "gk", "gv"])

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
SHARED = {  # which of q, k and v a model computes separately
    "mssa": (0, 0, 0),
    "mssa, corrected queries": (0, 1, 1),
    "mssa, shifted keys": (0, 1, 0),
    "mhsa": (0, 1, 2),
}


class Heads:
    """Queries, keys, values (B, K, T, p) and a gradient, as the models lay them out in memory."""

    def __init__(self, dtype, kind, sizes, layout, spread, seed):
        self.dtype, self.kind = dtype, kind
        self.sizes, self.layout = sizes, layout
        self.spread, self.seed = spread, seed
        self.generator = torch.Generator().manual_seed(seed)
        self.leaves = [spread * self.normal() for _ in range(1 + max(SHARED[kind]))]
        if layout == "one projection":  # MHSA splits q, k and v off one tensor
            B, K, T, p = sizes
            together = torch.stack(self.leaves).permute(1, 3, 0, 2, 4).contiguous()
            self.leaves = list(together.permute(2, 0, 3, 1, 4))
        self.gy = self.normal()

    def __repr__(self):
        values = {k: v for k, v in vars(self).items() if k not in ("leaves", "gy", "generator")}
        return str(values)

    def normal(self):
        """(B, K, T, p); in memory as (B, T, K, p) unless heads are laid out one after another."""
        B, K, T, p = self.sizes
        values = torch.randn(B, T, K, p, generator=self.generator, dtype=torch.float64)
        values = values.to(self.dtype).transpose(1, 2)
        return values.contiguous() if self.layout == "heads" else values

    def qkv(self, leaves=None):
        return [(leaves or self.leaves)[i] for i in SHARED[self.kind]]

    def run(self, kernels):
        """[y, gradient of each leaf], (B, K, T, p)."""
        q, k, v = self.qkv()
        y, stats = (t for t in kernels.attention(q, k, v))
        y = y.transpose(1, 2)
        gradients = kernels.attention_backward(q, k, v, y, stats, self.gy)
        sums = [0] * len(self.leaves)
        for leaf, gradient in zip(SHARED[self.kind], gradients):
            if gradient is not None:
                sums[leaf] = sums[leaf] + gradient.transpose(1, 2)
        return [y, *sums]

    def equation(self, gy, *leaves):
        """The same by autograd through the equation."""
        leaves = [t.detach().requires_grad_() for t in leaves]
        with torch.enable_grad():
            y = reference.attention(*self.qkv(leaves))
            return [y.detach(), *torch.autograd.grad(y, leaves, gy)]

    def cancelling_terms(self):
        """How large g_i . v_j and g_i . y_i are, whose difference is 0 where a weight is 1."""
        q, k, v = (t.double() for t in self.qkv())
        if not q.numel():
            return 0.0
        products = (self.gy.double() @ v.mT).abs().max()
        return float(products * max(q.abs().max(), k.abs().max()) / math.sqrt(self.sizes[3]))

    def check(self, kernels):
        names = ["y", "gq", "gk", "gv"]
        terms = {leaf + 1: self.cancelling_terms() for leaf in SHARED[self.kind][:2]}
        inputs = self.gy, *self.leaves
        assert_close(self.run(kernels), self.equation, *inputs, names=names, terms=terms)


@st.composite
def heads(draw, spreads=(1.0, 0.1, 3.0), lengths=LENGTHS):
    """Attention problems of any size, dtype and layout."""
    dtype = draw(st.sampled_from(list(DTYPE_CODES)))
    kind = draw(st.sampled_from(list(SHARED)))
    T = draw(st.sampled_from(lengths))
    p = draw(st.sampled_from([p for p in WIDTHS if T * T * p <= SIZE]))
    B, K = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]))
    layout = draw(st.sampled_from(["tokens", "heads", "one projection"]))
    spread = draw(st.sampled_from(spreads))
    seed = draw(st.integers(0, 2**31))
    return Heads(dtype, kind, (B, K, T, p), layout, spread, seed)


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
    before = kernels.attention(*p.qkv())
    first = data.draw(st.integers(1, p.sizes[2] - 1))
    for leaf in p.leaves:
        leaf[:, :, first:] += 1
    after = kernels.attention(*p.qkv())
    assert torch.equal(before[0][:, :first], after[0][:, :first])
    assert torch.equal(before[1][..., :first], after[1][..., :first])
    assert not torch.equal(before[1][..., first], after[1][..., first])


def check_a_long_context(kernels, dtype, T=4096, p=5):
    """Some rows of T, computed one by one; only these have a gradient."""
    problem = Heads(dtype, "mhsa", (1, 1, T, p), "tokens", 1.0, seed=0)
    rows = [0, 95, 96, 2049, T - 1]
    problem.gy = problem.gy * torch.isin(torch.arange(T), torch.tensor(rows))[:, None]

    def equation(gy, *leaves):
        q, k, v = (t.detach().requires_grad_() for t in leaves)
        with torch.enable_grad():
            outputs = []
            for i in rows:
                scores = q[:, :, i, None] @ k[:, :, : i + 1].mT / math.sqrt(p)
                outputs.append(scores.softmax(-1) @ v[:, :, : i + 1])
            y = torch.cat(outputs, 2)
            return [y.detach(), *torch.autograd.grad(y, (q, k, v), gy[:, :, rows])]

    kernels.threads = 2
    y, *gradients = problem.run(kernels)
    results = [y[:, :, rows], *gradients]
    assert_close(results, equation, problem.gy, *problem.leaves, names=["y", "gq", "gk", "gv"])

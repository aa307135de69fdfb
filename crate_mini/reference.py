"""The operations of a CRATE block in plain PyTorch, one equation a line: the specification of every kernel.

Letters: B, T batch and time; d width; K heads, p = d/K head width; h codes per token; N rows (any leading
shape); U (d, d) subspace bases; D (d, h) dictionary; a codes; r residual; eta step; lam threshold.
Rows are tokens, so a product that the paper writes D^T x reads `x @ D` here, and D a reads `a @ D.T`.
Everything works in any floating dtype; float64 gives the values that kernels are judged against.
Equations: CRATE (NeurIPS 2023), the MSSA and ISTA half steps, as the released CRATE-LM code computes them.
"""

import torch
import torch.nn.functional as F


def mssa_project(z, weight, bias, U, n_head, eps=1e-5):
    """u = LN(z) U, split into heads: the one projection that MSSA uses as query, key and value.

    z (B, T, d); weight (d,), bias (d,) or None: LayerNorm's; U (d, d). Returns u (B, T, K, p), contiguous;
    `u.transpose(1, 2)` is what scaled_dot_product_attention takes as q, k and v, without a copy.
    """
    x = F.layer_norm(z, z.shape[-1:], weight, bias, eps)
    u = x @ U  # U^T LN(z) of the paper
    return u.view(*z.shape[:-1], n_head, z.shape[-1] // n_head)


def ista_step(a, r, D, eta, lam):
    """a' = ReLU(a + eta D^T r - eta lam): one proximal-gradient step on the non-negative lasso.

    a (..., h) or None for the zero start; r (..., d) = x - D a; D (d, h); eta float; lam float or (h,).
    """
    g = eta * (r @ D) - eta * lam
    return F.relu(g if a is None else a + g)


def ista_codes(x, D, eta, lam, steps):
    """Codes (..., h) after `steps` ISTA steps from zero on min_{a >= 0} lam |a|_1 + 1/2 |x - D a|^2.

    The residual form x - D a needs D^T x only inside the first step: 2 steps - 1 products, not 2 steps.
    """
    a = ista_step(None, x, D, eta, lam)
    for _ in range(steps - 1):
        a = ista_step(a, x - a @ D.T, D, eta, lam)
    return a


def ista(x, D, eta, lam, steps, decoder=None):
    """The whole sparsifier: codes from zero, then y = D a (or `decoder` a, both (d, h)). Returns (y, a)."""
    a = ista_codes(x, D, eta, lam, steps)
    return a @ (D if decoder is None else decoder).T, a


def lasso(x, a, D, lam):
    """lam |a|_1 + 1/2 |x - D a|^2 of each row, (...): the objective that ISTA steps are meant to lower."""
    return (lam * a.abs()).sum(-1) + 0.5 * (x - a @ D.T).square().sum(-1)


def cross_entropy(x, W, targets):
    """Mean next-token loss in nats; x (..., d), W (V, d) the tied embedding, targets (...) of ids."""
    logits = (x @ W.T).flatten(0, -2)
    return F.cross_entropy(
        logits.to(torch.promote_types(torch.float32, logits.dtype)), targets.flatten()
    )

"""The mathematics of CRATE in plain PyTorch, one equation a line.

The theory behind model.py and the specification of the compiled kernels. Letters as in model.py:
N tokens, d width, K heads of width p, h codes; U (d, d) or its heads U_k (d, p); D (d, h); a codes;
eta, lam. Rows are tokens, so the paper's D^T x reads `x @ D` here, and D a reads `a @ D.T`.
Everything works in any floating dtype; kernels are compared with float64.

The first half is what CRATE is derived from (Yu et al., NeurIPS 2023). A good representation Z
takes many bits as a whole, R(Z), few bits once its subspaces are known, R^c(Z | U), and few
non-zero codes. Each layer lowers R^c by a gradient step (attention), then the lasso objective by
proximal-gradient steps (ISTA). The second half is the computation of the released CRATE-LM,
which model.py follows.
"""

import torch
import torch.nn.functional as F

EPS2 = 0.01  # eps^2, the squared quantisation error in the rates; 0.01 in the released measurement

# ---- the objective -------------------------------------------------------------------------------


def coding_rate(Z, eps2=EPS2):
    """R(Z) = 1/2 logdet(I + d / (N eps^2) Z^T Z), in nats.

    The nats per token of Z (.., N, d), coded as a whole up to squared error eps^2. Returns (..).
    """
    return compression_rate(Z[..., None, :], eps2)


def compression_rate(u, eps2=EPS2):
    """R^c(Z | U) = sum_k 1/2 logdet(I + p / (N eps^2) u_k^T u_k), in nats.

    The nats per token once the subspaces are known; u (.., N, K, p) holds the projections
    u_k = Z U_k. Returns (..).
    """
    u = u.transpose(-3, -2)  # (.., K, N, p)
    N, p = u.shape[-2:]
    gram = u.mT @ u if p < N else u @ u.mT  # both give the same determinant
    identity = torch.eye(gram.shape[-1], dtype=u.dtype, device=u.device)
    return 0.5 * torch.logdet(identity + p / (N * eps2) * gram).sum(-1)


def sparse_rate_reduction(Z, U, lam, eps2=EPS2):
    """R(Z) - R^c(Z | U) - lam |Z|_0, the objective that every layer should raise.

    Z (N, d), U (K, d, p); a scalar.
    """
    u = torch.einsum("nd,kdp->nkp", Z, U)
    return coding_rate(Z, eps2) - compression_rate(u, eps2) - lam * Z.count_nonzero()


# ---- attention: a gradient step on the compression rate ------------------------------------------


def compression_gradient(Z, U, eps2=EPS2):
    """grad_Z R^c = alpha sum_k Z U_k (I + alpha U_k^T Z^T Z U_k)^-1 U_k^T, alpha = p / (N eps^2).

    Z (N, d), U (K, d, p); returns (N, d).
    """
    alpha = U.shape[-1] / (len(Z) * eps2)
    u = torch.einsum("nd,kdp->knp", Z, U)
    inverse = torch.linalg.inv(torch.eye(u.shape[-1], dtype=u.dtype) + alpha * u.mT @ u)
    return alpha * torch.einsum("knp,kpq,kdq->nd", u, inverse, U)


def compression_step(Z, U, kappa, eps2=EPS2):
    """Z - kappa grad R^c to first order in alpha: (I + alpha G)^-1 ~ I - alpha G, G = u_k^T u_k.

    = Z - kappa alpha sum_k u_k U_k^T + kappa alpha^2 sum_k (u_k u_k^T) u_k U_k^T. Z (N, d),
    U (K, d, p); returns (N, d). Each token moves towards the tokens it resembles within a subspace;
    attention is the last sum, with the similarities u_k u_k^T passed through a softmax.
    """
    alpha = U.shape[-1] / (len(Z) * eps2)
    u = torch.einsum("nd,kdp->knp", Z, U)
    shrink = torch.einsum("knp,kdp->nd", u, U)
    attract = torch.einsum("knp,kdp->nd", u @ u.mT @ u, U)
    return Z - kappa * alpha * shrink + kappa * alpha**2 * attract


def mssa(Z, U, scale=1.0, causal=True):
    """MSSA(Z) = sum_k softmax(scale u_k u_k^T) u_k U_k^T, u_k = Z U_k: the operator of the paper.

    Z (N, d), U (K, d, p); returns (N, d). The derived step is (1 - c) Z + c MSSA(Z); the deployed
    one, Z + MSSA(Z), is twice that with c = 1/2. A language model masks later tokens (causal),
    scales by 1 / sqrt(p), and replaces the outer U_k with a free output map.
    """
    u = torch.einsum("nd,kdp->knp", Z, U)
    return torch.einsum("knp,kdp->nd", attention(u, u, u, scale, causal), U)


def attention(q, k, v, scale, causal=True):
    """softmax(scale q k^T) v, head by head, no token seeing a later one; q, k, v (.., T, p)."""
    scores = scale * q @ k.mT
    if causal:
        later = torch.ones_like(scores, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores.softmax(-1) @ v


# ---- the sparsifier: proximal-gradient steps on the lasso ----------------------------------------


def lasso(x, a, D, lam):
    """lam |a|_1 + 1/2 |x - D a|^2 of each row: the objective that ISTA steps lower.

    x (.., d), a (.., h), D (d, h), lam float or (h,); returns (..).
    """
    return (lam * a.abs()).sum(-1) + 0.5 * (x - a @ D.T).square().sum(-1)


def ista_step(a, r, D, eta, lam):
    """a' = ReLU(a + eta D^T r - eta lam): one proximal-gradient step on the non-negative lasso.

    a (.., h), None for the zero start; r (.., d) = x - D a; D (d, h); eta float; lam float or (h,).
    """
    step = eta * (r @ D) - eta * lam
    return F.relu(step if a is None else a + step)


def ista_codes(x, D, eta, lam, steps):
    """Codes (.., h) after `steps` ISTA steps from zero on min_{a >= 0} lam |a|_1 + 1/2 |x - D a|^2.

    x (.., d). The residual form x - D a needs 2 * steps - 1 products.
    """
    a = ista_step(None, x, D, eta, lam)
    for _ in range(steps - 1):
        a = ista_step(a, x - a @ D.T, D, eta, lam)
    return a


def top_k(a, k):
    """The k largest codes of each token, the others 0: a projection onto {a : |a|_0 <= k}.

    a (.., h) >= 0. Applied to a gradient step it is the proximal map of that constraint, where the
    threshold of `ista_step` is that of lam |a|_1. Of equal codes at the edge only as many stay as
    fit, so never more than k do.
    """
    values, indices = a.topk(k, sorted=False)
    return torch.zeros_like(a).scatter(-1, indices, values)


def debias(a, eta, lam):
    """Codes without the shrinkage of the last step: eta lam is added to those that it left."""
    return torch.where(a == 0, a, a + eta * lam)


# ---- the ops of model.py -------------------------------------------------------------------------


def mssa_project(z, weight, bias, U, n_head, eps=1e-5):
    """u = LN(z) U, split into heads: the one projection that MSSA uses as query, key and value.

    z (B, T, d); weight (d,) and bias (d,) or None of the LayerNorm; U (d, d). Returns u
    (B, T, K, p), contiguous; scaled_dot_product_attention takes `u.transpose(1, 2)` as q, k and v
    without a copy.
    """
    x = F.layer_norm(z, z.shape[-1:], weight, bias, eps)
    u = x @ U  # U^T LN(z) of the paper
    return u.view(*z.shape[:-1], n_head, z.shape[-1] // n_head)


def ista(x, D, eta, lam, steps, decoder=None):
    """The whole sparsifier: codes from zero, then y = D a, or y = decoder a.

    x (.., d), D and decoder (d, h). Returns (y (.., d), a (.., h)).
    """
    a = ista_codes(x, D, eta, lam, steps)
    return a @ (D if decoder is None else decoder).T, a


def cross_entropy(x, W, targets):
    """Mean next-token loss in nats; x (.., d), W (V, d) the tied embedding, targets (..) of ids."""
    logits = (x @ W.T).flatten(0, -2)
    logits = logits.to(torch.promote_types(torch.float32, logits.dtype))  # float32 at least
    return F.cross_entropy(logits, targets.flatten())

"""What the kernels are compared with: reference.py's equations with all they pass through.

Gradients are taken on the support that a forward pass chose, where ISTA is a polynomial.
"""

import torch
import torch.nn.functional as F

from crate_mini import reference


def ista_equation(x, D, decoder, lams, eta, lam, steps):
    """(y, a, a_1..a_{S-1}, r_2..r_S); the threshold is lams (h,), or lam where lams is None."""
    if lams is not None:
        lam = lams.to(x.dtype)
    codes = [reference.ista_codes(x, D, eta, lam, t) for t in range(1, steps + 1)]
    residuals = [x - a @ D.T for a in codes]
    y = codes[-1] @ (D if decoder is None else decoder).T
    return y, codes[-1], torch.stack(codes)[:-1], torch.stack(residuals)[:-1]


def ista_gradients(gy, ga, x, D, decoder, a, trail_a, trail_r, eta):
    """(gx, gD, gdec, glam), the formulas of csrc/kernels.h. decoder None: tied, and gdec is None.

    gy and ga may be None, meaning zero.
    """
    steps = len(trail_a) + 1
    gy = torch.zeros_like(x) if gy is None else gy
    G = gy @ (D if decoder is None else decoder)
    if ga is not None:
        G = G + ga
    G = eta * G * (a > 0)
    gx, gD = torch.zeros_like(x), torch.zeros_like(D)
    glam = D.new_zeros(D.shape[1])
    for t in range(steps, 0, -1):
        glam = glam - G.sum(0)
        gr = G @ D.T
        gx = gx + gr
        if t == 1:
            gD = gD + x.T @ G
            break
        gD = gD + trail_r[t - 2].T @ G - gr.T @ trail_a[t - 2]
        G = (trail_a[t - 2] > 0) * (G - eta * gr @ D)
    if decoder is None:
        return gx, gD + gy.T @ a, None, glam
    return gx, gD, gy.T @ a, glam


def ista_gradients_by_autograd(gy, ga, x, D, decoder, lams, supports, eta, lam):
    """[gx, gD, gdec, glams] of ISTA on fixed supports, one (N, h) of zeros and ones per step."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, D, decoder, lams)]
    x, D, decoder, lams = leaves
    if lams is not None:
        lam = lams.to(x.dtype)
    a = supports[0] * (eta * (x @ D) - eta * lam)
    for support in supports[1:]:
        a = support * (a + eta * ((x - a @ D.T) @ D) - eta * lam)
    y = a @ (D if decoder is None else decoder).T
    total = 0 * y.sum()
    if gy is not None:
        total = total + (gy * y).sum()
    if ga is not None:
        total = total + (ga * a).sum()
    gradients = iter(torch.autograd.grad(total, [t for t in leaves if t is not None]))
    return [None if t is None else next(gradients) for t in leaves]


def mssa_equation(z, weight, bias, U):
    return F.layer_norm(z, z.shape[-1:], weight, bias).to(U.dtype) @ U


def head_equation(x, W, targets):
    """[loss (1,), gx, gW]: reference.py's mean cross-entropy, its softmax in the dtype of sums.

    Where no target counts, the gradients are 0, as PyTorch's are.
    """
    leaves = [t.detach().requires_grad_() for t in (x, W)]
    with torch.enable_grad():
        logits = leaves[0] @ leaves[1].T
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, targets)
        gradients = torch.autograd.grad(loss, leaves)
    return [loss.detach()[None], *gradients]


def head_terms(x, W, targets):
    """{number of an output: size of the terms that cancel in it}, for assert_close.

    Pull and push of equal rows cancel in the gradients, and the roundings of a sum of n equal terms
    go one way: n times as far, not the sqrt(n) times of assert_close. The equation's own loss of a
    likely target is the logarithm of a rounded number just above 1, which only float64 shows.
    """
    terms = {0: 1.0} if x.dtype == torch.float64 else {}
    x, W = x.double(), W.double()
    counts = targets >= 0
    if not counts.any():
        return terms
    weights = (x @ W.T).softmax(-1)[counts]
    weights += F.one_hot(targets[counts], len(W))
    weights /= counts.sum()
    terms[1] = float((weights @ W.abs()).max()) * one_way(W)
    terms[2] = float((weights.T @ x[counts].abs()).max()) * one_way(x)
    return terms


def one_way(rows):
    """How much further the roundings of a sum over n rows go if all rows are equal."""
    return max(1, len(rows) ** 0.5 / 2) if (rows == rows[:1]).all() else 1


def cancelling_terms(gu, z, weight, U, eps=1e-5):
    """How large the terms are that cancel in gz.

    LayerNorm of one or two columns leaves nothing of them but rounding.
    """
    if len(z) == 0 or z.shape[1] == 0:
        return 0.0
    gx = gu.double() @ U.double().T * weight
    rstd = (z.double().var(-1, correction=0) + eps).rsqrt()
    return float((rstd[:, None] * gx).abs().max())


def mssa_gradients(gu, z, weight, bias, U, equation=mssa_equation):
    """[gz, gweight, gbias, gU] by autograd through the equation; None for an absent bias."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (z, weight, bias, U)]
    with torch.enable_grad():
        u = equation(*leaves)
        gradients = iter(torch.autograd.grad(u, [t for t in leaves if t is not None], gu))
    return [None if t is None else next(gradients) for t in leaves]

"""The sparsifier codes a token x (d) on a dictionary D (d, h): x is about D a, with few codes a.

    lasso(a) = lam |a|_1 + 1/2 |x - D a|^2,      a >= 0

ISTA lowers it: a gradient step on the square, then the threshold.

    a <- ReLU(a + eta D^T (x - D a) - eta lam)

    lasso |*                                 eta |D|^2 < 2: it never rises
          |  *                               |D|: the largest singular value of D
          |    * *
          |        *  *  *  *
          +---------------------- steps

Rows are tokens: x (N, d), a (N, h), so D a is written a @ D.T, and D^T r is r @ D.
"""

import torch

from crate_mini.course.checking import cases

TITLE = "The ISTA step, and how far it may go"
STARS = 1
MINUTES = 25
TEACHES = "sparse coding by proximal gradient, and the step size at which it breaks"
HINTS = (
    "The residual is x - a @ D.T, shape (N, d).",
    "torch.linalg.matrix_norm(D, 2) is the largest singular value.",
    "lasso_path starts at a = 0 and has steps + 1 entries, the first before any step.",
)

# ---- solution ------------------------------------------------------------------------------------


def lasso(x, a, D, lam):
    """The objective of each token (N,); x (N, d), a (N, h), D (d, h), lam a number."""
    error = x - a @ D.T
    return lam * a.abs().sum(-1) + 0.5 * (error**2).sum(-1)


def ista_step(x, a, D, eta, lam):
    """The codes (N, h) after one step from a (N, h)."""
    residual = x - a @ D.T
    return torch.relu(a + eta * residual @ D - eta * lam)


def largest_eta(D):
    """The step size (a scalar tensor) below which no step ever raises the lasso."""
    return 2 / torch.linalg.matrix_norm(D, 2) ** 2


def lasso_path(x, D, eta, lam, steps):
    """The mean lasso over the tokens before and after each step from a = 0: (steps + 1,)."""
    a = torch.zeros(len(x), D.shape[1], dtype=x.dtype)
    costs = [lasso(x, a, D, lam).mean()]
    for _ in range(steps):
        a = ista_step(x, a, D, eta, lam)
        costs.append(lasso(x, a, D, lam).mean())
    return torch.stack(costs)


# ---- check ---------------------------------------------------------------------------------------


def without_half(x, a, D, lam):
    """the factor 1/2 in front of the square is missing"""
    return lam * a.abs().sum(-1) + ((x - a @ D.T) ** 2).sum(-1)


def not_squared(x, a, D, lam):
    """the error has to be squared: 1/2 |x - D a|^2"""
    return lam * a.abs().sum(-1) + 0.5 * (x - a @ D.T).norm(dim=-1)


def without_penalty(x, a, D, lam):
    """the penalty lam |a|_1 is missing"""
    return lasso(x, a, D, 0.0)


def threshold_without_eta(x, a, D, eta, lam):
    """the threshold is eta lam, not lam"""
    return torch.relu(a + eta * (x - a @ D.T) @ D - lam)


def without_threshold(x, a, D, eta, lam):
    """the threshold eta lam is missing"""
    return ista_step(x, a, D, eta, 0.0)


def without_relu(x, a, D, eta, lam):
    """negative codes are left; cut at zero with a ReLU"""
    return a + eta * (x - a @ D.T) @ D - eta * lam


def wrong_direction(x, a, D, eta, lam):
    """the gradient step has the wrong sign: add eta D^T (x - D a)"""
    return torch.relu(a - eta * (x - a @ D.T) @ D - eta * lam)


def forgets_codes(x, a, D, eta, lam):
    """the step starts at 0 instead of at a"""
    return torch.relu(eta * (x - a @ D.T) @ D - eta * lam)


def two_sided(x, a, D, eta, lam):
    """the threshold is two-sided; codes are not negative here"""
    moved = a + eta * (x - a @ D.T) @ D
    return moved.sign() * torch.relu(moved.abs() - eta * lam)


def not_the_largest(D):
    """1 / |D|^2 is safe, but descent holds up to 2 / |D|^2"""
    return largest_eta(D) / 2


def norm_not_squared(D):
    """the norm of D has to be squared"""
    return 2 / torch.linalg.matrix_norm(D, 2)


def frobenius(D):
    """this is the Frobenius norm; take the largest singular value"""
    return 2 / torch.linalg.matrix_norm(D) ** 2


def starts_late(x, D, eta, lam, steps):
    """the first entry is the lasso at a = 0, before any step"""
    return lasso_path(x, D, eta, lam, steps + 1)[1:]


MISTAKES = {
    lasso: [without_half, not_squared, without_penalty],
    ista_step: [
        threshold_without_eta,
        without_threshold,
        without_relu,
        wrong_direction,
        forgets_codes,
        two_sided,
    ],
    largest_eta: [not_the_largest, norm_not_squared, frobenius],
    lasso_path: [starts_late],
}


def check(learner):
    for case in cases(20):
        N, d, h = case.integer(1, 5), case.integer(2, 6), case.integer(7, 12)
        x, a, D = case.normal(N, d), case.normal(N, h).relu(), case.normal(d, h)
        eta, lam = case.uniform(0.05, 0.3), case.uniform(0.05, 0.5)
        learner.agree(lasso, x, a, D, lam)
        learner.agree(ista_step, x, a, D, eta, lam)
        limit = learner.agree(largest_eta, D)
        learner.agree(lasso_path, x, D, 0.99 * limit.item(), lam, 5)
    one = torch.ones(1, 1, dtype=torch.float64)
    costs = ", ".join(f"{cost:.2f}" for cost in lasso_path(one, one, 2.5, 0.1, 3))
    return f"With x = D = 1 and eta = 2.5, beyond your limit of 2, the lasso goes {costs}."

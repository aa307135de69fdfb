"""Attention in CRATE begins as a step down the rate R^c of exercise 1.

With alpha = p / (N eps2) and u_k = Z U_k (N, p),

    grad R^c = alpha sum_k u_k (I + alpha u_k^T u_k)^-1 U_k^T                    (N, d)

To first order in alpha the inverse is I - alpha u_k^T u_k. A gradient step of size kappa becomes

    Z - kappa alpha   sum_k            u_k  U_k^T         every token shrinks ...
      + kappa alpha^2 sum_k (u_k u_k^T) u_k  U_k^T         ... and moves to the tokens it resembles

                 o                      o
            o  <--- x ---> o                u_k u_k^T (N, N): similarities within a subspace
                 o

The last sum is attention without a softmax: queries, keys and values are all u_k.
"""

import torch

from crate_mini.course.checking import cases

TITLE = "The gradient step and its first-order form"
STARS = 3
MINUTES = 40
TEACHES = "where query = key = value comes from"
HINTS = (
    "Work with one U_k at a time: u = Z @ U_k, then add up over k.",
    "torch.linalg.inv inverts (p, p) matrices. Autograd through exercise 1 is a second way to the "
    "gradient, and a good test of the first.",
    "u @ (u.T @ u) and (u @ u.T) @ u are the same matrix; the second order shows the attention.",
)

# ---- solution ------------------------------------------------------------------------------------


def compression_gradient(Z, U, eps2):
    """grad_Z R^c (N, d); Z (N, d), U (K, d, p)."""
    p = U.shape[2]
    alpha = p / (len(Z) * eps2)
    total = torch.zeros_like(Z)
    for U_k in U:
        u = Z @ U_k
        inverse = torch.linalg.inv(torch.eye(p, dtype=Z.dtype) + alpha * u.T @ u)
        total = total + alpha * u @ inverse @ U_k.T
    return total


def compression_step(Z, U, kappa, eps2):
    """Z (N, d) after a gradient step of size kappa, with the inverse to first order in alpha."""
    alpha = U.shape[2] / (len(Z) * eps2)
    new = Z
    for U_k in U:
        u = Z @ U_k
        new = new - kappa * alpha * u @ U_k.T
        new = new + kappa * alpha**2 * (u @ u.T) @ u @ U_k.T
    return new


# ---- check ---------------------------------------------------------------------------------------


def without_alpha(Z, U, eps2):
    """the factor alpha in front of the sum is missing"""
    return compression_gradient(Z, U, eps2) * len(Z) * eps2 / U.shape[2]


def not_inverted(Z, U, eps2):
    """the matrix I + alpha u^T u is not inverted"""
    alpha = U.shape[2] / (len(Z) * eps2)
    parts = []
    for U_k in U:
        u = Z @ U_k
        parts.append(alpha * u @ (torch.eye(u.shape[1], dtype=u.dtype) + alpha * u.T @ u) @ U_k.T)
    return sum(parts)


def first_subspace_only(Z, U, eps2):
    """only the first subspace is counted; add up over k"""
    return compression_gradient(Z, U[:1], eps2)


def uphill(Z, U, kappa, eps2):
    """the step goes uphill; subtract the gradient"""
    return compression_step(Z, U, -kappa, eps2)


def without_attraction(Z, U, kappa, eps2):
    """the second sum is missing: every token shrinks, but none moves towards the others"""
    alpha = U.shape[2] / (len(Z) * eps2)
    return Z - kappa * alpha * sum(Z @ U_k @ U_k.T for U_k in U)


def alpha_not_squared(Z, U, kappa, eps2):
    """the second sum has alpha^2, not alpha, in front"""
    alpha = U.shape[2] / (len(Z) * eps2)
    shrunk = without_attraction(Z, U, kappa, eps2)
    return shrunk + (compression_step(Z, U, kappa, eps2) - shrunk) / alpha


def exact_step(Z, U, kappa, eps2):
    """this is the exact gradient step; replace the inverse by I - alpha u^T u"""
    return Z - kappa * compression_gradient(Z, U, eps2)


def step_alone(Z, U, kappa, eps2):
    """this is the change of Z; return Z after the step"""
    return compression_step(Z, U, kappa, eps2) - Z


MISTAKES = {
    compression_gradient: [without_alpha, not_inverted, first_subspace_only],
    compression_step: [uphill, without_attraction, alpha_not_squared, exact_step, step_alone],
}


def check(learner):
    for case in cases(20):
        N, K, p = case.integer(2, 9), case.integer(2, 4), case.integer(2, 3)
        Z, U, eps2 = case.normal(N, K * p), case.normal(K, K * p, p), case.uniform(0.1, 1)
        learner.agree(compression_gradient, Z, U, eps2)
        learner.agree(compression_step, Z, U, case.uniform(0.01, 0.1), eps2)

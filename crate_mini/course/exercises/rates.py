"""A text of N tokens is a matrix Z (N, d), one token a row. How many nats does a token cost?

Coded as a whole, up to a squared error of eps2:

    R(Z) = 1/2 logdet(I + d / (N eps2) Z^T Z)                  I (d, d)

Once K subspaces are known, each of p dimensions and spanned by the columns of U_k (d, p), the same
formula is applied to the projection u_k = Z U_k (N, p) in each, with p in the place of d:

    R^c(Z | U) = sum_k 1/2 logdet(I + p / (N eps2) u_k^T u_k)

            U_1                 Z (N, d) --- U_1 --> u_1 (N, p) --> rate of u_1
          x x  . .                 |                                   +
        x x     . .   U_2          +-------- U_2 --> u_2 (N, p) --> rate of u_2
                                                                       = R^c

Two tokens (1, 0) and (0, 1) with the axes as subspaces and eps2 = 0.01 cost R = ln 101 and
R^c = ln 51.
"""

import torch

from crate_mini.course.checking import cases

TITLE = "The coding rate and R^c"
STARS = 1
MINUTES = 20
TEACHES = "what CRATE's objective counts, and why known subspaces make a text cheap"
HINTS = (
    "torch.logdet takes a matrix; torch.eye(d, dtype=Z.dtype) is the identity.",
    "R^c is a sum of coding rates: write coding_rate first and call it on each u_k.",
)

# ---- solution ------------------------------------------------------------------------------------


def coding_rate(Z, eps2):
    """R(Z), a scalar tensor in nats; Z (N, d), eps2 a number."""
    N, d = Z.shape
    identity = torch.eye(d, dtype=Z.dtype)
    return 0.5 * torch.logdet(identity + d / (N * eps2) * Z.T @ Z)


def compression_rate(Z, U, eps2):
    """R^c(Z | U), a scalar tensor in nats; Z (N, d), U (K, d, p)."""
    return sum(coding_rate(Z @ U_k, eps2) for U_k in U)


# ---- check ---------------------------------------------------------------------------------------


def without_half(Z, eps2):
    """the factor 1/2 in front of logdet is missing"""
    return 2 * coding_rate(Z, eps2)


def without_width(Z, eps2):
    """d in d / (N eps2) is missing"""
    return coding_rate(Z, eps2 * Z.shape[1])


def without_tokens(Z, eps2):
    """N in d / (N eps2) is missing: the rate is per token"""
    return coding_rate(Z, eps2 / len(Z))


def eps_squared_twice(Z, eps2):
    """eps2 is already eps^2, so it is not squared again"""
    return coding_rate(Z, eps2**2)


def without_identity(Z, eps2):
    """the identity I is missing inside logdet"""
    N, d = Z.shape
    return 0.5 * torch.logdet(d / (N * eps2) * Z.T @ Z)


def in_bits(Z, eps2):
    """the rate is in bits; use the natural logarithm"""
    return coding_rate(Z, eps2) / torch.log(torch.tensor(2.0, dtype=Z.dtype))


def wide_scale(Z, U, eps2):
    """the scale in each subspace is p / (N eps2), not d / (N eps2)"""
    return compression_rate(Z, U, eps2 * U.shape[2] / U.shape[1])


def mean_over_subspaces(Z, U, eps2):
    """the rates of the subspaces are added, not averaged"""
    return compression_rate(Z, U, eps2) / len(U)


MISTAKES = {
    coding_rate: [
        without_half,
        without_width,
        without_tokens,
        eps_squared_twice,
        without_identity,
        in_bits,
    ],
    compression_rate: [wide_scale, mean_over_subspaces],
}


def check(learner):
    for case in cases(20):
        N, K, p = case.integer(2, 9), case.integer(2, 4), case.integer(1, 3)
        Z, eps2 = case.normal(N, K * p), case.uniform(0.01, 0.5)
        learner.agree(coding_rate, Z, eps2)
        learner.agree(compression_rate, Z, case.normal(K, K * p, p), eps2)

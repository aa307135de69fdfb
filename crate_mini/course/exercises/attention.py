"""Multi-head subspace self-attention, the operator of the paper, in ten lines.

    MSSA(Z) = sum_k softmax(scale u_k u_k^T) u_k U_k^T,        u_k = Z U_k (N, p)

It is the last sum of exercise 2 with similarities passed through a softmax: a sum weighted by
similarity becomes an average. A language model is causal: token t sees the tokens 0 to t.

    scores u u^T       causal                  softmax
    s00 s01 s02        s00  -inf -inf          1    0    0
    s10 s11 s12   ->   s10  s11  -inf   ->     w10  w11  0        each row adds up to 1
    s20 s21 s22        s20  s21  s22           w20  w21  w22
"""

import torch

from crate_mini.course.checking import cases

TITLE = "MSSA in ten lines"
STARS = 2
MINUTES = 25
TEACHES = "attention with one projection per head, and the causal mask"
HINTS = (
    "Start without the mask and with one head; then loop over k.",
    "torch.ones(N, N, dtype=torch.bool).triu(1) is True above the diagonal; masked_fill sets the "
    "scores there to float('-inf'), before the softmax.",
)

# ---- solution ------------------------------------------------------------------------------------


def mssa(Z, U, scale, causal):
    """MSSA(Z) (N, d); Z (N, d), U (K, d, p), scale a number, causal a bool."""
    total = torch.zeros_like(Z)
    for U_k in U:
        u = Z @ U_k
        scores = scale * u @ u.T
        if causal:
            later = torch.ones_like(scores, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        total = total + scores.softmax(-1) @ u @ U_k.T
    return total


# ---- check ---------------------------------------------------------------------------------------


def without_scale(Z, U, scale, causal):
    """the scores are not multiplied by scale"""
    return mssa(Z, U, 1.0, causal)


def without_mask(Z, U, scale, causal):
    """tokens see later tokens although causal is True; set those scores to -inf"""
    return mssa(Z, U, scale, False)


def always_masked(Z, U, scale, causal):
    """later tokens are masked although causal is False"""
    return mssa(Z, U, scale, True)


def masked_past(Z, U, scale, causal):
    """the mask hides earlier tokens and shows later ones; use triu, not tril"""
    return mssa(Z.flip(0), U, scale, causal).flip(0)


def masked_after(Z, U, scale, causal):
    """the mask comes after the softmax, so the weights no longer add up to 1"""
    return _with_weights(Z, U, lambda u: (scale * u @ u.T).softmax(-1).tril())


def softmax_over_queries(Z, U, scale, causal):
    """the softmax runs over the queries (dim 0); each row of the weights has to add up to 1"""
    later = torch.ones(len(Z), len(Z), dtype=torch.bool).triu(1) & causal

    def weights(u):
        return (scale * u @ u.T).masked_fill(later, float("-inf")).softmax(0)

    return _with_weights(Z, U, weights)


def token_masked_for_itself(Z, U, scale, causal):
    """a token does not see itself: mask above the diagonal only, triu(1)"""
    later = torch.ones(len(Z), len(Z), dtype=torch.bool).triu(0) & causal

    def weights(u):
        return (scale * u @ u.T).masked_fill(later, float("-inf")).softmax(-1)

    return _with_weights(Z, U, weights)


def _with_weights(Z, U, weights):
    return sum(weights(Z @ U_k) @ Z @ U_k @ U_k.T for U_k in U)


MISTAKES = {
    mssa: [
        without_scale,
        without_mask,
        always_masked,
        masked_past,
        masked_after,
        softmax_over_queries,
        token_masked_for_itself,
    ],
}


def check(learner):
    for case in cases(20):
        N, K, p = case.integer(2, 9), case.integer(2, 4), case.integer(2, 3)
        Z, U = case.normal(N, K * p), case.normal(K, K * p, p)
        for causal in (False, True):
            learner.agree(mssa, Z, U, case.uniform(0.1, 0.9), causal)

"""A threshold is an optimum. The proximal map of a penalty g, over codes that are not negative:

    prox(b) = argmin over a >= 0 of   g(a) + 1/2 |a - b|^2

    penalty                g                      its map, elementwise but the last
    lasso                  t |a|_1                soft: shrink by t, cut at 0
    number of codes        t |a|_0                hard: keep b where that is cheaper than 0
    a budget               0 if |a|_0 <= k,       top-k: keep the k largest
                           else infinite

    soft         /          hard      /           |a|_0: how many entries are not 0
                /                    /
    ______t____/         ___________|
                               sqrt(2 t)

ISTA with the first is CRATE's step; with the last it is `--top-k`, which does not shrink.
"""

import itertools

import torch

from crate_mini.course.checking import Wrong, cases

TITLE = "Top-k as a proximal map"
STARS = 2
MINUTES = 25
TEACHES = "three sparsities, three thresholds, one definition"
HINTS = (
    "Soft: set the derivative t + a - b to 0; a < 0 is not allowed.",
    "Hard: a = 0 costs b^2 / 2, a = b costs t. Which is less? Mind negative b.",
    "Top-k: b.topk(k) gives values and places; scatter them into zeros. Mind negative values, and "
    "equal ones: never more than k codes.",
)

# ---- solution ------------------------------------------------------------------------------------


def soft(b, t):
    """prox of t |a|_1; b (N, h), t a number above 0; returns (N, h)."""
    return torch.relu(b - t)


def hard(b, t):
    """prox of t |a|_0; b (N, h); returns (N, h)."""
    return torch.where(b > (2 * t) ** 0.5, b, 0)


def top_k(b, k):
    """prox of the budget |a|_0 <= k in each row; b (N, h), k an int; returns (N, h)."""
    values, places = b.relu().topk(k, dim=-1)
    return torch.zeros_like(b).scatter(-1, places, values)


# ---- check ---------------------------------------------------------------------------------------


def soft_two_sided(b, t):
    """negative codes are left: a >= 0"""
    return b.sign() * torch.relu(b.abs() - t)


def soft_is_hard(b, t):
    """what passes the threshold is shrunk by t"""
    return torch.where(b > t, b, 0)


def hard_at_t(b, t):
    """the threshold is sqrt(2 t): compare t with b^2 / 2"""
    return torch.where(b > t, b, 0)


def hard_shrinks(b, t):
    """what passes the threshold keeps its value: the penalty does not depend on its size"""
    return torch.relu(b - (2 * t) ** 0.5)


def hard_two_sided(b, t):
    """negative codes are left: a >= 0"""
    return torch.where(b.abs() > (2 * t) ** 0.5, b, 0)


def by_size(b, k):
    """codes of large size are kept even if negative: a >= 0"""
    places = b.abs().topk(k, dim=-1).indices
    return torch.zeros_like(b).scatter(-1, places, b.gather(-1, places))


def negative_kept(b, k):
    """negative codes are left where fewer than k are positive: a >= 0"""
    values, places = b.topk(k, dim=-1)
    return torch.zeros_like(b).scatter(-1, places, values)


def shrunk(b, k):
    """what is kept keeps its value; do not subtract the threshold"""
    return torch.relu(b - b.topk(k + 1, dim=-1).values[:, -1:])


def over_the_batch(b, k):
    """each row has its own budget of k codes"""
    return top_k(b.flatten()[None], k).view_as(b)


MISTAKES = {
    soft: [soft_two_sided, soft_is_hard],
    hard: [hard_at_t, hard_shrinks, hard_two_sided],
    top_k: [by_size, negative_kept, shrunk, over_the_batch],
}


def least_cost(b, k):
    """The least 1/2 |a - b|^2 of one row over every choice of k places."""
    costs = []
    for places in itertools.combinations(range(len(b)), k):
        a = torch.zeros_like(b)
        a[list(places)] = b[list(places)].relu()
        costs.append(0.5 * (a - b).square().sum())
    return min(costs)


def check_budget(learner, b, k):
    """With equal codes there are several optima: the cost counts, and the budget."""
    a = learner.tensor(top_k, b.shape, b, k)
    most = int((a != 0).sum(-1).max())
    if most > k:
        raise Wrong(f"top_k: {most} of equal codes are kept, the budget is {k}; use topk's places.")
    for row, code in zip(b, a):
        if 0.5 * (code - row).square().sum() > least_cost(row, k) + 1e-9:
            raise Wrong(f"top_k: for {row.tolist()} and k = {k} another choice costs less.")


def check(learner):
    for case in cases(20):
        N, h, t = case.integer(2, 4), case.integer(3, 6), case.uniform(0.1, 0.4)
        b, k = case.normal(N, h), case.integer(1, 2)
        learner.agree(soft, b, t)
        learner.agree(hard, b, t)
        learner.agree(top_k, b, k)
        check_budget(learner, b.round(), k)

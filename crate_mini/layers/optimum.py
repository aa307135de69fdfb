"""Where ISTA steps lead: the best possible codes, and more steps of the model's own size.

A layer takes a few ISTA steps on the non-negative lasso and stops. Here the same problem is solved
until a bound proves the solution, so that the layer's codes can be compared with the best ones.
Letters as in model.py; x (n, d) holds n tokens, and "objective" is that of `reference.lasso`.
"""

import math

import torch
import torch.nn.functional as F

from crate_mini import reference

TOLERANCE = 1e-4  # of the objective at a = 0: how far from the lowest possible counts as converged
MOST_ITERATIONS = 3000
CHECK_EVERY = 20  # iterations; the bound costs about as much as one of them
OWN_STEPS = 200
TINY = 1e-30  # stands in for 0 in a denominator


@torch.no_grad()
def best_codes(x, D, lam, tolerance=TOLERANCE, limit=MOST_ITERATIONS):
    """Codes a >= 0 of x (n, d) that minimise lam |a|_1 + 1/2 |x - D a|^2.

    D (d, h), lam float or (h,). FISTA (Beck & Teboulle 2009) with the step 1 / |D|^2, which
    converges for every D; a token's momentum is dropped where it points uphill (O'Donoghue & Candes
    2015). Stops when the mean gap is at most `tolerance` times the mean objective at a = 0. Returns
    (a (n, h), gap (n,), iterations); a larger gap means that `limit` iterations were too few.
    """
    step = 1 / max(squared_norm(D), TINY)
    a = x.new_zeros(len(x), D.shape[1])
    ahead = a  # a, carried on by its momentum
    age = x.new_ones(len(x), 1)  # t_k of FISTA; 1: no momentum yet
    enough = tolerance * mean(reference.lasso(x, a, D, lam))
    iterations = 0
    gap = duality_gap(x, a, D, lam)
    while iterations < limit and mean(gap) > enough:
        for _ in range(CHECK_EVERY):
            new = reference.ista_step(ahead, x - ahead @ D.T, D, step, lam)
            uphill = ((ahead - new) * (new - a)).sum(-1, keepdim=True) > 0
            age = torch.where(uphill, 1, age)
            older = (1 + (1 + 4 * age**2).sqrt()) / 2
            ahead = new + (age - 1) / older * (new - a)
            a, age = new, older
        iterations += CHECK_EVERY
        gap = duality_gap(x, a, D, lam)
    return a, gap, iterations


def duality_gap(x, a, D, lam):
    """(n,): no codes have an objective lower than that of a (n, h) by more than this.

    Every u with D^T u <= lam bounds the objective from below by x . u - 1/2 |u|^2. u is the
    residual x - D a here, at the scale that gives the highest bound.
    """
    residual = x - a @ D.T
    allowed = (lam / (residual @ D).clamp_min(TINY)).amin(-1)
    energy = residual.square().sum(-1)
    product = (x * residual).sum(-1)
    scale = (product / energy.clamp_min(TINY)).clamp_min(0).minimum(allowed)
    bound = scale * product - 0.5 * scale**2 * energy
    return reference.lasso(x, a, D, lam) - bound


@torch.no_grad()
def own_steps(x, D, eta, lam, limit=OWN_STEPS):
    """What `limit` ISTA steps of size eta from a = 0 would do to the mean objective of x (n, d).

    Returns a JSON-able dict, objectives per coordinate:
    lowest, lowest_step: the lowest objective, and after how many steps; 0 is the start.
    exceeds_start: after how many steps the objective is above that of a = 0, or None. No further
        step is taken then.
    steps: how many were taken.
    """
    a = x.new_zeros(len(x), D.shape[1])
    start = per_coordinate(x, a, D, lam)
    summary = {"lowest": start, "lowest_step": 0, "exceeds_start": None, "steps": 0}
    while summary["steps"] < limit and summary["exceeds_start"] is None:
        a = reference.ista_step(a, x - a @ D.T, D, eta, lam)
        objective = per_coordinate(x, a, D, lam)
        summary["steps"] += 1
        if objective < summary["lowest"]:
            summary["lowest"] = objective
            summary["lowest_step"] = summary["steps"]
        if objective > start or not math.isfinite(objective):
            summary["exceeds_start"] = summary["steps"]
    return summary


def compare(x, codes, D, eta, lam, limit=MOST_ITERATIONS):
    """A layer's codes (n, h) of x (n, d) next to the best possible ones.

    Returns a JSON-able dict, objectives per coordinate of x, densities as shares of codes above 0:
    tokens: n. start: the objective at a = 0. codes, best: {"objective", "density"} of the layer's
    codes and of the best found. gap: how much lower than `best` the lowest objective can be at
    most. converged: whether that is within TOLERANCE. iterations: how many it took.
    own_steps: what more steps of size eta would do, see there.
    """
    best, gap, iterations = best_codes(x, D, lam, limit=limit)
    start = per_coordinate(x, torch.zeros_like(best), D, lam)
    gap = mean(gap) / x.shape[1]
    return {
        "tokens": len(x),
        "start": start,
        "codes": _summary(x, codes, D, lam),
        "best": _summary(x, best, D, lam),
        "gap": gap,
        "converged": gap <= TOLERANCE * start,
        "iterations": iterations,
        "own_steps": own_steps(x, D, eta, lam),
    }


def _summary(x, a, D, lam):
    return {"objective": per_coordinate(x, a, D, lam), "density": mean(F.relu(a) > 0)}


def per_coordinate(x, a, D, lam):
    """The mean objective of codes a (n, h), divided by d."""
    return mean(reference.lasso(x, a, D, lam)) / x.shape[1]


def squared_norm(D):
    """|D|_2^2, the square of the largest singular value."""
    return torch.linalg.matrix_norm(D.detach().cpu().double(), 2).item() ** 2


def mean(values):
    """The mean as a number; float64 on the CPU, because not every device has it."""
    return values.cpu().double().mean().item()

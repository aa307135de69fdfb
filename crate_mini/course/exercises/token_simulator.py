"""Predict a neuron from the tokens alone, score the prediction, and see why the score misleads.

1. `token_table`: the mean activation m_v of each token v, shrunk towards the overall mean m, as if
   k more tokens v had been seen with activation m:

    m_v = (sum of activations at v + k m) / (number of v + k)

2. `correlation`: Pearson's r of true and simulated activations, the usual score of a neuron.
3. `keep_largest`: keep the `share` largest activations and set all others to 0, so that neurons are
   compared at equal density.

    true      0  3  0  0  2  0  0  4          fires on 3 of 8 tokens
    table     0  3  0  0  3  0  0  3          r = 0.95: it knows tokens, not meanings
"""

import torch

from crate_mini.course.checking import cases

TITLE = "An n-gram simulator, and why its score misleads"
STARS = 2
MINUTES = 35
TEACHES = "that a high score may only mean: fires often"
HINTS = (
    "torch.bincount(tokens, minlength=V) counts; with weights=acts it sums.",
    "Centre both sides before the products in r.",
    "acts.topk(n).indices are the places to keep, n = round(share len(acts)).",
)

# ---- solution ------------------------------------------------------------------------------------


def token_table(tokens, acts, V, k):
    """(V,) means by token; tokens (n,) ids below V, acts (n,), k a number above 0."""
    counts = torch.bincount(tokens, minlength=V)
    sums = torch.bincount(tokens, weights=acts, minlength=V)
    return (sums + k * acts.mean()) / (counts + k)


def correlation(true, simulated):
    """Pearson's r, a scalar tensor; both (n,)."""
    x, y = true - true.mean(), simulated - simulated.mean()
    return (x * y).sum() / (x.norm() * y.norm())


def keep_largest(acts, share):
    """acts (n,) with all but the round(share n) largest set to 0."""
    places = acts.topk(round(share * len(acts))).indices
    kept = torch.zeros_like(acts)
    kept[places] = acts[places]
    return kept


# ---- check ---------------------------------------------------------------------------------------


def without_shrinkage(tokens, acts, V, k):
    """the means are not shrunk: a token that never occurred has none"""
    return token_table(tokens, acts, V, 0)


def shrunk_to_zero(tokens, acts, V, k):
    """the means are shrunk towards 0 instead of towards the overall mean"""
    counts = torch.bincount(tokens, minlength=V)
    return torch.bincount(tokens, weights=acts, minlength=V) / (counts + k)


def sums(tokens, acts, V, k):
    """these are sums; divide by the number of each token plus k"""
    return token_table(tokens, acts, V, k) * (torch.bincount(tokens, minlength=V) + k)


def not_centred(true, simulated):
    """the means are not subtracted: this is a cosine"""
    return torch.cosine_similarity(true, simulated, dim=0)


def covariance(true, simulated):
    """this is a covariance; divide by both standard deviations"""
    return ((true - true.mean()) * (simulated - simulated.mean())).mean()


def r_squared(true, simulated):
    """this is r squared"""
    return correlation(true, simulated) ** 2


def keeps_smallest(acts, share):
    """the smallest activations are kept"""
    return -keep_largest(-acts, share)


def subtracts_threshold(acts, share):
    """what is kept keeps its value; do not subtract the threshold"""
    kept = keep_largest(acts, share)
    return torch.where(kept > 0, kept - kept[kept > 0].min(), 0)


def one_or_zero(acts, share):
    """what is kept keeps its value; it does not become 1"""
    return (keep_largest(acts, share) > 0).to(acts.dtype)


MISTAKES = {
    token_table: [without_shrinkage, shrunk_to_zero, sums],
    correlation: [not_centred, covariance, r_squared],
    keep_largest: [keeps_smallest, subtracts_threshold, one_or_zero],
}


def neuron(case, n=4000, V=50):
    """(tokens, acts): it fires by token, but how strongly depends on more than the token."""
    tokens = torch.randint(V, (n,), generator=case.generator)
    by_token = 2 * case.normal(V)[tokens]
    return tokens, (by_token + case.normal(n)).relu()


def check(learner):
    for case in cases(12):
        V, n = case.integer(5, 20), case.integer(10, 40)
        tokens = torch.randint(V, (n,), generator=case.generator)
        acts = case.normal(n).relu() + 0.01
        table = learner.agree(token_table, tokens, acts, V, case.uniform(0.5, 5))
        learner.agree(correlation, acts, table[tokens])
        learner.agree(keep_largest, acts, case.uniform(0.2, 0.8))
    tokens, acts = neuron(case)
    scores = []
    for share in (0.44, 0.01):
        kept = keep_largest(acts, share)
        scores.append(correlation(kept, token_table(tokens, kept, 50, 0.5)[tokens]))
    return (
        f"One neuron, two scores: r = {scores[0]:.2f} where it may fire on 44 % of the tokens, "
        f"{scores[1]:.2f} where it keeps its strongest 1 %."
    )

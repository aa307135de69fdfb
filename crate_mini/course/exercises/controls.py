"""A score needs a control next to it and an interval around it.

1. `partners`: the null control scores each neuron with the simulation of another. Draw a partner
   for each of n neurons: a permutation in which nobody is their own partner.
2. `null_scores`: Pearson's r of each neuron's activations with its partner's simulation.
3. `bootstrap_interval`: the 95 % interval of a mean. Tokens of one document resemble one another,
   so whole documents are drawn, with replacement:

    documents    [3 4 4] [9 8 8] [1 1 2]        means 3.7  8.3  1.3
    one draw     [9 8 8] [9 8 8] [1 1 2]        8.3  8.3  1.3  -->  mean 6.0
    many draws   sort the means; cut 2.5 % at each end

    The mean is over documents, each with the mean of its own tokens.
"""

import torch

from crate_mini.course.checking import Wrong, cases

TITLE = "A null control, and a bootstrap over documents"
STARS = 3
MINUTES = 40
TEACHES = "what chance gives, and why tokens are not independent samples"
HINTS = (
    "partners: the next one in a random circle. order = torch.randperm(n, generator=generator); "
    "order.roll(1) holds everyone's predecessor.",
    "bootstrap_interval: first one mean for each document, then "
    "torch.randint(n, (draws, n), generator=generator) for the draws.",
    "torch.quantile(means, q) with q = 0.025 and 0.975.",
)

# ---- solution ------------------------------------------------------------------------------------


def partners(n, generator):
    """(n,) ints: a random permutation of 0..n-1 without fixed points; n at least 2."""
    order = torch.randperm(n, generator=generator)
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    return partner


def null_scores(acts, simulated, partner):
    """(n,) correlations of neuron i with the simulation of partner[i]; acts, simulated (T, n)."""
    x = acts - acts.mean(0)
    y = simulated[:, partner]
    y = y - y.mean(0)
    return (x * y).sum(0) / (x.norm(dim=0) * y.norm(dim=0))


def bootstrap_interval(values, documents, draws, generator):
    """(2,): low and high end of the 95 % interval of the mean over documents.

    values (N,), one per token; documents (N,), the number of its document; draws an int.
    """
    names = documents.unique()
    means = torch.stack([values[documents == name].mean() for name in names])
    drawn = torch.randint(len(means), (draws, len(means)), generator=generator)
    ends = torch.tensor([0.025, 0.975], dtype=values.dtype)
    return torch.quantile(means[drawn].mean(1), ends)


# ---- check ---------------------------------------------------------------------------------------


def own_simulation(acts, simulated, partner):
    """each neuron is scored with its own simulation: index simulated by partner"""
    return null_scores(acts, simulated, torch.arange(len(partner)))


def partner_of_acts(acts, simulated, partner):
    """partner selects columns of simulated, not of acts"""
    return null_scores(acts[:, partner], simulated, torch.arange(len(partner)))


def not_centred(acts, simulated, partner):
    """the means are not subtracted: these are cosines"""
    return torch.cosine_similarity(acts, simulated[:, partner], dim=0)


MISTAKES = {null_scores: [own_simulation, partner_of_acts, not_centred]}


def check_partners(learner, n, seed):
    generator = torch.Generator().manual_seed(seed)
    partner = learner.tensor(partners, (n,), n, generator)
    if sorted(partner.tolist()) != list(range(n)):
        raise Wrong(f"partners: {partner.tolist()} is not a permutation of 0..{n - 1}.")
    alone = [i for i, other in enumerate(partner.tolist()) if i == other]
    if alone:
        raise Wrong(f"partners: neuron {alone[0]} of {n} is its own partner.")
    return tuple(partner.tolist())


def check_interval(learner, case):
    """Documents differ far more than the tokens in them: what is drawn shows in the width."""
    n, size, draws = 12, case.integer(20, 40), 500
    documents = torch.arange(n).repeat_interleave(size)
    offsets = case.normal(n)
    values = offsets[documents] + 0.1 * case.normal(n * size)
    interval = learner.tensor(
        bootstrap_interval, (2,), values, documents, draws, case.generator
    ).double()
    low, high = interval.tolist()
    if not low < high:
        raise Wrong(f"bootstrap_interval: {low:.3g} to {high:.3g} is empty; return (low, high).")
    expected = bootstrap_interval(values, documents, draws, case.generator)
    wide = (high - low) / (expected[1] - expected[0]).item()
    inside = low < values.mean() < high
    if wide < 0.35 and inside:
        raise Wrong(
            f"bootstrap_interval: {1 / wide:.1f} times too narrow: tokens are drawn instead of "
            "documents, or means of more values than there are documents."
        )
    if wide > 2:
        raise Wrong(
            f"bootstrap_interval: {wide:.1f} times too wide: take the mean of each draw, then its "
            "quantiles."
        )
    if not inside or not 0.78 < wide < 1.28:
        raise Wrong(
            f"bootstrap_interval: {low:.3f} to {high:.3f}, expected about "
            f"{expected[0]:.3f} to {expected[1]:.3f}: quantiles 0.025 and 0.975 of means of "
            "documents drawn with replacement."
        )


def check(learner):
    for case in cases(12):
        n, T = case.integer(2, 6), case.integer(5, 30)
        orders = {check_partners(learner, n + 2, seed) for seed in range(6)}
        if len(orders) == 1:
            raise Wrong("partners: every seed gives the same partners; use the generator.")
        partner = torch.arange(n).roll(1)
        learner.agree(null_scores, case.normal(T, n) + 1, case.normal(T, n) + 1, partner)
        check_interval(learner, case)

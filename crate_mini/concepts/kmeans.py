"""k-means as the codebooks here need it, nearest centres, and what can be counted of a codebook in use.

D_ij = |x_i - e_j|^2        squared Euclidean distance, not divided by d        x (N, d), e (K, d)
"""

import math

import torch
import torch.nn.functional as F

from crate_mini import UserError

CELLS = 1 << 24  # distances held at a time


def distances(x, centres):
    """D (N, K). Taken about the centres' mean: states share a large part, which would eat the digits."""
    middle = centres.mean(0)
    x, centres = x - middle, centres - middle
    return (
        x.square().sum(1, keepdim=True) - 2 * x @ centres.T + centres.square().sum(1)
    ).clamp_min(0)


@torch.no_grad()
def nearest(x, centres):
    """(index (N,) int64 of the nearest centre, D to it (N,)), in pieces of bounded memory."""
    parts = [distances(rows, centres).min(1) for rows in x.split(max(1, CELLS // len(centres)))]
    if not parts:
        return torch.zeros(0, dtype=torch.int64, device=x.device), x.new_zeros(0)
    return torch.cat([p.indices for p in parts]), torch.cat([p.values for p in parts])


def seeding(x, k, draw):
    """k rows of x (N, d) by k-means++: the next with probability D to the nearest so far (Arthur 2007).

    draw: a torch.Generator on the CPU. Where fewer than k rows differ, the rest are drawn uniformly.
    """
    chosen = [int(torch.randint(len(x), (1,), generator=draw))]
    near = distances(x, x[chosen])[:, 0]
    for _ in range(k - 1):
        weights = near.cpu().double()
        if not weights.sum() > 0:
            weights = torch.ones_like(weights)
        chosen.append(int(torch.multinomial(weights, 1, generator=draw)))
        near = torch.minimum(near, (x - x[chosen[-1]]).square().sum(1))
        near[chosen[-1]] = 0
    return x[chosen].clone()


def means(x, index, k):
    """(mean (k, d) of the rows of x by their index, how many (k,)); a mean of no rows is 0."""
    total = torch.zeros(k, x.shape[1], dtype=x.dtype, device=x.device).index_add_(0, index, x)
    count = torch.bincount(index, minlength=k)
    return total / count.clamp_min(1)[:, None], count


@torch.no_grad()
def kmeans(x, k, seed=0, starts=3, steps=100):
    """(centres (k, d), index (N,)) of Lloyd's algorithm: of several k-means++ starts the least sum of D.

    A start ends when no row changes its centre, or after `steps`. A centre that loses all its rows stays
    where it was. Raises UserError when there are fewer rows than centres.
    """
    if not 1 <= k <= len(x):
        raise UserError(
            f"{k} codes cannot be made of {len(x)} word vectors; ask for 1 to {len(x)} codes, "
            "about one per 200 vectors."
        )
    draw, best = torch.Generator().manual_seed(seed), (math.inf, None, None)
    for _ in range(starts):
        centres = seeding(x, k, draw)
        index, near = nearest(x, centres)
        for _ in range(steps):
            mean, count = means(x, index, k)
            centres = torch.where(count[:, None] > 0, mean, centres)
            before, (index, near) = index, nearest(x, centres)
            if torch.equal(before, index):
                break
        cost = near.double().sum().item()
        if cost < best[0]:
            best = cost, centres, index
    return best[1:]


@torch.no_grad()
def spherical(x, k, seed=0, starts=3, steps=100):
    """Codes (k, d) by scaled spherical k-means++: directions clustered, each centre as long as its members.

    k-means of x / |x|, centres brought to length 1, times the mean |x| of their members (CLVQ-VAE's start);
    a centre without members gets the mean of all. Raises UserError when fewer than k rows are not zero.
    """
    x = x[x.norm(dim=1) > 1e-6]
    centres, index = kmeans(F.normalize(x, dim=1), k, seed, starts, steps)
    norm, count = means(x.norm(dim=1, keepdim=True), index, k)
    return F.normalize(centres, dim=1) * torch.where(count[:, None] > 0, norm, x.norm(dim=1).mean())


def usage(index, centres):
    """How a codebook is used by words with codes index (N,): a dict of plain numbers.

    perplexity: exp of the entropy of the codes' shares, 1 to K; active: codes that occur; largest: share of
    the most frequent; cosine: mean over pairs of active codes, None where there are not two.
    """
    share = torch.bincount(index, minlength=len(centres)).double() / max(1, len(index))
    active = share > 0
    unit = F.normalize(centres[active].double(), dim=1)
    n = len(unit)
    cosine = (
        ((unit.sum(0).square().sum() - unit.square().sum()) / (n * (n - 1))).item()
        if n > 1
        else None
    )
    return {
        "perplexity": math.exp(torch.special.entr(share).sum().item()),
        "active": n,
        "largest": share.max().item(),
        "cosine": cosine,
    }

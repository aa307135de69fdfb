"""k-means as the codebooks need it, nearest centres, and statistics of a codebook in use.

D_ij = |x_i - e_j|^2        squared Euclidean distance, not divided by d        x (N, d), e (K, d)
"""

import math

import torch
import torch.nn.functional as F

from crate_mini import UserError

CELLS = 1 << 24  # distances held at a time
ZERO_NORM = 1e-6  # a vector shorter than this counts as zero


def distances(x, centres):
    """D (N, K).

    Taken about the mean of the centres: states share a large part, which would cost digits.
    """
    middle = centres.mean(0)
    x = x - middle
    centres = centres - middle
    squares = x.square().sum(1, keepdim=True) - 2 * x @ centres.T + centres.square().sum(1)
    return squares.clamp_min(0)


@torch.no_grad()
def nearest(x, centres):
    """(index (N,) int64 of the nearest centre, D to it (N,)), in chunks of bounded memory."""
    chunk = max(1, CELLS // len(centres))
    parts = [distances(rows, centres).min(1) for rows in x.split(chunk)]
    if not parts:
        return torch.zeros(0, dtype=torch.int64, device=x.device), x.new_zeros(0)
    indices = torch.cat([part.indices for part in parts])
    values = torch.cat([part.values for part in parts])
    return indices, values


def seeding(x, k, generator):
    """k rows of x (N, d) by k-means++ (Arthur & Vassilvitskii 2007).

    Each next row is drawn with probability proportional to its D to the nearest one so far. Where
    fewer than k rows differ, the rest are drawn uniformly. generator: on the CPU.
    """
    chosen = [int(torch.randint(len(x), (1,), generator=generator))]
    to_nearest = distances(x, x[chosen])[:, 0]
    for _ in range(k - 1):
        weights = to_nearest.cpu().double()
        if not weights.sum() > 0:
            weights = torch.ones_like(weights)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
        to_new = (x - x[chosen[-1]]).square().sum(1)
        to_nearest = torch.minimum(to_nearest, to_new)
        to_nearest[chosen[-1]] = 0
    return x[chosen].clone()


def means(x, index, k):
    """(mean (k, d) of the rows of x with each index, how many rows (k,)); no rows have mean 0."""
    total = torch.zeros(k, x.shape[1], dtype=x.dtype, device=x.device).index_add_(0, index, x)
    count = torch.bincount(index, minlength=k)
    return total / count.clamp_min(1)[:, None], count


@torch.no_grad()
def kmeans(x, k, seed=0, starts=3, steps=100):
    """(centres (k, d), index (N,)) of Lloyd's algorithm: the best of several k-means++ starts.

    The best has the smallest sum of D. A start ends when no row changes its centre, or after
    `steps`. A centre that loses all its rows stays where it was. Raises UserError when there are
    fewer rows than centres.
    """
    if not 1 <= k <= len(x):
        raise UserError(
            f"{k} codes cannot be made of {len(x)} word vectors; ask for 1 to {len(x)} codes, "
            "about one per 200 vectors."
        )
    generator = torch.Generator().manual_seed(seed)
    lowest, best = math.inf, (None, None)
    for _ in range(starts):
        centres, index, cost = lloyd(x, seeding(x, k, generator), steps)
        if cost < lowest:
            lowest, best = cost, (centres, index)
    return best


def lloyd(x, centres, steps):
    """(centres (k, d), index (N,), sum of D) after Lloyd's algorithm from these centres."""
    index, to_nearest = nearest(x, centres)
    for _ in range(steps):
        mean, count = means(x, index, len(centres))
        centres = torch.where(count[:, None] > 0, mean, centres)
        before = index
        index, to_nearest = nearest(x, centres)
        if torch.equal(before, index):
            break
    return centres, index, to_nearest.cpu().double().sum().item()


@torch.no_grad()
def spherical(x, k, seed=0, starts=3, steps=100):
    """Codes (k, d) by scaled spherical k-means++, with which a CLVQ-VAE starts.

    k-means of x / |x|; its centres are scaled to length 1, times the mean |x| of their members, or
    of all rows for a centre without members. Rows of zeros do not count. Raises UserError when
    fewer than k rows are left.
    """
    x = x[x.norm(dim=1) > ZERO_NORM]
    centres, index = kmeans(F.normalize(x, dim=1), k, seed, starts, steps)
    norm, count = means(x.norm(dim=1, keepdim=True), index, k)
    length = torch.where(count[:, None] > 0, norm, x.norm(dim=1).mean())
    return F.normalize(centres, dim=1) * length


def usage(index, centres):
    """How words with codes index (N,) use a codebook (K, d): a dict of plain numbers.

    perplexity: exp of the entropy of the codes' shares, 1 to K. active: codes that occur. largest:
    share of the most frequent code. cosine: mean over pairs of active codes, None for fewer than
    two.
    """
    share = torch.bincount(index, minlength=len(centres)).cpu().double() / max(1, len(index))
    active = share > 0
    return {
        "perplexity": math.exp(torch.special.entr(share).sum().item()),
        "active": int(active.sum()),
        "largest": share.max().item(),
        "cosine": mean_cosine(centres[active]),
    }


def mean_cosine(x):
    """Mean cosine over the pairs of rows of x; None for fewer than two rows."""
    n = len(x)
    if n < 2:
        return None
    unit = F.normalize(x.cpu().double(), dim=1)
    pairs = unit.sum(0).square().sum() - unit.square().sum()  # both orders of each pair
    return (pairs / (n * (n - 1))).item()

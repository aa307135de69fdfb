"""Why a symmetric score cannot look back, and what the key shift does about it.

In MSSA the score of token t for token s is u_t . u_s. It is symmetric, so if "x after y" makes x
look at y more than at itself, "y after x" cannot do the same:

    u_t . u_s  <=  |u_t| |u_s|          the longer of the two scores itself higher

1. `prefers`: which tokens score which others above themselves? Never both of a pair.
2. `falling`: one loophole. Find T <= 7 tokens u (T, 2) of which each (but the first) scores its
   predecessor highest among 0..t. Lengths have to fall along the text.
3. `shift_keys`: the key shift mixes each key with the key before it, dimension by dimension:

    k_s = u_s + share (u_{s-1} - u_s),        u_{-1} = 0

    text    the   cat   sat   the               query "the" at the end
    key      0    the   cat   sat               finds the key "the": the place of "cat", which
    value   the   cat   sat   the               followed an earlier "the"

4. `attends_to`: for each token t the place s <= t with the largest score q_t . k_s.
"""

import math

import torch

from crate_mini.course.checking import Wrong, cases

TITLE = "Why a symmetric score cannot look back"
STARS = 2
MINUTES = 35
TEACHES = "what MSSA gives up for q = k, and how shifted keys find what followed"
HINTS = (
    "The scores are u @ u.T; the diagonal holds each token's score for itself.",
    "falling: turn by a small angle from token to token and halve the length each time.",
    "shift_keys: put a row of zeros in front of u and drop the last row.",
    "attends_to: masked scores, then argmax(-1).",
)

# ---- solution ------------------------------------------------------------------------------------


def prefers(u):
    """(T, T) bool: [t, s] is True where t scores s above itself; u (T, p)."""
    scores = u @ u.T
    return scores > scores.diagonal()[:, None]


def falling(T):
    """u (T, 2), float64: each token t > 0 scores its predecessor highest among tokens 0..t."""
    t = torch.arange(T, dtype=torch.float64)
    angle = t * math.radians(40)
    return torch.stack([angle.cos(), angle.sin()], 1) * 0.5 ** t[:, None]


def shift_keys(u, share):
    """The shifted keys (T, p); u (T, p), share (p,) in 0..1."""
    before = torch.cat([torch.zeros_like(u[:1]), u[:-1]])
    return u + share * (before - u)


def attends_to(q, k):
    """(T,) ints: for each t the s <= t with the largest q_t . k_s; q, k (T, p)."""
    scores = q @ k.T
    later = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(later, float("-inf")).argmax(-1)


# ---- check ---------------------------------------------------------------------------------------


def prefers_itself(u):
    """no token scores itself above itself: compare with >, so that the diagonal is False"""
    scores = u @ u.T
    return scores >= scores.diagonal()[:, None]


def preferred(u):
    """rows and columns are exchanged: [t, s] asks whether t prefers s"""
    return prefers(u).T


def wraps_around(u, share):
    """the first key takes the last token; before the first there is 0"""
    return u + share * (u.roll(1, 0) - u)


def looks_ahead(u, share):
    """keys take the token after, not the token before: k_s uses u_{s-1}"""
    after = torch.cat([u[1:], torch.zeros_like(u[:1])])
    return u + share * (after - u)


def share_reversed(u, share):
    """share is the part of the token before, not of the token itself"""
    return shift_keys(u, 1 - share)


def first_key_kept(u, share):
    """the first key is mixed with 0 too: k_0 = (1 - share) u_0"""
    return torch.cat([u[:1], shift_keys(u, share)[1:]])


def without_mask(q, k):
    """it finds later tokens; only places s <= t count"""
    return (q @ k.T).argmax(-1)


def never_itself(q, k):
    """s = t counts too: mask above the diagonal only"""
    later = torch.ones(len(q), len(q), dtype=torch.bool).triu(0)
    return (q @ k.T).masked_fill(later, float("-inf")).argmax(-1)


MISTAKES = {
    prefers: [prefers_itself, preferred],
    shift_keys: [wraps_around, looks_ahead, share_reversed, first_key_kept],
    attends_to: [without_mask, never_itself],
}


def check_falling(learner, T):
    u = learner.tensor(falling, (T, 2), T)
    best = attends_to(u, u)
    for t in range(1, T):
        if best[t] != t - 1:
            shorter = u[t].norm() < 0.999 * u[t - 1].norm()
            reason = "" if shorter else ", which is not longer; lengths have to fall"
            raise Wrong(
                f"falling: token {t} of {T} scores token {best[t].item()} highest, not its "
                f"predecessor{reason}."
            )


def check(learner):
    for case in cases(20):
        T, p = case.integer(2, 7), case.integer(2, 5)
        u = case.normal(T, p)
        learner.agree(prefers, u)
        share = torch.sigmoid(case.normal(p))
        keys = learner.agree(shift_keys, u, share)
        learner.agree(attends_to, u, keys)
        check_falling(learner, T)
    words = torch.eye(5, dtype=torch.float64)[[0, 1, 2, 3, 4, 1]]
    keys = shift_keys(words, torch.ones(5, dtype=torch.float64))
    plain, shifted = attends_to(words, words)[-1], attends_to(words, keys)[-1]
    return (
        f'In "a b c d e b" the last b attends to place {plain} without the shift, and to place '
        f"{shifted} with it: the c that followed the first b."
    )

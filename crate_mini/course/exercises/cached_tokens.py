"""Generation reads one new token at a time. What must it keep of the earlier ones?

GPT-2 keeps keys and values. In MSSA key and value are the same u, so one tensor is enough:

    cache (K, S, p)   u_0 u_1 ... u_{S-1}          K heads of width p
    new   (K, p)                            u_S    the query, and one more key and value

                  u_S scores u_0 .. u_S, itself too; softmax; average of u_0 .. u_S

Scores are divided by sqrt(p). The cache starts as None.
"""

import math

import torch

from crate_mini.course.checking import cases

TITLE = "A KV cache for q = k = v"
STARS = 2
MINUTES = 25
TEACHES = "why a cache gives the same output, and what sharing saves"
HINTS = (
    "Append the new token first: torch.cat([cache, u[:, None]], 1).",
    "scores (K, S + 1): (cache @ u[:, :, None]).squeeze(-1) / math.sqrt(p).",
    "No mask: everything in the cache is in the past.",
)

# ---- solution ------------------------------------------------------------------------------------


def attend_next(u, cache):
    """The heads' outputs for one new token, and the cache with it: (y (K, p), (K, S + 1, p)).

    u (K, p) belongs to the new token; cache (K, S, p), or None at the first.
    """
    new = u[:, None]
    cache = new if cache is None else torch.cat([cache, new], 1)
    scores = (cache @ u[:, :, None]).squeeze(-1) / math.sqrt(u.shape[1])
    weights = scores.softmax(-1)
    return (weights[:, None] @ cache).squeeze(1), cache


def cached_values(L, T, d, shared):
    """Numbers kept for T tokens in L layers of width d; shared: whether key and value are one."""
    return L * T * d * (1 if shared else 2)


# ---- check ---------------------------------------------------------------------------------------


def without_scale(u, cache):
    """the scores are not divided by sqrt(p)"""
    y, new = attend_next(u * u.shape[1] ** 0.25, _scaled(cache, u.shape[1] ** 0.25))
    return y / u.shape[1] ** 0.25, new / u.shape[1] ** 0.25


def _scaled(cache, factor):
    return None if cache is None else cache * factor


def scaled_by_p(u, cache):
    """the scores are divided by p; divide by sqrt(p)"""
    y, new = attend_next(u / u.shape[1] ** 0.25, _scaled(cache, u.shape[1] ** -0.25))
    return y * u.shape[1] ** 0.25, new * u.shape[1] ** 0.25


def blind_to_itself(u, cache):
    """the new token does not attend to itself: append it to the cache first"""
    if cache is None:
        return u, u[:, None]
    scores = (cache @ u[:, :, None]).squeeze(-1) / math.sqrt(u.shape[1])
    return (scores.softmax(-1)[:, None] @ cache).squeeze(1), torch.cat([cache, u[:, None]], 1)


def old_cache(u, cache):
    """the cache that is returned lacks the new token"""
    y, new = attend_next(u, cache)
    return y, new[:, :-1]


def in_front(u, cache):
    """the new token belongs at the end of the cache"""
    y, new = attend_next(u, cache)
    return y, new.roll(1, 1)


def never_shared(L, T, d, shared):
    """where key and value are one, they are kept once"""
    return 2 * L * T * d


def keys_only(L, T, d, shared):
    """without sharing there are two tensors, keys and values"""
    return L * T * d


MISTAKES = {
    attend_next: [without_scale, scaled_by_p, blind_to_itself, old_cache, in_front],
    cached_values: [never_shared, keys_only],
}


def check(learner):
    for case in cases(10):
        K, p = case.integer(1, 3), case.integer(2, 5)
        cache = None
        for _ in range(5):
            _, cache = learner.agree(attend_next, case.normal(K, p), cache)
        L, T, d = case.integer(1, 12), case.integer(1, 1024), case.integer(1, 768)
        for shared in (True, False):
            learner.agree(cached_values, L, T, d, shared)

"""A sparse autoencoder rewrites a layer's codes as fewer, hopefully clearer features.

    f  = ReLU((x - b) E + c)         x (N, h) codes, f (N, w) features, E (h, w), b (h,), c (w,)
    x' = f W + b                     W (w, h): row j is what feature j writes

    x (N, h) --> - b --> E --> + c --> ReLU --> f (N, w) --> W --> + b --> x' (N, h)
                                                 |                          |
                                              few > 0                   close to x

The loss of CRATE-LM weighs a token by its own length |x|, so that one l1 fits codes of any scale:

    loss = mean over tokens of [ mean over h of (x - x')^2 / |x|  +  l1 |f|_1 ]
"""

import torch

from crate_mini.course.checking import cases

TITLE = "The loss of a sparse autoencoder"
STARS = 1
MINUTES = 20
TEACHES = "what the baseline for neurons optimises, and what l1 trades"
HINTS = (
    "|x| is x.norm(dim=-1), one number for each token.",
    "|f|_1 is a sum over features, then a mean over tokens.",
)

# ---- solution ------------------------------------------------------------------------------------


def encode(x, E, b, c):
    """Features (N, w) of codes x (N, h); E (h, w), b (h,), c (w,)."""
    return torch.relu((x - b) @ E + c)


def sae_loss(x, E, W, b, c, l1):
    """The loss, a scalar tensor; W (w, h), l1 a number."""
    f = encode(x, E, b, c)
    reconstruction = f @ W + b
    error = ((x - reconstruction) ** 2).mean(-1) / x.norm(dim=-1)
    return error.mean() + l1 * f.sum(-1).mean()


# ---- check ---------------------------------------------------------------------------------------


def without_shift(x, E, b, c):
    """b is not subtracted from x"""
    return encode(x, E, torch.zeros_like(b), c)


def without_bias(x, E, b, c):
    """the bias c is not added"""
    return encode(x, E, b, torch.zeros_like(c))


def without_relu(x, E, b, c):
    """negative features are left; features pass a ReLU"""
    return (x - b) @ E + c


def not_divided(x, E, W, b, c, l1):
    """the error of each token is not divided by |x|"""
    f = encode(x, E, b, c)
    return ((x - f @ W - b) ** 2).mean() + l1 * f.sum(-1).mean()


def divided_by_square(x, E, W, b, c, l1):
    """the error is divided by |x|, not by its square"""
    f = encode(x, E, b, c)
    error = ((x - f @ W - b) ** 2).mean(-1) / (x**2).sum(-1)
    return error.mean() + l1 * f.sum(-1).mean()


def summed_error(x, E, W, b, c, l1):
    """the squared error is a mean over the h codes, not a sum"""
    penalty = l1 * encode(x, E, b, c).sum(-1).mean()
    return (sae_loss(x, E, W, b, c, l1) - penalty) * x.shape[1] + penalty


def mean_penalty(x, E, W, b, c, l1):
    """|f|_1 is a sum over the features, not a mean"""
    return sae_loss(x, E, W, b, c, l1 / W.shape[0])


def summed_penalty(x, E, W, b, c, l1):
    """|f|_1 is averaged over the tokens, not added up"""
    return sae_loss(x, E, W, b, c, l1 * len(x))


def without_penalty(x, E, W, b, c, l1):
    """the penalty l1 |f|_1 is missing"""
    return sae_loss(x, E, W, b, c, 0.0)


def decoded_without_b(x, E, W, b, c, l1):
    """b is not added to the reconstruction"""
    f = encode(x, E, b, c)
    return (((x - f @ W) ** 2).mean(-1) / x.norm(dim=-1)).mean() + l1 * f.sum(-1).mean()


MISTAKES = {
    encode: [without_shift, without_bias, without_relu],
    sae_loss: [
        not_divided,
        divided_by_square,
        summed_error,
        mean_penalty,
        summed_penalty,
        without_penalty,
        decoded_without_b,
    ],
}


def check(learner):
    for case in cases(20):
        N, h, w = case.integer(2, 8), case.integer(2, 6), case.integer(3, 12)
        x, E, W = case.normal(N, h).relu() + 0.1, case.normal(h, w), case.normal(w, h)
        b, c = case.normal(h), case.normal(w)
        learner.agree(encode, x, E, b, c)
        learner.agree(sae_loss, x, E, W, b, c, case.uniform(0.01, 0.5))

"""The two operations that matter, behind one door: the model calls them here and never asks what runs them.

`mssa_project` and `ista` have the signatures of `reference.py`. The backend is chosen once and can be read,
with its reason, from `backend()`; today there is one, plain PyTorch.
"""

from crate_mini import reference


def backend():
    """Return (name, reason): which implementation runs the ops, and why. Scripts print both at start."""
    return "reference", "plain PyTorch; no compiled extension in this version"


def mssa_project(z, weight, bias, U, n_head, eps=1e-5):
    """LayerNorm, shared projection, split into heads: (B, T, d) -> (B, T, K, p). Spec: reference."""
    return reference.mssa_project(z, weight, bias, U, n_head, eps)


def ista(x, D, eta, lam, steps, decoder=None):
    """Sparse codes and their reconstruction: (..., d) -> ((..., d), (..., h)). Spec: reference.ista."""
    return reference.ista(x, D, eta, lam, steps, decoder)

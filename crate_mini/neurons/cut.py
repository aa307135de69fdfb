"""Cutting: the weakest activations of each neuron set to 0, so that it fires at most so often.

    limits -> cut_site -> a record of the cut activations;  losses: of a model that has to use them

Scores rise as neurons fire less often, so models are compared at one density. But cutting is an
analysis of activations that the model does not use: it was trained with all of them. That is why
every score at a density is shown with the loss of the model when it really runs on cut activations.
"""

from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch

from crate_mini import UserError
from crate_mini.console import terminal
from crate_mini.intervene import hook_codes

LOSS_TOKENS = 1 << 15  # held-out tokens that losses are measured on
LOSS_BATCH = 1 << 12  # of them at a time
WHAT = (
    "Cut to density {share:.3g}: activations below a limit of each neuron are read as 0. The model "
    "was not trained that way and does not run that way; its loss if it did is shown."
)


def check_share(share):
    """Raise UserError unless 0 < share < 1."""
    if not 0 < share < 1:
        raise UserError(f"--match-density {share} must be above 0 and below 1, for example 0.01.")


def cut(acts, limits):
    """Positive activations that reach their neuron's limit, 0 elsewhere; tensors (.., h), (h,)."""
    return torch.where((acts > 0) & (acts >= limits), acts, torch.zeros_like(acts))


def cut_site(site, limits):
    """The Site with the activations of `site` that reach limits (width,), and 0 elsewhere."""

    def encode(codes):
        acts = codes if site.encode is None else site.encode(codes)
        return cut(acts, torch.from_numpy(limits).to(acts))

    return replace(site, encode=encode, limits=limits)


def density_reached(densities, limits):
    """How often neurons fire after the cut, (h,) each: a JSON-able dict.

    mean, max: of the share of tokens; silenced: neurons whose strongest values lie so close that
    any limit cuts all of them or too few.
    """
    return {
        "mean": float(np.mean(densities, dtype=np.float64)),
        "max": float(np.max(densities)),
        "silenced": int(np.isinf(limits).sum()),
    }


# ---- the model that uses them --------------------------------------------------------------------


@torch.no_grad()
def losses(model, sites, limits, directions, corpus, split="val", tokens=LOSS_TOKENS):
    """Losses in nats per token of the model when it runs on cut activations; JSON-able.

    limits: {site: (width,)}; directions: {site: (width, h)} of features, whose cut is taken out of
    the codes by what those directions add to them. Returns {"tokens", "uncut", "sites": {site:
    loss with this site alone cut}}, and "all", with all layers' codes cut at once, if these are
    several. Raises UserError if the split has no token to predict.
    """
    changes = {}
    for site in sites:
        changes[site.name] = _change(site, limits[site.name], directions.get(site.name))
    runs = {"uncut": [], **{name: [(name, change)] for name, change in changes.items()}}
    codes = [(site.name, changes[site.name]) for site in sites if site.sae is None]
    if len(codes) > 1:
        runs["all"] = codes
    layers = {site.name: site.layer for site in sites}
    T = model.config.block_size
    blocks = list(corpus.blocks(split, max(1, LOSS_BATCH // T), T, tokens))
    n = sum(ids.numel() for ids, _ in blocks)
    if not n:
        raise UserError(f"the {split} split has no token to predict; give more text with --data.")
    measured, progress = {}, terminal.Progress("cut loss", n * len(runs))
    for i, (name, hooked) in enumerate(runs.items()):
        with ExitStack() as hooks:
            for site, change in hooked:
                hooks.enter_context(hook_codes(model, layers[site], change))
            measured[name] = _loss(model, blocks, progress, i * n)
    result = {"tokens": n, "uncut": measured.pop("uncut")}
    if "all" in measured:
        result["all"] = measured.pop("all")
    return {**result, "sites": measured}


def _change(site, limits, directions):
    """A function of codes (B, T, h) for hook_codes: the codes of a model that uses the cut."""
    reach = torch.from_numpy(limits)

    def change(codes):
        if directions is None:
            return cut(codes, reach.to(codes))
        x = codes.flatten(0, 1).float()
        features = site.encode(x)
        removed = features - cut(features, reach.to(features))
        return (x - removed @ directions.to(removed)).view_as(codes).to(codes)

    return change


def _loss(model, blocks, progress, done):
    """Mean loss over blocks of (ids, targets)."""
    device = model.tokens.weight.device
    total, n = 0.0, 0
    for ids, targets in blocks:
        total += model(ids.to(device), targets.to(device)).item() * ids.numel()
        n += ids.numel()
        progress.update(done + n)
    return total / n

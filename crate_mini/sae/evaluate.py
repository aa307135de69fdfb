"""Sparse autoencoders on held-out text: sparsity, reconstruction, and the loss of the model."""

import math

import torch
import torch.nn.functional as F

from crate_mini import UserError
from crate_mini.console import terminal
from crate_mini.sae.autoencoder import replace_codes

ROWS = 1024  # tokens whose features are held at a time
FEWEST = 64  # held-out tokens: fewer say nothing, and would replace a good result
FORMULAS = {
    "L0": "mean over tokens of the number of features above 0",
    "explained_variance": (
        "1 - sum |x - x'|^2 / sum |x - mean x|^2, over all held-out tokens and all codes"
    ),
    "cosine": "mean over tokens with x != 0 of the cosine of x and x'",
    "dead": "share of features that are 0 on every held-out token",
    "recovered": (
        "(ablated loss - loss with x') / (ablated loss - model's loss); ablated: x' = 0 or mean x"
    ),
}


@torch.no_grad()
def evaluate(model, corpus, layer, saes, tokens, batch=8):
    """Measure SAEs of one layer on the first `tokens` held-out tokens.

    Returns a dict for each SAE with the keys of FORMULAS and "loss", in nats per token: {"model":
    unchanged, "sae": with the SAE spliced in, "zero": all codes 0, "mean": every code its mean}.
    """
    T = model.config.block_size
    predicted = predicted_tokens(corpus, tokens)

    def loss(name, function):
        blocks = corpus.blocks("val", batch, T, tokens)  # read again: never all in memory
        return spliced_loss(model, layer, blocks, name, function, predicted)

    model_loss = loss("model", unchanged)
    zero_loss = loss("zeros", torch.zeros_like)
    measured = []
    for sae in saes:
        reconstruction = MeasuredReconstruction(sae)
        sae_loss = loss(sae.name, reconstruction)
        losses = {"model": model_loss, "zero": zero_loss, "sae": sae_loss}
        measured.append({**reconstruction.result(), "loss": losses})
    mean_code = reconstruction.quality.mean

    def all_mean(x):
        return mean_code.to(x).expand_as(x)

    mean_loss = loss("mean", all_mean)
    for result in measured:
        losses = result["loss"]
        losses["mean"] = mean_loss
        result["recovered"] = {
            "zero": recovered(losses["sae"], model_loss, zero_loss),
            "mean": recovered(losses["sae"], model_loss, mean_loss),
        }
    return measured


def predicted_tokens(corpus, limit):
    """The number of held-out tokens to measure on. Raises UserError if they are too few."""
    n = min(limit, corpus.n_tokens["val"] - 1)
    if n < FEWEST:
        raise UserError(
            f"{max(0, n)} held-out tokens are too few to measure on; give --tokens {FEWEST} or "
            "more, or more text with --data."
        )
    return n


def unchanged(x):
    """The codes themselves, which `replace_codes` leaves as they are."""
    return x


def spliced_loss(model, layer, blocks, name, function, tokens):
    """Loss in nats per token over blocks of (ids, targets), with codes replaced by function(codes).

    name: of the replacement, for the progress line and the error. tokens: of all blocks. Raises
    UserError if the loss is not finite.
    """
    with replace_codes(model, layer, function):
        return loss_in_context(model, blocks, name, tokens)


def loss_in_context(model, blocks, name, tokens):
    """Loss in nats per token of a model as the caller's hooks have changed it.

    blocks: of (ids, targets), together `tokens`; name: of the change. Raises UserError if the loss
    is not finite.
    """
    device = next(model.parameters()).device
    total, n = 0.0, 0
    progress = terminal.Progress(name, tokens)
    for ids, targets in blocks:
        total += model(ids.to(device), targets.to(device)).item() * ids.numel()
        n += ids.numel()
        progress.update(n)
    if not math.isfinite(total):
        raise UserError(f"the loss ({name}) is {total}; use a checkpoint with finite weights.")
    return total / n


def recovered(sae, model, ablated):
    """(ablated - sae) / (ablated - model) of three losses; None where ablation does no harm."""
    return (ablated - sae) / (ablated - model) if ablated > model else None


class MeasuredReconstruction:
    """Replaces codes with an SAE's reconstruction, and measures the SAE on them."""

    def __init__(self, sae):
        self.sae = sae
        self.quality = ReconstructionQuality()
        self.fired = torch.zeros_like(sae.c, dtype=torch.int64)  # tokens, for each feature

    def __call__(self, x):
        """x' (N, h) of codes x (N, h), a few rows at a time."""
        y = torch.empty_like(x)
        for rows, reconstructed in zip(x.split(ROWS), y.split(ROWS)):
            f = self.sae.encode(rows)
            self.fired += (f > 0).sum(0)
            reconstructed.copy_(self.sae.decode(f))
        self.quality.add(x, y)
        return y

    def result(self):
        """L0, dead, explained_variance and cosine over all codes so far."""
        return {
            "L0": self.fired.sum().item() / self.quality.n,
            "dead": (self.fired == 0).cpu().double().mean().item(),
            "explained_variance": self.quality.explained_variance(),
            "cosine": self.quality.cosine(),
        }


class ReconstructionQuality:
    """Explained variance and cosine of reconstructions y of x, (N, h) each, batch by batch."""

    def __init__(self):
        self.n = 0
        self.mean = 0.0  # of x, (h,)
        self.spread = 0.0  # sum |x - mean|^2
        self.error = 0.0  # sum |x - y|^2
        self.cosines = 0.0
        self.nonzero = 0  # rows in the sum of cosines

    def add(self, x, y):
        """Add a batch. Sums are float64; merging means keeps precision when they are large.

        Source of the merge: Chan, Golub & LeVeque 1979.
        """
        x, y = x.cpu().double(), y.cpu().double()
        n = self.n + len(x)
        mean = x.mean(0)
        shift = mean - self.mean
        within = (x - mean).square().sum()
        between = shift.square().sum() * (self.n * len(x) / n)
        self.spread += (within + between).item()
        self.mean = self.mean + shift * (len(x) / n)
        self.n = n
        self.error += (x - y).square().sum().item()
        nonzero = x.any(1)
        self.cosines += F.cosine_similarity(x[nonzero], y[nonzero]).sum().item()
        self.nonzero += int(nonzero.sum())

    def explained_variance(self):
        """1 - sum |x - y|^2 / sum |x - mean x|^2; None if x never varies.

        It is 1 for y = x, and 0 for y = mean x.
        """
        return 1 - self.error / self.spread if self.spread else None

    def cosine(self):
        """Mean cosine over the rows where x is not zero; None if there are none."""
        return self.cosines / self.nonzero if self.nonzero else None

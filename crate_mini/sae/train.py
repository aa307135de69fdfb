"""Fit sparse autoencoders to the codes of a layer on the training split.

The recipe is CRATE-LM's: its loss, decoder rows of norm 1, a shuffled buffer of codes, resampling
of dead features. It differs in that SAEs of several sparsities train on the same batches, the
learning rate decays to 0 at the end, features are resampled at shares of the run instead of fixed
steps, and the bias starts at the mean code.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from crate_mini import UserError
from crate_mini.console import terminal
from crate_mini.intervene import hook_codes
from crate_mini.sae.autoencoder import SAE
from crate_mini.training.device import can_fuse_adam

BUFFER_TOKENS = 2**16  # largest buffer for shuffling, in tokens
BUFFER_BYTES = 2**27  # and in bytes
TOKENS_PER_PASS = 2048  # of the model, to fill the buffer
RESAMPLING = (0.2, 0.4, 0.6)  # shares of the run after which dead features are resampled
RESAMPLING_BATCHES = 8  # batches from which their new directions are drawn
NUDGE = 0.2  # norm of a resampled encoder column, relative to the mean of the live ones
WARMUP = 0.05  # share of the steps
DECAY = 0.3  # share of the steps


# ---- batches -------------------------------------------------------------------------------------


@torch.no_grad()
def code_batches(model, corpus, layer, batch, seed):
    """Endless batches (batch, h) of codes of a layer on the training split, fixed by the seed.

    They come from a shuffled buffer of bounded size, refilled whenever half of it is used; each
    token's codes are used once. Raises UserError for a layer that does not exist and for codes that
    are not finite.
    """
    T = model.config.block_size
    windows = max(1, TOKENS_PER_PASS // T)
    device = next(model.parameters()).device
    fitting = BUFFER_BYTES // (4 * model.config.n_code)
    size = min(BUFFER_TOKENS, fitting, corpus.n_tokens["train"])
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.empty(0, model.config.n_code, device=device)
    step = 0
    while True:
        parts = [buffer]
        while sum(map(len, parts)) < max(size, 2 * batch):
            ids = corpus.batch(seed, "train", step, windows, T)[0].to(device)
            parts.append(finite_codes(model, layer, ids))
            step += 1
        buffer = torch.cat(parts)
        order = torch.randperm(len(buffer), generator=generator).to(device)
        used = len(order) // 2 // batch * batch
        for rows in order[:used].split(batch):
            yield buffer[rows]
        buffer = buffer[order[used:]]


def finite_codes(model, layer, ids):
    """Codes (B * T, h) of a layer in float32. Raises UserError if one is not finite."""
    seen = []
    with hook_codes(model, layer, seen.append):
        model.trunk(ids)
    codes = seen[0].flatten(0, 1).float()
    if not codes.isfinite().all():
        raise UserError(
            f"codes of layer {layer} are not finite; use a checkpoint with finite weights."
        )
    return codes


# ---- training ------------------------------------------------------------------------------------


@dataclass
class Training:
    """One SAE in training. fired: mask (width,) of features that fired since resampling."""

    sae: SAE
    optimizer: torch.optim.Optimizer
    fired: torch.Tensor
    resampled: int = 0


def fit(saes, batches, steps, lr, seed=0):
    """Train SAEs on the same batches, an iterator of (N, h).

    Returns the number of resampled features of each. Adam, with warm-up over the first 5 % of the
    steps and linear decay over the last 30 %. Raises UserError if all codes are the same or if
    training diverges.
    """
    first = next(batches)
    if not first.var(0, unbiased=False).sum() > 0:
        raise UserError(
            f"all codes of layer {saes[0].layer} are the same on {len(first)} tokens: a dead layer "
            "leaves nothing to explain; choose another --layer."
        )
    scale = first.square().mean().sqrt()  # so that codes of any scale train alike
    for sae in saes:
        sae.b.data.copy_(first.mean(0) / scale)
    trainings = [start(sae, lr, first.device) for sae in saes]
    generator = torch.Generator().manual_seed(seed)
    resampling_steps = {int(share * steps) for share in RESAMPLING} - {0}
    for step in terminal.track(range(steps), "train"):
        x = next(batches) / scale
        if step in resampling_steps:
            others = [next(batches) / scale for _ in range(RESAMPLING_BATCHES - 1)]
            resample_all(trainings, torch.cat([x, *others]), generator)
        rate = lr * schedule(step, steps)
        for training in trainings:
            training.fired |= training_step(training.sae, training.optimizer, x, rate)
    for sae in saes:
        rescale(sae, scale)
        if not all(weights.isfinite().all() for weights in sae.parameters()):
            raise UserError(f"training of {sae.name} diverged; try a lower --lr than {lr:g}.")
    return [training.resampled for training in trainings]


def start(sae, lr, device):
    """A Training of one SAE."""
    optimizer = torch.optim.Adam(sae.parameters(), lr, fused=can_fuse_adam(device))
    return Training(sae, optimizer, torch.zeros_like(sae.c, dtype=torch.bool))


def schedule(step, steps):
    """The learning rate at a step, as a share of its peak."""
    warmup = (step + 1) / max(1, WARMUP * steps)
    decay = (steps - step) / (DECAY * steps)
    return min(1, warmup, decay)


def rescale(sae, scale):
    """Turn an SAE of x / scale into one of x: only the biases change."""
    sae.b.data *= scale
    sae.c.data *= scale


def training_step(sae, optimizer, x, lr):
    """One step of Adam on inputs x (N, h); the rows of W keep norm 1.

    Returns a mask (width,) of the features that fired.
    """
    optimizer.param_groups[0]["lr"] = lr
    loss, f = sae.loss(x)
    optimizer.zero_grad()
    loss.backward()
    with torch.no_grad():
        # The component along a row would change only its norm, which is reset, and Adam's moments.
        sae.W.grad -= (sae.W.grad * sae.W).sum(1, keepdim=True) * sae.W
        optimizer.step()
        sae.W.copy_(F.normalize(sae.W, dim=1))
    return (f.detach() > 0).any(0)


# ---- dead features -------------------------------------------------------------------------------


def resample_all(trainings, x, generator):
    """Resample in each SAE the features that have not fired since the last resampling."""
    for training in trainings:
        dead = ~training.fired
        training.resampled += resample(training.sae, training.optimizer, x, dead, generator)
        training.fired.zero_()


@torch.no_grad()
def resample(sae, optimizer, x, dead, generator):
    """Restart dead features, a mask (width,), at inputs from x (N, h); returns their number.

    Inputs are drawn in proportion to their squared loss (Bricken et al. 2023), without replacement.
    The features' moments in the optimizer restart at 0.
    """
    error = (x - sae.decode(sae.encode(x))).square().sum(1)
    chosen = dead.nonzero().flatten()[: int((error > 0).sum())]
    if not len(chosen):
        return 0
    weights = error.cpu().double() ** 2
    drawn = torch.multinomial(weights, len(chosen), generator=generator).to(x.device)
    directions = F.normalize(x[drawn] - sae.b, dim=1)
    norm = 1.0 if dead.all() else sae.E[:, ~dead].norm(dim=0).mean()
    sae.W[chosen] = directions
    sae.E[:, chosen] = NUDGE * norm * directions.T
    sae.c[chosen] = 0.0
    columns = (slice(None), chosen)
    for parameter, features in ((sae.W, chosen), (sae.E, columns), (sae.c, chosen)):
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in optimizer.state[parameter]:
                optimizer.state[parameter][moment][features] = 0.0
    return len(chosen)

"""Sparse autoencoders of a layer's codes (sae.py): training on the training split, judging on the held-out.

As CRATE-LM's trainer: loss, decoder rows of norm 1, shuffled buffer, resampling of silent features. Other
than there, SAEs of several sparsities learn from the same batches, the learning rate falls to 0 at the end,
features are resampled at shares of the run, not at fixed steps, and the bias starts at the mean code.
"""

import math

import torch
import torch.nn.functional as F

from crate_mini import UserError
from crate_mini.sae.autoencoder import replaced
from crate_mini.training import run_log as progress

BUFFER = 2**16, 2**27  # codes held for shuffling: at most so many tokens, so many bytes
ROWS = 1024  # tokens whose features are held at a time when judging
RESAMPLE = (0.2, 0.4, 0.6)  # shares of the run after which silent features start anew
NUDGE = 0.2  # norm of a resampled encoder column, in mean norms of the others
FORMULAS = {
    "L0": "mean over tokens of the number of features above 0",
    "explained_variance": "1 - sum |x - x'|^2 / sum |x - mean x|^2, over all held-out tokens and all codes",
    "cosine": "mean over tokens with x != 0 of the cosine of x and x'",
    "dead": "share of features that are 0 on every held-out token",
    "recovered": "(ablated loss - loss with x') / (ablated loss - model's loss); ablated: x' = 0 or mean x",
}


@torch.no_grad()
def stream(model, corpus, layer, batch, seed):
    """Endless batches (batch, h) of codes on the training split; same seed, same batches; bounded memory.

    They come from a buffer that is shuffled, and renewed whenever half of it has gone out; each code of a
    window goes out once. Raises UserError for a layer that is not there and for codes that are not finite.
    """
    with replaced(model, layer, lambda x: x):  # says so if there is no such layer
        pass
    T, device = model.config.block_size, next(model.parameters()).device
    size = min(BUFFER[0], BUFFER[1] // (4 * model.config.n_code), corpus.n_tokens["train"])
    order, held, step = torch.Generator().manual_seed(seed), [], 0
    while True:
        while sum(map(len, held)) < max(size, 2 * batch):
            idx = corpus.batch(seed, "train", step, max(1, 2048 // T), T)[0].to(device)
            held.append(model.trunk(idx)[1][layer].flatten(0, 1).float())
            step += 1
            if not held[-1].isfinite().all():
                raise UserError(
                    f"codes of layer {layer} are not finite; use a checkpoint of sound weights."
                )
        held = [torch.cat(held)]
        mixed = torch.randperm(len(held[0]), generator=order).to(device)
        out = len(mixed) // 2 // batch * batch
        for part in mixed[:out].split(batch):
            yield held[0][part]
        held = [held[0][mixed[out:]]]


def fit(saes, batches, steps, lr, seed=0):
    """Train SAEs on the same batches, an iterator of (N, h); returns how many features of each began anew.

    Adam; warm-up over 5 % of the steps, linear fall over the last 30 %. Raises UserError when codes do not
    vary and when training diverges.
    """
    first = next(batches)
    if not first.var(0, unbiased=False).sum() > 0:
        raise UserError(
            f"all codes of layer {saes[0].layer} are the same on {len(first)} tokens: a dead "
            "layer leaves nothing to explain, choose another --layer."
        )
    scale = first.square().mean().sqrt()  # so that lr means the same for codes of any size
    runs = [
        (
            s,
            torch.optim.Adam(s.parameters(), lr, fused=first.device.type != "mps"),
            torch.zeros_like(s.c, dtype=torch.bool),
        )
        for s in saes
    ]
    draw, resampled = torch.Generator().manual_seed(seed), [0] * len(saes)
    for sae in saes:
        sae.b.data.copy_(first.mean(0) / scale)
    renew = {int(share * steps) for share in RESAMPLE} - {0}
    for step in progress.track(range(steps), "train"):
        x = next(batches) / scale
        if step in renew:
            pool = torch.cat([x, *(next(batches) / scale for _ in range(7))])
            for i, (sae, optimizer, fired) in enumerate(runs):
                resampled[i] += resample(sae, optimizer, pool, ~fired, draw)
                fired.zero_()
        rate = lr * min(1, (step + 1) / max(1, 0.05 * steps), (steps - step) / (0.3 * steps))
        for sae, optimizer, fired in runs:
            fired |= one_step(sae, optimizer, x, rate)
    for sae in saes:  # from x / scale back to x: only the biases change
        sae.b.data *= scale
        sae.c.data *= scale
        if not all(w.isfinite().all() for w in sae.parameters()):
            raise UserError(f"training of {sae.name} diverged; try a lower --lr than {lr:g}.")
    return resampled


def one_step(sae, optimizer, x, lr):
    """A step of Adam on inputs x (N, h) that leaves rows of W at norm 1; returns which features fired."""
    optimizer.param_groups[0]["lr"] = lr
    loss, f = sae.loss(x)
    optimizer.zero_grad()
    loss.backward()
    with (
        torch.no_grad()
    ):  # the gradient's part along a row would only change its norm, and Adam's moments
        sae.W.grad -= (sae.W.grad * sae.W).sum(1, keepdim=True) * sae.W
        optimizer.step()
        sae.W.copy_(F.normalize(sae.W, dim=1))
    return (f.detach() > 0).any(0)


@torch.no_grad()
def resample(sae, optimizer, x, dead, draw):
    """Start dead features (a mask) anew at inputs x (N, h), drawn by their squared loss: Bricken et al. 2023.

    Their moments in the optimizer start anew too. Returns how many, at most N.
    """
    error = (x - sae.decode(sae.encode(x))).square().sum(1)
    chosen = dead.nonzero().flatten()[: int((error > 0).sum())]
    if not len(chosen):
        return 0
    rows = torch.multinomial(error.cpu().double() ** 2, len(chosen), generator=draw).to(x.device)
    new = F.normalize(x[rows] - sae.b, dim=1)
    norm = 1.0 if dead.all() else sae.E[:, ~dead].norm(dim=0).mean()
    sae.W[chosen], sae.E[:, chosen], sae.c[chosen] = new, NUDGE * norm * new.T, 0.0
    for parameter, at in ((sae.W, chosen), (sae.E, (slice(None), chosen)), (sae.c, chosen)):
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in optimizer.state[parameter]:
                optimizer.state[parameter][moment][at] = 0.0
    return len(chosen)


class Agreement:
    """How well y stands for x, (N, h) each, over any number of batches; how they are cut does not matter."""

    def __init__(self):
        self.n, self.mean, self.spread, self.error, self.cosines, self.nonzero = (
            0,
            0.0,
            0.0,
            0.0,
            0.0,
            0,
        )

    def add(self, x, y):
        """Sums in float64; those about the mean are merged as Chan et al. do, which survives large means."""
        x, y = x.cpu().double(), y.cpu().double()
        n, mean = self.n + len(x), x.mean(0)
        shift = mean - self.mean
        self.spread += (
            (x - mean).square().sum() + shift.square().sum() * (self.n * len(x) / n)
        ).item()
        self.mean, self.n = self.mean + shift * (len(x) / n), n
        self.error += (x - y).square().sum().item()
        some = x.any(1)
        self.cosines += F.cosine_similarity(x[some], y[some]).sum().item()
        self.nonzero += int(some.sum())

    def explained_variance(self):
        """1 - sum |x - y|^2 / sum |x - mean x|^2: 0 for the mean, 1 for x itself; None if x never varies."""
        return 1 - self.error / self.spread if self.spread else None

    def cosine(self):
        """Mean cosine over the rows where x is not zero; None where it always is."""
        return self.cosines / self.nonzero if self.nonzero else None


@torch.no_grad()
def evaluate(model, corpus, layer, saes, tokens, batch=8):
    """Quality of SAEs of one layer on so many held-out tokens: a dict for each, keys as in FORMULAS.

    "loss", nats per token: of the model, with the SAE spliced in, with zeros, with the mean code.
    """
    device, T = next(model.parameters()).device, model.config.block_size

    def loss(what, function=lambda x: x):
        blocks, total, n = list(corpus.blocks("val", batch, T, tokens)), 0.0, 0
        with replaced(model, layer, function):
            for idx, targets in progress.track(blocks, what):
                total += model(idx.to(device), targets.to(device)).item() * idx.numel()
                n += idx.numel()
        if not math.isfinite(total):
            raise UserError(f"the loss ({what}) is {total}; use a checkpoint of sound weights.")
        return total / n

    losses, found = {"model": loss("model"), "zero": loss("zeros", torch.zeros_like)}, []
    for sae in saes:
        met, fired = Agreement(), torch.zeros_like(sae.c, dtype=torch.int64)
        losses["sae"] = loss(sae.name, lambda x, s=sae, m=met, n=fired: reconstruction(s, x, m, n))
        found.append(
            {
                "L0": fired.sum().item() / met.n,
                "dead": (fired == 0).double().mean().item(),
                "explained_variance": met.explained_variance(),
                "cosine": met.cosine(),
                "loss": {**losses},
            }
        )
    mean = loss("mean", lambda x: met.mean.to(x).expand_as(x))
    for result in found:
        result["loss"]["mean"] = mean
        result["recovered"] = {
            name: recovered(**result["loss"], ablated=result["loss"][name])
            for name in ("zero", "mean")
        }
    return found


def reconstruction(sae, x, met, fired):
    """x' of codes x (N, h), a few rows at a time; `met` (Agreement) and `fired` (width,) keep the score."""
    y = torch.empty_like(x)
    for rows, target in zip(x.split(ROWS), y.split(ROWS)):
        f = sae.encode(rows)
        fired += (f > 0).sum(0)
        target.copy_(sae.decode(f))
    met.add(x, y)
    return y


def recovered(sae, model, ablated, **_):
    """(ablated - sae) / (ablated - model), of losses; None where ablation does no harm."""
    return (ablated - sae) / (ablated - model) if ablated > model else None

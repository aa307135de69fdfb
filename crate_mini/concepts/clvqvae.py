"""CLVQ-VAE: discrete concepts between two layers (Garg et al., arXiv 2506.20040), and its training.

    z = (1 - m) x + m LN(W x + b)       m = sigmoid(a) / 2: the adaptive residual encoder, word by word
    D_j = |z - e_j|^2                   distances to the K codes e_j
    c ~ exp(-D_c / T)                   training: drawn among the k nearest;  test: the nearest
    q = z + sg[e_c - z]                 the code, with the gradient of z (straight-through)
    y' = G(q; memory)                   transformer decoder to the higher layer, over the words of a sentence
    loss = |y - y'|^2 + beta |z - sg[e_c]|^2,  means over all numbers; the codes follow z by EMA

x (n, d) words at the lower layer, y (n, d') the same words at the higher. Two things differ from the authors'
code on purpose. Their decoder reads z through cross-attention, so that a good reconstruction says nothing
about the codes; here its memory is q unless asked otherwise: what reaches y' has passed through the codes.
And their mask let a word see only later ones; here it sees earlier ones, as in a causal language model.
"""

import copy
import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from crate_mini import UserError
from crate_mini.concepts.kmeans import distances, nearest, spherical, usage
from crate_mini.training import run_log as progress

CHOICES = {
    "unit": ("gap", "raw"),
    "memory": ("q", "z"),
    "mask": ("causal", "none"),
    "target": ("upper", "lower"),
    "stream": ("q", "mean", "z"),
}


@dataclass
class Settings:
    """How a CLVQ-VAE is made and trained. Values are the paper's where no other is named."""

    codes: int = 400  # K of the codebook; the paper has about one per 200 words
    topk: int = 5  # nearest codes among which training draws; 1 is an ordinary VQ-VAE
    temperature: float = (
        0.25  # T of that draw, in units of --unit; at 1 of them the draw is almost even,
    )
    # and codes that start close together stay so (the paper has 1, raw)
    unit: str = "gap"  # gap: the median difference of the two smallest D at the start, so that T
    # means the same at any width and norm | raw: D itself, as the paper
    decay: float = 0.99  # of the codes' moving average
    eps: float = 1e-5  # that keeps its counts above zero
    beta: float = 0.1  # weight of the commitment of z to its code
    mix: float = 0.2  # a at the start: m = sigmoid(a) / 2
    memory: str = "q"  # what cross-attention reads: q (nothing goes around the codes) | z (paper)
    mask: str = "causal"  # causal: a word sees earlier words of its sentence | none: all (paper)
    target: str = "upper"  # what is reconstructed; lower: one layer, the ordinary VQ-VAE baseline
    stream: str = "q"  # what the decoder starts from; controls: mean (the same for all words) | z
    learn: bool = True  # False: codes stay where they start and there is no encoder (control)
    revive: bool = False  # give codes that no word chose in an epoch a new place (not in the paper)
    layers: int = 2  # of the decoder; the paper's 6 are made for width 768
    heads: int = 4  # of the decoder; the paper has 8
    ffn: float = 8 / 3  # inner width of the decoder in d; the paper's 2048 at 768
    dropout: float = 0.1  # in the decoder
    lr: float = 1e-3  # of Adam; the paper has 5e-3 for BERT, 1e-3 for LLaMA and Qwen
    weight_decay: float = 1e-4  # on matrices
    clip: float = 2.0  # largest norm of the gradient
    batch: int = 32  # sentences of a step; the paper has 128 of 6 words each, which is less text
    epochs: int = 50  # at most
    patience: int = 15  # epochs without a better loss on the stop split before training ends

    def check(self, d):
        """Raise UserError for settings that no vectors of width d can be trained with."""
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"{name} {getattr(self, name)!r} is unknown; choose {' or '.join(allowed)}."
                )
        for name in ("codes", "topk", "layers", "heads", "batch", "epochs", "patience"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} must be at least 1.")
        for name in ("temperature", "eps", "ffn", "lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} {getattr(self, name)} must be a number above 0.")
        if not (0 < self.decay < 1 and 0 <= self.dropout < 1):
            raise UserError(
                f"decay {self.decay} and dropout {self.dropout} must lie between 0 and 1."
            )
        if d % self.heads:
            fit = max(n for n in range(1, self.heads + 1) if d % n == 0)
            raise UserError(
                f"heads {self.heads} do not divide the vectors' width {d}; use heads {fit}."
            )


class Encoder(nn.Module):
    """Adaptive residual encoder, x (n, d) -> z (n, d); at the start W is the identity and m near 0.27."""

    def __init__(self, d, mix):
        super().__init__()
        self.a, self.linear, self.norm = (
            nn.Parameter(torch.tensor(mix)),
            nn.Linear(d, d),
            nn.LayerNorm(d),
        )
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    @property
    def m(self):
        """Share of the learned part, a scalar tensor in (0, 0.5)."""
        return 0.5 * torch.sigmoid(self.a)

    def forward(self, x):
        return (1 - self.m) * x + self.m * self.norm(self.linear(x))


class Codebook(nn.Module):
    """K codes e (K, d) that follow the words that choose them: e = M / N, averages of sums and counts."""

    def __init__(self, e, topk=1, temperature=1.0, decay=0.99, eps=1e-5):
        super().__init__()
        self.topk, self.temperature, self.decay, self.eps = (
            min(topk, len(e)),
            temperature,
            decay,
            eps,
        )
        self.register_buffer("e", e.clone())
        self.register_buffer("M", e.clone())
        self.register_buffer("N", torch.ones(len(e), device=e.device))

    @torch.no_grad()
    def draw(self, z, generator):
        """(codes (n,) drawn from exp(-D/T) over the topk nearest, mean entropy of these draws in nats)."""
        near = distances(z, self.e).topk(self.topk, largest=False)
        p = F.softmax(-near.values / self.temperature, dim=1)
        chosen = torch.multinomial(p, 1, generator=generator)
        return near.indices.gather(1, chosen)[:, 0], torch.special.entr(p).sum(1).mean()

    @torch.no_grad()
    def update(self, z, index):
        """One step of the moving averages with words z (n, d) of codes index (n,).

        z is taken as numbers: in the authors' code it kept its graph, and with it that of every step before.
        """
        total = torch.zeros_like(self.M).index_add_(0, index, z)
        self.N.lerp_(torch.bincount(index, minlength=len(self.e)).to(z.dtype), 1 - self.decay)
        n = self.N.sum()
        self.N.add_(self.eps).mul_(n / (n + len(self.e) * self.eps))
        self.M.lerp_(total, 1 - self.decay)
        self.e.copy_(self.M / self.N[:, None])

    @torch.no_grad()
    def move(self, which, z):
        """Codes `which` start anew at z, as if one word had chosen each."""
        self.e[which], self.M[which], self.N[which] = z, z, 1.0


class CLVQVAE(nn.Module):
    """Encoder, codebook and decoder: words of width d, rebuilt at width d_out. e (K, d): the first codes."""

    def __init__(self, e, d_out, settings, temperature=1.0):
        super().__init__()
        s, d = settings, e.shape[1]
        s.check(d)
        self.settings = s
        self.encoder = Encoder(d, s.mix) if s.learn else nn.Identity()
        self.codebook = Codebook(e, s.topk, temperature, s.decay, s.eps)
        self.blank = nn.Parameter(torch.zeros(d))  # what stream "mean" starts from
        layer = nn.TransformerDecoderLayer(
            d, s.heads, max(1, round(s.ffn * d)), s.dropout, batch_first=True
        )
        self.decoder = nn.TransformerDecoder(layer, s.layers)
        self.out = nn.Linear(d, d_out)

    def forward(self, x, real, generator=None):
        """Words x (B, S, d) of which `real` (B, S) are not padding, n in all -> a dict.

        "y" (n, d_out) reconstruction, "z" (n, d), "e" (n, d) the codes, "index" (n,), "entropy" of the draws.
        In training codes are drawn with `generator` and then moved before they are read, as in the original.
        """
        z, entropy = self.encoder(x[real]), None
        if not z.isfinite().all():
            raise UserError(
                f"training of the CLVQ-VAE diverged; try a lower lr than {self.settings.lr:g}."
            )
        if self.training and self.settings.learn:
            index, entropy = self.codebook.draw(z, generator)
            self.codebook.update(z, index)
        else:
            index = nearest(z, self.codebook.e)[0]
        e = self.codebook.e[index]
        return {
            "y": self.decode(z, z + (e - z).detach(), real),
            "z": z,
            "e": e,
            "index": index,
            "entropy": entropy,
        }

    def decode(self, z, q, real):
        """G: reconstruction (n, d_out) of words with encodings z and codes q (n, d), placed by `real`."""

        def place(words):
            return words.new_zeros(*real.shape, words.shape[-1]).masked_scatter(
                real[..., None], words
            )

        s, S = self.settings, real.shape[1]
        ahead = (
            torch.ones(S, S, dtype=torch.bool, device=real.device).triu(1)
            if s.mask == "causal"
            else None
        )
        stream = {"q": q, "z": z, "mean": self.blank.expand_as(q)}[s.stream]
        y = self.decoder(
            place(stream),
            place(q if s.memory == "q" else z),
            tgt_mask=ahead,
            memory_mask=ahead,
            tgt_key_padding_mask=~real,
            memory_key_padding_mask=~real,
        )
        return self.out(y[real])


class Words:
    """The words of one split as a CLVQ-VAE reads them: scaled tensors and where each sentence lies.

    scale: (lower, upper), one number each, so that both layers have root mean square 1 over the training
    words: directions stay, and lr, T and beta mean the same for states of any size.
    """

    def __init__(self, vectors, split, target, scale, device="cpu"):
        rows = np.flatnonzero(vectors.rows(split))
        if not len(rows):
            raise UserError(
                f"no word vectors are in the {split} split; give more labelled sentences."
            )
        goal = vectors.upper if target == "upper" else vectors.lower
        self.x = torch.from_numpy(vectors.lower[rows]).to(device) / scale[0]
        self.y = torch.from_numpy(goal[rows]).to(device) / scale[1]
        _, first, length = np.unique(vectors.sentence[rows], return_index=True, return_counts=True)
        self.first, self.length = torch.from_numpy(first), torch.from_numpy(length)

    def batches(self, size, generator=None):
        """Yield (x (B, S, d), y (n, d'), real (B, S)), each sentence once; shuffled with a generator.

        Sentences of a batch are about as long as each other: little padding.
        """
        tie = torch.rand(len(self.length), generator=generator) if generator else 0
        groups = torch.argsort(self.length + tie, stable=True).split(size)
        order = (
            torch.randperm(len(groups), generator=generator) if generator else range(len(groups))
        )
        for i in order:
            first, length = self.first[groups[i]], self.length[groups[i]]
            place = torch.arange(int(length.max()))
            real = (place < length[:, None]).to(self.x.device)
            at = (first[:, None] + place).clamp_max(len(self.x) - 1).to(self.x.device)
            yield self.x[at] * real[..., None], self.y[at[real]], real


def scales(vectors, target):
    """(lower, upper or lower): root mean squares over the training words. UserError if a layer is all 0."""
    train = vectors.rows("train")
    found = [
        float(np.sqrt(np.square(v[train], dtype=np.float64).mean())) if train.any() else 1.0
        for v in (vectors.lower, vectors.upper if target == "upper" else vectors.lower)
    ]
    if not min(found) > 0:
        raise UserError("all word vectors of a layer are 0; choose another layer or checkpoint.")
    return found


def fit(vectors, settings, seed=0, start=None, device="cpu"):
    """Train on the training split, stop by the stop split -> (CLVQVAE, history: a dict an epoch).

    start: the first codes (K, d), else scaled spherical k-means++ of the training words. Weights are those of
    the epoch with the least loss on the stop split. The same seed gives the same result on the same machine
    and leaves the global generators as they were. Raises UserError for settings and vectors that do not fit.
    """
    s = settings
    s.check(vectors.lower.shape[1])
    scale = scales(vectors, s.target)
    train, stop = (Words(vectors, split, s.target, scale, device) for split in ("train", "stop"))
    if start is None:
        e = spherical(train.x, s.codes, seed)
    else:
        e = torch.as_tensor(start, dtype=torch.float32, device=device) / scale[0]
    forked = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=forked):
        torch.manual_seed(seed)
        model = CLVQVAE(e, train.y.shape[1], s).to(device)
        model.scale = scale
        model.out.bias.data.copy_(
            train.y.mean(0)
        )  # states share a large part: not for Adam to find
        model.codebook.temperature = s.temperature * (
            gap(model, train.x) if s.unit == "gap" else 1.0
        )
        history = _epochs(model, train, stop, seed)
    return model.eval().requires_grad_(False), history


@torch.no_grad()
def gap(model, x, sample=4096):
    """Median difference of the two smallest D at the start, over the first words x; 1 where there is none."""
    if len(model.codebook.e) < 2:
        return 1.0
    two = distances(model.encoder(x[:sample]), model.codebook.e).topk(2, largest=False).values
    return (two[:, 1] - two[:, 0]).median().item() or 1.0


def _epochs(model, train, stop, seed):
    s, generator = model.settings, torch.Generator(train.x.device).manual_seed(seed)
    shuffle = torch.Generator().manual_seed(seed)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": s.weight_decay}, {"params": others}]
    optimizer = torch.optim.Adam(groups, s.lr)
    halve = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=5)
    best, kept, history = math.inf, None, []
    for epoch in progress.track(range(s.epochs), "clvq" if s.target == "upper" else "vq"):
        model.train()
        entropy, used = 0.0, torch.zeros(len(model.codebook.e), device=train.x.device)
        for x, y, real in train.batches(s.batch, shuffle):
            out = model(x, real, generator)
            optimizer.zero_grad()
            loss(out, y, s.beta).backward()
            nn.utils.clip_grad_norm_(model.parameters(), s.clip)
            optimizer.step()
            used += torch.bincount(out["index"], minlength=len(used))
            entropy += (
                0.0 if out["entropy"] is None else out["entropy"].item() * len(y) / len(train.x)
            )
        if s.revive and s.learn:
            _revive(model, used == 0, train.x, shuffle)
        found = evaluate(model, stop, train.y.mean(0))
        if not math.isfinite(found["loss"]):
            raise UserError(f"training of the CLVQ-VAE diverged; try a lower lr than {s.lr:g}.")
        history.append(
            {
                "epoch": epoch + 1,
                "lr": optimizer.param_groups[0]["lr"],
                "entropy": entropy,
                "m": model.encoder.m.item() if s.learn else 0.0,
                "stop": found,
                **usage(assign(model, train.x), model.codebook.e),
            }
        )
        halve.step(found["loss"])
        if found["loss"] < best:
            best, kept, last = found["loss"], copy.deepcopy(model.state_dict()), epoch
        if epoch - last >= s.patience:
            break
    model.load_state_dict(kept)
    return history


def loss(out, y, beta):
    """Reconstruction plus commitment; both are means over all numbers of the words that are not padding."""
    return F.mse_loss(out["y"], y) + beta * F.mse_loss(out["z"], out["e"])


@torch.no_grad()
def _revive(model, dead, x, generator):
    """Codes that no word chose start anew at the encodings of words drawn from x."""
    which = dead.nonzero()[:, 0]
    rows = torch.randint(len(x), (len(which),), generator=generator).to(x.device)
    model.eval()
    model.codebook.move(which, model.encoder(x[rows]))


@torch.no_grad()
def evaluate(model, words, mean, shuffle=None):
    """{"loss", "mse", "explained"} over Words, codes by the rule of test time, in scaled units.

    shuffle: a generator; each word's code is swapped for that of a random word of the same batch (control).

    explained: 1 - sum |y - y'|^2 / sum |y - mean|^2; mean (d',): of the training words, the cheapest guess.
    None where y is the mean.
    """
    model.eval()
    error = commitment = spread = 0.0
    for x, y, real in words.batches(model.settings.batch):
        out = model(x, real)
        if shuffle is not None:
            e = out["e"][torch.randperm(len(y), generator=shuffle).to(x.device)]
            out["y"] = model.decode(out["z"], e, real)
        error += (out["y"] - y).square().sum().item()
        commitment += (out["z"] - out["e"]).square().sum().item()
        spread += (y - mean).square().sum().item()
    mse = error / words.y.numel()
    return {
        "loss": mse + model.settings.beta * commitment / words.x.numel(),
        "mse": mse,
        "explained": 1 - error / spread if spread else None,
    }


@torch.no_grad()
def assign(model, x):
    """Codes (N,) of words x (N, d) in scaled units: the nearest, no drawing."""
    return nearest(model.encoder(x), model.codebook.e)[0]


def describe(model):
    """Every setting of a trained model and what training derived from them: a JSON-able dict."""
    return {**asdict(model.settings), "scale": list(model.scale), "T": model.codebook.temperature}

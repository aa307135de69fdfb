"""CLVQ-VAE: discrete concepts between two layers (Garg et al., arXiv 2506.20040), and its training.

    z = (1 - m) x + m LN(W x + b)   m = sigmoid(a) / 2: the adaptive residual encoder, word by word
    D_j = |z - e_j|^2               distances to the K codes e_j
    c ~ exp(-D_c / T)               training: drawn among the k nearest; test: the nearest
    q = z + sg[e_c - z]             the code, with the gradient of z (straight-through)
    y' = G(q; memory)               transformer decoder to the higher layer, over a text's words
    loss = |y - y'|^2 + beta |z - sg[e_c]|^2    means over all numbers; the codes follow z by EMA

x (n, d) words at the lower layer, y (n, d') the same words at the higher one. Two choices differ
from the authors' code on purpose. Their decoder reads z through cross-attention, so that it can
reconstruct well with useless codes; here its memory is q unless asked otherwise, and whatever
reaches y' has passed through the codes. Their mask let a word see only later words; here it sees
earlier ones, as in a causal language model.
"""

import copy
import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from crate_mini import UserError, cli
from crate_mini.cli import setting
from crate_mini.concepts.kmeans import distances, nearest, spherical, usage
from crate_mini.console import terminal
from crate_mini.training.device import can_fuse_adam


@dataclass
class Settings:
    """How a CLVQ-VAE is built and trained.

    Defaults are the paper's, except where a help text or a comment gives the paper's value.
    """

    codes: int = setting(400, "K of the codebook", low=1)  # the paper has one per about 200 words
    topk: int = setting(5, "nearest codes among which training draws; 1: an ordinary VQ-VAE", low=1)
    # Paper: 1, raw. At 1 gap the draw is almost even, and codes that start close together stay so.
    temperature: float = setting(0.25, "T of that draw, in units of `unit`", above=0)
    unit: str = setting(
        "gap",
        "gap: the median difference of the two smallest D at the start, so that T means the same "
        "at any width and norm; raw: D itself (paper)",
        choices=("gap", "raw"),
    )
    decay: float = setting(0.99, "decay of the codes' moving average", above=0, below=1)
    eps: float = setting(1e-5, "keeps the counts of that average above zero", above=0)
    beta: float = setting(0.1, "weight of the commitment of z to its code")
    mix: float = setting(0.2, "a at the start: m = sigmoid(a) / 2", low=-10, high=10)
    memory: str = setting(
        "q", "what cross-attention reads; q: codes only; z: encodings (paper)", choices=("q", "z")
    )
    mask: str = setting(
        "causal",
        "causal: a word sees the earlier words of its text; none: all words (paper)",
        choices=("causal", "none"),
    )
    target: str = setting(
        "upper",
        "layer to reconstruct; lower: one layer, the ordinary VQ-VAE",
        choices=("upper", "lower"),
    )
    stream: str = setting(
        "q",
        "what the decoder starts from; controls: mean, the same for all words, and z",
        choices=("q", "mean", "z"),
    )
    learn: bool = setting(True, "False: codes stay as they start and there is no encoder (control)")
    revive: bool = setting(False, "move codes that no word chose in an epoch (not in the paper)")
    layers: int = setting(2, "layers of the decoder", low=1)  # the paper's 6 are for width 768
    heads: int = setting(4, "heads of the decoder", low=1)  # paper: 8
    ffn: float = setting(8 / 3, "inner width of the decoder, in d", above=0)  # 2048 at 768
    dropout: float = setting(0.1, "dropout in the decoder", below=1)
    lr: float = setting(1e-3, "learning rate of Adam", above=0)  # 5e-3 for BERT, 1e-3 for LLaMA
    weight_decay: float = setting(1e-4, "weight decay of matrices")
    clip: float = setting(2.0, "largest norm of the gradient", above=0)
    batch: int = setting(32, "texts per step", low=1)  # paper: 128 of 6 words each, less text
    epochs: int = setting(50, "maximum number of epochs", low=1)
    patience: int = setting(15, "epochs without a better loss on the stop split", low=1)

    def check(self, d):
        """Raise UserError for settings that vectors of width d cannot be trained with."""
        cli.check(self, as_flags=False)
        if d % self.heads:
            dividing = max(n for n in range(1, self.heads + 1) if d % n == 0)
            raise UserError(
                f"heads={self.heads} do not divide the vectors' width {d}; use heads={dividing}."
            )


# ---- the model -----------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Adaptive residual encoder, x (n, d) -> z (n, d).

    At the start W is the identity and, with mix = 0.2, m is 0.275.
    """

    def __init__(self, d, mix):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(mix))
        self.linear = nn.Linear(d, d)
        self.norm = nn.LayerNorm(d)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    @property
    def m(self):
        """Share of the learned part, a scalar tensor in (0, 0.5)."""
        return 0.5 * torch.sigmoid(self.a)

    def forward(self, x):
        return (1 - self.m) * x + self.m * self.norm(self.linear(x))


class Codebook(nn.Module):
    """K codes e (K, d) that follow the words that choose them.

    e = M / N: M (K, d) is a moving average of sums of words, N (K,) of their counts.
    """

    def __init__(self, e, topk=1, temperature=1.0, decay=0.99, eps=1e-5):
        super().__init__()
        self.topk = min(topk, len(e))
        self.temperature = temperature
        self.decay = decay
        self.eps = eps
        self.register_buffer("e", e.clone())
        self.register_buffer("M", e.clone())
        self.register_buffer("N", torch.ones(len(e), device=e.device))

    @torch.no_grad()
    def draw(self, z, generator):
        """Draw a code for each word z (n, d) from exp(-D/T) over its topk nearest.

        Returns (codes (n,), mean entropy of these draws in nats).
        """
        near = distances(z, self.e).topk(self.topk, largest=False)
        p = F.softmax(-near.values / self.temperature, dim=1)
        choice = torch.multinomial(p, 1, generator=generator)
        return near.indices.gather(1, choice)[:, 0], torch.special.entr(p).sum(1).mean()

    @torch.no_grad()
    def update(self, z, index):
        """One step of the moving averages, with words z (n, d) that chose codes index (n,).

        z enters detached: the authors' code kept its graph, and with it that of every step before.
        """
        total = torch.zeros_like(self.M).index_add_(0, index, z)
        count = torch.bincount(index, minlength=len(self.e)).to(z.dtype)
        self.N.lerp_(count, 1 - self.decay)
        n = self.N.sum()
        self.N.add_(self.eps).mul_(n / (n + len(self.e) * self.eps))
        self.M.lerp_(total, 1 - self.decay)
        self.e.copy_(self.M / self.N[:, None])

    @torch.no_grad()
    def move(self, which, z):
        """Restart the codes `which` (m,) at z (m, d), as if one word had chosen each."""
        self.e[which] = z
        self.M[which] = z
        self.N[which] = 1.0


class CLVQVAE(nn.Module):
    """Encoder, codebook and decoder: words of width d, reconstructed at width d_out.

    e (K, d): the codes at the start.
    """

    def __init__(self, e, d_out, settings, temperature=1.0):
        super().__init__()
        d = e.shape[1]
        s = settings
        s.check(d)
        self.settings = s
        self.encoder = Encoder(d, s.mix) if s.learn else nn.Identity()
        self.codebook = Codebook(e, s.topk, temperature, s.decay, s.eps)
        self.blank = nn.Parameter(torch.zeros(d))  # where the stream "mean" starts
        inner = max(1, round(s.ffn * d))
        layer = nn.TransformerDecoderLayer(d, s.heads, inner, s.dropout, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, s.layers)
        self.out = nn.Linear(d, d_out)

    def forward(self, x, real, generator=None):
        """Words x (B, S, d), of which `real` (B, S), n in all, are not padding.

        Returns {"y": reconstruction (n, d_out), "z": encodings (n, d), "e": codes (n, d), "index":
        (n,), "entropy": of the draws, None without any}. In training, codes are drawn with
        `generator`, and move before they are read, as in the authors' code.
        """
        z = self.encoder(x[real])
        if not z.isfinite().all():
            raise diverged(self.settings)
        entropy = None
        if self.training and self.settings.learn:
            index, entropy = self.codebook.draw(z, generator)
            self.codebook.update(z, index)
        else:
            index, _ = nearest(z, self.codebook.e)
        e = self.codebook.e[index]
        q = z + (e - z).detach()
        y = self.decode(z, q, real)
        return {"y": y, "z": z, "e": e, "index": index, "entropy": entropy}

    def decode(self, z, q, real):
        """G: reconstruction (n, d_out) of words with encodings z and codes q (n, d), at `real`."""
        streams = {"q": q, "z": z, "mean": self.blank.expand_as(q)}
        stream = streams[self.settings.stream]
        memory = q if self.settings.memory == "q" else z
        later = None
        if self.settings.mask == "causal":
            S = real.shape[1]
            later = torch.ones(S, S, dtype=torch.bool, device=real.device).triu(1)
        y = self.decoder(
            to_batch(stream, real),
            to_batch(memory, real),
            tgt_mask=later,
            memory_mask=later,
            tgt_key_padding_mask=~real,
            memory_key_padding_mask=~real,
        )
        return self.out(y[real])


def to_batch(words, real):
    """Words (n, d) at the places of `real` (B, S): (B, S, d), zeros elsewhere."""
    empty = words.new_zeros(*real.shape, words.shape[-1])
    return empty.masked_scatter(real[..., None], words)


def diverged(settings):
    """The UserError for numbers that are no longer finite."""
    return UserError(f"training of the CLVQ-VAE diverged; try a lower lr than {settings.lr:g}.")


# ---- words ---------------------------------------------------------------------------------------


class Words:
    """The words of one split, scaled, as tensors; and where each text's words are.

    scale: (lower, upper), a number each by which states are divided, so that both layers have root
    mean square 1 over the training words: directions stay, and lr, T and beta mean the same for
    states of any size.
    """

    def __init__(self, vectors, split, target, scale, device="cpu"):
        rows = np.flatnonzero(vectors.rows(split))
        if not len(rows):
            raise UserError(f"no word vectors are in the {split} split; give more labelled texts.")
        goal = vectors.upper if target == "upper" else vectors.lower
        self.x = torch.from_numpy(vectors.lower[rows]).to(device) / scale[0]
        self.y = torch.from_numpy(goal[rows]).to(device) / scale[1]
        texts = vectors.sentence[rows]
        _, first, length = np.unique(texts, return_index=True, return_counts=True)
        self.first = torch.from_numpy(first)
        self.length = torch.from_numpy(length)

    def batches(self, size, generator=None):
        """Yield (x (B, S, d), y (n, d'), real (B, S)), each text once; shuffled by a generator.

        Texts of about the same length go together, which needs little padding.
        """
        tie_breaker = torch.rand(len(self.length), generator=generator) if generator else 0
        groups = torch.argsort(self.length + tie_breaker, stable=True).split(size)
        order = range(len(groups))
        if generator:
            order = torch.randperm(len(groups), generator=generator)
        for i in order:
            first = self.first[groups[i]]
            length = self.length[groups[i]]
            place = torch.arange(int(length.max()))
            real = (place < length[:, None]).to(self.x.device)
            rows = (first[:, None] + place).clamp_max(len(self.x) - 1).to(self.x.device)
            yield self.x[rows] * real[..., None], self.y[rows[real]], real


def scales(vectors, target):
    """[lower, target]: root mean squares of the states over the training words.

    Raises UserError if the states of a layer are all 0.
    """
    train = vectors.rows("train")
    goal = vectors.upper if target == "upper" else vectors.lower
    sizes = []
    for states in (vectors.lower, goal):
        mean_square = np.square(states[train], dtype=np.float64).mean() if train.any() else 1.0
        sizes.append(float(np.sqrt(mean_square)))
    if not min(sizes) > 0:
        raise UserError("all word vectors of a layer are 0; choose another layer or checkpoint.")
    return sizes


# ---- training ------------------------------------------------------------------------------------


def fit(vectors, settings, seed=0, start=None, device="cpu", watch=None):
    """Train on the training split, stop by the stop split: (CLVQVAE, a dict for each epoch).

    start: the codes at the start (K, d), by default scaled spherical k-means++ of the training
    words; `model.start` keeps them in scaled units. watch: called with (epochs done, model) before
    the first epoch and after each. Keeps the weights of the epoch with the lowest loss on the stop
    split. The same seed gives the same result on the same machine; the global generators are left
    as they were. Raises UserError for settings and vectors that do not fit each other.
    """
    settings.check(vectors.lower.shape[1])
    scale = scales(vectors, settings.target)
    train, stop = (
        Words(vectors, split, settings.target, scale, device) for split in ("train", "stop")
    )
    if start is None:
        e = spherical(train.x, settings.codes, seed)
    else:
        e = torch.as_tensor(start, dtype=torch.float32, device=device) / scale[0]
    forked = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=forked):
        torch.manual_seed(seed)
        model = CLVQVAE(e, train.y.shape[1], settings).to(device)
        model.scale = scale
        model.start = e
        # States share a large part, which Adam need not find.
        model.out.bias.data.copy_(train.y.mean(0))
        unit = gap(model, train.x) if settings.unit == "gap" else 1.0
        model.codebook.temperature = settings.temperature * unit
        if watch:
            watch(0, model)
        history = train_epochs(model, train, stop, seed, watch)
    return model.eval().requires_grad_(False), history


@torch.no_grad()
def gap(model, x, sample=4096):
    """Median difference of the two smallest D over the first words of x; 1 if there is none."""
    if len(model.codebook.e) < 2:
        return 1.0
    D = distances(model.encoder(x[:sample]), model.codebook.e)
    two = D.topk(2, largest=False).values
    return (two[:, 1] - two[:, 0]).median().item() or 1.0


def train_epochs(model, train, stop, seed, watch=None):
    """Train until --epochs or patience ends it, load the best weights, return a dict per epoch.

    watch: called with (epochs done, model) after each epoch.
    """
    s = model.settings
    generator = torch.Generator(train.x.device).manual_seed(seed)  # of the codes that are drawn
    shuffle = torch.Generator().manual_seed(seed)
    optimizer = make_optimizer(model)
    halve = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=5)
    lowest, best_epoch, weights, history = math.inf, 0, None, []
    for epoch in terminal.track(range(s.epochs), "clvq" if s.target == "upper" else "vq"):
        used, entropy = train_epoch(model, train, optimizer, generator, shuffle)
        if s.revive and s.learn:
            revive(model, used == 0, train.x, shuffle)
        scores = evaluate(model, stop, train.y.mean(0))
        if not math.isfinite(scores["loss"]):
            raise diverged(s)
        history.append(
            {
                "epoch": epoch + 1,
                "lr": optimizer.param_groups[0]["lr"],
                "entropy": entropy,
                "m": model.encoder.m.item() if s.learn else 0.0,
                "stop": scores,
                **usage(assign(model, train.x), model.codebook.e),
            }
        )
        if watch:
            watch(epoch + 1, model)
        halve.step(scores["loss"])
        if scores["loss"] < lowest:
            lowest, best_epoch = scores["loss"], epoch
            weights = copy.deepcopy(model.state_dict())
        if epoch - best_epoch >= s.patience:
            break
    model.load_state_dict(weights)
    return history


def make_optimizer(model):
    """Adam, with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    decay = model.settings.weight_decay
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others}]
    fused = can_fuse_adam(model.out.bias.device)  # a third of the step's time
    return torch.optim.Adam(groups, model.settings.lr, fused=fused)


def train_epoch(model, words, optimizer, generator, shuffle):
    """One epoch over Words: (how often each code was used (K,), mean entropy of the draws)."""
    s = model.settings
    model.train()
    used = torch.zeros(len(model.codebook.e), device=words.x.device)
    entropy = 0.0
    for x, y, real in words.batches(s.batch, shuffle):
        out = model(x, real, generator)
        optimizer.zero_grad()
        loss(out, y, s.beta).backward()
        nn.utils.clip_grad_norm_(model.parameters(), s.clip)
        optimizer.step()
        used += torch.bincount(out["index"], minlength=len(used))
        if out["entropy"] is not None:
            entropy += out["entropy"].item() * len(y) / len(words.x)
    return used, entropy


def loss(out, y, beta):
    """Reconstruction plus commitment, each a mean over all numbers of the real words."""
    return F.mse_loss(out["y"], y) + beta * F.mse_loss(out["z"], out["e"])


@torch.no_grad()
def revive(model, dead, x, generator):
    """Restart codes, a mask (K,), at the encodings of words drawn from x."""
    which = dead.nonzero()[:, 0]
    rows = torch.randint(len(x), (len(which),), generator=generator).to(x.device)
    model.eval()
    model.codebook.move(which, model.encoder(x[rows]))


# ---- a trained model -----------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, words, mean, shuffle=None):
    """{"loss", "mse", "explained"} over Words in scaled units; each word has its nearest code.

    explained: 1 - sum |y - y'|^2 / sum |y - mean|^2, where mean (d',) of the training words is the
    cheapest guess; None where y is the mean. shuffle: a generator; each word gets the code of a
    random word of its batch instead (control).
    """
    model.eval()
    error = commitment = spread = 0.0
    for x, y, real in words.batches(model.settings.batch):
        out = model(x, real)
        if shuffle is not None:
            other = torch.randperm(len(y), generator=shuffle).to(x.device)
            out["y"] = model.decode(out["z"], out["e"][other], real)
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
    """Codes (N,) of words x (N, d) in scaled units: the nearest, nothing is drawn."""
    return nearest(model.encoder(x), model.codebook.e)[0]


@torch.no_grad()
def assign_at_start(model, x):
    """Codes (N,) of words x (N, d) in scaled units before any training: no encoder, start codes."""
    return nearest(x, model.start)[0]


def describe(model):
    """Every setting of a trained model and what training derived from them: a JSON-able dict."""
    derived = {"scale": list(model.scale), "T": model.codebook.temperature}
    return {**asdict(model.settings), **derived}

"""CRATE language model and its GPT-2 twin: one Block with two slots.

                     attention slot                   sparsifier slot
    CRATE (paper)    MSSA: q = k = v = U^T LN(z)      ISTA: two sparse-coding steps on a tied dictionary D
    GPT-2 (twin)     MHSA: separate q, k, v           MLP:  ReLU between two linear maps, residual around it

Legend, used in reference.py, csrc/ and tests/ too:
    B, T batch and time (context length block_size); d width (n_embd); K heads (n_head), p = d/K head width;
    L layers; h = expansion * d codes per token; V vocabulary; U (d, d) subspace bases, heads side by side;
    D (d, h) dictionary; a (.., h) codes; eta step; lam threshold; z residual stream.
A *neuron* is one of the h coordinates of the final code a (ISTA) or of the activation (MLP).

Sources: CRATE, Yu et al., NeurIPS 2023; CRATE-LM, Bai & Ma, CPAL 2025 (arXiv 2410.16443) and its released
code, which this file follows where the two differ (see "Departures" in the README).
"""

import math
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F

from crate_mini import UserError, ops
from crate_mini import loss as head
from crate_mini.generate import attend, remember


@dataclass(frozen=True)
class Config:
    """Everything that shapes a model; the defaults are the paper's CRATE 3L. Raises UserError on nonsense."""

    vocab_size: int = 50304  # GPT-2's 50,257 ids rounded up to a multiple of 64
    block_size: int = 1024  # T, the longest context
    n_layer: int = 3  # L
    n_head: int = 4  # K
    n_embd: int = 128  # d
    attention: str = "mssa"  # mssa | mhsa
    sparsifier: str = "ista"  # ista | mlp
    activation: str = (
        "relu"  # of the mlp: relu | gelu (OpenAI GPT-2's, the tanh form; codes get negative)
    )
    bias: bool = True  # biases in LayerNorms and output maps (the released GPT-2 twin has none)
    expansion: int = 4  # h / d, the overcompleteness of D
    ista_steps: int = 2  # ISTA steps from the zero start
    eta: float = 0.1  # ISTA step size
    lam: float = 0.1  # sparsity threshold: a step subtracts eta * lam
    # Variants, all off in the paper's model; each answers one known weakness.
    residual: bool = False  # add the sparsifier's output to the stream instead of replacing it
    separate_decoder: bool = (
        False  # write with another matrix than D: a tied step can rescale and denoise
    )
    # what is there (its Jacobian is symmetric, >= 0), not write a new direction
    learned_lam: bool = False  # one positive threshold per neuron, starting at lam
    unit_norm: bool = (
        False  # use D / |D|_2, which makes the step eta / |D|^2: stable for every eta < 2
    )
    query_rank: int = 0  # q = u + (u A) B of this rank: scores u u^T are symmetric, so without it a
    # head cannot bind a key to another token's value
    l1: float = 0.0  # weight of an L1 penalty on codes in the training loss (reviewers' ablation)

    def __post_init__(self):
        for f in fields(self):
            value, kind = getattr(self, f.name), type(f.default)
            ok = isinstance(value, (int, float)) if kind is float else isinstance(value, kind)
            if not ok or (kind in (int, float) and isinstance(value, bool)):
                raise UserError(
                    f"{f.name}={value!r} is not of type {kind.__name__}; try {f.default!r}."
                )
            if kind is int and not 0 <= value < (1000 if f.name == "n_layer" else 2**31):
                raise UserError(f"{f.name}={value} is out of range; try {f.default}.")
        for name, allowed in (
            ("attention", ("mssa", "mhsa")),
            ("sparsifier", ("ista", "mlp")),
            ("activation", ("relu", "gelu")),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"{name}={getattr(self, name)!r} is unknown; choose {' or '.join(allowed)}."
                )
        for name in (
            "vocab_size",
            "block_size",
            "n_layer",
            "n_head",
            "n_embd",
            "expansion",
            "ista_steps",
        ):
            if getattr(self, name) < 1:
                like = getattr(Config, name)
                raise UserError(f"{name}={getattr(self, name)} must be at least 1; try {like}.")
        for name in ("lam", "l1", "query_rank"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name}={getattr(self, name)} must be finite and not negative.")
        if not 0 < self.eta < math.inf or (self.learned_lam and self.lam == 0):
            raise UserError(
                f"eta={self.eta} (and a learned lam={self.lam}) must be finite and above 0."
            )
        if self.n_embd % self.n_head:
            ok = max(k for k in range(1, self.n_head + 1) if self.n_embd % k == 0)
            raise UserError(
                f"n_head={self.n_head} does not divide n_embd={self.n_embd}; try n_head={ok}."
            )

    @property
    def n_code(self):
        """h, the neurons of a layer."""
        return self.expansion * self.n_embd


SIZES = {  # preset: layers, heads, width (facts of the paper's model table)
    "1L": dict(n_layer=1, n_head=4, n_embd=128),
    "2L": dict(n_layer=2, n_head=4, n_embd=128),
    "3L": dict(n_layer=3, n_head=4, n_embd=128),
    "S": dict(n_layer=6, n_head=12, n_embd=768),
    "B": dict(n_layer=12, n_head=12, n_embd=768),
}
KINDS = {
    "crate": dict(attention="mssa", sparsifier="ista", residual=False),
    "gpt2": dict(attention="mhsa", sparsifier="mlp", residual=True, bias=False),
    "crate+": dict(
        attention="mssa", sparsifier="ista", residual=True, separate_decoder=True, query_rank=32
    ),
}


def preset(size="3L", kind="crate", **changes):
    """Config of a named size (1L 2L 3L S B) and kind (crate, gpt2, crate+), with single fields changed."""
    for value, table, name in ((size, SIZES, "preset"), (kind, KINDS, "model")):
        if value not in table:
            raise UserError(f"{name}={value!r} is unknown; choose one of {', '.join(table)}.")
    return Config(**{**SIZES[size], **KINDS[kind], **changes})


class MSSA(nn.Module):
    """Multi-head subspace self-attention, a gradient step that compresses z towards the subspaces U.

    u = U^T LN(z); head k: softmax(causal(u_k u_k^T / sqrt(p))) u_k; output: P [heads] + b. Shapes (B, T, d).
    Equation (CRATE, MSSA): the output map is U; the released code frees it and scales by 1/sqrt(p), as here.
    """

    past = None  # while generating, what this layer keeps of earlier tokens

    def __init__(self, config):
        super().__init__()
        d, self.n_head = config.n_embd, config.n_head
        self.norm = nn.LayerNorm(d, bias=config.bias)
        self.U = nn.Parameter(torch.empty(d, d))
        self.out = nn.Linear(d, d, bias=config.bias)
        rank = config.query_rank
        self.query = (
            nn.ParameterList([torch.empty(d, rank), torch.empty(rank, d)]) if rank else None
        )

    def forward(self, z):
        u = ops.mssa_project(
            z, self.norm.weight, self.norm.bias, self.U, self.n_head
        )  # (B, T, K, p)
        q = u
        if (
            self.query is not None
        ):  # B starts at zero, so that training starts from the paper's attention
            q = u + (u.flatten(-2) @ self.query[0] @ self.query[1]).view_as(u)
        q, u = q.transpose(1, 2), u.transpose(1, 2)  # (B, K, T, p)
        if self.past:
            (u,) = self.past.extend(self, u)
        y = attend(q, u, u)
        return self.out(y.transpose(1, 2).flatten(-2))  # (B, T, d)


class MHSA(nn.Module):
    """GPT-2's attention: as MSSA, with separate query, key and value projections. (B, T, d) -> (B, T, d)."""

    past = None

    def __init__(self, config):
        super().__init__()
        d, self.n_head = config.n_embd, config.n_head
        self.norm = nn.LayerNorm(d, bias=config.bias)
        self.qkv = nn.Linear(d, 3 * d, bias=config.bias)
        self.out = nn.Linear(d, d, bias=config.bias)

    def forward(self, z):
        qkv = self.qkv(self.norm(z)).unflatten(-1, (3, self.n_head, -1))  # (B, T, 3, K, p)
        q, k, v = qkv.transpose(1, 3).unbind(2)  # each (B, K, T, p)
        if self.past:
            k, v = self.past.extend(self, k, v)
        y = attend(q, k, v)
        return self.out(y.transpose(1, 2).flatten(-2))  # (B, T, d)


class ISTA(nn.Module):
    """Sparse coding of LN(z) on the overcomplete dictionary D; returns (D a, a): (B, T, d), (B, T, h).

    a_t = ReLU(a_{t-1} + eta D^T (x - D a_{t-1}) - eta lam), a_0 = 0, x = LN(z): `steps` ISTA steps on
    min_{a >= 0} lam |a|_1 + 1/2 |x - D a|^2 (CRATE, ISTA; zero start and h = 4d as CRATE-LM).
    Codes are watched or replaced at `self.code`: a forward hook on it sees a, and what it returns is decoded.
    """

    def __init__(self, config):
        super().__init__()
        d, h = config.n_embd, config.n_code
        self.eta, self.steps = config.eta, config.ista_steps
        self.norm = nn.LayerNorm(d, bias=config.bias)
        self.D = nn.Parameter(torch.empty(d, h))
        self.decoder = nn.Parameter(torch.empty(d, h)) if config.separate_decoder else None
        self.log_lam = (
            nn.Parameter(torch.full((h,), math.log(config.lam))) if config.learned_lam else None
        )
        self.lam = config.lam
        self.code = nn.Identity()

    def forward(self, z):
        D, lam = self.D, self.lam if self.log_lam is None else self.log_lam.exp()
        y, a = ops.ista(self.norm(z), D, self.eta, lam, self.steps, self.decoder)
        seen = self.code(a)
        if (
            seen is not a
        ):  # a hook replaced the codes: where it left them as they were, y stays to the bit
            y = y + (seen - a) @ (D if self.decoder is None else self.decoder).T
        return y, seen


class MLP(nn.Module):
    """The twin's sparsifier: a = ReLU(W1 LN(z)); returns (W2 a, a). ReLU as released, GELU on request."""

    def __init__(self, config):
        super().__init__()
        d, h = config.n_embd, config.n_code
        self.norm = nn.LayerNorm(d, bias=config.bias)
        self.fc = nn.Linear(d, h, bias=config.bias)
        self.proj = nn.Linear(h, d, bias=config.bias)
        self.gelu = config.activation == "gelu"
        self.code = nn.Identity()

    def forward(self, z):
        x = self.fc(self.norm(z))
        a = self.code(F.gelu(x, approximate="tanh") if self.gelu else F.relu(x))
        return self.proj(a), a


class Block(nn.Module):
    """z <- z + attention(z); z <- sparsifier(z), or z + sparsifier(z) if residual. Returns (z, codes)."""

    def __init__(self, config):
        super().__init__()
        self.attention = MSSA(config) if config.attention == "mssa" else MHSA(config)
        self.sparsifier = ISTA(config) if config.sparsifier == "ista" else MLP(config)
        self.residual = config.residual

    def forward(self, z):
        z = z + self.attention(z)
        y, a = self.sparsifier(z)
        return (z + y if self.residual else y), a


class LM(nn.Module):
    """Token and learned position embeddings, L blocks, final LayerNorm, head tied to the token embedding."""

    past = None

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """As released: N(0, 0.02), maps that write to the stream N(0, 0.02 / sqrt(2L)), D Kaiming-uniform."""
        small = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, w in self.named_parameters():
            if name.endswith("bias"):
                w.zero_()
            elif name.endswith((".D", "query.1")):
                bound = math.sqrt(6 / self.config.n_embd) if name.endswith(".D") else 0.0
                w.uniform_(-bound, bound)
            elif name.endswith(("out.weight", "proj.weight", "decoder")):
                w.normal_(0, small)
            elif (
                w.dim() > 1
            ):  # what remains with one dimension keeps its start: LayerNorm weights 1, log_lam
                w.normal_(0, 0.02)
        if self.config.unit_norm:
            for block in self.blocks:
                if isinstance(block.sparsifier, ISTA):
                    nn.utils.parametrizations.spectral_norm(block.sparsifier, "D")

    def trunk(self, idx):
        """All but the head: ids (B, T) -> (stream after the final norm (B, T, d), [codes (B, T, h)] * L)."""
        begin = self.past.length if self.past else 0
        end = begin + idx.shape[1]
        if end > self.config.block_size:
            raise UserError(
                f"{end} tokens exceed the model's context, block_size={self.config.block_size}."
            )
        z, codes = self.tokens(idx) + self.positions.weight[begin:end], []
        for block in self.blocks:
            z, a = block(z)
            codes.append(a)
        if self.past:
            self.past.length = end
        return self.norm(z), codes

    def forward(self, idx, targets=None):
        """Logits (B, T, V) of ids (B, T); or, given targets (B, T), the mean loss in nats per token."""
        x, codes = self.trunk(idx)
        if targets is None:
            return F.linear(x, self.tokens.weight)
        loss = head.cross_entropy(x, self.tokens.weight, targets)
        if self.training and self.config.l1:  # evaluation always reports plain cross-entropy
            loss = loss + self.config.l1 * sum(a.float().abs().sum(-1).mean() for a in codes) / len(
                codes
            )
        return loss

    @torch.no_grad()
    def generate(self, idx, n_new, temperature=1.0, top_k=None, generator=None, cache=True):
        """Continue ids (B, T) by n_new tokens; temperature 0 is greedy. Returns (B, T + n_new).

        Beyond block_size the window slides, and all positions with it: there no cache can help. Raises
        UserError for logits that are not finite, or not any more when divided by the temperature.
        """
        with remember(self, idx.shape[1]) as past:
            for _ in range(n_new):
                slid = idx.shape[1] - self.config.block_size
                if slid > 0 or not cache:
                    past.slid, past.length = max(0, slid), 0
                x, _ = self.trunk(idx[:, past.slid + past.length :])
                logits = F.linear(x[:, -1], self.tokens.weight).float()
                if not (logits / (temperature or 1)).isfinite().all():
                    raise UserError(
                        f"logits at temperature {temperature} are not finite numbers; raise the "
                        "temperature, or change the model less."
                    )
                if temperature == 0:
                    new = logits.argmax(-1, keepdim=True)
                else:
                    if top_k is not None:
                        floor = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                        logits = logits.masked_fill(logits < floor, -math.inf)
                    new = torch.multinomial(
                        F.softmax(logits / temperature, -1), 1, generator=generator
                    )
                idx = torch.cat((idx, new), 1)
        return idx

    def n_params(self):
        """Parameters by the paper's rule: positions excluded, the tied head counted once."""
        return sum(w.numel() for w in self.parameters()) - self.positions.weight.numel()


def flops_per_token(config, T=None, training=True):
    """Operations per token, each product counted where it runs (not 6N: D is used 2 * ista_steps times).

    A multiply-add is two operations; in a context of T tokens (block_size) the causal mask leaves each
    one (T + 1) / 2 pairs on average; the backward pass does two products for each forward one.
    """
    c, d = config, config.n_embd
    attention = 2 * d * d + 2 * d * c.query_rank if c.attention == "mssa" else 4 * d * d
    attention += ((T or c.block_size) + 1) * d
    sparsifier = (2 * c.ista_steps if c.sparsifier == "ista" else 2) * d * c.n_code
    products = c.n_layer * (attention + sparsifier) + d * c.vocab_size
    return 2 * products * (3 if training else 1)


def to_dict(config):
    """Config as plain JSON-able values; Config(**to_dict(c)) == c."""
    return asdict(config)

"""CRATE language model and its GPT-2 twin: one Block with two slots.

                     attention slot                 sparsifier slot
    CRATE (paper)    MSSA: q = k = v = U^T LN(z)    ISTA: two sparse-coding steps on a dictionary D
    GPT-2 (twin)     MHSA: separate q, k, v         MLP:  ReLU between two linear maps, residual

Legend, used in reference.py, csrc/ and tests/ too:

    B, T  batch and time (context block_size)      U (d, d)  subspace bases, heads side by side
    d     width of the residual stream (n_embd)    D (d, h)  dictionary, its columns are the atoms
    K, p  heads (n_head), head width p = d / K     a (.., h) codes
    L     layers (n_layer)                         eta, lam  ISTA step size, sparsity threshold
    h     codes per token, expansion * d           z         residual stream (B, T, d)
    V     vocabulary

A *neuron* is one of the h coordinates of the final code a (ISTA) or of the activation (MLP).

Sources: CRATE, Yu et al., NeurIPS 2023; CRATE-LM, Bai & Ma, CPAL 2025 (arXiv 2410.16443) and its
released code, which this file follows where the two differ (see "Departures" in the README).
reference.py holds the mathematics behind each step, one equation a line.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from crate_mini import UserError, loss, ops
from crate_mini.cli import check, setting


@dataclass(frozen=True)
class Config:
    """Everything that shapes a model; the defaults are the paper's CRATE 3L.

    Raises UserError for values that no model can have.
    """

    vocab_size: int = setting(50304, "rows of the embedding; one row per token id", 1)
    block_size: int = setting(1024, "T, the longest context", 1)
    n_layer: int = setting(3, "L, layers", 1, 999)
    n_head: int = setting(4, "K, attention heads", 1)
    n_embd: int = setting(128, "d, the width of the residual stream", 1)
    attention: str = setting("mssa", "the attention slot", choices=("mssa", "mhsa"))
    sparsifier: str = setting("ista", "the sparsifier slot", choices=("ista", "mlp"))
    activation: str = setting(
        "relu", "for the mlp; gelu is the tanh form of OpenAI's GPT-2", choices=("relu", "gelu")
    )
    bias: bool = setting(True, "biases in LayerNorms and output maps; the released twin has none")
    expansion: int = setting(4, "h / d, how overcomplete the dictionary is", 1)
    ista_steps: int = setting(2, "ISTA steps from the zero start", 1)
    eta: float = setting(0.1, "ISTA step size", above=0)
    lam: float = setting(0.1, "sparsity threshold: a step subtracts eta * lam")
    # Variants, all off in the paper's model; each answers one known weakness.
    residual: bool = setting(
        False, "add the sparsifier's output to the stream instead of replacing it"
    )
    separate_decoder: bool = setting(
        False,
        "write to the stream with another matrix than D: a tied step has a symmetric Jacobian "
        ">= 0, so it can rescale and denoise but not write a new direction",
    )
    learned_lam: bool = setting(False, "one positive threshold per neuron, starting at lam")
    unit_norm: bool = setting(
        False, "use D / |D|_2, which makes the step eta / |D|^2, stable for every eta < 2"
    )
    query_rank: int = setting(
        0,
        "rank of the query correction q = u + (u A) B, 0 for none: scores u u^T are symmetric, so "
        "without it a head cannot bind a key to another token's value",
    )
    key_shift: bool = setting(
        False,
        "mix each key with the key before it: a head then finds what followed tokens like this "
        "one, where symmetric scores u u^T find only tokens like this one",
    )
    top_k: int = setting(
        0, "keep only this many codes per token, the largest; 0: all that pass the threshold"
    )
    debias: bool = setting(
        False, "let the threshold of the last ISTA step select codes, but not shrink them"
    )
    l1: float = setting(0.0, "weight of an L1 penalty on the codes in the training loss")

    def __post_init__(self):
        check(self, as_flags=False)
        if self.learned_lam and self.lam == 0:
            raise UserError(f"lam={self.lam} must be above 0 to be learned; try {Config.lam}.")
        if self.debias and self.learned_lam:
            raise UserError(
                "debias=True leaves the threshold without a gradient, so learned_lam=True has no "
                "effect; use one of them."
            )
        if self.top_k > self.n_code:
            raise UserError(f"top_k={self.top_k} exceeds the {self.n_code} codes of a token.")
        if self.n_embd % self.n_head:
            divisors = [k for k in range(1, self.n_head + 1) if self.n_embd % k == 0]
            raise UserError(
                f"n_head={self.n_head} does not divide n_embd={self.n_embd}; "
                f"try n_head={divisors[-1]}."
            )

    @property
    def n_code(self):
        """h, the neurons of a layer."""
        return self.expansion * self.n_embd


SIZES = {  # the paper's model table
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
        attention="mssa",
        sparsifier="ista",
        residual=True,
        separate_decoder=True,
        ista_steps=1,
        query_rank=32,
        key_shift=True,
    ),
}


def preset(size="3L", kind="crate", **changes):
    """Config of a named size and kind, with single fields changed.

    size: 1L, 2L, 3L, S or B. kind: crate, gpt2 or crate+. Raises UserError for any other name.
    """
    for value, table, name in ((size, SIZES, "preset"), (kind, KINDS, "model")):
        if value not in table:
            raise UserError(f"{name}={value!r} is unknown; choose one of {', '.join(table)}.")
    return Config(**{**SIZES[size], **KINDS[kind], **changes})


def attend(q, k, v):
    """softmax(causal(q k^T / sqrt(p))) v, head by head.

    q (B, K, T, p) holds the last T of S tokens, k and v (B, K, S, p) all S; returns (B, K, T, p).
    S exceeds T only while generating, when earlier keys and values come from the KV cache.
    """
    T, S = q.shape[2], k.shape[2]
    if T == S:
        return ops.attention(q, k, v)
    mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T) if T > 1 else None
    return F.scaled_dot_product_attention(q, k, v, mask)


def shift_keys(k, gate):
    """Each key mixed with the key before it: k_s + sigmoid(gate) (k_{s-1} - k_s), and k_{-1} = 0.

    k (B, K, S, p); gate (d,), learned. Where a score compares the query's token with s - 1 and then
    reads s, the head returns what followed tokens like this one. Known as smeared keys (Elhage et
    al. 2021) and token shift (RWKV); a departure from CRATE. Its linear part is a step down the
    coding rate of pairs of neighbours: see course/idea.md, section 6.
    """
    before = F.pad(k, (0, 0, 1, -1))
    share = gate.sigmoid().unflatten(0, (k.shape[1], 1, -1)).to(k.dtype)  # (K, 1, p)
    return k + share * (before - k)


class MSSA(nn.Module):
    """Multi-head subspace self-attention: a gradient step that compresses z towards the U_k.

    u = U^T LN(z); head k: softmax(causal(u_k u_k^T / sqrt(p))) u_k; output: P [heads] + b.
    (B, T, d) in and out. Like the released code, and unlike the paper, the output map P is a free
    matrix, not U, and the scores are divided by sqrt(p).
    """

    cache = None  # a KVCache while generating

    def __init__(self, config):
        super().__init__()
        d, rank = config.n_embd, config.query_rank
        self.n_head = config.n_head
        self.norm = nn.LayerNorm(d, bias=config.bias)
        self.U = nn.Parameter(torch.empty(d, d))
        self.out = nn.Linear(d, d, bias=config.bias)
        self.query = None
        if rank:
            self.query = nn.ParameterList([torch.empty(d, rank), torch.empty(rank, d)])
        self.key_gate = nn.Parameter(torch.zeros(d)) if config.key_shift else None
        self.subspace = nn.Identity()  # where intervene.py hooks u

    def forward(self, z):
        # (B, T, K, p)
        rows = ops.mssa_project(z, self.norm.weight, self.norm.bias, self.U, self.n_head)
        rows = self.subspace(rows.flatten(-2)).view_as(rows)
        u = q = rows.transpose(1, 2)  # (B, K, T, p)
        if self.query is not None:  # B starts at zero: training starts from the paper's attention
            A, B = self.query
            q = u + (rows.flatten(-2) @ A @ B).view_as(rows).transpose(1, 2)
        if self.cache:
            (u,) = self.cache.extend(self, u)
        k = u if self.key_gate is None else shift_keys(u, self.key_gate)
        y = attend(q, k, u)
        return self.out(y.transpose(1, 2).flatten(-2))  # (B, T, d)


class MHSA(nn.Module):
    """GPT-2's attention: MSSA with separate query, key and value projections; (B, T, d) -> same."""

    cache = None

    def __init__(self, config):
        super().__init__()
        d = config.n_embd
        self.n_head = config.n_head
        self.norm = nn.LayerNorm(d, bias=config.bias)
        self.qkv = nn.Linear(d, 3 * d, bias=config.bias)
        self.out = nn.Linear(d, d, bias=config.bias)
        self.key_gate = nn.Parameter(torch.zeros(d)) if config.key_shift else None

    def forward(self, z):
        qkv = self.qkv(self.norm(z)).unflatten(-1, (3, self.n_head, -1))  # (B, T, 3, K, p)
        q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, K, T, p) each
        if self.cache:
            k, v = self.cache.extend(self, k, v)
        if self.key_gate is not None:
            k = shift_keys(k, self.key_gate)
        y = attend(q, k, v)
        return self.out(y.transpose(1, 2).flatten(-2))  # (B, T, d)


class TopK(nn.Module):
    """The k largest codes of each token (reference.top_k); all of them if k is 0.

    While training, `training_k` may be larger: train.py lowers it step by step.
    """

    def __init__(self, k):
        super().__init__()
        self.k = self.training_k = k

    def forward(self, a):
        k = self.training_k if self.training else self.k
        return ops.top_k(a, k) if 0 < k < a.shape[-1] else a


class ISTA(nn.Module):
    """Sparse coding of LN(z) on the overcomplete dictionary D; returns (D a, a).

    z, D a (B, T, d); a (B, T, h). With x = LN(z) and a_0 = 0, each step is
    a_t = ReLU(a_{t-1} + eta D^T (x - D a_{t-1}) - eta lam), which lowers
    lam |a|_1 + 1/2 |x - D a|^2 over a >= 0 (CRATE; the zero start and h = 4d are CRATE-LM's).
    intervene.py hooks the codes at `self.code`; what a hook returns is decoded in their place.
    """

    def __init__(self, config):
        super().__init__()
        d, h = config.n_embd, config.n_code
        self.eta, self.lam, self.steps = config.eta, config.lam, config.ista_steps
        self.norm = nn.LayerNorm(d, bias=config.bias)
        self.D = nn.Parameter(torch.empty(d, h))
        self.decoder = nn.Parameter(torch.empty(d, h)) if config.separate_decoder else None
        self.log_lam = None
        if config.learned_lam:
            self.log_lam = nn.Parameter(torch.full((h,), math.log(config.lam)))
        self.debias = config.debias
        self.top_k = TopK(config.top_k)
        self.code = nn.Identity()

    def threshold(self):
        """lam: a constant, or (h,) if learned."""
        return self.lam if self.log_lam is None else self.log_lam.exp()

    def forward(self, z):
        D, lam = self.D, self.threshold()
        decoder = D if self.decoder is None else self.decoder
        x = self.norm(z)
        if self.debias or self.top_k.k:
            a = ops.ista_codes(x, D, self.eta, lam, self.steps, self.debias)
            a = self.code(self.top_k(a))
            return a @ decoder.T, a
        y, a = ops.ista(x, D, self.eta, lam, self.steps, self.decoder)
        if not (self.code._forward_hooks or self.code._forward_pre_hooks):
            return y, a
        codes = a.clone()  # a hook may write in place, or ask for the gradient of the codes
        hooked = self.code(codes)
        if hooked is not codes or hooked.requires_grad or not torch.equal(hooked, a):
            y = y + (hooked - a) @ decoder.T  # if nothing changed, y keeps its bits
        return y, hooked


class MLP(nn.Module):
    """The twin's sparsifier: a = ReLU(W1 LN(z)), or GELU; returns (W2 a (B, T, d), a (B, T, h))."""

    def __init__(self, config):
        super().__init__()
        d, h = config.n_embd, config.n_code
        self.norm = nn.LayerNorm(d, bias=config.bias)
        self.fc = nn.Linear(d, h, bias=config.bias)
        self.proj = nn.Linear(h, d, bias=config.bias)
        self.gelu = config.activation == "gelu"
        self.top_k = TopK(config.top_k)
        self.code = nn.Identity()

    def forward(self, z):
        x = self.fc(self.norm(z))
        a = F.gelu(x, approximate="tanh") if self.gelu else F.relu(x)
        a = self.code(self.top_k(a))
        return self.proj(a), a


class Block(nn.Module):
    """One layer: z <- z + attention(z), then z <- sparsifier(z), or z + sparsifier(z) if residual.

    Returns (z (B, T, d), codes (B, T, h)).
    """

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
    """Token and position embeddings, L blocks, final LayerNorm, head tied to the embedding."""

    cache = None

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
        """Set the initial weights, as in the released code.

        N(0, 0.02); maps that write to the stream N(0, 0.02 / sqrt(2L)); D Kaiming-uniform.
        """
        writers = ("out.weight", "proj.weight", "decoder")
        for name, w in self.named_parameters():
            if name.endswith("bias"):
                w.zero_()
            elif name.endswith("query.1"):
                w.uniform_(0, 0)  # zero, but drawn: every seed keeps its weights across versions
            elif name.endswith(".D"):
                bound = math.sqrt(6 / self.config.n_embd)
                w.uniform_(-bound, bound)
            elif name.endswith(writers):
                w.normal_(0, 0.02 / math.sqrt(2 * self.config.n_layer))
            elif w.dim() > 1:  # LayerNorm weights stay 1, log_lam log(lam), key_gate 0
                w.normal_(0, 0.02)
        if self.config.unit_norm:
            for block in self.blocks:
                if isinstance(block.sparsifier, ISTA):
                    nn.utils.parametrizations.spectral_norm(block.sparsifier, "D")

    def trunk(self, ids):
        """All but the head: ids (B, T) -> (stream (B, T, d), [codes (B, T, h)] * L).

        The stream is taken after the final norm. Raises UserError if the ids, together with those
        in the KV cache, exceed the context.
        """
        begin = self.cache.length if self.cache else 0
        end = begin + ids.shape[1]
        longest = self.config.block_size
        if end > longest:
            raise UserError(f"{end} tokens exceed the model's context, block_size={longest}.")
        z = self.tokens(ids) + self.positions.weight[begin:end]
        codes = []
        for block in self.blocks:
            z, a = block(z)
            codes.append(a)
        if self.cache:
            self.cache.length = end
        return self.norm(z), codes

    def forward(self, ids, targets=None):
        """Logits (B, T, V) of ids (B, T), or with targets (B, T) the mean loss (nats per token)."""
        x, codes = self.trunk(ids)
        if targets is None:
            return F.linear(x, self.tokens.weight)
        mean_loss = loss.cross_entropy(x, self.tokens.weight, targets)
        if self.training and self.config.l1:  # evaluation always reports plain cross-entropy
            penalties = [a.float().abs().sum(-1).mean() for a in codes]
            mean_loss = mean_loss + self.config.l1 * sum(penalties) / len(penalties)
        return mean_loss

    def n_params(self):
        """Parameters by the paper's rule: positions excluded, the tied head counted once."""
        return sum(w.numel() for w in self.parameters()) - self.positions.weight.numel()

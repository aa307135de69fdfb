"""Measurements of each layer: coding rates, sparsity, lasso objective, dictionary.

CRATE's theory says that a block first pulls the stream Z towards subspaces U (attention: the coding
rate R^c(Z|U) falls), then codes it sparsely on a dictionary D (ISTA: the lasso objective falls).
The training loss asks for neither, so both must be measured; verdict.py puts the numbers into
words. Sources: CRATE (NeurIPS 2023) for the
coding rate and the layer-wise measurement, CRATE-LM (arXiv 2410.16443) for the model. Letters as in
model.py. Hooks read the stream, so it does not matter which kernels run.
"""

import statistics
from collections import defaultdict
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
import torch.nn.functional as F

from crate_mini import UserError, reference, stats
from crate_mini.console import terminal
from crate_mini.intervene import hook_codes
from crate_mini.layers import optimum
from crate_mini.model import ISTA, MSSA

# Of LN(Z^l), as in the released code, and of LN(Z^{l+1/2}).
BEFORE, AFTER = "attention input", "after attention"
LASSO_TOKENS = 512  # of the measured tokens, those whose codes are compared with the best ones


# ---- coding rate ---------------------------------------------------------------------------------


def unit_rate(u):
    """R^c (..) in nats of u (.., N, K, p), each token scaled to length 1 in each head.

    The released measurement scales in this way. Computed in float64. K = 1, p = d gives R(Z).
    """
    return reference.compression_rate(F.normalize(u.cpu().double(), dim=-1))


def bounds(N, K, p):
    """[least, largest] unit_rate of N tokens in K heads of width p.

    The least is for equal tokens, the largest for tokens spread evenly in each head.
    """
    rank = torch.tensor([1, min(N, p)], dtype=torch.float64)
    return (K / 2 * rank * torch.log1p(p / (reference.EPS2 * rank))).tolist()


def bases(attention):
    """{name: (d, K, p)} to measure rates in: U, its heads made orthonormal, the identity (K = 1).

    MHSA has no U: its value projection stands in, without bias, which is one of the roles of U.
    """
    d = attention.out.weight.shape[0]
    U = attention.U if isinstance(attention, MSSA) else attention.qkv.weight[2 * d :].T
    U = U.detach().cpu().double().unflatten(1, (attention.n_head, -1))
    Q = torch.linalg.qr(U.transpose(0, 1)).Q.transpose(0, 1)
    return {"U": U, "orthonormal U": Q, "whole": torch.eye(d, dtype=U.dtype)[:, None]}


# ---- dictionary ----------------------------------------------------------------------------------


def dictionary(sparsifier):
    """Health of the atoms, the columns of D (d, h), or of an MLP's output map.

    Returns a JSON-able dict:
    norm2: |D|_2^2.
    eta_norm2: eta |D|_2^2. Below 2 no step can raise the objective, above 2 steps may diverge; None
        without ISTA.
    coherence, mean_cosine: largest and mean |cos| of two atoms.
    welch: the least coherence that h atoms in d dimensions can have.
    frame_distance, frame_distance_unit: |D D^T - (h/d) I|_F, of D and of D with unit atoms.
    """
    is_ista = isinstance(sparsifier, ISTA)
    D = (sparsifier.D if is_ista else sparsifier.proj.weight).detach().cpu().double()
    d, h = D.shape
    unit = F.normalize(D, dim=0)
    norm2 = torch.linalg.matrix_norm(D, 2).item() ** 2
    cosines = (unit.T @ unit).abs().fill_diagonal_(0)
    return {
        "atoms": "D" if is_ista else "proj",
        "norm2": norm2,
        "eta_norm2": sparsifier.eta * norm2 if is_ista else None,
        "coherence": cosines.max().item(),
        "mean_cosine": cosines.sum().item() / max(1, h * (h - 1)),
        "welch": ((h - d) / (d * max(1, h - 1))) ** 0.5,
        "frame_distance": _frame_distance(D),
        "frame_distance_unit": _frame_distance(unit),
    }


def _frame_distance(D):
    """|D D^T - (h/d) I|_F: 0 if the atoms cover all directions evenly."""
    d, h = D.shape
    return torch.linalg.matrix_norm(D @ D.T - h / d * torch.eye(d)).item()


# ---- one layer -----------------------------------------------------------------------------------


class Probe:
    """Measures one block in the passes made while it is `attached`; `report` gives the numbers.

    chosen: numbers of the tokens, counted over all passes, whose codes `find_optimum` compares with
    the best possible ones. documents: a list of the document of each window of all passes.
    """

    def __init__(self, number, block, chosen, documents):
        self.number = number
        self.block = block
        self.bases = bases(block.attention)
        # {site: {name of the basis: [rate of each window]}}
        self.rates = {BEFORE: defaultdict(list), AFTER: defaultdict(list)}
        self.active = 0  # (h,): tokens on which each code was above 0
        self.l0 = []  # codes above 0 of each token
        self.objective = 0  # (steps + 1,): sums over tokens
        self.residual_energy = 0  # sum |LN(z) - D a|^2 of the codes in use
        self.input_energy = 0  # sum |LN(z)|^2
        self.chosen = chosen
        self.documents = documents
        self.seen = 0  # tokens
        self.x = None  # LN(z) (n, d) of the pass that is under way
        self.kept = []  # (LN(z), codes) of the chosen tokens
        self.optimum = None

    @contextmanager
    def attached(self, model):
        """In the with-block, every pass of `model`, which holds this layer, is measured."""
        attention, sparsifier = self.block.attention, self.block.sparsifier
        with hook_codes(model, self.number, self.add_codes):
            handles = [
                attention.register_forward_pre_hook(self.before_attention),
                sparsifier.register_forward_pre_hook(self.after_attention),
            ]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def before_attention(self, module, inputs):
        """Pre-hook of the attention: add the rates of its input."""
        self.add_rates(BEFORE, *inputs)

    def after_attention(self, module, inputs):
        """Pre-hook of the sparsifier: add the rates of its input and the lasso objective."""
        self.add_rates(AFTER, *inputs)
        if isinstance(module, ISTA):
            self.add_lasso(module, *inputs)

    def add_rates(self, site, z):
        """Add the rates of each window of z (B, T, d), after the attention's LayerNorm."""
        must_be_finite(z, f"the stream in layer {self.number}")
        x = self.block.attention.norm(z).cpu().double()
        for name, U in self.bases.items():
            u = torch.einsum("btd,dkp->btkp", x, U)
            self.rates[site][name] += unit_rate(u).tolist()

    def add_lasso(self, ista, z):
        """Add the objective at a = 0 and after each ISTA step on z (B, T, d), over all tokens."""
        x, D, lam = lasso_problem(ista, z)
        a = x.new_zeros(len(x), D.shape[1])
        objectives = [reference.lasso(x, a, D, lam)]
        for _ in range(ista.steps):
            a = reference.ista_step(a, x - a @ D.T, D, ista.eta, lam)
            objectives.append(reference.lasso(x, a, D, lam))
        objectives = torch.stack(objectives)
        must_be_finite(objectives, f"the lasso objective in layer {self.number}")
        self.objective += objectives.cpu().double().sum(1)
        self.x = x

    def add_codes(self, codes):
        """Count the codes (B, T, h) above 0, by neuron and by token; keep the chosen tokens."""
        codes = codes.flatten(0, -2)
        active = codes > 0
        self.active += active.sum(0).cpu()
        self.l0.append(active.sum(-1).cpu())
        if isinstance(self.block.sparsifier, ISTA):
            self.add_residual(codes.to(self.x.dtype))
        self.seen += len(codes)

    def add_residual(self, codes):
        """Add what the codes (n, h) in use, after top-k and all other changes, miss of x."""
        residual = self.x - codes @ self.block.sparsifier.D.T.to(codes.dtype)
        self.residual_energy += residual.square().sum(-1).cpu().double().sum()
        self.input_energy += self.x.square().sum(-1).cpu().double().sum()
        rows = self.chosen - self.seen
        rows = rows[(rows >= 0) & (rows < len(codes))].to(codes.device)
        self.kept.append((self.x[rows], codes[rows]))

    def find_optimum(self):
        """Compare the codes of the chosen tokens with the best possible ones, if this is ISTA."""
        ista = self.block.sparsifier
        if isinstance(ista, ISTA):
            x, codes = (torch.cat(tensors) for tensors in zip(*self.kept))
            D, lam = lasso_weights(ista, x.dtype)
            self.optimum = optimum.compare(x, codes, D, ista.eta, lam)

    def report(self):
        """All numbers of this layer, JSON-able; None for those that its kind of block lacks."""
        attention, sparsifier = self.block.attention, self.block.sparsifier
        l0 = torch.cat(self.l0).double()
        density = self.active.double() / len(l0)
        deciles = density.quantile(torch.linspace(0.1, 0.9, 9).double())
        objective = error = None
        if isinstance(sparsifier, ISTA):
            objective = (self.objective / len(l0) / len(sparsifier.D)).tolist()
            error = (self.residual_energy / self.input_energy).item()
        return {
            "layer": self.number,
            "projection": "U" if isinstance(attention, MSSA) else "value",
            "rate": {site: _mean_and_std(rates) for site, rates in self.rates.items()},
            "windows": len(self.rates[BEFORE]["U"]),
            "windows_compressed": _windows_that_fall(self.rates),
            "change": _changes(self.rates, self.documents),
            "documents": len(set(self.documents)),
            "neurons": len(density),
            "density": density.mean().item(),
            "density_deciles": deciles.tolist(),
            "density_by_neuron": [round(share, 6) for share in density.tolist()],
            "dead": int((density == 0).sum()),
            "l0": {"mean": l0.mean().item(), "std": l0.std(correction=0).item()},
            "lasso": objective,
            "reconstruction_error": error,
            "optimum": self.optimum,
            "dictionary": dictionary(sparsifier),
        }


def must_be_finite(values, name):
    """Raise UserError if a tensor of a measured model holds NaN or infinity."""
    if not values.isfinite().all():
        raise UserError(
            f"{name} is not finite, so the weights are useless; take an earlier checkpoint."
        )


def lasso_problem(ista, z):
    """(x (n, d), D, lam) of the lasso that an ISTA block lowers on z (.., d); float32 at least."""
    x = ista.norm(z).flatten(0, -2)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x, *lasso_weights(ista, x.dtype)


def lasso_weights(ista, dtype):
    """(D (d, h), lam float or (h,)) of an ISTA block in a dtype."""
    lam = ista.threshold()
    if isinstance(lam, torch.Tensor):
        lam = lam.to(dtype)
    return ista.D.to(dtype), lam


def _mean_and_std(rates):
    """{name: mean and standard deviation over the windows} of {name: rates of the windows}."""
    summary = {}
    for name, values in rates.items():
        summary[name] = {"mean": statistics.fmean(values), "std": statistics.pstdev(values)}
    return summary


def _windows_that_fall(rates):
    """{name of the basis: windows in which attention lowered the rate}."""
    counts = {}
    for name, before in rates[BEFORE].items():
        falls = [low < high for low, high in zip(rates[AFTER][name], before)]
        counts[name] = sum(falls)
    return counts


def _changes(rates, documents):
    """{name of the basis: {"mean", "ci95"}} of what attention adds to the rate of a window.

    95 % interval over other documents, None for one; documents: that of each window.
    """
    numbers = np.unique(documents, return_inverse=True)[1]
    changes = {}
    for name, before in rates[BEFORE].items():
        change = np.array(rates[AFTER][name]) - before
        sums = np.array([np.bincount(numbers, change), np.bincount(numbers)])  # (2, D)
        values = stats.pseudo_values(_ratio, sums) if sums.shape[1] > 1 else []
        ci95 = stats.bootstrap_interval([values])
        changes[name] = {"mean": change.mean().item(), "ci95": ci95}
    return changes


def _ratio(sums):
    return sums[0] / sums[1]


# ---- all layers ----------------------------------------------------------------------------------


@torch.no_grad()
def measure_layers(model, windows, name="model", lasso_tokens=LASSO_TOKENS, eot=None):
    """[Probe.report() of each layer] of a model in eval mode, over batches of ids (B, T).

    The batches follow one another in the text, where the token `eot` ends a document; without it,
    each window counts as one. A window belongs to the document that it begins in. name: for the
    progress line. lasso_tokens: how many tokens, drawn at random but always the same ones, get the
    best possible codes. Raises UserError if the stream is not finite somewhere.
    """
    total = sum(ids.numel() for ids in windows)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    chosen = order[:lasso_tokens].sort().values
    documents = []
    blocks = enumerate(model.blocks)
    probes = [Probe(number, block, chosen, documents) for number, block in blocks]
    ended = 0  # documents
    with ExitStack() as hooks:
        for probe in probes:
            hooks.enter_context(probe.attached(model))
        for ids in terminal.track(windows, name):
            stream, _ = model.trunk(ids.to(model.tokens.weight.device))
            must_be_finite(stream, "the stream after the last layer")
            for row in ids:
                documents.append(ended)
                ended += 1 if eot is None else int((row == eot).sum())
    for probe in terminal.track(probes, "best codes"):
        probe.find_optimum()
    return [probe.report() for probe in probes]

"""Layer by layer: does a trained network compress and sparsify, as the theory that CRATE is built on says?

The theory: a block pulls the stream Z towards subspaces U (attention: the coding rate R^c(Z|U) falls), then
codes it sparsely on a dictionary D (ISTA: the lasso objective falls). The training loss asks for neither.
Sources: CRATE (NeurIPS 2023), coding rate and layer-wise measurement; CRATE-LM (arXiv 2410.16443), the model.
Letters as in model.py. Forward hooks read the stream where a residual sum leaves it, whatever kernels run.
"""

import statistics

import torch
import torch.nn.functional as F

from crate_mini import UserError, reference
from crate_mini.model import ISTA, LM, MSSA
from crate_mini.training import run_log as progress

EPS2 = (
    0.01  # eps^2 of the rate: the released measurement has 0.01 where the paper's formula has eps^2
)
SITES = (
    "attention input",
    "after attention",
)  # LN(Z^l), where that code measures, and LN(Z^{l+1/2})


def coding_rate(u, eps2=EPS2):
    """R^c, nats, of u (.., N, K, p), N tokens in K heads: sum_k 1/2 logdet(I + p/(N eps2) u_k u_k^T); (..).

    Each token's part in each head is first scaled to length 1, as the released measurement does. In float64,
    from the smaller of the two Gram matrices, which give the same. K = 1, p = d makes it R(Z), of the whole.
    """
    u = F.normalize(u.double(), dim=-1).transpose(-3, -2)  # (.., K, N, p)
    N, p = u.shape[-2:]
    gram = u.mT @ u if p < N else u @ u.mT
    identity = torch.eye(gram.shape[-1], dtype=u.dtype, device=u.device)
    return 0.5 * torch.logdet(identity + p / (N * eps2) * gram).sum(-1)


def bounds(N, K, p, eps2=EPS2):
    """[least, largest] R^c of N tokens in K heads: all tokens alike, or spread evenly over each."""
    rank = torch.tensor([1, min(N, p)], dtype=torch.float64)
    return (K / 2 * rank * torch.log1p(p / (eps2 * rank))).tolist()


def bases(attention):
    """{name: maps (d, K, p)} to measure through: U, its heads made orthonormal, and the identity (K = 1).

    MHSA has no U; its value projection, what MSSA's U is among other things, stands in (without its bias).
    """
    d = attention.out.weight.shape[0]
    U = attention.U if isinstance(attention, MSSA) else attention.qkv.weight[2 * d :].T
    U = U.detach().double().cpu().unflatten(1, (attention.n_head, -1))
    Q = torch.linalg.qr(U.transpose(0, 1)).Q.transpose(0, 1)
    return {"U": U, "orthonormal U": Q, "whole": torch.eye(d, dtype=U.dtype)[:, None]}


def dictionary(sparsifier):
    """Health of the atoms, the columns of D (d, h), or of the matrix that an MLP writes with: a dict.

    norm2 |D|_2^2; eta_norm2, null without ISTA, whose steps are sure to lower the objective up to 1 and may
    diverge above 2; coherence and mean_cosine, largest and mean |cos| of two atoms, with welch, the least
    coherence that h atoms can have; frame_distance |D D^T - (h/d) I|_F, and the same of D with unit atoms.
    """
    ista = isinstance(sparsifier, ISTA)
    D = (sparsifier.D if ista else sparsifier.proj.weight).detach().double().cpu()
    (d, h), unit, norm2 = D.shape, F.normalize(D, dim=0), torch.linalg.matrix_norm(D, 2).item() ** 2
    cosines = (unit.T @ unit).abs().fill_diagonal_(0)
    distance = [torch.linalg.matrix_norm(M @ M.T - h / d * torch.eye(d)).item() for M in (D, unit)]
    return {
        "atoms": "D" if ista else "proj",
        "norm2": norm2,
        "eta_norm2": sparsifier.eta * norm2 if ista else None,
        "coherence": cosines.max().item(),
        "mean_cosine": cosines.sum().item() / max(1, h * (h - 1)),
        "welch": ((h - d) / (d * max(1, h - 1))) ** 0.5,
        "frame_distance": distance[0],
        "frame_distance_unit": distance[1],
    }


class Probe:
    """Forward hooks on one block that sum up what passes; `report` gives its numbers, `remove` ends it."""

    def __init__(self, number, block):
        self.number, self.block, self.bases = number, block, bases(block.attention)
        self.rates = {site: {name: [] for name in self.bases} for site in SITES}
        self.active, self.l0, self.objective, self.energy = 0, [], 0, 0
        self.hooks = [
            block.attention.register_forward_pre_hook(lambda m, z: self.rate(SITES[0], *z)),
            block.sparsifier.register_forward_pre_hook(lambda m, z: self.coded(*z)),
            block.sparsifier.code.register_forward_hook(lambda m, i, a: self.codes(a)),
        ]

    def rate(self, site, z):
        """z (B, T, d) at a site: the rates of each of its B windows, behind the attention's LayerNorm."""
        if not z.isfinite().all():
            raise UserError(
                f"the stream in layer {self.number} is not finite, so the weights are of no use; "
                "take an earlier checkpoint."
            )
        x = self.block.attention.norm(z).double().cpu()
        for name, U in self.bases.items():
            self.rates[site][name] += coding_rate(torch.einsum("btd,dkp->btkp", x, U)).tolist()

    def coded(self, z):
        """z (B, T, d) after attention: its rates, and with ISTA what each step makes of the objective."""
        self.rate(SITES[1], z)
        m = self.block.sparsifier
        if not isinstance(m, ISTA):
            return
        x, D, lam = m.norm(z), m.D, m.lam if m.log_lam is None else m.log_lam.exp()
        a = x.new_zeros(*x.shape[:-1], D.shape[1])
        r, values = x, [reference.lasso(x, a, D, lam)]
        for _ in range(m.steps):
            a = reference.ista_step(a, r, D, m.eta, lam)
            r = x - a @ D.T
            values.append(reference.lasso(x, a, D, lam))
        self.objective += torch.stack(values).flatten(1).cpu().double().sum(1)
        self.energy += torch.stack([t.square().sum(-1).cpu().double().sum() for t in (r, x)])

    def codes(self, a):
        """a (B, T, h), the codes as whoever looks at neurons sees them: which are above 0."""
        on = (a > 0).flatten(0, -2)
        self.active += on.sum(0).cpu()
        self.l0.append(on.sum(-1).cpu())

    def remove(self):
        for hook in self.hooks:
            hook.remove()

    def report(self):
        """All numbers of this layer, JSON-able; None where the block has no such thing (an MLP no lasso)."""
        l0, m = torch.cat(self.l0).double(), self.block.sparsifier
        mssa = isinstance(self.block.attention, MSSA)
        density, ista = self.active.double() / len(l0), isinstance(m, ISTA)
        rates = {
            site: {
                name: {"mean": statistics.fmean(v), "std": statistics.pstdev(v)}
                for name, v in found.items()
            }
            for site, found in self.rates.items()
        }
        return {
            "layer": self.number,
            "projection": "U" if mssa else "value",
            "rate": rates,
            "neurons": len(density),
            "density": density.mean().item(),
            "density_deciles": density.quantile(torch.linspace(0.1, 0.9, 9).double()).tolist(),
            "density_by_neuron": [round(p, 6) for p in density.tolist()],
            "dead": int((density == 0).sum()),
            "l0": {"mean": l0.mean().item(), "std": l0.std(correction=0).item()},
            "lasso": (self.objective / len(l0) / len(m.D)).tolist() if ista else None,
            "reconstruction_error": (self.energy[0] / self.energy[1]).item() if ista else None,
            "dictionary": dictionary(m),
        }


@torch.no_grad()
def layers(model, windows, name="model"):
    """[numbers of each layer] of a model in eval mode, over batches of ids (B, T); see Probe.report."""
    probes = [Probe(i, block) for i, block in enumerate(model.blocks)]
    for ids in progress.track(windows, name):
        model.trunk(ids.to(model.tokens.weight.device))
    for probe in probes:
        probe.remove()
    return [probe.report() for probe in probes]


def untrained(config, seed):
    """The LM of this config as train.py starts it from this seed: the control beside a trained one."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return LM(config).eval()

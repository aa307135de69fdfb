"""Sparse autoencoders of a layer's codes: what one is, how it is spliced into a model, its files.

    f = act((x - b) E + c)      x' = f W + b      x (N, h) codes, f (N, width) features, rows of W of norm 1

act is ReLU, trained with an L1 penalty (Bricken et al. 2023, as CRATE-LM used it on GPT-2), or ReLU of the k
largest pre-activations (TopK, Gao et al. 2024). Training and evaluation: sae_fit.py. To score features as if
they were neurons, give `encode` the codes.
"""

import json
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from crate_mini import UserError, atomic_write, cli
from crate_mini.training import checkpoint
from crate_mini.training.foreign_weights import fingerprint


class SAE(nn.Module):
    """h codes -> width features -> h codes; at most k features a token or, without k, what l1 leaves."""

    def __init__(self, h, width, layer=None, k=None, l1=0.0, seed=0):
        super().__init__()
        self.layer, self.k, self.l1 = layer, k, l1
        rows = torch.randn(width, h, generator=torch.Generator().manual_seed(seed))
        self.W = nn.Parameter(F.normalize(rows, dim=1))
        self.E = nn.Parameter(self.W.detach().T.clone())  # starts as the decoder's transpose
        self.b, self.c = nn.Parameter(torch.zeros(h)), nn.Parameter(torch.zeros(width))

    @property
    def name(self):
        """What was asked for: x4-l1-8e-05, x16-k32."""
        width, h = self.W.shape
        return f"x{width / h:g}-" + (f"k{self.k}" if self.k else f"l1-{self.l1:g}")

    def encode(self, x):
        """Features (.., width), none negative, of codes (.., h)."""
        f = F.relu((x - self.b) @ self.E + self.c)
        if self.k:
            top = f.topk(self.k, dim=-1)
            f = torch.zeros_like(f).scatter(-1, top.indices, top.values)
        return f

    def decode(self, f):
        """Codes (.., h) of features (.., width)."""
        return f @ self.W + self.b

    def loss(self, x):
        """(CRATE-LM's loss, features): the mean of (x - x')^2 / |x| over codes, plus l1 |f|_1, over tokens.

        Because of the division both terms grow as x does: an l1 means the same for codes of any size.
        """
        f, norm = self.encode(x), x.norm(dim=-1)
        error = (x - self.decode(f)).square().mean(-1) / norm.clamp_min(
            0.1 * norm.mean()
        )  # |x| may be 0
        return error.mean() + self.l1 * f.sum(-1).mean(), f


@contextmanager
def replaced(model, layer, function):
    """In the block, a layer's codes are function(codes (N, h) float32); yields an object that counts `.hits`.

    The model is itself again afterwards, whatever happens. Raises UserError for a layer that is not there.
    """
    if not 0 <= layer < len(model.blocks):
        raise UserError(
            f"layer {layer} is not there; the model's layers are 0 to {len(model.blocks) - 1}."
        )
    seen = SimpleNamespace(hits=0)

    def hook(module, inputs, a):
        seen.hits += 1
        x = a.flatten(0, -2).float()
        with torch.autocast(a.device.type, enabled=False):
            y = function(x)
        return None if y is x else y.to(a.dtype).view_as(a)  # None: as it was, to the bit

    handle = model.blocks[layer].sparsifier.code.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def splice(model, layer, sae, error=False, edit=None):
    """In the block, the model computes with the SAE's reconstruction of a layer's codes, as by `replaced`.

    edit: a function of the features (N, width) before they are decoded (steering). error: add what the SAE
    misses, x - x', so that nothing changes without an edit. Raises UserError when SAE and layer do not fit.
    """
    h = sae.W.shape[1]
    if h != model.config.n_code or sae.layer not in (None, layer):
        raise UserError(
            f"the autoencoder is for the {h} codes of layer {sae.layer}, not for the "
            f"{model.config.n_code} of layer {layer}; train one with --layer {layer}."
        )

    def function(x):
        if error and edit is None:
            return x
        f = sae.encode(x)
        y = sae.decode(f if edit is None else edit(f))
        return x + (y - sae.decode(f)) if error else y

    return replaced(model, layer, function)


def save(folder, sae, model, facts):
    """Write FOLDER/sae-L{layer}-{name}.pt, then .json beside it with `facts`. Returns what the JSON holds."""
    path = Path(folder, f"sae-L{sae.layer}-{sae.name}.pt")
    path.parent.mkdir(parents=True, exist_ok=True)
    width, h = sae.W.shape
    shape = {"name": sae.name, "layer": sae.layer, "h": h, "width": width, "k": sae.k, "l1": sae.l1}
    weights = {name: w.cpu() for name, w in sae.state_dict().items()}
    facts = {
        "schema": 1,
        **shape,
        **facts,
        "model": fingerprint(model),
        "sha256": checkpoint.write_tensors(path, weights),
    }
    with atomic_write(path.with_suffix(".json")) as file:
        file.write(json.dumps(facts, indent=1, allow_nan=False).encode() + b"\n")
    return facts


def load(path, model):
    """(SAE on the model's device, its facts) of the .json that `save` wrote, or of the .pt beside it.

    Raises UserError when a file is missing or damaged, or when the SAE was trained on other weights.
    """
    path = Path(str(path).removesuffix(".pt").removesuffix(".json") + ".json")
    facts = cli.read_json(path, expected="what `python interpret.py sae CKPT` writes")
    try:
        sae = SAE(facts["h"], facts["width"], facts["layer"], facts["k"], facts["l1"])
        sae.load_state_dict(checkpoint.read_tensors(path.with_suffix(".pt"), facts["sha256"]))
        belongs = facts["model"] == fingerprint(model)
    except OSError as error:
        raise UserError(
            f"Cannot read {error.filename}: {error.strerror}; train it again."
        ) from None
    except (KeyError, TypeError, ValueError, RuntimeError):
        raise UserError(
            f"{path} is damaged or holds no sparse autoencoder; train it again with "
            "`python interpret.py sae CKPT`."
        ) from None
    if not belongs:
        raise UserError(
            f"{path} was trained on another checkpoint than this one; train one here with "
            f"`python interpret.py sae CKPT --layer {facts['layer']}`."
        )
    return sae.requires_grad_(False).to(next(model.parameters()).device), facts


def beside(folder, facts):
    """Facts of all SAEs in a folder for the same layer, model and held-out text as these, by their L0."""
    found = []
    for path in sorted(Path(folder).glob(f"sae-L{facts['layer']}-*.json")):
        with suppress(UserError, KeyError, TypeError):
            other = cli.read_json(path)
            if all(other[key] == facts[key] for key in ("schema", "model", "corpus", "tokens")):
                found.append(other)
    return sorted(found, key=lambda other: other["held_out"]["L0"])

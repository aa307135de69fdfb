"""A sparse autoencoder of a layer's codes, its splice into a model, and its files.

    f = act((x - b) E + c)      x' = f W + b

x (N, h) are codes, f (N, width) features; the rows of W have norm 1. act is ReLU, trained with an
L1 penalty (Bricken et al. 2023, used by CRATE-LM on GPT-2), or ReLU of the k largest
pre-activations (TopK, Gao et al. 2024). `encode` turns codes into features that can be scored like
neurons.
"""

from contextlib import suppress
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from crate_mini import UserError
from crate_mini.console import results
from crate_mini.intervene import hook_codes
from crate_mini.training import checkpoint
from crate_mini.training.import_weights import fingerprint

SMALLEST_NORM = 0.1  # of a token's codes in the loss, as a share of the mean norm
SAME_EVALUATION = ("schema", "model", "corpus", "tokens")  # facts that make two results comparable


class SAE(nn.Module):
    """h codes -> width features -> h codes.

    With k, at most k features fire on a token; without it, the L1 weight l1 decides how many.
    layer: the number of the layer it encodes, or None for any.
    """

    def __init__(self, h, width, layer=None, k=None, l1=0.0, seed=0):
        super().__init__()
        self.layer = layer
        self.k = k
        self.l1 = l1
        rows = torch.randn(width, h, generator=torch.Generator().manual_seed(seed))
        self.W = nn.Parameter(F.normalize(rows, dim=1))
        self.E = nn.Parameter(self.W.detach().T.clone())  # starts as the transpose of the decoder
        self.b = nn.Parameter(torch.zeros(h))
        self.c = nn.Parameter(torch.zeros(width))

    @property
    def name(self):
        """Expansion and sparsity: x4-l1-8e-05, x16-k32."""
        width, h = self.W.shape
        sparsity = f"k{self.k}" if self.k else f"l1-{self.l1:g}"
        return f"x{width / h:g}-{sparsity}"

    def encode(self, x):
        """Non-negative features (..., width) of codes (..., h)."""
        f = F.relu((x - self.b) @ self.E + self.c)
        if self.k:
            top = f.topk(self.k, dim=-1)
            f = torch.zeros_like(f).scatter(-1, top.indices, top.values)
        return f

    def decode(self, f):
        """Codes (..., h) of features (..., width)."""
        return f @ self.W + self.b

    def loss(self, x):
        """(CRATE-LM's loss, features (N, width)) of codes x (N, h).

        The loss is the mean over tokens of mean((x - x')^2) / |x| + l1 |f|_1. Because of the
        division both terms grow like x, so an l1 means the same for codes of any scale.
        """
        f = self.encode(x)
        norms = x.norm(dim=-1)
        norms = norms.clamp_min(SMALLEST_NORM * norms.mean())  # all codes of a token may be 0
        error = (x - self.decode(f)).square().mean(-1) / norms
        return error.mean() + self.l1 * f.sum(-1).mean(), f


# ---- in a model ----------------------------------------------------------------------------------


def replace_codes(model, layer, function):
    """In the block, a layer's codes become function(codes), a map of (N, h) float32.

    The result takes the dtype of the codes. Where the function returns its argument, the codes stay
    as they are, to the bit. Yields and raises what `hook_codes` does.
    """

    def new_codes(codes):
        x = codes.flatten(0, -2).float()
        y = function(x)
        if y is x:
            return None
        return y.to(codes.dtype).view_as(codes)

    return hook_codes(model, layer, new_codes)


def splice(model, layer, sae, error=False, edit=None):
    """In the block, the model computes with the SAE's reconstruction x' of a layer's codes x.

    edit: a function of the features (N, width), applied before they are decoded, to steer them.
    error: add the reconstruction error x - x', so that nothing changes without an edit. Raises
    UserError if the SAE does not fit the layer.
    """
    h = sae.W.shape[1]
    if h != model.config.n_code or sae.layer not in (None, layer):
        raise UserError(
            f"the autoencoder is for the {h} codes of layer {sae.layer}, not for the "
            f"{model.config.n_code} of layer {layer}; train one with --layer {layer}."
        )

    def reconstruct(x):
        if error and edit is None:
            return x
        f = sae.encode(x)
        y = sae.decode(f if edit is None else edit(f))
        return x + (y - sae.decode(f)) if error else y

    return replace_codes(model, layer, reconstruct)


# ---- files ---------------------------------------------------------------------------------------


def save(folder, sae, model, facts):
    """Write FOLDER/sae-L{layer}-{name}.pt and .json; returns the content of the JSON.

    The JSON holds the SAE's shape, the given facts, and hashes of the model and of the .pt file.
    """
    path = Path(folder, f"sae-L{sae.layer}-{sae.name}.pt")
    path.parent.mkdir(parents=True, exist_ok=True)
    width, h = sae.W.shape
    weights = {name: tensor.cpu() for name, tensor in sae.state_dict().items()}
    content = {
        "schema": 1,
        "name": sae.name,
        "layer": sae.layer,
        "h": h,
        "width": width,
        "k": sae.k,
        "l1": sae.l1,
        **facts,
        "model": fingerprint(model),
        "sha256": checkpoint.write_tensors(path, weights),
    }
    results.write_json(path.with_suffix(".json"), content)
    return content


def load(path, model):
    """(SAE on the model's device, content of its JSON).

    path: the .json or the .pt that `save` wrote. Raises UserError if a file is missing or damaged,
    or if the SAE was trained on another model.
    """
    path = Path(str(path).removesuffix(".pt").removesuffix(".json") + ".json")
    facts = results.read_json(path, expected="a file that `python interpret.py sae CKPT` writes")
    damaged = UserError(
        f"{path} is damaged or does not describe a sparse autoencoder; train it again with "
        "`python interpret.py sae CKPT`."
    )
    if not _describes_an_sae(facts):
        raise damaged
    if facts["model"] != fingerprint(model):
        raise UserError(
            f"{path} was trained on another checkpoint; train one on this checkpoint with "
            f"`python interpret.py sae CKPT --layer {facts['layer']}`."
        )
    try:
        weights = checkpoint.read_tensors(path.with_name(f"{path.stem}.pt"), facts["sha256"])
        if weights["W"].shape != (facts["width"], facts["h"]):
            raise ValueError("other sizes")
        sae = SAE(facts["h"], facts["width"], facts["layer"], facts["k"], facts["l1"])
        sae.load_state_dict(weights)
    except OSError as error:
        raise UserError(
            f"Cannot read {error.filename}: {error.strerror}; train the autoencoder again with "
            "`python interpret.py sae CKPT`."
        ) from None
    except UserError:
        raise UserError(
            f"{path.with_name(f'{path.stem}.pt')} is damaged, its sha256 does not fit; train the "
            "autoencoder again with `python interpret.py sae CKPT`."
        ) from None
    except Exception:  # a pickle of anything: it cannot run code, but fails in many ways
        raise damaged from None
    if not all(w.isfinite().all() for w in sae.parameters()):
        raise damaged
    device = next(model.parameters()).device
    return sae.requires_grad_(False).to(device), facts


def _describes_an_sae(facts):
    """Whether the facts have the right types and bounds."""
    values = [facts.get(name) for name in ("h", "width", "layer", "k", "l1", "model", "sha256")]
    if not all(type(value) in (int, float, str, type(None)) for value in values):
        return False
    h, width, layer, k, l1, model, sha256 = values
    counts = type(h) is type(width) is type(layer) is int and h > 0 and width > 0 <= layer
    sparsity = k is None or (type(k) is int and 0 < k <= width)
    return counts and sparsity and type(l1) in (int, float) and type(model) is type(sha256) is str


def comparable(folder, facts):
    """The JSON of every SAE in a folder that can be compared with `facts`, sorted by L0.

    These are the SAEs of the same layer and model, evaluated on the same held-out tokens; files
    that cannot be read are skipped.
    """
    saes = []
    for path in sorted(Path(folder).glob(f"sae-L{facts['layer']}-*.json")):
        with suppress(UserError, KeyError, TypeError):
            other = results.read_json(path)
            if {"L0", "loss"} <= set(other["held_out"]) and all(
                other[key] == facts[key] for key in SAME_EVALUATION
            ):
                saes.append(other)
    return sorted(saes, key=lambda sae: sae["held_out"]["L0"])

"""What steering did to the next token: by running the model again, and, where that is right, from weights."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from crate_mini import UserError
from crate_mini.intervene import atoms, steer


@torch.no_grad()
def stream(model, idx):
    """(stream (B, T, d) as it enters the final norm, [codes (B, T, h)] * L) of ids (B, T)."""
    seen = []
    handle = model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        codes = model.trunk(idx)[1]
    finally:
        handle.remove()
    return seen[0], codes


@torch.no_grad()
def direct_effect(model, z, layer, change):
    """Change of logits (.., V) that a change of a layer's codes (.., h) makes by its atoms alone.

    Direct logit attribution: atoms times tied head, through the final norm with the scale that it has for the
    unsteered stream z (.., d). In the last layer exact but for that scale. Before it, without a residual
    around the sparsifier, nothing reaches the head as it was written; how far this still tells what a run
    does is measured by dose.attribution.
    """
    written = change @ atoms(model, layer).T
    scale = (z.var(-1, unbiased=False, keepdim=True) + model.norm.eps).rsqrt()
    normed = (written - written.mean(-1, keepdim=True)) * scale * model.norm.weight
    return F.linear(normed, model.tokens.weight)


def finite(logits):
    """Logits of a steered run as they are; raises UserError if it turned so far that some are no numbers."""
    if not logits.isfinite().all():
        raise UserError(
            "turned this far the model's logits are not finite; give a smaller value, like 2x."
        )
    return logits


@dataclass
class Next:
    """Log-probabilities (V,) of the token after a prompt, plain and steered; float64.

    logits: their change (V,), causal: the model was run again. direct: the same from weights, or None.
    """

    before: torch.Tensor
    after: torch.Tensor
    logits: torch.Tensor
    direct: torch.Tensor | None

    def most(self, k, sign):
        """Ids of the k tokens whose probability rose (sign 1) or fell (-1) most."""
        change = self.after.exp() - self.before.exp()
        return (sign * change).topk(min(k, len(change))).indices.tolist()

    @property
    def kl(self):
        """KL(before || after) in nats: how far the whole distribution moved."""
        return F.kl_div(self.after, self.before, log_target=True, reduction="sum").item()


@torch.no_grad()
def next_token(model, ids, interventions):
    """The Next of a prompt (a list of ids); `direct` if all interventions are in the last layer."""
    idx, last = torch.tensor([ids], device=model.tokens.weight.device), model.config.n_layer - 1

    def passed():
        z, codes = stream(model, idx)
        return (
            z[0, -1],
            codes[last][0, -1],
            F.linear(model.norm(z[0, -1]), model.tokens.weight).double(),
        )

    z, a, plain = passed()
    with steer(model, interventions):
        _, turned_a, turned = passed()
    finite(turned)
    direct = None
    if all(i.layer == last for i in interventions):
        direct = direct_effect(model, z, last, turned_a - a)
    return Next(plain.log_softmax(-1), turned.log_softmax(-1), turned - plain, direct)

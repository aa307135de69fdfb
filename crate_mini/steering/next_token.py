"""The next token after a prompt, unsteered and steered, by running the model or from weights."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from crate_mini import UserError
from crate_mini.intervene import steer
from crate_mini.layers.measure import must_be_finite
from crate_mini.neurons.relatives import atoms


@torch.no_grad()
def stream(model, ids):
    """(stream (B, T, d) that enters the final norm, [codes (B, T, h)] * L) of ids (B, T)."""
    inputs = []
    handle = model.norm.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    try:
        _, codes = model.trunk(ids)
    finally:
        handle.remove()
    return inputs[0], codes


@torch.no_grad()
def direct_effect(model, z, layer, change):
    """Direct effect on the logits (.., V) of a change of a layer's codes (.., h).

    Direct logit attribution: the atoms times the tied head, through the final norm with its scale
    for the unsteered stream z (.., d). In the last layer this is exact except for that scale. In
    earlier layers nothing reaches the head unchanged, because there is no residual around the
    sparsifier; dose_response.attribution measures how well it predicts there.
    """
    written = change @ atoms(model, layer).T
    scale = (z.var(-1, unbiased=False, keepdim=True) + model.norm.eps).rsqrt()
    normed = (written - written.mean(-1, keepdim=True)) * scale * model.norm.weight
    return F.linear(normed, model.tokens.weight)


def check_codes(codes):
    """Raise UserError if the unsteered model's own codes [(.., h)] * L are not finite."""
    for layer, a in enumerate(codes):
        must_be_finite(a, f"a code of layer {layer}")


def finite(logits):
    """The logits of a steered run. Raises UserError if any is not finite."""
    if not logits.isfinite().all():
        raise UserError(
            "steered this far, the model's logits are not finite; give a smaller value, like 2x."
        )
    return logits


@dataclass
class Next:
    """Log-probabilities (V,), float64, of the token after a prompt: before and after steering.

    logits: the change (V,) of the logits between two runs of the model. direct: the same from the
    weights, or None.
    """

    before: torch.Tensor
    after: torch.Tensor
    logits: torch.Tensor
    direct: torch.Tensor | None

    def most(self, k, sign):
        """Ids of the k tokens that rose (sign 1) or fell (-1) most in probability."""
        change = self.after.exp() - self.before.exp()
        return (sign * change).topk(min(k, len(change))).indices.tolist()

    @property
    def kl(self):
        """KL(before || after) in nats: how far the whole distribution moved."""
        return F.kl_div(self.after, self.before, log_target=True, reduction="sum").item()


@torch.no_grad()
def next_token(model, ids, interventions):
    """The Next of a prompt (a list of ids); direct is None unless all act on the last layer."""
    last = model.config.n_layer - 1
    ids = torch.tensor([ids], device=model.tokens.weight.device)

    def run(steered):
        z, codes = stream(model, ids)
        if not steered:
            check_codes(codes)
        logits = F.linear(model.norm(z[0, -1]), model.tokens.weight).cpu().double()
        return z[0, -1], codes[last][0, -1], logits

    z, a, logits = run(steered=False)
    must_be_finite(logits, "a logit of the unsteered model")
    with steer(model, interventions):
        _, steered_a, steered_logits = run(steered=True)
    finite(steered_logits)
    direct = None
    if all(intervention.layer == last for intervention in interventions):
        direct = direct_effect(model, z, last, steered_a - a)
    return Next(
        logits.log_softmax(-1),
        steered_logits.log_softmax(-1),
        steered_logits - logits,
        direct,
    )

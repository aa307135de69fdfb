"""Effects: what raising a neuron does to the next token."""

import torch
import torch.nn.functional as F

from crate_mini.intervene import hook_codes
from crate_mini.neurons.metrics import rounded


@torch.no_grad()
def next_token_effects(
    model, layer, neurons, levels, contexts, vocab, encode=None, directions=None, most=10, batch=256
):
    """Raise each of n neurons alone and measure the next token: a causal effect in every context.

    contexts (C, T + 1): the last column is the token that follows. At the last of the T tokens a
    neuron below its level (n,), usually its observed maximum, is set to that level. For a feature,
    the codes are moved by what its row of directions (width, h) adds to them; encode: codes ->
    features. Ids from `vocab` on only pad the model's vocabulary.

    Returns a dict per neuron: "clamp", the level; "positions", C; "raised" and "lowered", up to
    `most` [id, mean change of log-probability]; "kl", KL(before || after); "loss", the change of
    loss on the token that follows. All are means over contexts, in nats.
    """
    device = model.tokens.weight.device
    read = contexts[:, :-1].to(device)  # (C, T)
    following = contexts[:, -1].to(device)  # (C,)
    C = len(contexts)
    before = _next_log_probs(model, read)  # (C, V)
    size = max(1, batch // C)  # neurons in one pass
    blocks = zip(torch.as_tensor(neurons).split(size), torch.as_tensor(levels).split(size))
    effects = []
    for js, targets in blocks:
        raise_neurons = _raiser(
            js.to(device).repeat_interleave(C),
            targets.to(device, torch.float32).repeat_interleave(C),
            encode,
            directions,
        )
        with hook_codes(model, layer, raise_neurons):
            after = _next_log_probs(model, read.repeat(len(js), 1))
        change = after.view(len(js), C, -1) - before  # (n, C, V)
        mean_change = change[..., :vocab].mean(1)
        kl = -(before.exp() * change).sum(-1).mean(1)
        loss = -change[:, torch.arange(C), following].mean(1)
        for i, target in enumerate(targets.tolist()):
            effects.append(
                {
                    "clamp": rounded(target),
                    "positions": C,
                    "raised": largest_changes(mean_change[i], 1, most),
                    "lowered": largest_changes(mean_change[i], -1, most),
                    "kl": rounded(max(kl[i].item(), 0)),
                    "loss": rounded(loss[i].item()),
                }
            )
    return effects


def _next_log_probs(model, ids):
    """(B, V): log-probabilities of the token after each row of ids (B, T)."""
    stream = model.trunk(ids)[0][:, -1]
    return F.log_softmax(F.linear(stream, model.tokens.weight).float(), -1)


def _raiser(neurons, targets, encode, directions):
    """A function of codes (B, T, h) for hook_codes: at the last token, neurons[b] >= targets[b]."""
    rows = torch.arange(len(neurons), device=neurons.device)

    def raise_neurons(codes):
        codes = codes.clone()
        last = codes[:, -1]  # (B, h), a view
        if directions is None:
            last[rows, neurons] = torch.maximum(last[rows, neurons], targets)
        else:
            features = encode(last.float())[rows, neurons]
            missing = (targets - features).clamp(min=0)
            last += missing[:, None] * directions[neurons]
        return codes

    return raise_neurons


def largest_changes(change, sign, most):
    """Up to `most` [id, change] of the largest changes (V,) of this sign, the largest first."""
    values, ids = (sign * change).topk(min(most, len(change)))
    rows = []
    for value, id in zip(values.tolist(), ids.tolist()):
        if value > 0:
            rows.append([id, rounded(sign * value, 3)])
    return rows

"""Set one neuron of a real model by a hook, and measure what it does to the next token.

A neuron is one coordinate of a layer's codes a (B, T, h). The model calls the module
model.blocks[layer].sparsifier.code on its codes, and goes on with what a forward hook returns:

    z --> attention --> ISTA: a (B, T, h) --> code --> D a --> next layer
                                                |
                                         hook(module, inputs, output)
                                         returns output with a[..., neuron] = value

    handle = module.register_forward_hook(hook)          handle.remove() takes it away

The hook must be gone afterwards, even if the model raises an exception; otherwise every later use
of the model is steered in silence. How far the prediction moved, per token:

    KL(before | after) = sum_v p_v ln(p_v / q_v),      p, q the softmax of the logits
"""

import torch

from crate_mini.course.checking import Wrong, cases
from crate_mini.model import LM, preset

TITLE = "Steer a neuron by a hook"
STARS = 2
MINUTES = 30
TEACHES = "interventions that leave no trace, and what they change"
HINTS = (
    "Copy before you write: output = output.clone().",
    "try: return model(ids)  finally: handle.remove()",
    "log_softmax(-1) of both, then (log_p.exp() * (log_p - log_q)).sum(-1).",
)

# ---- solution ------------------------------------------------------------------------------------


def set_neuron(model, ids, layer, neuron, value):
    """Logits (B, T, V) of model(ids) with one neuron set to value at every token; ids (B, T)."""

    def hook(module, inputs, output):
        output = output.clone()
        output[..., neuron] = value
        return output

    handle = model.blocks[layer].sparsifier.code.register_forward_hook(hook)
    try:
        return model(ids)
    finally:
        handle.remove()


def kl(before, after):
    """KL(before | after) (B, T) in nats, of logits (B, T, V)."""
    log_p, log_q = before.log_softmax(-1), after.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


# ---- check ---------------------------------------------------------------------------------------


def unsteered(model, ids, layer, neuron, value):
    """the logits are those without steering: does the hook return the new codes?"""
    return model(ids)


def other_layer(model, ids, layer, neuron, value):
    """another layer than `layer` is steered"""
    return set_neuron(model, ids, 1 - layer, neuron, value)


def added(model, ids, layer, neuron, value):
    """the value is added to the neuron's own; set it"""
    return _edited(model, ids, layer, lambda codes: codes[..., neuron].add_(value))


def last_token_only(model, ids, layer, neuron, value):
    """only the last token is steered; set the neuron at every token"""
    return _edited(model, ids, layer, lambda codes: codes[:, -1, neuron].fill_(value))


def _edited(model, ids, layer, edit):
    def hook(module, inputs, output):
        edit(output)

    handle = model.blocks[layer].sparsifier.code.register_forward_hook(hook)
    logits = model(ids)
    handle.remove()
    return logits


def reversed_kl(before, after):
    """this is KL(after | before): the expectation is under the model before steering"""
    return kl(after, before)


def kl_in_bits(before, after):
    """this is in bits; use the natural logarithm"""
    return kl(before, after) / torch.log(torch.tensor(2.0, dtype=torch.float64))


def kl_of_logits(before, after):
    """the logits are not normalised; take log_softmax first"""
    return (before.softmax(-1) * (before - after)).sum(-1)


MISTAKES = {
    set_neuron: [unsteered, other_layer, added, last_token_only],
    kl: [reversed_kl, kl_in_bits, kl_of_logits],
}


def tiny_model(case):
    """A CRATE of two layers in float64, whose predictions vary."""
    torch.manual_seed(case.integer(0, 99))
    model = LM(preset("2L", vocab_size=23, block_size=8, n_embd=8, n_head=2)).double().eval()
    model.tokens.weight.data *= 8
    return model.requires_grad_(False)


def must_be_unhooked(model, when):
    if any(block.sparsifier.code._forward_hooks for block in model.blocks):
        raise Wrong(f"set_neuron: the hook stays on the model {when}; remove it in `finally`.")


def check(learner):
    for case in cases(6):
        model = tiny_model(case)
        ids = torch.stack([torch.randperm(23, generator=case.generator)[:8] for _ in range(2)])
        layer, neuron = case.integer(0, 1), case.integer(0, 31)
        logits = learner.agree(set_neuron, model, ids, layer, neuron, case.uniform(1, 5))
        must_be_unhooked(model, "after the call")
        try:
            learner.function(set_neuron)(model, torch.zeros(1, 9, dtype=torch.long), 0, 0, 1.0)
        except Exception:  # nine tokens do not fit into the model's context of eight
            must_be_unhooked(model, "when the model raises an exception")
        learner.agree(kl, model(ids), logits)

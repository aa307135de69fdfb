"""Models so small that a test costs milliseconds."""

import torch

from crate_mini import model

T = 12  # context
V = 37  # vocabulary
H = 64  # codes of a layer


VARIANTS = {  # name: (kind, changes); every slot and every variant of attention and codes
    **{kind: (kind, {}) for kind in model.KINDS},
    "crate, key shift": ("crate", {"key_shift": True}),
    "gpt2, key shift": ("gpt2", {"key_shift": True}),
    "crate, top-k, debiased": ("crate", {"top_k": 5, "debias": True}),
    "gpt2, top-k": ("gpt2", {"top_k": 5}),
}


def tiny(name, seed=0, **changes):
    """A two-layer LM, d = 16, in eval mode, with predictions that vary by position.

    name: of VARIANTS; changes: further fields of its Config.
    """
    kind, variant = VARIANTS[name]
    if kind == "crate+":
        variant = {"query_rank": 3, **variant}
    sizes = dict(vocab_size=V, block_size=T, n_embd=16, n_head=2)
    torch.manual_seed(seed)
    lm = model.LM(model.preset("2L", kind, **{**sizes, **variant, **changes})).eval()
    lm.tokens.weight.data *= 8
    for name, w in lm.named_parameters():  # what starts at zero gets something to do
        if name.endswith(("query.1", "key_gate")):
            torch.nn.init.normal_(w)
    return lm

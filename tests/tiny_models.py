"""Models so small that a test costs milliseconds."""

import torch

from crate_mini import model

T = 12  # context
V = 37  # vocabulary
H = 64  # codes of a layer


def tiny(kind, seed=0, **changes):
    """A two-layer LM, d = 16, in eval mode, with predictions that vary by position."""
    if kind == "crate+":
        changes = {"query_rank": 3, **changes}
    config = model.preset("2L", kind, vocab_size=V, block_size=T, n_embd=16, n_head=2, **changes)
    torch.manual_seed(seed)
    lm = model.LM(config).eval()
    lm.tokens.weight.data *= 8
    if kind == "crate+":  # B starts at zero: give the query correction something to do
        for block in lm.blocks:
            torch.nn.init.normal_(block.attention.query[1])
    return lm

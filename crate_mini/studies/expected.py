"""What a GPU should reach, by arithmetic alone, written down before any of our code ran on one.

A step takes as long as its products at a usual share of the card's peak, plus its memory traffic at
a usual share of its bandwidth: the two hardly overlap in PyTorch. Good to about a quarter.
`python -m crate_mini.studies gpu` puts these numbers next to what it measures.
"""

from dataclasses import dataclass

from crate_mini import model
from crate_mini.training.device import flops_per_token, known_gpu

PRODUCTS, MEMORY = 0.7, 0.75  # shares of peak and bandwidth that large kernels reach
# Bytes per token and layer, for each unit of d, that norms, thresholds, residuals and the optimizer
# move in a compiled step of 16 x 1024 tokens.
ELEMENTWISE = 188
# Bytes that the head moves per logit, in bf16, forward and gradient: the logits are written, read
# three times for their softmax, which is written and read in float32, the gradient takes their
# place and is read by two products, and the sum of dW is updated (12 d bytes per 2,560 rows, at
# d = 768). This is for the head as one op;
# where torch.compile fuses what lies between its products, about half.
LOGIT = 2 + 3 * 2 + 4 + 4 + 2 + 2 * 2 + 4
# The same if maximum, exponential and sum worked on the logits in place, each a pass in bf16.
LOGIT_IN_PLACE = 2 + 2 + (2 + 2) + (2 + 2) + 2 + 2 * 2 + 4
OVERHEAD = 3e-3  # seconds of a step: launches, clipping, Adam


@dataclass(frozen=True)
class Card:
    """Data-sheet numbers: dense FLOP/s in the dtype that `auto` takes there, bytes/s.

    A T4 gets 45 of its 65 TFLOP/s: it cannot hold its clock within 70 W.
    """

    flops: float
    bandwidth: float


CARDS = {
    "H200": Card(989e12, 4.8e12),
    "H100 PCIe": Card(756e12, 2.0e12),
    "H100": Card(989e12, 3.35e12),
    "A100": Card(312e12, 1.9e12),
    "L4": Card(121e12, 0.3e12),
    "RTX 5090": Card(209e12, 1.79e12),
    "RTX 4090": Card(165e12, 1.0e12),
    "RTX 3090": Card(71e12, 0.94e12),
    "T4": Card(45e12, 0.32e12),
}
# How many times as fast as cuBLAS with compiled elementwise kernels our v3 should be on ISTA,
# forward and backward, on 65,536 rows: (low, high). A fused epilogue saves traffic, which counts
# where d is small; a product of ours reaches 55 to 80 % of cuBLAS', which counts where d is large.
KERNELS = {128: (1.0, 1.3), 768: (0.55, 0.82), 1600: (0.59, 0.78)}


def step_seconds(config, rows, on):
    """Seconds of a compiled training step on `rows` sequences of block_size tokens on a Card."""
    tokens = rows * config.block_size
    products = tokens * flops_per_token(config) / (PRODUCTS * on.flops)
    moved = ELEMENTWISE * config.n_layer * config.n_embd + LOGIT * config.vocab_size
    return products + tokens * moved / (MEMORY * on.bandwidth) + OVERHEAD


def expectations(device_name, batch=16):
    """Rows for the results file: tokens/s of CRATE and its twin, and what v3 should win or lose."""
    rows = []
    numbers = CARDS.get(known_gpu(device_name, CARDS))
    for preset in ("S", "B") if numbers else ():
        rates = {}
        for kind in ("crate", "gpt2"):
            config = model.preset(preset, kind)
            rates[kind] = round(batch * config.block_size / step_seconds(config, batch, numbers))
        rows.append({"name": f"{preset} {batch}x{config.block_size}", "tokens_per_s": rates})
    for d, (low, high) in KERNELS.items():
        rows.append({"name": f"ista 65536x{d} both", "compile_over_fused": [low, high]})
    return rows

"""How large is a CRATE language model, and what does a token cost to train?

    embedding  V x d        also the head: counted once, but it computes a product at the end
    positions  T x d        not counted, by the paper's rule
    layer      LayerNorm 2 d | U d x d | output map d x d and a bias d     attention
               LayerNorm 2 d | D d x h                                     sparsifier
    L of these, then a LayerNorm 2 d

            z (d) --LN--> U --> u (d) --attend--> (d) --P--> + z --LN--> D, steps --> D a

A product of a vector with a matrix (m, n) takes m n multiply-adds, each two operations. In a layer
a token meets U and P once; D is used 2 steps times (once in the first step, twice in each further
one, once for the output). Attention over a context of T causal tokens sees (T + 1) / 2 tokens on
average, each with d multiply-adds for the scores and d for the sum. The backward pass does two
products for each forward one. LayerNorm, softmax and embedding are too small to count.
"""

from crate_mini.course.checking import cases

TITLE = "Count parameters and FLOPs"
STARS = 1
MINUTES = 20
TEACHES = "why 6 N per token is wrong where a dictionary is used several times"
HINTS = (
    "S has V = 50304, d = 768, L = 6, h = 3072, and 59.9 M parameters.",
    "Forward: 2 (L (2 d^2 + attention + products of D) + head). Training: three times that.",
)

# ---- solution ------------------------------------------------------------------------------------


def n_parameters(V, d, L, h):
    """Parameters of a CRATE LM without its positions; four ints, returns an int."""
    attention = 2 * d + d * d + d * d + d
    sparsifier = 2 * d + d * h
    return V * d + L * (attention + sparsifier) + 2 * d


def training_flops(V, d, L, h, T, steps):
    """Operations per token of training, forward and backward; ints, returns a number."""
    attention = 2 * d * d + (T + 1) / 2 * 2 * d
    sparsifier = 2 * steps * d * h
    head = V * d
    forward = 2 * (L * (attention + sparsifier) + head)
    return 3 * forward


# ---- check ---------------------------------------------------------------------------------------


def without_biases(V, d, L, h):
    """the bias of the output map (d in each layer) is missing"""
    return n_parameters(V, d, L, h) - L * d


def without_norms(V, d, L, h):
    """the LayerNorms are missing: two in each layer and one at the end, 2 d each"""
    return n_parameters(V, d, L, h) - 2 * d * (2 * L + 1)


def without_last_norm(V, d, L, h):
    """the LayerNorm after the last layer is missing"""
    return n_parameters(V, d, L, h) - 2 * d


def head_counted(V, d, L, h):
    """the head shares its weights with the embedding, so V d counts once"""
    return n_parameters(V, d, L, h) + V * d


def separate_qkv(V, d, L, h):
    """query, key and value share one matrix U"""
    return n_parameters(V, d, L, h) + L * 2 * d * d


def forward_only(V, d, L, h, T, steps):
    """this is the forward pass; the backward pass adds twice as much"""
    return training_flops(V, d, L, h, T, steps) / 3


def multiply_adds(V, d, L, h, T, steps):
    """a multiply-add is two operations"""
    return training_flops(V, d, L, h, T, steps) / 2


def without_head(V, d, L, h, T, steps):
    """the head is missing: V d multiply-adds per token"""
    return training_flops(0, d, L, h, T, steps)


def one_use_of_D(V, d, L, h, T, steps):
    """D is used 2 steps times per token, not once"""
    return training_flops(V, d, L, h, T, 0.5)


def one_product_a_step(V, d, L, h, T, steps):
    """each step after the first uses D twice, and the output once more: 2 steps in all"""
    return training_flops(V, d, L, h, T, steps / 2)


def without_causality(V, d, L, h, T, steps):
    """a causal token sees (T + 1) / 2 tokens on average, not T"""
    return training_flops(V, d, L, h, 2 * T - 1, steps)


def without_attention(V, d, L, h, T, steps):
    """the scores and the weighted sum of attention are missing"""
    return training_flops(V, d, L, h, -1, steps)


def six_n(V, d, L, h, T, steps):
    """six operations per parameter is the rule for networks that use each weight once"""
    return 6 * n_parameters(V, d, L, h)


MISTAKES = {
    n_parameters: [without_biases, without_norms, without_last_norm, head_counted, separate_qkv],
    training_flops: [
        forward_only,
        multiply_adds,
        without_head,
        one_use_of_D,
        one_product_a_step,
        without_causality,
        without_attention,
        six_n,
    ],
}


def check(learner):
    for case in cases(20):
        V, d, L = case.integer(10, 60000), 4 * case.integer(1, 99), case.integer(1, 12)
        h = d * case.integer(1, 8)
        learner.agree(n_parameters, V, d, L, h)
        learner.agree(training_flops, V, d, L, h, case.integer(2, 1024), case.integer(2, 4))
    flops = training_flops(50304, 768, 6, 3072, 1024, 2)
    ratio = flops / n_parameters(50304, 768, 6, 3072)
    return f"CRATE S trains with {ratio:.1f} operations per parameter and token, not 6."

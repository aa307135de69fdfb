"""Which models the study `models` trains, and what we expected of each before it ran.

A Row is one model: flags of train.py on top of SHARED, and how many seeds. `expected` was written,
and committed, before the run, as a loss on the default text; results/log.md sets the outcome next
to it. The names of rows never change, because results/models.json finds its runs by them.
"""

from dataclasses import dataclass

SEEDS = (1337, 1338, 1339)
SHARED = "--log-sparsity"
WIKI_IDS = 8191  # ranks of GPT-2's tokenizer that the second text uses
MLP = "--sparsifier mlp --residual --no-bias"
MHSA = "--attention mhsa"
BEST = "--residual --separate-decoder --ista-steps 1"  # crate+ without its changes of attention


@dataclass(frozen=True)
class Row:
    """A model of the study.

    variant: of studies/variants.py, or None for what train.py can do alone. texts: "pydocs" is the
    default text, "wiki" the file given with --text, "long" that file with all ids of GPT-2's
    tokenizer, for a GPU.
    """

    name: str
    flags: str
    expected: float | None
    why: str
    seeds: int = 1
    variant: str | None = None
    texts: tuple[str, ...] = ("pydocs",)


BOTH = ("pydocs", "wiki")

# What the README's first table shows: three seeds on each text.
HEADLINE = (
    Row("crate", "", 4.67, "the paper's model", 3, texts=BOTH),
    Row("crate-shift", "--key-shift", 4.36, "a head can find what followed", 3, texts=BOTH),
    Row("crate+", "--model crate+", 4.25, "our best of the family", 3, texts=BOTH),
    Row("gpt2", "--model gpt2", 4.39, "the twin", 3, texts=BOTH),
    Row(
        "gpt2-shift",
        "--model gpt2 --key-shift",
        4.13,
        "control: does the twin win as much by the shift?",
        3,
        texts=BOTH,
    ),
)

# Attention by sparsifier. What HEADLINE holds already is not repeated.
SLOTS = (
    Row("mssa+mlp", MLP, 4.61, "is it the sparsifier that costs?"),
    Row("mssa-q+ista", "--query-rank 32", 4.62, "a head can bind a key to another token's value"),
    Row("mssa-qs+ista", "--query-rank 32 --key-shift", 4.33, "both changes of attention"),
    Row("mhsa+ista", MHSA, 4.45, "the paper's sparsifier with free attention"),
    Row("mhsa-s+ista", f"{MHSA} --key-shift", 4.20, "the same with the shift"),
    Row("mssa+ista-r", "--residual", 4.63, "the step is added instead of replacing the stream"),
    Row("mssa+ista-rd", "--residual --separate-decoder", 4.60, "and writes with its own matrix"),
    Row("mssa-s+best", f"{BEST} --key-shift", 4.28, "crate+ without the query correction"),
    Row("mssa-s+mlp", f"{MLP} --key-shift", 4.32, "the shift with an MLP"),
    Row("mhsa+best", f"{MHSA} {BEST}", 4.35, "free attention with our sparsifier"),
    Row("mhsa-s+best", f"{MHSA} {BEST} --key-shift", 4.08, "free attention, the shift and ours"),
    Row("mlp-l1", "--model gpt2 --l1 0.001", 4.42, "a penalty on the twin's codes"),
)

# What else could close the gap to free attention with the shift.
LEVERS = (
    Row("crate+-2steps", "--model crate+ --ista-steps 2", 4.255, "a second ISTA step"),
    Row("crate+-q128", "--model crate+ --query-rank 128", 4.21, "a query correction of full rank"),
    Row("crate+-8heads", "--model crate+ --n-head 8", 4.37, "more, narrower heads"),
    Row("crate+-2heads", "--model crate+ --n-head 2", 4.24, "fewer, wider heads"),
    Row(
        "crate+-gain",
        "--model crate+",
        4.24,
        "MSSA ties the temperature of its scores to the size of its values; a gain frees it",
        variant="query-gain",
    ),
    Row(
        "crate+-value-shift",
        "--model crate+",
        4.30,
        "values mixed with their predecessors: blurs what is read, so probably worse",
        variant="value-shift",
    ),
    Row(
        "crate+-two-shifts",
        "--model crate+ --no-key-shift",
        4.24,
        "keys of the last three tokens: a longer context to match",
        variant="two-shifts",
    ),
    Row(
        "crate+-no-self",
        "--model crate+",
        4.25,
        "no head can waste its weight on the token itself",
        variant="no-self",
    ),
    Row(
        "crate+-free-query",
        "--model crate+ --query-rank 0",
        4.15,
        "if the correction's start at 0 is what costs, a free query wins 0.1",
        variant="free-query",
    ),
    Row(
        "crate+-free-value",
        "--model crate+ --query-rank 0",
        4.20,
        "if key and value sharing one scale is what costs, a free value wins",
        variant="free-value",
    ),
    Row(
        "crate+-free-both",
        "--model crate+ --query-rank 0",
        4.09,
        "control: this is mhsa in our layout",
        variant="free-both",
    ),
    Row(
        "crate+-qk-norm",
        "--model crate+",
        4.22,
        "scores by direction alone: a token's length no longer attracts",
        variant="qk-norm",
    ),
    Row(
        "crate+-log-scale",
        "--model crate+",
        4.25,
        "one temperature a head",
        variant="log-scale",
    ),
    Row(
        "crate-shift-paper-output",
        "--key-shift",
        4.45,
        "the output map U^T of the paper instead of a free one",
        variant="paper-output",
    ),
    Row(
        "crate-shift-half-step",
        "--key-shift",
        4.36,
        "(1 - c) z + c MSSA(z), as derived: the next LayerNorm hides most of the difference",
        variant="half-step",
    ),
    Row(
        "crate-shift-fista",
        "--key-shift --ista-steps 3",
        4.37,
        "momentum in the sparse code; steps beyond the second won nothing before",
        variant="fista",
    ),
    Row(
        "crate-shift-nesterov",
        "--key-shift",
        4.36,
        "momentum over layers; three layers are few",
        variant="nesterov-layers",
    ),
    Row("crate-shift-unit", "--key-shift --unit-norm --eta 1.0", 4.40, "a normalised step"),
)

# Sparse by construction, for both families.
SPARSE = (
    Row("crate+-top16", "--model crate+ --top-k 16", 4.29, "3 % of the codes for 0.04 nats?"),
    Row("crate+-top32", "--model crate+ --top-k 32", 4.26, "6 % of the codes"),
    Row("crate+-top8", "--model crate+ --top-k 8", 4.36, "1.6 % of the codes"),
    Row("gpt2-top16", "--model gpt2 --top-k 16", 4.33, "the control that decides"),
    Row("gpt2-top32", "--model gpt2 --top-k 32", 4.42, "for the front, after top16 gave 4.44"),
    Row("gpt2-top8", "--model gpt2 --top-k 8", 4.50, "for the front, after top16 gave 4.44"),
    Row("crate-top16", "--top-k 16", 4.95, "codes that are the whole stream: sparsity must cost"),
    Row("crate-top32", "--top-k 32", 4.85, "the same, 6 % of the codes"),
    Row("crate-top8", "--top-k 8", 5.10, "the same, 1.6 % of the codes"),
    Row("gpt2-shift-top16", "--model gpt2 --key-shift --top-k 16", 4.15, "the same, shifted"),
    Row("crate+-debias", "--model crate+ --debias", 4.26, "codes that are not shrunk"),
    Row("crate+-debias-top16", "--model crate+ --debias --top-k 16", 4.30, "a pure l0 constraint"),
    Row("crate+-l1", "--model crate+ --l1 0.001", 4.27, "lam |a|_1 in the loss"),
)

# What reviewers asked.
QUESTIONS = (
    Row("crate-1step", "--ista-steps 1", 4.70, "does the number of steps matter?"),
    Row("crate-3steps", "--ista-steps 3", 4.67, "does the number of steps matter?"),
    Row("crate-4steps", "--ista-steps 4", 4.68, "does the number of steps matter?"),
    Row("crate-lam0", "--lam 0", 4.66, "does the threshold matter?"),
    Row("crate-lam.5", "--lam 0.5", 4.70, "does the threshold matter?"),
    Row("crate-eta.05", "--eta 0.05", 4.68, "does the step size matter?"),
    Row("crate-eta.2", "--eta 0.2", 4.70, "does the step size matter?"),
    Row("crate-unit", "--unit-norm --eta 1.0", 4.70, "a step size that is stable by construction"),
    Row("crate-learned", "--learned-lam", 4.66, "a threshold for each neuron"),
    Row("crate-h1", "--expansion 1", 4.80, "is overcompleteness worth it?"),
    Row("crate-h2", "--expansion 2", 4.72, "is overcompleteness worth it?"),
    Row("crate-h8", "--expansion 8", 4.66, "is overcompleteness worth it?"),
    Row("crate-2000", "--train-steps 2000", 4.35, "does more training close the gap?"),
    Row("crate+-2000", "--model crate+ --train-steps 2000", 4.00, "does more training close it?"),
    Row("gpt2-2000", "--model gpt2 --train-steps 2000", 4.05, "does more training close it?"),
    Row("crate-lr.5", "--lr 1.5e-3", 4.80, "the same small budget of learning rates for each"),
    Row("crate-lr2", "--lr 6e-3", 4.65, "the same small budget of learning rates for each"),
    Row("crate+-lr.5", "--model crate+ --lr 1.5e-3", 4.40, "the same small budget for each"),
    Row("crate+-lr2", "--model crate+ --lr 6e-3", 4.22, "the same small budget for each"),
    Row("gpt2-lr.5", "--model gpt2 --lr 1.5e-3", 4.50, "the same small budget for each"),
    Row("gpt2-lr2", "--model gpt2 --lr 6e-3", 4.37, "the same small budget for each"),
)

# At equal cost: per layer the twin has 12 d^2 weights and products, crate+ 10.5 d^2.
EQUAL = (
    Row("crate+-h5", "--model crate+ --expansion 5", 4.24, "as many products as the twin"),
    Row("gpt2-h3", "--model gpt2 --expansion 3", 4.43, "as few products as crate+"),
    Row("crate-h2-1step", "--expansion 2 --ista-steps 1", 4.76, "half of the twin's products"),
)

WIDER = "--n-layer 6 --n-embd 256 --n-head 8 --lr 1.5e-3"
SIZES = (
    Row("crate-6L", WIDER, 4.55, "the gap at eight times the size"),
    Row("crate+-6L", f"--model crate+ {WIDER}", 4.05, "the gap at eight times the size"),
    Row("gpt2-6L", f"--model gpt2 {WIDER}", 4.15, "the gap at eight times the size"),
)

# For the scores of neurons, on the second text alone; what three layers reach is in HEADLINE.
DEPTHS = tuple(
    Row(f"{kind}-{layers}L", f"--model {kind} --preset {layers}L", None, why, texts=("wiki",))
    for kind in ("crate", "crate+", "gpt2")
    for layers, why in ((1, "one layer"), (2, "two layers"))
)

ON_A_GPU = "--batch-size 64 --lr 6e-4"
LARGE = (
    Row("crate-S", f"--preset S {ON_A_GPU}", None, "the paper's S", texts=("long",)),
    Row("crate+-S", f"--model crate+ --preset S {ON_A_GPU}", None, "ours", texts=("long",)),
    Row("gpt2-S", f"--model gpt2 --preset S {ON_A_GPU}", None, "the twin", texts=("long",)),
    Row("crate-B", f"--preset B {ON_A_GPU}", None, "the paper's B", texts=("long",)),
    Row("crate+-B", f"--model crate+ --preset B {ON_A_GPU}", None, "ours", texts=("long",)),
    Row("gpt2-B", f"--model gpt2 --preset B {ON_A_GPU}", None, "the twin", texts=("long",)),
)

GRID = {
    "headline": HEADLINE,
    "slots": SLOTS,
    "levers": LEVERS,
    "sparse": SPARSE,
    "questions": QUESTIONS,
    "equal": EQUAL,
    "sizes": SIZES,
    "depths": DEPTHS,
    "large": LARGE,
}

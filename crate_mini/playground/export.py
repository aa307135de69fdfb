"""A checkpoint as JSON that model.js runs: weights in bfloat16, tokenizer, facts about neurons."""

import base64
from dataclasses import fields

import torch

from crate_mini import UserError
from crate_mini.neurons.labels import label_text
from crate_mini.neurons.metrics import rounded
from crate_mini.steering.known import HELD_OUT

# Every field of a Config, with the values that model.js can run; None: any value.
RUNS = {
    "vocab_size": None,
    "block_size": None,
    "n_layer": None,
    "n_head": None,
    "n_embd": None,
    "attention": ("mssa", "mhsa"),
    "sparsifier": ("ista", "mlp"),
    "activation": ("relu", "gelu"),
    "bias": None,
    "expansion": None,
    "ista_steps": None,
    "eta": None,
    "lam": None,
    "residual": None,
    "separate_decoder": None,
    "learned_lam": None,
    "unit_norm": None,  # folded into D
    "query_rank": None,
    "key_shift": None,
    "top_k": None,
    "debias": None,
    "l1": None,  # acts in training only
}
MOST_WEIGHTS = 80_000_000  # the paper's CRATE S fits; a larger page, over 200 MB, barely opens


def check(config, ckpt):
    """Raise UserError for a Config that model.js does not know how to run."""
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name not in RUNS:
            raise UserError(
                f"{ckpt} has the setting {f.name}={value!r}, which the playground cannot run yet; "
                "`python steer.py` runs every model."
            )
        if RUNS[f.name] and value not in RUNS[f.name]:
            known = " or ".join(RUNS[f.name])
            raise UserError(
                f"{ckpt} has {f.name}={value!r}, and the playground runs only {known}; "
                "`python steer.py` runs every model."
            )


def tensors(model):
    """{name: tensor} of all weights, under the names of model.js; what a model lacks is absent.

    A matrix has a row for each input. D is divided by its norm if the model does that.
    """
    named = {"tokens": model.tokens.weight, "positions": model.positions.weight}
    named |= _norm("norm", model.norm)
    for layer, block in enumerate(model.blocks):
        parts = {**_attention(block.attention), **_sparsifier(block.sparsifier)}
        named |= {f"{layer}.{name}": tensor for name, tensor in parts.items()}
    return {name: tensor.detach() for name, tensor in named.items() if tensor is not None}


def _norm(name, norm):
    return {name: norm.weight, f"{name}.bias": norm.bias}


def _linear(name, linear):
    return {name: linear.weight.T, f"{name}.bias": linear.bias}


def _attention(attention):
    named = {**_norm("attention.norm", attention.norm), **_linear("out", attention.out)}
    named["key_gate"] = attention.key_gate
    if hasattr(attention, "qkv"):
        return named | _linear("qkv", attention.qkv)
    named["U"] = attention.U
    if attention.query is not None:
        named["A"], named["B"] = attention.query
    return named


def _sparsifier(sparsifier):
    named = _norm("sparsifier.norm", sparsifier.norm)
    if hasattr(sparsifier, "fc"):
        return named | _linear("fc", sparsifier.fc) | _linear("proj", sparsifier.proj)
    named |= {"D": sparsifier.D, "log_lam": sparsifier.log_lam}
    if sparsifier.decoder is not None:
        named["decoder"] = sparsifier.decoder.T
    return named


def packed(model):
    """{"config", "shapes", "weights"} of an LM: the weights one after another, in base64.

    shapes: [[name, size, ...]] in the order of the weights. Raises UserError if there are too many.
    """
    named = tensors(model)
    total = sum(tensor.numel() for tensor in named.values())
    if total > MOST_WEIGHTS:
        raise UserError(
            f"the model has {total:,} weights, and a page holds at most {MOST_WEIGHTS:,}; train a "
            "smaller one, like `python train.py --preset 3L`."
        )
    flat = torch.cat([tensor.flatten() for tensor in named.values()])
    words = flat.to("cpu", torch.bfloat16).view(torch.int16).numpy().astype("<i2")
    config = {name: getattr(model.config, name) for name in RUNS}
    return {
        "config": config,
        "shapes": [[name, *tensor.shape] for name, tensor in named.items()],
        "weights": base64.b64encode(words.tobytes()).decode(),
    }


def vocabulary(tokenizer, token_text, size):
    """{"ranks", "texts"}: each rank's bytes in base64, and each of `size` ids as visible text."""
    ranks = [base64.b64encode(tokenizer.token_bytes(id)).decode() for id in range(tokenizer.eot)]
    return {"ranks": ranks, "texts": [token_text(id) for id in range(size)]}


def neurons(lab):
    """[{"max", "mean", "labels"}] for each layer of a Lab's model, each a list over its neurons.

    Maxima and means are those that `interpret.py neurons` recorded; if some are missing, they are
    observed on held-out text. A neuron without a label has ''.
    """
    layers = []
    for layer in range(lab.model.config.n_layer):
        n = lab.model.config.n_code
        rows = [lab.known.rows.get((lab.known.site(layer), j), {}) for j in range(n)]
        facts = {"labels": [short_label(row.get("label") or {}, lab.token) for row in rows]}
        for name in ("max", "mean"):
            facts[name] = [row.get(name) for row in rows]
        layers.append(facts)
    if lab.data is not None or any(None in facts["max"] + facts["mean"] for facts in layers):
        _fill_in(layers, *observed(lab), replace=lab.data is not None)
    return layers


def short_label(label, token_text):
    """A label in one line, without the shares of its tokens; '' for {}."""
    tokens = [[id, mean, count, None] for id, mean, count, _ in label.get("tokens", [])]
    kind = "" if label.get("class") == "mixed" else label.get("class", "")
    return label_text({**label, "tokens": tokens, "class": kind}, token_text)


def _fill_in(layers, maxima, means, replace):
    """Put observed values in place of those that are missing, or of all of them."""
    for layer, facts in enumerate(layers):
        for name, values in (("max", maxima[layer]), ("mean", means[layer])):
            pairs = zip(facts[name], values.tolist())
            facts[name] = [rounded(new, 6) if replace or old is None else old for old, new in pairs]


@torch.no_grad()
def observed(lab):
    """(maxima, means) of all neurons, each a list of (h,) over layers, on held-out text."""
    model = lab.model
    maxima = [torch.zeros(model.config.n_code) for _ in model.blocks]
    sums = [torch.zeros(model.config.n_code, dtype=torch.float64) for _ in model.blocks]
    tokens = 0
    window = min(256, model.config.block_size)
    for ids, _ in lab.held_out().blocks("val", 8, window, HELD_OUT):
        tokens += ids.numel()
        for layer, codes in enumerate(model.trunk(ids)[1]):
            codes = codes.flatten(0, 1)
            maxima[layer] = torch.maximum(maxima[layer], codes.max(0).values)
            sums[layer] += codes.double().sum(0)
    return maxima, [total / max(tokens, 1) for total in sums]

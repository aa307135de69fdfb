"""Weights of other projects, imported and exported by their names for our parameters.

    crate   CRATE-LM: crate_overcomplete.py of github.com/crate-lm/crate-lm; ista.weight is D^T and
            c_attn.weight is U^T
    gpt     its GPT-2 twin, gpt.py: nanoGPT's names, with ReLU. Models of nanoGPT itself have the
            same names and GELU: import them with activation="gelu" (the tanh form of OpenAI's
            GPT-2, within 5e-4 of the exact one that nanoGPT uses)
    hf      GPT-2 of Hugging Face transformers: the same names, matrices transposed (Conv1D), GELU

A source is a state_dict, or a file or folder of foreign_files.py. Weights do not show the number of
heads, nor whether a gpt model has ReLU or GELU: both are taken from the dict around the weights or
from config.json, else they can be given, else they are assumed and a note says so.
"""

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from crate_mini import UserError
from crate_mini.model import KINDS, LM, Config
from crate_mini.training.foreign_files import named_facts, read


@dataclass(frozen=True)
class Layout:
    """A project's way to store a model.

    names: {our name of a module or parameter in a block: theirs}. transposed: endings of the names
    of matrices that are stored transposed. config: the Config fields that the layout implies.
    """

    names: dict
    transposed: tuple
    config: dict


CRATE_NAMES = {
    "attention.norm": "prenorm_1",
    "attention.U": "attn.c_attn.weight",
    "attention.out": "attn.c_proj",
    "sparsifier.norm": "prenorm_2",
    "sparsifier.D": "ista.weight",
}
GPT_NAMES = {
    "attention.norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "sparsifier.norm": "ln_2",
    "sparsifier.fc": "mlp.c_fc",
    "sparsifier.proj": "mlp.c_proj",
}
LAYOUTS = {
    "crate": Layout(
        CRATE_NAMES, ("c_attn.weight", "ista.weight"), {**KINDS["crate"], "bias": True}
    ),
    "gpt": Layout(GPT_NAMES, (), KINDS["gpt2"]),
    "hf": Layout(
        GPT_NAMES,
        ("c_attn.weight", "c_proj.weight", "c_fc.weight"),
        {**KINDS["gpt2"], "bias": True, "activation": "gelu"},
    ),
}
OUTER_NAMES = {"tokens": "wte", "positions": "wpe", "norm": "ln_f"}
# Heads of the published CRATE-LM and GPT-2 models, by width.
HEADS = {128: 4, 768: 12, 1024: 16, 1280: 20, 1600: 25}
# Names under which a state_dict lies in the dict of a training checkpoint.
STATE_NAMES = ("model", "state_dict", "model_state_dict", "module")
# Names next to it of dicts that may tell the number of heads; the first are the model's own.
FACT_NAMES = ("config", "hyper_parameters", "model_args")
# Parts that wrappers add to the names of parameters: DataParallel, torch.compile, Lightning, FSDP.
WRAPPERS = ("module", "_orig_mod", "model", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def fingerprint(model):
    """sha256 of a model's Config and weights, whatever file they came from."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, w in sorted(model.state_dict().items()):
        content = w.cpu().flatten().view(torch.uint8).numpy().tobytes()
        digest.update(name.encode() + content)
    return digest.hexdigest()


# ---- import and export ---------------------------------------------------------------------------


def import_foreign(source, log=print, **changes):
    """The LM, in eval mode, of a path, a state_dict, or a dict around one, such as nanoGPT's.

    changes: Config fields that the source does not tell, such as n_head; a block_size below the
    source's drops its last positions. log: called with a note for each assumption. Raises
    UserError.
    """
    if isinstance(source, dict):
        place, content, facts = "the state_dict", source, {}
    else:
        place = Path(source)
        content, facts = read(place)
    if "crate_mini" in facts:
        return _exported(content, facts["crate_mini"], place, changes)
    content, inner_facts = _unwrapped(content, place)
    theirs = _plain_names(content, place)
    layout, config = _recognize(theirs, place)
    facts = {**facts, **inner_facts}
    config |= _not_in_weights(layout, config["n_embd"], facts, changes, place, log)
    config |= changes
    _drop_positions(theirs, config["block_size"], place)
    with torch.device("meta"):
        model = LM(Config(**config))
    ours = {}
    for name, parameter in model.state_dict().items():
        ours[name] = _take(theirs, name, parameter.shape, layout, place)
    if theirs:
        raise UserError(
            f"{place} has {next(iter(theirs))!r}, for which a {layout} model has no place."
        )
    model.load_state_dict(ours, assign=True)
    model.foreign_layout = layout  # in which export_foreign gives it back
    return model.eval()


def _exported(content, entry, place, changes):
    """The LM of a folder that `python -m crate_mini.export` wrote.

    entry: "crate_mini" of its config.json. Under GPT-2's names, biases that the model does not
    have are zero. Its tokenizer and training facts are kept in `foreign_meta`.
    """
    for name, value in changes.items():
        raise UserError(f"{name}={value!r} has no effect on {place}, which names its settings.")
    damaged = UserError(
        f"{place}: weights and config.json do not fit; export the checkpoint again with `python -m "
        "crate_mini.export`."
    )
    try:
        with torch.device("meta"):
            model = LM(Config(**entry["config"]))
        if "transformer.wte.weight" in content:
            theirs = dict(content)
            ours = {}
            for name, parameter in model.state_dict().items():
                ours[name] = _take(theirs, name, parameter.shape, "hf", place)
            if any(rest.any() for name, rest in theirs.items() if name != "lm_head.weight"):
                raise damaged
            content = ours
        model.load_state_dict(content, assign=True)
        meta = {"tokenizer": {**entry["tokenizer"]}, "training": {**entry["training"]}}
    except (KeyError, TypeError, AttributeError, RuntimeError):
        raise damaged from None
    model.foreign_meta = meta
    return model.eval()


def _unwrapped(content, place):
    """(state_dict, facts) of a dict around it, in however many layers."""
    facts = {}
    while True:
        for name in FACT_NAMES:
            if isinstance(content.get(name), dict):
                facts |= named_facts(content[name], f"{place}, {name},")
        inner = [content[name] for name in STATE_NAMES if isinstance(content.get(name), dict)]
        if not inner:
            return content, facts
        content = inner[0]


def _not_in_weights(layout, width, facts, changes, place, log):
    """{"n_head", "activation"} as the source tells them, as given, or as assumed with a note."""
    known = {}
    if "n_head" in facts:
        known["n_head"] = facts["n_head"]
    if layout == "crate" and "activation" in changes:
        raise UserError(f"activation={changes['activation']!r} has no effect on {place}, a CRATE.")
    if layout != "crate" and "activation" in facts:
        known["activation"] = facts["activation"]
    for name, value in known.items():
        if changes.get(name, value) != value:
            raise UserError(
                f"{name}={changes[name]!r} differs from the {value!r} that {place} names; leave it "
                "out."
            )
    if "n_head" not in {**known, **changes}:
        known["n_head"] = _usual_heads(width, place, log)
    if layout == "gpt" and "activation" not in {**known, **changes}:
        log(
            f"note      {place} does not name its activation: relu is assumed, as in the twin of "
            "CRATE-LM; for a model of nanoGPT itself give train.py --activation gelu, or put a "
            'config.json with {"activation": "gelu"} next to it'
        )
    return known


def _usual_heads(width, place, log):
    """The heads of published models of this width. Raises UserError for any other width."""
    if width not in HEADS:
        raise UserError(
            f"{place} does not name its number of heads; give it, as in train.py --n-head 4 (in "
            'Python, n_head), or put a config.json with {"n_head": 4} next to it.'
        )
    log(
        f"note      {place} does not name its number of heads: {HEADS[width]} are assumed, as in "
        f"published models of width {width}"
    )
    return HEADS[width]


def _drop_positions(theirs, block_size, place):
    """Keep the embeddings of the first block_size positions."""
    name = "transformer.wpe.weight"
    positions = theirs[name]
    if type(block_size) is int and block_size > len(positions):
        raise UserError(
            f"block_size={block_size} is more than the {len(positions)} positions of {place}; "
            "leave it out."
        )
    theirs[name] = positions[:block_size]


def _take(theirs, name, shape, layout, place):
    """Remove their tensor for our parameter `name` from `theirs`; returns it in our layout."""
    key, transposed = _their_name(name, layout)
    value = theirs.pop(key, None)
    if transposed:
        shape = shape[::-1]
    if value is None or value.shape != shape:
        got = "nothing" if value is None else tuple(value.shape)
        raise UserError(
            f"{place}: expected {key} of shape {tuple(shape)} for a {layout} model, got {got}; "
            "download it again."
        )
    if transposed:
        value = value.T
    return value.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def export_foreign(model, layout=None):
    """state_dict of an LM in a layout: crate, gpt or hf.

    layout: by default the one it was imported from; else crate for CRATE and, for the twin, hf if
    it is Hugging Face's GPT-2 (GELU and biases), else gpt. Raises UserError for a model with a
    variant that the layout cannot express.
    """
    config = model.config
    layout = layout or getattr(model, "foreign_layout", None) or _usual_layout(config)
    if layout not in LAYOUTS:
        raise UserError(f"layout={layout!r} is unknown; choose one of {', '.join(LAYOUTS)}.")
    free = ["vocab_size", "block_size", "n_layer", "n_head", "n_embd", "l1"]
    if layout == "gpt":
        free += ["bias", "activation"]
    sizes = {name: getattr(config, name) for name in free}
    plain = Config(**{**LAYOUTS[layout].config, **sizes})
    for f in fields(Config):
        value, implied = getattr(config, f.name), getattr(plain, f.name)
        if value != implied:
            raise UserError(
                f"{f.name}={value!r} has no place in a {layout} checkpoint, which implies "
                f"{implied!r}; export a model without it."
            )
    theirs = {}
    for name, value in model.state_dict().items():
        key, transposed = _their_name(name, layout)
        theirs[key] = (value.T if transposed else value).contiguous()
    theirs["lm_head.weight"] = theirs["transformer.wte.weight"]
    return theirs


def _usual_layout(config):
    if config.sparsifier == "ista":
        return "crate"
    return "hf" if config.activation == "gelu" and config.bias else "gpt"


# ---- names and shapes ----------------------------------------------------------------------------


def _their_name(name, layout):
    """(their name of our parameter, whether they store it transposed)."""
    names, transposed = LAYOUTS[layout].names, LAYOUTS[layout].transposed
    if not name.startswith("blocks."):
        module, kind = name.split(".")
        return f"transformer.{OUTER_NAMES[module]}.{kind}", False
    _, i, inner = name.split(".", 2)
    prefix = next(prefix for prefix in names if inner.startswith(prefix))
    key = f"transformer.h.{i}.{names[prefix]}{inner.removeprefix(prefix)}"
    return key, key.endswith(transposed)


def _plain_names(content, place):
    """Their tensors, without the prefixes of wrappers, mask buffers and the tied head."""
    is_dict = isinstance(content, dict)
    if not is_dict or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(
            f"{place} holds no state_dict; expected tensors by name, or model=tensors by name."
        )
    theirs = {}
    for key, value in content.items():
        key = ".".join(part for part in str(key).split(".") if part not in WRAPPERS)
        if key.startswith(("wte.", "wpe.", "h.", "ln_f.")):  # Hugging Face's model without a head
            key = "transformer." + key
        if key.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        if key in theirs and not torch.equal(theirs[key], value):
            raise UserError(f"{place} holds two different tensors for {key}; keep one of them.")
        theirs[key] = value
    head = theirs.pop("lm_head.weight", None)
    if head is not None:
        embedding = theirs.get("transformer.wte.weight", head)
        if not torch.equal(head.float(), embedding.float()):
            raise UserError(
                f"{place} has an untied head; only heads tied to the embedding can be imported."
            )
    return theirs


def _recognize(theirs, place):
    """(layout, the Config fields that names and shapes determine)."""
    block = "transformer.h.0."
    is_crate = block + "ista.weight" in theirs
    try:
        vocab_size, d = theirs["transformer.wte.weight"].shape
        block_size = len(theirs["transformer.wpe.weight"])
        attention_shape = theirs[block + "attn.c_attn.weight"].shape
        codes = theirs[block + ("ista.weight" if is_crate else "mlp.c_fc.weight")]
        h = codes.numel() // d
    except (KeyError, ValueError, ZeroDivisionError):
        names = ", ".join(repr(name) for name in [*theirs][:3]) or "nothing"
        raise UserError(
            f"{place} is not a CRATE-LM, nanoGPT or GPT-2 model: expected transformer.wte.weight "
            f"and so on, got {names}; for a checkpoint of crate_mini, give its folder."
        ) from None
    if is_crate:
        layout = "crate"
    else:
        layout = "gpt" if attention_shape == (3 * d, d) else "hf"
    if is_crate and h != 4 * d:
        raise UserError(
            f"{place} has {h} codes at width {d}, expected {4 * d}: only models of "
            "crate_overcomplete.py can be imported, crate.py computes something else."
        )
    layers = {key.split(".")[2] for key in theirs if key.startswith("transformer.h.")}
    config = {
        **LAYOUTS[layout].config,
        "vocab_size": vocab_size,
        "block_size": block_size,
        "n_layer": len(layers),
        "n_embd": d,
        "expansion": h // d,
        "bias": "transformer.ln_f.bias" in theirs,
    }
    return layout, config

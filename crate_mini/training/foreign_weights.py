"""Weights of other projects, imported and exported by their names for our parameters.

    crate   CRATE-LM: crate_overcomplete.py of github.com/crate-lm/crate-lm; ista.weight is D^T and
            c_attn.weight is U^T
    gpt     its GPT-2 twin, gpt.py: nanoGPT's names, with ReLU. Models of nanoGPT itself have the
            same names and GELU: import them with activation="gelu" (the tanh form of OpenAI's
            GPT-2, within 5e-4 of the exact one that nanoGPT uses)
    hf      GPT-2 of Hugging Face transformers: the same names, matrices transposed (Conv1D), GELU

A source is a state_dict, a file of torch.save or .safetensors, or a Hugging Face folder, which
holds config.json and one of the two.
"""

import hashlib
import json
import math
import pickle
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from crate_mini import UserError
from crate_mini.model import KINDS, LM, Config


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
# Values that config.json of a Hugging Face model must have, if it names them.
HF_CONFIG = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}
HF_FILES = ("model.safetensors", "pytorch_model.bin")
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def is_foreign(path):
    """Whether this path is for import_foreign: any file, or a Hugging Face folder."""
    return path.is_file() or any((path / name).is_file() for name in HF_FILES)


def fingerprint(model):
    """sha256 of a model's Config and weights, whatever file they came from."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, w in sorted(model.state_dict().items()):
        content = w.cpu().flatten().view(torch.uint8).numpy().tobytes()
        digest.update(name.encode() + content)
    return digest.hexdigest()


# ---- import and export ---------------------------------------------------------------------------


def import_foreign(source, **changes):
    """The LM, in eval mode, of a path, a state_dict, or nanoGPT's dict of "model" and "model_args".

    changes: Config fields that the source does not hold, such as n_head. Raises UserError.
    """
    place = "the state_dict" if isinstance(source, dict) else Path(source)
    content, facts = (source, {}) if isinstance(source, dict) else _open(place)
    if "model" in content:
        facts = content.get("model_args") or {}
        content = content["model"]
    theirs = _plain_names(content, place)
    layout, config = _recognize(theirs, place)
    n_head = None
    if isinstance(facts, dict):  # a damaged file may hold anything
        n_head = facts.get("n_head", HEADS.get(config["n_embd"]))
    if n_head is None and "n_head" not in changes:
        raise UserError(
            f"{place} does not name its number of heads; use import_foreign(path, n_head=...)."
        )
    with torch.device("meta"):
        model = LM(Config(**{**config, "n_head": n_head, **changes}))
    ours = {}
    for name, parameter in model.state_dict().items():
        ours[name] = _take(theirs, name, parameter.shape, layout, place)
    if theirs:
        raise UserError(
            f"{place} has {next(iter(theirs))!r}, for which a {layout} model has no place."
        )
    model.load_state_dict(ours, assign=True)
    return model.eval()


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


def export_foreign(model):
    """state_dict of an LM in the layout of its kind: crate, gpt or, if its MLP has GELU, hf.

    Raises UserError for a model with a variant that the layout cannot express.
    """
    config = model.config
    if config.sparsifier == "ista":
        layout = "crate"
    else:
        layout = "hf" if config.activation == "gelu" else "gpt"
    free = ["vocab_size", "block_size", "n_layer", "n_head", "n_embd", "l1"]
    if layout == "gpt":
        free.append("bias")
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
        key = str(key).removeprefix("module.").removeprefix("_orig_mod.")
        if key.startswith(("wte.", "wpe.", "h.", "ln_f.")):  # Hugging Face's model without a head
            key = "transformer." + key
        if not key.endswith((".attn.bias", ".attn.masked_bias")):
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


# ---- files ---------------------------------------------------------------------------------------


def _open(path):
    """(content, facts) of a file or a Hugging Face folder; facts: n_head, if it is known."""
    facts = {}
    try:
        if path.is_dir():
            facts = _hugging_face_facts(path)
            path = next(path / name for name in HF_FILES if (path / name).is_file())
        if path.suffix == ".safetensors":
            content = _safetensors(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"Cannot read {path}: {error.strerror or error}; expected a checkpoint."
        ) from None
    except Exception as error:  # damaged files fail in any way inside torch, json and pickle
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise UserError(
                f"{path} would run code when loaded, so it was refused; if you trust it, save its "
                "tensors alone: torch.save(model.state_dict(), path)."
            ) from None
        advice = "download it again"
        if path.suffix == ".json":
            advice = "give the folder that holds it"
        raise UserError(f"{path} is damaged, truncated or not a checkpoint; {advice}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a dict of tensors.")
    return content, facts


def _hugging_face_facts(folder):
    """{"n_head": heads}, or {}, of a config.json. Raises UserError for another kind of model."""
    config = json.loads((folder / "config.json").read_bytes())
    for name, expected in HF_CONFIG.items():
        if config.get(name, expected) != expected:
            raise UserError(
                f"{folder}/config.json has {name}={config[name]!r}; only GPT-2 with {expected!r} "
                "can be imported."
            )
    return {"n_head": config["n_head"]} if "n_head" in config else {}


def _safetensors(path):
    """Tensors by name: 8 bytes of length, a JSON of dtypes, shapes and offsets, raw data."""
    with open(path, "rb") as file:
        header_length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_length))
        data = bytearray(file.read())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        flat = torch.frombuffer(
            data,
            dtype=SAFETENSORS_DTYPES[entry["dtype"]],
            count=math.prod(entry["shape"]),
            offset=entry["data_offsets"][0],
        )
        tensors[name] = flat.reshape(entry["shape"])
    return tensors

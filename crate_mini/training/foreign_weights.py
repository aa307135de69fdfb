"""Checkpoints of other projects: their key names against ours, in both directions.

    crate   CRATE-LM: crate_overcomplete.py of github.com/crate-lm/crate-lm; ista.weight is D^T, c_attn U^T
    gpt     its GPT-2 twin, gpt.py: nanoGPT's names, with ReLU. nanoGPT's own models have the same names and
            GELU: give activation="gelu" (GPT-2's tanh form, within 5e-4 of the exact one in today's nanoGPT)
    hf      GPT-2 of Hugging Face transformers: these names again, matrices transposed (Conv1D), GELU

Files: what torch.save wrote, .safetensors, or a Hugging Face folder: config.json beside one of the two. A
file of its own beside checkpoint.py because this one changes when others change their formats.
"""

import hashlib
import json
import math
import pickle
from dataclasses import fields
from pathlib import Path

import torch

from crate_mini import UserError
from crate_mini.model import KINDS, LM, Config

GPT = {
    "attention.norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "sparsifier.norm": "ln_2",
    "sparsifier.fc": "mlp.c_fc",
    "sparsifier.proj": "mlp.c_proj",
}
LAYOUTS = {  # names in a block, ours and theirs; endings of what is stored transposed; the Config it implies
    "crate": (
        {
            "attention.norm": "prenorm_1",
            "attention.U": "attn.c_attn.weight",
            "attention.out": "attn.c_proj",
            "sparsifier.norm": "prenorm_2",
            "sparsifier.D": "ista.weight",
        },
        ("c_attn.weight", "ista.weight"),
        {**KINDS["crate"], "bias": True},
    ),
    "gpt": (GPT, (), KINDS["gpt2"]),
    "hf": (
        GPT,
        ("c_attn.weight", "c_proj.weight", "c_fc.weight"),
        {**KINDS["gpt2"], "bias": True, "activation": "gelu"},
    ),
}
HEADS = {
    128: 4,
    768: 12,
    1024: 16,
    1280: 20,
    1600: 25,
}  # by width, of published CRATE-LM and GPT-2 models
HF_FACTS = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}
HF_FILES = ("model.safetensors", "pytorch_model.bin")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def is_foreign(path):
    """Whether `path` is for import_foreign: any file, or a folder as Hugging Face writes them."""
    return path.is_file() or any((path / name).is_file() for name in HF_FILES)


def import_foreign(source, **changes):
    """LM, in eval mode, of a path, a state_dict, or a dict of "model" and "model_args" as nanoGPT saves.

    changes: Config fields that the source does not tell, such as n_head. Raises UserError.
    """
    where = "the state_dict" if isinstance(source, dict) else Path(source)
    theirs, facts = (source, {}) if isinstance(source, dict) else _open(where)
    if "model" in theirs:
        theirs, facts = theirs["model"], theirs.get("model_args") or {}
    theirs = _tidy(theirs, where)
    layout, config = _recognise(theirs, where)
    n_head = facts.get("n_head", HEADS.get(config["n_embd"])) if isinstance(facts, dict) else None
    if n_head is None and "n_head" not in changes:
        raise UserError(
            f"{where} does not tell its number of heads; use import_foreign(path, n_head=...)."
        )
    with torch.device("meta"):
        model = LM(Config(**{**config, "n_head": n_head, **changes}))
    ours = {}
    for name, like in model.state_dict().items():
        key, transposed = _theirs(name, layout)
        value, shape = theirs.pop(key, None), like.shape[::-1] if transposed else like.shape
        if value is None or value.shape != shape:
            found = "nothing" if value is None else tuple(value.shape)
            raise UserError(
                f"{where}: expected {key} of shape {tuple(shape)} for a {layout} model, found "
                f"{found}; fetch it again."
            )
        value = value.T if transposed else value
        ours[name] = value.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if theirs:
        raise UserError(
            f"{where} has {next(iter(theirs))!r}, for which a {layout} model has no place."
        )
    model.load_state_dict(ours, assign=True)
    return model.eval()


def fingerprint(model):
    """sha256 of a model's shape and weights, wherever they came from."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, w in sorted(model.state_dict().items()):
        digest.update(name.encode() + w.cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def export_foreign(model):
    """state_dict of an LM in the layout of its kind: crate, gpt or, if its MLP has GELU, hf.

    Raises UserError for a model with a variant that the layout does not know.
    """
    config = model.config
    layout = (
        "crate" if config.sparsifier == "ista" else "hf" if config.activation == "gelu" else "gpt"
    )
    free = ["vocab_size", "block_size", "n_layer", "n_head", "n_embd", "l1"] + ["bias"] * (
        layout == "gpt"
    )
    plain = Config(**{**LAYOUTS[layout][2], **{name: getattr(config, name) for name in free}})
    for f in fields(Config):
        if getattr(config, f.name) != getattr(plain, f.name):
            raise UserError(
                f"{f.name}={getattr(config, f.name)!r} has no place in a {layout} checkpoint, "
                f"which implies {getattr(plain, f.name)!r}; export a model without it."
            )
    theirs = {}
    for name, value in model.state_dict().items():
        key, transposed = _theirs(name, layout)
        theirs[key] = (value.T if transposed else value).contiguous()
    return {**theirs, "lm_head.weight": theirs["transformer.wte.weight"]}


def _theirs(name, layout):
    """(their key of our parameter `name`, whether it is stored transposed)."""
    table, transposed, _ = LAYOUTS[layout]
    if name.startswith("blocks."):
        _, i, part = name.split(".", 2)
        ours = next(ours for ours in table if part.startswith(ours))
        key = f"transformer.h.{i}.{table[ours]}{part[len(ours) :]}"
    else:
        stem, kind = name.split(".")
        key = f"transformer.{dict(tokens='wte', positions='wpe', norm='ln_f')[stem]}.{kind}"
    return key, key.startswith("transformer.h.") and key.endswith(transposed)


def _tidy(theirs, where):
    """Their tensors under plain names, without wrappers' prefixes, mask buffers, and the tied head's copy."""
    if not isinstance(theirs, dict) or not all(
        isinstance(value, torch.Tensor) for value in theirs.values()
    ):
        raise UserError(
            f"{where} holds no state_dict; expected tensors by name, or model=tensors by name."
        )
    tidy = {}
    for key, value in theirs.items():
        key = str(key).removeprefix("module.").removeprefix("_orig_mod.")
        if key.startswith(("wte.", "wpe.", "h.", "ln_f.")):  # Hugging Face's model without a head
            key = "transformer." + key
        if not key.endswith((".attn.bias", ".attn.masked_bias")):
            tidy[key] = value
    head = tidy.pop("lm_head.weight", None)
    if head is not None and not torch.equal(
        head.float(), tidy.get("transformer.wte.weight", head).float()
    ):
        raise UserError(
            f"{where} has a head of its own; only heads tied to the embedding can be imported."
        )
    return tidy


def _recognise(theirs, where):
    """(layout, Config fields that names and shapes tell)."""
    try:
        (vocab, d), context = (
            theirs["transformer.wte.weight"].shape,
            len(theirs["transformer.wpe.weight"]),
        )
        attn = theirs["transformer.h.0.attn.c_attn.weight"].shape
        crate = "transformer.h.0.ista.weight" in theirs
        h = (
            theirs[
                "transformer.h.0.ista.weight" if crate else "transformer.h.0.mlp.c_fc.weight"
            ].numel()
            // d
        )
    except (KeyError, ValueError, ZeroDivisionError):
        found = str([*theirs][:3])[1:-1] or "nothing"
        raise UserError(
            f"{where} is no CRATE-LM, nanoGPT or GPT-2 model: expected transformer.wte.weight"
            f" and so on, found {found}; of one of ours, give the folder."
        ) from None
    layout = "crate" if crate else "gpt" if attn == (3 * d, d) else "hf"
    if layout == "crate" and h != 4 * d:
        raise UserError(
            f"{where} has {h} codes at width {d}, expected {4 * d}: only models of "
            "crate_overcomplete.py can be imported, those of crate.py compute something else."
        )
    layers = {key.split(".")[2] for key in theirs if key.startswith("transformer.h.")}
    config = dict(
        vocab_size=vocab, block_size=context, n_layer=len(layers), n_embd=d, expansion=h // d
    )
    return layout, {**LAYOUTS[layout][2], **config, "bias": "transformer.ln_f.bias" in theirs}


def _open(path):
    """(content, facts) of a file or a Hugging Face folder; facts are what config.json tells."""
    facts = {}
    try:
        if path.is_dir():
            facts = json.loads((path / "config.json").read_bytes())
            for name, known in HF_FACTS.items():
                if facts.get(name, known) != known:
                    raise UserError(
                        f"{path}/config.json has {name}={facts[name]!r}; only GPT-2 with "
                        f"{known!r} can be imported."
                    )
            path = next(path / name for name in HF_FILES if (path / name).is_file())
        content = (
            _safetensors(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"Cannot read {path}: {error.strerror or error}; expected a checkpoint."
        ) from None
    except Exception as error:  # damaged files fail in any way inside torch, json and pickle
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise UserError(
                f"{path} would have to run code to load and was refused; where you trust it, "
                "save its tensors alone: torch.save(model.state_dict(), path)."
            ) from None
        advice = "give the folder that it is in" if path.suffix == ".json" else "fetch it again"
        raise UserError(f"{path} is damaged, truncated or no checkpoint; {advice}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a dict of tensors.")
    return content, {key: facts[key] for key in ("n_head",) if key in facts}


def _safetensors(path):
    """Tensors by name: 8 bytes of length, a JSON of dtypes, shapes and offsets, raw little-endian data."""
    with open(path, "rb") as file:
        table = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = bytearray(file.read())
    table.pop("__metadata__", None)
    return {
        name: torch.frombuffer(
            data, dtype=DTYPES[t["dtype"]], count=math.prod(t["shape"]), offset=t["data_offsets"][0]
        ).reshape(t["shape"])
        for name, t in table.items()
    }

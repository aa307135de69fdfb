"""What each format's folder holds; every writer returns (names of its files, how to open it).

config.json carries an entry "crate_mini" with our Config, the tokenizer's name and hash, and where
the model comes from, so that a folder read back is the same model to the bit.
"""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch

from crate_mini import UserError, __version__
from crate_mini.console import results
from crate_mini.console.results import atomic_write
from crate_mini.data.formats import END
from crate_mini.export import safetensors
from crate_mini.export.tokenizer_json import tokenizer_json
from crate_mini.model import LM
from crate_mini.training import checkpoint
from crate_mini.training.import_weights import export_foreign, fingerprint

MODELING = Path(__file__).with_name("modeling_crate_mini.py")
SETTINGS = ("model", "preset", "data", "text_field", "val_fraction", "seed")  # of training, kept
FACTS = ("step", "val_loss", "bits_per_byte", "best_val_loss", "corpus")
CARD = """---
library_name: transformers
pipeline_tag: text-generation
---
A model of crate_mini, {kind}. `python -m crate_mini.export` wrote this folder.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER{trust})
tokenizer = AutoTokenizer.from_pretrained(FOLDER{trust})
```
"""


def origin(model, meta):
    """The entry "crate_mini" of config.json."""
    training = meta["training"]
    settings = training.get("settings", {})
    kept = {name: training[name] for name in FACTS if name in training}
    kept["settings"] = {name: settings[name] for name in SETTINGS if name in settings}
    if not settings:
        del kept["settings"]
    return {
        "version": __version__,
        "commit": results.commit(),
        "command": results.command("-m", "crate_mini.export"),
        "config": asdict(model.config),
        "tokenizer": {name: meta["tokenizer"].get(name) for name in ("spec", "hash")},
        "training": kept,
        "sha256": meta.get("sha256"),
    }


def write_text(out, name, content):
    """Write a text, or a JSON-able dict, atomically; returns its name."""
    text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
    with atomic_write(out / name) as file:
        file.write(text.encode())
    return name


# ---- safetensors ---------------------------------------------------------------------------------


def plain(out, model, meta, tokenizer):
    """model.safetensors under our names, and config.json."""
    safetensors.write(out / "model.safetensors", model.state_dict())
    config = {"model_type": "crate_mini", "crate_mini": origin(model, meta)}
    files = ["model.safetensors", write_text(out, "config.json", config)]
    return files, f"safetensors.torch.load_file({str(out / 'model.safetensors')!r})"


# ---- Hugging Face --------------------------------------------------------------------------------


def hugging_face(out, model, meta, tokenizer):
    """A folder for AutoModelForCausalLM and, if the tokenizer is known, AutoTokenizer."""
    weights, config = as_gpt2(model)
    own_code = weights is None
    if own_code:
        weights, config = model.state_dict(), remote_code(model.config)
    if tokenizer is not None:
        config |= {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot}
    config["crate_mini"] = origin(model, meta)
    safetensors.write(out / "model.safetensors", weights)
    files = ["model.safetensors", write_text(out, "config.json", config)]
    if own_code:
        shutil.copyfile(MODELING, out / MODELING.name)
        files.append(MODELING.name)
    if tokenizer is not None:
        files += write_tokenizer(out, tokenizer, model.config.block_size)
    trust = ", trust_remote_code=True" if own_code else ""
    shape = f"{model.config.attention} and {model.config.sparsifier}"
    files.append(write_text(out, "README.md", CARD.format(kind=shape, trust=trust)))
    return files, f"AutoModelForCausalLM.from_pretrained({str(out)!r}{trust})"


def remote_code(c):
    """config.json of a model that brings its own code."""
    name = MODELING.stem
    return {
        "model_type": "crate_mini",
        "architectures": ["CrateMiniForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{name}.CrateMiniConfig",
            "AutoModelForCausalLM": f"{name}.CrateMiniForCausalLM",
        },
        "dtype": "float32",
        "use_cache": True,
        "vocab_size": c.vocab_size,
        "hidden_size": c.n_embd,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "max_position_embeddings": c.block_size,
    }


def as_gpt2(model):
    """(weights, config.json) of a twin that transformers' own GPT-2 computes; (None, None) else.

    Its activation is named in the config: relu, or gelu_new. Biases that the twin does not have
    are zero there.
    """
    c = model.config
    biased = replace(c, bias=True, activation="gelu")  # what GPT-2's layout implies
    with torch.device("meta"):
        layout = LM(biased)
    ours = model.state_dict()
    weights = {}
    for name, parameter in layout.state_dict().items():
        weights[name] = ours.get(name, torch.zeros(parameter.shape))
    try:
        layout.load_state_dict(weights, assign=True)
        theirs = export_foreign(layout, "hf")
    except (UserError, RuntimeError):  # a variant: key shift, top-k, mssa, ...
        return None, None
    del theirs["lm_head.weight"]  # tied
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new" if c.activation == "gelu" else c.activation,
        "vocab_size": c.vocab_size,
        "n_positions": c.block_size,
        "n_embd": c.n_embd,
        "n_layer": c.n_layer,
        "n_head": c.n_head,
        "layer_norm_epsilon": 1e-5,
        "dtype": "float32",
        "tie_word_embeddings": True,
    }
    return theirs, config | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)


def write_tokenizer(out, tokenizer, context):
    """tokenizer.json and tokenizer_config.json; returns their names."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    names = {"tokenizer.json": tokenizer_json(tokenizer), "tokenizer_config.json": config}
    return [write_text(out, name, content) for name, content in names.items()]


# ---- nanoGPT and CRATE-LM ------------------------------------------------------------------------


def nanogpt(out, model, meta, tokenizer):
    """ckpt.pt: the weights by nanoGPT's names for the twin, by CRATE-LM's for CRATE."""
    c = model.config
    layout = "crate" if c.sparsifier == "ista" else "gpt"
    try:
        weights = export_foreign(model, layout)
    except UserError as error:
        reason = str(error).partition(";")[0]
        raise UserError(f"{reason}; write it with --to safetensors or --to hf.") from None
    training = meta["training"]
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")
    config = {"activation": c.activation} if layout == "gpt" else {}
    content = {
        "model": weights,
        "model_args": {**{name: getattr(c, name) for name in names}, "dropout": 0.0},
        "iter_num": training.get("step", 0),
        "best_val_loss": training.get("best_val_loss") or 0.0,
        "config": config,
    }
    checkpoint.write_tensors(out / "ckpt.pt", content)
    project = "nanoGPT's (within 5e-4: its GELU is exact)"
    if layout == "crate" or c.activation == "relu":  # nanoGPT's own model has GELU
        project = "CRATE-LM's"
    return ["ckpt.pt"], f"{project} sample.py --init_from=resume --out_dir={out}"


# ---- autoencoders --------------------------------------------------------------------------------


def saelens(out, sae, facts, model):
    """sae_weights.safetensors and cfg.json, as SAELens 6 writes them."""
    weights = {"W_enc": sae.E, "W_dec": sae.W, "b_enc": sae.c, "b_dec": sae.b}
    safetensors.write(out / "sae_weights.safetensors", weights)
    config = {
        "architecture": "topk" if sae.k else "standard",
        "d_in": sae.b.numel(),
        "d_sae": sae.c.numel(),
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.0.0",  # whose layout this is
            "model_name": "crate_mini",
            "hook_name": f"blocks.{sae.layer}.sparsifier.code",
            "hook_layer": sae.layer,
            "context_size": model.config.block_size,
            "crate_mini": {
                "model": fingerprint(model),
                "name": sae.name,
                "sha256": facts["sha256"],
            },
        },
    }
    if sae.k:
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    files = ["sae_weights.safetensors", write_text(out, "cfg.json", config)]
    return files, f"sae_lens.SAE.load_from_disk({str(out)!r})"


WRITERS = {"safetensors": plain, "hf": hugging_face, "nanogpt": nanogpt, "saelens": saelens}

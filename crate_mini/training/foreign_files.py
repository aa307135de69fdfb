"""Files in which other projects keep weights: torch.save, safetensors, Hugging Face folders.

A Hugging Face folder holds config.json and the weights in one file or in several parts, named
NAME-00001-of-00002 and so on, often with an index. A config.json next to a single file is read
too: it may name the number of heads, "n_head", and the "activation", which weights do not show.
"""

import json
import math
import os
import pickle
import re
from contextlib import contextmanager
from pathlib import Path

import torch

from crate_mini import UserError
from crate_mini.console.results import open_plain, read_bytes

FILES = ("model.safetensors", "pytorch_model.bin")
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors|\.bin)")
# Values that config.json of a Hugging Face model must have, if it names them.
GPT2_CONFIG = {
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}
ACTIVATIONS = {"gelu_new": "gelu", "relu": "relu"}  # Hugging Face's names for ours
HEAD_NAMES = ("n_head", "num_attention_heads")
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_SAFETENSORS_HEADER = 100_000_000  # bytes, by the specification


def is_foreign(path):
    """Whether this path is for `read`: any file, or a folder with Hugging Face's names."""
    if os.path.isfile(path):  # unlike Path.is_file, no error for a name that is too long
        return True
    names = os.listdir(path) if os.path.isdir(path) else []
    return any(name in FILES or _is_index(name) or PART.fullmatch(name) for name in names)


def _is_index(name):
    return name.removesuffix(".index.json") in FILES and name not in FILES


def read(path):
    """(content, facts) of a file or a folder.

    content: a dict, as torch.save got it or of tensors by name. facts: what config.json tells about
    the model, of "n_head" and "activation". Raises UserError for anything that cannot be read.
    """
    if path.is_file() and _is_index(path.name):
        path = path.parent
    if path.is_file() and PART.fullmatch(path.name):
        raise UserError(
            f"{path} holds a part of the weights; give the folder of all parts, {path.parent}."
        )
    is_folder = path.is_dir()
    folder = path if is_folder else path.parent
    facts = _facts(folder / "config.json", must_exist=is_folder)
    if not is_folder:
        return _content(path), facts
    return _all_parts(folder), facts


# ---- config.json ---------------------------------------------------------------------------------


def _facts(path, must_exist):
    """What a config.json tells of "n_head" and "activation". Raises UserError for other models."""
    if not must_exist and not path.is_file():
        return {}
    with _refusing(path, "repair it, or move it away if it belongs to another model"):
        config = json.loads(read_bytes(path))
        if not isinstance(config, dict):
            raise ValueError
    if not must_exist and "format" in config and "files" in config:
        return {}  # of a checkpoint of crate_mini
    if isinstance(config.get("crate_mini"), dict):
        return {"crate_mini": config["crate_mini"]}  # of `python -m crate_mini.export`
    for name, expected in GPT2_CONFIG.items():
        if config.get(name, expected) != expected:
            raise UserError(
                f"{path} has {name}={config[name]!r}; only GPT-2 with {expected!r} can be imported."
            )
    facts = named_facts(config, path)
    activation = config.get("activation_function", "gelu_new")
    if activation not in tuple(ACTIVATIONS):  # it may be anything, even a list
        raise UserError(
            f"{path} has activation_function={activation!r}; only GPT-2 with gelu_new or relu can "
            "be imported."
        )
    if "activation_function" in config:
        facts["activation"] = ACTIVATIONS[activation]
    return facts


def named_facts(config, place):
    """The entries "n_head" and "activation" of a dict of settings, which may hold anything."""
    facts = {}
    for name in HEAD_NAMES:
        value = config.get(name)
        if value is None:
            continue
        if type(value) is not int or value < 1:
            raise UserError(f"{place} has {name}={value!r}; expected a number of heads, like 12.")
        facts.setdefault("n_head", value)
    activation = config.get("activation")
    if activation in ("relu", "gelu"):
        facts["activation"] = activation
    elif activation is not None:
        raise UserError(f"{place} has activation={activation!r}; expected relu or gelu.")
    return facts


# ---- weights -------------------------------------------------------------------------------------


def _all_parts(folder):
    """The weights in a Hugging Face folder, of however many files."""
    for name in FILES:
        if (folder / name).exists():
            return _content(folder / name)
    for name in FILES:
        index = folder / f"{name}.index.json"
        if index.exists():
            return _indexed(index)
    parts = [match for match in map(PART.fullmatch, sorted(os.listdir(folder))) if match]
    stem, _, count, suffix = parts[0].groups()
    names = [f"{stem}-{number:05d}-of-{count}{suffix}" for number in range(1, int(count) + 1)]
    return _joined(folder, names)


def _indexed(index):
    """The weights that an index names, from the files next to it."""
    with _refusing(index):
        files = json.loads(read_bytes(index))["weight_map"]
        names = sorted(set(files.values()))
        if any(Path(name).name != name for name in names):
            raise ValueError
    content = _joined(index.parent, names)
    for name in files:
        if name not in content:
            raise UserError(f"{index} names {name}, which {files[name]} lacks; download it again.")
    return content


def _joined(folder, names):
    """The tensors of several files together."""
    content = {}
    for name in names:
        path = folder / name
        if not path.exists():
            raise UserError(f"{path} is missing, one of {len(names)} parts; download it.")
        for key, value in _content(path).items():
            if key in content:
                raise UserError(f"{path} holds {key}, as another part does; download them again.")
            content[key] = value
    return content


def _content(path):
    """The dict in one file of weights. Raises UserError."""
    advice = "give the folder that holds it" if path.suffix == ".json" else "download it again"
    with _refusing(path, advice):
        if path.suffix == ".safetensors":
            content = _safetensors(path)
        else:
            with open_plain(path) as file:
                content = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a dict of tensors.")
    return content


def _safetensors(path):
    """Tensors by name: 8 bytes of length, a JSON of dtypes, shapes and offsets, raw data.

    Raises ValueError where the data of the tensors do not follow one another from the first byte
    to the last, as the specification demands: an overlap would share the memory of two tensors.
    """
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        header_length = int.from_bytes(file.read(8), "little")
        if header_length > min(size - 8, MAX_SAFETENSORS_HEADER):
            raise ValueError
        header = json.loads(file.read(header_length), object_pairs_hook=_dict_without_repeats)
        data = bytearray(size - 8 - header_length)
        file.readinto(data)
    header.pop("__metadata__", None)
    tensors, following = {}, 0
    for name, entry in sorted(header.items(), key=_data_offsets):
        dtype = SAFETENSORS_DTYPES[entry["dtype"]]
        begin, end = entry["data_offsets"]
        count = math.prod(map(_natural, entry["shape"]))
        if (begin, end) != (following, following + count * dtype.itemsize):
            raise ValueError
        flat = torch.empty(0, dtype=dtype)
        if count:  # torch refuses an empty buffer
            flat = torch.frombuffer(data, dtype=dtype, count=count, offset=begin)
        tensors[name] = flat.reshape(entry["shape"])
        following = end
    if following != len(data):
        raise ValueError
    return tensors


def _data_offsets(item):
    """The offsets of one (name, entry) of a safetensors header."""
    begin, end = item[1]["data_offsets"]
    return _natural(begin), _natural(end)


def _natural(number):
    """The number, if it is an int from 0 on; raises ValueError otherwise, also for True."""
    if type(number) is not int or number < 0:
        raise ValueError
    return number


def _dict_without_repeats(pairs):
    """The dict of a JSON object. Raises ValueError if it names a key twice."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError
    return dict(pairs)


@contextmanager
def _refusing(path, advice="download it again"):
    """A context in which a file is read: whatever fails becomes a UserError that names it.

    advice: what to do about a damaged file. These fail in any way inside torch, json and pickle.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"Cannot read {path}: {error.strerror or error}; expected a checkpoint."
        ) from None
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise UserError(
                f"{path} would run code when loaded, so it was refused; if you trust it, save its "
                "tensors alone: torch.save(model.state_dict(), path)."
            ) from None
        raise UserError(f"{path} is damaged, truncated or not a checkpoint; {advice}.") from None

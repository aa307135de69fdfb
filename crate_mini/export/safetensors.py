"""The safetensors format: 8 bytes of length, a JSON of dtypes, shapes and offsets, raw data.

training/foreign_files.py reads it. Source: the format's specification in its README.
"""

import json

import torch

from crate_mini import UserError
from crate_mini.console.results import atomic_write
from crate_mini.training.foreign_files import SAFETENSORS_DTYPES

NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
ALIGNMENT = 8  # bytes; the header is padded with spaces, so that the data can be mapped


def write(path, tensors, metadata=None):
    """Write {name: tensor} to `path`, atomically, little-endian.

    metadata: {text: text}. Raises UserError for a dtype that the format here does not have.
    """
    header = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise UserError(
                f"{name} is {tensor.dtype}; expected one of {', '.join(NAMES.values())}."
            )
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, ensure_ascii=True).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors.values():
            data = tensor.detach().cpu().contiguous().flatten()
            file.write(data.view(torch.uint8).numpy().tobytes())

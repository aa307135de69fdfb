"""Estimates of memory and speed: about right, or None; never a guess."""

import pytest
import torch

from crate_mini import UserError, model
from crate_mini.training import device


@pytest.mark.parametrize(
    "change",
    [
        dict(kind="crate"),
        dict(kind="gpt2"),
        dict(kind="crate+", ista_steps=4),
        dict(kind="gpt2", expansion=8),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_bytes_are_about_right(change, dtype):
    """Against what autograd keeps, without the weights and the head's gradients."""
    config = model.preset("3L", n_embd=64, vocab_size=64, block_size=32, **change)
    lm, kept = model.LM(config), {}
    weights = {w.untyped_storage().data_ptr() for w in lm.parameters()}

    def keep(t):
        address = t.untyped_storage().data_ptr()
        if address not in weights:
            kept[address] = t  # alive, so that no address comes twice
        return t

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), autocast:
        lm.trunk(torch.zeros(32, 32, dtype=torch.long))
    measured = sum(t.untyped_storage().nbytes() for t in kept.values())
    assert 0.7 < device.activation_bytes(config, 32, dtype) / measured < 1.3


def test_a_batch_that_cannot_fit_is_refused(monkeypatch):
    config = model.preset("3L", "crate")
    monkeypatch.setattr(device, "total_memory", lambda where: 2**30)
    device.check_memory(config, 8, torch.device("cpu"), torch.float32)
    with pytest.raises(UserError, match="for activations.*lower --micro-batch"):
        device.check_memory(config, 1000, torch.device("cpu"), torch.float32)


def test_peaks_are_not_guessed():
    assert device.peak_flops(torch.device("mps"), torch.float32)[0] is None
    assert device.peak_flops(torch.device("cpu"), torch.float32)[0] > 1e8


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA L40", None),
        ("NVIDIA A10G", None),
        ("NVIDIA RTX A1000 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_the_table_of_peaks_knows_names_exactly(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda where: name)
    assert device.peak_flops(torch.device("cuda"), torch.bfloat16)[0] == peak

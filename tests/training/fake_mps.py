"""A device like Apple's MPS, which has no float64: CPU tensors that say they live on `mps`.

    with fake_mps():
        torch.zeros(2, device="mps").double()  # TypeError, as there

Anything computed of such a tensor is one; `.cpu()` and `.to("cpu")` make it an ordinary one. What
it cannot show: kernels of MPS, and tensors of two devices in one operation.
"""

import contextlib
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

MPS = torch.device("mps")


class OnMps(torch.Tensor):
    """A tensor of the fake device."""

    def __format__(self, spec):
        return format(self.item(), spec)


def is_mps(device):
    return isinstance(device, str | torch.device) and torch.device(device).type == "mps"


def on_cpu(tensor):
    return tensor.as_subclass(torch.Tensor) if type(tensor) is OnMps else tensor


def moved(tensor, *words, device=None, dtype=None, **_):
    """Tensor.to: a device and a dtype as words or keywords, or those of another tensor."""
    for word in words:
        if isinstance(word, torch.Tensor):
            device, dtype = ("mps" if type(word) is OnMps else "cpu"), word.dtype
        elif isinstance(word, torch.dtype):
            dtype = word
        elif isinstance(word, str | torch.device):
            device = word
    result = tensor if dtype is None else tensor.to(dtype)
    if device is None:
        return result
    return result.as_subclass(OnMps) if is_mps(device) else on_cpu(result)


def refuse_float64(result):
    """TypeError if a result is float64 on the fake device."""
    several = result if isinstance(result, tuple | list) else [result]
    for tensor in several:
        if type(tensor) is OnMps and tensor.dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework "
                "doesn't support float64. Please use float32 instead."
            )
    return result


class FakeMps(TorchFunctionMode):
    """Answers for the device, and passes on the rest."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if function is torch.Tensor.to:
            return refuse_float64(moved(*args, **kwargs))
        if is_mps(kwargs.get("device")):
            result = function(*args, **{**kwargs, "device": "cpu"})
            return refuse_float64(result.as_subclass(OnMps))
        if type(first) is OnMps:
            if function is torch.Tensor.cpu:
                return on_cpu(first)
            if function is torch.Tensor.numpy:
                raise TypeError("can't convert mps:0 device type tensor to numpy.")
            if function == torch.Tensor.device.__get__:
                return MPS
            if function == torch.Tensor.is_cpu.__get__:
                return False
        return refuse_float64(function(*args, **kwargs))


class Generator(torch.Generator):
    """torch.Generator, of the CPU for the fake device."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu" if is_mps(device) else device)


@contextlib.contextmanager
def fake_mps():
    """In the block there is a device `mps`, and modules can be sent to it."""
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with mock.patch.object(torch, "Generator", Generator), FakeMps():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)

"""Inputs for the CUDA kernels: random cases, and one run through every kernel and version."""

import torch
from hypothesis import strategies as st

# Around tiles, vectors and warps.
SIZES = [0, 1, 2, 7, 8, 15, 17, 31, 32, 33, 63, 64, 65, 96, 127, 129, 136]


class Case:
    """Random inputs of one example. Making one also sets the device's schedule and alignment."""

    def __init__(self, device, N, d, h, dtype, version, seed, shift=0):
        self.N, self.dtype = N, dtype
        self.d, self.h = d, h
        self.random = torch.Generator().manual_seed(seed)
        device.schedule(seed)
        device.version = version
        device.shift = shift

    def normal(self, *shape, scale=1.0, dtype=None):
        values = torch.randn(*shape, generator=self.random) * scale
        return values.to(dtype or self.dtype)

    def ista(self, lam_is_a_tensor):
        """x (N, d), D (d, h), lam."""
        lam = 0.1
        if lam_is_a_tensor:
            lam = 0.2 * torch.rand(self.h, generator=self.random)
        x = self.normal(self.N, self.d)
        return x, self.normal(self.d, self.h, scale=max(self.d, 1) ** -0.5), lam


@st.composite
def cases(draw):
    """Arguments of Case after the device. Version 3 twice as often: it ships for bf16."""
    sizes = [draw(st.sampled_from(SIZES)) for _ in range(3)]
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float32]))
    version = draw(st.sampled_from([3, 1, 2, 3]))
    seed = draw(st.integers(0, 2**31))
    shift = draw(st.sampled_from([0, 0, 1]))
    return *sizes, dtype, version, seed, shift


def run_everything(device, seed, sizes=(70, 40, 72), shift=0):
    """Run every kernel in every version once; returns all outputs. Sizes suit 16-byte accesses."""
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(device, *sizes, dtype, 0, seed=5, shift=shift)
        device.schedule(seed)
        x, D, lam = case.ista(lam_is_a_tensor=False)
        gy, ga = case.normal(case.N, case.d), case.normal(case.N, case.h)
        rows, vector = case.normal(3, case.d), case.normal(case.d).float()
        U = case.normal(case.d, case.d, scale=case.d**-0.5)
        for device.version in (1, 2, 3) if dtype == torch.bfloat16 else (1, 2):
            y, a, *trails = device.ista(x, D, 0.5, lam, 2)
            outputs += [y, a, *trails]
            outputs += device.ista_backward(gy, None, x, D, 0.5, None, a, *trails)
            outputs += device.ista_backward(None, ga, x, D, 0.5, None, a, *trails)
            outputs += device.ista(x, D, 0.5, lam, 1)[:2]
            outputs.append(device.mssa(x.float(), vector, None, U))
            outputs += device.mssa_backward(gy, x.float(), vector, vector, U)
        outputs += device.ista_decode(rows, D, 0.5, lam, 2)
    return [t for t in outputs if t is not None]

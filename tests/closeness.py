"""How close is close enough: the one tolerance policy of all tests of kernels and gradients.

A kernel is compared with its equation in float64, on inputs as rounded to the kernel's dtype, so
that only its own error counts. It may err FACTOR times as much as two errors that are legitimate in
that dtype: the error of plain PyTorch, and the change of the float64 result when the inputs change
by their own rounding. (PyTorch alone could be exact by luck, which happens often for small
tensors, and make the bound absurdly tight.) Sums are kept in float or double; where that is also
the type of the result, one sequential sum of n terms drifts sqrt(n) times as far as with jittered
inputs, and so does what is left of terms that cancel. No test has its own tolerance.

Codes pass a threshold, and in low precision a code near zero may fall on either side of it (0.05 %
do in bf16). Comparing values is safe, because ReLU is continuous; supports are never compared, and
gradients are compared on the support that the forward pass chose.
"""

import torch

FACTOR = 4  # times the legitimate error
ULPS = 4  # roundings of the largest value


def assert_close(results, equation, *inputs, names=None, draws=None, terms=()):
    """Compare tensors with `equation(*inputs)`, which takes any dtype and returns as many tensors.

    A result of None is skipped. NaN and infinities must be where the equation in the inputs' dtype
    has them. draws: how often inputs are jittered; by default more often if an output has few
    values, since all of those may be lucky. terms: {number of an output: size of the large terms
    that cancel in it}.
    """
    exact = equation(*_in_double(inputs))
    plain = equation(*inputs)
    if draws is None:
        counts = [t.count_nonzero() for t, result in zip(exact, results) if result is not None]
        draws = 8 if min(counts, default=0) < 100 else 2
    generator = torch.Generator().manual_seed(0)
    jittered = [equation(*_in_double(inputs, generator)) for _ in range(draws)]
    sizes = [n for t in inputs if isinstance(t, torch.Tensor) for n in t.shape]
    longest_sum = max(sizes, default=1)
    for i, result in enumerate(results):
        if result is None:
            continue
        label = f"{names[i] if names else f'output {i}'} {tuple(result.shape)} {result.dtype}"
        moved = [values[i] for values in jittered]
        cancelled = dict(terms).get(i, 0)
        _assert_one_close(label, result, exact[i], plain[i], moved, longest_sum, cancelled)


def _assert_one_close(label, result, exact, plain, moved, longest_sum, cancelled):
    """One output against its equation in float64, in its own dtype, and with jittered inputs."""
    value, plain = result.detach().cpu(), plain.detach().cpu()
    assert value.shape == exact.shape, f"{label}: expected shape {tuple(exact.shape)}"
    assert _same_non_finite(value, plain), f"{label}: NaN or infinity in the wrong places"
    finite = plain.isfinite() & exact.isfinite()
    if not finite.any():
        return
    exact, plain, value = (t[finite].double() for t in (exact, plain, value))
    others = [plain, *(t[finite] for t in moved)]
    legitimate = max((t - exact).abs().max() for t in others)
    eps = torch.finfo(result.dtype).eps
    drift = 1 if eps > 1e-4 else max(1, longest_sum**0.5 / 4)
    if result.dtype == torch.float64:
        legitimate *= 2  # the equation has no wider type, and errs as much as the kernel
    largest = max(exact.abs().max(), 2 * drift * cancelled)  # equal terms drift together
    bound = FACTOR * drift * legitimate + ULPS * eps * largest
    error, index = (value - exact).abs().max(0)
    assert error <= bound, (
        f"{label}: error {error:.3g} exceeds {bound:.3g} (got {value[index]:.6g}, exact "
        f"{exact[index]:.6g}, PyTorch {plain[index]:.6g}; finite element {index})"
    )


def _in_double(values, jitter=None):
    """Floating tensors as float64; jitter, a generator, moves elements by up to their rounding."""
    return [_as_double(value, jitter) for value in values]


def _as_double(value, jitter):
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    wide = value.detach().double().cpu()
    if jitter is None:
        return wide
    noise = torch.empty_like(wide).uniform_(-1, 1, generator=jitter)
    return wide * (1 + torch.finfo(value.dtype).eps * noise)


def _same_non_finite(left, right):
    """NaN and infinities in the same places, with the same signs."""
    return torch.equal(_non_finite(left), _non_finite(right))


def _non_finite(t):
    zeros = torch.where(t.isfinite(), 0.0, t.double())
    return zeros.nan_to_num(nan=7e77, posinf=8e88, neginf=-8e88)

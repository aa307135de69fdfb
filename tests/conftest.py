"""What all tests share: how close is close enough, guarded memory, hypothesis profiles, fuzzing by minutes.

The tolerance policy, in one place (`assert_close`). A kernel is judged against the equation in float64, on
inputs as rounded to the kernel's dtype, so that only its own error counts. It may err as much as two things
that are legitimate in that dtype, times FACTOR: the error of plain PyTorch, and how far the float64 result
moves when the inputs move by their own rounding. The second keeps a lucky PyTorch (small tensors often hit
exactly) from making the bound absurd. Sums are kept in float or double: where that is also the result's type,
one sum of n terms in a row drifts sqrt(n) times as far as inputs jitter. No test has a number of its own.

Codes pass through a threshold, and a code near zero may fall on either side of it in low precision (0.05 % do
in bf16). Values are compared, which is safe because ReLU is continuous; supports never are; gradients are
compared on the support that the forward pass chose.

    python -m pytest                      the fixed examples of CI
    python -m pytest --fuzz-minutes 10    random examples for ten minutes; a failure prints how to repeat it
"""

import itertools
import os
import time
from importlib import util

import hypothesis
import pytest
import torch
from hypothesis import settings

from crate_mini._stamp import source_stamp

FACTOR, ULPS = 4, 4  # of legitimate errors, and of the largest value's own rounding
GUARD = int(os.environ.get("CRATE_GUARD", 64))  # elements on both sides of a guarded tensor

QUIET = dict(deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck))
settings.register_profile("ci", derandomize=True, max_examples=25, **QUIET)
settings.register_profile("brief", derandomize=True, max_examples=6, **QUIET)
settings.register_profile("fuzz", print_blob=True, max_examples=100, **QUIET)
settings.load_profile("ci")
torch.set_num_threads(1)  # tensors are small here: threads cost more than they give


# ---- closeness -------------------------------------------------------------------------------------------


def _double(values, jitter=None):
    """Floating tensors as float64; jitter (a generator) moves each element by up to its dtype's rounding."""

    def one(t):
        if not isinstance(t, torch.Tensor) or not t.is_floating_point():
            return t
        wide, eps = t.detach().double().cpu(), torch.finfo(t.dtype).eps
        if jitter is not None:
            wide = wide * (1 + eps * torch.empty_like(wide).uniform_(-1, 1, generator=jitter))
        return wide

    return [one(t) for t in values]


def _same_odd(got, own):
    """NaN and infinities in the same places, with the same signs."""

    def odd(t):
        return torch.where(t.isfinite(), 0.0, t.double()).nan_to_num(
            nan=7e77, posinf=8e88, neginf=-8e88
        )

    return torch.equal(odd(got), odd(own))


def assert_close(got, equation, *inputs, names=None, draws=None, terms=()):
    """Hold tensors `got` to `equation(*inputs)`, a function of tensors in any dtype that returns as many.

    None in `got` is an output that was not asked for. NaN and infinities must appear exactly where the
    equation in the inputs' own dtype has them. draws: how often inputs are jittered to see what moves; more
    often where an output has few values that can move, because then all of them may be lucky. terms: for an
    output (by its number) in which large terms cancel by construction, how large they are.
    """
    jitter = torch.Generator().manual_seed(0)
    exact, plain = equation(*_double(inputs)), equation(*inputs)
    few = min((t.count_nonzero() for t, out in zip(exact, got) if out is not None), default=0) < 100
    moved = [equation(*_double(inputs, jitter)) for _ in range(draws or (8 if few else 2))]
    longest = max((n for t in inputs if isinstance(t, torch.Tensor) for n in t.shape), default=1)
    for i, out in enumerate(got):
        if out is None:
            continue
        name = f"{names[i] if names else f'output {i}'} {tuple(out.shape)} {out.dtype}".replace(
            "torch.", ""
        )
        want, own, value = exact[i], plain[i].detach().cpu(), out.detach().cpu()
        assert value.shape == want.shape, f"{name}: expected shape {tuple(want.shape)}"
        assert _same_odd(value, own), f"{name}: NaN or infinity in the wrong places"
        fine = own.isfinite() & want.isfinite()
        if not fine.any():
            continue
        want, own, value = want[fine], own[fine].double(), value[fine].double()
        legitimate = max((t - want).abs().max() for t in (own, *(m[i][fine] for m in moved)))
        eps = torch.finfo(out.dtype).eps
        drift = 1 if eps > 1e-4 else max(1, longest**0.5 / 4)
        bound = FACTOR * drift * legitimate + ULPS * eps * max(
            want.abs().max(), dict(terms).get(i, 0)
        )
        error, at = (value - want).abs().max(0)
        assert error <= bound, (
            f"{name}: error {error:.3g} exceeds {bound:.3g} (got {value[at]:.6g}, exact "
            f"{want[at]:.6g}, PyTorch {own[at]:.6g}; element {at} of the finite ones)"
        )


# ---- memory ----------------------------------------------------------------------------------------------


class Guarded:
    """A contiguous tensor between two bands of NaN: reads beyond it spoil results, writes beyond it are seen.

    Guarded(shape, dtype) is an output, poisoned with NaN: an element nobody writes stays NaN.
    Guarded.copy(t) is an input: `check` also sees whether it was written to.
    """

    def __init__(self, shape, dtype, device="cpu"):
        size = 1
        for n in shape:
            size *= n
        self.memory = torch.full((size + 2 * GUARD,), float("nan"), dtype=dtype, device=device)
        self.tensor = self.memory[GUARD : GUARD + size].view(shape)
        self.original = None

    @classmethod
    def copy(cls, t):
        guarded = cls(t.shape, t.dtype, t.device)
        guarded.tensor.copy_(t)
        guarded.original = t.clone()
        return guarded

    @property
    def pointer(self):
        return self.tensor.data_ptr()

    def check(self, name):
        end = GUARD + self.tensor.numel()
        for band, where in ((self.memory[:GUARD], "before"), (self.memory[end:], "after")):
            assert band.isnan().all(), f"{name}: written {where} its memory"
        if self.original is not None:
            assert torch.equal(
                self.tensor.nan_to_num(nan=7e37), self.original.nan_to_num(nan=7e37)
            ), f"{name}: an input was changed"


# ---- which backend, which device -------------------------------------------------------------------------


def load_extension(path=None):
    """The compiled module: this checkout's, or another file (builds with faults or sanitizers); or None."""
    try:
        if path is None:
            from crate_mini import _C

            return _C
        spec = util.spec_from_file_location("planted._C", path)
        module = util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except ImportError:
        return None


@pytest.fixture(scope="session")
def extension():
    """The module under test: CRATE_TEST_MODULE if set, else crate_mini._C.

    If there is none, tests are skipped, except where CRATE_REQUIRE_FUSED=1 says that it must be there (CI).
    """
    module = load_extension(os.environ.get("CRATE_TEST_MODULE"))
    if module is None:
        message = (
            "crate_mini._C is not compiled: run `pip install -e .` (with -v it says why it was not)"
        )
        (pytest.fail if os.environ.get("CRATE_REQUIRE_FUSED") == "1" else pytest.skip)(message)
    if "CRATE_TEST_MODULE" not in os.environ and module.build_info()["stamp"] not in (
        "",
        source_stamp(),
    ):
        pytest.fail(
            "crate_mini._C was compiled from other sources than these: run `pip install -e .`"
        )
    return module


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")
    parser.addoption(
        "--fuzz-minutes",
        type=float,
        default=0,
        metavar="N",
        help="run only the fuzz tests, on new random examples, for N minutes",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "fuzz: property-based; what --fuzz-minutes repeats")
    if config.getoption("--fuzz-minutes"):
        settings.load_profile("fuzz")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--fuzz-minutes"):
        items[:] = [item for item in items if "fuzz" in item.keywords]
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: give --slow"))


def pytest_runtestloop(session):
    """With --fuzz-minutes: rounds over the fuzz tests, each with a new seed, until time or luck ends."""
    minutes, config = session.config.getoption("--fuzz-minutes"), session.config
    if not minutes or not session.items or config.option.collectonly:
        return None
    end, seed = time.monotonic() + 60 * minutes, time.time_ns() % 2**32
    for config.rounds in itertools.count(1):
        hypothesis.core.global_force_seed = seed + config.rounds
        for item, following in zip(session.items, session.items[1:] + session.items[:1]):
            config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.testsfailed:
                config.repeat = f'"{item.nodeid}" --hypothesis-seed={seed + config.rounds}'
                raise session.Failed("stopped at the first failure")
            if time.monotonic() > end:
                return True


def pytest_terminal_summary(terminalreporter, config):
    if hasattr(config, "rounds"):
        command = "repeat with: python -m pytest --hypothesis-profile=fuzz"
        found = f"{command} {config.repeat}" if hasattr(config, "repeat") else "no failure"
        terminalreporter.line(f"fuzzed in {config.rounds} rounds; {found}")

"""Options, hypothesis profiles and fixtures of all tests.

python -m pytest                      the fixed examples of CI, on two cores if there are two
python -m pytest --workers 1          everything in one process
python -m pytest --fuzz-minutes 10    new random examples for ten minutes; a failure prints the
                                      command that repeats it
"""

import itertools
import os
import shlex
import shutil
import tempfile
import time

# Before torch: a thread of OpenMP that waits must not keep a core from the other tests.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Before numpy: a process with another thread, even one of OpenBLAS that waits, is not forked.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# isort: split
import background_builds
import hypothesis
import pytest
import side_by_side
import torch
from compiled import load_extension
from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir

from crate_mini._stamp import source_stamp

CHECKS = list(hypothesis.HealthCheck)
COMMON = dict(deadline=None, database=None, suppress_health_check=CHECKS)
settings.register_profile("ci", derandomize=True, max_examples=25, **COMMON)
settings.register_profile("brief", derandomize=True, max_examples=6, **COMMON)
settings.register_profile("fuzz", print_blob=True, max_examples=100, **COMMON)
settings.load_profile("ci")
STORAGE = tempfile.mkdtemp(prefix="hypothesis-")  # not in the working folder
set_hypothesis_home_dir(STORAGE)
os.environ.setdefault("MPLCONFIGDIR", STORAGE)  # matplotlib's cache: not in the home folder
os.environ.setdefault("HF_MODULES_CACHE", STORAGE)  # code that comes with a model: the same
OWNER = os.getpid()  # tests fork processes that share what is cleared up at the end
torch.set_num_threads(1)  # tensors are small here: threads cost more than they save


@pytest.fixture(scope="session")
def extension():
    """The module under test: CRATE_TEST_MODULE if set, else crate_mini._C.

    Without one, tests are skipped, unless CRATE_REQUIRE_FUSED=1 (CI) demands it.
    """
    path = os.environ.get("CRATE_TEST_MODULE")
    module = load_extension(path)
    if module is None:
        message = "crate_mini._C is not compiled: run `pip install -v -e .` to see why"
        if os.environ.get("CRATE_REQUIRE_FUSED") == "1":
            pytest.fail(message)
        pytest.skip(message)
    if path is None and module.build_info()["stamp"] not in ("", source_stamp()):
        pytest.fail("crate_mini._C was compiled from other sources: run `pip install -e .`")
    return module


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")
    parser.addoption(
        "--workers",
        type=int,
        default=min(2, os.cpu_count() or 1),
        metavar="N",
        help="run the tests of different files in N processes (default 2 on two cores)",
    )
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
        items[:] = [item for item in items if item.get_closest_marker("fuzz")]
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: give --slow"))
    items.sort(key=background_builds.order)


def pytest_collection_finish(session):
    """Start compiling what the selected tests will need, while the first of them run."""
    if not session.config.option.collectonly:
        background_builds.start(session.items)


def pytest_unconfigure():
    if os.getpid() == OWNER:
        background_builds.stop()
        shutil.rmtree(STORAGE, ignore_errors=True)


def pytest_runtestloop(session):
    """Run the tests side by side, or with --fuzz-minutes the fuzz tests again and again."""
    config = session.config
    if not session.items or config.option.collectonly:
        return None
    if config.getoption("--fuzz-minutes"):
        return fuzz(session, config.getoption("--fuzz-minutes"))
    workers = config.getoption("--workers")
    if workers < 2 or config.option.usepdb or not side_by_side.can_fork():
        return None
    config.processes = workers
    side_by_side.run(session, workers)
    return True


def fuzz(session, minutes):
    """Run the tests until one fails or time is up, each round with a new seed."""
    config = session.config
    end = time.monotonic() + 60 * minutes
    seed = time.time_ns() % 2**32
    following = session.items[1:] + session.items[:1]
    for config.rounds in itertools.count(1):
        hypothesis.core.global_force_seed = seed + config.rounds
        for item, next_item in zip(session.items, following):
            config.hook.pytest_runtest_protocol(item=item, nextitem=next_item)
            if session.testsfailed:
                # The same files, because hypothesis draws from the constants of loaded modules.
                selection = [*config.args, "-k", item.originalname]
                config.repeat = f"{shlex.join(selection)} --hypothesis-seed={seed + config.rounds}"
                raise session.Failed("stopped at the first failure")
            if time.monotonic() > end:
                return True


def pytest_terminal_summary(terminalreporter, config):
    if hasattr(config, "processes"):
        terminalreporter.line(f"tests ran in {config.processes} processes")
    if not hasattr(config, "rounds"):
        return
    outcome = "no failure"
    if hasattr(config, "repeat"):
        command = "python -m pytest --hypothesis-profile=fuzz"
        outcome = f"repeat with: {command} {config.repeat}"
    terminalreporter.line(f"fuzzed in {config.rounds} rounds; {outcome}")

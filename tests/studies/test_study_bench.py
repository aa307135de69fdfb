"""The benchmark: every version computes ISTA, and the table that is printed is kept."""

import re
import sys
import time
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from crate_mini import fused
from crate_mini.console import results
from crate_mini.studies import __main__ as studies
from crate_mini.studies import benchmarks

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not fused._C, reason="no compiled extension")


def test_every_version_computes_ista_and_its_gradients():
    """The ladder of the benchmark, from the naive version on."""
    names = []
    for case in benchmarks.ladder("ista", 64, 32, torch.float32, CPU):
        assert float(case.note.removeprefix("error ")) < 1e-5
        names.append(case.name)
        case.measure(CPU, 2)
        assert set(case.ms) == {"fused", "eager"}
    versions = ["naive", *fused._C.isa_names().split()]
    kinds = [f"{version} {kind}" for version in versions for kind in ("forward", "both")]
    assert names == [f"ista 64x32 float32 {kind}" for kind in kinds]
    assert fused._C.isa_name() == versions[-1], "the fastest is in use again"


def test_the_naive_gradients_are_those_of_the_kernels():
    p = benchmarks.problem("ista", 64, 32, torch.float32, CPU)
    expected = p.call(p.plain, backward=True)()
    torch.testing.assert_close(p.call(benchmarks.NaiveIsta.apply, backward=True)(), expected)


def test_the_table_is_kept(tmp_path, monkeypatch, capsys):
    path = tmp_path / "bench.json"
    words = ["--op", "decode", "--dtype", "float32", "--repeats", "2", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["studies", "bench", *words])
    studies.main()
    table = results.read_json(path)
    assert table["command"].startswith("python -m crate_mini.studies bench --op decode")
    assert table["backend"][0] == "fused" and set(table) == {
        "command",
        "backend",
        "machine",
        "rows",
    }
    printed = capsys.readouterr().out
    assert len(table["rows"]) == 6
    for row in table["rows"]:
        assert set(row) == {"name", "note", "operations", "bytes", "ms"}
        assert set(row["ms"]) == {"fused", "eager", "products"}
        assert f"| {row['name']} | {row['ms']['fused']['median']:.3g} ±" in printed


def test_the_head_is_measured_against_the_ceiling():
    case = benchmarks.head(50, torch.float32, CPU, N=40, d=16).measure(CPU, 2, time.thread_time)
    assert set(case.ms) == {"fused", "eager", "whole", "ceiling"}
    assert re.fullmatch(r"\d+% of the ceiling", case.note)


# ---- a fake GPU, on which Python takes longer than the device ------------------------------------


class FakeGpu:
    """torch.cuda's events, streams and graphs, for calls of 20 us that cost Python 40 us."""

    def __init__(self, monkeypatch, captures=True):
        self.now, self.calls = 0.0, 0  # microseconds on the device; calls and replays
        self.captures = captures
        stream = SimpleNamespace(wait_stream=lambda other: None)
        fakes = dict(
            Event=lambda enable_timing: FakeEvent(self),
            Stream=lambda: stream,
            current_stream=lambda: stream,
            stream=lambda side: nullcontext(),
            graph=self.graph,
            CUDAGraph=lambda: SimpleNamespace(replay=self.replay),
        )
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def run(self):
        self.now += 40
        self.calls += 1

    def replay(self):
        self.now += 20
        self.calls += 1

    @contextmanager
    def graph(self, graph):
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        yield


class FakeEvent:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.time = self.gpu.now

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return (end.time - self.time) / 1e3


@pytest.mark.parametrize("captures, graphs", [(True, True), (False, True), (True, False)])
def test_a_gpu_is_timed_by_many_calls_and_from_a_graph_where_that_works(
    captures, graphs, monkeypatch
):
    gpu = FakeGpu(monkeypatch, captures)
    case = benchmarks.Case("a", {"fused": gpu.run}, 1, 1, graphs=graphs)
    row = case.measure(torch.device("cuda"), 3).row()
    from_graph = captures and graphs
    assert row["ms"]["fused"]["median"] == pytest.approx(0.02 if from_graph else 0.04)
    assert row.get("captured") == (["fused"] if from_graph else None)
    assert gpu.calls > 3 * benchmarks.MOST_CALLS


def test_long_calls_are_timed_one_by_one(monkeypatch):
    gpu = FakeGpu(monkeypatch)

    def step():
        gpu.calls += 1
        gpu.now += 80_000

    benchmarks.Case("a", {"step": step}, 1, 1, graphs=False).measure(torch.device("cuda"), 3)
    assert gpu.calls == 1 + 2 + 3

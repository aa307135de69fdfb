"""The benchmark: every version computes ISTA, and the table that is printed is kept."""

import sys

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

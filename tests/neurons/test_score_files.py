"""Rows of scores on disk."""

import pytest
from made_up_rows import made_up_rows
from neuron_results import write_results

from crate_mini import UserError
from crate_mini.console import results
from crate_mini.neurons import score_files
from crate_mini.neurons.score_files import read_rows


def test_rows_come_back_and_a_broken_file_is_named(tmp_path):
    rows, path = made_up_rows(), tmp_path / "scores.jsonl"
    results.write_rows(path, rows)
    assert read_rows(path) == rows
    assert [file.name for file in tmp_path.iterdir()] == ["scores.jsonl"]
    with pytest.raises(ValueError):
        results.write_rows(path, [{"x": float("nan")}])
    assert read_rows(path) == rows  # the earlier file stays
    path.write_text("{")
    for broken in (path, tmp_path / "none.jsonl"):
        with pytest.raises(UserError, match="--from score"):
            read_rows(broken)


@pytest.mark.parametrize(
    "name, lacks", [("scores.jsonl", "5 of 6"), ("excerpts.jsonl", "neuron 5")]
)
def test_a_file_that_was_cut_between_two_lines_is_refused(name, lacks, tmp_path):
    """Each line that is left is intact."""
    write_results(tmp_path)
    summary = results.read_json(tmp_path / "summary.json")
    for site in summary["sites"].values():
        site["n"]["neurons"] = {"total": 6}
    results.write_json(tmp_path / "summary.json", summary)
    assert len(score_files.read(tmp_path)[2]) == 12
    lines = (tmp_path / name).read_text().splitlines(keepends=True)
    (tmp_path / name).write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match=f"{name} .*{lacks}.* of L1.*--from score"):
        score_files.read(tmp_path)


@pytest.mark.parametrize(
    "name, content",
    [
        ("scores.jsonl", '{"site": "L0"}'),
        ("scores.jsonl", '{"site": [], "neuron": 1}'),
        ("scores.jsonl", '{"site": "L0", "neuron": 1, "max": "large"}'),
        ("scores.jsonl", '{"site": "L0", "neuron": 1, "label": 3}'),
        ("excerpts.jsonl", '{"site": "L0"}'),
        ("excerpts.jsonl", '{"site": {}, "neuron": 1}'),
        ("summary.json", '{"sites": 3}'),
        ("summary.json", '{"sites": {"L1": {}}}'),
        ("summary.json", '{"record": 3}'),
    ],
)
def test_entries_of_another_type_are_refused_in_one_sentence(name, content, tmp_path):
    write_results(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="score again with"):
        score_files.read(tmp_path)

"""Rows of scores on disk."""

import pytest
from made_up_rows import made_up_rows

from crate_mini import UserError
from crate_mini.console import results
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

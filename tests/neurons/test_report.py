"""`interpret.py report` next to a real checkpoint."""

import json
from collections import Counter

import pytest
from forked import run_script
from html_pages import ParsedPage
from neuron_results import write_results

from crate_mini.console import results
from crate_mini.data.tokenizer import load_tokenizer
from crate_mini.model import LM, Config
from crate_mini.neurons import report
from crate_mini.training import checkpoint


@pytest.fixture
def ckpt(tmp_path):
    tokenizer = load_tokenizer("bytes")
    config = Config(vocab_size=tokenizer.vocab_size, block_size=64, n_layer=2, n_head=2, n_embd=32)
    facts = {"spec": "bytes", "hash": tokenizer.hash}
    checkpoint.save(tmp_path / "best", LM(config), training={"step": 0}, tokenizer=facts)
    return tmp_path / "best"


def belong_to(ckpt, folder):
    """Let the results in a folder be of a checkpoint."""
    record = results.read_json(folder / "record.json")
    record["checkpoint"]["sha256"] = checkpoint.load(ckpt)[1]["sha256"]
    results.write_json(folder / "record.json", record)


def test_report_writes_pages_or_one_sentence(ckpt, tmp_path):
    words = ["interpret.py", "report", ckpt]
    process = run_script(words, cwd=tmp_path)
    assert process.returncode == 2
    assert "has no record.json" in process.stderr
    assert process.stderr.count("\n") == 1
    folder = tmp_path / "interpret"
    write_results(folder, n=12)
    process = run_script(words, cwd=tmp_path)
    assert process.returncode == 2
    assert "are of another checkpoint than" in process.stderr
    belong_to(ckpt, folder)
    process = run_script([*words, "--neuronpedia", "features.jsonl"], cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert ParsedPage((folder / "index.html").read_bytes()).data["sites"] == ["L0", "L1"]
    assert ParsedPage((folder / "human.html").read_bytes()).data["questions"]
    assert len((tmp_path / "features.jsonl").read_text().splitlines()) == 24


def test_report_parses_each_line_of_its_files_once(ckpt, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "interpret"
    write_results(folder, n=12)
    belong_to(ckpt, folder)
    parsed = Counter()
    loads = json.loads

    def counting(text, **options):
        parsed[text] += 1
        return loads(text, **options)

    monkeypatch.setattr(json, "loads", counting)
    report.run(report.Settings(neuronpedia=str(tmp_path / "features.jsonl")), ckpt)
    assert capsys.readouterr().out.count("file ") == 5
    for name in ("scores.jsonl", "excerpts.jsonl"):
        for line in (folder / name).read_text().splitlines():
            assert parsed[line] == 1

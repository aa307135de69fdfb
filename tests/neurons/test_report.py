"""`interpret.py report` next to a real checkpoint."""

from forked import run_script
from html_pages import ParsedPage
from neuron_results import write_results

from crate_mini.console import results
from crate_mini.data.tokenizer import load_tokenizer
from crate_mini.model import LM, Config
from crate_mini.training import checkpoint


def test_report_writes_pages_or_one_sentence(tmp_path):
    tokenizer = load_tokenizer("bytes")
    config = Config(vocab_size=tokenizer.vocab_size, block_size=64, n_layer=2, n_head=2, n_embd=32)
    facts = {"spec": "bytes", "hash": tokenizer.hash}
    checkpoint.save(tmp_path / "best", LM(config), training={"step": 0}, tokenizer=facts)
    report = ["interpret.py", "report", tmp_path / "best"]
    process = run_script(report, cwd=tmp_path)
    assert process.returncode == 2
    assert "has no record.json" in process.stderr
    assert process.stderr.count("\n") == 1
    folder = tmp_path / "interpret"
    write_results(folder, n=12)
    process = run_script(report, cwd=tmp_path)
    assert process.returncode == 2
    assert "are of another checkpoint than" in process.stderr
    record = results.read_json(folder / "record.json")
    record["checkpoint"]["sha256"] = checkpoint.load(tmp_path / "best")[1]["sha256"]
    results.write_json(folder / "record.json", record)
    process = run_script([*report, "--neuronpedia", "features.jsonl"], cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert ParsedPage((folder / "index.html").read_bytes()).data["sites"] == ["L0", "L1"]
    assert ParsedPage((folder / "human.html").read_bytes()).data["questions"]
    assert len((tmp_path / "features.jsonl").read_text().splitlines()) == 24

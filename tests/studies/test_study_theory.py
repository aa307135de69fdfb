"""The study of the theory: verdicts of trained models, collected."""

import json

import pytest

from crate_mini import UserError
from crate_mini.console import results
from crate_mini.studies import runner, theory

LAYER = {
    "layer": 0,
    "attention": {"before": 245.46, "after": 220.89, "change_whole": -27.29},
    "ISTA steps": {"objectives": [0.535, 0.32, 0.242]},
    "optimum": {"best": {"objective": 0.0735}},
    "step size": {"eta_norm2": 3.111},
}


def test_verdicts_of_all_models_are_kept_with_their_numbers(tmp_path, monkeypatch, capsys):
    def run_script(words, log):
        folder = tmp_path / words[words.index("--out") + 1]
        folder.mkdir(parents=True)
        mlp = {**LAYER, "ISTA steps": None, "optimum": None, "step size": None}
        layer = mlp if "gpt2" in str(folder) else LAYER
        content = {"tokens": 7, "verdict": {"layers": [layer], "answer": "in part"}}
        (folder / "layers.json").write_text(json.dumps(content))
        return 1.0

    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(runner, "run_script", run_script)
    with pytest.raises(UserError, match="crate-1337 is missing; .*crate --checkpoints` trains"):
        theory.run(theory.Settings(("crate", "gpt2")))
    for name in ("crate", "gpt2"):
        folder = tmp_path / "out" / "study" / f"{name}-1337" / "last"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"training": {"val_loss": 4.0}}))
    theory.run(theory.Settings(("crate", "gpt2")))
    text = capsys.readouterr().out
    assert "| crate | 0 | 245.5 > 220.9 | -27.3 | 0.535 > 0.320 > 0.242 | 0.073 | 3.11 |" in text
    assert "| gpt2 | 0 | 245.5 > 220.9 | -27.3 | | | |" in text
    study = json.loads((tmp_path / "results" / "theory.json").read_text())
    assert study["models"]["crate"]["verdict"]["answer"] == "in part"

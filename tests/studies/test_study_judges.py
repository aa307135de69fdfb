"""The study of language models as judges, on scores by a matcher of strings (see test_words.py)."""

import json
import sys

import pytest
from test_score_neurons import ckpt, results, run  # noqa: F401  (fixtures)

from crate_mini import UserError
from crate_mini.studies import judges as study_words
from crate_mini.studies import neurons as study_neurons
from crate_mini.studies.judges import Words
from crate_mini.studies.neurons import Study


@pytest.fixture
def study(tmp_path, run, ckpt, monkeypatch):  # noqa: F811
    """(study of one model whose scores are there, what it ran); `llm` runs in this process."""
    made, ran = (
        Study(
            "",
            "",
            presets=("2L",),
            models=("crate",),
            seeds=(7,),
            out=tmp_path / "out",
            results=tmp_path / "results",
        ),
        [],
    )
    folder = made.folder("2L", "crate", 7)
    folder.mkdir(parents=True)
    (folder / "interpret").symlink_to(ckpt.parent / "interpret")

    def part(self, place, *words, name):
        ran.append((place, words, name))
        flags = [str(word) for word in words[words.index("--explainer") :]]
        run(*flags)

    monkeypatch.setattr(Study, "part", part)
    return made, ran


def test_what_is_kept_and_shown(study, ckpt):  # noqa: F811
    made, ran = study
    found = Words("hf:m", "template", 3, of=made).run()
    ((place, words, name),) = ran
    assert place == made.folder("2L", "crate", 7) / "interpret" and name == "words-template-hf-m"
    assert words[:3] == ("interpret.py", "llm", made.folder("2L", "crate", 7) / "train" / "last")
    kept, llm = json.loads((made.results / "words.json").read_text())["runs"][0], results(ckpt)[0]
    assert (
        kept == json.loads(json.dumps(found["runs"][0]))
        and kept["despite_probe"]
        and kept["rung"] == "A"
    )
    assert kept["probe"] == llm["llm"]["probe"] and kept["overall"] == llm["overall"]["codes"]
    n = kept["n"]["openai_tar[llm:m@A]"]
    assert n["total"] == 6 == n["live"] + n["dead"] + n["undefined"] + n["failed"]
    mean = kept["overall"]["openai_random[llm:m@A]"]["mean"]
    row = study_words.table(found).splitlines()[-1]
    assert (
        row.startswith("| 2L CRATE (paper) | template | llm:m@A | 6 = ")
        and f"| {100 * mean:.1f} [" in row
    )
    assert row.endswith(": the scores mean nothing |")
    assert {line.count("|") for line in study_words.table(found).splitlines()} == {row.count("|")}


def test_runs_of_other_judges_stay_and_the_same_is_replaced(study):
    made, _ = study
    Words("hf:m", "template", 3, of=made).run()
    Words("hf:m", "template", 2, of=made).run()
    path = made.results / "words.json"
    found = json.loads(path.read_text())
    assert [r["n"]["openai_tar[llm:m@A]"]["total"] for r in found["runs"]] == [4]
    found["runs"][0]["explainer"] = "another"
    path.write_text(json.dumps(found))
    assert [r["explainer"] for r in Words("hf:m", "template", 3, of=made).run()["runs"]] == [
        "another",
        "template",
    ]


def test_without_scores_or_words_it_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(
        UserError, match="has no scores of neurons; `python -m crate_mini.studies.neurons TEXT"
    ):
        Words("hf:m", "template", of=Study("", "", out=tmp_path)).run()
    for words in ([], ["a", "b", "c"]):
        monkeypatch.setattr(sys, "argv", ["study_words", *words])
        with pytest.raises(UserError, match="give a simulator"):
            study_words.main()
    assert study_words.cell({"mean": None}) == study_words.cell(None) == "-"
    assert study_words.cell({"mean": 0.5, "ci95": [0.25, 0.75]}) == "50.0 [25.0, 75.0]"
    assert study_words.NAMES is study_neurons.NAMES

"""`interpret.py concepts` from a classifier to pages, its judges and its packet for people."""

import csv
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_page as test_pages
import torch
from hypothesis import given
from hypothesis import strategies as st

from crate_mini import UserError, cli, model
from crate_mini.concepts import command, faithfulness
from crate_mini.concepts import finetune as classify
from crate_mini.concepts import llm_ratings as judge
from crate_mini.concepts import page as concept_page
from crate_mini.concepts import pipeline as stages
from crate_mini.concepts import report as result
from crate_mini.concepts import survey as concept_packet
from crate_mini.concepts.types import Codes
from crate_mini.data import batches as data
from crate_mini.judges import run as llm
from crate_mini.judges.http_client import Failed
from crate_mini.studies import concepts as study_concepts
from crate_mini.training import checkpoint

ROOT = Path(__file__).resolve().parents[2]
EVIL = "<script>alert(1)</script>"
GOOD, BAD = (
    ["fine", "lovely", "warm", "clever", "bright"],
    ["dull", "awful", "cold", "stupid", "grey"],
)
FILLER = ["the", "a", "film", "plot", "actor", "scene", "of", "and", "it", EVIL]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(settings, checkpoint) of a finished run on planted reviews, whose texts hold a script."""
    place, rng, spec = tmp_path_factory.mktemp("concepts"), np.random.default_rng(0), "pydocs:511"
    rows = []
    for i in range(260):
        words = [*rng.choice(FILLER, 8), *rng.choice((BAD, GOOD)[i % 2], 3)]
        rows.append({"text": " ".join(rng.permutation(words)), "label": i % 2})
    (place / "texts.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = model.LM(model.preset("2L", n_embd=32, block_size=64, vocab_size=512))
    checkpoint.save(
        place / "lm",
        lm,
        tokenizer={"spec": spec, "hash": data.load_tokenizer(spec).hash},
        training={"step": 0},
    )
    classify.run(
        classify.Settings(
            str(place / "lm"),
            str(place / "texts.jsonl"),
            "bad<b>,good",
            length=40,
            epochs=6,
            lr=3e-3,
            device="cpu",
            out=str(place / "run"),
        ),
        log=lambda line: None,
    )
    s = command.Settings(
        k=12,
        seeds="0,1",
        epochs=3,
        nodes=4,
        whole=45,
        methods="clvq,kmeans",
        shown=5,
        device="cpu",
        out=str(place / "out"),
    )
    command.run(s, place / "run" / "last")
    return s, place / "run" / "last"


@pytest.fixture(scope="module")
def found(run):
    return cli.read_json(Path(run[0].out) / "concepts.json")


# ---- the command -----------------------------------------------------------------------------------------


def test_it_says_all_it_found_and_what_it_did_not_run(found):
    assert (
        found["judge"] == "not run"
        and found["people"].startswith("not run")
        and found["not_run"]["ward"]
    )
    assert set(found["methods"]) == {"clvq", "kmeans"}
    assert found["seeds"] == [0, 1] and found["layers"] == [1, 2]
    for of in found["methods"].values():
        assert set(of["health"]) == {"0", "1"} and len(of["codes"]) == 5
        assert -1 <= of["stability"]["mean"] <= 1
        assert set(of["faithfulness"]) == {*faithfulness.FORMS, "partners", "survives"}
    assert {"command", "machine", "checkpoint", "seed"} <= set(found)
    assert "kmeans" in result.table(found) and found["salience"]["gap_mean"] < 1


def test_stages_run_again_only_when_something_before_them_changed(run, capsys):
    s, ckpt = run
    files = {p: p.stat().st_mtime_ns for p in Path(s.out).glob("*.npz")}
    told = (Path(s.out) / "faithfulness.json").stat().st_mtime_ns
    command.run(s, ckpt)
    assert {p: p.stat().st_mtime_ns for p in files} == files
    assert (Path(s.out) / "faithfulness.json").stat().st_mtime_ns == told
    assert "discover  " not in capsys.readouterr().out
    before = (Path(s.out) / "faithfulness.json").read_bytes()
    command.run(replace(s, from_="salience"), ckpt)
    changed = {p.name for p in files if p.stat().st_mtime_ns != files[p]}
    assert (
        changed == {"salience.npz"} and (Path(s.out) / "faithfulness.json").read_bytes() == before
    )


def test_a_damaged_file_is_made_again_and_told_facts_are_those_of_the_run(run, found):
    s, ckpt = run
    path = Path(s.out) / "salience.npz"
    whole = path.read_bytes()
    for harm in (b"", b"PK rubbish", whole[:-300]):
        path.write_bytes(harm)
        job = stages.Concepts(s, ckpt)
        job.vectors(False)
        job.salience(False)
        assert job.salient.position.size == found["salience"]["texts"]
    assert found["salience"]["nodes"] == s.nodes == 4


def test_texts_that_training_read_are_not_looked_at(run):
    s, ckpt = run
    job = stages.Concepts(replace(s, tests=0), ckpt)
    held, trained = (np.flatnonzero(job.labelled.split == i) for i in (2, 0))
    job.text.ids[held[1]] = job.text.ids[trained[0]]
    assert job.tests.tolist() == np.delete(held, 1).tolist()
    few = stages.Concepts(replace(s, tests=3), ckpt)
    assert few.tests.tolist() == held[:3].tolist()


def test_controls_of_another_mask_are_other_controls(run, monkeypatch):
    s, ckpt = run
    made = []
    monkeypatch.setattr(stages.Concepts, "cached", lambda self, name, stamp, *_: made.append(stamp))
    for mask in ("causal", "none"):
        job = stages.Concepts(replace(s, mask=mask), ckpt)
        job.vectors(False)
        job.controls(False)
    assert made[0] != made[1]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": 10**6}, "codes cannot be made of"),
        ({"layers": "1"}, "must be two"),
        ({"layers": "1,9"}, "0 to 2"),
        ({"layers": "a,b"}, "no list of whole numbers"),
        ({"methods": "kmean"}, "did you mean kmeans"),
        ({"from_": "vector"}, "did you mean vectors"),
        ({"seeds": "-1"}, "no list"),
        ({"shown": 0}, "--shown 0"),
        ({"answers": "none.json"}, "cannot be read as answers"),
        ({"judges": "gpt"}, "names no language model"),
    ],
)
def test_bad_settings(run, tmp_path, change, message):
    s, ckpt = run
    out = s.out if {"answers", "judges"} & set(change) else str(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        command.run(replace(s, **{"out": out, **change}), ckpt)
    assert "\n" not in str(error.value)


def test_bad_input_at_the_command_line_ends_with_one_sentence_and_code_2(run):
    lm = run[1].parent.parent / "lm"
    done = subprocess.run(
        [sys.executable, str(ROOT / "interpret.py"), "concepts", str(lm)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2 and done.stderr.count("\n") == 1 and "is no classifier" in done.stderr
    )


# ---- what people look at ---------------------------------------------------------------------------------


def test_the_page_lets_nothing_of_the_corpus_through(run, found):
    page = (Path(run[0].out) / "concepts.html").read_text(encoding="utf-8")
    assert "<script" not in page and "script-src 'sha256-" in page
    assert "alert" in page and "bad&lt;b&gt;" in page and "<mark>" in page
    assert concept_page.shown("a\x1b<&>\n") == "a\\x1b&lt;&amp;&gt;↵"
    assert (Path(run[0].out) / "concepts.png").stat().st_size > 5000


def test_codes_on_the_page_are_drawn_by_the_seed(run, found):
    s, ckpt = run
    job = stages.Concepts(s, ckpt)
    job.run()
    for method in found["methods"]:
        one = result.pictured(job, method)
        assert [c["code"] for c in one["codes"]] == [
            c["code"] for c in found["methods"][method]["codes"]
        ]
        words = [w for c in one["codes"] for w, _ in c["words"]]
        assert words and all(
            e["words"][e["at"]] in job.v.vocabulary for c in one["codes"] for e in c["examples"]
        )
    job.seeds = [5]
    job.codes |= {(m, 5): job.codes[m, 0] for m in job.methods}
    assert any(
        [c["code"] for c in result.pictured(job, m)["codes"]]
        != [c["code"] for c in found["methods"][m]["codes"]]
        for m in found["methods"]
    )


def test_the_packet_asks_blindly_and_counts(run, tmp_path):
    out = Path(run[0].out)
    key, page = (
        json.loads((out / "packet-key.json").read_text()),
        (out / "packet.html").read_text("utf-8"),
    )
    asked = key["questions"]
    assert (
        "clvq" not in page
        and "kmeans" not in page
        and len({q["item"] for q in asked}) == len(asked)
    )
    assert set(Counter(q["method"] for q in asked)) == {"clvq", "kmeans"}
    rows = (out / "packet.csv").read_text().splitlines()
    assert len(rows) >= len(asked) + 1 and "clvq" not in "".join(rows)
    data_of = page.split('id="data"')[1]
    digest = json.loads(data_of[data_of.index("{") : data_of.index("</script>")])["page"]
    (tmp_path / "a.json").write_text(
        json.dumps({"page": digest, "choices": [q["answer"] for q in asked]})
    )
    with open(out / "packet.csv", newline="", encoding="utf-8") as file:
        sheet = list(csv.DictReader(file))
    for row, q in zip(sheet[1:], asked[1:]):
        row["choice"] = q["options"][1 - q["answer"]]

    def hand_in():
        with open(tmp_path / "b.csv", "w", newline="", encoding="utf-8") as file:
            rows = csv.DictWriter(file, sheet[0])
            rows.writeheader()
            rows.writerows(sheet)

    hand_in()
    found = concept_packet.score(out / "packet-key.json", tmp_path / "a.json", tmp_path / "b.csv")
    n = len(asked)
    assert (found["all"]["right"], found["all"]["n"], found["all"]["unanswered"]) == (
        n,
        2 * n - 1,
        1,
    )
    assert (
        found["all"]["chance"] == 0.5
        and found["clvq"]["n"] + found["kmeans"]["n"] == found["all"]["n"]
    )
    assert "clvq" in result.people(found)
    (tmp_path / "a.json").write_text(json.dumps({"page": "other", "choices": []}))
    with pytest.raises(UserError, match="another packet"):
        concept_packet.score(out / "packet-key.json", tmp_path / "a.json")
    sheet[0]["words"] = "made 3.1 of 3.10"
    hand_in()
    assert concept_packet.score(out / "packet-key.json", tmp_path / "b.csv")["all"]["n"] == n - 1
    for row in sheet:
        row["words"] = "of another packet"
    hand_in()
    with pytest.raises(UserError, match="b.csv answers another packet"):
        concept_packet.score(out / "packet-key.json", tmp_path / "b.csv")
    (tmp_path / "b.csv").write_text("question,choice\n1,nonsense\n")
    with pytest.raises(UserError, match="cannot be read as answers"):
        concept_packet.score(out / "packet-key.json", tmp_path / "b.csv")


@test_pages.browser
def test_the_packet_asks_in_a_browser(run, tmp_path):
    """quiz.js and what follows it in the page are one script that runs."""
    path = Path(run[0].out) / "packet.html"
    told = test_pages.dom(path, tmp_path / "profile").split("<script")[0]
    n = len(json.loads((path.parent / "packet-key.json").read_text())["questions"])
    assert (
        f"question 1 of {n}" in told
        and told.count('class="choice"') == 2
        and "bad&lt;b&gt;" in told
    )


# ---- judges ----------------------------------------------------------------------------------------------


class Fake:
    """A judge that rates 3 whatever holds the word "good", else 1; it never answers when `fails`."""

    def __init__(self, spec, s, tape):
        self.name, self.style, self.fails, self.asked = spec, "chat", "fails" in spec, []
        self.can = {"can": ["chat"]}

    def ask(self, query):
        self.asked.append(query)
        Fake.last = query
        if self.fails:
            raise Failed("no answer")
        last = query["chat"][-1][1]
        return {"text": " 3." if '"good"' in last.split("Words:")[1] else "1"}


def cards(n=12):
    return [
        {
            "text": f"a text {EVIL} {i}",
            "answer": "pos",
            "right": True,
            "classes": ["neg", "pos"],
            "concepts": {"clvq": ["good", "warm"], "kmeans": ["the"], "sae": []},
        }
        for i in range(n)
    ]


def test_judges_are_blind_and_their_agreement_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(llm, "Model", Fake)
    found = judge.run(cards(), ["hf:one", "hf:two"], tmp_path, llm.Settings())
    means = {m: of["hf:one"]["mean"] for m, of in found["methods"].items()}
    assert means == {"clvq": 3, "kmeans": 1, "sae": 1}
    assert found["agreement"] == {
        "krippendorff": 1,
        "pearson": pytest.approx(1),
        "kendall_w": 1,
        "spearman": pytest.approx(1),
    }
    said = json.dumps(Fake.last)
    assert not any(name in said for name in ("clvq", "kmeans", "sae")) and "Answer: pos" in said
    assert judge.run(cards(), ["hf:one"], tmp_path, llm.Settings())["agreement"] is None
    with pytest.raises(UserError, match="it cannot judge"):
        judge.run(cards(), ["hf:fails"], tmp_path, llm.Settings())
    order = judge.questions(cards(), 0)
    assert sorted(order) == sorted((i, m) for i in range(12) for m in cards()[0]["concepts"])
    assert order != sorted(order)


def test_agreement_against_worked_examples():
    a = np.nan
    # Krippendorff 2011, four observers and twelve units: interval alpha 0.849
    table = np.array(
        [
            [1, 2, 3, 3, 2, 1, 4, 1, 2, a, a, a],
            [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, a, 3],
            [a, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, a],
            [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, a],
        ]
    )
    assert judge.krippendorff(table) == pytest.approx(0.849, abs=5e-4)
    assert judge.kendall([[1, 2, 3], [1, 2, 3]]) == 1 and judge.kendall([[1, 2, 3], [3, 2, 1]]) == 0
    assert judge.kendall([[1, 1, 2], [1, 1, 2]]) == pytest.approx(1)
    assert judge.kendall([[1, 2, 3]]) is judge.krippendorff([[1.0, 2.0]]) is None


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 40), st.integers(0, 9))
def test_items_are_spread_over_the_groups(groups, n, seed):
    chosen = judge.stratified(groups, n, seed)
    assert len(set(chosen.tolist())) == len(chosen) == min(n, len(groups))
    have, got = Counter(groups), Counter(np.asarray(groups)[chosen].tolist())
    for g in have:  # a group with texts left over has no fewer than any other has, less one
        assert got[g] == have[g] or got[g] >= max(got.values()) - 1


def test_codes_without_words_are_not_shown(run):
    s, ckpt = run
    job = stages.Concepts(s, ckpt)
    job.run()
    old = job.codes["kmeans", 0]
    job.codes["kmeans", 0] = Codes("kmeans", 0, np.zeros_like(old.assignment), old.centroids)
    assert [c["code"] for c in result.pictured(job, "kmeans")["codes"]] == [0]


# ---- the study -------------------------------------------------------------------------------------------


def test_the_study_keeps_every_control_and_counts_what_survives(
    found, tmp_path, monkeypatch, capsys
):
    """Its own part is to ask for the right commands and to gather; the commands are tested where they are."""
    asked = []

    def part(self, place, *words):
        asked.append([str(word) for word in words])
        if words[0] == "interpret.py":
            place.mkdir(parents=True)
            (place / "concepts.json").write_text(json.dumps(found))

    monkeypatch.setattr(study_concepts.ConceptStudy, "part", part)
    study_concepts.ConceptStudy(
        "r.jsonl", "ranks", "t.csv", out=tmp_path / "out", results=tmp_path
    ).run()
    assert [words[:2] for words in asked[:3]] == [
        ["train.py", "--model"],
        ["train.py", "--task"],
        ["interpret.py", "concepts"],
    ]
    assert len(asked) == 2 * (1 + 2 * 2)
    kept = cli.read_json(tmp_path / "concepts.json")
    text = study_concepts.tables(kept)
    assert len(kept["runs"]) == 4 and text in capsys.readouterr().out
    row = next(
        line
        for line in text.splitlines()
        if line.startswith("| reviews, ") and "| probe, m" in line
    )
    assert len(row.split("|")) == len(study_concepts.CONTROLS) + 5 and "- |" not in row
    own = [seed["methods"]["clvq"]["probe, mean"]["own"] for seed in found["by_seed"].values()]
    drop = 100 * np.mean([o["relative_drop"] for o in own])
    assert f"clvq, probe, mean: accuracy falls by {drop:.1f} %" in text
    assert "language-model judges: not run" in text


def test_the_study_refuses_what_it_cannot_read(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["study_concepts", "one"])
    with pytest.raises(UserError, match="give labelled reviews"):
        study_concepts.main()

"""What people look at: the page, the codes that it shows, and the packet that asks them."""

import copy
import csv
import json
from collections import Counter
from pathlib import Path

import html_pages
import numpy as np
import planted_reviews
import pytest
from figure_texts import clashes
from hypothesis import given
from hypothesis import strategies as st

from crate_mini import UserError
from crate_mini.concepts import page, report, survey
from crate_mini.concepts.codebook_checks import adjusted_mutual_information
from crate_mini.concepts.pipeline import Pipeline
from crate_mini.concepts.types import Codes
from crate_mini.console import results


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(settings, checkpoint) of a finished run."""
    return planted_reviews.finished_run(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def folder(run):
    return Path(run[0].out)


@pytest.fixture(scope="module")
def finished(run):
    """The Pipeline of that run, all its stages loaded."""
    pipeline = Pipeline(*run)
    pipeline.run()
    return pipeline


# ---- the page ------------------------------------------------------------------------------------


def test_the_page_lets_nothing_of_the_corpus_through(folder):
    content = (folder / "concepts.html").read_text(encoding="utf-8")
    assert "<script" not in content and "script-src 'sha256-" in content
    assert "alert" in content and "bad&lt;b&gt;" in content and "<mark>" in content
    assert page.shown("a\x1b<&>\n") == "a\\x1b&lt;&amp;&gt;↵"


def test_the_figure_says_what_it_shows_and_what_its_colours_mean(folder, monkeypatch):
    assert (folder / "concepts.png").stat().st_size > 5000
    result = results.read_json(folder / "concepts.json")
    monkeypatch.setattr(page, "write", lambda figure, target, dpi: figure)
    figure = page.cloud(result, None)
    lower, upper = result["layers"]
    assert f"layers {lower} to {upper}" in figure.get_suptitle()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == result["classes"]
    assert legend.get_title().get_text().startswith("colour: the class")
    assert not clashes(figure)


@pytest.fixture
def result(folder):
    return results.read_json(folder / "concepts.json")


@pytest.mark.parametrize("low, times", [(0.43, 1), (0.5, 1), (0.51, 0)])
def test_a_classifier_at_chance_is_said_once_at_the_top(result, low, times):
    classifier = {**result["classifier"], "accuracy": 0.55, "ci95": [low, 0.6], "chance": 0.5}
    result = {**result, "classifier": classifier}
    content = page.page(result, "title").decode()
    table = report.table(result)
    assert content.count("This classifier is at chance: accuracy 0.550") == times
    assert table.count("This classifier is at chance: accuracy 0.550") == times
    if times:
        assert content.index("is at chance:") < content.index("<dl>") < content.index("<h2>")
        assert table.startswith("This classifier is at chance")


def test_agreement_with_clvq_and_with_the_start_is_printed(finished, result, folder):
    codes = {name: finished.codes[name, 0] for name in ("clvq", "kmeans")}
    test = finished.vectors.rows("test")
    expected = adjusted_mutual_information(*(c.assignment[test] for c in codes.values()))
    kmeans, clvq = (result["methods"][name]["agreement"]["0"] for name in ("kmeans", "clvq"))
    assert kmeans == {"clvq": pytest.approx(expected), "start": None}
    assert clvq == {"clvq": None, "start": pytest.approx(codes["clvq"].health["ami_start"])}
    content = (folder / "concepts.html").read_text(encoding="utf-8")
    assert f"Agreement with the codes of clvq: {expected:.2f}" in content
    assert f"from which training started: {clvq['start']:.2f}" in content
    lines = report.table(result).splitlines()
    head = next(line for line in lines if line.startswith("method"))
    row = next(line for line in lines if line.startswith("kmeans"))
    end = head.index("as clvq") + len("as clvq")
    assert row[:end].endswith(f"{expected:.3g}")


def numbers(method):
    return [code["code"] for code in method["codes"]]


def test_codes_on_the_page_are_drawn_by_the_seed(finished, folder):
    methods = results.read_json(folder / "concepts.json")["methods"]
    for name, method in methods.items():
        again = report.shown_codes(finished, name)
        assert numbers(again) == numbers(method)
        assert any(code["words"] for code in again["codes"])
        for code in again["codes"]:
            for example in code["examples"]:
                assert example["words"][example["at"]] in finished.vectors.vocabulary
    other = copy.copy(finished)
    other.seeds = [5]
    other.codes = {(name, 5): finished.codes[name, 0] for name in methods}
    drawn = [numbers(report.shown_codes(other, name)) for name in methods]
    assert drawn != [numbers(method) for method in methods.values()]


def test_codes_without_words_are_not_shown(finished):
    codes = finished.codes["kmeans", 0]
    one_code = Codes("kmeans", 0, np.zeros_like(codes.assignment), codes.centroids)
    other = copy.copy(finished)
    other.codes = {("kmeans", 0): one_code}
    assert numbers(report.shown_codes(other, "kmeans")) == [0]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 40), st.integers(0, 9))
def test_items_are_spread_over_the_groups(groups, n, seed):
    chosen = report.stratified(groups, n, seed)
    assert len(set(chosen.tolist())) == len(chosen) == min(n, len(groups))
    sizes = Counter(groups)
    counts = Counter(np.asarray(groups)[chosen].tolist())
    for group, size in sizes.items():  # one with texts left over is behind by one at most
        assert counts[group] == size or counts[group] >= max(counts.values()) - 1


# ---- the packet ----------------------------------------------------------------------------------


@pytest.fixture
def asked(folder):
    """The questions of the packet, from its key."""
    return json.loads((folder / "packet-key.json").read_text())["questions"]


def read_sheet(folder):
    with open(folder / "packet.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_sheet(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def fill_in(rows, asked):
    """Choose the wrong class for all questions but the first, which stays open."""
    for row, question in zip(rows[1:], asked[1:]):
        row["choice"] = question["options"][1 - question["answer"]]


def test_the_packet_asks_blindly(folder, asked):
    content = (folder / "packet.html").read_text(encoding="utf-8")
    assert "clvq" not in content and "kmeans" not in content
    assert len({question["item"] for question in asked}) == len(asked)
    assert {question["method"] for question in asked} == {"clvq", "kmeans"}
    sheet = (folder / "packet.csv").read_text()
    assert len(sheet.splitlines()) >= len(asked) + 1 and "clvq" not in sheet


def test_answers_of_the_page_and_of_the_sheet_are_counted(folder, asked, tmp_path):
    digest = html_pages.ParsedPage((folder / "packet.html").read_bytes()).data["page"]
    choices = [question["answer"] for question in asked]
    saved = tmp_path / "a.json"
    saved.write_text(json.dumps({"page": digest, "choices": choices}))
    rows = read_sheet(folder)
    fill_in(rows, asked)
    sheet = write_sheet(tmp_path / "b.csv", rows)
    scores = survey.score(folder / "packet-key.json", saved, sheet)
    n = len(asked)
    everyone = scores["all"]
    assert (everyone["right"], everyone["n"], everyone["unanswered"]) == (n, 2 * n - 1, 1)
    assert everyone["chance"] == 0.5
    assert scores["clvq"]["n"] + scores["kmeans"]["n"] == everyone["n"]
    assert "clvq" in report.people_table(scores)


def test_a_sheet_may_be_damaged_a_little_by_a_spreadsheet(folder, asked, tmp_path):
    rows = read_sheet(folder)
    fill_in(rows, asked)
    rows[0]["words"] = "made 3.1 of 3.10"
    sheet = write_sheet(tmp_path / "b.csv", rows)
    scores = survey.score(folder / "packet-key.json", sheet)
    assert scores["all"]["n"] == len(asked) - 1


def test_answers_to_another_packet_are_refused(folder, tmp_path):
    saved = tmp_path / "a.json"
    saved.write_text(json.dumps({"page": "other", "choices": []}))
    with pytest.raises(UserError, match="another packet"):
        survey.score(folder / "packet-key.json", saved)
    rows = read_sheet(folder)
    for row in rows:
        row["words"] = "of another packet"
    sheet = write_sheet(tmp_path / "b.csv", rows)
    with pytest.raises(UserError, match="b.csv answers another packet"):
        survey.score(folder / "packet-key.json", sheet)


def test_a_file_without_answers_is_one_sentence(folder, tmp_path):
    sheet = tmp_path / "b.csv"
    sheet.write_text("question,choice\n1,nonsense\n")
    with pytest.raises(UserError, match="cannot be read as answers"):
        survey.score(folder / "packet-key.json", sheet)


@html_pages.browser
def test_the_packet_asks_in_a_browser(folder, asked, tmp_path):
    """quiz.js and survey.js are one script that runs."""
    document = html_pages.dom(folder / "packet.html", tmp_path / "profile").split("<script")[0]
    assert f"question 1 of {len(asked)}" in document
    assert document.count('class="choice"') == 2 and "bad&lt;b&gt;" in document


@html_pages.browser
def test_no_page_scrolls_sideways_on_a_phone(folder, tmp_path):
    for name in ("concepts.html", "packet.html"):
        assert html_pages.missing_width((folder / name).read_bytes(), tmp_path) == 0, name

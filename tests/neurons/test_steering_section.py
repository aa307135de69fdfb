"""index.html shows what `steer.py measure` left in the folder, if it is of the same checkpoint."""

import base64
import json
import re

import pytest
from html_pages import ParsedPage
from neuron_results import PLAIN, SHA256, write_results

from crate_mini import UserError
from crate_mini.neurons import page, score_files, steering_section
from crate_mini.steering import dose_response

PNG = b"\x89PNG made up"
KINDS = ("neuron", "random", "feature", "feature+error")


def made_up_steering(sha256=SHA256):
    """steering.json of four kinds, two doses and two layers; `random` never reaches a KL of 0.1."""
    mean = {"n": 8, "mean": 0.25, "ci95": [0.125, 0.375]}
    none = {"n": 0, "mean": None, "ci95": None}
    summary = {}
    for kind in KINDS:
        doses = {dose: dict.fromkeys(dose_response.METRICS, mean) for dose in ("0.5", "4.0")}
        reached = none if kind == "random" else mean
        at_kl = dict.fromkeys(("effect", "own", "seen"), reached)
        summary[kind] = {"doses": doses, "at_kl": at_kl}
    inserted, attribution = [], []
    for layer in (0, 1):
        inserted.append({"layer": layer, "kind": "neuron", "kl": 0.0, "loss": -0.03125})
        agreement = {"correlation": 0.875, "null": None if layer else 0.0625, "top10": 0.5}
        attribution.append({"layer": layer, "dose": 0.5, **agreement})
    return {
        "command": "python steer.py measure <best> & more",
        "summary": summary,
        "inserted": inserted,
        "attribution": attribution,
        "checkpoint": {"sha256": sha256},
    }


def write_steering(folder, **changes):
    (folder / "steering.json").write_text(json.dumps(made_up_steering(**changes)))
    (folder / "steering.png").write_bytes(PNG)


def index(folder):
    return page.index(folder, score_files.read(folder), PLAIN.__getitem__)


def test_the_page_has_it_only_for_the_same_checkpoint(tmp_path):
    write_results(tmp_path)
    plain = index(tmp_path)
    write_steering(tmp_path, sha256="of another")
    assert index(tmp_path) == plain
    write_steering(tmp_path)
    content = index(tmp_path)
    assert b"<h2>Steering</h2>" in content
    assert ParsedPage(content).tags.count("img") == 1


def test_the_page_has_the_figure_beyond_the_token_of_the_same_checkpoint_only(tmp_path):
    write_results(tmp_path)
    plain = index(tmp_path)
    (tmp_path / "beyond.png").write_bytes(PNG)
    assert index(tmp_path) == plain  # a figure without its numbers
    for sha256, images in (("of another", 0), (SHA256, 1)):
        content = json.dumps({"checkpoint": {"sha256": sha256}, "sites": {}})
        (tmp_path / "beyond.json").write_text(content)
        parsed = ParsedPage(index(tmp_path))
        assert parsed.tags.count("img") == images
        assert (b"img-src data:;" in index(tmp_path)) == bool(images)
        assert (b"<h2>Beyond the token</h2>" in index(tmp_path)) == bool(images)
    sources = [value for name, value in parsed.attributes if name == "src"]
    assert base64.b64decode(sources[0].partition(",")[2]) == PNG
    (tmp_path / "beyond.png").unlink()
    assert index(tmp_path) == plain


def test_every_cell_names_its_column_for_narrow_screens(tmp_path):
    """There the rows become cards, see page.css, so that no column is out of sight."""
    write_results(tmp_path)
    write_steering(tmp_path)
    content = index(tmp_path).decode()
    for table in re.findall('<table class="(?:means|cards)">.*?</table>', content, re.S):
        heads = re.findall('<th scope="col">([^<]*)', table)
        heads = heads[1:] if 'class="means"' in table else heads
        for row in re.findall("<tr>(.*?)</tr>", table.partition("<tbody>")[2], re.S):
            assert re.findall('<td[^>]*data-name="([^"]*)"', row) == heads
    assert content.count('<table class="cards">') == 4 and '<table class="means">' in content


def test_the_figure_is_in_the_page_and_the_policy_allows_no_other_source(tmp_path):
    write_results(tmp_path)
    write_steering(tmp_path)
    sources = [value for name, value in ParsedPage(index(tmp_path)).attributes if name == "src"]
    assert len(sources) == 1
    kind, _, encoded = sources[0].partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(encoded) == PNG
    policy = re.search(rb'Content-Security-Policy" content="([^"]*)"', index(tmp_path))[1]
    assert b"img-src data:;" in policy
    (tmp_path / "steering.json").unlink()
    assert b"img-src" not in index(tmp_path)


def test_the_page_has_every_number_of_the_tables_as_sound_markup(tmp_path):
    write_results(tmp_path)
    write_steering(tmp_path)
    content = index(tmp_path)
    ParsedPage(content)
    section = steering_section.section(tmp_path, SHA256)
    assert section in content.decode()
    assert "&lt;best&gt; &amp; more" in section
    assert "<best>" not in section
    tables = steering_section.tables(made_up_steering())
    assert section.count('<table class="cards">') == len(tables) == 4
    for head, rows in tables:
        for text in [*head, *(cell for row in rows for cell in row)]:
            assert f">{text}<" in section
    assert "+0.25 [0.125, 0.375]" in section
    assert "none reached" in section
    assert "nan" not in section.lower().replace(base64.b64encode(PNG).decode().lower(), "")


def test_tables_without_a_figure(tmp_path):
    write_steering(tmp_path)
    (tmp_path / "steering.png").unlink()
    section = steering_section.section(tmp_path, SHA256)
    assert "<img" not in section
    assert section.count('<table class="cards">') == 4


def test_what_is_not_a_steering_json_gets_one_sentence(tmp_path):
    write_results(tmp_path)
    (tmp_path / "steering.json").write_text("{}")
    with pytest.raises(UserError, match="is not a steering.json"):
        index(tmp_path)


def test_the_format_is_that_of_the_chapter_on_steering():
    assert steering_section.METRICS == dose_response.METRICS
    assert steering_section.AT_KL == dose_response.AT_KL

"""The study of steering and its views, on made-up results; with --slow the whole study, tiny."""

import json
import math
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_page as test_pages
from test_steer_script import make

from crate_mini import UserError, model
from crate_mini.model import to_dict
from crate_mini.neurons import page as pages
from crate_mini.steering import dose_response as dose
from crate_mini.steering import figure as dose_views
from crate_mini.studies import steering as study_steering
from crate_mini.studies import tables


def made_up(kind, seed, cost=0.01):
    """steering.json of a made-up model: effect is the dose plus the seed, KL its square by a hundred."""
    kinds = {"neuron": 0.0, "random": 0.0}
    kinds |= {"feature+error": 0.0, "feature": cost} if kind == "gpt2" else {}
    rows = [
        {
            "layer": 0,
            "neuron": j,
            "kind": k,
            "dose": d,
            "unit": 1.0,
            "kl": d * d / 100 + floor,
            "loss": 0.1,
            "own": d,
            "seen": -d,
            "effect": d + seed + j,
        }
        for k, floor in kinds.items()
        for d in (0.5, 1.0, 4.0, 8.0)
        for j in (3, 5)
    ]
    return {
        "command": f"python steer.py measure <{kind}>",
        "seed": seed,
        "rows": rows,
        "live": [],
        "machine": {"commit": "c0ffee"},
        "summary": dose.summary(rows, seed),
        "inserted": [
            {"layer": 0, "kind": k, "kl": v, "loss": v} for k, v in kinds.items() if k != "random"
        ],
        "attribution": [
            {
                "layer": n,
                "dose": d,
                "correlation": (n + d / 10 + seed) / 9,
                "top10": 0.5,
                "null": None if n else seed / 10,
                "n": 2,
            }
            for n in (0, 1)
            for d in (0.5, 8.0)
        ],
        "checkpoint": {
            "sha256": "ab",
            "training": {"val_loss": 4.0 + seed},
            "config": to_dict(model.preset("3L", kind)),
        },
    }


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The study at home in tmp_path."""
    monkeypatch.setattr(study_steering, "ROOT", tmp_path)
    monkeypatch.setattr(study_steering, "RESULT", tmp_path / "results" / "steering.json")
    monkeypatch.setattr(sys, "argv", ["study_steering", "1", "2"])
    return tmp_path


def parts(place, monkeypatch):
    """Instead of running scripts, note their words and leave what they would leave."""
    seen = []

    def instead(words, cwd):
        seen.append(words[1:])
        out = place / words[-1]
        out.mkdir(parents=True, exist_ok=True)
        seed = int(words[words.index("--seed") + 1])
        if words[1] == "steer.py":
            found = made_up(re.search(r"([^/]+)-\d+/last", words[3])[1], seed)
            (out / "steering.json").write_text(json.dumps(found))
        else:
            facts = {
                "name": "x4-k32",
                "model": "its hash",
                "layer": int(words[words.index("--layer") + 1]),
            }
            (out / f"sae-L{facts['layer']}.json").write_text(json.dumps({"saes": [facts]}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(study_steering, "subprocess", SimpleNamespace(run=instead))
    for kind in tables.NAMES:
        for seed in (1, 2):
            folder = place / "out" / "study" / f"{kind}-{seed}" / "last"
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps({"config": {"n_layer": 3}}))
    return seen


def test_parts_run_once_and_the_result_holds_all_seeds(place, monkeypatch, capsys):
    seen = parts(place, monkeypatch)
    study_steering.main()
    assert len(seen) == 3 + 3 + 3  # three models, autoencoders of the first twin's three layers
    twin = seen[5]
    autoencoders = twin[twin.index("--sae") + 1].split(",")
    assert twin[:3] == ["steer.py", "measure", "out/study/gpt2-1/last"]
    assert (
        autoencoders[1] == "out/steering/gpt2-1-sae-1/sae-L1-x4-k32.pt" and len(autoencoders) == 3
    )
    found = json.loads((place / "results" / "steering.json").read_text())
    assert (
        found["seeds"] == [1, 2] and found["command"] == "python -m crate_mini.studies.steering 1 2"
    )
    assert found["machine"]["device"] and {s["model"] for s in found["sae"]} == {"gpt2"}
    assert [(s["seed"], s["layer"]) for s in found["sae"]] == [(1, 0), (1, 1), (1, 2)]
    twin = found["models"]["gpt2"]
    assert (
        twin["summary"]["neuron"]["doses"]["4"]["effect"]["n"] == 4
    )  # two neurons of each of two seeds
    assert twin["summary"]["neuron"]["doses"]["4"]["effect"]["mean"] == pytest.approx(4 + 1.5 + 4)
    at = {(r["layer"], r["dose"]): r for r in twin["attribution"]}
    assert at[1, 8.0]["correlation"] == pytest.approx((1 + 0.8 + 1.5) / 9)
    assert at[1, 8.0]["seeds"]["correlation"] == pytest.approx([(1.8 + s) / 9 for s in (1, 2)])
    assert (place / "results" / "steering.png").read_bytes().startswith(b"\x89PNG")
    told = capsys.readouterr().out
    for line in (
        "crate 3L, neuron | 5.500 | 0 exactly |",
        "crate 3L, random | 5.500 |  |",
        "gpt2 3L, feature | 5.500 | 0.01 |",
        "| gpt2 3L | 0.17 (0.150) | 0.28 (none) |",
    ):
        assert line in told
    study_steering.main()
    assert len(seen) == 9  # finished parts are kept,
    (place / "out" / "steering" / "crate-1" / "finished.json").write_text("[]")
    study_steering.main()
    assert len(seen) == 10  # another command runs again


def test_a_tiny_cost_is_not_called_none(place):
    run = made_up("gpt2", 1, cost=1e-7)
    told = dose_views.readme({"models": {"gpt2": study_steering.together([run])}})
    assert "| gpt2 3L, feature | 5.000 | 1e-07 |" in told and "neuron | 5.000 | 0 exactly |" in told


def test_pairs_compare_the_same_neurons_where_both_reach_the_side_effect():
    def rows(j, kind, gain, least=0.01):
        return [
            {"layer": 0, "neuron": j, "kind": kind, "kl": kl, "own": gain, "seen": 2 * gain}
            for kl in (least, 0.05, 0.5)
        ]

    some = [
        *rows(1, "neuron", 3.0),
        *rows(1, "random", 1.0),
        *rows(2, "neuron", 5.0),
        *rows(2, "random", 4.5),
        *rows(3, "neuron", 90.0),
    ]
    assert dose.contrasts(some, 0).keys() == {"neuron - random"}
    found = dose.contrasts([*some, *rows(1, "feature", 7.0), *rows(1, "feature+error", 8.0)], 0)
    assert found["neuron - random"]["own"]["mean"] == pytest.approx(1.25)
    assert found["neuron - random"]["seen"]["mean"] == pytest.approx(2.5)
    assert (
        found["neuron - random"]["own"]["n"] == 2
        and found["feature - feature+error"]["own"]["mean"] == -1
    )
    late = [{**r, "kl": 1.0} for r in rows(1, "feature", 7.0)]  # it costs too much from the start
    assert "feature - feature+error" not in dose.contrasts(
        [*late, *rows(1, "feature+error", 8.0)], 0
    )


def test_what_is_missing_or_fails_is_one_sentence(place, monkeypatch):
    with pytest.raises(UserError, match="study default` trains it"):
        study_steering.main()
    parts(place, monkeypatch)
    monkeypatch.setattr(
        study_steering,
        "subprocess",
        SimpleNamespace(run=lambda words, cwd: SimpleNamespace(returncode=3)),
    )
    with pytest.raises(UserError, match="ended with code 3"):
        study_steering.main()
    assert not list(place.rglob("finished.json"))
    monkeypatch.setattr(sys, "argv", ["study_steering", "all"])
    with pytest.raises(UserError, match="give seeds"):
        study_steering.main()


@pytest.mark.parametrize("kind", ["crate", "gpt2"])
def test_section_is_sound_markup_with_every_number_of_the_tables(kind):
    found, opened = made_up(kind, 1), []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            opened.append(tag)

        def handle_endtag(self, tag):
            assert opened.pop() == tag

        def handle_startendtag(self, tag, attrs):
            pass

    text = dose_views.section(found)
    Reader().feed(text)
    assert not opened and "&lt;" in text and f"<{kind}>" not in text
    assert text.count("<svg") == 4 == text.count("<table>") and "nan" not in text
    for _, rows in dose_views.tables(found):
        for row in rows:
            assert all(str(v) in text for v in row)
    for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", text):
        assert 0 <= float(x) <= 360 and 0 <= float(y) <= 190, "a line leaves its chart"
    assert text.count("stroke-dasharray") == 4 * len(found["summary"])


def test_the_page_of_neurons_has_it_if_it_is_of_the_same_checkpoint(tmp_path):
    test_pages.results(tmp_path)
    plain = pages.index(tmp_path, test_pages.PLAIN.__getitem__)
    found = made_up("gpt2", 1)
    for sha256, there in (("of another", False), ("c0ffee" * 10, True)):
        found["checkpoint"]["sha256"] = sha256
        (tmp_path / "steering.json").write_text(json.dumps(found))
        page = pages.index(tmp_path, test_pages.PLAIN.__getitem__)
        test_pages.Page(page)
        assert (b"<h2>Steering</h2>" in page) == there and (page == plain) != there
    (tmp_path / "steering.json").write_text("{}")
    with pytest.raises(UserError, match="is no steering.json"):
        pages.index(tmp_path, test_pages.PLAIN.__getitem__)


def test_lines_of_the_page_lie_where_their_values_do():
    """KL = dose^2 / 100 is a straight line on scales of decades; and a single dose still is a chart."""
    found = made_up("crate", 1)
    chart = dose_views._chart(found, "side effect", None, "kl")
    line = re.search(r'stroke-dasharray:none" d="([^"]+)"', chart)[1]
    points = [tuple(map(float, p)) for p in re.findall(r"([-\d.]+) ([-\d.]+)", line)]
    assert len(points) == 4
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(points, points[1:])]
    assert max(slopes) - min(slopes) < 0.02 * abs(slopes[0]) and slopes[0] < 0
    one = [r for r in found["rows"] if r["dose"] == 1.0]
    assert "<svg" in dose_views.section({**found, "summary": dose.summary(one, 1)})


@pytest.mark.slow
def test_the_whole_study_tiny(place, tmp_path, monkeypatch, capsys):
    here, text = Path(__file__).resolve().parents[1], tmp_path / "text.txt"
    text.write_text("the code of a token is sparse.\nthe rate of the code falls.\n" * 600)
    for script in ("steer.py", "interpret.py"):
        os.symlink(here / script, tmp_path / script)
    monkeypatch.setenv("CRATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        study_steering, "SAE", ("--k", 8, "--steps", 5, "--batch", 64, "--tokens", 512)
    )
    monkeypatch.setattr(study_steering, "MEASURE", ("--neurons", 2, "--tokens", 64))
    monkeypatch.setattr(sys, "argv", ["study_steering", "1"])
    for kind in tables.NAMES:
        make(tmp_path / "out" / "study" / f"{kind}-1" / "last", text, kind)
    study_steering.main()
    found = json.loads((tmp_path / "results" / "steering.json").read_text())
    for kind, result in found["models"].items():
        assert all(r["kl"] == 0 == r["loss"] for r in result["inserted"] if r["kind"] != "feature")
        assert math.isfinite(result["summary"]["neuron"]["doses"]["4"]["effect"]["mean"])
        assert any(r["kl"] > 0 for r in result["inserted"]) == (kind == "gpt2")
        assert all(r["null"] < r["correlation"] for r in result["attribution"] if r["layer"] == 1)
    assert "gpt2 2L, feature+error" in capsys.readouterr().out

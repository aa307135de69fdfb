"""Pages hold what the result files hold, nothing of a corpus can run in them, and people are counted."""

import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crate_mini import UserError
from crate_mini.data.tokenizer import visible
from crate_mini.neurons import neuronpedia
from crate_mini.neurons import page as pages
from crate_mini.neurons import survey as human
from crate_mini.neurons.protocols import flat
from crate_mini.plots import svg as charts

ATTACK = b"<script>document.title='owned'</script>"
HOSTILE = [
    ATTACK,
    b"</script>" + ATTACK,
    b"<img src=x onerror=\"document.title='owned'\">",
    b"<!--",
    b"]]>",
    b"&lt;",
    b"&",
    b'"',
    b"'",
    b"\\",
    b"\n",
    b"\t        x",
    b"\x00",
    b"\xff\xfe",
    "\u202eevil\u2028".encode(),
    "漢é".encode(),
    b" the",
    b" cat",
]
PLAIN = [f" w{i}".encode() for i in range(60)]
VOID = {"meta", "img", "br", "input", "hr", "link"}
ROOT = Path(__file__).resolve().parents[2]


# ---- results to draw pages from --------------------------------------------------------------------------


def excerpt(rng, vocabulary, part, w=24):
    acts = np.round(np.maximum(0, rng.normal(0, 1, w)), 3)
    acts[12] = round(3 + rng.random(), 3)
    return {
        "tokens": rng.integers(0, vocabulary, w).tolist(),
        "acts": acts.tolist(),
        "at": 12,
        "part": part,
        "sim": np.round(rng.random(w) * 3, 3).tolist(),
        "doc": int(rng.integers(90)),
    }


def neuron(rng, vocabulary, site, j, status="live", shown=(10, 10, 3)):
    """A line of scores.jsonl and one of excerpts.jsonl."""
    names = ("token_r", "ngram_r", "label_r@10", "null_r", "init_r")
    live = status == "live"
    score = {
        "site": site,
        "layer": int(site[1]),
        "neuron": j,
        "status": status,
        "max": 4.0 if live else 0.0,
        "density": float(rng.random()) if live else 0.0,
        "mean": 0.25 if live else 0.0,
        "label": {
            "tokens": [[int(t), 1.5, 7, 0.25] for t in rng.choice(vocabulary, 5, replace=False)]
            if live
            else [],
            "left": [1],
            "class": "mixed",
            "raised": [2, 3],
        },
        "scores": {
            "uniform": {k: float(rng.random()) if live else None for k in names},
            "openai_tar[ngram]": float(rng.random()) if live else None,
            "openai_random[ngram]": None,
        },
        "why": {
            "openai_random[ngram]": "constant" if live else "dead",
            "openai_tar[ngram]": "3 excerpts of the protocol's 10",
        },
    }
    if live:

        def moved():
            return {
                k: [[int(t), 0.5] for t in rng.choice(vocabulary, 4, replace=False)]
                for k in ("raised", "lowered")
            }

        score["effect"] = {
            "clamp": 4.0,
            "positions": 4,
            "kl": 0.01,
            "loss": -0.5,
            **moved(),
            "far": {"clamp": 20.0, "positions": 4, "kl": 0.25, "loss": 0.125, **moved()},
        }
    parts = ["score" if i % 2 else "fit" for i in range(20)]
    groups = [[excerpt(rng, vocabulary, parts[i]) for i in range(n if live else 0)] for n in shown]
    shows = {
        "site": site,
        "neuron": j,
        "hist": rng.integers(0, 99, 50).tolist() if live else [0] * 50,
        "atoms": [[(j + 1) % 6, 0.5], [77, 0.25]] if live else [],
        "together": [],
        **dict(zip(("top", "intervals", "random"), groups)),
    }
    return score, shows


def results(folder, sites=("L0", "L1"), n=6, vocabulary=60, dead=(), seed=0, shown=(10, 10, 3)):
    """A folder as `interpret.py neurons` leaves it; sites in `dead` never fire."""
    rng, folder = np.random.default_rng(seed), Path(folder)
    folder.mkdir(exist_ok=True)
    pairs = [
        neuron(rng, vocabulary, s, j, "dead" if s in dead or j == 3 else "live", shown)
        for s in sites
        for j in range(n)
    ]
    values = [v for v in (flat(p[0]["scores"])["ngram_r"] for p in pairs) if v is not None]
    stat = {
        "n": len(values),
        "mean": float(np.mean(values)) if values else None,
        "mean_undefined_as_0": 0.3,
        "ci95": [0.1, 0.2] if values else None,
    }
    paper = {"mean": stat["mean"], "variance": 0.01, "layers": [0]}
    counts = {"total": n, "live": n - 1, "dead": 1, "undefined": 0, "failed": 0}
    trained = {
        "path": "out/a<b>/best",
        "sha256": "c0ffee" * 10,
        "kind": "crate",
        "training": {"step": 9, "best_val_loss": 4.5},
        "config": {"n_layer": 2, "n_embd": 32, "vocab_size": vocabulary},
    }
    files = {
        "record.json": {
            "seed": 0,
            "checkpoint": trained,
            "corpus": {"source": {"name": "texts"}},
            "tokens": {"fit": 1000, "score": 900},
            "documents": {"fit": 10, "score": 9},
        },
        "summary.json": {
            "machine": {"commit": "abc"},
            "what_the_simulator_saw": {"ngram": "two tokens"},
            "sites": {
                s: {"n": {"ngram_r": counts}, "density": {"mean": 0.1}, "ngram_r": stat}
                for s in sites
            },
            "overall": {"codes": {"ngram_r": {**stat, "paper": paper}}},
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    for name, lines in zip(("scores.jsonl", "excerpts.jsonl"), zip(*pairs)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [p[0] for p in pairs], [p[1] for p in pairs]


class Page(HTMLParser):
    """What a parser finds in a page: elements in balance, attributes, the text of scripts and styles."""

    def __init__(self, content):
        super().__init__()
        self.open, self.tags, self.attributes, self.scripts, self.styles = [], [], [], [], []
        self.feed(content.decode())
        self.close()
        assert not self.open, f"never closed: {self.open}"
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("script", "style"):
            (self.scripts if tag == "script" else self.styles).append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] in ("script", "style"):
            (self.scripts if self.open[-1] == "script" else self.styles)[-1] += text


def both(folder, vocabulary, **more):
    """The two pages of a folder."""
    token = vocabulary.__getitem__
    return pages.index(folder, token, **more), human.page(folder, token, **more)


# ---- one file, no network, nothing runs ------------------------------------------------------------------


def test_pages_parse_and_refer_to_nothing_outside(tmp_path):
    results(tmp_path)
    for content in both(tmp_path, PLAIN):
        page = Page(content)
        assert (
            page.tags.count("html") == page.tags.count("title") == 1
            and "viewport" in content.decode()
        )
        assert not {"link", "iframe", "img", "object", "embed", "base"} & set(page.tags)
        for name, value in page.attributes:
            assert name not in ("src", "href", "action", "data", "srcset"), (name, value)
            assert not name.startswith("on") and "//" not in (value or ""), (name, value)
        assert not re.search(r"url\(|@import|https?:", content.decode())
        assert not re.search(
            r"innerHTML|insertAdjacent|\.write\(|\beval\b|new Function", page.scripts[1]
        )


def test_tokens_are_data(tmp_path):
    """No token opens an element or leaves its script, and the page's JSON gives them all back."""
    _, excerpts = results(tmp_path, vocabulary=len(HOSTILE))
    for content in both(tmp_path, HOSTILE):
        page = Page(content)
        assert page.tags.count("script") == 2 and "img" not in page.tags
        assert not [n for n, _ in page.attributes if n == "onerror"]
        assert b"<script>document" not in content and b"\x00" not in content
    page = Page(pages.index(tmp_path, HOSTILE.__getitem__))
    assert set(page.data["tokens"]) == {visible(t) for t in HOSTILE}
    texts = [page.data["tokens"][t] for t in page.data["neurons"][0]["top"][0][3]]
    assert texts == [visible(HOSTILE[t]) for t in excerpts[0]["top"][0]["tokens"]]


def test_every_token_can_be_seen():
    assert visible(b"a\nb\tc") == "a↵b⇥c" and visible(b" the") == " the"
    assert visible(b"\xff\x00") == r"\xff\x00" and visible(b"\n" + b" " * 22) == "↵␣22"
    assert visible("\u202e\u00a0é漢".encode()) == r"\u202e\xa0é漢"


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")


def dom(path, place, hash=""):
    """The document that headless chromium has after the page's script ran."""
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--virtual-time-budget=2000",
            "--disable-background-networking",
            f"--user-data-dir={place}",
            "--dump-dom",
            f"file://{path}{hash}",
        ],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert "</html>" in done.stdout, done.stderr[-2000:]
    return done.stdout


@browser
def test_nothing_of_a_corpus_runs_in_a_browser(tmp_path):
    """The script draws the neurons, hostile tokens stay text; and this test can tell when one does run."""
    results(tmp_path, vocabulary=len(HOSTILE))
    index, questions = both(tmp_path, HOSTILE)
    policy = re.compile(rb'<meta http-equiv="Content-Security-Policy"[^>]*>\n')
    files = {
        "index": index,
        "bare": policy.sub(b"", index),
        "human": policy.sub(b"", questions),
        "attacked": policy.sub(b"", index).replace(b"<main", ATTACK + b"<main", 1),
        "guarded": index.replace(b"<main", ATTACK + b"<main", 1),
    }
    found = {}
    for name, content in files.items():
        (tmp_path / f"{name}.html").write_bytes(content)
        hash = "#L0%2F1" if name == "bare" else ""
        found[name] = dom(tmp_path / f"{name}.html", tmp_path / "profile", hash)
    owned = {name for name, text in found.items() if "<title>owned" in text}
    assert owned == {"attacked"}, "a token ran, or the policy lets foreign scripts run"
    assert found["index"].count('href="#L') == 12  # a row a neuron
    assert "<h1>L0/1</h1>" in found["bare"] and 'class="t peak' in found["bare"]
    assert 'class="choice"' in found["human"]
    assert (
        'href="#L0%2F2"' in found["bare"] and "L0/77" in found["bare"]
    )  # the latter is not on the page
    assert "3 excerpts of the protocol's 10" in found["bare"]
    assert "Raised to 20 instead: KL 0.25 nats, loss +0.125 nats" in found["bare"]
    for name in ("bare", "human"):
        assert "&lt;img src=x" in found[name] and "<img" not in found[name].split("<script")[0]


@browser
def test_a_browser_hides_the_charts_of_other_layers_and_no_others(tmp_path, monkeypatch):
    results(tmp_path)
    monkeypatch.setattr(
        pages.dose_views, "beside", lambda *_: '<div class="charts two">steering</div>'
    )
    (tmp_path / "index.html").write_bytes(pages.index(tmp_path, PLAIN.__getitem__))
    found = re.findall(
        r'<div class="charts[^>]*>', dom(tmp_path / "index.html", tmp_path / "profile")
    )
    assert [("hidden" in tag) for tag in found] == [False, True, True, False], found


# ---- numbers ---------------------------------------------------------------------------------------------


def test_numbers_round_trip(tmp_path):
    scores, excerpts = results(tmp_path)
    data = Page(pages.index(tmp_path, PLAIN.__getitem__)).data
    for score, shows, n in zip(scores, excerpts, data["neurons"], strict=True):
        assert (data["sites"][n["site"]], n["id"]) == (score["site"], score["neuron"])
        assert dict(zip(data["metrics"], n["scores"])) == flat(score["scores"])
        assert all(n[k] == score[k] for k in ("density", "max", "mean", "status"))
        assert n.get("hist") == shows["hist"] and n.get("atoms", []) == shows["atoms"]
        assert ("effect" in n) == ("effect" in score)
        if "effect" in n:
            for mine, own in (
                (n["effect"], score["effect"]),
                (n["effect"]["far"], score["effect"]["far"]),
            ):
                for k in ("raised", "lowered"):
                    assert [[data["tokens"][t], v] for t, v in mine[k]] == [
                        [f" w{t}", v] for t, v in own[k]
                    ]
        scale = 10 ** n["digits"]
        for group in ("top", "intervals", "random"):
            for e, (at, doc, scored, _, acts, sim) in zip(
                shows[group], n.get(group, []), strict=True
            ):
                assert (at, doc, scored) == (e["at"], e["doc"], int(e["part"] == "score"))
                assert [v / scale for v in acts] == e["acts"] and [v / scale for v in sim] == e[
                    "sim"
                ]


@given(st.lists(st.integers(-999, 999), min_size=1), st.integers(-3, 12), st.floats(-1, 1))
def test_integers_keep_short_decimals(parts, decimals, other):
    """Numbers of as many decimals come back exactly, as the browser divides them; long ones nearly."""
    values = [float(f"{a}e{-decimals}") for a in parts]
    digits = pages._digits(values)
    assert [round(v * 10**digits) / 10**digits for v in values] == values
    digits, top = pages._digits([other, 1e-9]), max(abs(other), 1e-9)
    assert abs(round(other * 10**digits) / 10**digits - other) <= 0.51e-4 * top


def heights(svg, kind, top):
    """The sum of a histogram's counts, read off its outline; `top`: the highest."""
    path = re.search(f'class="{kind}" d="([^"]*)', svg)[1]
    base, unit = charts.H - charts.BOTTOM, charts.H - charts.BOTTOM - charts.TOP
    return round(sum(top * (base - float(y)) / unit for y in re.findall(r"V([\d.]+)H", path)))


def test_charts_count_every_neuron():
    rng = np.random.default_rng(0)
    draws = rng.random((50, 2)).tolist()
    neurons = [
        {"density": d, "scores": {"ngram_r": r, "null_r": -0.3, "init_r": None}} for d, r in draws
    ]
    neurons += [{"density": 0.0, "scores": {"ngram_r": None}}] * 3
    assert charts.scatter_chart(neurons, range(53)).count("h0") == 50
    svg = charts.score_chart(neurons)  # all 50 of null in one bar, which is the highest
    assert heights(svg, "bars", 50) == heights(svg, "null", 50) == 50 and 'class="init"' not in svg
    top = max(np.histogram(np.log10([d for d, _ in draws]), np.linspace(-5, 0, 41))[0])
    svg = charts.density_chart(neurons)
    assert heights(svg, "bars", top) == 50 and heights(svg, "dead", top) == 3


def test_equal_seeds_give_equal_bytes(tmp_path):
    results(tmp_path / "a")
    results(tmp_path / "b")
    assert both(tmp_path / "a", PLAIN, seed=1) == both(tmp_path / "b", PLAIN, seed=1)
    first, other = (both(tmp_path / "a", PLAIN, seed=s) for s in (1, 2))
    assert first[0] != other[0] and first[1] != other[1]


def test_a_page_keeps_its_size(tmp_path):
    """512 neurons with 23 excerpts of values that are all there and long: under 5 MB."""
    results(tmp_path, sites=("L0",), n=512, vocabulary=4096)
    assert (
        len(pages.index(tmp_path, [f"token{i:04}".encode() for i in range(4096)].__getitem__)) < 5e6
    )


def test_more_neurons_than_a_page_holds(tmp_path):
    results(tmp_path, n=20)
    pick = [
        [(n["site"], n["id"]) for n in Page(content).data["neurons"]]
        for content in (
            pages.index(tmp_path, PLAIN.__getitem__, seed=s, most=15) for s in (0, 0, 1)
        )
    ]
    assert len(set(pick[0])) == 15 and pick[0] == sorted(pick[0]) and pick[0] == pick[1] != pick[2]
    assert "15 of 40 neurons" in pages.index(tmp_path, PLAIN.__getitem__, most=15).decode()


# ---- odd inputs ------------------------------------------------------------------------------------------


def test_a_dead_layer_has_a_page(tmp_path):
    results(tmp_path, dead=("L0", "L1"))
    index, questions = both(tmp_path, PLAIN)
    assert {n["status"] for n in Page(index).data["neurons"]} == {
        "dead"
    } and "12 dead" in index.decode()
    assert questions is None


def test_bad_folders_are_told(tmp_path):
    token = PLAIN.__getitem__
    with pytest.raises(UserError, match="has no record.json; `python interpret.py neurons"):
        pages.index(tmp_path, token)
    results(tmp_path)
    whole = (tmp_path / "scores.jsonl").read_text()
    (tmp_path / "scores.jsonl").write_text(whole[:-20])
    with pytest.raises(UserError, match="scores.jsonl is damaged"):
        pages.index(tmp_path, token)
    (tmp_path / "scores.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no neurons"):
        pages.index(tmp_path, token)
    (tmp_path / "scores.jsonl").write_text(whole.replace('"mean": 0.25', '"mean": NaN'))
    assert (
        "NaN" not in Page(pages.index(tmp_path, token)).scripts[0]
    )  # it is no JSON: shown as missing


# ---- people ----------------------------------------------------------------------------------------------


def test_wilson_closed_values():
    z2 = 1.959963984540054**2
    for n in (1, 7, 30):
        assert human.wilson(0, n) == pytest.approx((0, z2 / (n + z2)), abs=1e-12)
        assert human.wilson(n, n) == pytest.approx((n / (n + z2), 1), abs=1e-12)
    assert human.wilson(5, 10) == pytest.approx((0.236593, 0.763407), abs=1e-6)
    assert human.wilson(81, 263) == pytest.approx(
        (0.2553, 0.3662), abs=1e-4
    )  # Newcombe 1998, table I
    assert human.wilson(0, 0) == (0, 1)


@given(st.integers(1, 500), st.floats(0, 1))
def test_wilson_ends_are_z_deviations_away(n, share):
    """Its ends are the p for which the observed share is z standard deviations of p away."""
    right = round(share * n)
    for p in human.wilson(right, n):
        assert abs(right / n - p) == pytest.approx(
            1.959963984540054 * math.sqrt(p * (1 - p) / n), abs=1e-9
        )


def test_questions_have_one_right_answer(tmp_path):
    scores, excerpts = results(tmp_path, n=12)
    own = {
        (e["site"], e["neuron"]): [
            [visible(PLAIN[t]) for t in x["tokens"]] for x in e["top"] if x["part"] == "score"
        ]
        for e in excerpts
    }
    labels = {
        (s["site"], s["neuron"]): pages.label_text(s["label"], lambda t: PLAIN[t].decode(), 10)
        for s in scores
    }
    data = Page(human.page(tmp_path, PLAIN.__getitem__, seed=0, n=9)).data
    assert [q["task"] for q in data["questions"]] == ["intruder"] * 9 + ["label"] * 9
    for q in data["questions"]:
        key, answer = (q["site"], q["neuron"]), q["options"][q["answer"]]
        if q["task"] == "intruder":
            assert [o["tokens"] in own[key] for o in q["options"]].count(False) == 1
            assert len(q["options"]) == 5
            assert answer["tokens"] not in own[key] and "values" not in answer
        else:
            assert (
                answer == labels[key] and q["options"].count(answer) == 1 and len(q["options"]) == 4
            )
            assert all(g["tokens"] in own[key] for g in q["given"])
    asked = [
        {(q["site"], q["neuron"]) for q in data["questions"] if q["task"] == t}
        for t in human.CHANCE
    ]
    assert asked[0] == asked[1] and len(asked[0]) == 9
    assert len({q["answer"] for q in data["questions"]}) > 2  # not always in the same place


def test_answers_are_counted(tmp_path):
    answers = [{"task": "intruder", "answer": 1, "choice": c} for c in (1, 1, 0, None)]
    answers += [{"task": "label", "answer": 0, "choice": None}]
    (tmp_path / "a.json").write_text(json.dumps({"answers": answers}))
    found = human.score(tmp_path / "a.json")
    assert found["intruder"] == {
        "n": 3,
        "right": 2,
        "accuracy": 2 / 3,
        "ci95": human.wilson(2, 3),
        "chance": 0.2,
        "unanswered": 1,
    }
    assert found["label"]["accuracy"] is None and found["label"]["chance"] == 0.25
    assert "2 of 3     0.667  0.208 to 0.939" in human.table(found)
    for text in ("", "[]", '{"answers": [1]}', '{"answers": [{"task": "label"}]}'):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(UserError, match="cannot be read as answers"):
            human.score(tmp_path / "b.json")


# ---- Neuronpedia -----------------------------------------------------------------------------------------


def test_neuronpedia_shape(tmp_path):
    scores, excerpts = results(tmp_path)
    scores[0]["effect"] = {"raised": [[4, 1.5], [5, 1.25]], "lowered": [[6, -2.0]], "clamp": 8.0}
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(s) + "\n" for s in scores))
    content = neuronpedia.export(tmp_path, PLAIN.__getitem__, "tiny")
    lines = [json.loads(line) for line in content.splitlines()]
    assert [(f["modelId"], f["layer"], f["index"]) for f in lines[:2]] == [
        ("tiny", "0-codes", "0"),
        ("tiny", "0-codes", "1"),
    ]
    for feature, score, shows in zip(lines, scores, excerpts, strict=True):
        assert (
            feature["frac_nonzero"] == score["density"] and feature["maxActApprox"] == score["max"]
        )
        assert (
            len(feature["freq_hist_data_bar_heights"])
            == len(feature["freq_hist_data_bar_values"])
            == 50
        )
        assert len(feature["activations"]) == sum(
            len(shows[k]) for k in ("top", "intervals", "random")
        )
        for a in feature["activations"]:
            assert len(a["tokens"]) == len(a["values"])
            assert a["values"][a["maxValueTokenIndex"]] == a["maxValue"]
        for side in ("pos", "neg"):
            assert len(feature[f"{side}_str"]) == len(feature[f"{side}_values"])
    assert lines[0]["pos_str"] == [" w4", " w5"] and lines[0]["neg_values"] == [-2.0]
    assert {
        s["explanationScoreTypeName"]: s["value"] for s in lines[0]["explanations"][0]["scores"]
    } == {k: v for k, v in flat(scores[0]["scores"]).items() if v is not None}


# ---- the command -----------------------------------------------------------------------------------------


def test_the_command(tmp_path):
    """`interpret.py report` beside a real checkpoint: its pages, and one sentence where results lack."""
    from crate_mini.data.tokenizer import load_tokenizer
    from crate_mini.model import LM, Config
    from crate_mini.training import checkpoint

    tokenizer = load_tokenizer("bytes")
    config = Config(vocab_size=tokenizer.vocab_size, block_size=64, n_layer=2, n_head=2, n_embd=32)
    checkpoint.save(
        tmp_path / "best",
        LM(config),
        training={"step": 0},
        tokenizer={"spec": "bytes", "hash": tokenizer.hash},
    )

    def report(*flags):
        command = [
            sys.executable,
            str(ROOT / "interpret.py"),
            "report",
            str(tmp_path / "best"),
            *flags,
        ]
        return subprocess.run(command, capture_output=True, text=True)

    done = report()
    assert (
        done.returncode == 2
        and "has no record.json" in done.stderr
        and done.stderr.count("\n") == 1
    )
    results(tmp_path / "interpret", n=12)
    done = report("--neuronpedia", str(tmp_path / "np.jsonl"))
    assert done.returncode == 0, done.stderr
    assert Page((tmp_path / "interpret" / "index.html").read_bytes()).data["sites"] == ["L0", "L1"]
    assert Page((tmp_path / "interpret" / "human.html").read_bytes()).data["questions"]
    assert len((tmp_path / "np.jsonl").read_text().splitlines()) == 24

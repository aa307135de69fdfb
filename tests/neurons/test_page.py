"""index.html and human.html hold what the result files hold, and nothing of a corpus can run."""

import json
import re

import pytest
from html_pages import ParsedPage, browser, dom, missing_width, without_policy
from hypothesis import given
from hypothesis import strategies as st
from neuron_results import PLAIN, write_results

from crate_mini import UserError
from crate_mini.data.tokenizer import visible
from crate_mini.neurons import page, page_data, score_files, steering_section, survey
from crate_mini.neurons.protocols import flat_scores

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


def index(folder, vocabulary=PLAIN, **settings):
    return page.index(folder, score_files.read(folder), vocabulary.__getitem__, **settings)


def both_pages(folder, vocabulary, **settings):
    """index.html and human.html of a folder."""
    questions = survey.page(score_files.read(folder), vocabulary.__getitem__, **settings)
    return index(folder, vocabulary, **settings), questions


# ---- one file, no network, nothing runs ----------------------------------------------------------


def test_pages_parse_and_refer_to_nothing_outside(tmp_path):
    write_results(tmp_path)
    for content in both_pages(tmp_path, PLAIN):
        parsed, text = ParsedPage(content), content.decode()
        assert parsed.tags.count("html") == parsed.tags.count("title") == 1
        assert "viewport" in text
        assert not {"link", "iframe", "img", "object", "embed", "base"} & set(parsed.tags)
        for name, value in parsed.attributes:
            assert name not in ("src", "href", "action", "data", "srcset"), (name, value)
            assert not name.startswith("on"), (name, value)
            assert "//" not in (value or ""), (name, value)
        assert not re.search(r"url\(|@import|https?:", text)
        dangerous = r"innerHTML|insertAdjacent|\.write\(|\beval\b|new Function"
        assert not re.search(dangerous, parsed.scripts[1])


def test_tokens_are_data(tmp_path):
    """No token opens an element or leaves its script, and the page's JSON gives them all back."""
    _, excerpts = write_results(tmp_path, vocabulary=len(HOSTILE))
    for content in both_pages(tmp_path, HOSTILE):
        parsed = ParsedPage(content)
        assert parsed.tags.count("script") == 2
        assert "img" not in parsed.tags
        assert "onerror" not in [name for name, _ in parsed.attributes]
        assert b"<script>document" not in content
        assert b"\x00" not in content
    data = ParsedPage(index(tmp_path, HOSTILE)).data
    assert set(data["tokens"]) == {visible(token) for token in HOSTILE}
    packed = data["neurons"][0]["top"][0]
    texts = [data["tokens"][place] for place in packed[3]]
    assert texts == [visible(HOSTILE[id]) for id in excerpts[0]["top"][0]["tokens"]]


def test_every_token_can_be_seen():
    assert visible(b"a\nb\tc") == "a↵b⇥c"
    assert visible(b" the") == " the"
    assert visible(b"\xff\x00") == r"\xff\x00"
    assert visible(b"\n" + b" " * 22) == "↵␣22"
    assert visible("\u202e\u00a0é漢".encode()) == r"\u202e\xa0é漢"


@browser
def test_nothing_of_a_corpus_runs_in_a_browser(tmp_path):
    """Hostile tokens stay text; and the test can tell when one does run."""
    write_results(tmp_path, vocabulary=len(HOSTILE))
    content, questions = both_pages(tmp_path, HOSTILE)
    attack = (b"<main", ATTACK + b"<main", 1)
    pages = {
        "index": content,
        "bare": without_policy(content),
        "human": without_policy(questions),
        "attacked": without_policy(content).replace(*attack),
        "guarded": content.replace(*attack),
    }
    doms = {}
    for name, page_bytes in pages.items():
        (tmp_path / f"{name}.html").write_bytes(page_bytes)
        fragment = "#L0%2F1" if name == "bare" else ""
        doms[name] = dom(tmp_path / f"{name}.html", tmp_path / "profile", fragment)
    owned = {name for name, text in doms.items() if "<title>owned" in text}
    assert owned == {"attacked"}, "a token ran, or the policy lets foreign scripts run"
    assert doms["index"].count('href="#L') == 12  # a row for each neuron
    neuron = doms["bare"]
    assert "<h1>L0/1</h1>" in neuron
    assert 'class="t peak' in neuron
    assert 'class="choice"' in doms["human"]
    assert 'href="#L0%2F2"' in neuron  # a relative on the page
    assert "L0/77" in neuron  # and one that is not
    assert "3 excerpts of the protocol's 10" in neuron
    assert "Raised to 20 instead: KL 0.25 nats, loss +0.125 nats" in neuron
    assert "from 4 documents: KL 0.01 nats [0.005, 0.02], loss −0.5 nats [-0.75, -0.25]" in neuron
    assert "[0.25, 0.75]" in neuron and "one half only" in neuron
    for name in ("bare", "human"):
        assert "&lt;img src=x" in doms[name]
        assert "<img" not in doms[name].split("<script")[0]


@browser
def test_a_browser_hides_the_charts_of_other_layers_and_no_others(tmp_path, monkeypatch):
    write_results(tmp_path)
    other_charts = '<div class="charts">other charts</div>'
    monkeypatch.setattr(steering_section, "section", lambda *_: other_charts)
    (tmp_path / "index.html").write_bytes(index(tmp_path))
    text = dom(tmp_path / "index.html", tmp_path / "profile")
    blocks = re.findall(r'<div class="charts[^>]*>', text)
    assert ["hidden" in tag for tag in blocks] == [False, True, True, False], blocks


@browser
def test_no_page_scrolls_sideways_on_a_phone_and_one_that_would_is_noticed(tmp_path):
    write_results(tmp_path, vocabulary=len(HOSTILE))
    content, questions = both_pages(tmp_path, HOSTILE)
    assert missing_width(content, tmp_path) == 0
    assert missing_width(content, tmp_path, "#L0%2F1") == 0  # the page of a neuron
    assert missing_width(questions, tmp_path) == 0
    wide = b'<div style="width: 450px">wide</div></body>'
    assert missing_width(content.replace(b"</body>", wide), tmp_path) >= 50


# ---- numbers -------------------------------------------------------------------------------------


def test_numbers_round_trip(tmp_path):
    scores, excerpts = write_results(tmp_path)
    data = ParsedPage(index(tmp_path)).data
    for score, shown, packed in zip(scores, excerpts, data["neurons"], strict=True):
        site = data["sites"][packed["site"]]
        assert (site, packed["id"]) == (score["site"], score["neuron"])
        assert dict(zip(data["metrics"], packed["scores"])) == flat_scores(score["scores"])
        for name in ("density", "max", "mean", "status"):
            assert packed[name] == score[name]
        assert packed.get("hist") == shown["hist"]
        assert packed.get("atoms", []) == shown["atoms"]
        assert ("effect" in packed) == ("effect" in score)
        if "effect" in packed:
            assert_same_effect(packed["effect"], score["effect"], data["tokens"])
            assert_same_effect(packed["effect"]["far"], score["effect"]["far"], data["tokens"])
        scale = 10 ** packed["digits"]
        for group in ("top", "intervals", "random"):
            for excerpt, row in zip(shown[group], packed.get(group, []), strict=True):
                peak, document, scored, _, acts, simulated = row
                assert (peak, document) == (excerpt["at"], excerpt["doc"])
                assert scored == (excerpt["part"] == "score")
                assert [value / scale for value in acts] == excerpt["acts"]
                assert [value / scale for value in simulated] == excerpt["sim"]


def assert_same_effect(packed, effect, tokens):
    for direction in ("raised", "lowered"):
        texts = [[tokens[place], *change] for place, *change in packed[direction]]
        assert texts == [[f" w{id}", *change] for id, *change in effect[direction]]


@given(st.lists(st.integers(-999, 999), min_size=1), st.integers(-3, 12), st.floats(-1, 1))
def test_integers_keep_short_decimals(parts, decimals, other):
    """Short decimals come back exactly, as the browser divides them; long ones nearly."""
    values = [float(f"{part}e{-decimals}") for part in parts]
    digits = page_data.digits(values)
    assert [round(value * 10**digits) / 10**digits for value in values] == values
    digits = page_data.digits([other, 1e-9])
    largest = max(abs(other), 1e-9)
    assert abs(round(other * 10**digits) / 10**digits - other) <= 0.51e-4 * largest


def test_equal_seeds_give_equal_bytes(tmp_path):
    write_results(tmp_path / "a")
    write_results(tmp_path / "b")
    pages = both_pages(tmp_path / "a", PLAIN, seed=1)
    assert pages == both_pages(tmp_path / "b", PLAIN, seed=1)
    for content, other in zip(pages, both_pages(tmp_path / "a", PLAIN, seed=2), strict=True):
        assert content != other


def test_a_page_keeps_its_size(tmp_path):
    """512 neurons with 23 excerpts of long values, none missing, take less than 5 MB."""
    write_results(tmp_path, sites=("L0",), n=512, vocabulary=4096)
    vocabulary = [f"token{i:04}".encode() for i in range(4096)]
    assert len(index(tmp_path, vocabulary)) < 5e6


def test_a_page_draws_neurons_if_there_are_too_many(tmp_path):
    write_results(tmp_path, n=20)
    drawn = []
    for seed in (0, 0, 1):
        neurons = ParsedPage(index(tmp_path, seed=seed, most=15)).data["neurons"]
        drawn.append([(neuron["site"], neuron["id"]) for neuron in neurons])
    assert len(set(drawn[0])) == 15
    assert drawn[0] == sorted(drawn[0])
    assert drawn[0] == drawn[1] != drawn[2]
    assert "15 of 40 neurons" in index(tmp_path, most=15).decode()


# ---- odd inputs ----------------------------------------------------------------------------------


def test_a_dead_layer_has_a_page(tmp_path):
    write_results(tmp_path, dead=("L0", "L1"))
    content, questions = both_pages(tmp_path, PLAIN)
    assert {neuron["status"] for neuron in ParsedPage(content).data["neurons"]} == {"dead"}
    assert "12 dead" in content.decode()
    assert questions is None


def test_bad_folders_get_one_sentence(tmp_path):
    with pytest.raises(UserError, match="has no record.json; `python interpret.py neurons"):
        index(tmp_path)
    write_results(tmp_path)
    scores = tmp_path / "scores.jsonl"
    whole = scores.read_text()
    scores.write_text(whole[:-20])
    with pytest.raises(UserError, match="scores.jsonl is damaged"):
        index(tmp_path)
    scores.write_text("")
    with pytest.raises(UserError, match="holds no neurons"):
        index(tmp_path)


def test_not_a_number_is_shown_as_missing(tmp_path):
    write_results(tmp_path)
    scores = tmp_path / "scores.jsonl"
    scores.write_text(scores.read_text().replace('"mean": 0.25', '"mean": NaN'))
    data = ParsedPage(index(tmp_path)).scripts[0]
    assert "NaN" not in data
    json.loads(data)

"""`interpret.py text`: the neurons of a text of the user's, in a table and on a page."""

import io
import json
import sys
import warnings

import pytest
import torch
from html_pages import ParsedPage, browser, dom, missing_width, without_policy
from tiny_checkpoints import T, save_checkpoint, write_scores, write_text

import interpret
from crate_mini.console import results, terminal
from crate_mini.lab import Lab
from crate_mini.neurons.record import sites
from crate_mini.neurons.text import Firing, read_ids

HOSTILE = '<script>alert("x")</script> \x1b[31m\u202e&amp; </p><img src=x onerror=alert(1)>'


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRATE_CACHE", str(folder / "cache"))
        yield save_checkpoint(folder / "run" / "best", write_text(folder / "words.txt"))


@pytest.fixture
def call(ckpt, monkeypatch, capsys):
    """Run `python interpret.py text CKPT WORDS`; (exit code, stdout, stderr)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["interpret.py", "text", str(ckpt), *words])
        with pytest.raises(SystemExit) as end:
            terminal.run(interpret.main)
        printed = capsys.readouterr()
        return end.value.code, printed.out, printed.err

    return run


def page_of(ckpt):
    return (results.folder(ckpt) / "text.html").read_bytes()


@pytest.fixture(scope="module")
def firing(ckpt):
    lab = Lab(str(ckpt))
    return Firing(lab, lab.ids("code rate. step"), sites(lab.model))


# ---- what fires ----------------------------------------------------------------------------------


def test_values_are_the_codes_and_ranks_follow_from_them(firing):
    codes = firing.lab.codes("code rate. step")  # (L, T, h)
    assert torch.equal(firing.acts, torch.cat(list(codes), 1))
    assert firing.name(0) == "L0/0" and firing.name(128) == "L1/0"
    dead = 3
    assert firing.maximum[dead] == 0 and firing.strength[dead] == 0
    strongest = firing.strongest(500)
    assert dead not in strongest
    ratios = (codes.amax(1).flatten() / firing.maximum)[strongest]
    assert torch.equal(ratios, ratios.sort(descending=True).values)
    lifts = firing.lift[firing.most_specific(20)]
    assert torch.equal(lifts, lifts.sort(descending=True).values)
    for i in firing.most_specific(20):
        assert firing.acts[firing.peak[i], i] == firing.acts[:, i].max()
        assert firing.strength[i] >= 1 / 3


def test_text_of_a_usual_kind_has_a_usual_mean(ckpt):
    """The lift of a text like the held-out one is about 1; the mean is over 16,384 tokens."""
    lab = Lab(str(ckpt))
    ids = torch.cat([ids.flatten() for ids, _ in lab.held_out().blocks("val", 1, T, T)])
    firing = Firing(lab, ids.tolist(), sites(lab.model))
    live = firing.density > 0.2
    assert 0.5 < firing.lift[live].median() < 2


# ---- the command ---------------------------------------------------------------------------------


def test_table_and_page(ckpt, call):
    code, printed, err = call("code rate. step", "--top", "5")
    assert not code, err
    assert "15 tokens, compared with" in printed
    for half in ("closest to their own maximum", "firing here more than elsewhere"):
        assert half in printed
    assert printed.count("L0/") + printed.count("L1/") == 10
    page = ParsedPage(page_of(ckpt))
    assert "".join(page.data["tokens"]) == "code rate. step"
    for neuron in page.data["neurons"]:
        assert len(neuron["at"]) == len(neuron["levels"]) > 0
        assert neuron["page"] == ""  # `neurons` has not run: nothing to click to
        assert max(neuron["levels"]) == neuron["levels"][neuron["at"].index(neuron["peak"])]


def test_labels_and_links_once_neurons_has_run(ckpt, call):
    write_scores(ckpt)
    folder = results.folder(ckpt)
    (folder / "index.html").write_text("made by neurons")
    sha256 = json.loads((ckpt / "config.json").read_text())["sha256"]
    results.write_json(folder / "beyond.json", {"checkpoint": {"sha256": sha256}})
    row = {"site": "L0", "neuron": 5, "property": "in round brackets", "r": 0.4}
    results.write_rows(folder / "beyond-neurons.jsonl", [row])
    try:
        assert not call("ssss", "--top", "200")[0]
        neurons = {n["name"]: n for n in ParsedPage(page_of(ckpt)).data["neurons"]}
        known = [name for name, neuron in neurons.items() if neuron["page"]]
        assert known and all(neurons[name]["label"] for name in known)
        if "L0/5" in neurons:
            assert neurons["L0/5"]["property"] == "in round brackets (r 0.40)"
        write_scores(ckpt, sha256="of another")
        results.write_json(folder / "beyond.json", {"checkpoint": {"sha256": "another"}})
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # a note is printed, as by other commands
            code, printed, _ = call("ssss")
        assert not code and "describes another checkpoint" in printed
        neurons = ParsedPage(page_of(ckpt)).data["neurons"]
        assert not any(n["page"] or n["label"] or n["property"] for n in neurons)
    finally:
        for path in folder.iterdir():
            path.unlink()


def test_hostile_text_is_inert(ckpt, call):
    code, printed, err = call(HOSTILE)
    assert not code, err
    assert "\x1b" not in printed and "\u202e" not in printed
    page = page_of(ckpt)
    assert page.count(b"<script") == 2 and b"<img" not in page
    assert "&lt;script" not in ParsedPage(page).data["tokens"]


@pytest.mark.parametrize(
    "text", ["- a list item", "-5 degrees", "a_b=c", " ", "\udcff\udc80", "\ud83d", "é"]
)
def test_any_text_is_taken(call, text):
    code, printed, err = call(text)
    assert not code, err
    assert "tokens, compared with" in printed


def test_standard_input_and_long_texts(call, monkeypatch):
    for text, note in (
        ("from stdin", ""),
        ("a" * (T + 1), f"the first {T} of {T + 1}"),
        ("word " * 10_000, f"these are the first {T} of more than"),
    ):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        code, printed, err = call("-")
        assert not code, err
        assert note in printed and ("note" in printed) == bool(note)


def test_a_cut_never_shows_more_than_the_model_reads(ckpt):
    lab = Lab(str(ckpt))
    for n in (1, T - 1, T, T + 1, 100 * T):
        ids, note = read_ids(lab, "a" * n)
        assert len(ids) == min(n, T) and bool(note) == (n > T)


def test_what_goes_wrong_is_one_sentence(ckpt, call, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    for words, reason in (
        ([], "there is no text; give some"),
        ([""], "there is no text; give some"),
        (["-"], "the text is empty; give some"),
        (["text", "--layers", "7"], "layer '7' does not exist"),
        (["text", "--top", "0"], "--top 0"),
        (["two", "words"], "unknown argument 'words'"),
        (["text", "--data", "no.txt"], "no.txt"),
    ):
        code, printed, err = call(*words)
        assert (code, err.count("\n"), printed) == (2, 1, ""), (words, err)
        assert reason in err


@browser
def test_the_page_in_a_browser(ckpt, call, tmp_path):
    """A neuron colours the text, a token lists its neurons, hostile tokens stay text."""
    assert not call(HOSTILE[:T])[0]
    check = b"""<script>{
    const marks = document.querySelectorAll("#text .t");
    const coloured = [...marks].filter(s => s.style.getPropertyValue("--a") > 0).length;
    const listed = document.querySelectorAll(".neuron").length;
    marks[4].click();
    const chosen = document.querySelectorAll("#text .chosen").length;
    document.querySelectorAll(".neuron")[1].click();
    const pressed = document.querySelectorAll(".neuron[aria-pressed=true]").length;
    document.title = [marks.length, coloured > 0, listed > 9, chosen, pressed].join(" ");
    }</script></body>"""
    path = tmp_path / "text.html"
    path.write_bytes(without_policy(page_of(ckpt)).replace(b"</body>", check))
    assert f"<title>{T} true true 1 1</title>" in dom(path, tmp_path / "profile")


@browser
def test_the_page_does_not_scroll_sideways_on_a_phone(ckpt, call, tmp_path):
    assert not call("wide" * 12 + " words")[0]
    assert missing_width(page_of(ckpt), tmp_path) == 0

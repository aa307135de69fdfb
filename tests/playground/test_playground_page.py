"""The page shows what Python computes, on a phone too; hostile text stays text; it is quick."""

import json
import os
import re
from unittest import mock

import pytest
import torch
from browser_runs import run, with_checks
from html_pages import ParsedPage, browser
from tiny_checkpoints import save_checkpoint, write_scores, write_text

import interpret
from crate_mini import UserError, model
from crate_mini.console import results
from crate_mini.data.batches import open_corpus
from crate_mini.data.tokenizer import load_tokenizer
from crate_mini.generate import generate
from crate_mini.intervene import Intervention, steer
from crate_mini.lab import Lab
from crate_mini.playground import command, export
from crate_mini.steering.next_token import next_token
from crate_mini.training import checkpoint

TEXT = "code rate step"
ATTACK = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
NEURON = 9  # of layer 0, with a label and a maximum of 1.5
WAYS = [  # op, multiples of the maximum, where
    ("set", 3, "all"),
    ("add", -2.5, "last"),
    ("ablate", 0, "all"),
]
LONGEST = 8e6  # bytes of the default model's page
QUICK = 100  # ms


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two tiny checkpoints, crate and gpt2, and hostile labels for crate."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRATE_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = tmp_path_factory.mktemp("playground")
        text = write_text(folder / "text.txt")
        for kind in ("crate", "gpt2"):
            save_checkpoint(folder / kind / "<b>best", text, kind)
        write_scores(folder / "crate" / "<b>best")
        scores = folder / "crate" / "interpret" / "scores.jsonl"
        rows = [json.loads(line) for line in scores.read_text().splitlines()]
        for row in rows:
            row.pop("digest", None)
            if row["neuron"] == 11:
                row["label"] = {"text": ATTACK}
        results.write_rows(scores, rows)
        yield folder


@pytest.fixture(scope="module")
def labs(place):
    """Labs of both, with weights that bfloat16 can hold: the page then has the same ones."""
    opened = [Lab(place / kind / "<b>best", device="cpu") for kind in ("crate", "gpt2")]
    for lab in opened:
        for parameter in lab.model.parameters():
            parameter.data = parameter.data.bfloat16().float()
    return opened


@pytest.fixture(scope="module")
def content(labs):
    return command.page(labs, "code " + ATTACK[:20])


@pytest.fixture(scope="module")
def read(content, place):
    """What a reader of the page of both models saw."""
    given = {
        "text": TEXT,
        "hostile": ATTACK,
        "long": "abcdefgh" * 9 + "!?",
        "steered": {"layer": 0, "neuron": NEURON, "ways": WAYS},
    }
    path = place / "both.html"
    path.write_bytes(with_checks(content, "page_checks.js", given))
    return run(path, place / "profile", budget=20_000)


# ---- the file ------------------------------------------------------------------------------------


def test_a_page_refers_to_nothing_outside_and_holds_no_markup_of_others(content):
    parsed, text = ParsedPage(content), content.decode()
    assert not {"link", "iframe", "img", "object", "embed", "base"} & set(parsed.tags)
    assert parsed.tags.count("script") == 2
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert not re.search(r"url\(|@import|https?:|fetch\(|XMLHttp|WebSocket|import\(", text)
    assert not re.search(r"innerHTML|insertAdjacent|\.write\(|\beval\b|Function\(", text)
    assert "&lt;b&gt;best" in text and "<b>best" not in text
    labels = parsed.data["models"][0]["neurons"][0]["labels"]
    assert labels[11] == ATTACK and labels[5] == "token: “s”, “z”" and labels[0] == ""


def test_maxima_are_recorded_or_observed(labs, content):
    data = ParsedPage(content).data
    for lab, packed in zip(labs, data["models"]):
        maxima, means = export.observed(lab)
        for layer, facts in enumerate(packed["neurons"]):
            known = {5: 1.5, 9: 1.5, 11: 1.5} if lab is labs[0] and layer == 0 else {}
            for neuron, value in enumerate(maxima[layer].tolist()):
                expected = known.get(neuron, pytest.approx(value, rel=1e-5))
                assert facts["max"][neuron] == expected
            assert facts["mean"] == pytest.approx(means[layer].tolist(), rel=1e-5)
    known = labs[0].known.observed(1)  # what steer.py multiplies
    torch.testing.assert_close(export.observed(labs[0])[0][1], known)


def test_maxima_on_another_text_replace_the_recorded_ones(place):
    lab = Lab(place / "crate" / "<b>best", data=str(place / "text.txt"), device="cpu")
    facts = export.neurons(lab)[0]
    assert facts["max"][NEURON] != 1.5
    assert facts["max"][NEURON] == pytest.approx(lab.known.observed(0)[NEURON].item(), rel=1e-5)


# ---- a reader ------------------------------------------------------------------------------------


def percent(text):
    """A probability as the page shows it, as a number."""
    return float(text.removeprefix("< ").removesuffix(" %")) / 100


@torch.no_grad()
def probabilities(lab, text=TEXT):
    return lab.model(torch.tensor([lab.ids(text)]))[0, -1].softmax(-1)


def continued(lab, text=TEXT):
    ids = torch.tensor([lab.ids(text)])
    return generate(lab.model, ids, 30, temperature=0)[0, -30:].tolist()


def assert_continues(lab, shown, text=TEXT):
    """The page shows the last tokens of the text, then a greedy continuation."""
    known = [id for id in continued(lab, text) if id < lab.tokenizer.vocab_size]
    end = lab.tokenizer.decode(lab.ids(text)[-6:]).lstrip()
    continuation = lab.tokenizer.decode(known)
    assert shown == end + re.sub("\n+", lambda run: "↵" * len(run[0]) + "\n", continuation)


@browser
def test_it_opens_with_a_text_a_neuron_and_a_prediction(read):
    first, _ = read["opened"]
    assert "".join(first["tokens"]) == "code " + ATTACK[:20]
    assert first["boxed"] == len(first["tokens"]) - 1
    assert len(first["strong"]) == len(first["specific"]) == 8
    assert max(first["colours"]) > 0
    assert first["pressed"] == ["off"] and not first["after"]


@browser
def test_the_bars_and_continuations_are_the_models(read, labs):
    for lab, shown in zip(labs, read["typed"]):
        p = probabilities(lab)
        top = p.topk(10)
        assert {bar[0] for bar in shown["bars"]} == {lab.token(id) for id in top.indices.tolist()}
        for (_, value), expected in zip(shown["bars"], top.values.tolist()):
            assert percent(value) == pytest.approx(expected, abs=0.006)
        assert_continues(lab, shown["before"])


@browser
def test_the_lists_name_the_neurons_nearest_to_their_maximum_and_furthest_above_their_mean(
    read, labs, content
):
    data = ParsedPage(content).data
    for lab, shown, packed in zip(labs, read["typed"], data["models"]):
        codes = lab.codes(TEXT)[:, -1]
        maxima = torch.tensor([facts["max"] for facts in packed["neurons"]])
        means = torch.tensor([facts["mean"] for facts in packed["neurons"]])
        for rows, values in ((shown["strong"], codes / maxima), (shown["specific"], codes / means)):
            values = torch.where((maxima > 0) & (codes > 0), values, 0)
            best = values.flatten().topk(8).values
            for (name, _, value), expected in zip(rows, best.tolist()):
                layer, neuron = name.removeprefix("L").split("/")
                of_row = values[int(layer), int(neuron)].item()
                assert of_row == pytest.approx(expected, rel=1e-3)
                assert float(re.match(r"[\d.e+]+", value)[0]) == pytest.approx(of_row, rel=0.06)


@browser
def test_two_clicks_show_how_much_each_head_attends(read):
    for shown in read["pair"]:
        assert shown["boxed"] == 2
        assert shown["titles"][3] == "Attention: how much “a” attends to “d”, in each head"
        assert len(shown["heads"]) == 4
        assert all(0 <= percent(weight) <= 1 for weight in shown["heads"])
        assert shown["titles"][1] == "Next token after “d”"


@browser
def test_arrow_keys_walk_and_a_head_can_be_chosen(read):
    assert read["moved"] == 1 and read["focused"] == "o"
    assert "head 0 of layer 0" in read["oneHead"]


@browser
@pytest.mark.parametrize("way", range(len(WAYS)))
def test_steering_moves_bars_continuation_and_kl_as_in_python(way, read, labs):
    op, multiple, where = WAYS[way]
    lab, shown = labs[0], read["steered"][way]
    change = Intervention(0, NEURON, op, multiple * 1.5, positions=where)
    assert shown["pressed"] == [op] and shown["titles"][1:3] == [
        "Next token after “p”",
        f"Steer L0/{NEURON}",
    ]
    before = probabilities(lab)
    with steer(lab.model, [change]):
        after = probabilities(lab)
        assert_continues(lab, shown["after"])
    assert_continues(lab, shown["before"])
    p = {lab.token(id): (before[id].item(), after[id].item()) for id in range(len(before))}
    for token, values in shown["bars"]:
        for value, expected in zip(values.split(" → "), p[token]):
            assert percent(value) == pytest.approx(expected, abs=0.006)
    kl = next_token(lab.model, lab.ids(TEXT), [change]).kl
    shown_kl = shown["kl"].removeprefix("KL ").removeprefix("< ").split()[0]
    assert float(shown_kl) == pytest.approx(kl, abs=2e-4, rel=0.01)
    if op == "set":
        assert shown["amount"] == "3 × its maximum = 4.5" and kl > 1e-3
    if op == "add":
        assert shown["amount"] == "−2.5 × its maximum = −3.75"


@browser
def test_steering_can_be_turned_off(read):
    assert read["off"]["bars"] == read["typed"][0]["bars"]
    assert not read["off"]["kl"] and not read["off"]["after"]


@browser
def test_hostile_text_is_inert(read):
    assert "owned" not in read["title"] + read["owned"]
    assert read["foreign"] == 0
    for shown in read["hostile"]:
        assert "".join(shown["tokens"]) == ATTACK[-32:]


@browser
def test_a_long_text_keeps_its_last_tokens_and_says_so(read):
    assert "".join(read["long"]) == ("abcdefgh" * 9 + "!?")[-32:]
    assert "32 tokens" in read["longStatus"]
    assert "too long: the model reads the last 32, 42 are left out" in read["longStatus"]


@browser
def test_no_text_shows_nothing(read):
    for shown in read["empty"]:
        assert not shown["tokens"] and not shown["bars"] and not shown["heads"]
        assert not shown["strong"] and shown["before"] is None


@browser
def test_no_page_is_wider_than_a_phone(content, labs, place):
    """In frames of 400 px, because no window of headless chromium is that narrow."""
    pages = {"one": command.page(labs[:1], "code"), "two": content}
    frames = ""
    for name, page in pages.items():
        (place / f"{name}.html").write_bytes(with_checks(page, "width_checks.js"))
        frames += f'<iframe src="{name}.html" width="400" height="900" style="border:0"></iframe>'
    script = """<pre id="results">[]</pre><script>
      const widths = [];
      addEventListener("message", event => {
        widths.push(event.data);
        document.getElementById("results").textContent = JSON.stringify(widths);
      });</script>"""
    (place / "frames.html").write_text(f"<html><body>{script}{frames}</body></html>")
    widths = run(place / "frames.html", place / "profile", budget=3000)
    assert len(widths) == 2
    for page in widths:
        assert page["needed"] <= page["width"] <= 400
        assert page["small"] == 0


# ---- the command, and the default model ----------------------------------------------------------


def playground(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["interpret.py", "playground", *map(str, words)])
    return interpret.main()


def test_the_command_writes_next_to_the_checkpoint_or_to_a_file(place, monkeypatch, capsys):
    crate, gpt2 = place / "crate" / "<b>best", place / "gpt2" / "<b>best"
    playground(monkeypatch, crate)
    page = ParsedPage((place / "crate" / "interpret" / "playground.html").read_bytes())
    assert len(page.data["models"]) == 1
    assert "playground.html" in capsys.readouterr().out
    out = place / "elsewhere" / "page.html"
    playground(monkeypatch, crate, gpt2, "--out", out, "--text", "rate")
    page = ParsedPage(out.read_bytes())
    assert [packed["loss"] for packed in page.data["models"]] == [5.0, 5.0]
    assert page.data["text"] == "rate"
    assert f"{gpt2} has no labels" in capsys.readouterr().out


def test_mistakes_get_one_sentence(place, monkeypatch):
    crate = place / "crate" / "<b>best"
    with pytest.raises(UserError, match="playground needs a checkpoint folder"):
        playground(monkeypatch)
    with pytest.raises(UserError, match="No checkpoint in"):
        playground(monkeypatch, place / "nowhere")
    with pytest.raises(UserError, match="unknown argument"):
        playground(monkeypatch, crate, crate, crate)
    with pytest.raises(UserError, match="is a folder; give a file"):
        playground(monkeypatch, crate, "--out", place)


def test_models_of_different_tokens_are_refused(labs):
    other = mock.Mock(checkpoint="out/b", tokenizer=mock.Mock(hash="other"))
    other.tokenizer.name = "pydocs"
    with pytest.raises(UserError, match="out/b reads the tokens of pydocs, .* those of bytes"):
        command.check_tokenizers([labs[0], other])


@pytest.fixture(scope="module")
def default(place):
    """The page of the default CRATE and its twin, untrained, and that of CRATE alone."""
    tokenizer = load_tokenizer("pydocs:4095")
    text = place / "text.txt"
    corpus = open_corpus(str(text), tokenizer, log=mock.Mock())
    settings = {"data": str(text), "val_fraction": 0.1}
    training = {"step": 0, "settings": settings, "corpus": corpus.meta}
    facts = {"spec": "pydocs:4095", "hash": tokenizer.hash}
    opened = []
    for kind in ("crate", "gpt2"):
        folder = place / "default" / kind
        config = model.preset("3L", kind, vocab_size=4096, block_size=256)
        lm = model.LM(config)
        checkpoint.save(folder, lm, tokenizer=facts, training=training)
        opened.append(Lab(folder, device="cpu"))
    return [command.page(opened[:1], "code"), command.page(opened, "code")]


def test_the_default_model_takes_at_most_8_mb(default):
    alone, both = default
    assert len(alone) < 3e6 and len(both) < LONGEST


@browser
def test_a_keystroke_is_answered_within_100_ms_at_64_tokens(default, place):
    alone, _ = default
    words = (place / "text.txt").read_text()[:600]
    path = place / "speed.html"
    path.write_bytes(with_checks(alone, "speed_checks.js", {"text": words, "tokens": 64}))
    times = run(path, place / "profile")
    assert 60 <= times.pop("tokens") <= 64
    is_alone = os.getloadavg()[0] < 1  # tests on all cores make it up to three times as long
    for name, milliseconds in times.items():
        assert min(milliseconds) < (QUICK if is_alone else 3 * QUICK), (name, milliseconds)

"""crate_mini.load: the methods of a Lab are what the model computes."""

import pytest
import torch
from tiny_checkpoints import H, save_checkpoint, write_scores, write_text

import crate_mini
from crate_mini import UserError
from crate_mini.console import results
from crate_mini.generate import generate
from crate_mini.intervene import Intervention, steer
from crate_mini.steering import choose


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRATE_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = tmp_path_factory.mktemp("run")
        ckpt = save_checkpoint(folder / "best", write_text(folder / "text.txt"))
        write_scores(ckpt)
        yield ckpt


@pytest.fixture(scope="module")
def lab(ckpt):
    return crate_mini.load(ckpt)


@torch.no_grad()
def test_codes_and_next_tokens_are_the_models(lab):
    ids = torch.tensor([lab.ids("code")])
    codes = lab.codes("code")
    assert codes.shape == (2, 4, H)
    for layer, expected in enumerate(lab.model.trunk(ids)[1]):
        assert torch.equal(codes[layer], expected[0])
    probabilities = lab.model(ids)[0, -1].softmax(-1)
    tokens = lab.next_tokens("code", 3)
    assert tokens[0][0] == lab.token(probabilities.argmax().item())
    assert [p for _, p in tokens] == pytest.approx(probabilities.topk(3).values.tolist())
    assert len(lab.next_tokens("code", 10**6)) == lab.model.config.vocab_size


def test_generated_text_begins_with_the_prompt_and_repeats_with_its_seed(lab):
    text = lab.generate("code", 8, seed=3)
    assert text.startswith("code") and text == lab.generate("code", 8, seed=3)
    ids = torch.tensor([lab.ids("code")])
    greedy = generate(lab.model, ids, 8, temperature=0)
    assert lab.generate("code", 8, temperature=0) == lab.text(greedy[0].tolist())


def test_steering_acts_inside_its_block_alone(lab):
    before = lab.next_tokens("code")
    intervention = lab.intervention(1, 5, "40abs")
    with lab.steer(intervention) as steering:
        steered = lab.next_tokens("code")
    assert steering.fired == [4]
    assert steered != before and lab.next_tokens("code") == before
    with steer(lab.model, [Intervention(1, 5, "set", 40.0)]):
        assert lab.next_tokens("code") == steered


def test_values_count_in_the_neurons_maximum(lab):
    assert lab.known.maximum(0, 9) == (1.5, "interpret.py's record")
    assert lab.intervention(0, 9, "4x").value == 6.0
    assert lab.intervention(0, 9, "0.5", op="scale").value == 0.5
    observed, where = lab.known.maximum(1, 5)
    assert observed == lab.known.observed(1)[5].item() > 0
    assert where.endswith("held-out tokens")
    with pytest.raises(UserError, match="neurons are 0 to"):
        lab.intervention(0, H)
    with pytest.raises(UserError, match="never fired"):
        lab.intervention(0, 3)


def test_a_lab_knows_the_labels_of_its_checkpoint(lab):
    assert lab.known.label(0, 9) == "token: “s” 70 %, “z” 10 %"
    assert lab.known.label(0, 8) == lab.known.label(1, 9) == ""


def test_labels_of_another_checkpoint_are_noted_and_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("CRATE_CACHE", str(tmp_path / "cache"))
    ckpt = save_checkpoint(tmp_path / "best", write_text(tmp_path / "text.txt"))
    write_scores(ckpt, sha256="another")
    notes = []
    lab = crate_mini.load(ckpt, log=notes.append)
    assert "describes another checkpoint" in notes[0] and not lab.known.rows


@pytest.mark.parametrize("row", ['{"site": "L0"}', '{"site": [], "neuron": 5}'])
def test_labels_without_their_neurons_are_noted_and_not_used(tmp_path, monkeypatch, row):
    monkeypatch.setenv("CRATE_CACHE", str(tmp_path / "cache"))
    ckpt = save_checkpoint(tmp_path / "best", write_text(tmp_path / "text.txt"))
    write_scores(ckpt)
    (tmp_path / "interpret" / "scores.jsonl").write_text(row)
    notes = []
    lab = crate_mini.load(ckpt, log=notes.append)
    assert "are damaged" in notes[0] and not lab.known.rows


def test_tokens_that_cannot_be_printed_are_shown(lab):
    assert lab.token(10) == "↵" and lab.token(300) == "id 300"
    assert lab.text([104, 105, 7, 300]) == "hi\N{REPLACEMENT CHARACTER}"
    with pytest.raises(UserError, match="the prompt is empty"):
        lab.ids("")


def test_what_cannot_be_generated_is_refused_from_python_too(lab):
    for words, message in (
        ({"temperature": -1}, "temperature -1"),
        ({"top_k": 0}, "top_k 0"),
        ({"n": -1}, "n_new -1"),
    ):
        with pytest.raises(UserError, match=message):
            lab.generate("code", **words)
    with pytest.raises(UserError, match="bytes that are not UTF-8 text"):
        lab.generate("co\udcffde")


def test_labels_of_another_record_are_not_used(tmp_path, monkeypatch):
    """Recorded again but not scored again: the labels may be of other neurons."""
    monkeypatch.setenv("CRATE_CACHE", str(tmp_path / "cache"))
    ckpt = save_checkpoint(tmp_path / "best", write_text(tmp_path / "text.txt"))
    write_scores(ckpt)
    record_file = tmp_path / "interpret" / "record.json"
    record = results.read_json(record_file)
    results.write_json(record_file, {**record, "stamp": "another"})
    notes = []
    lab = crate_mini.load(ckpt, log=notes.append)
    assert "are of another record" in notes[0] and not lab.known.rows
    with pytest.raises(UserError, match="no labels: .*another record.*make them with"):
        choose.neurons(lab, 'label:"s"')
    scores = tmp_path / "interpret" / "scores.jsonl"
    results.write_json(record_file, record)
    scores.write_text(scores.read_text().replace("1.5", "1.6"))
    crate_mini.load(ckpt, log=notes.append)
    assert "scores.jsonl is damaged" in notes[1]

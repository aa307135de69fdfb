"""What a Lab answers about a text, against the model itself and against interpret.py."""

import math
import sys
import warnings
from unittest import mock

import numpy as np
import pytest
import tiny_runs
import torch
from tiny_checkpoints import H, save_checkpoint, write_text

import crate_mini
from crate_mini import UserError
from crate_mini.intervene import Intervention, hook_codes, steer
from crate_mini.lab import Lab
from crate_mini.neurons import command
from crate_mini.neurons.score_files import read_rows
from crate_mini.sae import autoencoder
from crate_mini.steering.known import unsteered
from crate_mini.training import checkpoint

TEXT = "code rate step sparse"

# Fixtures.
own_place = tiny_runs.own_place


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRATE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        folder = tmp_path_factory.mktemp("run")
        yield save_checkpoint(folder / "best", write_text(folder / "text.txt"), context=64)


@pytest.fixture
def lab(ckpt):
    return crate_mini.load(ckpt)


def ids_of(lab, text):
    return torch.tensor([lab.tokenizer.encode(text)])


# ---- codes and the neurons of a text -------------------------------------------------------------


def test_codes_carry_their_tokens_and_become_plain_tensors(lab):
    codes = lab.codes("co de")
    assert codes.tokens == ["c", "o", " ", "d", "e"]
    assert codes.shape == (2, 5, H) and not codes.requires_grad
    assert type(codes[0]) is type((codes > 0).float()) is torch.Tensor
    assert "tensor" in repr(codes).lower() or "Codes" in repr(codes)


@torch.no_grad()
def held_out_codes(lab):
    """Codes (N, L, h) on all held-out tokens."""
    parts = []
    for x, _ in lab.held_out().blocks("val", 8, lab.model.config.block_size):
        codes = torch.stack(lab.model.trunk(x)[1], 2)
        parts.append(codes.flatten(0, 1))
    return torch.cat(parts)


def test_top_neurons_are_the_largest_multiples_of_their_mean(lab):
    text_codes, held = lab.codes(TEXT), held_out_codes(lab)
    rows = lab.top_neurons(TEXT, 7)
    ratios = text_codes.amax(1) / held.mean(0)
    ratios[held.amax(0) <= 0] = 0
    best = ratios.flatten().topk(7)
    assert [row.layer * H + row.neuron for row in rows] == best.indices.tolist()
    for row, ratio in zip(rows, best.values.tolist()):
        code = text_codes[row.layer, row.position, row.neuron].item()
        assert row.value == code == text_codes[row.layer, :, row.neuron].max()
        assert row.ratio == pytest.approx(ratio, rel=1e-4)
        assert row.share == pytest.approx(code / held[:, row.layer, row.neuron].max().item())
        assert row.token == text_codes.tokens[row.position] and row.label == ""
    assert (0, 3) not in [row[:2] for row in lab.top_neurons(TEXT, 10**6)]  # the dead one
    assert lab.top_neurons(TEXT, 0) == []


def test_top_neurons_of_an_autoencoder_are_its_features(ckpt, tmp_path):
    lm, _ = checkpoint.load(ckpt)
    facts = autoencoder.save(tmp_path, autoencoder.SAE(H, 256, layer=1, k=8), lm, {})
    lab = crate_mini.load(ckpt, sae=tmp_path / f"sae-L1-{facts['name']}.pt")
    best = lab.top_neurons(TEXT, 1)[0]
    features = lab.sae.encode(lab.codes(TEXT)[1])
    assert best.layer == 1 and best.value == features[best.position, best.neuron]
    assert lab.score(1, 3000)["ngram_r"].shape == (256,)


# ---- loss ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 63, 64, 65, 66, 100])
def test_loss_is_the_mean_over_windows_like_validation(lab, length):
    text = (TEXT * 5)[:length]
    ids, T = ids_of(lab, text), lab.model.config.block_size
    losses = []
    with torch.no_grad():
        for start in range(0, length - 1, T):
            window = ids[:, start : start + T + 1]
            log_p = lab.model(window[:, :-1])[0].log_softmax(-1)
            losses += [-log_p[i, id].item() for i, id in enumerate(window[0, 1:].tolist())]
    assert len(losses) == length - 1
    assert lab.loss(text) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_a_loss_needs_a_token_to_predict(lab):
    with pytest.raises(UserError, match="'a' is a single token"):
        lab.loss("a")
    with pytest.raises(UserError, match="is empty"):
        lab.loss("")


# ---- scores --------------------------------------------------------------------------------------


def test_scores_are_those_of_interpret(ckpt, tmp_path, lab, capsys):
    with mock.patch.object(sys, "argv", ["interpret.py", "neurons"]):
        settings = command.Settings(
            layers="1", tokens=3000, controls="shuffle", seed=5, until="score"
        )
        settings.out = str(tmp_path)
        command.run(settings, ckpt)
    rows = read_rows(tmp_path / "scores.jsonl")
    capsys.readouterr()
    scores = lab.score(1, tokens=3000, seed=5)
    assert capsys.readouterr() == ("", "")
    for name in ("ngram_r", "null_r"):
        theirs = [row["scores"]["uniform"][name] for row in rows]
        theirs = [math.nan if value is None else value for value in theirs]
        np.testing.assert_allclose(scores[name], theirs, atol=1e-6)
    np.testing.assert_allclose(scores["density"], [row["density"] for row in rows], atol=1e-6)
    assert lab.score(0, tokens=3000)["ngram_r"][3].isnan()  # the dead one
    with pytest.raises(UserError, match="layer 2 does not exist"):
        lab.score(2)


# ---- steering ------------------------------------------------------------------------------------


def test_steering_by_numbers_by_a_dict_and_by_interventions_is_the_same(lab):
    change = Intervention(1, 5, "set", 2 * lab.known.maximum(1, 5)[0])
    with steer(lab.model, [change]):
        expected = lab.next_tokens(TEXT)
    for arguments in ((1, 5, "2x"), (1, 5), (1, 5, 2), ({(1, 5): "2x"},), ({(1, 5): 2.0},)):
        with lab.steer(*arguments):
            assert lab.next_tokens(TEXT) == expected
    with lab.steer(1, 5, "3abs", op="add") as steering:
        lab.loss(TEXT)
    assert str(steering.interventions[0]) == "add neuron 5 of layer 1"
    texts = []
    with lab.steer({(1, 5): "9x", (0, 7): "9x"}):
        texts.append(lab.generate(TEXT, 9))
    texts.append(lab.generate(TEXT, 9, steer={(1, 5): "9x", (0, 7): "9x"}))
    assert texts[0] == texts[1] != lab.generate(TEXT, 9)


@pytest.mark.parametrize("arguments", [(5,), ({5: "2x"},), ({(1, 2, 3): "2x"},), ("1:5",), (None,)])
def test_what_names_no_neuron_is_refused(lab, arguments):
    with pytest.raises(UserError, match="does not name neurons; give steer\\(2, 40"):
        lab.steer(*arguments)


@pytest.mark.parametrize("value", [math.nan, math.inf, "x", None, [2]])
def test_what_is_no_value_is_refused(lab, value):
    with pytest.raises(UserError, match="is not a value"):
        lab.steer(1, 5, value)


def test_maxima_are_those_of_the_unsteered_model(ckpt):
    labs = [Lab(ckpt), Lab(ckpt)]
    with labs[0].steer(0, 7, "50abs") as steering:
        rows = labs[0].top_neurons(TEXT, 5)
        assert steering.fired == [len(TEXT)]  # the held-out text did not count
        steered = labs[0].known.observed(1)
    assert torch.equal(steered, labs[1].known.observed(1))
    assert rows != labs[1].top_neurons(TEXT, 5)
    with hook_codes(labs[0].model, 1, lambda codes: codes * 0) as hook:
        with unsteered(labs[0].model):
            labs[0].loss(TEXT)
        assert hook.calls == 0
        labs[0].loss(TEXT)
    assert hook.calls == 1


# ---- no side effects -----------------------------------------------------------------------------


def test_nothing_is_printed_and_no_gradient_is_kept(lab, capfd):
    lab.codes(TEXT), lab.top_neurons(TEXT), lab.next_tokens(TEXT), lab.loss(TEXT)
    lab.generate(TEXT, 3, steer={(1, 5): "2x"})
    assert capfd.readouterr() == ("", "")
    assert torch.is_grad_enabled()
    assert all(w.grad is None for w in lab.model.parameters())


def test_notes_are_warnings_in_python(tmp_path, monkeypatch):
    monkeypatch.setenv("CRATE_CACHE", str(tmp_path / "cache"))
    text = write_text(tmp_path / "text.txt")
    ckpt = save_checkpoint(tmp_path / "best", text)
    text.write_text(text.read_text() * 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        crate_mini.load(ckpt).held_out()
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 1 and "has changed since" in messages[0]


# ---- training ------------------------------------------------------------------------------------


def test_training_from_python_is_the_script(own_place, tmp_path, capsys):
    text = write_text(tmp_path / "text.txt")
    settings = {**tiny_runs.TINY, "data": str(text), "train_steps": 3}
    lab = crate_mini.train(quiet=True, out=str(tmp_path / "python"), **settings)
    assert capsys.readouterr().out == ""
    assert lab.checkpoint == tmp_path / "python" / "best" and lab.codes("a").shape == (1, 1, 64)
    tiny_runs.run(*tiny_runs.tiny(str(text), tmp_path / "script", 3))
    assert tiny_runs.weights(tmp_path / "python") == tiny_runs.weights(tmp_path / "script")
    more = crate_mini.train(resume=str(tmp_path / "python"), train_steps=5, quiet=True)
    assert more.checkpoint.parent == tmp_path / "python"
    with pytest.raises(UserError, match="unknown argument '--learning-rate'"):
        crate_mini.train(learning_rate=1e-3)

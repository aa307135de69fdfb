"""Checkpoints written at commit e1d847a still load, resume exactly and can be steered.

checkpoint-e1d847a/ holds two runs of that commit's train.py, of two steps each, and what the same
commit computed from them: logits and losses, and the next two steps of the resumed run.
"""

import json
import shutil
from pathlib import Path

import pytest
import tiny_runs
import torch
from numbered_saves import equal
from tiny_runs import facts, rows, run, train

from crate_mini.intervene import Intervention, hook_codes, steer
from crate_mini.training import checkpoint

# Fixtures.
own_place = tiny_runs.own_place
text = tiny_runs.text

OLD = Path(__file__).with_name("checkpoint-e1d847a")
EXPECTED = json.loads((OLD / "expected.json").read_text())
IDS = torch.tensor([EXPECTED["ids"]])
CHECKPOINTS = {"crate": OLD / "crate" / "last", "crate-plus": OLD / "crate-plus" / "best"}


@pytest.fixture
def resumable(tmp_path):
    """A copy of the run that can be resumed."""
    return shutil.copytree(OLD / "crate", tmp_path / "crate")


@pytest.mark.parametrize("name", CHECKPOINTS)
@torch.no_grad()
def test_it_loads_and_computes_what_it_computed(name):
    lm, meta, tokenizer = checkpoint.open_model(CHECKPOINTS[name], "cpu")
    expected = EXPECTED[name]
    assert meta["training"]["machine"]["commit"].startswith("e1d847a")
    assert tokenizer.name == "bytes" and lm.config.vocab_size == 257
    logits = lm(IDS)[0, -1, : len(expected["logits"])]
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]))
    assert lm(IDS[:, :-1], IDS[:, 1:]).item() == pytest.approx(expected["loss"], rel=1e-5)
    codes = lm.trunk(IDS)[1][0]
    assert (codes != 0).float().mean().item() == pytest.approx(expected["density"], abs=0.01)


@pytest.mark.parametrize("name", CHECKPOINTS)
@torch.no_grad()
def test_it_can_be_steered(name):
    lm, _ = checkpoint.load(CHECKPOINTS[name])
    plain = lm(IDS)
    with hook_codes(lm, 0, lambda codes: None) as hook:
        assert torch.equal(lm(IDS), plain) and hook.calls == 1
    with steer(lm, [Intervention(layer=0, neuron=3, op="set", value=2.0)]) as steering:
        steered = lm(IDS)
        assert (lm.trunk(IDS)[1][0][..., 3] == 2.0).all()
    assert steering.fired == [2 * IDS.numel()]
    assert not torch.allclose(steered, plain) and torch.equal(lm(IDS), plain)


def test_all_of_its_state_is_restored(text, resumable):
    words = ["--resume", str(resumable), "--train-steps", "4", "--data", text]
    s, config, start = train.parse(words)
    trainer = train.Trainer(s, config, **start)
    _, state, weights = checkpoint.load_resume(CHECKPOINTS["crate"])
    assert (trainer.step, trainer.best, trainer.skipped) == (2, state["best"], 0)
    assert equal(dict(trainer.lm.state_dict()), dict(weights))
    assert equal(trainer.optimizer.state_dict()["state"], state["optimizer"]["state"])


def test_it_resumes_as_it_would_have_then(text, resumable):
    assert run("--resume", str(resumable), "--train-steps", "4", "--data", text) == 0
    log = rows(resumable)
    expected = EXPECTED["crate"]
    assert [int(row["step"]) for row in log] == [3, 4]
    for row, then in zip(log, expected["resumed"]):
        assert float(row["lr"]) == then["lr"]
        assert float(row["loss"]) == pytest.approx(then["loss"], rel=1e-5)
        assert float(row["grad_norm"]) == pytest.approx(then["grad_norm"], rel=1e-4)
    assert float(log[-1]["val_loss"]) == pytest.approx(expected["resumed_val_loss"], rel=1e-5)
    assert facts(resumable)["step"] == 4


def test_it_starts_a_new_run(text, tmp_path):
    """--init takes the weights alone."""
    old = str(CHECKPOINTS["crate-plus"])
    words = ["--init", old, "--data", text, "--out", str(tmp_path / "new"), "--device", "cpu"]
    assert run(*words, "--train-steps", "1", "--eval-tokens", "64", "--dtype", "float32") == 0
    assert facts(tmp_path / "new")["settings"]["init"] == old

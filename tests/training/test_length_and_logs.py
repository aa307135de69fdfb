"""The length of a run in tokens or epochs, checkpoints by step, and copies of its log."""

import importlib.machinery
import json
import math
import re
import sys
import types

import pytest
import tiny_runs
from refusals import refused
from tiny_runs import facts, rows, run, tiny, train, weights

from crate_mini import UserError
from crate_mini.console import results
from crate_mini.training import checkpoint, length, run_log
from crate_mini.training.settings import parse, twin

STEP = 4 * 16  # tokens of a step of a tiny run

# Fixtures.
own_place = tiny_runs.own_place
text = tiny_runs.text


def without_length(text, out, **settings):
    words = tiny(text, out, 1, **settings)
    place = words.index("--train-steps")
    return words[:place] + words[place + 2 :]


# ---- tokens and epochs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, number",
    {
        "65M": 65_000_000,
        "65m": 65_000_000,
        "1.5B": 1_500_000_000,
        "300k": 300_000,
        "4096": 4096,
        "4_096_000": 4_096_000,
        "4,096,000": 4_096_000,
        " 2 M ": 2_000_000,
        "0.5k": 500,
        "2G": 2_000_000_000,
    }.items(),
)
def test_numbers_of_tokens(words, number):
    assert length.count(words) == number


@pytest.mark.parametrize(
    "words", ["", "M", "-5", "0", "1e6", "65MM", "65 MB", "0.1", "nan", "∞", "1" + ",000" * 110]
)
def test_what_is_no_number_of_tokens(words):
    refused("is not a number of tokens; give one like 65M", length.count, words)


@pytest.mark.parametrize(
    "flag, value, steps", [("tokens", "0.3k", 5), ("tokens", 5 * STEP, 5), ("tokens", 1, 1)]
)
def test_a_run_takes_the_steps_of_its_tokens(text, tmp_path, capsys, flag, value, steps):
    out = tmp_path / "run"
    assert run(*without_length(text, out), f"--{flag}", str(value)) == 0
    assert len(rows(out)) == steps
    output = capsys.readouterr().out
    assert f"/ (4 x 16 a step) = {steps} steps of {STEP} tokens, rounded up" in output
    assert f"--tokens {value}" in output.split("next")[1] and "--train-steps" in output
    run(*tiny(text, tmp_path / "steps", steps))
    assert weights(out) == weights(tmp_path / "steps")


def test_a_run_takes_the_steps_of_its_epochs(text, tmp_path, capsys):
    assert run(*without_length(text, tmp_path / "run", batch_size=64), "--epochs", "0.05") == 0
    n_tokens = facts(tmp_path / "run")["corpus"]["tokens"]["train"]
    steps = math.ceil(0.05 * n_tokens / (64 * 16))
    assert len(rows(tmp_path / "run")) == steps > 0
    assert f"length    --epochs 0.05: 0.05 x {n_tokens:,} tokens" in capsys.readouterr().out


def test_steps_is_train_steps_and_a_length_is_set_once():
    assert parse(["--steps", "7", "--out", "a"])[0].train_steps == 7
    both = "--train-steps and --tokens both set the length of the run; give one."
    refused(both, parse, ["--steps", "7", "--tokens", "65M"])
    refused("--tokens and --epochs both set", parse, ["--epochs", "7", "--tokens", "65M"])
    refused("--tokens 'x' is not a number", parse, ["--tokens", "x"])
    refused("--epochs 0.0 must be above 0", parse, ["--epochs", "0"])


def test_the_twin_is_as_long(text):
    s, config, _ = parse(["--tokens", "65M", "--out", "a"])
    s.train_steps = 12345  # as set_steps does
    words = twin(s, config, 4096)
    assert words[words.index("--tokens") + 1] == "65M" and "--train-steps" not in words


def test_a_run_is_resumed_to_a_new_length(text, tmp_path):
    out = tmp_path / "run"
    run(*without_length(text, out), "--tokens", str(4 * STEP))
    refused("has done 4 steps, and --tokens 4", run, "--resume", str(out), "--tokens", "4")
    refused("has done all its 4 steps", run, "--resume", str(out))
    run("--resume", str(out), "--tokens", str(6 * STEP))
    assert facts(out)["step"] == 6
    run("--resume", str(out), "--steps", "8")
    assert facts(out)["step"] == 8 and facts(out)["settings"]["tokens"] is None
    assert len(rows(out)) == 8


def test_a_run_killed_before_its_last_validation_is_finished(text, tmp_path, monkeypatch):
    out, words = tmp_path / "run", without_length(text, tmp_path / "run")

    def killed(trainer):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Trainer, "finish", killed)
        run(*words, "--tokens", str(4 * STEP))
    assert "val_loss" not in facts(out)
    assert run("--resume", str(out)) == 0 and "val_loss" in facts(out)


# ---- checkpoints by step -------------------------------------------------------------------------


def test_checkpoints_of_every_n_steps_stay(text, tmp_path):
    out = tmp_path / "run"
    run(*tiny(text, out, 7, keep_every=3))
    names = ["step-000000", "step-000003", "step-000006"]
    assert [path.name for path in run_log.kept(out)] == names
    for name, step in zip(names, (0, 3, 6)):
        lm, meta = checkpoint.load(out / name)
        assert meta["training"]["step"] == step and set(meta["files"]) == {"weights"}
    run(*tiny(text, tmp_path / "three", 7))
    assert weights(out) == weights(tmp_path / "three")  # keeping changes nothing
    run("--resume", str(out), "--train-steps", "10", "--keep-every", "2")
    assert [path.name for path in run_log.kept(out)] == [*names, "step-000008", "step-000010"]
    (out / "step-notes").mkdir()
    run(*tiny(text, out, 2, keep_every=2, overwrite=True))
    assert [path.name for path in run_log.kept(out)] == ["step-000000", "step-000002"]
    assert (out / "step-notes").exists()


def test_a_checkpoint_before_the_first_validation_can_be_interpreted(text, tmp_path):
    """Its best loss is none: result files, which hold its facts, have no infinity."""
    out = tmp_path / "run"
    run(*tiny(text, out, 2, keep_every=1, save_every=1))
    lm, meta = checkpoint.load(out / "step-000000")
    assert meta["training"]["best_val_loss"] is None
    meta["training"]["best_val_loss"] = math.inf  # as older versions wrote it
    facts = {"tokenizer": meta["tokenizer"], "training": meta["training"]}
    checkpoint.save(tmp_path / "old", lm, **facts)
    _, meta = checkpoint.load(tmp_path / "old")
    header = checkpoint.result_header("interpret.py", "old", meta, lm)
    assert results.sealed(header)["checkpoint"]["training"]["best_val_loss"] is None


# ---- progress ------------------------------------------------------------------------------------


def test_a_line_shows_the_validation_of_its_own_step_alone(text, tmp_path, capsys):
    run(*tiny(text, tmp_path / "run", 9))
    lines = re.findall(r"^step (\d+)/9  (.*)$", capsys.readouterr().out, re.M)
    with_validation = [int(step) for step, line in lines if "  val " in line]
    assert with_validation == [4, 8, 9] and len(lines) == 9


# ---- other logs ----------------------------------------------------------------------------------


@pytest.fixture
def fakes(monkeypatch):
    """Stand-ins for both packages, which record what they are called with."""
    calls = []

    class Recorder:
        def __init__(self, *args, **kwargs):
            calls.append((args, kwargs))

        def add_scalar(self, name, value, step):
            calls.append((step, name, value))

        def log(self, values, step):
            calls.extend((step, name, value) for name, value in values.items() if name != "step")

        def flush(self):
            pass

        def close(self):
            calls.append("closed")

        finish = close

    def put(name, **content):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)

    put("tensorboard")
    put("torch.utils.tensorboard", SummaryWriter=Recorder)
    put("wandb", init=Recorder)
    return calls


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_log_gets_the_rows_of_log_csv(text, tmp_path, fakes, name):
    out = tmp_path / "run"
    run(*tiny(text, out, 5, log=name, log_every=2))
    assert fakes[-1] == "closed"
    args, kwargs = fakes[0]
    if name == "wandb":
        assert kwargs["project"] == "crate_mini" and kwargs["name"] == "run"
        assert kwargs["config"]["lr"] == 0.003 and kwargs["config"]["n_embd"] == 16
        json.dumps(kwargs["config"])
    else:
        assert args == (str(out / "tensorboard"),) and kwargs == {"purge_step": 1}
    expected = []
    for row in rows(out):
        names = [name for name in row if row[name] and name != "step"]
        expected += [(int(row["step"]), name, float(row[name])) for name in names]
    sent = [call for call in fakes[1:-1] if call[1] != "tokens_per_s"]
    assert sent == expected and {step for step, *_ in sent} == {2, 4, 5}


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_log_without_its_package_is_refused_before_the_work(text, tmp_path, monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    words = tiny(text, tmp_path / "run", 1, log=name)
    with pytest.raises(UserError, match=f"--log {name} needs the package {name}: `pip install"):
        run(*words)
    assert not (tmp_path / "run").exists()

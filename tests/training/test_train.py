"""A run of the trainer: its files and lines, and equal losses however the batch is divided."""

import math
import os
from pathlib import Path

import pytest
import tiny_runs
import torch
from forked import run_script
from tiny_runs import facts, rows, run, tiny, train, weights

from crate_mini.data import batches
from crate_mini.data.tokenizer import load_tokenizer
from crate_mini.training import device
from crate_mini.training.settings import Settings

# Fixtures.
figures = tiny_runs.figures
own_place = tiny_runs.own_place
text = tiny_runs.text

GOLDEN = [5.7696, 5.7531, 5.7045, 5.6699, 5.6331, 5.5787, 5.5796, 5.5306, 5.5120, 5.5387]
FIRST_WORDS = "model device mode dtype backend step peak corpus expected sample result files next"


# ---- a run ---------------------------------------------------------------------------------------


def test_a_run_tries_steps_of_its_own_model_and_nothing_stays_of_them(text, tmp_path, monkeypatch):
    seconds = []
    choose = device.choose_dtype

    def try_one(where, spec, scaled, step_seconds):
        seconds.append(step_seconds(torch.bfloat16))
        return choose(where, "float32")

    given = run(*tiny(text, tmp_path / "given", 5, top_k=4, model="crate+"))
    monkeypatch.setattr(device, "choose_dtype", try_one)
    tried = run(*tiny(text, tmp_path / "tried", 5, top_k=4, model="crate+", dtype="auto"))
    assert given == tried == 0 and 0 < seconds[0] < 5
    assert rows(tmp_path / "given") == rows(tmp_path / "tried")
    assert weights(tmp_path / "given") == weights(tmp_path / "tried")


def test_a_run_writes_what_it_prints_and_learns(text, tmp_path, capsys, figures):
    out = tmp_path / "run"
    assert run(*tiny(text, out, 40, lr=0.01, log_sparsity=True)) == 0
    output = capsys.readouterr().out
    for word in FIRST_WORDS.split():
        assert f"\n{word} " in f"\n{output}", word
    log = rows(out)
    assert float(log[-1]["loss"]) < float(log[0]["loss"]) - 0.5
    assert 0 < float(log[-1]["density"]) < 1
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    corpus = batches.open_corpus(text, load_tokenizer("bytes"))
    tokens_per_byte = corpus.n_tokens["val"] / corpus.n_bytes["val"]
    training = facts(out)
    bits = training["val_loss"] / math.log(2)
    assert training["bits_per_byte"] == pytest.approx(bits * tokens_per_byte)
    assert f"{training['val_loss']:.4f}" in output
    assert training["machine"]["torch"] == torch.__version__


def test_what_will_run_is_printed_before_it_is_tried(text, tmp_path, monkeypatch, capsys):
    outputs, forward = [], train.model.LM.forward

    def spy(self, *args):
        outputs.append(capsys.readouterr().out)
        return forward(self, *args)

    monkeypatch.setattr(train.model.LM, "forward", spy)
    assert run(*tiny(text, tmp_path / "run", 1)) == 0
    assert "\ncorpus " in outputs[0] and "note      --warmup 2 outlasts the run" in outputs[0]
    assert "expected" not in outputs[0] and "expected" in "".join(outputs[1:])


def test_best_is_kept_apart_from_last(text, tmp_path):
    out = tmp_path / "run"
    run(*tiny(text, out, 12, lr=0.3))  # overshoots
    validations = {int(row["step"]): float(row["val_loss"]) for row in rows(out) if row["val_loss"]}
    best = facts(out, "best")
    assert best["best_val_loss"] == min(validations.values())
    assert validations[best["step"]] == min(validations.values())


def test_golden_losses(text, tmp_path):
    """Ten losses of a fixed run in float32: no change to the path of a token goes unnoticed.

    After a change that is meant to alter them, copy the list that the failing assertion prints.
    """
    run(*tiny(text, tmp_path / "run", 10, lr=0.002, min_lr=0.0002))
    losses = [float(row["loss"]) for row in rows(tmp_path / "run")]
    assert losses == pytest.approx(GOLDEN, abs=2e-4)


# ---- what must not change it ---------------------------------------------------------------------


def test_looking_at_a_run_does_not_change_it(text, tmp_path):
    closely = dict(eval_every=1, save_every=2, log_sparsity=True)
    run(*tiny(text, tmp_path / "a", 9, **closely))
    run(*tiny(text, tmp_path / "b", 9, eval_every=0, log_every=5))
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_micro_batches_change_nothing_but_rounding(text, tmp_path):
    for size in (4, 3, 1):
        run(*tiny(text, tmp_path / str(size), 5, micro_batch=size))
    four, three, one = (rows(tmp_path / str(size)) for size in (4, 3, 1))
    for i in range(5):
        assert float(four[i]["loss"]) == pytest.approx(float(three[i]["loss"]), rel=1e-5)
        assert float(four[i]["grad_norm"]) == pytest.approx(float(one[i]["grad_norm"]), rel=1e-4)


def test_two_processes_train_as_one(text, tmp_path):
    """The same global batch in two new CPU processes of torchrun, up to the order of sums."""
    words = tiny(text, tmp_path / "one", 6, micro_batch=1)
    run(*words)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    script = str(Path(train.__file__).resolve())
    two = ["--device", "cpu", "--out", str(tmp_path / "two")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = run_script([*torchrun, script, *words, *two], env=env, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("M parameters") == 1 and "2 process(es)" in done.stdout
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert float(one["loss"]) == pytest.approx(float(two["loss"]), rel=1e-5)
        assert bool(one["val_loss"]) == bool(two["val_loss"])
        if one["val_loss"]:
            assert float(one["val_loss"]) == pytest.approx(float(two["val_loss"]), rel=1e-5)


# ---- its parts -----------------------------------------------------------------------------------


def test_learning_rate_warms_up_and_falls_to_its_floor():
    s = Settings(lr=1.0, warmup=10, train_steps=110)
    rates = [s.lr_at(i) for i in range(110)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))


def test_top_k_halves_the_codes_kept_and_ends_at_its_value():
    s = Settings(train_steps=100, top_k_anneal=0.5)
    kept = [s.top_k_at(i, 12, 100) for i in range(100)]
    assert kept[:50] == 13 * [100] + 12 * [50] + 13 * [25] + 12 * [12]
    assert set(kept[50:]) == {12}
    assert {s.top_k_at(i, 0, 100) for i in range(100)} == {0}
    assert Settings(top_k_anneal=0.0).top_k_at(0, 12, 100) == 12


@pytest.mark.parametrize("kind", ["crate", "gpt2"])
def test_training_anneals_top_k_and_validation_does_not(kind, text, tmp_path):
    """Density is measured at validations, which run the model as it will be used."""
    words = tiny(text, tmp_path / "run", 8, model=kind, top_k=4, top_k_anneal=0.5)
    s, config, _ = train.parse([*words, "--log-sparsity"])
    trainer = train.Trainer(s, config)
    one_step, kept = trainer.one_step, []

    def recorded():
        outcome = one_step()
        kept.append([block.sparsifier.top_k.training_k for block in trainer.lm.blocks])
        return outcome

    trainer.one_step = recorded
    trainer.train()
    assert kept == [[64], [32], [16], [8], [4], [4], [4], [4]]
    densities = [float(row["density"]) for row in rows(tmp_path / "run") if row["density"]]
    assert len(densities) == 2
    assert all(0 < density <= 4 / 64 for density in densities)


@pytest.mark.parametrize(
    "change", [dict(kind="crate"), dict(kind="gpt2"), dict(kind="gpt2", activation="gelu")]
)
def test_l1_weighs_the_size_of_codes_of_either_sign(change):
    lm = train.model.LM(train.model.preset("1L", vocab_size=9, l1=0.5, **change))
    ids = torch.arange(8)[None]
    codes = lm.trunk(ids)[1]
    plain = lm.eval()(ids, ids)
    penalty = sum(a.abs().sum(-1).mean() for a in codes) / len(codes)
    loss = lm.train()(ids, ids)
    assert loss.item() == pytest.approx((plain + 0.5 * penalty).item(), rel=1e-5)
    assert loss > plain + 0.1
    assert (codes[0] < 0).any() == ("activation" in change)

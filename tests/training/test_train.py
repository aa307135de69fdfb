"""A run of the trainer: what it writes and says; the same losses in micro-batches and in two processes."""

import json
import math
import os
import subprocess
import sys

import pytest
import tiny_runs as training
import torch
from tiny_runs import ROOT, TINY, rows, run, train, weights

from crate_mini.data import batches as data
from crate_mini.training import device as machine
from crate_mini.training.settings import Settings

clean_machine, text = training.clean_machine, training.text  # fixtures


def test_a_run_writes_what_it_says_and_learns(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert (
        run(
            *TINY,
            "--data",
            text,
            "--train-steps",
            "40",
            "--lr",
            "0.01",
            "--log-sparsity",
            "--out",
            str(out),
        )
        == 0
    )
    said = capsys.readouterr().out
    for word in (
        "model ",
        "device ",
        "mode ",
        "dtype ",
        "backend ",
        "step ",
        "peak ",
        "corpus ",
        "expected ",
        "sample ",
        "result ",
        "files ",
        "next ",
    ):
        assert f"\n{word}" in f"\n{said}", word
    log = rows(out)
    assert float(log[-1]["loss"]) < float(log[0]["loss"]) - 0.5
    assert 0 < float(log[-1]["density"]) < 1
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    facts = json.loads((out / "last" / "config.json").read_text())["training"]
    corpus = data.open_corpus(text, data.load_tokenizer("bytes"))
    assert facts["bits_per_byte"] == pytest.approx(
        facts["val_loss"] / math.log(2) * corpus.n_tokens["val"] / corpus.n_bytes["val"]
    )
    assert f"{facts['val_loss']:.4f}" in said and facts["machine"]["torch"] == torch.__version__


def test_how_often_one_looks_does_not_change_the_run(text, tmp_path):
    flags = [*TINY, "--data", text, "--train-steps", "9"]
    run(
        *flags,
        "--out",
        str(tmp_path / "a"),
        "--eval-every",
        "1",
        "--save-every",
        "2",
        "--log-sparsity",
    )
    run(*flags, "--out", str(tmp_path / "b"), "--eval-every", "0", "--log-every", "5")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_micro_batches_change_nothing_but_rounding(text, tmp_path):
    flags = [*TINY, "--data", text, "--train-steps", "5"]
    for name, micro in (("a", "4"), ("b", "3"), ("c", "1")):
        run(*flags, "--out", str(tmp_path / name), "--micro-batch", micro)
    for a, b, c in zip(rows(tmp_path / "a"), rows(tmp_path / "b"), rows(tmp_path / "c")):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-5)
        assert float(a["grad_norm"]) == pytest.approx(float(c["grad_norm"]), rel=1e-4)


def test_best_is_kept_apart_from_last(text, tmp_path):
    out = tmp_path / "run"
    run(
        *TINY, "--data", text, "--train-steps", "12", "--lr", "0.3", "--out", str(out)
    )  # overshoots
    vals = {int(r["step"]): float(r["val_loss"]) for r in rows(out) if r["val_loss"]}
    best = json.loads((out / "best" / "config.json").read_text())["training"]
    assert best["best_val_loss"] == min(vals.values()) and vals[best["step"]] == min(vals.values())


GOLDEN = [5.7696, 5.7531, 5.7045, 5.6699, 5.6331, 5.5787, 5.5796, 5.5306, 5.5120, 5.5387]


def test_golden_losses(text, tmp_path):
    """Ten literal losses of a fixed run in float32: nothing in the path of a token has changed unnoticed.

    After a change that is meant to alter them, copy the list that the failing assertion prints.
    """
    run(
        *TINY,
        "--data",
        text,
        "--train-steps",
        "10",
        "--lr",
        "0.002",
        "--min-lr",
        "0.0002",
        "--warmup",
        "2",
        "--out",
        str(tmp_path / "run"),
    )
    losses = [float(r["loss"]) for r in rows(tmp_path / "run")]
    assert losses == pytest.approx(GOLDEN, abs=2e-4)


def test_two_processes_train_as_one(text, tmp_path):
    """The same global batch over two CPU processes under torchrun: equal losses but for the order of sums."""
    flags = [*TINY, "--data", text, "--train-steps", "6", "--micro-batch", "1"]
    run(*flags, "--out", str(tmp_path / "one"))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--standalone",
            str(ROOT / "train.py"),
            *flags,
            "--device",
            "cpu",
            "--out",
            str(tmp_path / "two"),
        ],
        capture_output=True,
        text=True,
        timeout=180,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("M parameters") == 1 and "2 process(es)" in done.stdout
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert float(one["loss"]) == pytest.approx(float(two["loss"]), rel=1e-5)
        assert one["val_loss"] == two["val_loss"] == "" or float(one["val_loss"]) == pytest.approx(
            float(two["val_loss"]), rel=1e-5
        )


def test_learning_rate_warms_up_and_falls_to_its_floor():
    s = Settings(lr=1.0, warmup=10, train_steps=110)
    rates = [s.lr_at(i) for i in range(110)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)]) and rates[
        -1
    ] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))


@pytest.mark.parametrize(
    "change",
    [
        dict(kind="crate"),
        dict(kind="gpt2"),
        dict(kind="crate+", ista_steps=4),
        dict(kind="gpt2", expansion=8),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_counted_about_right(change, dtype):
    """Against what autograd keeps, weights and the head's gradients aside."""
    config = train.model.preset("3L", n_embd=64, vocab_size=64, block_size=32, **change)
    lm, kept = train.model.LM(config), {}
    own = {w.untyped_storage().data_ptr() for w in lm.parameters()}

    def keep(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t  # alive, so that no address comes twice
        return t

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
    ):
        lm.trunk(torch.zeros(32, 32, dtype=torch.long))
    found = sum(t.untyped_storage().nbytes() for t in kept.values())
    assert 0.7 < machine.activation_bytes(config, 32, dtype) / found < 1.3


@pytest.mark.parametrize(
    "change", [dict(kind="crate"), dict(kind="gpt2"), dict(kind="gpt2", activation="gelu")]
)
def test_l1_weighs_the_size_of_codes_of_either_sign(change):
    lm, ids = (
        train.model.LM(train.model.preset("1L", vocab_size=9, l1=0.5, **change)),
        torch.arange(8)[None],
    )
    codes = lm.trunk(ids)[1]
    want = lm.eval()(ids, ids) + 0.5 * sum(a.abs().sum(-1).mean() for a in codes) / len(codes)
    loss = lm.train()(ids, ids)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5) and loss > lm.eval()(ids, ids) + 0.1
    assert (codes[0] < 0).any() == ("activation" in change)


def test_what_will_run_is_said_before_it_is_tried(text, tmp_path, monkeypatch, capsys):
    seen, forward = [], train.model.LM.forward

    def watched(self, *args):
        seen.append(capsys.readouterr().out)
        return forward(self, *args)

    monkeypatch.setattr(train.model.LM, "forward", watched)
    assert run(*TINY, "--data", text, "--train-steps", "1", "--out", str(tmp_path / "run")) == 0
    assert "\ncorpus " in seen[0] and "note      --warmup 2 outlasts the run" in seen[0]
    assert "expected" not in seen[0] and "expected" in "".join(seen[1:])


def test_peaks_refuse_to_guess():
    assert machine.peak_flops(torch.device("mps"), torch.float32)[0] is None
    assert machine.peak_flops(torch.device("cpu"), torch.float32)[0] > 1e8


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA L40", None),
        ("NVIDIA A10G", None),
        ("NVIDIA RTX A1000 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_the_table_of_peaks_knows_names_exactly(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert machine.peak_flops(torch.device("cuda"), torch.bfloat16)[0] == peak

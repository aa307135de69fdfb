"""The trainer: exact resume, kills at any moment, processes that agree, and bad input in one sentence.

Runs happen inside this process, or in children forked from a server that has the imports, because starting
Python and PyTorch costs more than the training here.
"""

import csv
import json
import math
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from crate_mini import UserError, checkpoint, cli, data, machine, progress  # noqa: E402
from crate_mini.settings import OF_KIND, Settings, twin  # noqa: E402

TINY = ["--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--block-size", "16", "--batch-size", "4",
        "--tokenizer", "bytes", "--dtype", "float32", "--eval-tokens", "200", "--log-every", "1",
        "--warmup", "2", "--eval-every", "4"]


@pytest.fixture(autouse=True)
def clean_machine(tmp_path_factory, monkeypatch):
    """Cache of this session, one thread (bitwise equal runs), signal handlers put back."""
    monkeypatch.setenv("CRATE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    old, threads = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), old):
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A corpus of a few hundred lines made from a seed, with enough order in it to be learned."""
    draw = random.Random(0)
    words = ["code", "rate", "step", "sparse", "dictionary", "token", "subspace", "signal", "head"]
    lines = [" ".join(draw.choice(words) for _ in range(draw.randint(3, 9))) + ".\n" for _ in range(400)]
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("".join(lines))
    return str(path)


def run(*flags):
    """train.py's main in this process; returns its exit code, raises its UserError."""
    return train.main(list(flags))


def rows(out):
    """log.csv without the column that tells the time."""
    with open(Path(out, "log.csv"), newline="") as file:
        return [{k: v for k, v in r.items() if k != "tokens_per_s"} for r in csv.DictReader(file)]


def weights(out, name="last"):
    meta = json.loads(Path(out, name, "config.json").read_text())
    return meta["files"]["weights"]["sha256"]


def test_a_run_writes_what_it_says_and_learns(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(*TINY, "--data", text, "--train-steps", "40", "--lr", "0.01", "--log-sparsity",
               "--out", str(out)) == 0
    said = capsys.readouterr().out
    for word in ("model ", "device ", "mode ", "dtype ", "backend ", "step ", "peak ", "corpus ", "expected ",
                 "sample ", "result ", "files ", "next "):
        assert f"\n{word}" in f"\n{said}", word
    log = rows(out)
    assert float(log[-1]["loss"]) < float(log[0]["loss"]) - 0.5
    assert 0 < float(log[-1]["density"]) < 1
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    facts = json.loads((out / "last" / "config.json").read_text())["training"]
    corpus = data.open_corpus(text, data.load_tokenizer("bytes"))
    assert facts["bits_per_byte"] == pytest.approx(
        facts["val_loss"] / math.log(2) * corpus.n_tokens["val"] / corpus.n_bytes["val"])
    assert f"{facts['val_loss']:.4f}" in said and facts["machine"]["torch"] == torch.__version__


@pytest.mark.parametrize("kind", ["crate", "gpt2", "crate+"])
def test_resume_is_bitwise_equal_to_an_uninterrupted_run(kind, text, tmp_path):
    rank = [] if kind == "gpt2" else ["--query-rank", "3"]
    flags = [*TINY, "--data", text, "--model", kind, *rank, "--micro-batch", "3"]
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    run(*flags, "--out", whole, "--train-steps", "12")
    s, config, _ = train.parse([*flags, "--out", cut, "--train-steps", "12"])
    first = train.Run(s, config)
    step = first.one_step

    def interrupted():
        first.caught = 15 if first.step == 6 else 0
        return step()

    first.one_step = interrupted
    assert first.train() == 128 + 15 and json.loads(Path(cut, "last", "config.json").read_text())
    assert run("--resume", cut) == 0
    assert weights(cut) == weights(whole)
    by_step = {r["step"]: r for r in rows(cut)}
    for want in rows(whole):
        assert by_step[want["step"]] == want


def test_how_often_one_looks_does_not_change_the_run(text, tmp_path):
    flags = [*TINY, "--data", text, "--train-steps", "9"]
    run(*flags, "--out", str(tmp_path / "a"), "--eval-every", "1", "--save-every", "2", "--log-sparsity")
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
    run(*TINY, "--data", text, "--train-steps", "12", "--lr", "0.3", "--out", str(out))  # overshoots
    vals = {int(r["step"]): float(r["val_loss"]) for r in rows(out) if r["val_loss"]}
    best = json.loads((out / "best" / "config.json").read_text())["training"]
    assert best["best_val_loss"] == min(vals.values()) and vals[best["step"]] == min(vals.values())


GOLDEN = [5.7696, 5.7531, 5.7045, 5.6699, 5.6331, 5.5787, 5.5796, 5.5306, 5.5120, 5.5387]


def test_golden_losses(text, tmp_path):
    """Ten literal losses of a fixed run in float32: nothing in the path of a token has changed unnoticed.

    After a change that is meant to alter them, copy the list that the failing assertion prints.
    """
    run(*TINY, "--data", text, "--train-steps", "10", "--lr", "0.002", "--min-lr", "0.0002",
        "--warmup", "2", "--out", str(tmp_path / "run"))
    losses = [float(r["loss"]) for r in rows(tmp_path / "run")]
    assert losses == pytest.approx(GOLDEN, abs=2e-4)


def child(flags, threads=1):
    """A training in a forked process: main() as the script runs it, output thrown away."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(threads)
    sys.argv = ["train.py", *flags]
    cli.run(train.main)


def test_kill_9_at_any_moment_then_resume_ends_with_the_same_loss(text, tmp_path, monkeypatch):
    """20 kills of one run at random times; then it ends with exactly the weights of an unbroken one."""
    flags = [*TINY, "--data", text, "--train-steps", "150", "--save-every", "3", "--eval-every", "50"]
    run(*flags, "--out", str(tmp_path / "whole"))
    context, out, draw = multiprocessing.get_context("forkserver"), tmp_path / "cut", random.Random(1)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    context.set_forkserver_preload(["train", "tests.test_train"])
    kills = resumes = 0
    while kills < 20:
        resumed = (out / "last" / "config.json").exists()
        resumes += resumed
        again = ["--resume", str(out)] if resumed else [*flags, "--out", str(out), "--overwrite"]
        process = context.Process(target=child, args=(again,))
        process.start()
        seen, mark = time.time(), (out / "last" / "config.json")
        before = mark.stat().st_mtime_ns if resumed else 0
        while process.is_alive() and time.time() - seen < 60:  # let it get one checkpoint further at least
            if mark.exists() and mark.stat().st_mtime_ns != before:
                break
            time.sleep(0.002)
        time.sleep(draw.random() * 0.05)
        process.kill()
        process.join()
        kills += 1
        if process.exitcode == 0:
            break
    assert resumes >= 10, "the run must have been cut often enough to mean something"
    if process.exitcode != 0:
        assert run("--resume", str(out)) == 0
    assert weights(out) == weights(tmp_path / "whole")
    assert rows(out)[-1] == rows(tmp_path / "whole")[-1]


def script(*flags, timeout=120, **env):
    return subprocess.run([sys.executable, str(ROOT / "train.py"), *flags], capture_output=True, text=True,
                          timeout=timeout, env={**os.environ, "OMP_NUM_THREADS": "1", **env}, cwd=ROOT)


def test_two_processes_train_as_one(text, tmp_path):
    """The same global batch over two CPU processes under torchrun: equal losses but for the order of sums."""
    flags = [*TINY, "--data", text, "--train-steps", "6", "--micro-batch", "1"]
    run(*flags, "--out", str(tmp_path / "one"))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
         str(ROOT / "train.py"), *flags, "--device", "cpu", "--out", str(tmp_path / "two")],
        capture_output=True, text=True, timeout=180, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("M parameters") == 1 and "2 process(es)" in done.stdout
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert float(one["loss"]) == pytest.approx(float(two["loss"]), rel=1e-5)
        assert (one["val_loss"] == two["val_loss"] == "" or
                float(one["val_loss"]) == pytest.approx(float(two["val_loss"]), rel=1e-5))


def pair(*flags, before=""):
    """train.py in two processes of one run, started as torchrun starts them; `before` runs in each first."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
           "WORLD_SIZE": "2"}
    code = f"import train\n{before}\ntrain.cli.run(train.main)"
    return [subprocess.Popen([sys.executable, "-c", code, *TINY, "--device", "cpu", *flags],
                             env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=ROOT, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in (0, 1)]


def test_a_signal_to_one_of_two_processes_stops_both_at_one_step(text, tmp_path):
    out = tmp_path / "run"
    both = pair("--data", text, "--train-steps", "100000", "--out", str(out))
    for line in both[0].stdout:
        if line.startswith("step 5/"):
            break
    both[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [128 + signal.SIGTERM] * 2, said
    assert f"python train.py --resume {out}" in said[0][0]
    done = int(rows(out)[-1]["step"])
    assert json.loads((out / "last" / "config.json").read_text())["training"]["step"] == done
    assert run("--resume", str(out), "--train-steps", str(done + 1)) == 0


POISON = """
import math, os
step, calls = train.model.LM.forward, []
def poisoned(self, idx, targets=None):
    calls.append(self.training)
    return step(self, idx, targets) * (math.nan if sum(calls) == 5 and os.environ["RANK"] == "1" else 1)
train.model.LM.forward = poisoned
"""


@pytest.mark.parametrize("choice, code", [("stop", 2), ("skip", 0)])
def test_two_processes_agree_on_a_loss_that_only_one_finds_not_finite(choice, code, text, tmp_path):
    both = pair("--data", text, "--train-steps", "7", "--out", str(tmp_path / "run"),
                "--on-nonfinite", choice, before=POISON)
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [code] * 2, said
    assert "Traceback" not in said[0][1] + said[1][1]
    assert ("nan at step 5, learning rate" if code else "1 steps skipped") in said[0][code > 0]


def test_a_run_that_diverges_to_the_end_says_so(text, tmp_path, monkeypatch):
    flags = [*TINY, "--data", text, "--train-steps", "9", "--clip", "0", "--on-nonfinite", "skip"]
    monkeypatch.setattr(Settings, "lr_at", lambda s, step: 1e9 if step >= 4 else 1e-3)
    with pytest.raises(UserError, match=r"validation loss (nan|inf) after the last step; .*/best"):
        run(*flags, "--out", str(tmp_path / "run"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(number, text, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *TINY, "--data", text, "--train-steps", "100000",
         "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    for line in process.stdout:
        if line.startswith("step 5/"):
            break
    process.send_signal(number)
    said, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number and not error
    assert "\nfinishing this step, then saving; Ctrl-C again stops at once\n" in said
    assert f"python train.py --resume {out}" in said
    done = int(rows(out)[-1]["step"])
    assert json.loads((out / "last" / "config.json").read_text())["training"]["step"] == done
    resumed = script("--resume", str(out), "--train-steps", str(done + 2))
    assert resumed.returncode == 0 and int(rows(out)[-1]["step"]) == done + 2, resumed.stderr


def test_a_loss_that_is_not_finite_stops_or_is_skipped(text, tmp_path, monkeypatch, capsys):
    flags = [*TINY, "--data", text, "--train-steps", "8", "--save-every", "1"]
    step = train.model.LM.forward

    def poisoned(self, idx, targets=None):
        loss = step(self, idx, targets)
        poisoned.calls += self.training and targets is not None
        return loss * math.nan if poisoned.calls == 5 and self.training else loss

    monkeypatch.setattr(train.model.LM, "forward", poisoned)
    poisoned.calls = 0
    with pytest.raises(UserError, match=r"nan at step 5, .*--resume \S*/stop goes on .*--on-nonfinite skip"):
        run(*flags, "--out", str(tmp_path / "stop"))
    assert json.loads((tmp_path / "stop" / "last" / "config.json").read_text())["training"]["step"] == 4
    poisoned.calls = 0
    assert run(*flags, "--out", str(tmp_path / "skip"), "--on-nonfinite", "skip") == 0
    assert "1 steps skipped" in capsys.readouterr().out
    assert all(torch.isfinite(w).all() for w in torch.load(
        next((tmp_path / "skip" / "last").glob("weights*")), weights_only=True).values())


NO_FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@pytest.mark.parametrize("full", ["checkpoint", pytest.param("log", marks=NO_FULL)])
def test_a_full_disk_says_how_to_go_on_and_a_resume_loses_nothing(full, text, tmp_path, monkeypatch):
    flags, out = [*TINY, "--data", text, "--train-steps", "8", "--save-every", "2"], tmp_path / "run"
    run(*flags, "--out", str(tmp_path / "whole"))
    row, write = progress.Log.row, checkpoint.write_tensors

    def full_log(log, *values):
        log.path = Path("/dev/full") if log.run.step == 7 else log.path
        row(log, *values)

    def full_folder(path, content):
        last = out / "last" / "config.json"
        if last.exists() and json.loads(last.read_text())["training"]["step"] == 6:
            raise OSError(28, "No space left on device")
        return write(path, content)

    with monkeypatch.context() as patch:
        if full == "log":
            patch.setattr(progress.Log, "row", full_log)
        else:
            patch.setattr(checkpoint, "write_tensors", full_folder)
        with pytest.raises(UserError, match=rf"No space left on device; .* --resume {out} goes on from"):
            run(*flags, "--out", str(out))
    assert run("--resume", str(out)) == 0 and weights(out) == weights(tmp_path / "whole")
    assert rows(out) == rows(tmp_path / "whole")


def test_settings_come_from_file_and_flags_win(text, tmp_path):
    config = tmp_path / "c.json"
    config.write_text(json.dumps({"lr": 0.5, "n_layer": 2, "model": "gpt2", "preset": "1L", "seed": 7}))
    s, c, _ = train.parse(["--config", str(config), "--lr", "0.25", "--tokenizer", "bytes",
                              "--n_layer", "4", "--out", str(tmp_path / "x")])
    assert (s.lr, s.seed, s.model, c.n_layer, c.attention, c.vocab_size) == (0.25, 7, "gpt2", 4, "mhsa", 320)


def test_init_starts_from_given_weights(text, tmp_path):
    run(*TINY, "--data", text, "--train-steps", "1", "--out", str(tmp_path / "a"))
    again = ["--init", str(tmp_path / "a" / "last"), "--data", text, "--out", str(tmp_path / "b")]
    s, config, start = train.parse([*again, "--tokenizer", "bytes"])
    lm = train.Run(s, config, **start).lm
    assert config.n_embd == 16 and set(start) == {"weights", "meta"}
    assert all(torch.equal(w, start["weights"][name]) for name, w in lm.state_dict().items())
    with pytest.raises(UserError, match="n-embd 32 differs from the 16"):
        train.parse([*again, "--n-embd", "32"])
    with pytest.raises(UserError, match="--tokenizer bytes"):
        s, config, start = train.parse([*again, "--tokenizer", "pydocs:256"])
        train.Run(s, config, **start)


def test_resume_takes_new_settings_and_refuses_other_models(text, tmp_path):
    out = str(tmp_path / "a")
    run(*TINY, "--data", text, "--train-steps", "2", "--out", out)
    s, config, start = train.parse(["--resume", out, "--train-steps", "4", "--weight-decay", "0.5",
                                    "--beta2", "0.9"])
    groups = train.Run(s, config, **start).optimizer.param_groups
    assert [g["weight_decay"] for g in groups] == [0.5, 0] and groups[0]["betas"] == (0.9, 0.9)
    for flag, value in (("--model", "gpt2"), ("--preset", "S"), ("--out", "b"), ("--init", "b")):
        with pytest.raises(UserError, match=flag):
            train.parse(["--resume", out, "--train-steps", "4", flag, value])


def test_a_kill_after_the_last_step_leaves_a_run_that_ends(text, tmp_path, monkeypatch, capsys):
    out = tmp_path / "a"
    flags = [*TINY, "--data", text, "--train-steps", "3", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "finish", lambda self: None)
        assert run(*flags) == 0 and not (out / "loss.png").exists()
    assert run("--resume", str(out)) == 0
    assert (out / "loss.png").exists() and "\nresult " in capsys.readouterr().out


def test_a_run_that_died_before_its_first_checkpoint_can_be_begun_again(text, tmp_path):
    out = tmp_path / "a"
    out.mkdir()
    (out / "log.csv").write_text("step,tokens\n1,2\n")
    assert run(*TINY, "--data", text, "--train-steps", "1", "--out", str(out)) == 0


def test_the_chosen_dtype_is_kept_for_resumes(text, tmp_path):
    flags = [f for f in TINY if f not in ("--dtype", "float32")]
    run(*flags, "--data", text, "--train-steps", "1", "--out", str(tmp_path / "a"))
    meta = json.loads((tmp_path / "a" / "last" / "config.json").read_text())
    assert meta["training"]["settings"]["dtype"] in ("bfloat16", "float32")


def test_foreign_weights_bring_their_tokenizer(tmp_path):
    from crate_mini import foreign
    lm = train.model.LM(train.model.preset("1L", "crate", vocab_size=50304, block_size=8))
    torch.save({"model": foreign.export_foreign(lm), "model_args": {"n_head": 4}}, tmp_path / "theirs.pt")
    s, config, start = train.parse(["--init", str(tmp_path / "theirs.pt")])
    assert (s.tokenizer, config.vocab_size) == ("gpt2", 50304)
    with pytest.raises(UserError, match="--tokenizer gpt2"):
        train.checkpoint.check_tokenizer(start["meta"], data.load_tokenizer("pydocs"))


def test_learning_rate_warms_up_and_falls_to_its_floor():
    s = Settings(lr=1.0, warmup=10, train_steps=110)
    rates = [s.lr_at(i) for i in range(110)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)]) and rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))


BAD = {  # flags -> what the one sentence must name
    "no such flag": (["--leraning-rate", "1"], "--leraning-rate"),
    "mistyped flag": (["--trian-steps", "1"], "did you mean --train-steps"),
    "not a number": (["--lr", "fast"], "--lr"),
    "negative": (["--lr", "-1"], "--lr"),
    "nan": (["--lr", "nan"], "--lr"),
    "huge": (["--batch-size", "99999999999"], "--batch-size"),
    "no steps": (["--train-steps", "0"], "--train-steps"),
    "nothing held out": (["--val-fraction", "0"], "--val-fraction"),
    "layers without end": (["--n-layer", "999999999"], "--n-layer 999999999 is out"),
    "more memory than there is": (["--expansion", "2000000000"], "GiB"),
    "zero byte": (["--out", "a\0b"], "zero byte"),
    "endless name": (["--init", "x" * 5000], "xxx"),
    "unknown model": (["--model", "bert"], "--model 'bert' is unknown; choose one of crate, gpt2"),
    "unknown preset": (["--preset", "XL"], "--preset 'XL' is unknown; choose one of 1L"),
    "heads": (["--n-head", "3"], "--n-head 3 does not divide --n-embd 16; try --n-head 2."),
    "no heads": (["--n-head", "0"], "--n-head 0 must be at least 1; try 4."),
    "no corpus": (["--data", "nowhere.txt"], "nowhere.txt"),
    "no tokenizer": (["--tokenizer", "nowhere.tiktoken"], "nowhere.tiktoken"),
    "no GPU": (["--device", "cuda:9"], "--device cpu"),
    "no device": (["--device", "abacus"], "--device"),
    "dtype": (["--dtype", "int8"], "bfloat16"),
    "resume nothing": (["--resume", "nowhere"], "nowhere"),
    "config nothing": (["--config", "nowhere.json"], "nowhere.json"),
    "config of other text": (["--config", str(ROOT / "LICENSE")], 'settings like {"lr": 0.001}.'),
    "context": (["--block-size", "999999"], "lower --block-size"),
    "vocabulary": (["--vocab-size", "10"], "ids"),
    "below the tokenizer": (["--vocab-size", "10"], "below the 257 ids of --tokenizer bytes"),
    "on nonfinite": (["--on-nonfinite", "pray"], "stop or skip"),
    "no learning": (["--lr", "0"], "--lr 0.0 learns nothing"),
    "floor above the peak": (["--lr", "0.1", "--min-lr", "0.2"], "--min-lr 0.2"),
    "empty out": (["--out", ""], "--out '' is empty"),
    "empty data": (["--data", ""], "--data '' is empty"),
    "empty tokenizer": (["--tokenizer", ""], "--tokenizer '' is empty"),
    "empty init": (["--init", ""], "--init '' is empty"),
    "empty resume": (["--resume", ""], "is empty"),
    "empty config": (["--config", ""], "is empty"),
    "out is a file": (["--out", "/dev/null"], "Nothing can be written to /dev/null"),
    "below a file": (["--out", "/dev/null/run"], "Nothing can be written to /dev/null/run"),
    "query of MHSA": (["--model", "gpt2", "--query-rank", "4"], "--query-rank 4 does nothing beside"),
    "ISTA of MLP": (["--sparsifier", "mlp", "--ista-steps", "4"], "--ista-steps 4 does nothing beside"),
    "step of MLP": (["--model", "gpt2", "--eta", "0.2"], "--eta 0.2 does nothing beside --sparsifier mlp"),
    "switch of MLP": (["--model", "gpt2", "--unit-norm"], "--unit-norm does nothing"),
    "MLP of ISTA": (["--activation", "gelu"], "--activation gelu does nothing beside --sparsifier ista"),
    "init nothing": (["--init", "nowhere.pt"], "nowhere.pt"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_in_one_sentence(name, text, tmp_path, capsys):
    flags, word = BAD[name]
    base = [*TINY, "--data", text, "--out", str(tmp_path / "run"), "--train-steps", "1"]
    with pytest.raises(SystemExit) as exit:
        cli.run(lambda: run(*base, *flags))
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and error.startswith("error: ") and word in error
    assert not re.search(r"[.,;:!?][.,;:]|None", error)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("out", ["file", "file/run", "locked/run"])
def test_a_bad_out_is_told_before_data_are_prepared(out, text, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "locked").mkdir(mode=0o500)
    if out.startswith("locked") and os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("this user may write anywhere")
    monkeypatch.setattr(data, "open_corpus", lambda *a, **k: pytest.fail("data were prepared"))
    with pytest.raises(UserError, match="Nothing can be written to .*another --out"):
        run(*TINY, "--data", text, "--out", str(tmp_path / out))
    assert (tmp_path / "file").read_text() == "mine"


def test_two_runs_do_not_share_a_folder(text, tmp_path):
    flags = [*TINY, "--data", text, "--train-steps", "2", "--overwrite", "--out", str(tmp_path / "run")]
    with progress.claim(tmp_path / "run"):
        with pytest.raises(UserError, match="Another process is training in .*/run now"):
            run(*flags)
        assert list((tmp_path / "run").iterdir()) == []
    assert not (tmp_path / "run").exists() and run(*flags) == 0
    with progress.claim(tmp_path / "run"), pytest.raises(UserError, match="Another process"):
        run("--resume", str(tmp_path / "run"), "--train-steps", "4")
    assert run("--resume", str(tmp_path / "run"), "--train-steps", "4") == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_sets_the_folder_free(tmp_path):
    mine, theirs = os.pipe()
    child = os.fork()
    if not child:
        with progress.claim(tmp_path / "run"):
            os.write(theirs, b"held")
            time.sleep(60)
            os._exit(0)
    os.read(mine, 4)
    with pytest.raises(UserError, match="Another process"), progress.claim(tmp_path / "run"):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with progress.claim(tmp_path / "run"):
        pass


def test_a_near_miss_is_pointed_out(text, tmp_path, monkeypatch):
    out = tmp_path / "out" / "crate-3L"
    run(*TINY, "--data", text, "--train-steps", "1", "--out", str(out))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").symlink_to(out)
    with pytest.raises(UserError, match="No checkpoint in a .did you mean a/last[?]"):
        train.parse(["--init", "a"])
    for flag, path in (("--init", out), ("--init", tmp_path / "out" / "crat-3L"),
                       ("--init", out / "lats"), ("--resume", tmp_path / "out" / "crat-3L")):
        with pytest.raises(UserError, match=f"No checkpoint in {path}.*did you mean {out}/last[?]"):
            train.parse([flag, str(path)])
    with pytest.raises(UserError, match="such as out/crate-3L/last"):
        train.parse(["--resume", str(tmp_path / "else" / "where" / "far" / "off")])
    s, _, start = train.parse(["--resume", str(out / "last"), "--train-steps", "2"])
    assert s.out == str(out) and start["state"]["step"] == 1


@pytest.mark.parametrize("flags", [
    [], ["--model", "gpt2", "--lr", "0.01", "--no-bias", "--activation", "gelu", "--block-size", "32"],
    ["--model", "crate+", "--query-rank", "8", "--lam", "0.2", "--seed", "5", "--tokenizer", "pydocs:511"],
    ["--preset", "S", "--val-fraction", "0.2", "--vocab-size", "5000", "--log-sparsity", "--out", "a/b c"]])
def test_the_twin_differs_in_its_kind_alone(flags):
    s, config, _ = train.parse(flags)
    found = twin(s, config, data.load_tokenizer(s.tokenizer).vocab_size)
    other, shape, _ = train.parse(found)
    assert {s.model, other.model} in ({"crate", "gpt2"}, {"crate+", "gpt2"})
    assert {**asdict(s), "model": "", "out": ""} == {**asdict(other), "model": "", "out": ""}
    assert other.out != s.out and (s.out == "a/b c") == (other.out == "a/b c-gpt2")
    for f in fields(shape):
        if f.name not in {*OF_KIND, "lam", "activation"}:
            assert getattr(shape, f.name) == getattr(config, f.name), f.name
    usual = train.model.preset("3L", other.model)
    assert all(getattr(shape, name) == getattr(usual, name) for name in OF_KIND)


@pytest.mark.parametrize("change", [
    dict(kind="crate"), dict(kind="gpt2"), dict(kind="crate+", ista_steps=4), dict(kind="gpt2", expansion=8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_counted_about_right(change, dtype):
    """Against what autograd keeps, weights and the head's gradients aside."""
    config = train.model.preset("3L", n_embd=64, vocab_size=64, block_size=32, **change)
    lm, kept = train.model.LM(config), {}
    own = {w.untyped_storage().data_ptr() for w in lm.parameters()}

    def keep(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t       # alive, so that no address comes twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), \
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        lm.trunk(torch.zeros(32, 32, dtype=torch.long))
    found = sum(t.untyped_storage().nbytes() for t in kept.values())
    assert 0.7 < machine.activation_bytes(config, 32, dtype) / found < 1.3


@pytest.mark.parametrize("change", [
    dict(kind="crate"), dict(kind="gpt2"), dict(kind="gpt2", activation="gelu")])
def test_l1_weighs_the_size_of_codes_of_either_sign(change):
    lm, ids = train.model.LM(train.model.preset("1L", vocab_size=9, l1=0.5, **change)), torch.arange(8)[None]
    codes = lm.trunk(ids)[1]
    want = lm.eval()(ids, ids) + 0.5 * sum(a.abs().sum(-1).mean() for a in codes) / len(codes)
    loss = lm.train()(ids, ids)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5) and loss > lm.eval()(ids, ids) + 0.1
    assert (codes[0] < 0).any() == ("activation" in change)


def test_a_batch_that_cannot_fit_is_refused(monkeypatch):
    config = train.model.preset("3L", "crate")
    monkeypatch.setattr(machine, "total_memory", lambda device: 2 ** 30)
    machine.check_memory(config, 8, torch.device("cpu"), torch.float32)
    with pytest.raises(UserError, match="for activations.*lower --micro-batch"):
        machine.check_memory(config, 1000, torch.device("cpu"), torch.float32)


def test_what_will_run_is_said_before_it_is_tried(text, tmp_path, monkeypatch, capsys):
    seen, forward = [], train.model.LM.forward

    def watched(self, *args):
        seen.append(capsys.readouterr().out)
        return forward(self, *args)

    monkeypatch.setattr(train.model.LM, "forward", watched)
    assert run(*TINY, "--data", text, "--train-steps", "1", "--out", str(tmp_path / "run")) == 0
    assert "\ncorpus " in seen[0] and "note      --warmup 2 outlasts the run" in seen[0]
    assert "expected" not in seen[0] and "expected" in "".join(seen[1:])


def test_a_reader_that_leaves_stops_the_run_as_a_signal_does(text, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *TINY, "--data", text, "--train-steps", "100000",
         "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE and not error
    done = int(rows(out)[-1]["step"])
    assert json.loads((out / "last/config.json").read_text())["training"]["step"] == done >= 3
    assert run("--resume", str(out), "--train-steps", str(done + 1)) == 0


def test_a_run_is_not_overwritten_by_chance(text, tmp_path):
    flags = [*TINY, "--data", text, "--out", str(tmp_path / "run"), "--train-steps", "1"]
    run(*flags)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="--overwrite"):
        run(*flags)
    with pytest.raises(UserError, match="n-layer 2 differs from the 1"):
        run("--resume", str(tmp_path / "run"), "--n-layer", "2", "--train-steps", "5")
    with pytest.raises(UserError, match="--train-steps 2"):
        run("--resume", str(tmp_path / "run"))
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert run(*flags, "--overwrite") == 0


def test_the_script_itself_exits_with_2_and_no_traceback():
    done = script("--trian-steps", "3")
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_help_explains_every_flag():
    parser_help = script("--help", COLUMNS="100").stdout
    for f in [*Settings.__dataclass_fields__, *train.model.Config.__dataclass_fields__]:
        assert "--" + f.replace("_", "-") in parser_help
    assert "None" not in parser_help
    words = " ".join(parser_help.split())
    for said in ("(default lr / 10)", "(default 256 for 1L 2L 3L, 1024 for S B)", "(default out/MODEL",
                 "(default the tokenizer's ids,", "(default as --preset says)", "(default as --model says)"):
        assert said in words, said
    notes = {**cli.comments(Settings), **cli.comments(train.model.Config)}
    assert all(len(notes[f]) > 0 for f in Settings.__dataclass_fields__)


FLAGS = sorted("--" + f.replace("_", "-") for f in [*Settings.__dataclass_fields__,
                                                  *train.model.Config.__dataclass_fields__])
VALUES = st.sampled_from(["", "0", "1", "-1", "nan", "inf", "1e999", "x", "1L", "gpt2", "ista", "true",
                          "9" * 30, "é\0"])
STRANGE = ["--", "-x", "--resume", "--config", "--init", "--lrr", "--="]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([*FLAGS, *STRANGE]), VALUES), max_size=4))
def test_fuzzed_command_lines_are_parsed_or_refused(pairs):
    """Never anything but a UserError; a parsed line has a model that can be built."""
    try:
        s, config, _ = train.parse([word for pair in pairs for word in pair])
    except UserError as e:
        assert str(e).strip()
    else:
        assert isinstance(s, Settings)
        if config.n_layer < 50:
            try:
                with torch.device("meta"):
                    train.model.LM(config)
            except RuntimeError as e:
                assert re.search(cli.NO_MEMORY, str(e))


def test_peaks_refuse_to_guess():
    assert machine.peak_flops(torch.device("mps"), torch.float32)[0] is None
    assert machine.peak_flops(torch.device("cpu"), torch.float32)[0] > 1e8


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA H100 NVL", None), ("NVIDIA L40", None),
    ("NVIDIA A10G", None),
    ("NVIDIA RTX A1000 Laptop GPU", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None)])
def test_the_table_of_peaks_knows_names_exactly(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert machine.peak_flops(torch.device("cuda"), torch.bfloat16)[0] == peak


def test_errors_that_are_not_of_memory_keep_their_traceback():
    with pytest.raises(RuntimeError, match="illegal memory access"):
        cli.run(lambda: (_ for _ in ()).throw(RuntimeError("CUDA error: an illegal memory access")))

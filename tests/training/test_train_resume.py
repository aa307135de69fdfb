"""An interrupted run resumes exactly: kills at any moment, signals, full disks, bad losses."""

import math
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import tiny_runs
import torch
from forked import ROOT, start_script
from tiny_runs import facts, rows, run, script, script_at_step, tiny, train, weights

from crate_mini import UserError
from crate_mini.training import checkpoint, run_log
from crate_mini.training.settings import Settings

# Fixtures.
figures = tiny_runs.figures
own_place = tiny_runs.own_place
text = tiny_runs.text


@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("kind", ["crate", "gpt2", "crate+"])
def test_resume_is_bitwise_equal_to_an_uninterrupted_run(kind, top_k, text, tmp_path):
    changes = dict(model=kind, micro_batch=3, top_k=top_k)
    if kind != "gpt2":
        changes["query_rank"] = 3
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    run(*tiny(text, whole, 12, **changes))
    s, config, _ = train.parse(tiny(text, cut, 12, **changes))
    trainer = train.Trainer(s, config)
    one_step = trainer.one_step

    def interrupted():
        trainer.caught = signal.SIGTERM if trainer.step == 6 else 0
        return one_step()

    trainer.one_step = interrupted
    assert trainer.train() == 128 + signal.SIGTERM
    assert facts(cut)["step"] == 7
    assert run("--resume", cut) == 0
    assert weights(cut) == weights(whole)
    by_step = {row["step"]: row for row in rows(cut)}
    for row in rows(whole):
        assert by_step[row["step"]] == row


# ---- kills and signals ---------------------------------------------------------------------------


def wait_for_checkpoint(process, config, before):
    """Return when config.json is newer than `before` (in ns), or the process has ended."""
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        if config.exists() and config.stat().st_mtime_ns != before:
            return
        time.sleep(0.002)


def is_finished(out):
    """Whether a run has saved its end: only its last checkpoint has a validation loss."""
    return (out / "last" / "config.json").exists() and "val_loss" in facts(out)


def test_kill_9_at_any_moment_then_resume_ends_with_the_same_weights(text, tmp_path):
    """20 kills of one run at random times; then it ends as an unbroken one, to the bit."""
    whole, out = tmp_path / "whole", tmp_path / "cut"
    changes = dict(save_every=3, eval_every=50)
    run(*tiny(text, whole, 150, **changes))
    config = out / "last" / "config.json"
    draw = random.Random(1)
    resumes = 0
    for _ in range(20):
        if config.exists():
            resumes += 1
            words, before = ["--resume", str(out)], config.stat().st_mtime_ns
        else:
            words, before = tiny(text, out, 150, overwrite=True, **changes), 0
        process = start_script(["train.py", *words])
        wait_for_checkpoint(process, config, before)  # it gets one checkpoint further at least
        time.sleep(draw.random() * 0.05)
        process.kill()
        process.communicate()
        if is_finished(out):  # a kill may come between the last checkpoint and the exit
            break
    assert resumes >= 10, "the run must have been cut often enough to mean something"
    if not is_finished(out):
        assert run("--resume", str(out)) == 0
    assert weights(out) == weights(whole)
    assert rows(out)[-1] == rows(whole)[-1]


@pytest.mark.parametrize("number, fresh", [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_signal_finishes_the_step_saves_and_prints_how_to_resume(number, fresh, text, tmp_path):
    out = tmp_path / "run"
    process = script_at_step(5, tiny(text, out, 100_000), fresh)
    process.send_signal(number)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number and not error
    assert "\nfinishing this step, then saving; Ctrl-C again stops at once\n" in output
    assert f"python train.py --resume {out}" in output
    last = int(rows(out)[-1]["step"])
    assert facts(out)["step"] == last
    resumed = script("--resume", str(out), "--train-steps", str(last + 2))
    assert resumed.returncode == 0, resumed.stderr
    assert int(rows(out)[-1]["step"]) == last + 2


def test_a_reader_that_leaves_stops_the_run_as_a_signal_does(text, tmp_path):
    out = tmp_path / "run"
    process = script_at_step(3, tiny(text, out, 100_000))
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE and not error
    last = int(rows(out)[-1]["step"])
    assert facts(out)["step"] == last >= 3
    assert run("--resume", str(out), "--train-steps", str(last + 1)) == 0


def test_a_kill_after_the_last_step_leaves_a_run_that_ends(
    text, tmp_path, monkeypatch, capsys, figures
):
    out = tmp_path / "a"
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "finish", lambda self: None)
        assert run(*tiny(text, out, 3)) == 0 and not (out / "loss.png").exists()
    assert run("--resume", str(out)) == 0
    assert (out / "loss.png").exists() and "\nresult " in capsys.readouterr().out


def test_a_run_that_died_before_its_first_checkpoint_can_start_again(text, tmp_path):
    out = tmp_path / "a"
    out.mkdir()
    (out / "log.csv").write_text("step,tokens\n1,2\n")
    assert run(*tiny(text, out, 1)) == 0


# ---- two processes -------------------------------------------------------------------------------

# At its end each process prints the threads of its group that are left.
PRINT_THREADS = """
import atexit, pathlib, sys
def print_threads():
    names = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
    print("threads left:", [name for name in names if "gloo" in name], file=sys.stderr)
atexit.register(print_threads)
"""
POISON = """
import math, os
forward, calls = train.model.LM.forward, []
def poisoned(self, ids, targets=None):
    calls.append(self.training)
    bad = sum(calls) == 5 and os.environ["RANK"] == "1"
    return forward(self, ids, targets) * (math.nan if bad else 1)
train.model.LM.forward = poisoned
"""


def start_pair(words, before=""):
    """train.py in two processes, as torchrun starts them; `before` runs in each first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
    }
    code = f"import train\n{before}\n{PRINT_THREADS}\ntrain.terminal.run(train.main)"
    pair = []
    for rank in ("0", "1"):
        place = {"RANK": rank, "LOCAL_RANK": rank}
        pair.append(start_script(["-c", code, *words], ROOT, {**env, **place}, full_exit=True))
    return pair


def outputs(pair, code):
    """[(stdout, stderr)] of both processes, which end with this code and leave no thread behind."""
    results = [process.communicate(timeout=120) for process in pair]
    assert [process.returncode for process in pair] == [code, code], results
    if sys.platform == "linux":  # a thread that is left may need Python while it exits, and aborts
        for _, error in results:
            assert error.rstrip().endswith("threads left: []"), results
    return results


def test_a_signal_to_one_of_two_processes_stops_both_at_one_step(text, tmp_path):
    out = tmp_path / "run"
    pair = start_pair(tiny(text, out, 100_000, device="cpu"))
    for line in pair[0].stdout:
        if line.startswith("step 5/"):
            break
    pair[1].send_signal(signal.SIGTERM)
    results = outputs(pair, 128 + signal.SIGTERM)
    assert f"python train.py --resume {out}" in results[0][0]
    last = int(rows(out)[-1]["step"])
    assert facts(out)["step"] == last
    assert run("--resume", str(out), "--train-steps", str(last + 1)) == 0


@pytest.mark.parametrize("choice, code", [("stop", 2), ("skip", 0)])
def test_two_processes_agree_on_a_loss_that_only_one_finds_not_finite(choice, code, text, tmp_path):
    words = tiny(text, tmp_path / "run", 7, device="cpu", on_nonfinite=choice)
    (stdout, stderr), (_, stderr_1) = outputs(start_pair(words, before=POISON), code)
    assert "Traceback" not in stderr + stderr_1
    if choice == "stop":
        assert "nan at step 5, learning rate" in stderr
    else:
        assert "1 steps skipped" in stdout


# ---- losses that are not finite, disks that are full ---------------------------------------------


def test_a_run_that_diverges_to_the_end_reports_it(text, tmp_path, monkeypatch):
    words = tiny(text, tmp_path / "run", 9, clip=0, on_nonfinite="skip")
    monkeypatch.setattr(Settings, "lr_at", lambda s, step: 1e9 if step >= 4 else 1e-3)
    with pytest.raises(UserError, match=r"validation loss (nan|inf) after the last step; .*/best"):
        run(*words)


def test_a_loss_that_is_not_finite_stops_or_is_skipped(text, tmp_path, monkeypatch, capsys):
    forward, calls = train.model.LM.forward, []

    def poisoned(self, ids, targets=None):
        calls.append(self.training and targets is not None)
        bad = sum(calls) == 5 and self.training
        return forward(self, ids, targets) * (math.nan if bad else 1)

    monkeypatch.setattr(train.model.LM, "forward", poisoned)
    stop, skip = tmp_path / "stop", tmp_path / "skip"
    sentence = r"nan at step 5, .*--resume \S*/stop continues .*--on-nonfinite skip"
    with pytest.raises(UserError, match=sentence):
        run(*tiny(text, stop, 8, save_every=1))
    assert facts(stop)["step"] == 4
    calls.clear()
    assert run(*tiny(text, skip, 8, save_every=1, on_nonfinite="skip")) == 0
    assert "1 steps skipped" in capsys.readouterr().out
    file = next((skip / "last").glob("weights*"))
    for w in torch.load(file, weights_only=True).values():
        assert torch.isfinite(w).all()


NEEDS_FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@pytest.mark.parametrize("full", ["checkpoint", pytest.param("log", marks=NEEDS_FULL)])
def test_a_full_disk_gives_advice_and_a_resume_loses_nothing(full, text, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "run"
    run(*tiny(text, whole, 8, save_every=2))
    row, write_tensors = run_log.Log.row, checkpoint.write_tensors

    def full_log(log, *values):
        if log.trainer.step == 7:
            log.path = Path("/dev/full")
        row(log, *values)

    def full_folder(path, content):
        if (out / "last" / "config.json").exists() and facts(out)["step"] == 6:
            raise OSError(28, "No space left on device")
        return write_tensors(path, content)

    with monkeypatch.context() as patch:
        if full == "log":
            patch.setattr(run_log.Log, "row", full_log)
        else:
            patch.setattr(checkpoint, "write_tensors", full_folder)
        sentence = rf"No space left on device; .* --resume {out} continues from"
        with pytest.raises(UserError, match=sentence):
            run(*tiny(text, out, 8, save_every=2))
    assert run("--resume", str(out)) == 0
    assert weights(out) == weights(whole) and rows(out) == rows(whole)


# ---- what a resume may change --------------------------------------------------------------------


def test_resume_takes_new_settings_and_refuses_other_models(text, tmp_path):
    out = str(tmp_path / "a")
    run(*tiny(text, out, 2))
    resume = ["--resume", out, "--train-steps", "4"]
    s, config, start = train.parse([*resume, "--weight-decay", "0.5", "--beta2", "0.9"])
    matrices, vectors = train.Trainer(s, config, **start).optimizer.param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.5, 0)
    assert matrices["betas"] == (0.9, 0.9)
    for flag, value in (("--model", "gpt2"), ("--preset", "S"), ("--out", "b"), ("--init", "b")):
        with pytest.raises(UserError, match=flag):
            train.parse([*resume, flag, value])


def test_the_chosen_dtype_is_kept_for_resumes(text, tmp_path):
    run(*tiny(text, tmp_path / "a", 1, dtype="auto"))
    assert facts(tmp_path / "a")["settings"]["dtype"] in ("bfloat16", "float32")


# ---- one run in a folder -------------------------------------------------------------------------


def test_two_runs_do_not_share_a_folder(text, tmp_path):
    out = tmp_path / "run"
    words = tiny(text, out, 2, overwrite=True)
    with run_log.claim(out):
        with pytest.raises(UserError, match="Another process is training in .*/run now"):
            run(*words)
        assert list(out.iterdir()) == []
    assert not out.exists() and run(*words) == 0
    resume = ["--resume", str(out), "--train-steps", "4"]
    with run_log.claim(out), pytest.raises(UserError, match="Another process"):
        run(*resume)
    assert run(*resume) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_frees_the_folder(tmp_path):
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        with run_log.claim(tmp_path / "run"):
            os.write(write_end, b"held")
            time.sleep(60)
            os._exit(0)
    os.read(read_end, 4)
    with pytest.raises(UserError, match="Another process"), run_log.claim(tmp_path / "run"):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with run_log.claim(tmp_path / "run"):
        pass

"""A run that is cut goes on exactly: kills at any moment, signals, full disks, losses that are not finite."""

import json
import math
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_runs as training
import torch
from tiny_runs import ROOT, TINY, rows, run, script, train, weights

from crate_mini import UserError, cli
from crate_mini.training import checkpoint
from crate_mini.training import run_log as progress
from crate_mini.training.settings import Settings

clean_machine, text = training.clean_machine, training.text  # fixtures


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


def child(flags, threads=1):
    """A training in a forked process: main() as the script runs it, output thrown away."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(threads)
    sys.argv = ["train.py", *flags]
    cli.run(train.main)


def test_kill_9_at_any_moment_then_resume_ends_with_the_same_loss(text, tmp_path, monkeypatch):
    """20 kills of one run at random times; then it ends with exactly the weights of an unbroken one."""
    flags = [
        *TINY,
        "--data",
        text,
        "--train-steps",
        "150",
        "--save-every",
        "3",
        "--eval-every",
        "50",
    ]
    run(*flags, "--out", str(tmp_path / "whole"))
    context, out, draw = (
        multiprocessing.get_context("forkserver"),
        tmp_path / "cut",
        random.Random(1),
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(ROOT / "tests"))))
    context.set_forkserver_preload(["train", "test_train_resume"])
    kills = resumes = 0
    while kills < 20:
        resumed = (out / "last" / "config.json").exists()
        resumes += resumed
        again = ["--resume", str(out)] if resumed else [*flags, "--out", str(out), "--overwrite"]
        process = context.Process(target=child, args=(again,))
        process.start()
        seen, mark = time.time(), (out / "last" / "config.json")
        before = mark.stat().st_mtime_ns if resumed else 0
        while (
            process.is_alive() and time.time() - seen < 60
        ):  # let it get one checkpoint further at least
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


LEFT = """
import atexit, pathlib
atexit.register(lambda: print("threads left:", [name.read_text() for name in
                                                pathlib.Path("/proc/self/task").glob("*/comm")
                                                if "gloo" in name.read_text()], file=train.sys.stderr))
"""


def pair(*flags, before=""):
    """train.py in two processes of one run, started as torchrun starts them; `before` runs in each first."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
    }
    code = f"import train\n{before}\n{LEFT}\ntrain.cli.run(train.main)"
    return [
        subprocess.Popen(
            [sys.executable, "-c", code, *TINY, "--device", "cpu", *flags],
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]


def ended(both, code):
    """What both processes said, once they ended with this code and left no thread of their group behind."""
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [code] * 2, said
    if sys.platform == "linux":  # one that is left may need Python while Python exits, which aborts
        assert all(error.rstrip().endswith("threads left: []") for _, error in said), said
    return said


def test_a_signal_to_one_of_two_processes_stops_both_at_one_step(text, tmp_path):
    out = tmp_path / "run"
    both = pair("--data", text, "--train-steps", "100000", "--out", str(out))
    for line in both[0].stdout:
        if line.startswith("step 5/"):
            break
    both[1].send_signal(signal.SIGTERM)
    said = ended(both, 128 + signal.SIGTERM)
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
    both = pair(
        "--data",
        text,
        "--train-steps",
        "7",
        "--out",
        str(tmp_path / "run"),
        "--on-nonfinite",
        choice,
        before=POISON,
    )
    said = ended(both, code)
    assert "Traceback" not in said[0][1] + said[1][1]
    assert ("nan at step 5, learning rate" if code else "1 steps skipped") in said[0][code > 0]


def test_a_run_that_diverges_to_the_end_says_so(text, tmp_path, monkeypatch):
    flags = [*TINY, "--data", text, "--train-steps", "9", "--clip", "0", "--on-nonfinite", "skip"]
    monkeypatch.setattr(Settings, "lr_at", lambda s, step: 1e9 if step >= 4 else 1e-3)
    with pytest.raises(UserError, match=r"validation loss (nan|inf) after the last step; .*/best"):
        run(*flags, "--out", str(tmp_path / "run"))


def stepping(text, out, step):
    """train.py in a process of its own, which has just told of a step of a long run."""
    process = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "train.py"),
            *TINY,
            "--data",
            text,
            "--train-steps",
            "100000",
            "--out",
            str(out),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    for line in process.stdout:
        if line.startswith(f"step {step}/"):
            break
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(number, text, tmp_path):
    out = tmp_path / "run"
    process = stepping(text, out, 5)
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
    with pytest.raises(
        UserError, match=r"nan at step 5, .*--resume \S*/stop goes on .*--on-nonfinite skip"
    ):
        run(*flags, "--out", str(tmp_path / "stop"))
    assert (
        json.loads((tmp_path / "stop" / "last" / "config.json").read_text())["training"]["step"]
        == 4
    )
    poisoned.calls = 0
    assert run(*flags, "--out", str(tmp_path / "skip"), "--on-nonfinite", "skip") == 0
    assert "1 steps skipped" in capsys.readouterr().out
    assert all(
        torch.isfinite(w).all()
        for w in torch.load(
            next((tmp_path / "skip" / "last").glob("weights*")), weights_only=True
        ).values()
    )


NO_FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@pytest.mark.parametrize("full", ["checkpoint", pytest.param("log", marks=NO_FULL)])
def test_a_full_disk_says_how_to_go_on_and_a_resume_loses_nothing(
    full, text, tmp_path, monkeypatch
):
    flags, out = (
        [*TINY, "--data", text, "--train-steps", "8", "--save-every", "2"],
        tmp_path / "run",
    )
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
        with pytest.raises(
            UserError, match=rf"No space left on device; .* --resume {out} goes on from"
        ):
            run(*flags, "--out", str(out))
    assert run("--resume", str(out)) == 0 and weights(out) == weights(tmp_path / "whole")
    assert rows(out) == rows(tmp_path / "whole")


def test_resume_takes_new_settings_and_refuses_other_models(text, tmp_path):
    out = str(tmp_path / "a")
    run(*TINY, "--data", text, "--train-steps", "2", "--out", out)
    s, config, start = train.parse(
        ["--resume", out, "--train-steps", "4", "--weight-decay", "0.5", "--beta2", "0.9"]
    )
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


def test_two_runs_do_not_share_a_folder(text, tmp_path):
    flags = [
        *TINY,
        "--data",
        text,
        "--train-steps",
        "2",
        "--overwrite",
        "--out",
        str(tmp_path / "run"),
    ]
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


def test_a_reader_that_leaves_stops_the_run_as_a_signal_does(text, tmp_path):
    out = tmp_path / "run"
    process = stepping(text, out, 3)
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE and not error
    done = int(rows(out)[-1]["step"])
    assert json.loads((out / "last/config.json").read_text())["training"]["step"] == done >= 3
    assert run("--resume", str(out), "--train-steps", str(done + 1)) == 0

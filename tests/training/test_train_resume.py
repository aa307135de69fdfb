"""An interrupted run resumes exactly: kills at any moment, signals, full disks, bad losses."""

import math
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import tiny_runs
import torch
from forked import ROOT, start_script
from numbered_saves import replace_data
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
        trainer.stop.caught = signal.SIGTERM if trainer.step == 6 else 0
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
    bad = sum(calls) == 7 and os.environ["RANK"] == "1"  # two of them tried a step
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
        bad = sum(calls) == 7 and self.training  # two of them tried a step
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


def test_a_best_step_whose_row_cannot_be_written_is_saved_as_best(text, tmp_path, monkeypatch):
    out = tmp_path / "run"

    def full(log, row):
        if row[0] == "8":
            raise UserError("Cannot write log.csv: No space left on device; make room.")

    monkeypatch.setattr(run_log.Log, "_append", full)
    with pytest.raises(UserError, match=f"--resume {out} continues from"):
        run(*tiny(text, out, 12))
    assert facts(out)["step"] == facts(out, "best")["step"] == 8


def saved_elsewhere(error):
    """The folder that an error names for --resume."""
    return Path(re.search(r"--resume (\S+) continues", str(error.value))[1])


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("event", ["row", "validation", "checkpoint"])
def test_a_run_folder_that_is_moved_away_loses_no_step(
    event, replaced, text, tmp_path, monkeypatch
):
    """Nor is another run's folder, which has taken its place, written to."""
    whole, out, away = (tmp_path / name for name in ("whole", "run", "away"))
    changes = dict(log_every=3 if event == "row" else 100)
    changes["eval_every"] = 3 if event == "validation" else 0
    changes["save_every"] = 6 if event == "checkpoint" else 0
    run(*tiny(text, whole, 9, **changes))
    keep = train.Trainer.keep

    def moving(trainer, *losses):
        if trainer.step == 6 and not away.exists():
            out.rename(away)
            if replaced:
                out.mkdir()
                (out / "theirs").write_text("kept")
        keep(trainer, *losses)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "keep", moving)
        with pytest.raises(
            UserError, match="run was moved or removed.*Step 6 was saved in"
        ) as error:
            run(*tiny(text, out, 9, **changes))
    assert out.exists() == replaced and (not replaced or len(list(out.iterdir())) == 1)
    fallback = saved_elsewhere(error)
    assert fallback.parent == tmp_path and facts(fallback)["step"] == 6
    assert run("--resume", str(fallback)) == 0
    assert weights(fallback) == weights(whole) and rows(fallback) == rows(whole)


def test_a_disk_that_stays_full_sends_a_run_to_the_temporary_folder(text, tmp_path, monkeypatch):
    whole, out, other_disk = (tmp_path / name for name in ("whole", "disk/run", "other"))
    other_disk.mkdir()
    run(*tiny(text, whole, 8))
    write_tensors = checkpoint.write_tensors

    def full(path, content):
        if other_disk not in path.parents and (out / "last" / "config.json").exists():
            raise OSError(28, "No space left on device")
        return write_tensors(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(other_disk))
        patch.setattr(checkpoint, "write_tensors", full)
        with pytest.raises(UserError, match="No space left.*Step 8 was saved in") as error:
            run(*tiny(text, out, 8))
    fallback = saved_elsewhere(error)
    assert fallback.parent == other_disk and facts(out)["step"] == 4
    assert [path.name for path in out.parent.iterdir()] == ["run"]  # no half-written fallback
    assert run("--resume", str(fallback)) == 0
    assert weights(fallback) == weights(whole) and rows(fallback) == rows(whole)


@NEEDS_FULL
def test_an_output_that_cannot_be_written_late_in_a_run_saves_it(text, tmp_path, monkeypatch):
    out = tmp_path / "run"
    show_line = run_log.terminal.show_line

    def full(line, last=False):
        if line.startswith("step 3/"):
            raise OSError(28, "No space left on device")
        show_line(line, last)

    monkeypatch.setattr(run_log.terminal, "show_line", full)
    monkeypatch.setattr(run_log.terminal, "silence_stdout", lambda: None)
    assert run(*tiny(text, out, 100)) == 128 + signal.SIGPIPE
    assert facts(out)["step"] == 4


# ---- a damaged log -------------------------------------------------------------------------------

DAMAGE = {
    "bit": lambda content: content.replace(b",5.", b",\xb5.", 1),
    "digit": lambda content: content.replace(b"\n2,", b"\n1,", 1),
    "cut": lambda content: content[:150],
    "zeros": lambda content: b"\0" * len(content),
    "column": lambda content: content.replace(b"\n3,", b"\n", 1),
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("damage", [*DAMAGE, "folder", "gone"])
def test_a_damaged_log_never_costs_a_run(damage, text, tmp_path, capsys, figures):
    out = tmp_path / "run"
    run(*tiny(text, out, 4))
    log = out / "log.csv"
    content = log.read_bytes()
    if damage in DAMAGE:
        damaged = DAMAGE[damage](content)
        assert damaged != content
        log.write_bytes(damaged)
    else:
        log.unlink()
        if damage == "folder":
            log.mkdir()
    capsys.readouterr()
    assert run("--resume", str(out), "--train-steps", "8") == 0
    output = capsys.readouterr().out
    kept = rows(out)
    assert [row["step"] for row in kept[-4:]] == ["5", "6", "7", "8"]
    assert (out / "loss.png").exists()
    if damage == "gone":
        return
    aside = out / "log-damaged.csv"
    assert f"{log} was damaged and is now {aside.name}" in output
    if damage in DAMAGE:
        assert aside.read_bytes() == damaged
        sound = damaged.decode(errors="replace").splitlines()
        for row in kept[:-4]:
            assert any(line.startswith(f"{row['step']},{row['tokens']},") for line in sound)


def test_an_intact_log_of_a_kill_is_not_called_damaged(text, tmp_path, capsys):
    out = tmp_path / "run"
    run(*tiny(text, out, 4))
    before = rows(out)
    with open(out / "log.csv", "a") as file:
        file.write("5,320,5.5,0.1,1.0,100,,,\n6,384,5.")  # after the checkpoint, and unfinished
    assert run("--resume", str(out), "--train-steps", "6") == 0
    assert "damaged" not in capsys.readouterr().out
    assert rows(out)[:4] == before and [row["step"] for row in rows(out)] == list("123456")


def test_a_log_that_is_damaged_while_a_run_goes_on_costs_only_the_figure(
    text, tmp_path, capsys, monkeypatch, figures
):
    out = tmp_path / "run"
    finish = train.Trainer.finish

    def damaged(trainer):
        (out / "log.csv").write_bytes(b"step,tok\xffens\n")
        finish(trainer)

    monkeypatch.setattr(train.Trainer, "finish", damaged)
    assert run(*tiny(text, out, 4)) == 0
    output = capsys.readouterr().out
    assert "note      loss.png is not drawn: " in output and "\nresult " in output
    assert "loss.png" not in output.partition("\nfiles")[2].partition("\n")[0]
    assert is_finished(out)


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


@pytest.fixture(scope="module")
def easy(tmp_path_factory):
    """A text on which losses are far lower than on the other."""
    path = tmp_path_factory.mktemp("easy") / "easy.txt"
    path.write_text("ab " * 6000)
    return str(path)


CHANGES = {
    "text": lambda text, easy: ["--data", text],
    "eval tokens": lambda text, easy: ["--eval-tokens", "500"],
    "held-out share": lambda text, easy: ["--val-fraction", "0.3"],
}


@pytest.mark.parametrize("change", CHANGES)
def test_best_is_of_what_is_measured_now(change, text, easy, tmp_path, capsys):
    out = tmp_path / "run"
    run(*tiny(easy, out, 8, lr=0.02))
    old = weights(out, "best")
    capsys.readouterr()
    words = CHANGES[change](text, easy)
    assert run("--resume", str(out), "--train-steps", "16", *words) == 0
    assert "validation is on other tokens than before" in capsys.readouterr().out
    best = facts(out, "best")
    later = [float(row["val_loss"]) for row in rows(out) if row["val_loss"]][2:]
    assert best["best_val_loss"] == facts(out)["best_val_loss"] == min(later)
    assert best["settings"] == facts(out)["settings"] and best["corpus"] == facts(out)["corpus"]
    assert weights(out, "best-step-8") == old


@pytest.mark.parametrize(
    "words", [[], ["--batch-size", "2"], ["--lr", "0.001"], ["--eval-tokens", "199"]]
)
def test_best_stays_if_what_is_measured_stays(words, text, tmp_path, capsys):
    out = tmp_path / "run"
    run(*tiny(text, out, 8, lr=0.01))
    best = facts(out)["best_val_loss"]
    capsys.readouterr()
    limit = "--eval-tokens" in words
    assert run("--resume", str(out), "--train-steps", "9", *words) == 0
    assert ("validation is on other" in capsys.readouterr().out) == limit
    assert limit or facts(out)["best_val_loss"] <= best


def test_touching_or_copying_a_text_changes_nothing(text, tmp_path, capsys):
    copy = tmp_path / "copy.txt"
    copy.write_bytes(Path(text).read_bytes())
    out = tmp_path / "run"
    run(*tiny(text, out, 4))
    os.utime(text)
    capsys.readouterr()
    assert run("--resume", str(out), "--train-steps", "6") == 0
    assert run("--resume", str(out), "--train-steps", "8", "--data", str(copy)) == 0
    output = capsys.readouterr().out
    assert "differs from the text" not in output and "other tokens" not in output


def test_tokens_count_what_was_trained_on(text, tmp_path):
    out = tmp_path / "run"
    run(*tiny(text, out, 3, batch_size=4))
    run("--resume", str(out), "--train-steps", "5", "--batch-size", "2")
    run("--resume", str(out), "--train-steps", "6", "--batch-size", "8")
    tokens = [int(row["tokens"]) for row in rows(out)]
    assert tokens == [64, 128, 192, 224, 256, 384]


def test_a_missing_best_is_made_again(text, tmp_path):
    out = tmp_path / "run"
    run(*tiny(text, out, 4))
    shutil.rmtree(out / "best")
    assert run("--resume", str(out), "--train-steps", "8", "--lr", "0.9") == 0
    assert facts(out, "best")["step"] > 4


def test_only_a_run_can_be_resumed(text, tmp_path, monkeypatch):
    out = tmp_path / "run"
    run(*tiny(text, out, 1))
    more = ["--train-steps", "2"]
    for place in (out / "best", tmp_path / "a b" / "best"):
        if not place.exists():
            shutil.copytree(out / "best", place)
        hint = f", here --resume {out}." if place.parent == out else "`last`."
        with pytest.raises(UserError, match=f"{place} is a single checkpoint; .*{hint}$"):
            train.parse(["--resume", str(place), *more])
    monkeypatch.chdir(out / "best")
    with pytest.raises(UserError, match=f"here --resume {out}[.]$"):
        train.parse(["--resume", ".", *more])
    monkeypatch.chdir(out / "last")
    assert Path(train.parse(["--resume", ".", *more])[0].out) == out
    for place in (out / "log.csv", tmp_path, "nowhere"):
        with pytest.raises(UserError, match="No checkpoint in"):
            train.parse(["--resume", str(place)])


STATES = [
    {},
    [1],
    {"step": "1"},
    {"step": -1},
    {"tokens": "1"},
    {"log": 5},
    {"log": {"bytes": "1", "sha256": ""}},
    {"optimizer": {}},
    {"optimizer": {"state": 1, "param_groups": [1, 2]}},
]


@pytest.mark.parametrize("change", STATES)
def test_a_state_that_is_not_of_a_run_is_one_sentence(change, text, tmp_path):
    """With fitting hashes, as someone may have made it."""
    out = tmp_path / "run"
    run(*tiny(text, out, 1))
    state = checkpoint.load_resume(out / "last")[1]
    changed = {**state, **change} if isinstance(change, dict) and change else change
    replace_data(out / "last", "resume", changed)
    with pytest.raises(UserError, match="--init"):
        run("--resume", str(out), "--train-steps", "2")


def test_weights_that_are_not_finite_are_not_trained_on(text, tmp_path):
    out = tmp_path / "run"
    run(*tiny(text, out, 1))
    weights = checkpoint.load_resume(out / "last")[2]
    weights["tokens.weight"][3, 3] = math.nan
    replace_data(out / "last", "weights", weights)
    for words in (["--resume", str(out)], ["--init", str(out / "last")]):
        with pytest.raises(UserError, match="weights that are not finite, in tokens.weight"):
            run(*words, "--train-steps", "2")


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


def test_a_refused_start_does_not_remove_the_winners_empty_folder(tmp_path):
    out = tmp_path / "new" / "run"
    with run_log.claim(out):
        with pytest.raises(UserError, match="Another process"), run_log.claim(out):
            pass
        assert out.is_dir()
    assert not out.parent.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs locks")
def test_one_that_came_first_while_another_looked_keeps_its_folder(tmp_path, monkeypatch):
    out = tmp_path / "run"
    make_folder = checkpoint.make_folder
    with ExitStack() as winner:

        def late(folder):
            monkeypatch.setattr(checkpoint, "make_folder", make_folder)
            winner.enter_context(run_log.claim(out))
            make_folder(folder)

        monkeypatch.setattr(checkpoint, "make_folder", late)
        with pytest.raises(UserError, match="Another process"), run_log.claim(out):
            pass
        assert out.is_dir()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs locks")
def test_the_folder_that_is_locked_is_the_one_in_place(tmp_path, monkeypatch):
    """Not one that another run has removed just before."""
    out = tmp_path / "run"
    lock = run_log._lock

    def late(handle):
        monkeypatch.setattr(run_log, "_lock", lock)
        out.rmdir()
        return lock(handle)

    monkeypatch.setattr(run_log, "_lock", late)
    with run_log.claim(out):
        assert out.is_dir()
        with pytest.raises(UserError, match="Another process"), run_log.claim(out):
            pass


def test_a_folder_that_vanishes_while_it_is_made_is_made_again(tmp_path, monkeypatch):
    """As mkdir sees it, the folder is there at first, and then is no folder."""
    make, calls = checkpoint.make_folder, []

    def vanishing(folder):
        calls.append(folder)
        if len(calls) == 1:
            raise FileExistsError(17, "File exists")
        return make(folder)

    monkeypatch.setattr(checkpoint, "make_folder", vanishing)
    with run_log.claim(tmp_path / "run"):
        assert len(calls) == 2 and (tmp_path / "run").is_dir()


def claim_often(out, times):
    """Claim a folder often; exit code 1 if it vanished while it was claimed, 0 otherwise."""
    won = 0
    while won < times:
        try:
            with run_log.claim(out):
                won += 1
                (out / "file").write_text("")
                (out / "file").unlink()
        except UserError as error:
            if "Another process is training" not in str(error):
                os._exit(1)
        except OSError:
            os._exit(1)
    os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_simultaneous_starts_in_a_new_folder_never_break_each_other(tmp_path):
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            claim_often(tmp_path / "out" / "run", 200)
        children.append(child)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]

"""Rates and remaining times that are true: neither a first step nor a validation counts as pace."""

import csv
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_runs
from tiny_runs import run, tiny, train

from crate_mini.training import run_log

# Fixtures.
own_place = tiny_runs.own_place
text = tiny_runs.text


class Clock:
    """A clock that moves only when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(run_log, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def step(self, pace, seconds):
        with pace.step():
            self.now += seconds


def test_the_first_step_and_what_lies_between_steps_are_not_pace(monkeypatch):
    clock, pace = Clock(monkeypatch), run_log.Pace(window=3)
    clock.step(pace, 60)  # it compiles
    assert pace.step_seconds() is None
    for seconds in (2, 4):
        clock.now += 5  # a validation
        clock.step(pace, seconds)
    assert pace.step_seconds() == 3
    assert pace.remaining(30) == 30 * (3 + 10 / 3)
    for _ in range(3):
        clock.step(pace, 1)
    assert pace.step_seconds() == 1, "only the last steps count"


def test_a_slow_first_step_and_slow_validations_leave_the_log_true(
    text, tmp_path, monkeypatch, capsys
):
    """Steps of half a second after one of a minute, with validations of ten seconds."""
    clock = Clock(monkeypatch)
    one_step, validate = train.Trainer.one_step, train.Trainer.validate

    def timed_step(trainer):
        clock.now += 60 if trainer.step == 0 else 0.5
        return one_step(trainer)

    def timed_validation(trainer, limit=None):
        clock.now += 10
        return validate(trainer, limit)

    monkeypatch.setattr(train.Trainer, "one_step", timed_step)
    monkeypatch.setattr(train.Trainer, "validate", timed_validation)
    assert run(*tiny(text, tmp_path / "run", 9, eval_every=4)) == 0
    with open(Path(tmp_path, "run", "log.csv"), newline="") as file:
        rates = [row["tokens_per_s"] for row in csv.DictReader(file)]
    assert rates == ["", *8 * [str(4 * 16 * 2)]]
    lines = re.findall(r"step (\d)/9 .* 128 tokens/s .*ETA (\S+)", capsys.readouterr().out)
    shown = dict(lines)
    assert shown["3"] == "0:03", "six steps of half a second"
    assert shown["5"] == "0:10", "four steps, and ten seconds of validation in five steps so far"
    assert shown["9"] == "0:00"


@pytest.mark.parametrize("limit, lines", [(100, 0), (None, 2)])
def test_only_the_final_validation_shows_progress(
    limit, lines, text, tmp_path, monkeypatch, capsys
):
    s, config, _ = train.parse(tiny(text, tmp_path / "run", 3, micro_batch=2))
    trainer = train.Trainer(s, config)
    capsys.readouterr()
    monkeypatch.setattr(trainer.corpus, "n_tokens", {"train": 1000, "val": 50})
    progress = train.terminal.Progress
    monkeypatch.setattr(train.terminal, "Progress", lambda name, total: progress(name, total, 0))
    trainer.validate(limit)
    assert (
        re.findall(r"validate  (\d+)/49", capsys.readouterr().out)
        == ["32", "48", "49"][: 3 * lines]
    )

"""Training in float16, for GPUs without bf16: the loss is scaled, an overflow skips a step."""

import functools
import math

import pytest
import tiny_runs
import torch
from tiny_runs import facts, rows, run, tiny, train, weights

from crate_mini import UserError

# Fixtures.
own_place = tiny_runs.own_place
text = tiny_runs.text

SCALER = torch.amp.GradScaler


@pytest.fixture
def large_scale(monkeypatch):
    """A first scale so large that the gradients of some steps overflow."""
    scaler = functools.partial(SCALER, init_scale=2.0**24)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)


@pytest.fixture
def small_scale(monkeypatch):
    """A first scale at which no gradient of the tiny model overflows."""
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(SCALER, init_scale=2.0**8))


def trainer(text, out, train_steps, **settings):
    s, config, start = train.parse(tiny(text, out, train_steps, dtype="float16", **settings))
    return train.Trainer(s, config, **start)


def test_an_overflow_skips_its_step_tells_and_scales_less(text, tmp_path, large_scale, capsys):
    out = tmp_path / "run"
    assert run(*tiny(text, out, 20, dtype="float16")) == 0
    output = capsys.readouterr().out
    norms = [float(row["grad_norm"]) for row in rows(out)]
    n_skipped = sum(not math.isfinite(norm) for norm in norms)
    assert 1 <= n_skipped <= 12 and math.isfinite(norms[-1])
    for n in range(1, n_skipped + 1):
        skipped = f"note      step {n} skipped: a gradient was beyond float16's range; the loss is "
        assert f"{skipped}scaled by {2.0 ** (24 - n):g} now\n" in output
    assert f"; {n_skipped} steps skipped as not finite" in output
    assert facts(out)["settings"]["dtype"] == "float16"


def test_float16_learns_what_float32_learns(text, tmp_path, small_scale):
    for dtype in ("float16", "float32"):
        run(*tiny(text, tmp_path / dtype, 20, dtype=dtype, lr=0.01))
    half, single = (rows(tmp_path / dtype) for dtype in ("float16", "float32"))
    for a, b in zip(half, single, strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), abs=0.02)
        assert float(a["grad_norm"]) == pytest.approx(float(b["grad_norm"]), rel=0.05)


def test_gradients_are_unscaled_before_they_are_clipped(text, tmp_path, small_scale):
    """Clipping at 2 must see a norm below 2, not 256 times that, and leave the step as it was."""
    kept = []
    for clip in (2.0, 0.0):
        one = trainer(text, tmp_path / "run", 3, clip=clip)
        assert one.one_step()[1] < 2
        kept.append(one.lm.tokens.weight.detach())
    assert torch.equal(*kept)


def test_a_resume_continues_with_the_scale_it_had(text, tmp_path, large_scale):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(*tiny(text, whole, 12, dtype="float16"))
    first = trainer(text, cut, 12)
    first.log = train.run_log.Log(first)
    for _ in range(3):
        first.one_step()
    first.save("last")
    saved = torch.load(next((cut / "last").glob("resume*")), weights_only=True)
    assert saved["scaler"]["scale"] < 2.0**24
    assert run("--resume", str(cut)) == 0
    assert weights(cut) == weights(whole)


def test_a_resume_in_another_dtype_needs_no_scale(text, tmp_path):
    out = tmp_path / "run"
    run(*tiny(text, out, 3, dtype="float16"))
    assert run("--resume", str(out), "--train-steps", "5", "--dtype", "float32") == 0
    assert "scaler" not in torch.load(next((out / "last").glob("resume*")), weights_only=True)
    assert run("--resume", str(out), "--train-steps", "7", "--dtype", "float16") == 0


def test_a_gradient_that_no_scale_makes_finite_ends_the_run(text, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(SCALER, init_scale=4.0))
    unscale = SCALER._unscale_grads_

    def overflowing(scaler, optimizer, *rest):
        for group in optimizer.param_groups:
            for w in group["params"]:
                w.grad.fill_(math.inf)
        return unscale(scaler, optimizer, *rest)

    monkeypatch.setattr(SCALER, "_unscale_grads_", overflowing)
    one = trainer(text, tmp_path / "run", 9)
    with pytest.raises(UserError, match="gradient norm inf at step 3.*--on-nonfinite skip"):
        one.train()
    assert one.skipped == 2

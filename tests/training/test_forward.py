"""The one function that a run trains, tries and validates with, compiled or not; and its waits."""

import functools

import pytest
import tiny_runs
import torch
from tiny_runs import run, tiny, train
from torch.utils._python_dispatch import TorchDispatchMode

from crate_mini import UserError, ops
from crate_mini.training import device

# Fixtures.
own_place = tiny_runs.own_place
text = tiny_runs.text


@pytest.fixture
def compiler(monkeypatch):
    """A compiler that works and pays: its calls as (training, with gradient, rows)."""
    calls = []

    def compile(lm):
        def compiled(x, y):
            calls.append((lm.training, torch.is_grad_enabled(), len(x)))
            return lm(x, y)

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(device, "choose_compile", lambda *_: (True, "planted"))
    monkeypatch.setattr(device, "compile_loses", lambda seconds: None)
    return calls


def test_trial_training_and_validation_run_the_compiled_function(text, tmp_path, compiler):
    words = tiny(text, tmp_path / "run", 2, micro_batch=2, eval_every=0, eval_tokens=10**6)
    assert run(*words) == 0
    trial, training = 2 * [(True, True, 2)], 4 * [(True, True, 2)]
    assert compiler[:6] == trial + training
    validation = set(compiler[6:])
    assert validation == {(False, False, 2)}, "other shapes would compile again"
    assert len(compiler) - 6 == 2 * (1631 // 32), "both at the last step and at the end"


def test_what_is_compiled_exchanges_gradients(text, tmp_path, compiler, monkeypatch):
    """The compiler then splits the backward pass, so that they travel while it goes on."""
    compiled = []
    monkeypatch.setattr(train.Processes, "wrap", lambda self, lm: lambda x, y: lm(x, y))
    monkeypatch.setattr(torch, "compile", lambda forward: compiled.append(forward) or forward)
    s, config, _ = train.parse(tiny(text, tmp_path / "run", 2))
    trainer = train.Trainer(s, config)
    assert compiled == [trainer.forward] and trainer.forward is not trainer.lm


@pytest.mark.parametrize("error", [RuntimeError("no Python.h"), TypeError("a bug of the compiler")])
def test_a_compiler_that_fails_later_does_not_end_the_run(
    error, text, tmp_path, compiler, monkeypatch, capsys
):
    def broken(lm):
        def compiled(x, y):
            raise error

        return compiled

    monkeypatch.setattr(torch, "compile", broken)
    assert run(*tiny(text, tmp_path / "auto", 2)) == 0
    assert f"\nnote      eager after all: {error}\n" in capsys.readouterr().out
    with pytest.raises(UserError, match=rf"cannot compile here \({error}\); `--compile off`"):
        run(*tiny(text, tmp_path / "on", 2, compile="on"))


def test_too_little_memory_is_not_blamed_on_the_compiler(text, tmp_path, compiler, monkeypatch):
    def full(lm):
        def compiled(x, y):
            raise torch.OutOfMemoryError("CUDA out of memory")

        return compiled

    monkeypatch.setattr(torch, "compile", full)
    with pytest.raises(torch.OutOfMemoryError):
        run(*tiny(text, tmp_path / "run", 2))


def test_a_short_run_is_not_compiled(text, tmp_path, compiler, monkeypatch, capsys):
    monkeypatch.setattr(device, "compile_loses", lambda seconds: "it would take longer")
    assert run(*tiny(text, tmp_path / "run", 2)) == 0
    assert not compiler
    assert "\nnote      eager after all: it would take longer\n" in capsys.readouterr().out


class Reads(TorchDispatchMode):
    """Counts values that Python reads from tensors one by one: each makes it wait for a GPU."""

    n = 0

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        self.n += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(kwargs or {}))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_step_waits_for_its_device_once(dtype, text, tmp_path, monkeypatch):
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**8)  # no overflow
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    s, config, _ = train.parse(tiny(text, tmp_path / "run", 5, micro_batch=2, dtype=dtype))
    trainer = train.Trainer(s, config)
    lists, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: lists.append(len(t)) or tolist(t))
    for _ in range(3):
        lists.clear()
        with Reads() as reads:
            trainer.one_step()
        assert reads.n == 0 and lists == [3]


def test_the_next_batch_is_made_while_the_device_works(text, tmp_path, monkeypatch):
    s, config, _ = train.parse(tiny(text, tmp_path / "run", 3))
    trainer = train.Trainer(s, config)
    asked, batch = [], trainer.corpus.batch

    def recorded(seed, split, step, *rest):
        asked.append(step)
        return batch(seed, split, step, *rest)

    monkeypatch.setattr(trainer.corpus, "batch", recorded)
    for expected in ([0, 1], [0, 1, 2], [0, 1, 2]):
        trainer.one_step()
        assert asked == expected


def test_a_run_names_the_backend_of_its_own_device(text, tmp_path, monkeypatch, capsys):
    s, config, _ = train.parse(tiny(text, tmp_path / "run", 3))
    trainer = train.Trainer(s, config)
    monkeypatch.setattr(ops, "backend", lambda kind="": ("reference", f"plain PyTorch on {kind}"))
    trainer.device = torch.device("cuda")
    trainer.flops, trainer.peak = 1e6, None
    lines = train.run_log.introduction(trainer, "eager", "", "", "").splitlines()
    assert "backend   reference: plain PyTorch on cuda" in lines

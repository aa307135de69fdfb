"""python -m crate_mini.compare: differences and results of runs, from what they wrote."""

import contextlib
import io
import sys
from unittest import mock

import pytest
import tiny_runs
from figure_texts import clashes
from tiny_runs import facts, run, tiny

from crate_mini import UserError
from crate_mini.compare import __main__, command
from crate_mini.training import checkpoint

# Fixtures.
own_place = tiny_runs.own_place
text = tiny_runs.text


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two trained runs of two kinds of model and two learning rates."""
    folder = tmp_path_factory.mktemp("runs")
    source = folder / "text.txt"
    source.write_text("the code of a token\n" * 900)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRATE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.setattr("crate_mini.training.loss_curve.loss_curve", lambda log, *_: log)
        run(*tiny(str(source), folder / "a" / "run", 5))
        run(*tiny(str(source), folder / "b" / "run", 9, model="gpt2", lr=0.01))
    return folder


def compare(*words):
    output = io.StringIO()
    argv = ["compare", *map(str, words)]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(output):
        __main__.main()
    return output.getvalue()


def cells(output, name):
    """The cells of the row that begins with this name."""
    line = next(line for line in output.splitlines() if line.strip().startswith(f"{name} "))
    return line.strip().removeprefix(name).split()


def test_the_table_holds_what_differs_and_nothing_else(runs, tmp_path):
    output = compare(runs / "a/run", runs / "b/run", "--out", tmp_path / "c.png")
    assert cells(output, "setting") == ["a/run", "b/run"]
    assert cells(output, "model") == ["crate", "gpt2"]
    assert cells(output, "lr") == ["0.003", "0.01"]
    assert cells(output, "train_steps") == ["5", "9"] == cells(output, "step")
    assert cells(output, "attention") == ["mssa", "mhsa"]
    for name in ("out", "batch_size", "n_embd", "data"):
        assert f"\n{name} " not in output.replace(" " * 2, "")
    losses = [facts(runs / name / "run")["val_loss"] for name in "ab"]
    change = f"({losses[1] - losses[0]:+.4f})"
    assert cells(output, "validation loss") == [*(f"{loss:.4f}" for loss in losses), change]
    lms = [checkpoint.load(runs / name / "run" / "last")[0] for name in "ab"]
    assert cells(output, "parameters") == [f"{lm.n_params():,}" for lm in lms]
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert "different texts" not in output


def test_a_checkpoint_stands_for_its_run(runs, tmp_path):
    out = ("--out", tmp_path / "c.png")
    whole = compare(runs / "a/run", runs / "b/run", *out)
    part = compare(runs / "a/run/best", runs / "b/run/last", *out)
    assert part.replace("/best", "").replace("/last", "").split() == whole.split()


def test_other_texts_and_equal_settings_are_noted(runs):
    first = command.read_run(runs / "a/run", "a")
    other = command.read_run(runs / "a/run", "b")
    assert command.differences([first, other]) == [] and command.one_text([first, other])
    other.results["text"] = "another"
    assert not command.one_text([first, other])


def test_what_cannot_be_compared_is_refused(runs, tmp_path):
    for words, message in (
        ((), "needs two different runs or more"),
        ((runs / "a/run",), "needs two different runs or more"),
        ((runs / "a/run", runs / "a/../a/run"), "needs two different runs or more"),
        ((runs / "a/run", tmp_path), "holds no run; give the folder of one"),
        ((runs / "a/run", runs / "a"), "holds no run; give the folder of one"),
    ):
        with pytest.raises(UserError, match=message):
            compare(*words)


def test_names_that_are_no_formulas_and_no_text_are_drawn_as_they_are(runs, tmp_path):
    """In matplotlib a $ begins a formula, and bytes that are no text raise."""
    named = []
    for name in ("b$x_^$", "_a", "\udcff"):
        named.append(command.read_run(runs / "a/run", name))
    with mock.patch.object(command, "write", wraps=command.write) as write:
        command.draw(named, tmp_path / "c.png")
    _, validation = write.call_args.args[0].axes
    shown = [text.get_text().partition(" ")[2] for text in validation.texts]
    assert sorted(shown) == ["?", "_a", "b$x_^$"] and (tmp_path / "c.png").exists()
    assert not any(text.get_parse_math() for text in validation.texts)


def test_names_are_the_shortest_that_differ(tmp_path):
    assert command.names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert command.names([tmp_path / "a/run", tmp_path / "b/run"]) == ["a/run", "b/run"]


def test_runs_are_named_at_the_ends_of_their_curves(monkeypatch):
    monkeypatch.setattr(command, "write", lambda figure, target: figure)
    training = [(0.1 * i, 8 - 0.1 * i) for i in range(30)]
    runs = [
        command.Run("a", {}, {}, training, [(1.0, 6.0), (3.0, 4.4)]),
        command.Run("b_$x_$", {}, {}, training, [(1.0, 6.1), (2.0, 4.41)]),
        command.Run("c", {}, {}, training, []),
    ]
    figure = command.draw(runs, None)
    left, right = figure.axes
    texts = [text.get_text() for text in right.texts]
    assert texts == ["4.400 a", "4.410 b_$x_$", "c, not validated"]
    assert len(left.lines) == 3 and len(right.lines) == 2 and not clashes(figure)

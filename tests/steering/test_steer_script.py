"""steer.py: what it prints is what the model does; bad input is one sentence and exit code 2."""

import io
import re
import sys

import pytest
import steer_command
import torch
from steer_command import run_steer, steer_error
from tiny_checkpoints import H, T, save_checkpoint, write_scores

import steer
from crate_mini import UserError, intervene
from crate_mini.lab import Lab
from crate_mini.sae import autoencoder
from crate_mini.steering import prompt
from crate_mini.training import checkpoint

ONE = ("--layer", "1", "--neuron", "5", "--prompt", "1 2 3 4 5", "--tokens", "12")
TWO_TOKENS = ("--prompt", "code", "--tokens", "2")

# Fixtures.
cache = steer_command.cache
text = steer_command.text
ckpt = steer_command.ckpt


# ---- one prompt ----------------------------------------------------------------------------------


def test_tables_are_what_the_model_does(ckpt):
    output = run_steer(*ONE, "--value", "3abs", "--top", "4", ckpt=ckpt)
    lab = Lab(ckpt)
    ids = torch.tensor([lab.ids("1 2 3 4 5")])
    intervention = intervene.Intervention(1, 5, "set", 3.0)
    with torch.no_grad():
        before = lab.model(ids)[0, -1].softmax(-1)
        with intervene.steer(lab.model, [intervention]):
            after = lab.model(ids)[0, -1].softmax(-1)
    best = (after - before).argmax().item()
    first = output.split("raised")[1].splitlines()[1]
    assert first.split()[-4:-2] == [f"{before[best]:.2%}", f"{after[best]:.2%}"]
    assert f"“{lab.token(best)}”" in first
    assert "steering  set neuron 5 of layer 1 to 3\n" in output
    assert "direct:" in output
    assert f"fired     {9 + 11} times in 9 tokens of the prompt and 11 new ones" in output
    lowered = output.split("lowered")[1].split("change    ")[0].splitlines()[1:5]
    for line in lowered:
        *_, before, after, _, _ = line.split()
        assert float(after[:-1]) <= float(before[:-1])


def test_same_seed_same_text(ckpt):
    output = run_steer(*ONE, ckpt=ckpt)
    assert run_steer(*ONE, ckpt=ckpt) == output
    assert run_steer(*ONE, "--seed", "7", ckpt=ckpt) != output


def test_no_change_makes_no_difference(ckpt):
    output = run_steer(*ONE, "--op", "scale", "--value", "1", ckpt=ckpt)
    for line in output.split("-+-")[1].splitlines()[1:-2]:
        left, _, right = line.partition(" | ")
        assert left.rstrip() == right.rstrip()
    assert "KL 0 nats" in output and "+0.00%" not in output


def test_two_x_is_twice_the_observed_maximum(ckpt):
    output = run_steer(*ONE, "--value", "2", ckpt=ckpt)
    lab = Lab(ckpt)
    largest = 0.0
    with torch.no_grad():
        for x, _ in lab.held_out().blocks("val", 8, T):
            largest = max(largest, lab.model.trunk(x)[1][1][..., 5].max().item())
    assert f"to {2 * largest:.4g} = 2 x {largest:.3g}, its maximum in" in output
    absolute = run_steer(*ONE, "--value", f"{2 * largest!r}abs", ckpt=ckpt)
    assert output.split("raised")[1] == absolute.split("raised")[1]


def test_several_neurons_and_earlier_layers(ckpt):
    words = ("--layer", "0", "--neuron", "5, 9", "--prompt", "code", "--tokens", "3")
    output = run_steer(*words, "--value", "1", ckpt=ckpt)
    assert output.count("steering  ") == 2
    assert "direct:" not in output
    assert "weights alone predict it only in the last layer" in output
    assert re.search(r"fired +6, 6 times", output)
    words = ("--layer", "0", "--neuron", "9", "--op", "ablate", "--prompt", "a")
    assert "steering  ablate neuron 9 of layer 0\n" in run_steer(*words, ckpt=ckpt)


def test_labels_are_shown_and_found(text, tmp_path):
    ckpt = save_checkpoint(tmp_path / "best", text)
    write_scores(ckpt)
    output = run_steer("--neuron", 'label:"S"', *TWO_TOKENS, ckpt=ckpt)
    assert "set neuron 9 of layer 0 to 3 = 2 x 1.5, its maximum in interpret.py's record" in output
    assert "label     token: “s” 70 %, “z” 10 %" in output
    assert "2 neurons with 'S'" in output and "0:5" in output
    assert "neuron 11 of" in run_steer("--neuron", "label:suffix", *TWO_TOKENS, ckpt=ckpt)
    prompt = ("--prompt", "code")
    assert "no label of" in steer_error("--neuron", "label:comma", *prompt, ckpt=ckpt)
    assert "names no neuron" in steer_error("--neuron", 'label: ""', *prompt, ckpt=ckpt)
    words = ("--neuron", "label:s", "--layer", "1", *prompt)
    assert "no label of" in steer_error(*words, ckpt=ckpt)


def test_maxima_are_observed_on_a_text_that_is_given(text, tmp_path):
    ckpt = save_checkpoint(tmp_path / "best", text)
    write_scores(ckpt)
    words = ("--layer", "0", "--neuron", "9", "--prompt", "a", "--data", str(text))
    assert "held-out tokens" in run_steer(*words, ckpt=ckpt)


def test_labels_are_used_only_for_the_checkpoint_they_describe(text, tmp_path):
    ckpt = save_checkpoint(tmp_path / "best", text)
    write_scores(ckpt, sha256="another")
    output = run_steer("--layer", "0", "--neuron", "9", *TWO_TOKENS, ckpt=ckpt)
    assert "describes another checkpoint" in output
    assert "label " not in output and "held-out tokens" in output


def test_features_of_an_autoencoder_are_steered_by_the_same_flags(ckpt, tmp_path):
    lm, _ = checkpoint.load(ckpt)
    facts = autoencoder.save(tmp_path, autoencoder.SAE(H, 256, layer=0, k=8), lm, {})
    path = str(tmp_path / f"sae-L0-{facts['name']}.json")
    words = ("--neuron", "7", *TWO_TOKENS, "--sae", path, "--value")
    replaced = run_steer(*words, "3abs", ckpt=ckpt)
    assert "set feature 7 of layer 0 to 3\n" in replaced
    assert replaced != run_steer(*words, "3abs", "--keep-error", ckpt=ckpt)
    unchanged = (*words, "1", "--op", "scale")
    assert "KL 0 nats" in run_steer(*unchanged, "--keep-error", ckpt=ckpt)
    assert "KL 0 nats" not in run_steer(*unchanged, ckpt=ckpt)
    wrong_layer = steer_error(*words, "3abs", "--layer", "1", ckpt=ckpt)
    assert "is not the autoencoder's layer 0" in wrong_layer
    wrong_feature = steer_error(*words, "3abs", "--neuron", "256", ckpt=ckpt)
    assert "features are 0 to 255" in wrong_feature
    other = tmp_path / "other.json"
    other.write_text("[]")
    words = ("--neuron", "7", "--prompt", "code", "--sae", str(other))
    assert "no JSON object" in steer_error(*words, ckpt=ckpt)


# ---- interactive prompts -------------------------------------------------------------------------


def type_lines(monkeypatch, ckpt, *lines):
    """The output for lines typed at the prompt; KeyboardInterrupt stands for Ctrl-C."""
    remaining = iter(lines)

    def typed(prompt):
        line = next(remaining, EOFError())
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", typed)
    return run_steer("--tokens", "2", "--value", "1abs", ckpt=ckpt)


def test_prompts_are_asked_for_and_errors_do_not_end_it(ckpt, monkeypatch):
    lines = ["code", "", ":valu 3", ":value 4abs", ":tokens x", ":tokens 0", ":tokens 2"]
    lines += [":positions last", "rate"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    words = ("--layer", "0", "--neuron", "5", "--tokens", "3", "--value", "1abs")
    first, second = run_steer(*words, ckpt=ckpt).split("steering  ")[1:]
    assert "to 1\n" in first and "to 4\n" in second
    assert "error: the prompt is empty" in first and "did you mean value?" in first
    assert "'x' is not of type int" in first
    assert ":tokens 0 must lie in 1 to 999999" in first
    assert "fired     6 times" in first
    assert "fired     2 times" in second  # last: 1 of the prompt, 1 new
    assert "'sae' is not a setting here." in type_lines(monkeypatch, ckpt, ":sae x")


def test_ctrl_c_leaves_a_prompt_and_ctrl_d_the_conversation(ckpt, monkeypatch):
    lines = ["code", KeyboardInterrupt(), ":layer 0", ":neuron 5", "code"]
    output = type_lines(monkeypatch, ckpt, *lines)
    assert "error: :neuron '' names no neuron" in output and "(Ctrl-D ends)" in output
    assert output.count("steering  ") == 1

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prompt, "answer", interrupted)
    assert type_lines(monkeypatch, ckpt, "code").count("(Ctrl-D ends)") == 1


@pytest.mark.parametrize("columns", ["1", "4", "20"])
def test_a_narrow_terminal_still_shows_both_texts(ckpt, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    output = run_steer(*ONE, "--value", "3abs", ckpt=ckpt)
    assert "unsteered        | steered" in output


def test_bytes_that_are_no_text_do_not_end_the_conversation(ckpt, monkeypatch):
    output = type_lines(monkeypatch, ckpt, "co\udcffde", ":neuron 5", ":layer 0", "code")
    assert "error: the prompt holds bytes that are not UTF-8 text" in output
    assert output.count("steering  ") == 1


def test_a_switch_takes_no_other_word(ckpt, monkeypatch):
    assert "'maybe' is not of type bool" in type_lines(monkeypatch, ckpt, ":keep_error maybe")


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    [
        (("--layer", "2"), "layer 2 does not exist; layers are 0 to 1 here"),
        (("--layer", "-1"), "layer -1 does not exist"),
        (("--neuron", str(H)), f"neurons are 0 to {H - 1}"),
        (("--neuron", "-1"), "neuron -1 does not exist"),
        (("--neuron", ""), "names no neuron"),
        (("--neuron", "five"), "names no neuron"),
        (("--neuron", "3", "--layer", "0"), "never fired on"),
        (("--value", "nan"), "'nan' is not a value"),
        (("--value", "1e999"), "is not a value"),
        (("--value", "1e300abs"), "is not a finite number"),
        (("--value", "1e38abs"), "logits are not finite"),
        (("--top", "5000000"), "must lie in 1 to 999999"),
        (("--value", "2y"), "is not a value"),
        (("--temperature", "1e-45"), "are not finite"),
        (("--op", "turn"), "op 'turn' is unknown"),
        (("--op", "scale", "--value", "2abs"), "is not a value"),
        (("--positions", "first"), "--positions 'first' is unknown; choose all or last"),
        (("--prompt", ""), "--prompt '' is empty"),
        (("--prompt", "x" * 33), "33 tokens, the model reads 32"),
        (("--tokens", "0"), "--tokens 0 must lie in 1 to 999999"),
        (("--temperature", "-1"), "must lie in 0 to 999999"),
        (("--temperature", "nan"), "is not a finite number"),
        (("--seed", "-1"), "must lie in 0 to"),
        (("--device", "tpu"), "not available"),
        (("--sae", "none.json"), "cannot be read"),
        (("--nueron", "5"), "did you mean --neuron"),
        (("--layer", "one"), "invalid int value"),
    ],
)
def test_bad_input_is_answered_in_one_sentence(ckpt, words, message):
    assert message in steer_error(*ONE, *words, ckpt=ckpt)


def test_bad_checkpoints_are_answered_in_one_sentence(ckpt, tmp_path):
    assert "No checkpoint in" in steer_error(*ONE, ckpt=tmp_path / "none")
    torch.save({"other": torch.zeros(3)}, tmp_path / "other.pt")
    steer_error(*ONE, ckpt=tmp_path / "other.pt")


def test_a_neuron_needs_its_layer(ckpt):
    message = steer_error("--neuron", "5", "--prompt", "a", ckpt=ckpt)
    assert "--neuron needs --layer, e.g. --layer 0" in message


def test_a_misspelt_command_is_not_a_checkpoint(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["steer.py", "measuer", "out/run"])
    with pytest.raises(UserError, match="did you mean measure"):
        steer.main()


# ---- demo ----------------------------------------------------------------------------------------


def test_demo_draws_live_neurons_by_its_seed(ckpt):
    words = ("demo", "--n", "4", "--prompts", "code|rate")
    output = run_steer(*words, ckpt=ckpt)
    lines = output.strip().splitlines()
    assert lines[0] == "| layer:neuron | “code” | “rate” |"
    assert lines[2].startswith("| none |")
    assert len(lines) == 7
    assert run_steer(*words, ckpt=ckpt) == output
    assert run_steer(*words, "--seed", "2", ckpt=ckpt) != output
    all_neurons = ("demo", "--n", "999", "--layer", "0", "--prompts", "a")
    assert "| 0:3 |" not in run_steer(*all_neurons, ckpt=ckpt)
    assert "layer 7 does not exist" in steer_error("demo", "--layer", "7", ckpt=ckpt)

"""steer.py sweep, --each, --json and --head: what is shown is what the model does."""

import io
import json

import pytest
import steer_command
import torch
from steer_command import run_steer, steer_error
from tiny_checkpoints import save_checkpoint

from crate_mini import intervene
from crate_mini.lab import Lab

WORDS = ("--prompt", "code", "--tokens", "4")
P = 16  # coordinates of a head's u

# Fixtures.
cache = steer_command.cache
text = steer_command.text
ckpt = steer_command.ckpt


@torch.no_grad()
def next_probabilities(lab, *interventions):
    with intervene.steer(lab.model, interventions):
        return lab.model(torch.tensor([lab.ids("code")]))[0, -1].double().softmax(-1)


def printed_json(*words, ckpt):
    result = json.loads(run_steer(*words, "--json", ckpt=ckpt))
    assert result["command"].startswith("python steer.py") and result["machine"]["commit"]
    assert result["checkpoint"]["sha256"] and result["settings"]
    return result


# ---- sweep ---------------------------------------------------------------------------------------


def test_a_sweep_is_one_run_of_the_model_for_each_dose(ckpt):
    words = ("sweep", "--neuron", "1:5,0:9", "--doses", "4,1", *WORDS)
    result = printed_json(*words, ckpt=ckpt)
    lab = Lab(ckpt)
    assert [sweep["neuron"] for sweep in result["sweeps"]] == ["1:5", "0:9"]
    for sweep, (layer, neuron) in zip(result["sweeps"], ((1, 5), (0, 9))):
        unsteered, *rows = sweep["rows"]
        assert (unsteered["dose"], unsteered["kl"], unsteered["value"]) == (0, 0, None)
        assert [row["dose"] for row in rows] == [1, 4]
        before = next_probabilities(lab)
        for row in rows:
            value = row["dose"] * lab.known.maximum(layer, neuron)[0]
            assert row["value"] == pytest.approx(value)
            after = next_probabilities(lab, intervene.Intervention(layer, neuron, "set", value))
            kl = (before * (before / after).log()).sum().item()
            assert row["kl"] == pytest.approx(kl, abs=1e-6)
        best = (after - before).topk(3).indices.tolist()  # at the largest dose
        assert sweep["raised at the largest dose"] == [lab.token(id) for id in best]
        assert rows[-1]["probabilities"] == pytest.approx(after[best].tolist(), rel=1e-4)
        assert unsteered["probabilities"] == pytest.approx(before[best].tolist(), rel=1e-4)
        with lab.steer(layer, neuron, "4x"):
            greedy = lab.generate("code", 4, temperature=0)
        assert "code" + rows[-1]["continuation"] == greedy


def test_a_sweep_is_a_table_of_each_neuron(ckpt):
    output = run_steer("sweep", "--layer", "1", "--neuron", "5,9", "--doses", "1,4", ckpt=ckpt)
    tables = output.strip().split("\n\n")
    assert len(tables) == 3 and tables[2].startswith("KL: nats")
    for table, neuron in zip(tables, ("1:5", "1:9")):
        lines = table.splitlines()
        assert lines[0].startswith(f"| neuron {neuron} | value | KL | ")
        assert [line.split()[1] for line in lines[2:]] == ["unsteered", "1x", "4x"]
        assert len({line.count("|") for line in lines}) == 1


def test_a_sweep_refuses_what_it_cannot_do(ckpt):
    words = ("sweep", "--neuron", "1:5", *WORDS)
    assert "--doses '0' must lie above 0" in steer_error(*words, "--doses", "0", ckpt=ckpt)
    assert "--op 'ablate' is unknown" in steer_error(*words, "--op", "ablate", ckpt=ckpt)
    assert "--neuron needs --layer" in steer_error("sweep", "--neuron", "5", ckpt=ckpt)
    assert "neuron 3 of layer 0 never fired" in steer_error("sweep", "--neuron", "0:3", ckpt=ckpt)


# ---- several neurons, each alone -----------------------------------------------------------------


def test_each_steers_every_neuron_alone(ckpt):
    words = ("--neuron", "1:5,0:9", "--value", "9x", "--top", "3", *WORDS)
    output = run_steer(*words, "--each", ckpt=ckpt)
    result = printed_json(*words, "--each", ckpt=ckpt)
    together = printed_json(*words, ckpt=ckpt)
    assert len(result["runs"]) == 2 and len(together["runs"]) == 1
    lab = Lab(ckpt)
    for run, (layer, neuron) in zip(result["runs"], ((1, 5), (0, 9))):
        before = next_probabilities(lab)
        after = next_probabilities(lab, lab.intervention(layer, neuron, "9x"))
        assert [facts["neuron"] for facts in run["steered"]] == [neuron]
        rows = run["raised"]
        assert [row["id"] for row in rows] == (after - before).topk(3).indices.tolist()
        for row in rows:
            assert row["after"] == pytest.approx(after[row["id"]].item(), rel=1e-4)
        assert run["text"] == lab.generate("code", 4, steer={(layer, neuron): "9x"})
        assert run["fired"] == [4 + 3]
        assert f"{layer}:{neuron} {run['kl']:.3g}" in output
    assert result["unsteered"] == lab.generate("code", 4)
    head = next(line for line in output.splitlines() if line.startswith("unsteered "))
    assert [title.strip() for title in head.split(" | ")] == ["unsteered", "1:5", "0:9"]
    raised = output.split("raised")[1].split("lowered")[0].splitlines()
    assert raised[0].split() == ["token", "unsteered", "1:5", "0:9"] and len(raised) >= 4
    one = ("--layer", "1", "--neuron", "5", *WORDS)
    assert run_steer(*one, "--each", ckpt=ckpt) == run_steer(*one, ckpt=ckpt)


def test_json_needs_a_prompt_and_holds_nothing_else(ckpt, monkeypatch):
    message = steer_error("--layer", "0", "--neuron", "5", "--json", ckpt=ckpt)
    assert '--json needs a prompt, as in --prompt "1 2 3 4 5".' in message
    demo = printed_json("demo", "--n", "2", "--prompts", "code|rate", ckpt=ckpt)
    assert len(demo["rows"]) == 4 and len(demo["rows"][0]["raised"]) == 3
    assert demo["seed"] == 1337 and demo["rows"][1]["prompt"] == "rate"


# ---- subspaces -----------------------------------------------------------------------------------


def test_a_head_is_steered_by_the_coordinates_of_its_u(ckpt):
    words = ("--layer", "1", "--head", "1", *WORDS)
    result = printed_json(*words, "--neuron", "3", "--value", "2x", ckpt=ckpt)
    lab = Lab(ckpt)
    seen = []
    with torch.no_grad(), intervene.hook_codes(lab.model, 1, seen.append, subspace=True):
        for x, _ in lab.held_out().blocks("val", 8, 32):
            lab.model.trunk(x)
    largest = max(u[..., P + 3].max().item() for u in seen)
    (facts,) = result["runs"][0]["steered"]
    assert (facts["neuron"], facts["subspace"]) == (P + 3, True)
    assert facts["value"] == pytest.approx(2 * largest, rel=1e-5)
    whole = printed_json(*words, "--neuron", "all", "--op", "ablate", ckpt=ckpt)
    steered = [facts["neuron"] for facts in whole["runs"][0]["steered"]]
    assert steered == list(range(P, 2 * P))
    output = run_steer(*words, "--neuron", "3", ckpt=ckpt)
    assert f"steering  set coordinate {P + 3} of layer 1 to" in output
    sweep = printed_json("sweep", "--head", "0", "--neuron", "1:3", "--doses", "1", ckpt=ckpt)
    assert sweep["sweeps"][0]["neuron"] == "u 1:3"


@pytest.mark.parametrize(
    "words, message",
    [
        (("--head", "2", "--neuron", "1"), "head 2 does not exist; heads are 0 to 1"),
        (
            ("--head", "0", "--neuron", "16"),
            "coordinate 16 does not exist; coordinates are 0 to 15",
        ),
        (("--head", "-1", "--neuron", "1"), "head -1 does not exist"),
        (("--head", "0", "--neuron", "label:s"), "names no neuron"),
        (("--neuron", "all"), "names no neuron"),
        (("--neuron", "2:"), "names no neuron"),
        (("--neuron", "5:1"), "layer 5 does not exist"),
    ],
)
def test_what_names_no_coordinate_is_refused(ckpt, words, message):
    assert message in steer_error("--layer", "1", *words, *WORDS, ckpt=ckpt)


def test_the_twin_has_no_subspaces(text, tmp_path):
    ckpt = save_checkpoint(tmp_path / "best", text, "gpt2")
    words = ("--layer", "1", "--head", "0", "--neuron", "1", *WORDS)
    assert "steers the u of attention mssa" in steer_error(*words, ckpt=ckpt)


def test_at_the_prompt_neurons_and_heads_can_be_changed(ckpt, monkeypatch):
    typed = ":neuron 1:5,0:9\n:each yes\ncode\n:head 0\n:neuron 2\n:layer 1\ncode\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    output = run_steer("--tokens", "2", ckpt=ckpt)
    assert "from the unsteered distribution: 1:5 " in output
    assert "steering  set coordinate 2 of layer 1" in output

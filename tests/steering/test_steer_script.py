"""steer.py: what it prints and writes is what the model does; bad input is one sentence and exit code 2."""

import io
import json
import math
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_generate import tiny

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import steer  # noqa: E402
from crate_mini import UserError, cli, model
from crate_mini.data import batches as data
from crate_mini.intervene import Intervention  # noqa: E402
from crate_mini.intervene import steer as steering  # noqa: E402
from crate_mini.lab import Desk  # noqa: E402
from crate_mini.neurons import protocols as score
from crate_mini.sae import autoencoder as sae
from crate_mini.steering import dose_response as dose
from crate_mini.training import checkpoint  # noqa: E402

T, H = 32, 128


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRATE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    draw, words = (
        random.Random(0),
        ["code", "rate", "step", "sparse", "token", "signal", "head", "prompt"],
    )
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(" ".join(draw.choices(words, k=8)) + ".\n" for _ in range(700)))
    return path


@pytest.fixture(scope="module")
def ckpt(request, cache, text, tmp_path_factory):
    return make(tmp_path_factory.mktemp("run") / "best", text)


def make(folder, text, kind="crate"):
    """A checkpoint with random weights; neuron 3 of layer 0 is dead."""
    torch.manual_seed(0)
    lm = model.LM(model.preset("2L", kind, vocab_size=320, block_size=T, n_embd=32, n_head=2))
    with torch.no_grad():
        lm.tokens.weight *= 8
        s = lm.blocks[0].sparsifier
        (s.D[:, 3] if kind != "gpt2" else s.fc.weight[3]).zero_()
    tokenizer = data.load_tokenizer("bytes")
    corpus = data.open_corpus(str(text), tokenizer, log=lambda *_: None)
    checkpoint.save(
        folder,
        lm,
        tokenizer={"spec": "bytes", "hash": tokenizer.hash},
        training={
            "step": 0,
            "val_loss": 5.0,
            "settings": {"data": str(text), "val_fraction": 0.1},
            "corpus": corpus.meta,
        },
    )
    return folder


@pytest.fixture
def run(ckpt, monkeypatch, capsys):
    """Run steer.py with words, CKPT put in where it belongs; returns what it prints."""

    def go(*words, ckpt=ckpt, code=None):
        command = words[:1] if words[0] in ("demo", "measure") else ()
        monkeypatch.setattr(sys, "argv", ["steer.py", *command, str(ckpt), *words[len(command) :]])
        if code is None:
            steer.main()
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as e:
            cli.run(steer.main)
        told = capsys.readouterr().err
        assert e.value.code == code and told.startswith("error: ") and told.count("\n") == 1, told
        return told

    return go


ONE = ("--layer", "1", "--neuron", "5", "--prompt", "1 2 3 4 5", "--tokens", "12")


def test_tables_are_what_the_model_does(run, ckpt):
    told, desk = run(*ONE, "--value", "3abs", "--top", "4"), Desk(ckpt)
    ids = torch.tensor([desk.ids("1 2 3 4 5")])
    steered = steer.Intervention(1, 5, "set", 3.0)
    with torch.no_grad():
        before = desk.model(ids)[0, -1].softmax(-1)
        with steer.steer(desk.model, [steered]):
            after = desk.model(ids)[0, -1].softmax(-1)
    best = (after - before).argmax().item()
    first = told.split("raised")[1].splitlines()[1]
    assert first.split()[-4:-2] == [f"{before[best]:.2%}", f"{after[best]:.2%}"]
    assert desk.quoted(best) in first
    assert "turned    set neuron 5 of layer 1 to 3\n" in told and "direct:" in told
    assert f"fired     {9 + 11} times in 9 tokens of the prompt and 11 new ones" in told
    lowered = told.split("lowered")[1].split("read-out")[0].splitlines()[1:5]
    assert all(float(line.split()[-3][:-1]) <= float(line.split()[-4][:-1]) for line in lowered)


def test_same_seed_same_text_and_no_change_no_difference(run):
    assert run(*ONE) == run(*ONE) != run(*ONE, "--seed", "7")
    told = run(*ONE, "--op", "scale", "--value", "1")
    for line in told.split("-+-")[1].splitlines()[1:-2]:
        left, _, right = line.partition(" | ")
        assert left.rstrip() == right.rstrip()
    assert "KL 0 nats" in told and "+0.00%" not in told


def test_two_x_is_twice_the_observed_maximum(run, ckpt):
    told, desk = run(*ONE, "--value", "2"), Desk(ckpt)
    top = 0.0
    with torch.no_grad():
        for x, _ in desk.held_out().blocks("val", 8, T):
            top = max(top, desk.model.trunk(x)[1][1][..., 5].max().item())
    assert f"to {2 * top:.4g} = 2 x {top:.3g}, its maximum in" in told
    absolute = run(*ONE, "--value", f"{2 * top!r}abs")
    assert told.split("raised")[1] == absolute.split("raised")[1]


def test_several_neurons_and_earlier_layers(run):
    told = run(
        "--layer", "0", "--neuron", "5, 9", "--prompt", "code", "--tokens", "3", "--value", "1"
    )
    assert told.count("turned ") == 2
    assert "direct:" not in told and "weights alone tell only in the last layer" in told
    assert re.search(r"fired +6, 6 times", told)
    told = run("--layer", "0", "--neuron", "9", "--op", "ablate", "--prompt", "a")
    assert "turned    ablate neuron 9 of layer 0\n" in told


def known(ckpt, sha256=None):
    """What interpret.py leaves beside a checkpoint, as far as steer.py reads it."""
    folder = ckpt.parent / "interpret"
    folder.mkdir(exist_ok=True)
    rows = []
    for j, c, share, kind in (
        (5, "s", 0.3, "token"),
        (9, "s", 0.7, "token"),
        (11, ".", 0.5, "suffix"),
    ):
        label = {"tokens": [[ord(c), 1.0, 9, share], [ord("z"), 0.1, 2, 0.1]], "class": kind}
        rows.append(
            {"site": "L0", "layer": 0, "neuron": j, "status": "live", "max": 1.5, "label": label}
        )
    score.write_rows(folder / "scores.jsonl", rows)
    sha256 = sha256 or checkpoint.load(ckpt)[1]["sha256"]
    (folder / "record.json").write_text(json.dumps({"checkpoint": {"sha256": sha256}}))


def test_labels_are_shown_found_and_trusted_only_for_this_checkpoint(run, text, tmp_path):
    ckpt = make(tmp_path / "best", text)
    known(ckpt)
    told = run("--neuron", 'label:"S"', "--prompt", "code", "--tokens", "2", ckpt=ckpt)
    assert "set neuron 9 of layer 0 to 3 = 2 x 1.5, its maximum in interpret.py's record" in told
    assert (
        "label     token: “s” 70 %, “z” 10 %" in told
        and "2 neurons with 'S'" in told
        and "0:5" in told
    )
    assert "neuron 11 of" in run(
        "--neuron", "label:suffix", "--prompt", "code", "--tokens", "2", ckpt=ckpt
    )
    assert "no label of" in run("--neuron", "label:comma", "--prompt", "code", ckpt=ckpt, code=2)
    assert "names no neuron" in run("--neuron", 'label: ""', "--prompt", "code", ckpt=ckpt, code=2)
    assert "no label of" in run(
        "--neuron", "label:s", "--layer", "1", "--prompt", "code", ckpt=ckpt, code=2
    )
    other = ("--data", str(text))  # text given is text used
    assert "held-out tokens" in run(
        "--layer", "0", "--neuron", "9", "--prompt", "a", *other, ckpt=ckpt
    )
    known(ckpt, "another")
    told = run("--layer", "0", "--neuron", "9", "--prompt", "code", "--tokens", "2", ckpt=ckpt)
    assert (
        "describes another checkpoint" in told
        and "label " not in told
        and "held-out tokens" in told
    )


def test_prompts_are_asked_for_and_errors_do_not_end_it(run, monkeypatch):
    monkeypatch.setattr(
        sys,
        "stdin",
        io.StringIO(
            "code\n\n:valu 3\n:value 4abs\n:tokens x\n:tokens 0\n:tokens 2\n:positions last\nrate\n"
        ),
    )
    told = run("--layer", "0", "--neuron", "5", "--tokens", "3", "--value", "1abs")
    first, second = told.split("turned    ")[1:]
    assert "to 1\n" in first and "to 4\n" in second
    assert "error: the prompt is empty" in first and "did you mean value?" in first
    assert "'x' is no int" in first and ":tokens 0 is out of range" in first
    assert (
        "fired     6 times" in first and "fired     2 times" in second
    )  # last: 1 of the prompt, 1 new
    assert "'sae' is no setting here." in run_lines(run, monkeypatch, ":sae x")


def run_lines(run, monkeypatch, *lines):
    """What is printed for lines typed at the prompt; KeyboardInterrupt for Ctrl-C."""
    left = iter(lines)

    def typed(prompt):
        line = next(left, EOFError())
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", typed)
    return run("--tokens", "2", "--value", "1abs")


def test_ctrl_c_leaves_a_prompt_and_ctrl_d_the_conversation(run, monkeypatch):
    told = run_lines(run, monkeypatch, "code", KeyboardInterrupt(), ":layer 0", ":neuron 5", "code")
    assert "error: :neuron '' names no neuron" in told and "(Ctrl-D ends)" in told
    assert told.count("turned    ") == 1

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(steer, "show", stopped)
    assert run_lines(run, monkeypatch, "code").count("(Ctrl-D ends)") == 1


def test_sae_features_through_the_same_door(run, ckpt, tmp_path):
    lm, _ = checkpoint.load(ckpt)
    facts = sae.save(tmp_path, sae.SAE(H, 256, layer=0, k=8), lm, {})
    path = str(tmp_path / f"sae-L0-{facts['name']}.json")
    words = ("--neuron", "7", "--prompt", "code", "--tokens", "2", "--sae", path, "--value", "3abs")
    replaced, added = run(*words), run(*words, "--keep-error")
    assert "set feature 7 of layer 0 to 3\n" in replaced and replaced != added
    assert "KL 0 nats" in run(*words[:-1], "1", "--op", "scale", "--keep-error")
    assert "KL 0 nats" not in run(*words[:-1], "1", "--op", "scale")
    assert "is not the autoencoder's layer 0" in run(*words, "--layer", "1", code=2)
    assert "features are 0 to 255" in run(*words, "--neuron", "256", code=2)
    other = tmp_path / "other.json"
    other.write_text("[]")
    assert "no JSON object" in run(*words[:-2], "--sae", str(other), code=2)


@pytest.mark.parametrize(
    "words, told",
    [
        (("--layer", "2"), "layer 2 does not exist; layers are 0 to 1 here"),
        (("--neuron", str(H)), f"neurons are 0 to {H - 1}"),
        (("--neuron", "-1"), "neuron -1 does not exist"),
        (("--neuron", ""), "names no neuron"),
        (("--neuron", "five"), "names no neuron"),
        (("--neuron", "3", "--layer", "0"), "never fired on"),
        (("--value", "nan"), "'nan' is no value"),
        (("--value", "1e999"), "is no value"),
        (("--value", "1e300abs"), "no finite number"),
        (("--value", "1e38abs"), "logits are not finite"),
        (("--top", "5000000"), "give 1 to 999999"),
        (("--value", "2y"), "is no value"),
        (("--temperature", "1e-45"), "are not finite"),
        (("--op", "turn"), "op 'turn' is unknown"),
        (("--op", "scale", "--value", "2abs"), "is no value"),
        (("--positions", "first"), "positions must be"),
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt", "x" * 33), "33 tokens, the model reads 32"),
        (("--tokens", "0"), "--tokens 0 is out of range"),
        (("--temperature", "-1"), "out of range"),
        (("--temperature", "nan"), "out of range"),
        (("--seed", "-1"), "out of range"),
        (("--device", "tpu"), "not available"),
        (("--sae", "none.json"), "cannot be read"),
        (("--nueron", "5"), "did you mean --neuron"),
        (("--layer", "one"), "invalid int value"),
    ],
)
def test_bad_input_is_answered_in_one_sentence(run, words, told):
    assert told in run(*ONE, *words, code=2)


def test_bad_checkpoints_are_answered_in_one_sentence(run, tmp_path):
    assert "No checkpoint in" in run(*ONE, ckpt=tmp_path / "none", code=2)
    torch.save({"other": torch.zeros(3)}, tmp_path / "other.pt")
    run(*ONE, ckpt=tmp_path / "other.pt", code=2)
    assert "it takes a layer" in run("--neuron", "5", "--prompt", "a", code=2)


def test_a_misspelt_command_is_no_checkpoint(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["steer.py", "measuer", "out/run"])
    with pytest.raises(UserError, match="did you mean measure"):
        steer.main()


def test_demo_draws_live_neurons_by_its_seed(run):
    words = ("demo", "--n", "4", "--prompts", "code|rate")
    told = run(*words)
    lines = told.strip().splitlines()
    assert lines[0] == "| layer:neuron | “code” | “rate” |" and lines[2].startswith("| none |")
    assert len(lines) == 7 and told == run(*words) != run(*words, "--seed", "2")
    assert "| 0:3 |" not in run("demo", "--n", "999", "--layer", "0", "--prompts", "a")
    assert "layer 7 does not exist" in run("demo", "--layer", "7", code=2)


# ---- measure ---------------------------------------------------------------------------------------------

SMALL = ("--neurons", "2", "--doses", "1,4", "--tokens", "64")


def result(folder):
    return json.loads((folder / "steering.json").read_text())


@pytest.mark.parametrize("kind", model.KINDS)
def test_measure_has_controls_and_inserting_a_neuron_costs_nothing(
    run, cache, text, tmp_path, kind
):
    ckpt = make(tmp_path / "best", text, kind)
    lm, _ = checkpoint.load(ckpt)
    facts = sae.save(tmp_path, sae.SAE(H, 256, layer=1, k=8), lm, {})
    known(ckpt)
    told = run("measure", *SMALL, "--sae", str(tmp_path / f"sae-L1-{facts['name']}"), ckpt=ckpt)
    assert f"`python interpret.py report {ckpt}` shows it" in told
    found = result(tmp_path / "interpret")
    for row in found["inserted"]:
        costs = row["kind"] == "feature"
        assert (row["kl"] > 0) == costs and (row["loss"] != 0) == costs
    assert {(r["layer"], r["kind"]) for r in found["inserted"]} == {
        (0, "neuron"),
        (1, "neuron"),
        (1, "feature"),
        (1, "feature+error"),
    }
    assert (
        len(found["rows"]) == 2 * 2 * 2 * 2 + 2 * 2 * 2
    )  # layers, neurons, kinds, doses; features
    for kinds in found["summary"].values():
        for metrics in kinds["doses"].values():
            for m in metrics.values():
                assert m["ci95"][0] <= m["mean"] <= m["ci95"][1]
    assert found["command"].startswith("python steer.py measure") and found["seed"] == 1337
    assert found["machine"]["commit"] and found["checkpoint"]["sha256"]
    assert 3 not in found["live"][0]["drawn"] and found["live"][0]["live"] < H  # the dead one
    assert (tmp_path / "interpret" / "steering.png").read_bytes().startswith(b"\x89PNG")
    assert "| 0 | neuron | 0 | +0 |" in told and "feature+error | 1x" in told
    last = [r for r in found["attribution"] if r["layer"] == 1]
    assert len(found["attribution"]) == 4 and all(r["correlation"] > 0.8 for r in last)
    assert all(
        r["null"] < r["correlation"] for r in last
    )  # another neuron's attribution tells less


def test_measure_is_the_same_for_the_same_seed_and_joins_others(run, ckpt, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run("measure", *SMALL, "--seed", seed, "--out", str(tmp_path / name))
    a, b, c = (result(tmp_path / name)["rows"] for name in "abc")
    assert a == b != c
    run(
        "measure",
        *SMALL,
        "--out",
        str(tmp_path / "d"),
        "--beside",
        str(tmp_path / "c" / "steering.json"),
    )
    sizes = [(tmp_path / name / "steering.png").stat().st_size for name in "ad"]
    assert sizes[1] > sizes[0]


@pytest.mark.parametrize(
    "words, told",
    [
        (("--doses", "0,1"), "are no doses"),
        (("--doses", "x"), "are no doses"),
        (("--doses", "nan"), "are no doses"),
        (("--doses", "1,nan"), "are no doses"),
        (("--doses", "1e19"), "are no doses"),
        (("--tokens", "90000"), "lower --tokens"),
        (("--neurons", "0"), "out of range"),
        (
            ("--beside", "none.json"),
            "directory; expected what `python steer.py measure CKPT` writes",
        ),
        (("--sae", "none"), "directory; expected what `python interpret.py sae CKPT` writes"),
    ],
)
def test_bad_measures_are_answered_in_one_sentence(run, tmp_path, words, told):
    assert told in run("measure", *SMALL, "--out", str(tmp_path), *words, code=2)


def test_what_cannot_be_drawn_or_written_is_said_before_the_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(dose, "measure", lambda *_, **__: pytest.fail("it worked before it looked"))
    (tmp_path / "other.json").write_text('{"runs": []}')
    assert "is no steering.json" in run("measure", "--beside", str(tmp_path / "other.json"), code=2)
    assert "File exists" in run("measure", "--out", str(tmp_path / "other.json"), code=2)


def test_windows_share_no_token_and_say_when_there_are_too_few(ckpt):
    corpus = Desk(ckpt).held_out()
    there = [
        row for x, _ in corpus.blocks("val", 256, 16) if x.shape[1] == 16 for row in x.tolist()
    ]
    parts = [x.tolist() for x, _ in dose.windows(corpus, 16, 20, seed=0)]
    assert [len(part) for part in parts[:2]] == [20, 20] and sorted(sum(parts, [])) == sorted(there)
    with pytest.raises(UserError, match="lower --tokens"):
        dose.windows(corpus, 16, 10**5, seed=0)


def test_followers_are_what_follows(ckpt):
    """A planted neuron that fires on 'o' is followed by 'd' and 'k' where 'o' is; not by what is frequent."""
    lm = tiny("crate")
    x = torch.tensor([[1, 2, 5, 9, 5, 7], [5, 9, 1, 2, 1, 2]])
    y = torch.tensor([[2, 5, 9, 5, 7, 1], [9, 1, 2, 1, 2, 1]])
    plant = lm.blocks[0].sparsifier.code.register_forward_hook(
        lambda m, args, a: torch.cat(((x == 5)[..., None].float(), a[..., 1:]), -1)
    )
    assert dose.followers(lm, 0, None, [0], [(x, y)], 2).tolist() in ([[9, 7]], [[7, 9]])
    top, share = dose.observed(lm, 0, None, [x])
    assert top[0] == 1 and share[0] == 0.25
    plant.remove()


def test_what_a_turn_does_is_judged_on_text_that_chose_nothing():
    """KL(unsteered || steered), loss and log-probabilities by hand; continuations from other windows."""
    lm, g = tiny("crate"), torch.Generator().manual_seed(0)
    with torch.no_grad():
        lm.tokens.weight.mul_(8)
    V = lm.config.vocab_size
    (cx, cy), (mx, my) = ([torch.randint(V, (2, 6), generator=g) for _ in "xy"] for _ in "cm")
    turn, judge = Intervention(0, 5, "add", 4.0), dose.Judge(lm, (cx, cy), (mx, my), 20)

    def log_p(idx, *turns):
        with torch.no_grad(), steering(lm, turns):
            return lm(idx).flatten(0, 1).log_softmax(-1)

    p, q = log_p(mx), log_p(mx, turn)
    found = judge.response(turn, {"some": torch.tensor([2, 7])})
    assert found["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)
    assert found["kl"] != pytest.approx((q.exp() * (q - p)).sum(-1).mean().item(), rel=1e-2)
    assert found["loss"] == pytest.approx((p - q)[range(12), my.flatten()].mean().item(), rel=1e-4)
    assert found["some"] == pytest.approx((q - p)[:, [2, 7]].mean().item(), rel=1e-4)
    by_text = [
        (log_p(x, turn).exp().mean(0) - log_p(x).exp().mean(0)).topk(20).indices for x in (cx, mx)
    ]
    assert judge.continuations(turn).tolist() == by_text[0].tolist() != by_text[1].tolist()


def test_the_first_kind_names_the_continuations_of_all():
    class Fake:
        def continuations(self, turned):
            assert turned.value == dose.CHOOSE * 0.5
            return torch.tensor([turned.neuron])

        def response(self, turned, tokens):
            return {name: (turned.value, ids.tolist()) for name, ids in tokens.items()}

    kinds = {"neuron": Intervention(0, 7), "random": Intervention(0, 9)}
    rows = dose.responses(Fake(), kinds, 0.5, [1.0, 4.0], torch.tensor([3]))
    assert [(r["kind"], r["effect"], r["own"], r["seen"]) for r in rows] == [
        (k, (v, [7]), (v, [j]), (v, [3]))
        for k, j in (("neuron", 7), ("random", 9))
        for v in (0.5, 2.0)
    ]


def test_features_of_two_autoencoders_are_two_though_they_share_a_number():
    kinds = "feature", "feature+error"
    rows = [
        {
            "layer": 0,
            "sae": name,
            "neuron": 5,
            "kind": kind,
            "dose": d,
            "kl": d / 10,
            "effect": v * d,
            "own": v * d,
            "seen": 0.0,
            "loss": 0.0,
        }
        for name, v in (("a", 1.0), ("b", 3.0))
        for kind in kinds
        for d in (0.5, 2)
    ]
    found = dose.summary(rows, 0)["feature"]["at_kl"]["own"]
    assert found["n"] == 2 and dose.contrasts(rows, 0)["feature - feature+error"]["own"]["n"] == 2
    alone = [
        dose.at_kl([r for r in rows if (r["sae"], r["kind"]) == (name, kinds[0])], "own")
        for name in "ab"
    ]
    assert found["mean"] == pytest.approx(sum(alone) / 2)


@given(
    st.lists(
        st.tuples(st.floats(1e-6, 2), st.floats(-3, 3)),
        min_size=1,
        max_size=6,
        unique_by=lambda t: t[0],
    )
)
def test_effects_at_equal_side_effect(points):
    rows = [{"kl": kl, "effect": value} for kl, value in points]
    found, sides = dose.at_kl(rows, "effect"), [kl for kl, _ in points]
    if not min(sides) <= dose.AT_KL <= max(sides):
        assert found is None
    else:
        assert min(v for _, v in points) - 1e-9 <= found <= max(v for _, v in points) + 1e-9
    exact = dose.at_kl(
        [*({"kl": 2 * dose.AT_KL * f, "effect": math.log(f)} for f in (0.25, 1.0))], "effect"
    )
    assert exact == pytest.approx(math.log(0.5))


def test_intervals_hold_the_mean_as_often_as_they_say():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        low, high = dose.interval(rng.normal(1.0, 2.0, 40), rng)["ci95"]
        hits += low <= 1.0 <= high
    assert 0.88 <= hits / 200 <= 0.99
    assert dose.interval([None, None], rng) == {"n": 0, "mean": None, "ci95": None}

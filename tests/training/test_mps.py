"""Commands that read or train a model, all but concepts and llm, on a device without float64."""

import shlex
import sys

import pytest
import torch
from fake_mps import MPS, OnMps, fake_mps
from forked import ROOT
from tiny_checkpoints import save_checkpoint, write_text

import crate_mini
from crate_mini.concepts import kmeans
from crate_mini.training import device

sys.path.insert(0, str(ROOT))
import interpret  # noqa: E402
import steer  # noqa: E402
import train  # noqa: E402

SCRIPTS = {"interpret.py": interpret, "steer.py": steer, "train.py": train}
SMALL = (
    "--tokenizer bytes --preset 1L --n-embd 32 --n-head 2 --block-size 32 --batch-size 4 "
    "--warmup 1 --train-steps 3 --eval-tokens 512 --log-sparsity"
)
COMMANDS = [
    "interpret.py layers CKPT --tokens 512",
    "interpret.py neurons CKPT --tokens 2000",
    "interpret.py text CKPT --text hello",
    "interpret.py sae CKPT --layer 0 --steps 5",
    "steer.py CKPT --layer 1 --neuron 4 --value 4x --prompt code",
    "steer.py demo CKPT",
    "steer.py sweep CKPT --neuron 1:4",
    "steer.py measure CKPT --neurons 2 --tokens 256",
    f"train.py --data TEXT --out RUN {SMALL}",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """{word of a command: path}: a text, a checkpoint, a folder for a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRATE_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = tmp_path_factory.mktemp("mps")
        text = write_text(folder / "text.txt")
        yield {
            "TEXT": text,
            "CKPT": save_checkpoint(folder / "best", text, context=64),
            "RUN": folder / "run",
        }


def call(monkeypatch, place, command):
    words = shlex.split(command)
    words = [str(place.get(word, word)) for word in words]
    monkeypatch.setattr(sys, "argv", words)
    return SCRIPTS[words[0]].main()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command.split()[:2]))
def test_a_command_needs_no_float64_of_the_device(place, command, monkeypatch, capsys):
    with fake_mps():
        assert not call(monkeypatch, place, f"{command} --device mps")
    assert capsys.readouterr().out


def test_the_numbers_are_those_of_the_cpu(place):
    text = "the code of a token and the rate of a step"
    ours = crate_mini.load(place["CKPT"])
    expected = ours.loss(text), ours.codes(text)
    with fake_mps():
        theirs = crate_mini.load(place["CKPT"], device="mps")
        assert theirs.model.tokens.weight.device == MPS
        assert theirs.loss(text) == pytest.approx(expected[0], rel=1e-5)
        assert theirs.generate("code", n=3) is not None
    index, centres = torch.tensor([0, 1, 1]), torch.eye(3)
    with fake_mps():
        on_device = kmeans.usage(index.to("mps"), centres.to("mps"))
    assert on_device == kmeans.usage(index, centres)


def test_auto_leaves_mps_and_says_why(place, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    call(monkeypatch, place, f"train.py --data TEXT --out RUN --overwrite {SMALL}")
    output = capsys.readouterr().out
    assert "note      MPS is there, but none of this has run on it" in output
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    call(monkeypatch, place, f"train.py --data TEXT --out RUN --overwrite {SMALL}")
    assert "MPS" not in capsys.readouterr().out
    assert device.choose_compile(MPS) == (False, "it is not tried on mps")


def test_the_fake_refuses_what_mps_refuses():
    with fake_mps():
        x = torch.ones(2, device="mps")
        assert type(x * 2) is OnMps and (x * 2).device == MPS and not x.is_cpu
        for function in (
            torch.Tensor.double,
            lambda x: x.to(torch.float64),
            lambda x: x.sum(dtype=torch.float64),
        ):
            with pytest.raises(TypeError, match="float64"):
                function(x)
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(2, device="mps", dtype=torch.float64)
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        assert x.cpu().double().numpy().tolist() == [1, 1]
        assert torch.nn.Linear(2, 2).to("mps").weight.device == MPS
    with pytest.raises(crate_mini.UserError, match="--device 'mps' is not available here"):
        device.choose_device("mps")

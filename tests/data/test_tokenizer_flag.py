"""--tokenizer holds for every command that opens a checkpoint, and for what these commands do."""

import importlib
import shlex
from dataclasses import fields

import pytest
import torch

import interpret
import steer
from crate_mini.console import terminal
from crate_mini.model import LM, preset
from crate_mini.training.import_weights import export_foreign

WITHOUT_CHECKPOINT = {"selftest"}
MODULES = {**interpret.COMMANDS, **steer.COMMANDS, "prompt": steer.PROMPT}
MODULES["classify"] = "crate_mini.concepts.finetune"


@pytest.mark.parametrize("name", sorted(MODULES.keys() - WITHOUT_CHECKPOINT))
def test_the_command_has_the_flag(name):
    command = importlib.import_module(MODULES[name]).COMMAND
    assert "tokenizer" in {f.name for f in fields(command.settings)}


def test_weights_that_name_no_tokenizer_go_through_the_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CRATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    model = LM(preset("1L", n_embd=16, n_head=2, vocab_size=300, block_size=64))
    torch.save({"model": export_foreign(model), "model_args": {"n_head": 2}}, "crate.pt")
    words = [f"word {i * i % 97} of a text" for i in range(6000)]
    (tmp_path / "text.txt").write_text("\n".join(words))
    flags = f"crate.pt --tokenizer bytes --data {tmp_path / 'text.txt'}"
    lines = [
        ("neurons", f"{flags} --n 4 --controls none --tokens 20000 --device cpu --out i"),
        ("report", "crate.pt --tokenizer bytes --out i"),
        ("layers", f"{flags} --tokens 256 --lasso-tokens 64 --device cpu --out i"),
        ("prompt", f"{flags} --layer 0 --neuron 3 --value 1abs --prompt abc --tokens 3"),
    ]
    for name, line in lines:
        command = importlib.import_module(MODULES[name]).COMMAND
        terminal.run_command(name, command, shlex.split(line))
    assert "fired" in capsys.readouterr().out

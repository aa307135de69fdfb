"""The trainer's settings: from flags, files and checkpoints; bad input is one sentence and exit code 2."""

import json
import os
import re
from dataclasses import asdict, fields

import pytest
import tiny_runs as training
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import ROOT, TINY, run, script, train

from crate_mini import UserError, cli
from crate_mini.data import batches as data
from crate_mini.training import device as machine
from crate_mini.training.settings import OF_KIND, Settings, twin

clean_machine, text = training.clean_machine, training.text  # fixtures


def test_settings_come_from_file_and_flags_win(text, tmp_path):
    config = tmp_path / "c.json"
    config.write_text(
        json.dumps({"lr": 0.5, "n_layer": 2, "model": "gpt2", "preset": "1L", "seed": 7})
    )
    s, c, _ = train.parse(
        [
            "--config",
            str(config),
            "--lr",
            "0.25",
            "--tokenizer",
            "bytes",
            "--n_layer",
            "4",
            "--out",
            str(tmp_path / "x"),
        ]
    )
    assert (s.lr, s.seed, s.model, c.n_layer, c.attention, c.vocab_size) == (
        0.25,
        7,
        "gpt2",
        4,
        "mhsa",
        320,
    )


def test_init_starts_from_given_weights(text, tmp_path):
    run(*TINY, "--data", text, "--train-steps", "1", "--out", str(tmp_path / "a"))
    again = ["--init", str(tmp_path / "a" / "last"), "--data", text, "--out", str(tmp_path / "b")]
    s, config, start = train.parse([*again, "--tokenizer", "bytes"])
    lm = train.Run(s, config, **start).lm
    assert config.n_embd == 16 and set(start) == {"weights", "meta"}
    assert all(torch.equal(w, start["weights"][name]) for name, w in lm.state_dict().items())
    with pytest.raises(UserError, match="n-embd 32 differs from the 16"):
        train.parse([*again, "--n-embd", "32"])
    with pytest.raises(UserError, match="--tokenizer bytes"):
        s, config, start = train.parse([*again, "--tokenizer", "pydocs:256"])
        train.Run(s, config, **start)


def test_foreign_weights_bring_their_tokenizer(tmp_path):
    from crate_mini.training import foreign_weights as foreign

    lm = train.model.LM(train.model.preset("1L", "crate", vocab_size=50304, block_size=8))
    torch.save(
        {"model": foreign.export_foreign(lm), "model_args": {"n_head": 4}}, tmp_path / "theirs.pt"
    )
    s, config, start = train.parse(["--init", str(tmp_path / "theirs.pt")])
    assert (s.tokenizer, config.vocab_size) == ("gpt2", 50304)
    with pytest.raises(UserError, match="--tokenizer gpt2"):
        train.checkpoint.check_tokenizer(start["meta"], data.load_tokenizer("pydocs"))


BAD = {  # flags -> what the one sentence must name
    "no such flag": (["--leraning-rate", "1"], "--leraning-rate"),
    "mistyped flag": (["--trian-steps", "1"], "did you mean --train-steps"),
    "not a number": (["--lr", "fast"], "--lr"),
    "negative": (["--lr", "-1"], "--lr"),
    "nan": (["--lr", "nan"], "--lr"),
    "huge": (["--batch-size", "99999999999"], "--batch-size"),
    "no steps": (["--train-steps", "0"], "--train-steps"),
    "nothing held out": (["--val-fraction", "0"], "--val-fraction"),
    "layers without end": (["--n-layer", "999999999"], "--n-layer 999999999 is out"),
    "more memory than there is": (["--expansion", "2000000000"], "GiB"),
    "zero byte": (["--out", "a\0b"], "zero byte"),
    "endless name": (["--init", "x" * 5000], "xxx"),
    "unknown model": (["--model", "bert"], "--model 'bert' is unknown; choose one of crate, gpt2"),
    "unknown preset": (["--preset", "XL"], "--preset 'XL' is unknown; choose one of 1L"),
    "heads": (["--n-head", "3"], "--n-head 3 does not divide --n-embd 16; try --n-head 2."),
    "no heads": (["--n-head", "0"], "--n-head 0 must be at least 1; try 4."),
    "no corpus": (["--data", "nowhere.txt"], "nowhere.txt"),
    "no tokenizer": (["--tokenizer", "nowhere.tiktoken"], "nowhere.tiktoken"),
    "no GPU": (["--device", "cuda:9"], "--device cpu"),
    "no device": (["--device", "abacus"], "--device"),
    "dtype": (["--dtype", "int8"], "bfloat16"),
    "resume nothing": (["--resume", "nowhere"], "nowhere"),
    "config nothing": (["--config", "nowhere.json"], "nowhere.json"),
    "config of other text": (["--config", str(ROOT / "LICENSE")], 'settings like {"lr": 0.001}.'),
    "context": (["--block-size", "999999"], "lower --block-size"),
    "vocabulary": (["--vocab-size", "10"], "ids"),
    "below the tokenizer": (["--vocab-size", "10"], "below the 257 ids of --tokenizer bytes"),
    "on nonfinite": (["--on-nonfinite", "pray"], "stop or skip"),
    "no learning": (["--lr", "0"], "--lr 0.0 learns nothing"),
    "floor above the peak": (["--lr", "0.1", "--min-lr", "0.2"], "--min-lr 0.2"),
    "empty out": (["--out", ""], "--out '' is empty"),
    "empty data": (["--data", ""], "--data '' is empty"),
    "empty tokenizer": (["--tokenizer", ""], "--tokenizer '' is empty"),
    "empty init": (["--init", ""], "--init '' is empty"),
    "empty resume": (["--resume", ""], "is empty"),
    "empty config": (["--config", ""], "is empty"),
    "out is a file": (["--out", "/dev/null"], "Nothing can be written to /dev/null"),
    "below a file": (["--out", "/dev/null/run"], "Nothing can be written to /dev/null/run"),
    "query of MHSA": (
        ["--model", "gpt2", "--query-rank", "4"],
        "--query-rank 4 does nothing beside",
    ),
    "ISTA of MLP": (
        ["--sparsifier", "mlp", "--ista-steps", "4"],
        "--ista-steps 4 does nothing beside",
    ),
    "step of MLP": (
        ["--model", "gpt2", "--eta", "0.2"],
        "--eta 0.2 does nothing beside --sparsifier mlp",
    ),
    "switch of MLP": (["--model", "gpt2", "--unit-norm"], "--unit-norm does nothing"),
    "MLP of ISTA": (
        ["--activation", "gelu"],
        "--activation gelu does nothing beside --sparsifier ista",
    ),
    "init nothing": (["--init", "nowhere.pt"], "nowhere.pt"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_in_one_sentence(name, text, tmp_path, capsys):
    flags, word = BAD[name]
    base = [*TINY, "--data", text, "--out", str(tmp_path / "run"), "--train-steps", "1"]
    with pytest.raises(SystemExit) as exit:
        cli.run(lambda: run(*base, *flags))
    error = capsys.readouterr().err
    assert (
        exit.value.code == 2
        and error.count("\n") == 1
        and error.startswith("error: ")
        and word in error
    )
    assert not re.search(r"[.,;:!?][.,;:]|None", error)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("out", ["file", "file/run", "locked/run"])
def test_a_bad_out_is_told_before_data_are_prepared(out, text, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "locked").mkdir(mode=0o500)
    if out.startswith("locked") and os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("this user may write anywhere")
    monkeypatch.setattr(data, "open_corpus", lambda *a, **k: pytest.fail("data were prepared"))
    with pytest.raises(UserError, match="Nothing can be written to .*another --out"):
        run(*TINY, "--data", text, "--out", str(tmp_path / out))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_near_miss_is_pointed_out(text, tmp_path, monkeypatch):
    out = tmp_path / "out" / "crate-3L"
    run(*TINY, "--data", text, "--train-steps", "1", "--out", str(out))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").symlink_to(out)
    with pytest.raises(UserError, match="No checkpoint in a .did you mean a/last[?]"):
        train.parse(["--init", "a"])
    for flag, path in (
        ("--init", out),
        ("--init", tmp_path / "out" / "crat-3L"),
        ("--init", out / "lats"),
        ("--resume", tmp_path / "out" / "crat-3L"),
    ):
        with pytest.raises(UserError, match=f"No checkpoint in {path}.*did you mean {out}/last[?]"):
            train.parse([flag, str(path)])
    with pytest.raises(UserError, match="such as out/crate-3L/last"):
        train.parse(["--resume", str(tmp_path / "else" / "where" / "far" / "off")])
    s, _, start = train.parse(["--resume", str(out / "last"), "--train-steps", "2"])
    assert s.out == str(out) and start["state"]["step"] == 1


@pytest.mark.parametrize(
    "flags",
    [
        [],
        [
            "--model",
            "gpt2",
            "--lr",
            "0.01",
            "--no-bias",
            "--activation",
            "gelu",
            "--block-size",
            "32",
        ],
        [
            "--model",
            "crate+",
            "--query-rank",
            "8",
            "--lam",
            "0.2",
            "--seed",
            "5",
            "--tokenizer",
            "pydocs:511",
        ],
        [
            "--preset",
            "S",
            "--val-fraction",
            "0.2",
            "--vocab-size",
            "5000",
            "--log-sparsity",
            "--out",
            "a/b c",
        ],
    ],
)
def test_the_twin_differs_in_its_kind_alone(flags):
    s, config, _ = train.parse(flags)
    found = twin(s, config, data.load_tokenizer(s.tokenizer).vocab_size)
    other, shape, _ = train.parse(found)
    assert {s.model, other.model} in ({"crate", "gpt2"}, {"crate+", "gpt2"})
    assert {**asdict(s), "model": "", "out": ""} == {**asdict(other), "model": "", "out": ""}
    assert other.out != s.out and (s.out == "a/b c") == (other.out == "a/b c-gpt2")
    for f in fields(shape):
        if f.name not in {*OF_KIND, "lam", "activation"}:
            assert getattr(shape, f.name) == getattr(config, f.name), f.name
    usual = train.model.preset("3L", other.model)
    assert all(getattr(shape, name) == getattr(usual, name) for name in OF_KIND)


def test_a_batch_that_cannot_fit_is_refused(monkeypatch):
    config = train.model.preset("3L", "crate")
    monkeypatch.setattr(machine, "total_memory", lambda device: 2**30)
    machine.check_memory(config, 8, torch.device("cpu"), torch.float32)
    with pytest.raises(UserError, match="for activations.*lower --micro-batch"):
        machine.check_memory(config, 1000, torch.device("cpu"), torch.float32)


def test_a_run_is_not_overwritten_by_chance(text, tmp_path):
    flags = [*TINY, "--data", text, "--out", str(tmp_path / "run"), "--train-steps", "1"]
    run(*flags)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="--overwrite"):
        run(*flags)
    with pytest.raises(UserError, match="n-layer 2 differs from the 1"):
        run("--resume", str(tmp_path / "run"), "--n-layer", "2", "--train-steps", "5")
    with pytest.raises(UserError, match="--train-steps 2"):
        run("--resume", str(tmp_path / "run"))
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert run(*flags, "--overwrite") == 0


def test_the_script_itself_exits_with_2_and_no_traceback():
    done = script("--trian-steps", "3")
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_help_explains_every_flag():
    parser_help = script("--help", COLUMNS="100").stdout
    for f in [*Settings.__dataclass_fields__, *train.model.Config.__dataclass_fields__]:
        assert "--" + f.replace("_", "-") in parser_help
    assert "None" not in parser_help
    words = " ".join(parser_help.split())
    for said in (
        "(default lr / 10)",
        "(default 256 for 1L 2L 3L, 1024 for S B)",
        "(default out/MODEL",
        "(default the tokenizer's ids,",
        "(default as --preset says)",
        "(default as --model says)",
    ):
        assert said in words, said
    notes = {**cli.comments(Settings), **cli.comments(train.model.Config)}
    assert all(len(notes[f]) > 0 for f in Settings.__dataclass_fields__)


FLAGS = sorted(
    "--" + f.replace("_", "-")
    for f in [*Settings.__dataclass_fields__, *train.model.Config.__dataclass_fields__]
)
VALUES = st.sampled_from(
    ["", "0", "1", "-1", "nan", "inf", "1e999", "x", "1L", "gpt2", "ista", "true", "9" * 30, "é\0"]
)
STRANGE = ["--", "-x", "--resume", "--config", "--init", "--lrr", "--="]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([*FLAGS, *STRANGE]), VALUES), max_size=4))
def test_fuzzed_command_lines_are_parsed_or_refused(pairs):
    """Never anything but a UserError; a parsed line has a model that can be built."""
    try:
        s, config, _ = train.parse([word for pair in pairs for word in pair])
    except UserError as e:
        assert str(e).strip()
    else:
        assert isinstance(s, Settings)
        if config.n_layer < 50:
            try:
                with torch.device("meta"):
                    train.model.LM(config)
            except RuntimeError as e:
                assert re.search(cli.NO_MEMORY, str(e))


def test_errors_that_are_not_of_memory_keep_their_traceback():
    with pytest.raises(RuntimeError, match="illegal memory access"):
        cli.run(lambda: (_ for _ in ()).throw(RuntimeError("CUDA error: an illegal memory access")))


def test_an_empty_memory_error_is_a_sentence_too(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.run(lambda: (_ for _ in ()).throw(MemoryError()))
    assert capsys.readouterr().err.startswith(
        "error: not enough memory (MemoryError); take less at a time"
    )


@pytest.mark.parametrize(
    "lines, why",
    [
        (
            ["CppCompileError: C++ compile error", "a.h:4: fatal error: no omp.h"],
            "a.h:4: fatal error: no omp.h",
        ),
        (
            ["backend='inductor' raised:", "UnicodeDecodeError: no ascii"],
            "UnicodeDecodeError: no ascii",
        ),
        (
            ["InvalidCxxCompiler: none found", "Set TORCHDYNAMO_VERBOSE=1"],
            "InvalidCxxCompiler: none found",
        ),
    ],
)
def test_the_reason_is_picked_from_what_the_compiler_said(lines, why, capsys):
    failure = type("InductorError", (type("BackendCompilerFailed", (RuntimeError,), {}),), {})
    with pytest.raises(SystemExit, match="2"):
        cli.run(lambda: (_ for _ in ()).throw(failure("\n".join(lines))))
    assert f"torch.compile cannot compile here ({why}); `--compile off`" in capsys.readouterr().err


def test_a_machine_that_torch_compile_cannot_use_is_told(text, tmp_path):
    """--compile on without a C++ compiler: one sentence, not PyTorch's hundred lines."""
    done = script(
        *TINY,
        "--data",
        text,
        "--train-steps",
        "2",
        "--device",
        "cpu",
        "--compile",
        "on",
        "--out",
        str(tmp_path / "run"),
        CXX="no-such-compiler",
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "new"),
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        "error: torch.compile cannot compile here" in done.stderr
        and "no-such-compiler" in done.stderr
    )
    assert "`--compile off` trains without it" in done.stderr

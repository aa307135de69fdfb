"""Settings from flags, files and checkpoints; bad input gives one sentence and exit code 2."""

import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import asdict, fields
from pathlib import Path

import planted_reviews
import pytest
import tiny_runs
import torch
from forked import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import run, script, tiny, train

from crate_mini import UserError, cli
from crate_mini.concepts import finetune
from crate_mini.console import terminal
from crate_mini.data import batches
from crate_mini.data.tokenizer import load_tokenizer
from crate_mini.training.import_weights import export_foreign
from crate_mini.training.settings import KIND_FIELDS, Settings, split_task, twin

# Fixtures.
own_place = tiny_runs.own_place
text = tiny_runs.text

NAMES = [f.name for f in (*fields(Settings), *fields(train.model.Config))]
FLAGS = [cli.flag_name(name) for name in NAMES]


# ---- where settings come from --------------------------------------------------------------------


def test_settings_come_from_a_file_and_flags_win(tmp_path):
    config = tmp_path / "c.json"
    content = {"lr": 0.5, "n_layer": 2, "model": "gpt2", "preset": "1L", "seed": 7}
    config.write_text(json.dumps(content))
    words = f"--config {config} --lr 0.25 --tokenizer bytes --n_layer 4 --out {tmp_path}/x"
    s, c, _ = train.parse(words.split())
    assert (s.lr, s.seed, s.model) == (0.25, 7, "gpt2")
    assert (c.n_layer, c.attention, c.vocab_size) == (4, "mhsa", 320)


def test_init_starts_from_given_weights(text, tmp_path):
    run(*tiny(text, tmp_path / "a", 1))
    again = ["--init", str(tmp_path / "a" / "last"), "--data", text, "--out", str(tmp_path / "b")]
    s, config, start = train.parse([*again, "--tokenizer", "bytes"])
    lm = train.Trainer(s, config, **start).lm
    assert config.n_embd == 16 and set(start) == {"weights", "meta"}
    for name, w in lm.state_dict().items():
        assert torch.equal(w, start["weights"][name])
    with pytest.raises(UserError, match="n-embd 32 differs from the 16"):
        train.parse([*again, "--n-embd", "32"])
    s, config, start = train.parse([*again, "--tokenizer", "pydocs:256"])
    with pytest.raises(UserError, match="--tokenizer bytes"):
        train.Trainer(s, config, **start)


def test_import_weights_bring_their_tokenizer(tmp_path):
    lm = train.model.LM(train.model.preset("1L", "crate", vocab_size=50304, block_size=8))
    path = tmp_path / "theirs.pt"
    torch.save({"model": export_foreign(lm), "model_args": {"n_head": 4}}, path)
    s, config, start = train.parse(["--init", str(path)])
    assert (s.tokenizer, config.vocab_size) == ("gpt2", 50304)
    with pytest.raises(UserError, match="--tokenizer gpt2"):
        train.checkpoint.check_tokenizer(start["meta"], load_tokenizer("pydocs"))


def test_the_task_is_read_from_the_command_line():
    words = ["--lr", "1", "--task", "classify", "--out", "x"]
    assert split_task(words) == ("classify", ["--lr", "1", "--out", "x"])
    assert split_task(["--task=lm"]) == ("lm", [])
    assert split_task(["--seed", "1"]) == ("lm", ["--seed", "1"])
    for words in (["--task", "sing"], ["--task"]):
        with pytest.raises(UserError, match="choose lm"):
            split_task(words)


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--model gpt2 --lr 0.01 --no-bias --activation gelu --block-size 32",
        "--model crate+ --query-rank 8 --lam 0.2 --seed 5 --tokenizer pydocs:511",
        "--preset S --val-fraction 0.2 --vocab-size 5000 --log-sparsity --out 'a/b c'",
    ],
)
def test_the_twin_differs_in_its_kind_alone(words):
    s, config, _ = train.parse(shlex.split(words))
    flags = twin(s, config, load_tokenizer(s.tokenizer).vocab_size)
    other, shape, _ = train.parse(flags)
    assert {s.model, other.model} in ({"crate", "gpt2"}, {"crate+", "gpt2"})
    assert {**asdict(s), "model": "", "out": ""} == {**asdict(other), "model": "", "out": ""}
    assert other.out != s.out and (s.out == "a/b c") == (other.out == "a/b c-gpt2")
    for f in fields(shape):
        if f.name not in {*KIND_FIELDS, "lam", "activation"}:
            assert getattr(shape, f.name) == getattr(config, f.name), f.name
    usual = train.model.preset("3L", other.model)
    assert all(getattr(shape, name) == getattr(usual, name) for name in KIND_FIELDS)


# ---- bad input -----------------------------------------------------------------------------------

BAD = {  # flags -> what the one sentence must name
    "no such flag": (["--leraning-rate", "1"], "--leraning-rate"),
    "mistyped flag": (["--trian-steps", "1"], "did you mean --train-steps"),
    "not a number": (["--lr", "fast"], "--lr"),
    "negative": (["--lr", "-1"], "--lr"),
    "nan": (["--lr", "nan"], "--lr"),
    "huge": (["--batch-size", "99999999999"], "--batch-size"),
    "no steps": (["--train-steps", "0"], "--train-steps 0 must lie in 1 to"),
    "nothing held out": (["--val-fraction", "0"], "--val-fraction 0.0 must be above 0"),
    "all held out": (["--val-fraction", "1"], "--val-fraction 1.0 must be above 0 and below 1"),
    "layers without end": (["--n-layer", "999999999"], "--n-layer 999999999 must lie in 1 to 999"),
    "more memory than there is": (["--expansion", "2000000000"], "GiB"),
    "zero byte": (["--out", "a\0b"], "zero byte"),
    "endless name": (["--init", "x" * 5000], "xxx"),
    "unknown model": (["--model", "bert"], "--model 'bert' is unknown; choose crate, gpt2 or"),
    "unknown preset": (["--preset", "XL"], "--preset 'XL' is unknown"),
    "heads": (["--n-head", "3"], "--n-head 3 does not divide --n-embd 16; try --n-head 2."),
    "no heads": (["--n-head", "0"], "--n-head 0 must lie in 1 to 2147483647; leave it out."),
    "no corpus": (["--data", "nowhere.txt"], "nowhere.txt"),
    "no tokenizer": (["--tokenizer", "nowhere.tiktoken"], "nowhere.tiktoken"),
    "no GPU": (["--device", "cuda:9"], "--device cpu"),
    "no device": (["--device", "abacus"], "--device"),
    "dtype": (["--dtype", "int8"], "--dtype 'int8' is unknown; choose auto, bfloat16, float16"),
    "resume nothing": (["--resume", "nowhere"], "nowhere"),
    "config nothing": (["--config", "nowhere.json"], "nowhere.json"),
    "config of other text": (["--config", str(ROOT / "LICENSE")], 'settings like {"lr": 0.001}.'),
    "context": (["--block-size", "999999"], "lower --block-size"),
    "vocabulary": (["--vocab-size", "10"], "ids"),
    "below the tokenizer": (["--vocab-size", "10"], "below the 257 ids of --tokenizer bytes"),
    "on nonfinite": (["--on-nonfinite", "pray"], "stop or skip"),
    "no learning": (["--lr", "0"], "--lr 0.0 must be above 0"),
    "floor above the peak": (["--lr", "0.1", "--min-lr", "0.2"], "--min-lr 0.2"),
    "empty out": (["--out", ""], "--out '' is empty"),
    "empty data": (["--data", ""], "--data '' is empty"),
    "empty tokenizer": (["--tokenizer", ""], "--tokenizer '' is empty"),
    "empty init": (["--init", ""], "--init '' is empty"),
    "empty resume": (["--resume", ""], "is empty"),
    "empty config": (["--config", ""], "is empty"),
    "out is a file": (["--out", "/dev/null"], "Nothing can be written to /dev/null"),
    "below a file": (["--out", "/dev/null/run"], "Nothing can be written to /dev/null/run"),
    "query of MHSA": (["--model", "gpt2", "--query-rank", "4"], "--query-rank 4 has no effect"),
    "ISTA of MLP": (["--sparsifier", "mlp", "--ista-steps", "4"], "--ista-steps 4 has no effect"),
    "step of MLP": (
        ["--model", "gpt2", "--eta", "0.2"],
        "--eta 0.2 has no effect with --sparsifier mlp",
    ),
    "anneal of no top-k": (["--top-k-anneal", "0.3"], "--top-k-anneal 0.3 has no effect"),
    "debias of MLP": (["--model", "gpt2", "--debias"], "--debias has no effect"),
    "top-k of all": (["--top-k", "600"], "--top-k 600 exceeds the 64 codes"),
    "switch of MLP": (["--model", "gpt2", "--unit-norm"], "--unit-norm has no effect"),
    "MLP of ISTA": (
        ["--activation", "gelu"],
        "--activation gelu has no effect with --sparsifier ista",
    ),
    "init nothing": (["--init", "nowhere.pt"], "nowhere.pt"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gives_one_sentence(name, text, tmp_path, capsys):
    words, part = BAD[name]
    with pytest.raises(SystemExit) as exit:
        terminal.run(lambda: run(*tiny(text, tmp_path / "run", 1), *words))
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert error.count("\n") == 1 and error.startswith("error: ") and part in error
    assert not re.search(r"[.,;:!?][.,;:]|None", error)
    assert not (tmp_path / "run").exists()


def test_no_default_but_this_commands_own_is_advised():
    for words in ("--n-head 0", "--vocab-size 0", "--block-size 0", "--attention mhs"):
        with pytest.raises(UserError, match=r"; leave it out\.$"):
            train.parse(words.split())


@pytest.mark.parametrize("out", ["file", "file/run", "locked/run"])
def test_a_bad_out_is_refused_before_data_are_prepared(out, text, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "locked").mkdir(mode=0o500)
    if out.startswith("locked") and os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("this user may write anywhere")
    monkeypatch.setattr(batches, "open_corpus", lambda *a, **k: pytest.fail("data were prepared"))
    with pytest.raises(UserError, match="Nothing can be written to .*another --out"):
        run(*tiny(text, tmp_path / out, 1))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_run_is_never_written_into_a_checkpoint(text, tmp_path, overwrite):
    run(*tiny(text, tmp_path / "a", 1))
    best = tmp_path / "a" / "best"
    before = {path.name: path.read_bytes() for path in best.iterdir()}
    with pytest.raises(UserError, match="--out .*best is a checkpoint, .*; choose a folder for"):
        run(*tiny(text, best, 1), *overwrite)
    assert before == {path.name: path.read_bytes() for path in best.iterdir()}


def test_a_near_miss_is_pointed_out(text, tmp_path, monkeypatch):
    out = tmp_path / "out" / "crate-3L"
    run(*tiny(text, out, 1))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").symlink_to(out)
    with pytest.raises(UserError, match="No checkpoint in a .did you mean a/last[?]"):
        train.parse(["--init", "a"])
    mistyped = tmp_path / "out" / "crat-3L"
    for flag, path in (
        ("--init", out),
        ("--init", mistyped),
        ("--init", out / "lats"),
        ("--resume", mistyped),
    ):
        with pytest.raises(UserError, match=f"No checkpoint in {path}.*did you mean {out}/last[?]"):
            train.parse([flag, str(path)])
    with pytest.raises(UserError, match="such as out/crate-3L/last"):
        train.parse(["--resume", str(tmp_path / "else" / "where" / "far" / "off")])
    s, _, start = train.parse(["--resume", str(out / "last"), "--train-steps", "2"])
    assert s.out == str(out) and start["state"]["step"] == 1


def test_a_run_is_not_overwritten_by_accident(text, tmp_path):
    out = tmp_path / "run"
    words = tiny(text, out, 1)
    run(*words)

    def files():
        return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    before = files()
    with pytest.raises(UserError, match="--overwrite"):
        run(*words)
    with pytest.raises(UserError, match="n-layer 2 differs from the 1"):
        run("--resume", str(out), "--n-layer", "2", "--train-steps", "5")
    with pytest.raises(UserError, match="--train-steps 2"):
        run("--resume", str(out))
    assert before == files()
    assert run(*words, "--overwrite") == 0


def test_what_is_wrong_with_a_command_line_comes_before_what_is_in_its_folder(text, tmp_path):
    out = tmp_path / "run"
    words = tiny(text, out, 1)
    run(*words)
    for flags, part in (
        (["--device", "abacus"], "--device"),
        (["--block-size", "999999", "--n-embd", "99998"], "GiB"),
        (["--init", "nowhere"], "nowhere"),
        (["--lr", "-1"], "--lr"),
        ([], "--overwrite"),
    ):
        with pytest.raises(UserError, match=part):
            run(*words, *flags)


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
@pytest.mark.parametrize("name", ["-x", "a b", "it's", "caf\udce9", "\x1b[31m", "new\nline"])
def test_what_is_printed_to_run_next_can_be_typed(name, text, tmp_path, monkeypatch, capfdbinary):
    monkeypatch.chdir(tmp_path)
    copy = Path(name + ".txt")
    try:
        copy.write_bytes(Path(text).read_bytes())
    except (OSError, UnicodeError):
        pytest.skip("the file system takes no such name")
    words = tiny(copy.name, "-out", 1)
    terminal.prepare_streams()
    assert run(*words) == 0
    output = os.fsdecode(capfdbinary.readouterr().out)
    commands = output.partition("\nnext      ")[2].splitlines()
    assert [command.split()[:2] for command in commands] == [["python", "train.py"]] * 2
    lines = [f"printf '%s\\0' {command.strip()}; printf '\\1'" for command in commands]
    done = subprocess.run(["bash", "-c", "\n".join(lines)], stdout=subprocess.PIPE, check=True)
    for line in done.stdout.split(b"\1")[:-1]:
        words = [os.fsdecode(word) for word in line.split(b"\0")[2:-1]]
        s, _, _ = train.parse(words)
        assert s.data == copy.name and s.out.startswith("-out")


def test_training_text_sends_no_escape_codes_to_the_terminal(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.Trainer, "sample", lambda self, n: "a\x1b]0;title\x07b\n\x9bc")
    assert run(*tiny(text, tmp_path / "run", 1)) == 0
    output = capsys.readouterr().out
    assert not [c for c in output if not c.isprintable() and c != "\n"]
    assert "sample    a\ufffd]0;title\ufffdb\n          \ufffdc\n" in output


VALUES = st.sampled_from(
    ["", "0", "1", "-1", "nan", "inf", "1e999", "x", "1L", "gpt2", "ista", "true", "9" * 30, "é\0"]
)
STRANGE = ["--", "-x", "--resume", "--config", "--init", "--lrr", "--="]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([*sorted(FLAGS), *STRANGE]), VALUES), max_size=4))
def test_random_command_lines_are_parsed_or_refused(pairs):
    """Never anything but a UserError; a parsed line has a model that can be built."""
    try:
        s, config, _ = train.parse([word for pair in pairs for word in pair])
    except UserError as error:
        assert str(error).strip()
        return
    assert isinstance(s, Settings)
    if config.n_layer < 50:
        try:
            with torch.device("meta"):
                train.model.LM(config)
        except RuntimeError as error:
            assert re.search(terminal.OUT_OF_MEMORY, str(error))


@pytest.fixture(scope="module")
def classify(tmp_path_factory):
    """Words of a good command line of --task classify."""
    root = tmp_path_factory.getbasetemp()
    data = planted_reviews.write(tmp_path_factory.mktemp("reviews") / "a.jsonl", REVIEWS)
    return ["--init", str(planted_reviews.base(root)), "--data", str(data), "--device", "cpu"]


REVIEWS = planted_reviews.reviews(60)
CLASSIFY_FLAGS = [cli.flag_name(f.name) for f in fields(finetune.Settings)]
CLASSIFY_VALUES = st.one_of(VALUES, st.sampled_from(["end", "bytes", "/dev/null", ".", "a,b"]))


class Training(Exception):
    """The command line was good: training would begin."""


@pytest.mark.fuzz
@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.sampled_from([*CLASSIFY_FLAGS, *STRANGE]), CLASSIFY_VALUES), max_size=4)
)
def test_random_command_lines_of_classify_reach_training_or_are_refused(classify, pairs):
    def fit(*arguments):
        raise Training

    words = [word for pair in pairs for word in pair]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "fit", fit)
        try:
            train.main(["--task", "classify", *classify, *words])
        except UserError as error:
            assert str(error).strip() and "\n" not in str(error)
        except Training:
            pass


# ---- the script ----------------------------------------------------------------------------------


def test_the_script_itself_exits_with_2_and_no_traceback():
    done = script("--trian-steps", "3", fresh=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_help_explains_every_flag():
    text = script("--help", COLUMNS="100").stdout
    options = text.partition("\noptions:")[2]
    assert "None" not in text and "(default )" not in text
    words = " ".join(options.split())
    for expected in (
        "(default a tenth of --lr)",
        "(default 256 for 1L 2L 3L, 1024 for S B)",
        "(default out/MODEL-PRESET)",
        "(default the tokenizer's ids,",
        "(default set by --preset)",
        "(default set by --model)",
    ):
        assert expected in words, expected
    for flag in FLAGS:
        entry = re.search(rf"\n  {flag}\b.*?(?=\n  -|\n\n|\Z)", options, re.DOTALL)[0]
        assert entry.count("(default") <= 1, entry
        assert len(entry.split()) > 3, entry  # a flag, a metavar and what it means


def test_classify_is_loaded_only_when_it_is_asked_for():
    code = "import sys, train; print(*[name for name in sys.modules if 'concepts' in name])"
    done = tiny_runs.run_script(["-c", code], cwd=ROOT)
    assert done.returncode == 0 and not done.stdout.strip()
    done = script("--task", "classify")
    assert done.returncode == 2 and "starts from a checkpoint" in done.stderr


# ---- errors that are not the user's --------------------------------------------------------------


def raiser(error):
    def main():
        raise error

    return main


def test_errors_that_are_not_of_memory_keep_their_traceback():
    with pytest.raises(RuntimeError, match="illegal memory access"):
        terminal.run(raiser(RuntimeError("CUDA error: an illegal memory access")))


def test_an_empty_memory_error_is_a_sentence_too(capsys):
    with pytest.raises(SystemExit, match="2"):
        terminal.run(raiser(MemoryError()))
    sentence = "error: not enough memory (allocation failed); take less at a time"
    assert capsys.readouterr().err.startswith(sentence)


@pytest.mark.parametrize(
    "lines, reason",
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
def test_the_reason_is_picked_from_the_compilers_message(lines, reason, capsys):
    failed = type("BackendCompilerFailed", (RuntimeError,), {})
    error = type("InductorError", (failed,), {})("\n".join(lines))
    with pytest.raises(SystemExit, match="2"):
        terminal.run(raiser(error))
    sentence = f"torch.compile cannot compile here ({reason}); `--compile off`"
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("name", ["GPUTooOldForTriton", "TritonMissing"])
def test_a_gpu_or_a_triton_that_is_too_old_is_a_sentence(name, capsys):
    error = type(name, (RuntimeError,), {})("Found a card which is too old\nsecond line")
    with pytest.raises(SystemExit, match="2"):
        terminal.run(raiser(error))
    sentence = "torch.compile cannot compile here (Found a card which is too old); `--compile off`"
    assert sentence in capsys.readouterr().err


def test_a_machine_without_a_compiler_gets_a_sentence_from_torch_compile(text, tmp_path):
    """One sentence, not PyTorch's hundred lines."""
    words = tiny(text, tmp_path / "run", 2, device="cpu", compile="on")
    folder = str(tmp_path / "new")
    done = script(*words, fresh=True, CXX="no-such-compiler", TORCHINDUCTOR_CACHE_DIR=folder)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: torch.compile cannot compile here" in done.stderr
    assert "no-such-compiler" in done.stderr
    assert "`--compile off` trains without it" in done.stderr

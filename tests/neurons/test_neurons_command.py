"""`interpret.py` as a person uses it: commands one after the other on one checkpoint, and what goes wrong."""

import json
import random
import sys
from functools import partial

import pytest
import torch

import interpret
from crate_mini import cli, model
from crate_mini.data import batches as data
from crate_mini.judges import run as llm
from crate_mini.neurons import pipeline as neurons
from crate_mini.neurons import protocols as score
from crate_mini.training import checkpoint

T = 64


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with a text and a checkpoint `best` with random weights, whose layer 1 is dead."""
    place, draw = tmp_path_factory.mktemp("interpret"), random.Random(0)
    words = ["code", "rate", "step", "sparse", "token", "head"]
    text = place / "text.txt"
    text.write_text("".join(" ".join(draw.choices(words, k=9)) + ".\n" for _ in range(1200)))
    torch.manual_seed(0)
    lm = model.LM(
        model.preset(
            "2L", "crate", vocab_size=320, block_size=T, n_embd=32, n_head=2, residual=True
        )
    )
    with torch.no_grad():
        lm.tokens.weight *= 8
        lm.blocks[1].sparsifier.D.zero_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRATE_CACHE", str(place / "cache"))
        tokenizer = data.load_tokenizer("bytes")
        corpus = data.open_corpus(str(text), tokenizer, val_fraction=0.5, log=lambda *_: None)
        checkpoint.save(
            place / "best",
            lm,
            tokenizer={"spec": "bytes", "hash": tokenizer.hash},
            training={
                "step": 0,
                "corpus": corpus.meta,
                "settings": {"data": str(text), "val_fraction": 0.5},
            },
        )
    return place


@pytest.fixture
def call(desk, monkeypatch, capsys):
    """Run `python interpret.py WORDS`, {} in them being the desk; (exit code, stdout, stderr)."""
    monkeypatch.setenv("CRATE_CACHE", str(desk / "cache"))

    def go(words):
        words = [word.replace("{}", str(desk)) for word in words.split()]
        monkeypatch.setattr(sys, "argv", ["interpret.py", *words])
        with pytest.raises(SystemExit) as end:
            cli.run(interpret.main)
        said = capsys.readouterr()
        return end.value.code, said.out, said.err

    return go


def test_neurons_then_features_then_pages(desk, call):
    out = desk / "interpret"
    code, told, err = call("neurons {}/best --n 9 --trie 1 --tokens 9000")
    assert not code and not err, err
    for name in (
        "token_r",
        "ngram_r",
        "label_r@10",
        "null_r",
        "init_r",
        "openai_tar[ngram]",
        "trie_f1",
    ):
        assert f"\n{name} " in told, name
    assert "One training seed." in told and "n = live + dead + undefined + failed" in told
    rows = score.read_rows(out / "scores.jsonl")
    assert [row["status"] for row in rows].count("dead") == 9 and len(
        rows
    ) == 18  # the dead layer's
    ids = [id for row in rows for id, _ in row.get("effect", {"raised": []})["raised"]]
    assert ids and max(ids) < 257  # the others only pad the vocabulary
    summary = json.loads((out / "summary.json").read_text())
    assert summary["sites"]["L1"]["n"]["ngram_r"] == {
        "total": 9,
        "live": 0,
        "dead": 9,
        "undefined": 0,
        "failed": 0,
    }
    assert summary["sites"]["L1"]["ngram_r"]["mean"] is None
    assert summary["overall"]["codes"]["ngram_r"]["without"] == [1]
    code, told, err = call(
        "sae {}/best --layer 0 --k 4 --expansion 2 --steps 9 --batch 32 --tokens 300"
    )
    assert not code, err
    code, told, err = call("neurons {}/best --sae {}/interpret/sae-L0-x2-k4.pt --n 5 --tokens 9000")
    assert not code and (out / "sae" / "index.html").exists(), err
    assert {row["site"] for row in score.read_rows(out / "sae" / "scores.jsonl")} == {
        "L0.sae-x2-k4"
    }
    code, told, err = call(
        "neurons {}/best --sae {0},{0}".replace("{0}", "{}/interpret/sae-L0-x2-k4.pt")
    )
    assert code == 2 and "of one layer and one name" in err
    code, told, err = call("neurons {}/best --match-density 0.05 --layers 0 --n 5 --tokens 9000")
    assert (
        not code
        and max(row["density"] for row in score.read_rows(out / "density-0.05" / "scores.jsonl"))
        < 0.1
    ), err
    page = (out / "index.html").read_bytes()
    for name in ("index.html", "human.html", "scores.png", "density.png"):
        (out / name).unlink(missing_ok=True)
    code, told, err = call("report {}/best --neuronpedia {}/features.jsonl")
    assert (
        not code and (out / "index.html").read_bytes() == page and (out / "scores.png").exists()
    ), err
    assert len((desk / "features.jsonl").read_text().splitlines()) == 18


def test_a_stage_alone(desk, call):
    words = "neurons {}/best --n 3 --tokens 9000 --layers 0 --out {}/alone"
    assert not call(f"{words} --until select")[0]
    made = {path.name for path in (desk / "alone").iterdir()}
    assert "select-L0.npz" in made and "scores.jsonl" not in made
    code, told, _ = call(f"{words} --from explain --until explain")
    assert not code and {path.name for path in (desk / "alone").iterdir()} - made == {
        "explain-L0.jsonl"
    }
    assert "ngram_r" not in told
    code, _, err = call(f"{words} --from score")
    assert code == 2 and "make it with --from simulate" in err


def test_selftest(desk, call):
    code, told, err = call("selftest --documents 300 --out {}/selftest")
    assert not code and "perfect reader" in told and "half as many added" in told, err
    assert json.loads((desk / "selftest" / "selftest.json").read_text())["documents"] == 300


@pytest.mark.parametrize(
    "words, reason",
    [
        ("neurons", "CKPT"),
        ("neurons {}/nothing", "No checkpoint"),
        ("neurons {}/text.txt", "text.txt"),
        ("neurons {}/best --layers 2", "layer '2' is not there; the model's layers are 0 to 1"),
        ("neurons {}/best --layers one", "layer 'one'"),
        ("neurons {}/best --layers -1", "layer '-1'"),
        ("neurons {}/best --from scroe", "--from 'scroe' is no stage"),
        ("neurons {}/best --n -1", "--n -1"),
        ("neurons {}/best --controls shufle", "--controls 'shufle' is unknown"),
        ("neurons {}/best --match-density 1", "--match-density 1"),
        ("neurons {}/best --tokens 0", "--tokens 0"),
        ("neurons {}/best --sae {}/best", "best"),
        ("neurons {}/best --data {}/no.txt", "no.txt"),
        ("neurons {}/best --data {}/short.txt --val-fraction 1", "64 tokens"),
        ("neurons {}/best --data {}/picture.bin", "picture.bin"),
        ("neurons {}/best --out {}/text.txt", "text.txt"),
        ("neurons {}/best --neuron 3", "unknown argument '--neuron'"),
        ("neurosn {}/best", "did you mean neurons?"),
        ("sae {}/best --layer 1", "dead layer leaves nothing"),
        ("report {}/best --most 0", "--most 0"),
        ("report {}/best --out {}/empty", "has no record.json"),
        ("report {}/best --answers {}/text.txt", "cannot be read as answers"),
        ("llm {}/best --simulator http:m --out {}/empty", "holds no record"),
        ("selftest --documents 3", "--documents 3"),
        ("selftest --out {}/text.txt", "text.txt"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(words, reason, desk, call):
    (desk / "short.txt").write_text("too short to have a window of text")
    (desk / "picture.bin").write_bytes(bytes(range(256)) * 40)
    (desk / "empty").mkdir(exist_ok=True)
    code, _, err = call(words)
    assert code == 2 and reason in err, err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err


def test_a_full_disk_is_one_sentence_and_finished_stages_stay(desk, call, monkeypatch):
    words, place = "neurons {}/best --n 3 --tokens 9000 --layers 0 --out {}/full", desk / "full"
    assert not call(f"{words} --until explain")[0]
    kept = {path.name: path.read_bytes() for path in place.iterdir() if path.is_file()}

    def full(file, **arrays):
        file.write(b"as much as there is room for")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(neurons.np, "savez", full)
    code, told, err = call(f"{words} --from simulate")
    assert code == 2 and "No space left on device" in err and err.count("\n") == 1
    assert "--from simulate goes on" in told
    assert {path.name: path.read_bytes() for path in place.iterdir() if path.is_file()} == kept
    monkeypatch.undo()


def test_an_endpoint_that_is_down_and_a_key_that_is_missing(desk, call, monkeypatch):
    assert not call(
        "neurons {}/best --n 3 --tokens 9000 --layers 0 --controls none --out {}/words"
    )[0]
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(llm, "Http", partial(llm.Http, sleep=lambda seconds: None))
    words = "llm {}/best --out {}/words --simulator http:m --url "
    code, _, err = call(f"{words}http://127.0.0.1:9/v1")
    assert code == 2 and "127.0.0.1:9" in err and err.count("\n") == 1
    code, _, err = call(f"{words}https://example.org/v1")
    assert code == 2 and "OPENAI_API_KEY" in err and err.count("\n") == 1
    assert (desk / "words" / "scores.jsonl").exists()

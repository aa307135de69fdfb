"""`interpret.py` as a person uses it: commands in turn on one checkpoint, and what goes wrong."""

import json
import random
from functools import partial

import numpy as np
import pytest
import torch

import interpret
from crate_mini import model
from crate_mini.console import results, terminal
from crate_mini.data.batches import open_corpus
from crate_mini.data.tokenizer import load_tokenizer
from crate_mini.judges import language_model
from crate_mini.neurons import record
from crate_mini.neurons.score_files import read_rows
from crate_mini.training import checkpoint

WORDS = ("code", "rate", "step", "sparse", "token", "head")
PAGES = ("index.html", "human.html", "scores.png", "density.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a text and a checkpoint `best` with random weights, whose layer 1 is dead."""
    folder, draw = tmp_path_factory.mktemp("interpret"), random.Random(0)
    text = folder / "text.txt"
    text.write_text("".join(" ".join(draw.choices(WORDS, k=9)) + ".\n" for _ in range(1200)))
    torch.manual_seed(0)
    shape = {"vocab_size": 320, "block_size": 64, "n_embd": 32, "n_head": 2}
    lm = model.LM(model.preset("2L", "crate", residual=True, **shape))
    with torch.no_grad():
        lm.tokens.weight *= 8
        lm.blocks[1].sparsifier.D.zero_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRATE_CACHE", str(folder / "cache"))
        tokenizer = load_tokenizer("bytes")
        corpus = open_corpus(str(text), tokenizer, val_fraction=0.5, log=lambda *_: None)
        settings = {"data": str(text), "val_fraction": 0.5}
        checkpoint.save(
            folder / "best",
            lm,
            tokenizer={"spec": "bytes", "hash": tokenizer.hash},
            training={"step": 0, "corpus": corpus.meta, "settings": settings},
        )
    (folder / "short.txt").write_text("too short to have a window of text")
    (folder / "picture.bin").write_bytes(bytes(range(256)) * 40)
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def call(place, monkeypatch, capsys):
    """Run `python interpret.py WORDS` in the folder; (exit code, stdout, stderr)."""
    monkeypatch.setenv("CRATE_CACHE", str(place / "cache"))
    monkeypatch.chdir(place)

    def run(words):
        monkeypatch.setattr("sys.argv", ["interpret.py", *words.split()])
        with pytest.raises(SystemExit) as end:
            terminal.run(interpret.main)
        printed = capsys.readouterr()
        return end.value.code, printed.out, printed.err

    return run


# ---- the stages and what they leave --------------------------------------------------------------


def test_neurons_then_their_pages(place, call):
    code, printed, err = call("neurons best --n 9 --trie 1 --splits 1 --tokens 9000")
    assert not code, err
    assert not err
    metrics = ("token_r", "ngram_r", "label_r@10", "null_r", "init_r")
    for name in (*metrics, "openai_tar[ngram]", "trie_f1"):
        assert f"\n{name} " in printed, name
    assert "One training seed." in printed
    assert "n = live + dead + undefined + failed" in printed
    rows = read_rows(place / "interpret" / "scores.jsonl")
    assert len(rows) == 18
    assert [row["status"] for row in rows].count("dead") == 9  # the dead layer's
    raised = []
    for row in rows:
        if "effect" in row:
            raised += [id for id, *_ in row["effect"]["raised"]]
    assert raised
    assert max(raised) < 257  # the other ids only pad the vocabulary
    summary = json.loads((place / "interpret" / "summary.json").read_text())
    layer_1 = summary["sites"]["L1"]
    counts = {"total": 9, "live": 0, "dead": 9, "undefined": 0, "failed": 0}
    assert layer_1["n"]["ngram_r"] == counts
    assert layer_1["ngram_r"]["mean"] is None
    assert summary["overall"]["codes"]["ngram_r"]["without"] == [1]

    page = (place / "interpret" / "index.html").read_bytes()
    for name in PAGES:
        (place / "interpret" / name).unlink(missing_ok=True)
    code, _, err = call("report best --neuronpedia features.jsonl")
    assert not code, err
    assert (place / "interpret" / "index.html").read_bytes() == page
    assert (place / "interpret" / "scores.png").exists()
    assert len((place / "features.jsonl").read_text().splitlines()) == 18


def test_intermediate_files_are_named_and_cleaned_on_demand(place, call):
    words = "neurons best --layers 0 --n 3 --tokens 9000 --splits 0 --out kept"
    code, printed, err = call(words)
    assert not code, err
    before = {path.name for path in (place / "kept").iterdir()}
    assert " MB, for --from and `interpret.py llm`; --clean deletes them" in printed
    code, printed, err = call(f"{words} --from report --clean")
    assert not code, err
    assert "intermediate files" in printed and "deleted" in printed
    after = {path.name for path in (place / "kept").iterdir()}
    assert before - after >= {"record-L0.npz", "select-L0.npz", "simulate-L0.npz", "init"}
    assert after >= {"record.json", "scores.jsonl", "excerpts.jsonl", "summary.json", "index.html"}
    assert not list((place / "kept").rglob("*.npz"))
    code, _, err = call("report best --out kept")  # needs none of them
    assert not code, err
    code, _, err = call(f"{words} --from select")
    assert code == 2 and "record again with --from record" in err
    code, _, err = call(f"{words} --until select --clean")
    assert code == 2 and "--clean deletes what --until select would leave" in err


def test_features_of_an_autoencoder(place, call):
    code, _, err = call(
        "sae best --layer 0 --k 4 --expansion 2 --steps 9 --batch 32 --tokens 300 --out features"
    )
    assert not code, err
    sae = "features/sae-L0-x2-k4.pt"
    code, _, err = call(f"neurons best --sae {sae} --n 5 --tokens 9000 --splits 0 --out features")
    assert not code, err
    folder = place / "features" / "sae"
    assert (folder / "index.html").exists()
    assert {row["site"] for row in read_rows(folder / "scores.jsonl")} == {"L0.sae-x2-k4"}
    code, _, err = call(f"neurons best --sae {sae},{sae} --out features")
    assert code == 2
    assert "two autoencoders are called L0.sae-x2-k4" in err


def test_match_density_has_a_folder_of_its_own(place, call):
    code, printed, err = call(
        "neurons best --match-density 0.05 --layers 0 --n 5 --tokens 9000 --splits 0"
    )
    assert not code, err
    folder = place / "interpret" / "density-0.05"
    assert max(row["density"] for row in read_rows(folder / "scores.jsonl")) <= 0.05
    loss = results.read_json(folder / "summary.json")["cut"]["loss"]
    assert loss["sites"]["L0"] != loss["uncut"]
    page = (folder / "index.html").read_text("utf-8")
    for text in (printed, page):  # never a score at a density without the loss it would cost
        assert f"L0 cut {loss['sites']['L0']:.3f}" in text
        assert "does not run that way" in text
    assert f"{loss['sites']['L0']:.4f}, instead of {loss['uncut']:.4f}" in page


def test_a_stage_alone(place, call):
    words = "neurons best --n 3 --tokens 9000 --splits 0 --layers 0 --out alone"
    folder = place / "alone"
    assert not call(f"{words} --until select")[0]
    selected = {path.name for path in folder.iterdir()}
    assert "select-L0.npz" in selected
    assert "scores.jsonl" not in selected
    code, printed, _ = call(f"{words} --from explain --until explain")
    assert not code
    assert {path.name for path in folder.iterdir()} - selected == {"explain-L0.jsonl"}
    assert "ngram_r" not in printed
    code, _, err = call(f"{words} --from score")
    assert code == 2
    assert "make it with --from simulate" in err


def scores(folder):
    return [
        (row["site"], row["neuron"], row["scores"]) for row in read_rows(folder / "scores.jsonl")
    ]


def test_stages_with_other_settings_refuse_or_do_as_a_fresh_run(place, call):
    """Never a mixture of files that were made with different choices."""
    words = "neurons best --tokens 9000 --splits 1 --out choices"
    assert not call(f"{words} --n 5 --trie 1")[0]
    before = (place / "choices" / "scores.jsonl").read_bytes()
    (place / "other.txt").write_text((place / "text.txt").read_text()[:30_000])
    for stage, changes, reason in (
        ("select", "--n 5 --tokens 4000", "others than --tokens 4000 chooses"),
        ("select", "--n 5 --data other.txt", "is of other text"),
        ("report", "--n 5 --data other.txt", "is of other text"),
        ("explain", "--n 5 --val-fraction 0.4", "is of other text"),
        ("select", "--n 5 --no-dedup", "was made with --dedup"),
        ("select", "--n 5 --seed 1", "of another checkpoint or seed"),
        ("simulate", "--n 5", "it has 1 tries, unlike --trie 0"),
        ("score", "--n 5 --trie 2", "it has 1 tries, unlike --trie 2"),
        (
            "report",
            "--n 5 --trie 1 --controls none",
            "of other --layers, --n, --controls, --trie or --splits",
        ),
        ("report", "--n 4 --trie 1", "of other --layers, --n, --controls, --trie or --splits"),
        ("explain", "--n 4", "select-L0.npz is of 5 neurons, not of 4"),
        ("score", "--n 5 --trie 1 --splits 2", "has 1 other splits, not --splits 2"),
        ("report", "--n 5 --trie 1 --splits 0", "--controls, --trie or --splits than these"),
    ):
        code, _, err = call(f"{words} --from {stage} {changes}")
        assert (code, err.count("\n")) == (2, 1), (stage, changes, err)
        assert reason in err
    assert (place / "choices" / "scores.jsonl").read_bytes() == before
    for changes in ("--controls none", "--controls shuffle", "--layers 0 --controls none"):
        assert not call(f"{words} --n 5 --trie 1 --from select {changes}")[0]
        fresh = f"neurons best --tokens 9000 --splits 0 --n 5 --trie 1 {changes} --out fresh"
        assert not call(fresh)[0]
        assert scores(place / "choices") == scores(place / "fresh"), changes
    code, _, err = call(f"{words} --n 5 --trie 1 --from score")
    assert code == 2 and "made without --controls init" in err
    code, _, err = call("neurons best --tokens 9000 --n 5 --out fresh --from select")
    assert code == 2 and "was made with --splits 0, not 3" in err


def test_a_stage_made_again_outdates_those_after_it(place, call):
    """Labels of other tables, scores half written: nothing is mixed with what came before."""
    words = "neurons best --tokens 9000 --n 3 --layers 0 --splits 0 --controls none --out chain"
    folder = place / "chain"
    assert not call(words)[0]
    lines = read_rows(folder / "explain-L0.jsonl")
    lines[0]["label"]["rest"] = 9.0
    results.write_rows(folder / "explain-L0.jsonl", lines)
    code, _, err = call(f"{words} --from score")
    assert code == 2 and "simulate-L0.npz is older than what it was made from" in err
    assert not call(f"{words} --from explain")[0]
    rows = read_rows(folder / "scores.jsonl")
    assert all(row["made_with"]["n"] == 3 for row in rows)
    for name in ("scores.jsonl", "excerpts.jsonl"):
        before = (folder / name).read_bytes()
        rows = read_rows(folder / name)
        results.write_rows(folder / name, [{**row, "made_with": {"n": 0}} for row in rows])
        code, _, err = call(f"{words} --from report")
        assert code == 2 and "--from score" in err, name
        (folder / name).write_bytes(before)
    (folder / "select-L0.npz").unlink()
    code, _, err = call(f"{words} --from score")
    assert code == 2 and "select-L0.npz is missing; make it with --from select" in err


def test_the_spread_over_splits_stands_next_to_each_mean(place, call):
    words = "neurons best --tokens 9000 --n 5 --layers 0 --splits 2 --controls shuffle --out spread"
    code, printed, err = call(words)
    assert not code, err
    assert "one document" in printed  # all of the text
    summary = json.loads((place / "spread" / "summary.json").read_text())
    splits = summary["spread"]["L0"]["splits"]
    assert {len(means) for means in splits.values()} == {3}
    ngram = summary["sites"]["L0"]["ngram_r"]
    assert ngram["split_sd"] == pytest.approx(np.std(splits["ngram_r"], ddof=1))
    assert splits["ngram_r"][0] == pytest.approx(ngram["mean"], abs=1e-4)  # the split in use
    assert ngram["redrawn"] == ["documents", "splits", "neurons"]  # 5 of 128 were drawn
    assert f"] ±{ngram['split_sd']:.3f}" in printed
    assert not (place / "spread" / "split").exists()
    for metric in ("token_r", "null_r", "f1", "auprc", "openai_tar[ngram]"):
        assert "documents" in summary["sites"]["L0"][metric]["redrawn"], metric


@pytest.mark.parametrize("tokens", [300, 1000, 2500, 4000])
def test_a_text_so_short_that_one_document_is_scored(place, call, tokens):
    words = f"neurons best --tokens {tokens} --n 3 --layers 0 --controls none --out short-{tokens}"
    code, _, err = call(words)
    if code:
        assert code == 2 and err.count("\n") == 1
    else:
        assert (place / f"short-{tokens}" / "summary.json").exists()


def test_one_layer_of_a_record_that_had_no_room_for_all_bigrams(place, call, monkeypatch):
    """Alone it would have had room for more, and so have another table."""
    monkeypatch.setattr(record, "BIGRAM_BYTES", 4 * 2 * 128 * 10)  # ten for two layers of 128
    words = "neurons best --n 2 --tokens 9000 --splits 0 --controls none --out bigrams"
    assert not call(f"{words} --until record")[0]
    code, _, err = call(f"{words} --from select --layers 0")
    assert code == 2 and "is of L0, L1, which share its room for bigrams" in err
    assert not call(f"{words} --from select")[0]


def test_features_of_an_autoencoder_that_was_trained_again(place, call):
    sae = "sae best --layer 0 --k 3 --expansion 2 --batch 32 --tokens 300 --out again --steps"
    words = "neurons best --sae again/sae-L0-x2-k3.pt --n 3 --tokens 9000 --splits 0 --out again"
    assert not call(f"{sae} 9")[0] and not call(words)[0]
    assert not call(f"{words} --from select")[0]
    assert not call(f"{sae} 12")[0]
    code, _, err = call(f"{words} --from select")
    assert code == 2 and "another autoencoder again/sae-L0-x2-k3.pt" in err


def test_densities_that_look_alike_have_folders_of_their_own(place, call):
    for share in ("0.0500001", "0.05000012"):
        words = f"neurons best --match-density {share} --layers 0 --n 1 --tokens 9000 --splits 0"
        assert not call(f"{words} --until record --out alike")[0]
        assert (place / "alike" / f"density-{share}" / "record.json").exists()


# ---- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, reason",
    [
        ("neurons", "CKPT"),
        ("neurons nothing", "No checkpoint"),
        ("neurons text.txt", "text.txt"),
        ("neurons best --layers 2", "layer '2' does not exist; the model's layers are 0 to 1"),
        ("neurons best --layers one", "layer 'one'"),
        ("neurons best --layers -1", "layer '-1'"),
        ("neurons best --from scroe", "--from 'scroe' is not a stage"),
        ("neurons best --n -1", "--n -1"),
        ("neurons best --controls shufle", "--controls 'shufle' is unknown"),
        ("neurons best --match-density 1", "--match-density 1"),
        ("neurons best --tokens 0", "--tokens 0"),
        ("neurons best --sae best", "best"),
        ("neurons best --data no.txt", "no.txt"),
        ("neurons best --data short.txt --val-fraction 1", "64 tokens"),
        ("neurons best --data picture.bin", "picture.bin"),
        ("neurons best --out text.txt", "text.txt"),
        ("neurons best --neuron 3", "unknown argument '--neuron'"),
        ("neurosn best", "did you mean neurons?"),
        ("sae best --layer 1", "dead layer leaves nothing"),
        ("sae best --tokens 1", "--tokens 1 must lie in 64 to"),
        ("neurons best --sae .", "--sae . is not a plain file"),
        ("report best --answers /dev/zero", "--answers /dev/zero is not a plain file"),
        (
            "llm best --simulator http:m --replay /dev/zero",
            "--replay /dev/zero is not a plain file",
        ),
        ("report best --most 0", "--most 0"),
        ("report best --out empty", "has no record.json"),
        ("report best --answers text.txt", "cannot be read as answers"),
        ("llm best --simulator http:m --out empty", "holds no record"),
        ("selftest --documents 3", "--documents 3"),
        ("selftest --out text.txt", "text.txt"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(words, reason, call):
    code, _, err = call(words)
    assert code == 2, err
    assert reason in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_a_full_disk_is_one_sentence_and_finished_stages_stay(place, call, monkeypatch):
    words = "neurons best --n 3 --tokens 9000 --splits 0 --layers 0 --out full"

    def contents():
        files = [path for path in (place / "full").iterdir() if path.is_file()]
        return {path.name: path.read_bytes() for path in files}

    def full(file, array, **options):
        file.write(b"as much as there is room for")
        raise OSError(28, "No space left on device")

    assert not call(f"{words} --until explain")[0]
    before = contents()
    monkeypatch.setattr(np.lib.format, "write_array", full)
    code, printed, err = call(f"{words} --from simulate")
    assert code == 2
    assert "No space left on device" in err
    assert err.count("\n") == 1
    assert "resume with --from simulate" in printed
    assert contents() == before


def test_an_endpoint_that_is_down_and_a_key_that_is_missing(place, call, monkeypatch):
    words = "neurons best --n 3 --tokens 9000 --splits 0 --layers 0 --controls none --out words"
    assert not call(words)[0]
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    impatient = partial(language_model.HttpClient, sleep=lambda seconds: None)
    monkeypatch.setattr(language_model, "HttpClient", impatient)
    llm = "llm best --out words --simulator http:m"
    code, _, err = call(f"{llm} --url http://127.0.0.1:9/v1")
    assert code == 2
    assert "127.0.0.1:9" in err
    assert err.count("\n") == 1
    code, _, err = call(f"{llm} --url https://example.org/v1")
    assert code == 2
    assert "OPENAI_API_KEY" in err
    assert err.count("\n") == 1
    assert (place / "words" / "scores.jsonl").exists()

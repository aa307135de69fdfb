"""The studies of training: their baselines, what they keep of a run, the tables."""

import itertools
import json
import math
import random
from unittest import mock

import numpy as np
import pytest

from crate_mini import UserError, results
from crate_mini.studies import runner, tables, train_default


def naive_trigram_bits(train, held, V, D):
    """The same Kneser-Ney model by dictionaries and definition."""
    left2, left3 = {}, {}
    three = {}
    for i, w in enumerate(train):
        if i >= 1:
            left2.setdefault(w, set()).add(train[i - 1])
        if i >= 2:
            left3.setdefault((train[i - 1], w), set()).add(train[i - 2])
            gram = tuple(train[i - 2 : i + 1])
            three[gram] = three.get(gram, 0) + 1
    uni = {(w,): len(left) for w, left in left2.items()}
    bi = {gram: len(left) for gram, left in left3.items()}

    def p(gram, table, lower):
        context = {key: count for key, count in table.items() if key[:-1] == gram[:-1]}
        total = sum(context.values())
        if not total:
            return lower
        return (max(context.get(gram, 0) - D, 0) + D * len(context) * lower) / total

    bits = 0.0
    padded = [0, 0, *held]
    for i in range(len(held)):
        u, v, w = padded[i : i + 3]
        bits -= math.log2(p((u, v, w), three, p((v, w), bi, p((w,), uni, 1 / V))))
    return bits / len(held)


def test_the_trigram_model_equals_its_definition():
    draw = random.Random(0)
    train = [draw.choice([1, 1, 2, 3, 5]) for _ in range(400)]
    held = [draw.randrange(7) for _ in range(60)]
    bits = train_default.trigram_bits(np.array(train), np.array(held), 7)
    assert bits == pytest.approx(naive_trigram_bits(train, held, 7, 0.75), rel=1e-9)


def test_the_trigram_model_is_a_distribution():
    draw = random.Random(0)
    train = np.array([draw.choice([1, 1, 2, 3, 5]) for _ in range(400)])

    def probability(*ids):
        return 2 ** (-train_default.trigram_bits(train, np.array(ids), 7) * len(ids))

    after = [probability(1, 2, w) for w in range(7)]
    assert sum(after) == pytest.approx(probability(1, 2), rel=1e-9)


# ---- runs ----------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A checkout in tmp_path whose train.py does nothing; [words of each call]."""
    calls = []

    def run_script(words, log):
        calls.append(words)
        folder = tmp_path / words[words.index("--out") + 1]
        (folder / "last").mkdir(parents=True, exist_ok=True)
        seed = int(words[words.index("--seed") + 1])
        training = {"val_loss": float(seed), "bits_per_byte": 1.5, "density": 0.4}
        meta = {"training": {**training, "machine": {"device": "a machine"}}}
        (folder / "last" / "config.json").write_text(json.dumps(meta))
        rows = "step,tokens,loss,val_loss,tokens_per_s\n0,10,5,5,100\n1,20,4,4,200\n"
        (folder / "log.csv").write_text(rows)
        log.write_text("backend   fused (AVX2)\n\nsample    a\n b \nresult    files\n")
        return 90.0

    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(runner, "run_script", run_script)
    monkeypatch.setattr(train_default, "baselines", mock.Mock(return_value={"gzip -9": 2.0}))
    return calls


def test_default_trains_each_model_once_for_each_seed(trained, tmp_path, capsys, monkeypatch):
    train_default.run_default(train_default.Default())
    study = json.loads((tmp_path / "results" / "default.json").read_text())
    assert len(trained) == 9 == len(study["runs"])
    assert study["command"] == "python -m crate_mini.studies default"
    first = study["runs"][0]
    assert first["backend"] == "fused" and first["sample"] == "a\n b"
    assert first["minutes"] == 1.5 and first["tokens_per_s"] == 200 and first["tokens"] == 20
    assert "| CRATE (paper) | 3 | 1338.000 | 2.000 |" in capsys.readouterr().out
    assert (tmp_path / "results" / "default.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(train_default, "held_out_bits", mock.Mock(return_value=1.0))
    train_default.run_deps(train_default.Deps())
    assert len(trained) == 10  # the run on pydocs is that of `default`
    assert "--data" in trained[-1] and "pydocs+deps" in trained[-1]
    monkeypatch.setattr(results, "commit", mock.Mock(return_value="another"))
    train_default.run_default(train_default.Default())
    assert len(trained) == 19  # at another commit all runs again


def test_speed_needs_a_text_and_ranks():
    with pytest.raises(UserError, match="give a text and the ranks of a tokenizer"):
        train_default.run_speed(train_default.Speed("text"))


# ---- tables --------------------------------------------------------------------------------------


def test_default_table_has_a_row_for_each_model_and_baseline():
    runs = []
    for kind, seed in itertools.product(train_default.MODELS, (0, 1)):
        run = {"model": kind, "seed": seed, "minutes": 3.0, "val_loss": 3 + seed / 10}
        runs.append({**run, "bits_per_byte": 1.5, "density": 0.4, "tokens_per_s": 9000})
    baselines = {"gzip -9": 2.0, "trigram": 1.8}
    text = tables.default({"runs": runs, "baselines_bits_per_byte": baselines})
    assert "| crate+ | 2 | 3.050 | 0.100 | 1.500 | 0.40 | 9,000 | 3.0 |" in text
    assert text.endswith("| trigram | | | | 1.800 | | | |")


def test_speed_table_has_every_cell():
    rows = []
    kinds, dtypes, modes = ("crate", "gpt2"), ("bfloat16", "float32"), ("off", "on")
    cells = itertools.product((50304, 8192), kinds, dtypes, modes)
    for i, (ids, kind, dtype, mode) in enumerate(cells, 1):
        row = {"ids": ids, "model": kind, "dtype": dtype, "compile": mode}
        rows.append({**row, "tokens_per_s": 1000 * i})
    text = tables.speed({"rows": rows})
    assert "| 50,304 | CRATE (paper) | 1.0 k | 2.0 k | 3.0 k | 4.0 k |" in text
    assert text.endswith("| 8,192 | GPT-2 twin | 13.0 k | 14.0 k | 15.0 k | 16.0 k |")


def test_bench_table_shows_the_rows_where_we_lose():
    ms = {"fused": {"median": 2.0}, "eager": {"median": 1.0}, "compile": {"median": 3.0}}
    names = (
        "mssa 8192x128 bfloat16 both",
        "mssa 8192x128 float32 both",
        "mssa 8192x128 float32 forward",
        "ista_step 8192x128 float32 both",
        "mssa 8x2 float32 both",
    )
    rows = [{"name": name, "note": "", "operations": 2e9, "ms": ms} for name in names]
    half = "2 | 0.50x | 1.50x | |"
    assert tables.bench({"rows": rows}).splitlines()[2:] == [f"| mssa 8192x128 | {half} {half}"]


def test_versions_go_from_naive_to_fast():
    rows = []
    for dtype in ("bfloat16", "float32"):
        for version, milliseconds in (("naive", 6.0), ("avx2", 2.0)):
            ms = {"fused": {"median": milliseconds}, "eager": {"median": 3.0}}
            rows.append({"name": f"ista_step 8x2 {dtype} {version} forward", "ms": ms})
    cells = "6 (0.50x) | 2 (1.50x) |"
    assert tables.versions({"rows": rows}).splitlines() == [
        "| ms | naive | avx2 |",
        "|---|---|---|",
        f"| bfloat16 | {cells}",
        f"| float32 | {cells}",
    ]

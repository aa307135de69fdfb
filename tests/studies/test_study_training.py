"""The studies of training: their baselines, what they keep of a run, the tables."""

import itertools
import json
import math
import random
from unittest import mock

import numpy as np
import pytest

from crate_mini import UserError
from crate_mini.console import results
from crate_mini.studies import runner, tables, training
from crate_mini.training import trigram


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
    bits = trigram.trigram_bits(np.array(train), np.array(held), 7)
    assert bits == pytest.approx(naive_trigram_bits(train, held, 7, 0.75), rel=1e-9)


def test_the_trigram_model_is_a_distribution():
    draw = random.Random(0)
    train = np.array([draw.choice([1, 1, 2, 3, 5]) for _ in range(400)])

    def probability(*ids):
        return 2 ** (-trigram.trigram_bits(train, np.array(ids), 7) * len(ids))

    after = [probability(1, 2, w) for w in range(7)]
    assert sum(after) == pytest.approx(probability(1, 2), rel=1e-9)


class MadeUpCorpus:
    """As much of a corpus as the trigram asks for."""

    def __init__(self, train, val):
        ids = {"train": np.array(train, np.int64), "val": np.array(val, np.int64)}
        self.n_tokens = {split: len(row) for split, row in ids.items()}
        self.streams = {split: mock.Mock() for split in ids}
        for split, row in ids.items():
            self.streams[split].read = lambda start, count, row=row: row[start : start + count]


def test_the_line_to_beat_is_in_nats_and_left_out_of_what_is_too_large(monkeypatch):
    corpus = MadeUpCorpus([1, 2, 3, 1, 2, 3, 1, 2], [1, 2, 3])
    bits = naive_trigram_bits([1, 2, 3, 1, 2, 3, 1, 2], [1, 2, 3], 4, 0.75)
    assert trigram.trigram_loss(corpus, 4) == pytest.approx(bits * math.log(2))
    assert trigram.trigram_loss(MadeUpCorpus([1, 2], [1]), 4) is None
    assert trigram.trigram_loss(MadeUpCorpus([1, 2, 3], []), 4) is None
    monkeypatch.setattr(trigram, "MOST", 7)
    assert trigram.trigram_loss(corpus, 4) is None


# ---- runs ----------------------------------------------------------------------------------------


def test_deps_trains_on_both_corpora_and_judges_both_on_pydocs(tmp_path, monkeypatch, capsys):
    calls = []

    def run_script(words, log):
        calls.append(words)
        folder = tmp_path / words[words.index("--out") + 1]
        folder.mkdir(parents=True)
        (folder / "log.csv").write_text("step,tokens\n1,20\n")
        return 90.0

    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(runner, "run_script", run_script)
    judged = mock.Mock(side_effect=[1.5, 2.0])
    monkeypatch.setattr(training, "held_out_bits", judged)
    training.run_deps(training.Deps())
    assert [words[words.index("--data") + 1] for words in calls] == ["pydocs", "pydocs+deps"]
    assert [call.args[1] for call in judged.call_args_list] == ["pydocs", "pydocs"]
    study = json.loads((tmp_path / "results" / "deps.json").read_text())
    assert study["bits_per_byte_of_pydocs"] == {"pydocs": 1.5, "pydocs+deps": 2.0}
    assert study["tokens"] == 20
    assert "2.0" in capsys.readouterr().out


def test_speed_needs_a_text_and_ranks():
    with pytest.raises(UserError, match="give a text and the ranks of a tokenizer"):
        training.run_speed(training.Speed("text"))


# ---- tables --------------------------------------------------------------------------------------


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

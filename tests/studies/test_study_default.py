"""The baselines of the README's table."""

import itertools
import math
import random

import numpy as np
import pytest

from crate_mini.studies import tables
from crate_mini.studies import train_default as study


def naive_trigram_bits(train, held, V, D):
    """The same Kneser-Ney model by dictionaries and definition."""
    left2, left3, three = {}, {}, {}
    for i, w in enumerate(train):
        if i >= 1:
            left2.setdefault(w, set()).add(train[i - 1])
        if i >= 2:
            left3.setdefault((train[i - 1], w), set()).add(train[i - 2])
            three[tuple(train[i - 2 : i + 1])] = three.get(tuple(train[i - 2 : i + 1]), 0) + 1
    uni = {(w,): len(s) for w, s in left2.items()}
    bi = {k: len(s) for k, s in left3.items()}

    def p(gram, table, lower):
        context = {k: c for k, c in table.items() if k[:-1] == gram[:-1]}
        total = sum(context.values())
        if not total:
            return lower
        return (max(context.get(gram, 0) - D, 0) + D * len(context) * lower) / total

    bits, padded = 0.0, [0, 0, *held]
    for i in range(len(held)):
        u, v, w = padded[i : i + 3]
        bits -= math.log2(p((u, v, w), three, p((v, w), bi, p((w,), uni, 1 / V))))
    return bits / len(held)


def test_trigram_model_equals_its_definition_and_is_a_distribution():
    draw = random.Random(0)
    train = [draw.choice([1, 1, 2, 3, 5]) for _ in range(400)]
    held = [draw.randrange(7) for _ in range(60)]
    got = study.trigram_bits(np.array(train), np.array(held), 7)
    assert got == pytest.approx(naive_trigram_bits(train, held, 7, 0.75), rel=1e-9)
    after = [
        2 ** (-study.trigram_bits(np.array(train), np.array([1, 2, w]), 7) * 3) for w in range(7)
    ]
    before = 2 ** (-study.trigram_bits(np.array(train), np.array([1, 2]), 7) * 2)
    assert sum(after) == pytest.approx(before, rel=1e-9)


def test_table_has_a_row_for_each_model_and_baseline():
    runs = [
        {
            "model": k,
            "seed": s,
            "minutes": 3.0,
            "val_loss": 3 + s / 10,
            "bits_per_byte": 1.5,
            "density": 0.4,
            "tokens_per_s": 9000,
        }
        for k in study.MODELS
        for s in (0, 1)
    ]
    text = tables.default(
        {"runs": runs, "baselines_bits_per_byte": {"gzip -9": 2.0, "trigram": 1.8}}
    )
    assert "| crate+ | 2 | 3.050 | 0.100 | 1.500 | 0.40 | 9,000 | 3.0 |" in text
    assert text.endswith("| trigram | | | | 1.800 | | | |")


def test_speed_table_has_every_cell():
    cells = itertools.product(
        (50304, 8192), ("crate", "gpt2"), ("bfloat16", "float32"), ("off", "on")
    )
    rows = [
        {"ids": v, "model": k, "dtype": t, "compile": c, "tokens_per_s": 1000 * (i + 1)}
        for i, (v, k, t, c) in enumerate(cells)
    ]
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
    side = "2 | 0.50x | 1.50x |  |"
    assert tables.bench({"rows": rows}).splitlines()[2:] == [f"| mssa 8192x128 | {side} {side}"]


def test_ladder_goes_from_naive_to_fast():
    rows = [
        {
            "name": f"ista_step 8x2 {dtype} {version} forward",
            "ms": {"fused": {"median": ms}, "eager": {"median": 3.0}},
        }
        for dtype in ("bfloat16", "float32")
        for version, ms in (("naive", 6.0), ("avx2", 2.0))
    ]
    line = "6 (0.50x) | 2 (1.50x) |"
    assert tables.ladder({"rows": rows}).splitlines() == [
        "| ms | naive | avx2 |",
        "|---|---|---|",
        f"| bfloat16 | {line}",
        f"| float32 | {line}",
    ]

"""Three studies of training: default, deps and speed, to the files of these names in results/.

Every run is `train.py` itself in a process of its own, so that what is measured is what a user
gets. A finished run is kept until the commit changes.
"""

import csv
import gzip
import itertools
import json
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from crate_mini import UserError, results
from crate_mini.cli import setting
from crate_mini.console import terminal
from crate_mini.console.terminal import Command
from crate_mini.data.batches import open_corpus
from crate_mini.data.tokenizer import load_tokenizer
from crate_mini.model import LM, preset
from crate_mini.studies import tables
from crate_mini.studies.runner import Runner, absolute, default_run, run_script
from crate_mini.training import checkpoint, device, loss_curve
from crate_mini.training.settings import Settings as TrainSettings

MODELS = tuple(tables.NAMES)
SEEDS = (1337, 1338, 1339)
CPU = torch.device("cpu")


@dataclass
class Default:
    """Train CRATE, crate+ and the GPT-2 twin with three seeds each, as `train.py` does by default.

    gzip and trigram models of the same text are the baselines. Writes results/default.json and
    default.png.
    """


@dataclass
class Deps:
    """Do docstrings of numpy, torch and matplotlib make a better model in the same time?

    Both models are judged on the held-out text of pydocs alone. Writes results/deps.json.
    """


@dataclass
class Speed:
    """How many tokens per second train.py reaches at 3L: CRATE and its twin, eager and compiled.

    In bf16 and fp32, on a text with a large vocabulary and on pydocs with 8,192 ids; and next to a
    bare training loop. Writes results/speed.json.
    """

    text: str | None = setting(None, "a text like wiki.txt.xz")
    ranks: str | None = setting(None, "a tokenizer of 50,304 ids for it, like gpt2.tiktoken")


# ---- default -------------------------------------------------------------------------------------


def run_default(settings):
    """Train the models, write results/default.json and .png, print the table."""
    runner = Runner("default", len(SEEDS) * len(MODELS), this_commit=True)
    grid = itertools.product(SEEDS, MODELS)
    runs = [train(runner, default_run(kind, seed), kind, seed) for seed, kind in grid]
    study = {
        "command": "python -m crate_mini.studies default",
        "seeds": SEEDS,
        "machine": device.machine(CPU),
        "baselines_bits_per_byte": baselines(),
        "runs": runs,
    }
    path = results.write_json(results.ROOT / "results" / "default.json", study)
    logs = {}
    for kind, name in tables.NAMES.items():
        logs[name] = [default_run(kind, seed) / "log.csv" for seed in SEEDS]
    loss_curve.loss_curves(logs, path.with_suffix(".png"))
    print(f"\n{tables.default(study)}")


def train(runner, folder, kind, seed, *flags):
    """Train a model, unless it was at this commit; returns what default.json keeps of the run."""
    flags = ["--model", kind, "--seed", seed, "--log-sparsity", *flags]
    record = runner.part(folder, "train.py", "--overwrite", *flags)
    meta = results.read_json(folder / "last" / "config.json")["training"]
    with open(folder / "log.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    output = folder.with_name(f"{folder.name}.log").read_text()
    sample = output.partition("\nsample    ")[2].partition("\nresult ")[0]
    backend = next(line for line in output.splitlines() if line.startswith("backend"))
    return {
        "model": kind,
        "seed": seed,
        "minutes": round(record["seconds"] / 60, 2),
        "val_loss": meta["val_loss"],
        "bits_per_byte": meta["bits_per_byte"],
        "density": meta["density"],
        "tokens": int(last["tokens"]),
        "tokens_per_s": int(last["tokens_per_s"]),
        "backend": backend.split()[1],
        "machine": meta["machine"],
        "sample": sample.strip(),
    }


def baselines(source="pydocs", spec="pydocs:4095"):
    """Bits per byte of the held-out text by gzip -9, and by trigrams of the training text."""
    tokenizer = load_tokenizer(spec)
    corpus = open_corpus(source, tokenizer, log=quiet)
    ids = {split: all_ids(corpus, split) for split in ("train", "val")}
    text, letters = {}, {}
    for split, row in ids.items():
        words = (tokenizer.token_bytes(int(i)) for i in row if i != tokenizer.eot)
        text[split] = b"".join(words)
        letters[split] = np.frombuffer(text[split], np.uint8)
    by_byte = trigram_bits(letters["train"], letters["val"], 256)
    by_token = trigram_bits(ids["train"], ids["val"], tokenizer.vocab_size)
    return {
        "gzip -9": 8 * len(gzip.compress(text["val"], 9)) / len(text["val"]),
        "trigram of bytes (Kneser-Ney)": by_byte,
        "trigram of the same tokens (Kneser-Ney)": by_token
        * (len(ids["val"]) / corpus.n_bytes["val"]),
    }


def quiet(*words):
    """Print nothing: the `log` of what need not be seen."""


def all_ids(corpus, split):
    """The ids of a split as one array."""
    blocks = list(corpus.blocks(split, 64, 1024))
    first = blocks[0][0].flatten()[:1]
    return torch.cat([first, *(y.flatten() for _, y in blocks)]).numpy()


def trigram_bits(train, held, vocab, discount=0.75):
    """Bits per token of `held` under an interpolated Kneser-Ney trigram model of `train`.

    Both are arrays of ids below `vocab`. Chen & Goodman 1998, one discount D:
    p(w | uv) = (c(uvw) - D)+ / c(uv) + D n(uv) / c(uv) p(w | v), where lower orders count distinct
    left neighbours instead of occurrences and the last falls back to 1 / V.
    """
    seen = [np.unique(ngrams(train, n, vocab), return_counts=True) for n in (1, 2, 3)]
    probability = np.full(len(held), 1.0 / vocab)
    for n in (1, 2, 3):
        if n == 3:
            keys, counts = seen[2]
        else:  # how many different tokens were seen before this n-gram
            keys, counts = np.unique(seen[n][0] % vocab**n, return_counts=True)
        contexts, first = np.unique(keys // vocab, return_index=True)
        totals = np.add.reduceat(counts, first)
        followers = np.diff([*first, len(keys)])  # different tokens seen after a context
        padded = np.concatenate([np.zeros(n - 1, np.int64), held])
        wanted = ngrams(padded, n, vocab)
        row, known = find(keys, wanted)
        count = np.where(known, counts[row], 0)
        row, known = find(contexts, wanted // vocab)
        mass = np.maximum(count - discount, 0) + discount * followers[row] * probability
        probability = np.where(known, mass / totals[row], probability)
    return float(-np.log2(probability).mean())


def ngrams(ids, n, vocab):
    """Each n ids in a row as one number, its digits in base `vocab`; int64."""
    length = len(ids) - n + 1
    keys = np.zeros(length, np.int64)
    for i in range(n):
        keys = keys * vocab + ids[i : i + length]
    return keys


def find(keys, wanted):
    """(row in the sorted keys, whether it is there) of each wanted key."""
    rows = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return rows, keys[rows] == wanted


# ---- deps ----------------------------------------------------------------------------------------


def run_deps(settings):
    """Train on both corpora, write results/deps.json, print the bits per byte."""
    seed = SEEDS[0]
    runner = Runner("deps", 2, this_commit=True)
    sources = {  # a run of `default` is used again
        "pydocs": (default_run("crate", seed), ()),
        "pydocs+deps": (default_run("crate", seed).with_name("deps"), ("--data", "pydocs+deps")),
    }
    runs, bits = [], {}
    for source, (folder, flags) in sources.items():
        runs.append(train(runner, folder, "crate", seed, *flags))
        bits[source] = held_out_bits(folder / "last", "pydocs")
    study = {
        "command": "python -m crate_mini.studies deps",
        "seeds": [seed],
        "bits_per_byte_of_pydocs": bits,
        "machine": device.machine(CPU),
        "tokens": runs[0]["tokens"],
    }
    results.write_json(results.ROOT / "results" / "deps.json", study)
    print(f"\n{json.dumps(bits)}")


@torch.no_grad()
def held_out_bits(path, source):
    """Bits per byte of a checkpoint on the held-out part of a corpus, in train.py's own dtype."""
    lm, meta = checkpoint.load(path)
    tokenizer = load_tokenizer(meta["tokenizer"]["spec"])
    corpus = open_corpus(source, tokenizer, log=quiet)
    dtype, _ = device.choose_dtype(CPU)
    total, count = 0.0, 0
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        for x, y in corpus.blocks("val", 16, lm.config.block_size):
            total += lm(x, y).item() * y.numel()
            count += y.numel()
    bits_per_token = total / count / math.log(2)
    return bits_per_token * corpus.n_tokens["val"] / corpus.n_bytes["val"]


# ---- speed ---------------------------------------------------------------------------------------


def run_speed(settings):
    """Time train.py in every setting, write results/speed.json, print the table.

    Raises UserError without a text and ranks.
    """
    if settings.text is None or settings.ranks is None:
        raise UserError(
            "give a text and the ranks of a tokenizer: "
            "`python -m crate_mini.studies speed wiki.txt.xz gpt2.tiktoken`."
        )
    large = (50304, absolute(settings.text), absolute(settings.ranks))
    small = (8192, "pydocs", "pydocs")
    modes, dtypes = ("off", "on"), ("bfloat16", "float32")
    cells = list(itertools.product((large, small), modes, dtypes, ("crate", "gpt2")))
    rows = []
    for (ids, text, spec), mode, dtype, kind in terminal.track(cells, "speed", 0):
        rate = train_rate(text, spec, mode, dtype, kind)
        row = {"ids": ids, "model": kind, "dtype": dtype, "compile": mode, "tokens_per_s": rate}
        rows.append(row)
    ours, bare = [], []
    for _ in terminal.track(range(3), "loop", 0):  # in turns, so that a busy moment hits both
        ours.append(train_rate("pydocs", "pydocs", "off", "bfloat16", "crate"))
        bare.append(bare_loop())
    ratio = statistics.median(a / b for a, b in zip(ours, bare))
    study = {
        "command": "python -m crate_mini.studies speed TEXT RANKS",
        "seeds": [TrainSettings.seed],
        "text": Path(settings.text).name,
        "machine": device.machine(CPU),
        "rows": rows,
        "loop": {"train.py": ours, "bare": bare, "ratio": round(ratio, 3)},
    }
    results.write_json(results.ROOT / "results" / "speed.json", study)
    print(f"\n{tables.speed(study)}")


def train_rate(text, spec, mode, dtype, kind, steps=14):
    """Tokens per second of train.py, from the median step of one short run."""
    folder = results.ROOT / "out" / "study" / "speed"
    flags = {
        "data": text,
        "tokenizer": spec,
        "model": kind,
        "dtype": dtype,
        "compile": mode,
        "out": folder,
        "train-steps": steps,
        "log-every": 1,
        "eval-every": 0,
        "eval-tokens": 256,
        "val-fraction": 0.01,
    }
    words = [f"--{name}={value}" for name, value in flags.items()]
    run_script(["train.py", *words, "--overwrite"], folder.with_suffix(".log"))
    with open(folder / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    rows.pop()  # the last row's time includes the validation
    ends = [int(row["tokens"]) / float(row["tokens_per_s"]) for row in rows]
    return round(4096 / statistics.median(np.diff(ends[1:])))


def bare_loop(steps=12):
    """Tokens per second of a loop that trains on one batch of 8,192 ids and does nothing else.

    Forward, backward, clipping and the optimizer's step: no trainer can be faster.
    """
    device.keep_memory()
    torch.manual_seed(0)
    lm = LM(preset("3L", "crate", vocab_size=8192, block_size=256))
    optimizer = torch.optim.AdamW(lm.parameters(), fused=True)
    ids = torch.randint(8192, (16, 257))
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = lm(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return round(4096 / statistics.median(seconds[2:]))


DEFAULT = Command(Default, run_default, checkpoint=False)
DEPS = Command(Deps, run_deps, checkpoint=False)
SPEED = Command(Speed, run_speed, checkpoint=False, positional=("text", "ranks"))

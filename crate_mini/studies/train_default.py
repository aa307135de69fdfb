"""`python -m crate_mini.studies.train_default NAME`: the grid behind a table of the README, kept in results/.

    default    the default run for CRATE, crate+ and the GPT-2 twin, three seeds each, beside gzip and a
               trigram model of the same text -> default.json, default.png
    deps       do docstrings of numpy, torch and matplotlib make a better model in the same time? -> deps.json
    speed TEXT RANKS    tokens/s of train.py at 3L on this text with these ranks, and with 8,192 ids, of CRATE
               and its twin, bf16 and fp32, eager and compiled; the same step in a bare loop -> speed.json

Every run is `train.py` itself in a process of its own, so that what is measured is what a user gets.
"""

import csv
import gzip
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from crate_mini import UserError, atomic_write, cli
from crate_mini.data import batches as data
from crate_mini.model import LM, preset
from crate_mini.studies import tables
from crate_mini.training import checkpoint
from crate_mini.training import device as machine
from crate_mini.training import loss_curve as report
from crate_mini.training.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
MODELS, SEEDS = tuple(tables.NAMES), (1337, 1338, 1339)


def trigram_bits(train, held, vocab, discount=0.75):
    """Bits per token of `held` under an interpolated Kneser-Ney trigram model of `train` (arrays of ids).

    Chen & Goodman 1998, one discount D: p(w | uv) = (c(uvw) - D)+ / c(uv) + D n(uv) / c(uv) p(w | v), where
    lower orders count distinct left neighbours instead of occurrences and the last falls back to 1 / V.
    """
    grams, probability = [], np.full(len(held), 1.0 / vocab)
    for n in (1, 2, 3):
        key = sum(
            train[i : len(train) - n + 1 + i].astype(np.int64) * vocab ** (n - 1 - i)
            for i in range(n)
        )
        grams.append(np.unique(key, return_counts=True))
    for n in (1, 2, 3):
        if n == 3:
            keys, counts = grams[2]
        else:  # how many different tokens were seen before this n-gram
            keys, counts = np.unique(grams[n][0] % vocab**n, return_counts=True)
        contexts, first = np.unique(keys // vocab, return_index=True)
        total, kinds = np.add.reduceat(counts, first), np.diff([*first, len(keys)])
        padded = np.concatenate([np.zeros(n - 1, np.int64), held.astype(np.int64)])
        key = sum(padded[i : i + len(held)] * vocab ** (n - 1 - i) for i in range(n))
        at = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
        count = np.where(keys[at] == key, counts[at], 0)
        at = np.minimum(np.searchsorted(contexts, key // vocab), len(contexts) - 1)
        seen = contexts[at] == key // vocab
        probability = np.where(
            seen,
            (np.maximum(count - discount, 0) + discount * kinds[at] * probability) / total[at],
            probability,
        )
    return float(-np.log2(probability).mean())


def baselines(source="pydocs", spec="pydocs:4095"):
    """Bits per byte of the held-out text: gzip -9 of it, and trigram models of the training text."""
    tokenizer = data.load_tokenizer(spec)
    corpus = data.open_corpus(source, tokenizer, log=lambda *words: None)
    ids = {}
    for split in ("train", "val"):
        blocks = list(corpus.blocks(split, 64, 1024))
        ids[split] = torch.cat(
            [blocks[0][0].flatten()[:1], *(y.flatten() for _, y in blocks)]
        ).numpy()
    text = {
        split: b"".join(tokenizer.token_bytes(int(i)) for i in row if i != tokenizer.eot)
        for split, row in ids.items()
    }
    letters = {split: np.frombuffer(row, np.uint8) for split, row in text.items()}
    scale = len(ids["val"]) / corpus.n_bytes["val"]
    return {
        "gzip -9": 8 * len(gzip.compress(text["val"], 9)) / len(text["val"]),
        "trigram of bytes (Kneser-Ney)": trigram_bits(letters["train"], letters["val"], 256),
        "trigram of the same tokens (Kneser-Ney)": trigram_bits(
            ids["train"], ids["val"], tokenizer.vocab_size
        )
        * scale,
    }


def default(out=ROOT / "out" / "study"):
    """Train every model with every seed (finished runs are kept); write results/default.json and .png."""
    runs, start = [], time.time()
    grid = [(kind, seed) for seed in SEEDS for kind in MODELS]
    for done, (kind, seed) in enumerate(grid):
        folder = out / f"{kind}-{seed}"
        flags = ["--model", kind, "--seed", str(seed), "--log-sparsity", "--out", str(folder)]
        eta = (
            f"ETA {(time.time() - start) / done * (len(grid) - done) / 60:.0f} min" if done else ""
        )
        print(f"[{done + 1}/{len(grid)}] python train.py {' '.join(flags[:-2])}  {eta}", flush=True)
        runs.append(one_run(folder, kind, seed, flags))
    found = {
        "command": "python -m crate_mini.studies.train_default default",
        "seeds": SEEDS,
        "machine": machine.describe(torch.device("cpu")),
        "baselines_bits_per_byte": baselines(),
        "runs": runs,
    }
    with atomic_write(ROOT / "results" / "default.json") as file:
        file.write(json.dumps(found, indent=1).encode() + b"\n")
    report.loss_curves(
        {tables.NAMES[k]: [out / f"{k}-{s}" / "log.csv" for s in SEEDS] for k in MODELS},
        ROOT / "results" / "default.png",
    )
    print(tables.default(found))


def deps(out=ROOT / "out" / "study"):
    """The default run on pydocs and on pydocs+deps, both judged by the held-out text of pydocs alone."""
    found = {
        "command": "python -m crate_mini.studies.train_default deps",
        "seeds": SEEDS[:1],
        "bits_per_byte_of_pydocs": {},
        "machine": machine.describe(torch.device("cpu")),
    }
    for source, name in (("pydocs", f"crate-{SEEDS[0]}"), ("pydocs+deps", "deps")):
        flags = ["--data", source, "--model", "crate", "--seed", str(SEEDS[0]), "--log-sparsity"]
        run = one_run(out / name, "crate", SEEDS[0], [*flags, "--out", str(out / name)])
        found["bits_per_byte_of_pydocs"][source] = held_out_bits(out / name / "last", "pydocs")
        found.setdefault("tokens", run["tokens"])
    with atomic_write(ROOT / "results" / "deps.json") as file:
        file.write(json.dumps(found, indent=1).encode() + b"\n")
    print(json.dumps(found["bits_per_byte_of_pydocs"]))


@torch.no_grad()
def held_out_bits(path, source):
    """Bits per byte of a checkpoint on the held-out split of a corpus, in the dtype that train.py chooses."""
    lm, meta = checkpoint.load(path)
    tokenizer = data.load_tokenizer(meta["tokenizer"]["spec"])
    corpus = data.open_corpus(source, tokenizer, log=lambda *words: None)
    dtype, total, count = machine.choose_dtype(torch.device("cpu"))[0], 0.0, 0
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        for x, y in corpus.blocks("val", 16, lm.config.block_size):
            total, count = total + lm(x, y).item() * y.numel(), count + y.numel()
    return total / count / math.log(2) * corpus.n_tokens["val"] / corpus.n_bytes["val"]


def speed(text, ranks, out=ROOT / "out" / "study" / "speed"):
    """Tokens/s of short runs of train.py, one after the other; and, taking turns, beside a bare loop."""
    found = {
        "command": "python -m crate_mini.studies.train_default speed TEXT RANKS",
        "seeds": [Settings.seed],
        "text": Path(text).name,
        "machine": machine.describe(torch.device("cpu")),
        "rows": [],
    }
    cells = itertools.product(
        (ranks, "pydocs"), ("off", "on"), ("bfloat16", "float32"), ("crate", "gpt2")
    )
    for spec, mode, dtype, kind in cells:
        found["rows"].append(
            {
                "ids": 50304 if spec == ranks else 8192,
                "model": kind,
                "dtype": dtype,
                "compile": mode,
                "tokens_per_s": train_rate(
                    out, text if spec == ranks else "pydocs", spec, mode, dtype, kind
                ),
            }
        )
        print(found["rows"][-1], flush=True)
    turns = [
        (train_rate(out, "pydocs", "pydocs", "off", "bfloat16", "crate"), bare_loop())
        for _ in range(3)
    ]
    found["loop"] = {
        "train.py": [a for a, _ in turns],
        "bare": [b for _, b in turns],
        "ratio": round(statistics.median(a / b for a, b in turns), 3),
    }
    with atomic_write(ROOT / "results" / "speed.json") as file:
        file.write(json.dumps(found, indent=1).encode() + b"\n")
    print(tables.speed(found))


def train_rate(out, text, spec, mode, dtype, kind, steps=14):
    """Tokens/s from the median step of one short run of train.py."""
    flags = {
        "data": text,
        "tokenizer": spec,
        "model": kind,
        "dtype": dtype,
        "compile": mode,
        "out": out,
        "train-steps": steps,
        "log-every": 1,
        "eval-every": 0,
        "eval-tokens": 256,
        "val-fraction": 0.01,
    }
    words = [f"--{name}={value}" for name, value in flags.items()]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *words, "--overwrite"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise UserError(f"train.py ended with code {done.returncode}; its message is above.")
    with open(out / "log.csv", newline="") as file:  # the last row's time includes the validation
        ends = [int(r["tokens"]) / float(r["tokens_per_s"]) for r in csv.DictReader(file)][:-1]
    return round(4096 / statistics.median(np.diff(ends[1:])))


def bare_loop(steps=12):
    """Tokens/s of forward, backward, clip, step on one batch of 8,192 ids with nothing around: what a trainer
    cannot beat."""
    machine.keep_memory()
    torch.manual_seed(0)
    lm = LM(preset("3L", "crate", vocab_size=8192, block_size=256))
    optimizer = torch.optim.AdamW(lm.parameters(), fused=True)
    ids, times = torch.randint(8192, (16, 257)), []
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    for _ in range(steps):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = lm(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return round(4096 / statistics.median(times[2:]))


def one_run(folder, kind, seed, flags):
    """Run train.py unless `folder` holds its result at this commit; returns what the table needs."""
    facts, now = folder / "facts.json", machine.commit()
    if not facts.exists() or json.loads(facts.read_text())["machine"]["commit"] != now:
        start = time.time()
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *flags, "--overwrite"],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        if done.returncode:
            raise UserError(
                f"`train.py {' '.join(flags)}` ended with code {done.returncode}, see above."
            )
        minutes = (time.time() - start) / 60
        meta = json.loads((folder / "last" / "config.json").read_text())["training"]
        with open(folder / "log.csv", newline="") as file:
            log = list(csv.DictReader(file))
        said = done.stdout.partition("\nsample    ")[2].partition("\nresult ")[0]
        found = {
            "model": kind,
            "seed": seed,
            "minutes": round(minutes, 2),
            "val_loss": meta["val_loss"],
            "bits_per_byte": meta["bits_per_byte"],
            "density": meta["density"],
            "tokens": int(log[-1]["tokens"]),
            "tokens_per_s": int(log[-1]["tokens_per_s"]),
            "backend": next(w for w in done.stdout.splitlines() if w.startswith("backend")).split()[
                1
            ],
            "machine": meta["machine"],
            "sample": said.strip(),
        }
        with atomic_write(facts) as file:
            file.write(json.dumps(found).encode())
    return json.loads(facts.read_text())


def main():
    name, *rest = sys.argv[1:] or [""]
    if name in ("default", "deps") and not rest or name == "speed" and len(rest) == 2:
        globals()[name](*rest)
    else:
        raise UserError(
            "name a study, default, deps or speed TEXT RANKS: "
            "`python -m crate_mini.studies.train_default default`."
        )


if __name__ == "__main__":
    cli.run(main)

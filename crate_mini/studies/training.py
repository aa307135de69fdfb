"""Two studies of training: deps and speed, to the files of these names in results/.

Every run is `train.py` itself in a process of its own, so that what is measured is what a user
gets. A finished run is kept until the commit changes.
"""

import csv
import itertools
import json
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from crate_mini import UserError
from crate_mini.cli import setting
from crate_mini.console import results, terminal
from crate_mini.console.terminal import Command
from crate_mini.data.batches import open_corpus
from crate_mini.data.tokenizer import load_tokenizer
from crate_mini.model import LM, preset
from crate_mini.studies import tables
from crate_mini.studies.baselines import quiet
from crate_mini.studies.runner import Runner, absolute, run_script
from crate_mini.training import checkpoint, device
from crate_mini.training.settings import Settings as TrainSettings

SEED = 1337
CPU = torch.device("cpu")


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


# ---- deps ----------------------------------------------------------------------------------------


def run_deps(settings):
    """Train on both corpora, write results/deps.json, print the bits per byte."""
    runner = Runner("deps", 2, this_commit=True)
    bits = {}
    for source in ("pydocs", "pydocs+deps"):
        folder = results.ROOT / "out" / "deps" / source
        runner.part(folder, "train.py", "--overwrite", "--seed", SEED, "--data", source)
        bits[source] = held_out_bits(folder / "last", "pydocs")
    with open(folder / "log.csv", newline="") as file:
        tokens = int(list(csv.DictReader(file))[-1]["tokens"])
    study = {
        "command": "python -m crate_mini.studies deps",
        "seeds": [SEED],
        "bits_per_byte_of_pydocs": bits,
        "machine": device.machine(CPU),
        "tokens": tokens,
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
    results.ready_folder(results.ROOT / "results")
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
    # After n steps, the first of which does not count, a rate is the mean over n - 1.
    ends = [n * 4096 / float(row["tokens_per_s"]) for n, row in enumerate(rows[1:], 1)]
    return round(4096 / statistics.median(np.diff(ends)))


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


DEPS = Command(Deps, run_deps, checkpoint=False)
SPEED = Command(Speed, run_speed, checkpoint=False, positional=("text", "ranks"))

"""Fine-tune a checkpoint with a linear head on the last token (classifier.py) on labelled texts.

`python train.py --task classify --init out/crate-3L/last --data reviews.jsonl --out out/reviews`
"""

import math
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from crate_mini import UserError, cli
from crate_mini.concepts import labelled_texts as labelled
from crate_mini.concepts.classifier import Classifier, accuracy, batches, encode, logits, save
from crate_mini.concepts.types import SPLITS
from crate_mini.data import batches as data
from crate_mini.training import checkpoint
from crate_mini.training import device as machine
from crate_mini.training import run_log as progress


@dataclass
class Settings:
    """Fine-tune a checkpoint to tell the classes of labelled texts, by a linear head on the last token."""

    init: str = ""  # checkpoint to start from, ours or foreign
    data: str = ""  # labelled texts: .jsonl or .csv with text and label, a folder of classes, or
    # bbc; eraser-movie, jigsaw, ag_news say where to get them
    names: str = ""  # of the classes, comma-separated, in the sorted order of their labels
    texts: int = 4000  # at most, equally many of each class (0: all)
    length: int = 128  # tokens of a text, the two marks around it included
    cut: str = "start"  # start | end: the part that is kept of a longer text
    epochs: int = 4  # over the training texts; the best by accuracy on the stop split is kept
    batch: int = 32  # texts a step
    lr: float = 1e-3  # peak learning rate; linear warm-up over a tenth, then linear to 0
    weight_decay: float = 0.01  # AdamW's
    seed: int = 1337  # of the texts, their split, the head, the order
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    out: str = "out/classifier"  # folder of the run: the classifier is in `last` below it
    overwrite: bool = False  # replace the run that --out already holds

    def check(self):
        """Raise UserError for a value that no run can have."""
        if not self.init or not self.data:
            raise UserError(
                "a classifier starts from a checkpoint and labelled texts: `python train.py "
                "--task classify --init out/crate-3L/last --data reviews.jsonl`."
            )
        for name, least in (("texts", 0), ("length", 4), ("epochs", 1), ("batch", 1), ("seed", 0)):
            if not least <= getattr(self, name) < 2**31:
                raise UserError(
                    f"--{name} {getattr(self, name)} must lie in {least} to 2147483647; leave it "
                    "out for the default."
                )
        if not 0 < self.lr < 10 or not 0 <= self.weight_decay < 10:
            raise UserError(
                f"--lr {self.lr} must be above 0 and --weight-decay {self.weight_decay} not "
                "below, both below 10; leave them out."
            )
        if self.cut not in ("start", "end"):
            raise UserError(f"--cut {self.cut!r} is unknown; choose start or end.")
        if not self.overwrite and Path(self.out, "last", "config.json").exists():
            raise UserError(
                f"{self.out} already holds a run; choose another --out, or replace it with "
                "--overwrite."
            )


def fit(model, ids, lengths, label, split, s, log=print):
    """Fine-tune all weights by cross-entropy on the train rows; the weights of the best epoch stay.

    label, split (S,) tensors; returns the epochs' losses and accuracies on the stop rows. Raises UserError
    for a loss that is not finite.
    """
    train, stop = ((split == SPLITS[name]).nonzero()[:, 0] for name in ("train", "stop"))
    dtype, _ = machine.choose_dtype(model.head.weight.device)
    device, order = model.head.weight.device, torch.Generator().manual_seed(s.seed)
    steps = s.epochs * math.ceil(len(train) / s.batch)
    optimizer = torch.optim.AdamW(model.parameters(), s.lr, weight_decay=s.weight_decay)
    warm = max(1, steps // 10)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, (steps - i) / max(1, steps - warm))
    )
    history, best, began = [], (-1.0,), time.monotonic()
    for epoch in range(s.epochs):
        model.train()
        losses = []
        for part, T in batches(
            train[torch.randperm(len(train), generator=order)], lengths, s.batch
        ):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                found = model(ids[part, :T].to(device), lengths[part])
            loss = F.cross_entropy(found.float(), label[part].to(device))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
            losses.append(loss.item())
        if not math.isfinite(sum(losses)):
            raise UserError(
                f"loss {losses[-1]} in epoch {epoch + 1} at learning rate {s.lr}; lower --lr."
            )
        model.eval()
        found = logits(model, ids, lengths, stop)
        score = (
            accuracy(found, label[stop])["accuracy"],
            -F.cross_entropy(found, label[stop]).item(),
        )
        history.append(
            {"loss": float(np.mean(losses)), "stop_accuracy": score[0], "stop_loss": -score[1]}
        )
        if score > best:
            best, weights = score, {k: v.clone() for k, v in model.state_dict().items()}
        left = (time.monotonic() - began) / (epoch + 1) * (s.epochs - epoch - 1)
        log(
            f"epoch {epoch + 1}/{s.epochs}  loss {history[-1]['loss']:.4f}  stop accuracy {score[0]:.3f}  "
            f"ETA {int(left) // 60}:{int(left) % 60:02d}"
        )
    model.load_state_dict(weights)
    return history


def unseen(ids, split):
    """(n,) rows of the test texts that read otherwise than all others that training saw, cut as they are.

    News are printed again with another beginning or end. Raises UserError if there are none.
    """
    seen = {tuple(row) for row in ids[split != SPLITS["test"]].tolist()}
    rows = torch.tensor(
        [
            i
            for i in (split == SPLITS["test"]).nonzero()[:, 0].tolist()
            if tuple(ids[i].tolist()) not in seen
        ],
        dtype=torch.int64,
    )
    if not len(rows):
        raise UserError(
            f"at {ids.shape[1]} tokens all test texts read like others; raise --length."
        )
    return rows


def texts_of(facts):
    """The Labelled that a classifier's settings name; UserError if its texts are others now."""
    s = facts["settings"]
    found = labelled.load(
        s["data"], s["texts"], s["seed"], s["names"].split(",") if s["names"] else None
    )
    if found.facts["sha256"] != facts["labelled"]["sha256"]:
        raise UserError(
            f"{s['data']} holds other texts than the classifier has seen; fine-tune it again."
        )
    return found


def run(s, log=print):
    """What train.py --task classify does; s: Settings. Returns the facts that the checkpoint keeps."""
    s.check()
    device = machine.choose_device(s.device)
    found = labelled.load(s.data, s.texts, s.seed, s.names.split(",") if s.names else None)
    lm, meta = checkpoint.load(s.init, device)
    tokenizer = data.load_tokenizer(meta["tokenizer"]["spec"])
    checkpoint.check_tokenizer(meta, tokenizer)
    if s.length > lm.config.block_size:
        raise UserError(
            f"--length {s.length} is more than the model's context of {lm.config.block_size}."
        )
    ids, lengths = encode(tokenizer, found.texts, s.length, s.cut)
    label, split = torch.from_numpy(found.label), torch.from_numpy(found.split)
    model = Classifier(lm, len(found.classes), torch.Generator().manual_seed(s.seed)).to(device)
    cut = (lengths == s.length).float().mean()
    rows = unseen(ids, split)
    known = int((split == SPLITS["test"]).sum()) - len(rows)
    log(
        f"texts     {len(label):,}, {cut:.0%} of them cut: {found.facts['texts']}"
        + (
            f"\nnote      {known} test texts read like training texts and do not count"
            if known
            else ""
        )
    )
    history = fit(model, ids, lengths, label, split, s, log)
    test = accuracy(logits(model, ids, lengths, rows), label[rows])
    facts = {
        "settings": {**asdict(s), "out": None},
        "labelled": found.facts,
        "epochs": history,
        "test": test,
        "start": {"path": s.init, "sha256": meta.get("files", {}).get("weights", {}).get("sha256")},
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine.describe(device),
    }
    save(Path(s.out, "last"), model, meta, facts)
    low, high = test["ci95"]
    log(
        f"result    accuracy {test['accuracy']:.3f} on {test['n']} test texts (95 %: {low:.3f} to "
        f"{high:.3f}; chance {test['chance']:.3f})\nfiles     {Path(s.out, 'last')}"
    )
    return facts


def task(argv):
    """(what --task names, lm by default; the other words). Raises UserError for a task that is unknown."""
    found, rest = "lm", []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name == "--task":
            found = value if equals else next(words, "")
        else:
            rest.append(word)
    if found not in ("lm", "classify"):
        raise UserError(f"--task {found!r} is unknown; choose lm, a language model, or classify.")
    return found, rest


def main(argv):
    """The command line of train.py --task classify."""
    parser = cli.Parser(prog="train.py --task classify", description=Settings.__doc__)
    cli.add_fields(parser, Settings, "settings")
    s = Settings(**vars(parser.parse_args(argv)))
    with progress.claim(s.out):  # before the work, not after it
        run(s)
    return 0

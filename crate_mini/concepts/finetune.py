"""Fine-tune a checkpoint, with a linear head on the last token, on labelled texts.

`python train.py --task classify --init out/crate-3L/last --data reviews.jsonl --out out/reviews`
"""

import math
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from crate_mini import UserError, cli
from crate_mini.cli import setting
from crate_mini.concepts import labelled_texts
from crate_mini.concepts.classifier import Classifier, accuracy, batches, encode, logits, save
from crate_mini.concepts.types import SPLITS
from crate_mini.console import results, terminal
from crate_mini.training import checkpoint, run_log
from crate_mini.training.device import choose_device, choose_dtype, machine

CLIP = 1.0  # largest norm of the gradient


@dataclass
class Settings:
    """Fine-tune a checkpoint to classify labelled texts, with a linear head on the last token."""

    init: str = setting("", "checkpoint to start from, of crate_mini or of another project")
    data: str = setting(
        "",
        "labelled texts: a .jsonl or .csv file with text and label, a folder of classes, or bbc; "
        "eraser-movie, jigsaw and ag_news print where to download them",
    )
    names: str = setting(
        "", "names of the classes, separated by commas, in the sorted order of their labels"
    )
    texts: int = setting(4000, "maximum number of texts, equally many of each class; 0: all")
    length: int = setting(128, "maximum tokens of a text, including the mark at each end", low=4)
    cut: str = setting("start", "which part of a longer text to keep", choices=("start", "end"))
    epochs: int = setting(
        4, "passes over the training texts; the best by the stop split is kept", low=1
    )
    batch: int = setting(32, "texts per step", low=1)
    lr: float = setting(
        1e-3,
        "peak learning rate, after linear warm-up over a tenth of the steps; then linear to 0",
        above=0,
        below=10,
    )
    weight_decay: float = setting(0.01, "weight decay of AdamW", below=10)
    seed: int = setting(1337, "seed of the choice of texts, their split, the head and the order")
    tokenizer: str | None = checkpoint.tokenizer_setting()
    device: str = checkpoint.device_setting()
    out: str = setting("out/classifier", "folder of the run; the classifier goes to `last` in it")
    overwrite: bool = setting(False, "replace the run that --out already holds")


def run(settings):
    """Fine-tune in a folder that no other process is training in."""
    with run_log.claim(settings.out):  # a folder that cannot be written fails before the work
        facts = finetune(settings)
    return 128 + signal.SIGINT if len(facts["epochs"]) < settings.epochs else 0


def finetune(settings, log=print):
    """Train, judge on the test texts, save. Returns the facts that the checkpoint keeps.

    SIGINT and SIGTERM end the training; the best of the finished epochs is judged and saved.
    """
    check(settings)
    device = choose_device(settings.device)
    labelled = load_texts(settings.data, settings.texts, settings.seed, settings.names)
    lm, meta = checkpoint.load(settings.init, device)
    tokenizer = checkpoint.open_tokenizer(settings.init, meta, settings.tokenizer)
    if settings.length > lm.config.block_size:
        raise UserError(
            f"--length {settings.length} is more than the model's context of "
            f"{lm.config.block_size}."
        )
    if not settings.overwrite and Path(settings.out, "last", "config.json").exists():
        raise UserError(
            f"{settings.out} already holds a run; choose another --out, or replace it with "
            "--overwrite."
        )
    ids, lengths = encode(tokenizer, labelled.texts, settings.length, settings.cut)
    label = torch.from_numpy(labelled.label)
    split = torch.from_numpy(labelled.split)
    generator = torch.Generator().manual_seed(settings.seed)
    model = Classifier(lm, len(labelled.classes), generator).to(device)
    rows = unseen(ids, split)
    log(introduction(labelled, lengths == settings.length, len(rows)))
    history = fit(model, ids, lengths, label, split, settings, log)
    test = accuracy(logits(model, ids, lengths, rows), label[rows])
    start = meta.get("files", {}).get("weights", {}).get("sha256")
    facts = {
        "settings": {**asdict(settings), "out": None},
        "labelled": labelled.facts,
        "epochs": history,
        "test": test,
        "start": {"path": settings.init, "sha256": start},
        "command": results.command("train.py"),
        "machine": machine(device),
    }
    folder = Path(settings.out, "last")
    save(folder, model, meta, facts)
    low, high = test["ci95"]
    log(
        f"result    accuracy {test['accuracy']:.3f} on {test['n']} test texts "
        f"(95 %: {low:.3f} to {high:.3f}; chance {test['chance']:.3f})\nfiles     {folder}"
    )
    return facts


def check(settings):
    """Raise UserError for settings that no run can have."""
    cli.check(settings)
    if not settings.init or not settings.data:
        raise UserError(
            "a classifier starts from a checkpoint and labelled texts: `python train.py "
            "--task classify --init out/crate-3L/last --data reviews.jsonl`."
        )


def introduction(labelled, full, n_unseen):
    """The texts of a run, in words. full: (S,) bool, which have the full length."""
    lines = [
        f"texts     {len(labelled.texts):,}, {full.float().mean():.0%} of them cut: "
        f"{labelled.facts['texts']}"
    ]
    n_seen = int((labelled.split == SPLITS["test"]).sum()) - n_unseen
    if n_seen:
        lines.append(f"note      {n_seen} test texts equal others once cut, and do not count")
    return "\n".join(lines)


# ---- texts ---------------------------------------------------------------------------------------


def load_texts(source, limit, seed, names):
    """The Labelled of a source; names: of the classes, separated by commas, or an empty string."""
    return labelled_texts.load(source, limit, seed, names.split(",") if names else None)


def texts_of(facts):
    """The Labelled that a classifier was trained on. Raises UserError if its texts have changed."""
    settings = facts["settings"]
    names = ("data", "texts", "seed", "names")
    labelled = load_texts(*[settings[name] for name in names])
    if labelled.facts["sha256"] != facts["labelled"]["sha256"]:
        raise UserError(
            f"{settings['data']} holds other texts than the classifier was trained on; fine-tune "
            "it again."
        )
    return labelled


def unseen(ids, split):
    """(n,) rows of the test texts whose ids differ from those of every train and stop text.

    News are printed again with another beginning or end, so that after truncation a test text may
    equal a training text. Raises UserError if no row is left.
    """
    test = split == SPLITS["test"]
    seen = {tuple(row) for row in ids[~test].tolist()}
    candidates = test.nonzero()[:, 0].tolist()
    rows = [i for i in candidates if tuple(ids[i].tolist()) not in seen]
    if not rows:
        raise UserError(
            f"at {ids.shape[1]} tokens every test text equals a training text; raise --length."
        )
    return torch.tensor(rows)


# ---- training ------------------------------------------------------------------------------------


def fit(model, ids, lengths, label, split, settings, log=print):
    """Train all weights by cross-entropy on the train rows; the best epoch's weights stay.

    ids (S, T); lengths, label and split (S,). The best epoch has the highest accuracy on the stop
    rows and, among equals, the lowest loss there. Returns losses and accuracies by epoch, fewer
    after SIGINT or SIGTERM. Raises UserError for a loss that is not finite.
    """
    train, stop = ((split == SPLITS[name]).nonzero()[:, 0] for name in ("train", "stop"))
    steps = settings.epochs * math.ceil(len(train) / settings.batch)
    decay = settings.weight_decay
    optimizer = torch.optim.AdamW(model.parameters(), settings.lr, weight_decay=decay)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, linear_schedule(steps))
    dtype, _ = choose_dtype(model.head.weight.device)
    order = torch.Generator().manual_seed(settings.seed)
    start = time.monotonic()
    history, best = [], None
    with terminal.StopRequest("finishing this step, then saving the best epoch") as request:
        for epoch in range(settings.epochs):
            model.train()
            losses = []
            shuffled = train[torch.randperm(len(train), generator=order)]
            for rows, T in batches(shuffled, lengths, settings.batch):
                loss = training_loss(model, ids[rows, :T], lengths[rows], label[rows], dtype)
                step(model, loss, optimizer, rate)
                losses.append(loss.item())
                if request.caught:
                    break
            if request.caught:
                log(stopped_line(history, settings.epochs))
                break
            if not math.isfinite(sum(losses)):
                raise UserError(
                    f"loss {losses[-1]} in epoch {epoch + 1} at learning rate {settings.lr}; lower "
                    "--lr."
                )
            scores = stop_scores(model, ids, lengths, label, stop)
            history.append({"loss": float(np.mean(losses)), **scores})
            rank = (scores["stop_accuracy"], -scores["stop_loss"])
            if best is None or rank > best:
                best = rank
                weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            log(epoch_line(history, settings.epochs, time.monotonic() - start))
    model.load_state_dict(weights)
    model.eval()
    return history


def stop_scores(model, ids, lengths, label, rows):
    """{"stop_accuracy", "stop_loss"} on the stop rows; the model is in eval mode afterwards."""
    model.eval()
    stop_logits = logits(model, ids, lengths, rows)
    return {
        "stop_accuracy": accuracy(stop_logits, label[rows])["accuracy"],
        "stop_loss": F.cross_entropy(stop_logits, label[rows]).item(),
    }


def stopped_line(history, epochs):
    """What a signal in the epoch after `history` leaves. Raises UserError if that is nothing."""
    if not history:
        raise UserError(
            "stopped within the first epoch, so there is nothing to save; run the same command to "
            "start again."
        )
    return (
        f"stopped in epoch {len(history) + 1}/{epochs}, which is lost; the best epoch before it is "
        "kept"
    )


def linear_schedule(steps):
    """A function: the learning rate at a step, as a share of its peak."""
    warmup = max(1, steps // 10)
    decay = max(1, steps - warmup)

    def share(step):
        return min((step + 1) / warmup, (steps - step) / decay)

    return share


def training_loss(model, ids, lengths, label, dtype):
    """Mean cross-entropy of a batch: ids (B, T), lengths (B,), label (B,)."""
    device = model.head.weight.device
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        batch_logits = model(ids.to(device), lengths)
    return F.cross_entropy(batch_logits.float(), label.to(device))


def step(model, loss, optimizer, rate):
    """One step of the optimizer and of its learning rate."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    rate.step()


def epoch_line(history, epochs, seconds):
    """The progress line of the last epoch in `history`."""
    done, last = len(history), history[-1]
    remaining = seconds / done * (epochs - done)
    return (
        f"epoch {done}/{epochs}  loss {last['loss']:.4f}  "
        f"stop accuracy {last['stop_accuracy']:.3f}  ETA {terminal.eta(remaining)}"
    )


# ---- the command line ----------------------------------------------------------------------------


def main(words):
    """Run `train.py --task classify`; words: of its command line, without the task."""
    return terminal.run_command("train.py --task classify", COMMAND, words)


COMMAND = terminal.Command(Settings, run, checkpoint=False)

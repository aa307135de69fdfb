"""A checkpoint of ours with a linear head on the last token: the model, its rows of ids, its files.

ids of a text    <|endoftext|>, its tokens, <|endoftext|>: the head reads the state at the last one, which
                 has seen all others (as an encoder's [CLS]); the first takes the place that attention
                 falls back on. Rows are padded on the right, where a causal model does not look.
checkpoint       a folder like any other (checkpoint.py), so that layers, neurons, steering work on it,
                 and head-<sha256>.pt beside the weights; config.json names it under training.classifier
"""

from pathlib import Path

import torch
import torch.nn as nn

from crate_mini import UserError
from crate_mini.neurons.survey import wilson
from crate_mini.training import checkpoint


class Classifier(nn.Module):
    """An LM and a head (C classes). Layer l of its states: 0 the embeddings, l the stream after block l, all
    of them before the final LayerNorm."""

    def __init__(self, lm, n_classes, generator=None):
        super().__init__()
        self.lm, self.head = lm, nn.Linear(lm.config.n_embd, n_classes)
        with torch.no_grad():
            self.head.weight.normal_(0, 0.02, generator=generator)
            self.head.bias.zero_()

    def states(self, ids, layer=None):
        """Stream (B, T, d) after block `layer`, or of layers 0 .. L stacked: (L + 1, B, T, d)."""
        z = self.lm.tokens(ids) + self.lm.positions.weight[: ids.shape[1]]
        found = [z]
        for block in self.lm.blocks[:layer]:
            z, _ = block(z)
            found.append(z)
        return torch.stack(found) if layer is None else z

    def onward(self, z, layer, lengths):
        """From the stream z (B, T, d) after block `layer`: (logits (B, C), what the head reads (B, d))."""
        for block in self.lm.blocks[layer:]:
            z, _ = block(z)
        x = self.lm.norm(z[torch.arange(len(z), device=z.device), lengths.to(z.device) - 1])
        return self.head(x), x

    def forward(self, ids, lengths):
        """Logits (B, C) of ids (B, T), of which the first `lengths` (B,) of each row are real."""
        return self.onward(self.states(ids, 0), 0, lengths)[0]


def pad(rows, fill):
    """(ids (S, T) int64, lengths (S,)) of lists of ids."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), fill)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids, lengths


def kept(body, length, cut):
    """What is kept of a text's tokens (or of anything that stands for them) beside the two marks."""
    return body[: length - 2] if cut == "start" else body[max(0, len(body) - length + 2) :]


def encode(tokenizer, texts, length, cut):
    """(ids, lengths) of texts, as the head of this file says."""
    bodies = [kept(body.tolist(), length, cut) for body in tokenizer.encode_batch(texts)]
    return pad([[tokenizer.eot, *body, tokenizer.eot] for body in bodies], tokenizer.eot)


def batches(rows, lengths, size):
    """Rows (indices) in batches, each with the longest of its texts: (indices, T)."""
    for part in torch.as_tensor(rows).split(size):
        yield part, int(lengths[part].max())


@torch.no_grad()
def logits(model, ids, lengths, rows, size=64):
    """Logits (len(rows), C) of those rows, on the CPU."""
    device = model.head.weight.device
    return torch.cat(
        [
            model(ids[part, :T].to(device), lengths[part]).cpu()
            for part, T in batches(rows, lengths, size)
        ]
    )


def accuracy(found, label):
    """{n, right, accuracy, ci95 (Wilson), chance (the largest class's share), by_class} of logits (n, C)."""
    right, count = found.argmax(1) == label, torch.bincount(label, minlength=found.shape[1])
    return {
        "n": len(label),
        "right": int(right.sum()),
        "accuracy": right.float().mean().item(),
        "ci95": wilson(int(right.sum()), len(label)),
        "chance": (count.max() / len(label)).item(),
        "by_class": [
            right[label == c].float().mean().item() if count[c] else None
            for c in range(found.shape[1])
        ],
    }


def save(path, model, meta, facts):
    """Make folder `path` the classifier; meta: of the checkpoint that it started from; facts: JSON-able."""
    Path(path).mkdir(parents=True, exist_ok=True)
    digest = checkpoint.write_tensors(Path(path, "head.tmp"), model.head.state_dict())
    name = f"head-{digest[:12]}.pt"  # beside the old one, until config.json names it
    Path(path, "head.tmp").replace(Path(path, name))
    training = {
        **meta["training"],
        "classifier": {**facts, "head": {"name": name, "sha256": digest}},
    }
    checkpoint.save(path, model.lm, tokenizer=meta["tokenizer"], training=training)
    for old in set(Path(path).glob("head-*.pt")) - {Path(path, name)}:
        old.unlink()


def load(path, device="cpu"):
    """(Classifier in eval mode, meta) of a checkpoint folder; meta["training"]["classifier"] has its facts.

    Raises UserError for what checkpoint.load refuses, and for a checkpoint that is no classifier.
    """
    lm, meta = checkpoint.load(path, device)
    facts = meta["training"].get("classifier")
    if facts is None:
        raise UserError(
            f"{path} is no classifier; make one of it: `python train.py --task classify --init "
            f"{path} --data reviews.jsonl`."
        )
    model = Classifier(lm, len(facts["labelled"]["classes"]))
    try:
        model.head.load_state_dict(
            checkpoint.read_tensors(Path(path, facts["head"]["name"]), facts["head"]["sha256"])
        )
    except OSError as error:
        raise UserError(
            f"Cannot read {error.filename}: {error.strerror}; fine-tune it again."
        ) from None
    return model.to(device).eval(), meta

"""A language model with a linear head on the last token: the model, its rows of ids, its files.

ids of a text   <|endoftext|>, its tokens, <|endoftext|>. The head reads the state at the last one,
                which has seen all others, like an encoder's [CLS]; the first one serves as the
                attention sink. Rows are padded on the right, where a causal model does not look.
checkpoint      a folder like any other, so that `layers`, `neurons` and steering work on it, with
                head-<sha256>.pt next to the weights; config.json names it, training.classifier.
"""

from pathlib import Path

import torch
import torch.nn as nn

from crate_mini import UserError
from crate_mini.stats import wilson
from crate_mini.training import checkpoint

MARKS = 2  # <|endoftext|> at both ends of a text


class Classifier(nn.Module):
    """An LM and a head for C classes.

    Layer l of its states: 0 the embeddings, l the stream after block l, always before the final
    LayerNorm.
    """

    def __init__(self, lm, n_classes, generator=None):
        super().__init__()
        self.lm = lm
        self.head = nn.Linear(lm.config.n_embd, n_classes)
        with torch.no_grad():
            self.head.weight.normal_(0, 0.02, generator=generator)
            self.head.bias.zero_()

    def states(self, ids, layer=None):
        """Stream (B, T, d) at one layer, or of layers 0 .. L stacked: (L + 1, B, T, d)."""
        z = self.lm.tokens(ids) + self.lm.positions.weight[: ids.shape[1]]
        streams = [z]
        for block in self.lm.blocks[:layer]:
            z, _ = block(z)
            streams.append(z)
        return torch.stack(streams) if layer is None else z

    def run_from(self, z, layer, lengths):
        """Run all blocks above `layer` on its stream z (B, T, d).

        Returns (logits (B, C), what the head read (B, d)).
        """
        for block in self.lm.blocks[layer:]:
            z, _ = block(z)
        rows = torch.arange(len(z), device=z.device)
        x = self.lm.norm(z[rows, lengths.to(z.device) - 1])
        return self.head(x), x

    def forward(self, ids, lengths):
        """Logits (B, C) of ids (B, T), of which the first `lengths` (B,) of each row are real."""
        return self.run_from(self.states(ids, 0), 0, lengths)[0]


# ---- rows of ids ---------------------------------------------------------------------------------


def encode(tokenizer, texts, length, cut):
    """(ids (S, T), lengths (S,)) of texts, each of at most `length` tokens with its marks.

    cut: "start" or "end", the part of a longer text that is kept.
    """
    rows = []
    for ids in tokenizer.encode_batch(texts):
        rows.append([tokenizer.eot, *truncate(ids.tolist(), length, cut), tokenizer.eot])
    return pad(rows, tokenizer.eot)


def truncate(tokens, length, cut):
    """The part of a text's tokens, or of anything in their place, that fits between the marks."""
    room = length - MARKS
    return tokens[:room] if cut == "start" else tokens[max(0, len(tokens) - room) :]


def pad(rows, fill):
    """(ids (S, T) int64, lengths (S,)) of S lists of ids."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), fill)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids, lengths


def batches(rows, lengths, size):
    """Yield (row indices, length of the longest among them), `size` rows at a time."""
    for batch in torch.as_tensor(rows).split(size):
        yield batch, int(lengths[batch].max())


# ---- predictions ---------------------------------------------------------------------------------


@torch.no_grad()
def logits(model, ids, lengths, rows, size=64):
    """Logits (len(rows), C) of the given rows of ids, on the CPU."""
    device = model.head.weight.device
    parts = []
    for batch, T in batches(rows, lengths, size):
        parts.append(model(ids[batch, :T].to(device), lengths[batch]).cpu())
    return torch.cat(parts)


def accuracy(logits, label):
    """{n, right, accuracy, ci95 (Wilson), chance (share of the largest class), by_class}.

    logits: (n, C). label: (n,). by_class: accuracies, None for a class without texts.
    """
    C = logits.shape[1]
    right = logits.argmax(1) == label
    count = torch.bincount(label, minlength=C)
    by_class = []
    for c in range(C):
        by_class.append(right[label == c].float().mean().item() if count[c] else None)
    return {
        "n": len(label),
        "right": int(right.sum()),
        "accuracy": right.float().mean().item(),
        "ci95": wilson(int(right.sum()), len(label)),
        "chance": (count.max() / len(label)).item(),
        "by_class": by_class,
    }


# ---- files ---------------------------------------------------------------------------------------


def save(path, model, meta, facts):
    """Save a Classifier in the folder `path`.

    meta: of the checkpoint it was fine-tuned from. facts: JSON-able, kept in config.json.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    digest = checkpoint.write_tensors(folder / "head.tmp", model.head.state_dict())
    name = f"head-{digest[:12]}.pt"  # next to the old one, until config.json names it
    (folder / "head.tmp").replace(folder / name)
    head = {"name": name, "sha256": digest}
    training = {**meta["training"], "classifier": {**facts, "head": head}}
    checkpoint.save(path, model.lm, tokenizer=meta["tokenizer"], training=training)
    for file in folder.glob("head-*.pt"):
        if file.name != name:
            file.unlink()


def load(path, device="cpu"):
    """(Classifier in eval mode, meta) of a folder; meta["training"]["classifier"] has its facts.

    Raises UserError for what checkpoint.load refuses, and for a checkpoint without a head.
    """
    lm, meta = checkpoint.load(path, device)
    facts = meta["training"].get("classifier")
    if facts is None:
        raise UserError(
            f"{path} is not a classifier; make one from it: `python train.py --task classify "
            f"--init {path} --data reviews.jsonl`."
        )
    model = Classifier(lm, len(facts["labelled"]["classes"]))
    head = facts["head"]
    try:
        weights = checkpoint.read_tensors(Path(path, head["name"]), head["sha256"])
    except OSError as error:
        raise UserError(
            f"Cannot read {error.filename}: {error.strerror}; fine-tune the classifier again."
        ) from None
    model.head.load_state_dict(weights)
    return model.to(device).eval(), meta

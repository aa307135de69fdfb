"""The laboratory class, cell by cell; `python -m crate_mini.course notebook` writes lab.ipynb.

A line `# %%` begins a cell of code, `# %% [markdown]` one of text. Not to be imported; run as a
script, it does what the notebook does.
"""

# %% [markdown]
# # A laboratory class on a white-box language model
#
# Train a CRATE language model of one layer, look at its coding rates, score 20 of its neurons, read
# one of them, steer it, and compare everything with the GPT-2 twin. About three minutes on two
# cores. Before it: *The idea in ten minutes* (`crate_mini/course/idea.md`).
#
# The expected output stands below each step. Other versions of Python carry another text, so the
# numbers move a little; what they show should not.

# %%
import csv
import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt

import crate_mini
from crate_mini.console.results import ROOT

FOLDER = Path("lab")
STEPS = 100  # of training: enough to see structure, far from a good model (1000 take minutes)
NEURONS = 20  # to score
TOKENS = 60_000  # to score them on
FLAGS = []  # further settings of train.py
KINDS = ["crate", "gpt2"]
LINES = 24  # of the output of a script


def run(*words):
    """Run a script of the project, as in a terminal, and print the end of its output."""
    command = [sys.executable, str(ROOT / words[0]), *map(str, words[1:])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    print("python", *words, *done.stdout.splitlines()[-LINES:], "", sep="\n")


def read_rows(path):
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# %% [markdown]
# ## 1. Train
#
# Both models see the same batches of the same text: the documentation of your Python.

# %%
for kind in KINDS:
    out = FOLDER / kind
    settings = ["--model", kind, "--preset", "1L", "--train-steps", STEPS, "--out", out]
    run("train.py", *settings, "--overwrite", *FLAGS)

# %%
for kind in KINDS:
    with open(FOLDER / kind / "log.csv") as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in rows]
    plt.plot(steps, [float(row["loss"]) for row in rows], label=kind)
plt.xlabel("step")
plt.ylabel("training loss, nats per token")
plt.legend()
plt.show()

# %% [markdown]
# **Expected.** Both fall from 8.3 (ln 4096, a uniform guess), CRATE to a validation loss of 6.47,
# the twin to 6.20. The sample that train.py prints is spaces and frequent words: after 100 steps a
# model knows how often tokens occur, and little more.
#
# ## 2. Rates: does attention compress?
#
# R^c, the nats that a context costs in the subspaces of U, before and after attention, in the
# trained model and in the same model untrained.

# %%
run("interpret.py", "layers", FOLDER / "crate" / "best", "--tokens", 8192)

# %%
layers = json.loads((FOLDER / "crate" / "interpret" / "layers.json").read_text())
places = ["attention input", "after attention"]
for name in ("trained", "untrained"):
    rates = layers[name][0]["rate"]
    plt.plot(places, [rates[place]["U"]["mean"] for place in places], marker="o", label=name)
plt.ylabel("R^c(Z | U), nats")
plt.ylim(bottom=0)
plt.legend()
plt.show()

# %% [markdown]
# **Expected.** The trained layer compresses to a quarter, 219 to 53 nats, and nothing in the loss
# asks for that. The untrained one does not, 280 to 280: without this control you could not tell
# what training found from what the operator does by itself.
#
# ## 3. Score 20 neurons
#
# A table of mean activations by the last two tokens predicts each neuron on held-out text; the
# score is Pearson's r. `null_r` uses another neuron's table, `init_r` is an untrained model.

# %%
for kind in KINDS:
    best = FOLDER / kind / "best"
    run("interpret.py", "neurons", best, "--n", NEURONS, "--tokens", TOKENS)

# %%
scores = {}
for kind in KINDS:
    rows = read_rows(FOLDER / kind / "interpret" / "scores.jsonl")
    scores[kind] = [row for row in rows if row["status"] == "live"]
names = ["ngram_r", "null_r", "init_r"]
for i, kind in enumerate(KINDS):
    means = []
    for name in names:
        values = [row["scores"]["uniform"][name] for row in scores[kind]]
        values = [value for value in values if value is not None]
        means.append(sum(values) / max(len(values), 1))
    plt.bar([place + 0.4 * i for place in range(len(names))], means, width=0.35, label=kind)
plt.xticks([place + 0.2 for place in range(len(names))], names)
plt.ylabel("mean over neurons")
plt.legend()
plt.show()

# %%
for kind in KINDS:
    density = [100 * row["density"] for row in scores[kind]]
    plt.scatter(density, [row["scores"]["uniform"]["ngram_r"] for row in scores[kind]], label=kind)
plt.xlabel("fires on, % of tokens")
plt.ylabel("ngram_r")
plt.legend()
plt.show()

# %% [markdown]
# **Expected.** ngram_r is about 0.83 for CRATE and 0.76 for the twin, null_r near 0.1, and the
# untrained control already above 0.5. Look in the second plot whether neurons that fire often score
# higher: exercise 9 shows why.
#
# ## 4. Read one neuron
#
# Of the five that fire least, the one with the best score: its strongest windows, with the
# activation of each token in tenths of the neuron's maximum.

# %%
lab = crate_mini.load(FOLDER / "crate" / "best")
rare = sorted(scores["crate"], key=lambda row: row["density"])[:5]
chosen = max(rare, key=lambda row: row["scores"]["uniform"]["ngram_r"] or -1)
neuron = chosen["neuron"]
excerpts = read_rows(FOLDER / "crate" / "interpret" / "excerpts.jsonl")
(shown,) = [row for row in excerpts if row["neuron"] == neuron]
fires_on = [lab.token(token[0]) for token in chosen["label"]["tokens"][:5]]
print(f"neuron {neuron}: fires on {100 * chosen['density']:.1f} %, most on {fires_on}\n")
for excerpt in shown["top"][:4]:
    for id, act in zip(excerpt["tokens"], excerpt["acts"]):
        level = round(10 * act / chosen["max"])
        print(lab.token(id) + (f"[{level}]" if level > 0 else ""), end=" ")
    print("\n")

# %% [markdown]
# **Expected.** After 100 steps most such neurons stand for a token or a kind of token (line ends,
# brackets, digits). Write down in a sentence what you think it fires on, then look at
# `lab/crate/interpret/index.html`, and answer the questions of `human.html` for several neurons.
#
# ## 5. Steer it
#
# Set the neuron to four times its maximum at every token, and look at the next token.

# %%
prompt = "The function returns the value of the"
change = lab.intervention(layer=0, neuron=neuron, value="4x")
before = dict(lab.next_tokens(prompt, 4096))
with lab.steer(change) as steering:
    after = dict(lab.next_tokens(prompt, 4096))
raised = sorted(before, key=lambda token: after.get(token, 0) - before[token], reverse=True)[:10]
places = range(len(raised))
plt.barh(
    [place + 0.2 for place in places], [before[token] for token in raised], 0.4, label="before"
)
plt.barh(
    [place - 0.2 for place in places], [after[token] for token in raised], 0.4, label="steered"
)
plt.yticks(places, [repr(token) for token in raised])
plt.xlabel("probability of the next token")
plt.legend()
plt.show()
print(f"the intervention acted on {steering.fired[0]} tokens")

# %% [markdown]
# **Expected.** A few tokens gain, by little: one neuron of 512 in a barely trained model. It
# acted on every token of the prompt; with no change at all the output would be the same to the bit.
#
# ## 6. The twin

# %%
for kind in KINDS:
    meta = json.loads((FOLDER / kind / "best" / "config.json").read_text())
    density = sum(row["density"] for row in scores[kind]) / len(scores[kind])
    ngram = sum(row["scores"]["uniform"]["ngram_r"] or 0 for row in scores[kind])
    print(
        f"{kind:6s} validation loss {meta['training']['best_val_loss']:.2f}, "
        f"fires on {100 * density:.0f} %, ngram_r {ngram / len(scores[kind]):.2f}"
    )

# %% [markdown]
# **Expected.** CRATE's neurons fire on more tokens (63 % against 47 %) and score higher; the twin
# predicts text better. Questions for the report:
#
# 1. Which of your numbers would change with another seed? Train two more and see.
# 2. Score again with `--match-density 0.01`. Does the order of the models stay?
# 3. Does steering a random direction of equal length do as much? (`steer.py measure`)

"""`interpret.py playground`: a model, or CRATE next to its twin, in one page that runs it."""

from dataclasses import dataclass
from html import escape
from pathlib import Path

from crate_mini import UserError
from crate_mini.cli import setting
from crate_mini.console import results, terminal
from crate_mini.console.results import atomic_write
from crate_mini.lab import Lab
from crate_mini.playground import export
from crate_mini.plots.html import asset, html, shared_script
from crate_mini.training import checkpoint

SCRIPTS = ("tokenizer.js", "model.js", "page.js")
TEXT = "The method returns a list of the names of all"
USAGE = "`python interpret.py playground out/crate-3L/best`"
BODY = """<main>
<header><p class="eyebrow">crate_mini · playground</p><h1>TITLE</h1>
<p class="lead">The whole model is in this page and runs in your browser, offline. Type, see which
neurons fire on what you typed, steer one, and read how it changes what comes next.</p></header>
<div id="tools"></div><div id="models"></div>
</main>"""


@dataclass
class Settings:
    """Put a model into one HTML file that opens from disk and runs it in the browser, offline.

    Type a text, see which neurons fire on it, steer one, read how it changes what comes next. A
    second checkpoint, such as the twin, is shown next to the first.
    """

    ckpt: str | None = setting(None, "a checkpoint folder, like out/crate-3L/best")
    twin: str | None = setting(None, "a second one, trained with the same tokenizer")
    text: str = setting(TEXT, "the text that the page opens with")
    data: str | None = checkpoint.data_setting("observe maxima of neurons on")
    tokenizer: str | None = checkpoint.tokenizer_setting()
    out: str | None = setting(
        None, "file of the page", shown="playground.html in `interpret` next to the checkpoint"
    )


def run(settings):
    """Write the page. Raises UserError for a model that it cannot run."""
    if settings.ckpt is None:
        raise UserError(f"playground needs a checkpoint folder, like {USAGE}.")
    paths = [path for path in (settings.ckpt, settings.twin) if path is not None]
    labs = [open_lab(path, settings.data, settings.tokenizer) for path in paths]
    check_tokenizers(labs)
    out = Path(settings.out or results.folder(settings.ckpt) / "playground.html")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give a file, like --out {out}/playground.html.")
    results.ready_file(out)
    content = page(labs, settings.text)
    with atomic_write(out) as file:
        file.write(content)
    for lab in labs:
        if not lab.known.rows:
            print(
                f"note      {lab.checkpoint} has no labels; `python interpret.py neurons "
                f"{lab.checkpoint}` makes them"
            )
    print(f"file      {out}, {len(content) / 1e6:.1f} MB; open it in a browser")


def open_lab(path, data, tokenizer=None):
    """The Lab of a checkpoint, on the CPU. Raises UserError for a model that no page can run."""
    lab = Lab(path, data=data, device="cpu", log=print, tokenizer=tokenizer)
    export.check(lab.model.config, path)
    return lab


def check_tokenizers(labs):
    """Raise UserError unless all Labs read the same tokens."""
    first = labs[0]
    for lab in labs[1:]:
        if lab.tokenizer.hash != first.tokenizer.hash:
            raise UserError(
                f"{lab.checkpoint} reads the tokens of {lab.tokenizer.name}, {first.checkpoint} "
                f"those of {first.tokenizer.name}; train both with the same --tokenizer, or make "
                f"a page for each, like {USAGE}."
            )


def page(labs, text):
    """The page of one or two Labs, as bytes."""
    size = max(lab.model.config.vocab_size for lab in labs)
    data = {
        "text": text,
        "vocabulary": export.vocabulary(labs[0].tokenizer, labs[0].token, size),
        "models": [model_data(lab) for lab in labs],
    }
    names = [model["name"] for model in data["models"]]
    title = " and ".join(names)
    body = BODY.replace("TITLE", escape(title))
    scripts = [shared_script()] + [asset("crate_mini.playground", name) for name in SCRIPTS]
    script = "\n".join(scripts)
    style = asset("crate_mini.playground", "page.css")
    return html(f"{title} · playground", body, data, script, style)


def model_data(lab):
    """A Lab as JSON: name, facts, weights, neurons."""
    return {
        "name": "/".join(Path(lab.checkpoint).resolve().parts[-2:]),
        "loss": lab.meta["training"].get("val_loss"),
        "neurons": export.neurons(lab),
        **export.packed(lab.model),
    }


COMMAND = terminal.Command(Settings, run, checkpoint=False, positional=("ckpt", "twin"))

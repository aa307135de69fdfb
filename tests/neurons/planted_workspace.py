"""A Workspace on planted neurons, for tests of the stages."""

from crate_mini.data.batches import open_corpus
from crate_mini.data.tokenizer import load_tokenizer
from crate_mini.neurons import planted
from crate_mini.neurons.record import sites
from crate_mini.neurons.workspace import Workspace

META = {"tokenizer": {"spec": "bytes"}}
DOCUMENTS = 500


def no_log(line):
    pass


def planted_workspace(place, **changes):
    """A Workspace on the planted model and the texts in folder `place`, written at first use.

    It writes to the folder's `out`, and has only the control `shuffle`; both can be changed.
    """
    source = place / "puzzles.jsonl"
    if not source.exists():
        planted.write_texts(source, DOCUMENTS)
    tokenizer = load_tokenizer("bytes")
    corpus = open_corpus(str(source), tokenizer, place / "cache", 1.0, log=no_log)
    model = planted.PlantedModel()
    settings = {"folder": place / "out", "controls": ("shuffle",), "log": no_log, **changes}
    return Workspace(
        model=model, meta=META, tokenizer=tokenizer, corpus=corpus, sites=sites(model), **settings
    )

"""How much of a text a computation holds at a time."""

import weakref

from crate_mini.data.batches import Corpus


def most_tensors_held(monkeypatch, corpus=None):
    """Watch the tensors that Corpus.blocks yields; returns {"now", "most", "gone"}, their numbers.

    corpus: only this one; by default all.
    """
    held = {"now": 0, "most": 0, "gone": 0}
    blocks = Corpus.blocks

    def drop():
        held["now"] -= 1
        held["gone"] += 1

    def watched(self, *args):
        for pair in blocks(self, *args):
            for tensor in pair:
                held["now"] += 1
                weakref.finalize(tensor, drop)
            held["most"] = max(held["most"], held["now"])
            yield pair

    monkeypatch.setattr(Corpus if corpus is None else type(corpus), "blocks", watched)
    return held

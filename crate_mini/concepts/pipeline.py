"""The stages of `interpret.py concepts`: what each makes of which files, and when it need not run.

    vectors        states of words in two layers              vectors.npz
    discover       codes of them, by every method and seed    codes-METHOD-SEED.npz
    controls       reconstruction with and without codes      controls.json
    salience       the word of each test text that counts     salience.npz
    faithfulness   the concept taken out, beside controls     faithfulness.json
    judge          language models rate concepts              judge.json
    report         everything                                 concepts.json .html .png, packet.html .csv

Each stage reads files of those before it. A finished one stays as long as its settings and all before it do;
--from runs it and all after it again.
"""

import hashlib
import json
import zipfile
import zlib
from contextlib import suppress
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from crate_mini import UserError, atomic_write, cli
from crate_mini import results as evidence
from crate_mini.concepts import classifier, clvqvae, members
from crate_mini.concepts import codebook_checks as health
from crate_mini.concepts import finetune as classify
from crate_mini.concepts import llm_ratings as judge
from crate_mini.concepts import page as concept_page
from crate_mini.concepts import report as result
from crate_mini.concepts import salience as ig
from crate_mini.concepts import survey as concept_packet
from crate_mini.concepts import word_vectors as states
from crate_mini.concepts.ablate import items
from crate_mini.concepts.command import STAGES
from crate_mini.concepts.faithfulness import FOLDS, Trial
from crate_mini.concepts.methods import METHODS, discover
from crate_mini.concepts.types import SPLITS, Codes, Vectors
from crate_mini.data import batches as data
from crate_mini.judges import run as llm
from crate_mini.training import device as machine
from crate_mini.training.run_log import track


def numbers(text, flag, example):
    """The numbers of a list like 0,1,2. Raises UserError for what is none."""
    words = text.split(",")
    if not all(word.strip().isdecimal() and len(word.strip()) < 10 for word in words):
        raise UserError(
            f"--{flag} {text!r} is no list of whole numbers; expected something like --{flag} "
            f"{example}."
        )
    return list(dict.fromkeys(int(word) for word in words))


class Concepts:
    """One run of the command: what the stages share, and the stages."""

    def __init__(self, s, ckpt):
        self.s, self.ckpt = s, ckpt
        self.model, self.meta = classifier.load(ckpt, machine.choose_device(s.device))
        self.model.requires_grad_(False)
        self.facts, self.made = self.meta["training"]["classifier"], {}
        self.out = Path(s.out) if s.out else Path(ckpt).resolve().parent / "concepts"
        L = len(self.model.lm.blocks)
        self.layers = (
            numbers(s.layers, "layers", "1,3")
            if s.layers
            else [max(L - max(2, L // 3), min(L - 1, 1)), L]
        )
        if len(self.layers) != 2:
            raise UserError(f"--layers {s.layers} must be two different numbers, like 1,3.")
        self.seeds = numbers(s.seeds, "seeds", "0,1,2")
        self.methods = self.chosen()
        self.out.mkdir(parents=True, exist_ok=True)

    def chosen(self):
        """The methods to run; scikit-learn's is left out, and the result says so, if not asked for."""
        if self.s.methods == "all":
            return [m for m in METHODS if m != "ward" or find_spec("sklearn")]
        words = list(dict.fromkeys(word.strip() for word in self.s.methods.split(",")))
        for word in words:
            if word not in METHODS:
                raise UserError(
                    f"method {word!r} is unknown{cli.nearest(word, METHODS)}; choose from "
                    f"{', '.join(METHODS)}."
                )
        return words

    def run(self):
        """All stages, from --from on in any case."""
        first = STAGES.index(self.s.from_) if self.s.from_ else len(STAGES)
        for i, stage in enumerate(STAGES):
            getattr(self, stage)(i >= first)

    def stamp(self, stage, before, *names, **more):
        """What a stage's file must carry to count as made: a digest of its settings and of what it reads."""
        told = {**{n: getattr(self.s, n) for n in names}, **more, "before": self.made.get(before)}
        self.made[stage] = hashlib.sha256(
            json.dumps([stage, told], sort_keys=True).encode()
        ).hexdigest()[:16]
        return self.made[stage]

    # ---- stages ---------------------------------------------------------------------------------------

    @cached_property
    def text(self):
        s = self.facts["settings"]
        tokenizer = data.load_tokenizer(self.meta["tokenizer"]["spec"])
        return states.read(tokenizer, self.labelled.texts, s["length"], s["cut"])

    @cached_property
    def labelled(self):
        return classify.texts_of(self.facts)

    @cached_property
    def tests(self):
        """Rows of the test texts that are looked at: the first --tests of those that training never read."""
        rows = classify.unseen(self.text.ids, torch.from_numpy(self.labelled.split))
        return rows.numpy()[: self.s.tests or None]

    def vectors(self, again):
        stamp = self.stamp(
            "vectors",
            None,
            "least",
            "most",
            "tests",
            layers=self.layers,
            weights=self.meta["sha256"],
        )
        path = self.out / "vectors.npz"
        self.v = None if again or not path.exists() else Vectors.load(path)
        if self.v is None or self.v.facts.get("made") != stamp:
            self.v = states.vectors(
                self.model,
                self.text,
                self.labelled,
                self.layers,
                self.s.least,
                self.s.most,
                self.tests,
                {"made": stamp},
            )
            self.v.save(path)
        n = {split: int(self.v.rows(split).sum()) for split in SPLITS}
        self.k = self.s.k or min(400, max(8, n["train"] // 200))
        print(f"vectors   {n} words, layers {self.layers}; {self.k} codes", flush=True)

    def discover(self, again):
        clvq = {name: getattr(self.s, name) for name in ("epochs", "memory", "mask", "revive")}
        self.stamp("discover", "vectors", "seeds", methods=self.methods, k=self.k, **clvq)
        self.codes, device = {}, str(self.model.head.weight.device)
        for method in self.methods:
            own = clvq if method in ("clvq", "vq") else {}
            for seed in self.seeds:
                path = self.out / f"codes-{method}-{seed}.npz"
                stamp = self.stamp("one", "vectors", k=self.k, method=method, seed=seed, **own)
                found = None if again or not path.exists() else Codes.load(path)
                if found is None or found.settings.get("made") != stamp:
                    print(f"discover  {method}, seed {seed}", flush=True)
                    found = discover(
                        method, self.v, self.k, seed, **(own and {**own, "device": device})
                    )
                    found.settings["made"] = stamp
                    found.save(path)
                self.codes[method, seed] = found

    def cached(self, name, stamp, again, make):
        """The JSON of a stage: what its file holds if that is still true and whole, else made and written."""
        path = self.out / f"{name}.json"
        found = None if again or not path.exists() else cli.read_json(path)
        if found is None or found.get("made") != stamp or found.get("stopped"):
            print(name, flush=True)
            found = {"made": stamp, **make()}
            evidence.write_json(path, found)
        return found

    def controls(self, again):
        stamp = self.stamp(
            "controls", "vectors", "controls", "epochs", "mask", k=self.k, seed=self.seeds[0]
        )
        settings = clvqvae.Settings(codes=self.k, epochs=self.s.epochs, mask=self.s.mask)
        device = str(self.model.head.weight.device)
        self.told = self.cached(
            "controls",
            stamp,
            again,
            lambda: {
                "explained": health.reconstruction(self.v, settings, self.seeds[0], device=device)
                if self.s.controls
                else "not run"
            },
        )

    def salience(self, again):
        stamp, path = self.stamp("salience", "vectors", "nodes", "tests"), self.out / "salience.npz"
        found = {}
        with suppress(
            OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error
        ):  # damaged: made again
            found = {} if again else dict(np.load(path))
        if str(found.pop("made", "")) != stamp:
            kept = ig.salience(
                self.model,
                self.text,
                self.tests,
                self.layers[0],
                self.s.nodes,
                track=lambda work: track(work, "salience"),
            )
            found = vars(kept)
            with atomic_write(path) as file:
                np.savez(file, made=stamp, **found)
        self.salient = ig.Salience(**found)
        self.found = items(self.model, self.text, self.v, self.salient)

    def faithfulness(self, again):
        self.made["both"] = self.made["discover"] + self.made["salience"]
        stamp = self.stamp("faithfulness", "both", "whole")
        self.judged = self.cached(
            "faithfulness",
            stamp,
            again,
            lambda: {"seeds": {str(seed): self.trial(seed) for seed in self.seeds}},
        )

    def trial(self, seed):
        """All cuts and the proxy with one seed."""
        trial = Trial(self.model, self.v, self.found, seed, FOLDS, self.s.whole)
        right, shared = trial.shared()
        told, proxy = {}, {}
        for method in track(self.methods, f"cuts {seed}"):
            codes = self.codes[method, seed]
            told[method] = trial.codes(codes, right)
            proxy[method] = members.proxy(codes, self.v, self.text, self.found, self.said, seed)
        return {"shared": shared, "methods": told, "proxy": proxy}

    @cached_property
    def said(self):
        """(S,) the class that the classifier gives each text."""
        rows = torch.arange(len(self.text.ids))
        return (
            classifier.logits(self.model, self.text.ids, self.text.lengths, rows).argmax(1).numpy()
        )

    def judge(self, again):
        stamp = self.stamp("judge", "faithfulness", "judges", "items", "replay")
        judges = [word for word in self.s.judges.split(",") if word]
        if not judges:
            self.rated = "not run"
            return
        asked = self.cards[: self.s.items]
        ask = llm.Settings(
            url=self.s.url,
            key_env=self.s.key_env,
            budget=self.s.budget,
            record=self.s.record,
            replay=self.s.replay,
        )
        self.rated = self.cached(
            "judge", stamp, again, lambda: judge.run(asked, judges, self.out, ask, self.seeds[0])
        )

    @cached_property
    def cards(self):
        return result.cards(self)

    def report(self, again):
        found = result.collect(self)
        evidence.write_json(self.out / "concepts.json", found)
        title = f"{'/'.join(Path(self.ckpt).resolve().parts[-2:])} · concepts"
        two = [m for m in dict.fromkeys(["clvq", "kmeans", *self.methods]) if m in self.methods][:2]
        asked = concept_packet.questions(self.cards, two, self.v.classes, self.seeds[0])
        page, sheet, key = concept_packet.packet(asked, title)
        files = {
            "concepts.html": concept_page.page(found, title),
            "packet.html": page,
            "packet.csv": sheet,
            "packet-key.json": key,
        }
        for name, content in files.items():
            with atomic_write(self.out / name) as file:
                file.write(content)
        concept_page.cloud(found, self.out / "concepts.png")
        print(
            f"\n{result.table(found)}\n\nfiles     {self.out / 'concepts.html'}, concepts.json, "
            "concepts.png; for people packet.html, packet.csv"
        )

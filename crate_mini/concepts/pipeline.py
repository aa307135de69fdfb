"""The stages of `interpret.py concepts`, the files each one writes, and when it runs again.

    vectors        states of words in two layers              vectors.npz
    discover       codes of them, by each method and seed     codes-METHOD-SEED.npz
    controls       reconstruction with and without codes      controls.json
    salience       the word that decided each prediction      salience.npz
    faithfulness   accuracy without its concept               faithfulness.json
    judge          language models rate concepts              judge.json
    report         all of it                                  concepts.json .html .png, packet.*

Each stage reads files of those before it. A file is kept as long as the settings of its stage, and
of all stages before it, stay the same; --from runs a stage and all after it again.
"""

import hashlib
import json
from contextlib import suppress
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from crate_mini import UserError, cli
from crate_mini.concepts import (
    ablate,
    classifier,
    clvqvae,
    codebook_checks,
    concept_words,
    faithfulness,
    finetune,
    llm_ratings,
    page,
    report,
    salience,
    survey,
    word_vectors,
)
from crate_mini.concepts.methods import METHODS, discover
from crate_mini.concepts.types import SPLITS, Codes, Vectors
from crate_mini.console import results, terminal
from crate_mini.console.results import atomic_write
from crate_mini.neurons import npz
from crate_mini.training import checkpoint
from crate_mini.training.device import choose_device

WORDS_PER_CODE = 200  # training words, for --k 0
FEWEST_CODES, MOST_CODES = 8, 400
FEWEST_TESTS = 2 * faithfulness.FOLDS  # texts: two in each fold of the probes
FEWEST_OF_CLASS = 2  # test texts: a text's control is another one of its class
CLVQ_SETTINGS = ("epochs", "memory", "mask", "revive")  # of clvqvae, set by flags of these names


def folder(settings, ckpt):
    """The folder of a run's files: --out, else `concepts` next to the checkpoint."""
    return Path(settings.out) if settings.out else Path(ckpt).resolve().parent / "concepts"


class Pipeline:
    """One run of the command: what its stages share, and a method for each of them.

    settings: command.Settings. A stage leaves what it made as attributes; again: whether it runs
    even if its file can be kept.
    """

    def __init__(self, settings, ckpt):
        check_settings(settings)
        self.settings = settings
        self.ckpt = ckpt
        self.model, self.meta = classifier.load(ckpt, choose_device(settings.device))
        self.model.requires_grad_(False)
        self.facts = self.meta["training"]["classifier"]
        self.layers = choose_layers(settings.layers, len(self.model.lm.blocks))
        self.seeds = terminal.number_list(settings.seeds, "--seeds", whole_number, "0,1,2")
        self.methods = choose_methods(settings.methods)
        self.check_heads()
        self.stamps = {}  # by stage
        self.made_with = {}  # by stage: the values that its stamp is a digest of
        self.out = results.ready_folder(folder(settings, ckpt))
        llm_ratings.check(self.judges, self.out, settings)

    @property
    def judges(self):
        """The language models in --judges."""
        return [word.strip() for word in self.settings.judges.split(",") if word.strip()]

    def run(self):
        """Run all stages in order; --from and those after it even if their files can be kept."""
        again = False
        for name, stage in STAGES.items():
            again = again or name == self.settings.from_
            stage(self, again)

    def stamp(self, stage, before, *names, **more):
        """A digest of a stage's settings and of what it reads; its file must carry it to be kept.

        before: the stage it reads. names: settings; more: further values.
        """
        values = {name: getattr(self.settings, name) for name in names}
        values |= {**more, "before": self.stamps.get(before)}
        self.made_with[stage] = values
        text = json.dumps([stage, values], sort_keys=True)
        self.stamps[stage] = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self.stamps[stage]

    def load_or_make(self, name, stamp, again, make):
        """The JSON of a stage: from its file if that carries the stamp, else from make()."""
        path = self.out / f"{name}.json"
        if path.exists() and not again:
            command = f"`python interpret.py concepts CKPT --from {name}`"
            content = results.read_json(path, expected=f"what {command} writes")
            if content.get("made") == stamp and not content.get("stopped"):
                return content
        print(name, flush=True)
        content = {"made": stamp, "made_with": self.made_with[name], **make()}
        results.write_json(path, content)
        return content

    # ---- texts -----------------------------------------------------------------------------------

    @cached_property
    def labelled(self):
        """The labelled texts that the classifier was trained on."""
        return finetune.texts_of(self.facts)

    @cached_property
    def text(self):
        """All of them as TextWords."""
        settings = self.facts["settings"]
        tokenizer = checkpoint.open_tokenizer(self.ckpt, self.meta, self.settings.tokenizer)
        return word_vectors.read(
            tokenizer, self.labelled.texts, settings["length"], settings["cut"]
        )

    @cached_property
    def test_rows(self):
        """Rows of the test texts to use: the first --tests of those that training never read."""
        rows = finetune.unseen(self.text.ids, torch.from_numpy(self.labelled.split))
        return rows.numpy()[: self.settings.tests or None]

    @cached_property
    def answers(self):
        """(S,) the class that the classifier gives each text."""
        rows = torch.arange(len(self.text.ids))
        logits = classifier.logits(self.model, self.text.ids, self.text.lengths, rows)
        return logits.argmax(1).numpy()

    # ---- stages ----------------------------------------------------------------------------------

    def extract_vectors(self, again):
        """States of words in both layers, and from their number how many codes to discover."""
        facts = {"layers": self.layers, "weights": self.meta["sha256"]}
        stamp = self.stamp("vectors", None, "least", "most", "tests", **facts)
        path = self.out / "vectors.npz"
        self.vectors = Vectors.load(path) if path.exists() and not again else None
        if self.vectors is None or self.vectors.facts.get("made") != stamp:
            least, most = self.settings.least, self.settings.most
            words = word_vectors.choose(self.text, self.labelled, least, most, self.test_rows)
            self.check_words(words.places[:, 0])
            made = {"made": stamp}
            self.vectors = word_vectors.extract(
                self.model, self.text, self.labelled, self.layers, words, made
            )
            self.vectors.save(path)
        self.check_words(self.vectors.sentence)
        n_words = {split: int(self.vectors.rows(split).sum()) for split in SPLITS}
        print(f"vectors   {n_words} words, layers {self.layers}; {self.k} codes", flush=True)

    def check_heads(self):
        """Raise UserError now if no decoder of clvq, vq or the controls fits the model's width."""
        width, heads = self.model.lm.config.n_embd, clvqvae.Settings().heads
        if self.trains_decoders() and width % heads:
            raise UserError(
                f"the decoders of clvq, vq and the controls have {heads} heads, which do not "
                f"divide the model's width {width}; leave them out with --methods kmeans,sae "
                "--no-controls."
            )

    def trains_decoders(self):
        return self.settings.controls or bool({"clvq", "vq"} & set(self.methods))

    def check_words(self, sentence):
        """Set k, and raise UserError for what a later stage would refuse.

        sentence: (N,) the text of each word.
        """
        split = self.labelled.split[sentence]
        n_words = {name: int((split == value).sum()) for name, value in SPLITS.items()}
        by_size = n_words["train"] // WORDS_PER_CODE
        self.k = self.settings.k or min(MOST_CODES, max(FEWEST_CODES, by_size))
        if self.k > n_words["train"]:
            raise UserError(
                f"--k {self.k} codes cannot be made of {n_words['train']} training words; give 1 "
                f"to {n_words['train']}, about one per {WORDS_PER_CODE} words."
            )
        if "sae" in self.methods and self.settings.active > self.k:
            raise UserError(
                f"--active {self.settings.active} is more than the {self.k} features that sae has; "
                f"give 1 to {self.k}, or a higher --k."
            )
        if self.trains_decoders() and not n_words["stop"]:
            raise UserError(
                f"no word that occurs {self.settings.least} times in the training texts is in the "
                "texts that stop the training of clvq, vq and the controls; give --least 1, more "
                "labelled texts, or --methods kmeans,sae --no-controls."
            )
        self.check_tests(np.intersect1d(self.test_rows, sentence))

    def check_tests(self, usable):
        """Raise UserError if too few test texts, or of a class too few, will have a salient word.

        usable: (n,) numbers of the test texts with a word.
        """
        if len(usable) < FEWEST_TESTS:
            raise UserError(
                f"{len(usable)} test texts have a word, and {FEWEST_TESTS} are needed; give more "
                "with --tests 0, or more labelled texts."
            )
        classes = self.labelled.classes
        count = np.bincount(self.labelled.label[usable], minlength=len(classes))
        for name, n in zip(classes, count.tolist()):
            if n < FEWEST_OF_CLASS:
                raise UserError(
                    f"class {name!r} has {n} of the {len(usable)} test texts with a word, and "
                    f"each class needs {FEWEST_OF_CLASS}; give more with --tests 0, or more "
                    "labelled texts."
                )

    def discover_codes(self, again):
        """Codes of the vectors, by every method with every seed."""
        clvq = {name: getattr(self.settings, name) for name in CLVQ_SETTINGS}
        switches_of = {"clvq": clvq, "vq": clvq, "sae": {"active": self.settings.active}}
        asked = {method: switches_of.get(method, {}) for method in self.methods}
        self.stamp("discover", "vectors", "seeds", k=self.k, methods=asked)
        self.codes = {}
        for method, switches in asked.items():
            for seed in self.seeds:
                self.codes[method, seed] = self._codes(method, seed, switches, again)

    def _codes(self, method, seed, switches, again):
        """The Codes of one method and seed, from their file if it can be kept."""
        # "one" is part of the digest: another name would make the codes of old runs again.
        stamp = self.stamp("one", "vectors", k=self.k, method=method, seed=seed, **switches)
        path = self.out / f"codes-{method}-{seed}.npz"
        if path.exists() and not again:
            codes = Codes.load(path)
            if codes.settings.get("made") == stamp:
                return codes
        print(f"discover  {method}, seed {seed}", flush=True)
        if method in ("clvq", "vq"):
            switches = {**switches, "device": self._device()}
        codes = discover(method, self.vectors, self.k, seed, **switches)
        codes.settings["made"] = stamp
        codes.save(path)
        return codes

    def _device(self):
        return str(self.model.head.weight.device)

    def train_controls(self, again):
        """How well decoders reconstruct the upper layer, with codes, with wrong ones, without."""
        facts = {"k": self.k, "seed": self.seeds[0]}
        stamp = self.stamp("controls", "vectors", "controls", "epochs", "mask", **facts)
        content = self.load_or_make("controls", stamp, again, self._reconstruction)
        self.controls = content["explained"]

    def _reconstruction(self):
        if not self.settings.controls:
            return {"explained": "not run"}
        settings = clvqvae.Settings(
            codes=self.k, epochs=self.settings.epochs, mask=self.settings.mask
        )
        explained = codebook_checks.reconstruction(
            self.vectors, settings, self.seeds[0], device=self._device()
        )
        return {"explained": explained}

    def find_salient_words(self, again):
        """The word of each test text that decided the prediction most."""
        stamp = self.stamp("salience", "vectors", "nodes", "gap", "max_nodes", "tests")
        path = self.out / "salience.npz"
        self.salience = None if again else load_salience(path, stamp)
        if self.salience is None:
            self.salience = salience.find_salient_words(
                self.model,
                self.text,
                self.test_rows,
                self.layers[0],
                self.settings.nodes,
                self.settings.gap,
                self.settings.max_nodes,
            )
            with atomic_write(path) as file:
                np.savez(file, made=stamp, **vars(self.salience))
        print(report.completeness(self.salience.facts(self.settings.gap)), flush=True)
        self.salient_texts = ablate.select(self.model, self.text, self.vectors, self.salience)

    def measure_faithfulness(self, again):
        """Accuracy without the concepts of these words, and without the controls' directions."""
        self.stamps["both"] = self.stamps["discover"] + self.stamps["salience"]
        stamp = self.stamp("faithfulness", "both", "whole")
        content = self.load_or_make("faithfulness", stamp, again, self._all_seeds)
        self.by_seed = content["seeds"]

    def _all_seeds(self):
        return {"seeds": {str(seed): self._one_seed(seed) for seed in self.seeds}}

    def _one_seed(self, seed):
        """All ablations, and the naive Bayes proxy, with one seed."""
        ablations = faithfulness.Ablations(
            self.model, self.vectors, self.salient_texts, seed, n_all=self.settings.whole
        )
        shared_right, shared = ablations.shared_controls()
        outcomes, proxy = {}, {}
        for method in terminal.track(self.methods, f"ablate {seed}"):
            codes = self.codes[method, seed]
            outcomes[method] = ablations.of_codes(codes, shared_right)
            proxy[method] = concept_words.naive_bayes_proxy(
                codes, self.vectors, self.text, self.salient_texts, self.answers, seed
            )
        return {"shared": shared, "methods": outcomes, "proxy": proxy}

    def ask_judges(self, again):
        """Ratings by language models, if --judges names any."""
        server = {}
        if any(judge.startswith("http:") for judge in self.judges):
            server = {"url": self.settings.url}
        stamp = self.stamp("judge", "faithfulness", "judges", "items", "replay", **server)
        self.ratings = "not run"
        if self.judges:
            again = again or bool(self.settings.record)  # known answers are not asked for again
            self.ratings = self.load_or_make("judge", stamp, again, self._ratings)

    def _ratings(self):
        asked = self.cards[: self.settings.items]
        return llm_ratings.run(asked, self.judges, self.out, self.settings, self.seeds[0])

    @cached_property
    def cards(self):
        """The test texts and their concepts as people and judges see them."""
        return report.cards(self)

    def write_report(self, again):
        """Write all results as JSON, page and figure, and the packet; print the table."""
        result = report.collect(self)
        results.write_json(self.out / "concepts.json", result)
        title = f"{'/'.join(Path(self.ckpt).resolve().parts[-2:])} · concepts"
        asked = survey.questions(
            self.cards, self._surveyed_methods(), self.vectors.classes, self.seeds[0]
        )
        packet, sheet, key = survey.packet(asked, title)
        files = {
            "concepts.html": page.page(result, title),
            "packet.html": packet,
            "packet.csv": sheet,
            "packet-key.json": key,
        }
        for name, content in files.items():
            with atomic_write(self.out / name) as file:
                file.write(content)
        page.cloud(result, self.out / "concepts.png")
        print(
            f"\n{report.table(result)}\n\nfiles     {self.out / 'concepts.html'}, concepts.json, "
            "concepts.png; for people packet.html, packet.csv"
        )

    def _surveyed_methods(self):
        """The two methods that people are asked about: clvq and kmeans, or others that were run."""
        preferred = dict.fromkeys(["clvq", "kmeans", *self.methods])
        return [method for method in preferred if method in self.methods][:2]


STAGES = {
    "vectors": Pipeline.extract_vectors,
    "discover": Pipeline.discover_codes,
    "controls": Pipeline.train_controls,
    "salience": Pipeline.find_salient_words,
    "faithfulness": Pipeline.measure_faithfulness,
    "judge": Pipeline.ask_judges,
    "report": Pipeline.write_report,
}


# ---- settings and files --------------------------------------------------------------------------


def check_settings(settings):
    """Raise UserError for settings that would be refused only after minutes of work."""
    if 0 < settings.tests < FEWEST_TESTS:
        raise UserError(
            f"--tests {settings.tests} are too few for the probes; give {FEWEST_TESTS} or more, or "
            "0 for all."
        )
    if settings.max_nodes < settings.nodes:
        raise UserError(
            f"--max-nodes {settings.max_nodes} is less than --nodes {settings.nodes}; give "
            f"{settings.nodes} or more."
        )
    choose_methods(settings.methods)
    terminal.plain_file(settings.replay, "--replay")


def choose_layers(text, n_layers):
    """[lower, upper] from --layers.

    By default the last layer, and the one two or a third of all layers below it, whichever is
    further, but not the embeddings. Raises UserError for layers that do not exist.
    """
    if not text:
        distance = max(2, n_layers // 3)
        return [max(n_layers - distance, min(n_layers - 1, 1)), n_layers]
    layers = terminal.number_list(text, "--layers", whole_number, "1,3")
    if len(layers) != 2:
        raise UserError(f"--layers {text} must be two different numbers, like 1,3.")
    word_vectors.check_layers(layers, n_layers)
    return layers


def whole_number(word):
    if not word.strip().isdecimal():
        raise ValueError
    return int(word)


def choose_methods(text):
    """The methods in --methods; all: those whose package is installed.

    Raises UserError for an unknown one.
    """
    if text == "all":
        return [name for name in METHODS if name != "ward" or find_spec("sklearn")]
    names = list(dict.fromkeys(word.strip() for word in text.split(",")))
    for name in names:
        if name not in METHODS:
            raise UserError(
                f"method {name!r} is unknown{cli.nearest(name, METHODS)}; choose from "
                f"{', '.join(METHODS)}."
            )
    if "ward" in names and not find_spec("sklearn"):
        raise UserError(
            "--methods ward needs scikit-learn; `pip install scikit-learn`, or leave ward out."
        )
    return names


def load_salience(path, stamp):
    """The Salience in a file; None if it is missing, damaged, or without this stamp."""
    with suppress(UserError, TypeError):
        content = npz.arrays(path, "find the salient words again")
        if str(content.pop("made", "")) == stamp:
            return salience.Salience(**content)
    return None

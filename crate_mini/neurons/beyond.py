"""The stage `beyond`: what neurons know beyond the token, next to every control.

    text, model -> text_states.py -> beyond_token.py, feature_sets.py, probing.py
                -> beyond.json, beyond.png, beyond-neurons.jsonl

coverage    mean over the properties of r beyond the token of the best feature (beyond_token.py)
privilege   coverage of the neurons minus that of random rotations of their codes
probing     AUPRC of 1 and of 5 features on ambiguous words, against a token table (probing.py)

It reads its own tokens, at most TOKENS of them, and all neurons of a site, whatever --n is: the
best neuron of a property is the best of all.
"""

from contextlib import suppress
from functools import cached_property

import numpy as np
import torch

from crate_mini import UserError
from crate_mini.console import results, terminal
from crate_mini.neurons import beyond_token, feature_sets, metrics, probing, record, text_states
from crate_mini.neurons.documents import FitScoreSplit
from crate_mini.sae import autoencoder
from crate_mini.training.device import choose_device, choose_dtype, machine, product_rate

SCHEMA = 1
TOKENS = 250_000  # read at most, fit and score part together
MEMORY = 1 << 31  # bytes of activations that are kept
ROTATIONS = 5
GROUPS = 32  # of score documents, left out together, for the intervals of probes
SETS = (  # in the order of tables and figures
    "neurons",
    "rotation",
    "pca",
    "untrained",
    "shuffled",
    "token table",
)
PROBED = ("neurons", "rotation", "pca", "untrained")  # and autoencoders
PRODUCTS_OF_A_COLUMN = 6000  # measured: what else a column costs, as columns of a product


def score_beyond(work):
    """Write beyond.json, beyond.png and beyond-neurons.jsonl of a Workspace."""
    texts, properties = _read(work)
    content = {
        "schema": SCHEMA,
        "command": work.command,
        "machine": machine(choose_device("cpu")),
        "record": work.record.header["stamp"],
        "checkpoint": work.record.header["checkpoint"],
        "corpus": work.record.header["corpus"],
        "seed": work.seed,
        "match_density": work.density or None,
        "properties_version": text_states.VERSION,
        "properties": [text_states.NAMES[i] for i in properties.numbers],
        "properties_too_rare": _too_rare(properties),
        "tokens": texts.read,
        "tokens_of_unseen_types": _left_out(texts),
        "documents": _documents(texts),
        "rotations": ROTATIONS,
        "sites": {},
    }
    rows = []
    if not len(properties.numbers):
        work.log("beyond    no property holds on enough tokens; give more text or more --tokens")
    else:
        for name, site_content, site_rows in Battery(work, texts, properties).sites():
            content["sites"][name] = site_content
            rows += site_rows
    results.write_rows(work.folder / "beyond-neurons.jsonl", rows)
    results.write_json(work.folder / "beyond.json", content)
    if content["sites"]:
        from crate_mini.neurons import beyond_report

        beyond_report.figure(content, work.folder / "beyond.png")


def _read(work):
    """(Texts, Properties) of the held-out text of a Workspace."""
    widest = max(site.width for site in work.sites)
    limit = min(work.tokens, TOKENS, MEMORY // (4 * widest))
    T, eot = work.model.config.block_size, work.tokenizer.eot
    split = work.record.header["split"]
    documents = FitScoreSplit(work.corpus, split, eot, T, work.seed, limit)
    states = text_states.TextStates(work.tokenizer.token_bytes)
    texts = beyond_token.read_texts(documents, states)
    return texts, beyond_token.Properties(texts)


def _too_rare(properties):
    scored = set(properties.numbers.tolist())
    return [name for i, name in enumerate(text_states.NAMES) if i not in scored]


def _left_out(texts):
    """{part: share of its tokens} of types that the fit documents hold less than LEAST times."""
    is_fit = texts.is_fit.numpy()
    kept = {"fit": is_fit.sum(), "score": (~is_fit).sum()}
    return {part: round(1 - kept[part] / max(n, 1), 4) for part, n in texts.read.items()}


def _documents(texts):
    is_fit = texts.is_fit.numpy()
    masks = {"fit": is_fit, "score": ~is_fit}
    return {part: len(np.unique(texts.document[mask])) for part, mask in masks.items()}


class Battery:
    """The scores of all sites of a Workspace and of their controls."""

    def __init__(self, work, texts, properties):
        self.work, self.texts, self.properties = work, texts, properties
        documents = len(texts.score_documents)
        groups = min(GROUPS, documents)
        group = np.random.default_rng([work.seed, 7]).permutation(documents) % groups
        without = 1.0 - (group == np.arange(groups)[:, None])
        self.weights = np.concatenate([np.ones((1, documents)), without])  # (1 + groups, D)
        self.puzzles = probing.puzzles(texts, properties, work.tokenizer.token_bytes)
        self.device = work.model.tokens.weight.device
        self.sets_done = 0
        self.progress = terminal.Progress("beyond", sum(map(self._count_sets, work.sites)))

    def sites(self):
        """Yield (name, content for beyond.json, rows for beyond-neurons.jsonl) of each site.

        Sites whose activations fit into MEMORY together share one pass of the model.
        """
        self._announce()
        work = self.work
        for group in self._groups():
            acts = self._activations(work.model, group)
            untrained = {}
            if work.has_init:
                fresh, _ = record.untrained_control(work.model, work.meta, work.seed)
                plain = [site for site in group if site.sae is None]
                untrained = self._activations(fresh, plain)
            for site in group:
                sets = self._sets(site, acts, untrained)
                yield site.name, *self._site(site, sets)

    def _groups(self):
        """Lists of sites whose activations fit into MEMORY together."""
        bytes_of_a_column = 4 * sum(self.texts.read.values())  # two models, float16
        groups, room = [], -1
        for site in self.work.sites:
            needed = site.width * bytes_of_a_column
            if needed > room:
                groups.append([])
                room = MEMORY
            groups[-1].append(site)
            room -= needed
        return groups

    def _activations(self, model, sites):
        """{site: (N, width)}, and {layer: (N, h)} the codes of autoencoders' layers."""
        layers = {site.layer for site in sites if site.sae}
        h = model.config.n_code
        codes = [record.Site(layer, layer, h) for layer in sorted(layers)]
        dtype, _ = choose_dtype(self.device, "auto")
        acts = beyond_token.read_codes(model, self.texts, [*sites, *codes], dtype)
        if self.work.density:
            for site in sites:
                cut = feature_sets.cut(acts[site.name], self.texts.is_fit, self.work.density)
                acts[site.name] = cut
        return acts

    def _count_sets(self, site):
        """How many sets of features a site has with its controls."""
        count = len(SETS) - 1 + ROTATIONS
        if site.sae or not self.work.has_init:
            count -= 1  # no untrained model
        return count if site.sae else count + len(list(self._autoencoders(site.layer)))

    def _announce(self):
        """Log what is about to be done, and about how long it will take."""
        sites, n = self.work.sites, len(self.texts.token)
        products = 0
        for site in sites:
            of_a_set = 2 * n * site.width * (site.width + PRODUCTS_OF_A_COLUMN)
            products += of_a_set * self._count_sets(site)
        rate = product_rate(torch.float32, 512)
        seconds = products / rate
        sites_text = "1 site" if len(sites) == 1 else f"{len(sites)} sites"
        self.work.log(
            f"beyond    {len(self.properties.numbers)} properties of the text so far, {n:,} tokens,"
            f" {self.progress.total} sets of features of {sites_text}: about "
            f"{terminal.eta(seconds)} (minutes:seconds)"
        )

    def _sets(self, site, acts, untrained):
        """{set: [Features]}; the rotations are several, every other set is one."""
        texts, own = self.texts, acts[site.name]
        codes = acts[site.layer] if site.sae else own
        density = feature_sets.density(own[texts.is_fit])
        rng = self.work.rng(site, "beyond")
        rotations = []
        for _ in range(ROTATIONS):
            rotations.append(feature_sets.rotation(codes, density, texts.is_fit, rng))
        sets = {
            "neurons": [feature_sets.Features(own)],
            "rotation": rotations,
            "pca": [feature_sets.principal_components(codes, density, texts.is_fit, rng)],
        }
        if site.name in untrained:
            sets["untrained"] = [feature_sets.Features(untrained[site.name])]
        sets["shuffled"] = [feature_sets.shuffled(own, texts, rng)]
        sets["token table"] = [feature_sets.TokenMeans(own, texts)]
        if not site.sae:
            for sae in self._autoencoders(site.layer):
                sets[f"sae {sae.name}"] = [feature_sets.Encoded(own, sae)]
        return sets

    def _autoencoders(self, layer):
        """The autoencoders of a layer's codes that `interpret.py sae` left in the folder."""
        for path in sorted(self.work.folder.glob(f"sae-L{layer}-*.pt")):
            with suppress(UserError):  # of another model
                yield autoencoder.load(path, self.work.model)[0].cpu()

    # ---- one site --------------------------------------------------------------------------------

    def _site(self, site, sets):
        """(name, content, rows of neurons) of a site."""
        content, by_document, rows = {"layer": site.layer, "width": site.width, "sets": {}}, {}, []
        for name, members in sets.items():
            scored = [self._scored(features) for features in members]
            values = [beyond_token.coverage_by_document(m["moments"]) for m in scored]
            by_document[name] = np.mean(values, 0)
            summary = _summary(scored) | {"ci95": self._interval(by_document[name])}
            if name in PROBED or name.startswith("sae"):
                summary["probing"] = self._probing(members[0])
            content["sets"][name] = summary
            if name == "neurons":
                rows = self._rows(site, scored[0])
        for name, summary in content["sets"].items():
            neurons = content["sets"]["neurons"]["coverage"]
            summary["neurons_minus"] = {
                "difference": neurons - summary["coverage"],
                "ci95": self._interval(by_document["neurons"] - by_document[name]),
            }
        content["probing"] = self._probing_controls()
        return content, rows

    def _scored(self, features):
        """The scores of one set: {"best", "r_fit", "moments", "neurons", "density"}."""
        texts, properties = self.texts, self.properties
        correlations = beyond_token.correlate(texts, properties, features)
        best = beyond_token.best_features(correlations.r["fit"])
        at_best = best, np.arange(len(best))
        self.sets_done += 1
        self.progress.update(self.sets_done)
        return {
            "best": best,
            "r_fit": correlations.r["fit"][at_best],
            "r": correlations.r["score"][at_best],
            "moments": beyond_token.document_moments(texts, properties, features, best),
            "neurons": beyond_token.neuron_scores(correlations),
            "density": correlations.density,
        }

    def _interval(self, values):
        return beyond_token.interval(values, self.work.seed)

    def _rows(self, site, scored):
        """Lines of beyond-neurons.jsonl: the property that each neuron follows best."""
        names = [text_states.NAMES[i] for i in self.properties.numbers]
        rows = []
        for j, (best, r) in enumerate(zip(*scored["neurons"])):
            row = {"site": site.name, "neuron": j, "property": None, "r": None}
            if np.isfinite(r):
                row |= {"property": names[best], "r": metrics.rounded(r)}
            rows.append(row)
        return rows

    # ---- probing ---------------------------------------------------------------------------------

    def _auprc(self, predictions):
        """(mean over puzzles, (groups,) what each group of documents says of it)."""
        values = []
        for puzzle, predicted in zip(self.puzzles, predictions):
            weights = self.weights[:, puzzle.document]
            values.append(probing.average_precision(puzzle.score_holds, predicted, weights))
        whole, *without = np.mean(values, 0).tolist()
        return whole, beyond_token.pseudo_values(whole, np.array(without))

    @cached_property
    def _table_auprc(self):
        return self._auprc([puzzle.table for puzzle in self.puzzles])

    def _probing(self, features):
        """{"k = 1": {"auprc", "ci95", "minus_table"}, ...} of a set; {} if there is no puzzle."""
        content = {}
        if not self.puzzles:
            return content
        table, of_table = self._table_auprc
        n = len(self.texts.token)
        for k, predictions in probing.probe(self.puzzles, features, n).items():
            mean, by_group = self._auprc(predictions)
            content[f"k = {k}"] = {
                "auprc": mean,
                "ci95": self._interval(by_group),
                "minus_table": {
                    "difference": mean - table,
                    "ci95": self._interval(by_group - of_table),
                },
            }
        return content

    def _probing_controls(self):
        """{"properties", "table", "chance"}: AUPRC of the token table, and of no information."""
        if not self.puzzles:
            return {"properties": []}
        table, by_group = self._table_auprc
        return {
            "properties": [text_states.NAMES[puzzle.number] for puzzle in self.puzzles],
            "table": {"auprc": table, "ci95": self._interval(by_group)},
            "chance": float(np.mean([puzzle.score_holds.mean() for puzzle in self.puzzles])),
        }


def _summary(scored):
    """The content of beyond.json for the members of a set; what is of one is of the first."""
    coverages = [float(beyond_token.coverage_of(m["moments"].sum(0))) for m in scored]
    neuron_means = [_mean_of_defined(m["neurons"][1]) for m in scored]
    first = scored[0]
    best = []
    for feature, r_fit, r in zip(first["best"].tolist(), first["r_fit"], first["r"]):
        best.append([feature, _number(r_fit), _number(r)])
    return {
        "n": len(scored),
        "coverage": float(np.mean(coverages)),
        "each": coverages,
        "neuron_mean": _number(np.mean(neuron_means)),
        "density": float(np.mean([m["density"] for m in scored])),
        "best": best,
    }


def _mean_of_defined(r):
    """The mean of r (h,) without NaN; NaN if there is nothing else."""
    defined = r[np.isfinite(r)]
    return defined.mean() if len(defined) else np.nan


def _number(r):
    """A correlation for a JSON file, None if undefined."""
    return round(float(r), 4) if np.isfinite(r) else None

"""`interpret.py selftest`: planted neurons show which simulators and metrics can be trusted.

    simulators  Every explanation of a planted neuron, true or false, has a neuron that does what
                it says. A simulator is given an explanation by making it from that neuron; with
                the true one it must predict the planted neuron better than with any false one.
    metrics     A perfect prediction must lose score when half of the places where it fires are
                removed, and when half as many are added (Oikarinen, Yan & Weng 2025). One that is
                wrong by a millionth must score 1 like a perfect one, however seldom the neuron
                fires.
    beyond      Scores beyond the token find every planted property of the text so far, and give
                a function of the token alone nothing (selftest_beyond.py).

The planted neurons go through the stages record, select, explain, simulate and score like those of
any model.
"""

from dataclasses import dataclass

import numpy as np
import torch

from crate_mini import stats
from crate_mini.cli import setting
from crate_mini.console import results, terminal
from crate_mini.data.batches import open_corpus
from crate_mini.data.tokenizer import load_tokenizer
from crate_mini.neurons import pipeline, planted, protocols, score_files, selftest_beyond
from crate_mini.neurons.labels import LABEL_TOKENS
from crate_mini.neurons.record import sites
from crate_mini.neurons.simulators import excerpt_table
from crate_mini.neurons.trie import Trie
from crate_mini.neurons.workspace import Workspace
from crate_mini.training.device import choose_device, machine

MARGIN = 0.05  # in r, by which the true explanation must win
EXPRESSES = 0.9  # r from which a simulator is said to express an explanation
DRAWS = 20  # of the places to remove or add, for each neuron
PASS = 0.95  # share of the draws in which the score must fall
NEARLY = 1e-6  # error of a nearly perfect prediction, in units of the neuron's maximum
CEILING = 0.99  # what that must score at least


@dataclass
class Settings:
    """Planted neurons: which simulators and metrics can be trusted?

    Every simulator must prefer the true explanation to false ones, and every metric must punish
    missing and superfluous activations.
    """

    documents: int = setting(1500, "documents of 64 to 192 random characters", low=100, high=10**6)
    seed: int = setting(0, "seed of the documents and of everything drawn from them")
    out: str = setting("out/selftest", "folder of the results")


def run(settings):
    """Write selftest.json to the folder and print its table."""
    folder = results.ready_folder(settings.out)
    outcome = solve(folder, settings.documents, settings.seed)
    result = {
        "schema": 1,
        "command": results.command("interpret.py"),
        "machine": machine(choose_device("cpu")),
        **outcome,
        "beyond": selftest_beyond.solve(folder, settings.seed),
    }
    path = results.write_json(folder / "selftest.json", result)
    beyond = selftest_beyond.table(result["beyond"])
    print(f"\n{table(outcome)}\n\n{beyond}\n\nfile      {path}")


def solve(folder, documents=1500, seed=0, log=print):
    """Run the stages in `folder` and judge; returns {"simulators", "metrics", ...}, JSON-able.

    Raises UserError as the stages do.
    """
    source = folder / "puzzles.jsonl"
    planted.write_texts(source, documents, seed)
    tokenizer = load_tokenizer("bytes")
    corpus = open_corpus(str(source), tokenizer, folder / "cache", 1.0, log=log)
    model = planted.PlantedModel()
    work = Workspace(
        model,
        {"tokenizer": {"spec": "bytes"}},
        tokenizer,
        corpus,
        folder,
        sites(model),
        path="planted",
        seed=seed,
        controls=("shuffle",),
        trie=len(planted.EXPLANATIONS),
        log=log,
    )
    pipeline.run(work, until="score")
    puzzles = []
    for neuron in planted.PLANTED:
        puzzles.append(
            {
                "name": neuron.name,
                "expect": neuron.expect,
                "true": neuron.true.text,
                "false": [explanation.text for explanation in neuron.false],
            }
        )
    return {
        "simulators": judge_simulators(work),
        "metrics": judge_metrics(work),
        "seed": seed,
        "documents": documents,
        "puzzles": puzzles,
    }


# ---- simulators ----------------------------------------------------------------------------------


def predictions(work):
    """{simulator: (W, T, h)}: what it expects on the uniform windows, given each explanation."""
    site, windows = work.sites[0], work.record.shared["uniform_score"]
    simulated, selected = work.read("simulate", site), work.read("select", site)
    ids = torch.from_numpy(windows.astype(np.int64))
    literal = [explanation.predict(ids)[:, 1:].numpy() for _, explanation in planted.EXPLANATIONS]
    from_five, from_trie = [], []
    for j, line in enumerate(work.explanations(site)):
        five = work.selected(selected, "openai_tar", "fit", j)
        from_five.append(excerpt_table(five.tokens, five.acts)(windows))
        from_trie.append(Trie.of(line["trie"])(windows))
    return {
        "perfect reader": np.stack(literal, -1),
        "token": simulated.uniform_token,
        "ngram": simulated.uniform_ngram,
        f"label@{LABEL_TOKENS}": simulated.uniform_label,
        "five excerpts": np.stack(from_five, -1),
        "trie": np.stack(from_trie, -1),
    }


def judge_simulators(work):
    """{simulator: {planted neuron: {"true": r, "false": [r, ...], "passes", ...}}}.

    r is on the uniform windows of the score part.
    """
    true_acts = work.record.site("L0")["uniform_score_acts"].astype(np.float64)
    rows = score_files.read_rows(work.folder / "scores.jsonl")
    judged = {}
    for simulator, expected in predictions(work).items():
        judged[simulator] = {}
        for neuron in planted.PLANTED:
            columns = [i for i, (p, _) in enumerate(planted.EXPLANATIONS) if p is neuron]
            acts = true_acts[..., columns[0]].ravel()
            status = rows[columns[0]]["status"]
            judged[simulator][neuron.name] = _judge(
                simulator, neuron.expect, status, acts, expected[..., columns]
            )
    return judged


def _judge(simulator, expect, status, acts, expected):
    """One simulator on one planted neuron; expected (W, T, n), the true explanation first."""
    n = expected.shape[-1]
    values, reasons = stats.pearson(np.stack([acts] * n, -1), expected.reshape(-1, n))
    r = [None if reason else float(value) for value, reason in zip(values, reasons)]
    true, false = r[0], r[1:]
    best_false = max((value for value in false if value is not None), default=-1.0)
    chance = 3 / np.sqrt(acts.size)
    if expect == "true wins":
        passes = true is not None and true > best_false + MARGIN
    elif expect == "no score":
        passes = true is None or abs(true) < chance or simulator == "perfect reader"
    elif expect == "undefined":
        passes = true is None and status == "undefined"
    else:
        passes = status == "dead"
    return {
        "true": true,
        "false": false,
        "passes": bool(passes),
        "why": reasons[0],
        "expresses": true is not None and true >= EXPRESSES,
        "status": status,
    }


# ---- metrics -------------------------------------------------------------------------------------


def judge_metrics(work):
    """{metric: what became of its score when a perfect prediction was changed}.

    "removed", "added": the share of draws in which it fell, which "passes" asks for; "nearly": the
    lowest score, over planted neurons, of the truth with an error of NEARLY, expected to be 1;
    "reaches_1": whether it is, within 1 - CEILING.
    """
    site, rng = work.sites[0], np.random.default_rng(work.seed)
    arrays, selected = work.record.site(site.name), work.read("select", site)
    acts = arrays["uniform_score_acts"].astype(np.float64)
    falls, nearly = {}, {}
    for j, (neuron, _) in enumerate(planted.EXPLANATIONS):
        if neuron.expect != "true wins":
            continue
        density = float(arrays["density"][j])
        truths = {"uniform": acts[..., [j]]}
        for protocol in _selected_protocols(selected):
            truths[protocol] = work.selected(selected, protocol, "score", j)
        for name, truth in truths.items():
            _note_falls(name, truth, density, rng, falls)
            values = _values(name, truth)
            error = NEARLY * np.nanmax(values, initial=0) * rng.random(values.shape)
            for metric, score in scores(name, truth, values + error).items():
                nearly.setdefault(metric, []).append(score)
    judged = {}
    for metric, by_change in falls.items():
        judged[metric] = {how: round(float(np.mean(fell)), 4) for how, fell in by_change.items()}
        judged[metric]["passes"] = all(np.mean(fell) >= PASS for fell in by_change.values())
        lowest = min((score for score in nearly[metric] if score is not None), default=None)
        judged[metric]["nearly"] = lowest
        judged[metric]["reaches_1"] = lowest is not None and lowest >= CEILING
    return judged


def _note_falls(name, truth, density, rng, falls):
    """Note in falls {metric: {"removed" or "added": [whether the score fell, ...]}}."""
    values = _values(name, truth)
    perfect = scores(name, truth, values)
    for how in ("removed", "added"):
        for _ in range(DRAWS):
            fires = (np.nan_to_num(values) > 0) * 1.0
            worse = scores(name, truth, spoil(fires, how, density, rng))
            for metric, best in perfect.items():
                if best is not None:
                    fell = worse[metric] is None or worse[metric] < best - 1e-9
                    falls.setdefault(metric, {}).setdefault(how, []).append(fell)


def _values(name, truth):
    """The true activations of one set of excerpts, NaN where padded; arguments as `scores`."""
    return truth if name == "uniform" else truth.acts


def _selected_protocols(selected):
    """The protocols that excerpts were selected for, sorted by name."""
    ending = "_score_acts"
    return sorted(name.removesuffix(ending) for name in vars(selected) if name.endswith(ending))


def scores(name, truth, predicted):
    """{metric: number or None} of every metric that applies to one set of excerpts.

    name: "uniform", with truth (W, T, 1), or a protocol, with its Excerpts.
    """
    if name != "uniform":
        names = ("openai_tar", "openai_random") if name == "openai_tar" else (name,)
        return {key: protocols.score_excerpts(key, truth, predicted)[0] for key in names}
    by_metric = {}
    uniform = protocols.score_uniform(truth, predicted, [truth.max()])
    for key in ("r", "f1", "auprc"):
        values, reasons = uniform[key]
        by_metric[f"uniform {key}"] = None if reasons[0] else float(values[0])
    return by_metric


def spoil(predicted, how, density, rng):
    """A prediction (array of 0 and 1) with firing places removed or added, half as many as it has.

    density: how often the neuron fires on ordinary text. It sets how many places are added: as
    many as an explanation that is too wide would add to these excerpts.
    """
    places = rng.random(predicted.shape)
    if how == "removed":
        return predicted * (places < 0.5)
    return np.maximum(predicted, places < 0.5 * density / (1 - density))


# ---- the table -----------------------------------------------------------------------------------


def table(outcome):
    """The result of `solve` as text."""
    names = "".join(puzzle["name"].rjust(18) for puzzle in outcome["puzzles"])
    lines = [f"{'r, told the truth (best lie)':30}{names}  passes"]
    for simulator, judged in outcome["simulators"].items():
        cells = "".join(_cell(result) for result in judged.values())
        won = sum(result["passes"] for result in judged.values())
        lines.append(f"{simulator:30}{cells}  {won} of {len(judged)}")
    lines += [
        "",
        "ok: truth beats every lie; noise scores nothing; dead and constant neurons count as such",
        "",
        f"{'lower score with firing places':30}{'half removed':>18}{'half as many added':>20}"
        f"{'truth off by 1e-6':>23}",
    ]
    for metric, result in outcome["metrics"].items():
        verdict = "ok" if result["passes"] else "--"
        nearly = "none" if result["nearly"] is None else f"{result['nearly']:.3f}"
        ceiling = "ok" if result["reaches_1"] else "--"
        lines.append(
            f"{metric:30}{result['removed']:18.1%}{result['added']:20.1%}  {verdict}"
            f"{nearly:>16}  {ceiling}"
        )
    lines += ["", "ok: lower in 95 % of draws; a truth off by 1e-6 scores 1, the lowest is shown"]
    return "\n".join(lines)


def _cell(result):
    """A simulator on one planted neuron: r with the truth, (with the best lie), verdict."""
    best_lie = max((value for value in result["false"] if value is not None), default=None)
    numbers = f"{_short(result['true'])} ({_short(best_lie)})"
    return f"{numbers} {'ok' if result['passes'] else '--'}".rjust(18)


def _short(r):
    """A correlation in four characters: " .93"."""
    return "none" if r is None else f"{r:.2f}".replace("0.", ".", 1)


COMMAND = terminal.Command(Settings, run, checkpoint=False)

"""`interpret.py selftest`: do simulators tell a true explanation from false ones, and metrics a worse one?

    simulators  each puzzle's neuron is planted, and so are neurons that do what its false explanations say. A
                simulator is told an explanation by being made from the neuron that does what it says; told
                the true one, it must predict the puzzle's neuron better than told any false one.
    metrics     (Oikarinen, Yan & Weng 2025) a perfect prediction from which half of the places where it fires
                are removed, or to which half as many are added, must score lower.

The planted neurons go through record, select, explain, simulate and score like those of any model.
"""

import numpy as np
import torch

from crate_mini import stats as metrics
from crate_mini.data import batches as data
from crate_mini.neurons import pipeline as neurons
from crate_mini.neurons import planted as puzzles
from crate_mini.neurons import protocols as score
from crate_mini.neurons import simulators as explain
from crate_mini.neurons.record import sites

MARGIN = 0.05  # by which the true explanation must win: a tie is no win
CLOSE = 0.9  # r from which we say that a simulator can express an explanation
DRAWS = 20  # of what is removed and added, for each neuron
PASS = 0.95  # share of them in which the score must be lower
WON = [i for i, (puzzle, _) in enumerate(puzzles.READINGS) if puzzle.expect == "true wins"]


def solve(folder, documents=1500, seed=0, log=print):
    """{"simulators", "metrics", "command": ..} of a run in `folder`; see the module. JSON-able."""
    puzzles.write_texts(folder / "puzzles.jsonl", documents, seed)
    tokenizer = data.load_tokenizer("bytes")
    corpus = data.open_corpus(
        str(folder / "puzzles.jsonl"), tokenizer, folder / "cache", 1.0, log=log
    )
    model, meta = puzzles.Planted(), {"tokenizer": {"spec": "bytes"}}
    r = neurons.Run(
        model,
        meta,
        tokenizer,
        corpus,
        folder,
        sites(model),
        "planted",
        seed=seed,
        controls=("shuffle",),
        trie=len(puzzles.READINGS),
        log=log,
    )
    neurons.run(r, until="score")
    return {
        "simulators": simulators(r),
        "metrics": checks(r),
        "seed": seed,
        "documents": documents,
        "puzzles": [
            {
                "name": p.name,
                "expect": p.expect,
                "true": p.true.text,
                "false": [reading.text for reading in p.false],
            }
            for p in puzzles.PUZZLES
        ],
    }


# ---- simulators ------------------------------------------------------------------------------------------


def predictions(r):
    """{simulator: (W, T, h)}: what it expects of the uniform windows, told each of the h explanations."""
    site, windows = r.sites[0], r.record.shared["uniform_score"]
    sims, selected, lines = r.read("simulate", site), r.read("select", site), r.explained(site)
    five = [
        explain.five_table(e.tokens, e.acts)
        for e in (r.chosen(selected, "openai_tar", "fit", j) for j in range(site.width))
    ]
    tries = [explain.Trie.of(line["trie"]) for line in lines]
    literal = torch.from_numpy(windows.astype(np.int64))
    return {
        "perfect reader": np.stack(
            [reading.predict(literal)[:, 1:].numpy() for _, reading in puzzles.READINGS], -1
        ),
        "token": sims.uniform_token,
        "ngram": sims.uniform_ngram,
        f"label@{explain.SHOWN}": sims.uniform_label,
        "five excerpts": np.stack([table(windows) for table in five], -1),
        "trie": np.stack([trie(windows) for trie in tries], -1),
    }


def simulators(r):
    """{simulator: {puzzle: {"true": r, "false": [r, ..], "passes": bool, ..}}}: r on the uniform windows."""
    true = r.record.site("L0")["uniform_score_acts"].astype(np.float64)
    status = [row["status"] for row in score.read_rows(r.folder / "scores.jsonl")]
    noise = 3 / np.sqrt(true[..., 0].size)
    found = {}
    for name, expected in predictions(r).items():
        for puzzle in puzzles.PUZZLES:
            own = [i for i, (p, _) in enumerate(puzzles.READINGS) if p is puzzle]
            y = np.stack([true[..., own[0]].ravel()] * len(own), -1)
            values, why = metrics.pearson(y, expected[..., own].reshape(len(y), -1))
            seen = [None if reason else float(v) for v, reason in zip(values, why)]
            first, best = seen[0], max((v for v in seen[1:] if v is not None), default=-1.0)
            passes = {
                "true wins": first is not None and first > best + MARGIN,
                "no score": first is None or abs(first) < noise or name == "perfect reader",
                "undefined": first is None and status[own[0]] == "undefined",
                "dead": status[own[0]] == "dead",
            }[puzzle.expect]
            found.setdefault(name, {})[puzzle.name] = {
                "true": first,
                "false": seen[1:],
                "passes": bool(passes),
                "why": why[0],
                "expresses": first is not None and first >= CLOSE,
                "status": status[own[0]],
            }
    return found


# ---- metrics ---------------------------------------------------------------------------------------------


def spoiled(predicted, how, share, rng):
    """A prediction with half of the places where it fires removed, or half as many added.

    predicted: arrays of 0 and 1; share: how often the neuron fires on ordinary text, which says how many
    added places an explanation that is too wide would have here.
    """
    places = rng.random(predicted.shape)
    if how == "removed":
        return predicted * (places < 0.5)
    return np.maximum(predicted, places < 0.5 * share / (1 - share))


def checks(r):
    """{metric: {"removed", "added": share of draws with a lower score, "passes": bool}}; see the module."""
    site, rng, lower = r.sites[0], np.random.default_rng(r.seed), {}
    own, selected = r.record.site(site.name), r.read("select", site)
    acts = own["uniform_score_acts"].astype(np.float64)
    for j in WON:
        share, sets = float(own["density"][j]), {"uniform": acts[..., [j]]}
        sets |= {
            name: r.chosen(selected, name, "score", j) for name in selected_protocols(selected)
        }
        perfect = {
            name: measured(name, truth, truth if name == "uniform" else truth.acts)
            for name, truth in sets.items()
        }
        for how in ("removed", "added"):
            for _ in range(DRAWS):
                for name, truth in sets.items():
                    base = truth if name == "uniform" else np.nan_to_num(truth.acts)
                    worse = measured(name, truth, spoiled((base > 0) * 1.0, how, share, rng))
                    for metric, value in perfect[name].items():
                        if value is not None:
                            fell = worse[metric] is None or worse[metric] < value - 1e-9
                            lower.setdefault(metric, {}).setdefault(how, []).append(fell)
    return {
        metric: {how: round(float(np.mean(fell)), 4) for how, fell in found.items()}
        | {"passes": all(np.mean(fell) >= PASS for fell in found.values())}
        for metric, found in lower.items()
    }


def selected_protocols(selected):
    """The protocols that excerpts were selected for."""
    return sorted(
        name[: -len("_score_acts")] for name in vars(selected) if name.endswith("_score_acts")
    )


def measured(name, truth, predicted):
    """{metric: number or None}: every metric that applies to the truth of one protocol."""
    if name == "uniform":
        found = score.uniform(truth, predicted, firing=True)
        return {
            f"uniform {key}": None if why[0] else float(value[0])
            for key, (value, why) in found.items()
        }
    names = ("openai_tar", "openai_random") if name == "openai_tar" else (name,)
    return {key: score.protocol(key, truth, predicted)[0] for key in names}


# ---- the table -------------------------------------------------------------------------------------------


def told(found):
    """What `solve` returned as text."""
    names = [p["name"] for p in found["puzzles"]]
    lines = [
        f"{'r, told the truth (best lie)':30}" + "".join(n.rjust(18) for n in names) + "  passes"
    ]
    for simulator, results in found["simulators"].items():
        cells = []
        for result in results.values():
            lie = max((v for v in result["false"] if v is not None), default=None)
            numbers = f"{short(result['true'])} ({short(lie)})"
            cells.append(f"{numbers} {'ok' if result['passes'] else '--'}".rjust(18))
        won = sum(result["passes"] for result in results.values())
        lines.append(f"{simulator:30}" + "".join(cells) + f"  {won} of {len(results)}")
    lines += [
        "",
        "ok: truth beats every lie; noise scores nothing; dead and constant neurons are counted so",
        "",
        f"{'lower score with firing places':30}{'half removed':>18}{'half as many added':>20}",
    ]
    for metric, result in found["metrics"].items():
        verdict = "ok" if result["passes"] else "--"
        lines.append(f"{metric:30}{result['removed']:18.1%}{result['added']:20.1%}  {verdict}")
    return "\n".join(lines)


def short(value):
    """A correlation in four characters."""
    return "none" if value is None else f"{value:.2f}".replace("0.", ".", 1)

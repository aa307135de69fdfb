"""steering.json, which `steer.py measure` wrote, as printed tables and, several together, as a figure."""

from crate_mini.activations import kind_of
from crate_mini.dose import AT_KL, METRICS
from crate_mini.model import Config
from crate_mini.views.figures import AMBER, BLUE, GREEN, GREY, RED, grid, write

COLORS = BLUE, GREEN, RED, AMBER, "#7a5195"
LINES = {"neuron": "o-", "feature": "s-", "feature+error": "^--", "random": "x:"}
INSERTED = "inserted, nothing turned"


def name(result):
    """crate 3L, gpt2 2L: the kind of model and its layers."""
    config = Config(**result["checkpoint"]["config"])
    return f"{kind_of(config)} {config.n_layer}L"


def cell(found):
    """mean [95 % interval], or the reason for none."""
    if found["mean"] is None:
        return "none reached"
    return f"{found['mean']:+.3g} [{found['ci95'][0]:.3g}, {found['ci95'][1]:.3g}]"


def markdown(head, rows):
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(v) for v in line) + " |" for line in lines)


def table(result):
    """Everything measured, as markdown: doses, equal side effect, cost of inserting, attribution by layer."""
    doses = [[kind, f"{dose}x", *(cell(found[m]) for m in METRICS)]
             for kind, all_doses in result["summary"].items() for dose, found in all_doses["doses"].items()]
    equal = [[kind, *(cell(f) for f in found["at_kl"].values()), found["at_kl"]["effect"]["n"]]
             for kind, found in result["summary"].items()]
    inserted = [[r["layer"], r["kind"], f"{r['kl']:.4g}", f"{r['loss']:+.4g}"] for r in result["inserted"]]
    told = [[r["layer"], f"{r['dose']:g}x", f"{r['correlation']:.3f}", f"{r['top10']:.2f}"]
            for r in result["attribution"]]
    return "\n\n".join((
        markdown(["kind", "dose", "effect", "own", "seen", "KL", "loss"], doses),
        markdown([f"kind, at KL {AT_KL}", "effect", "own", "seen", "n"], equal),
        markdown(["layer", INSERTED, "KL", "loss"], inserted),
        markdown(["layer", "direct attribution at", "correlation with a run", "top 10 shared"], told)))


PANELS = (  # title, what is drawn against what
    ("effect", None, "effect"), ("side effect", None, "kl"), ("effect for side effect", "kl", "effect"),
    ("tokens seen to follow, for side effect", "kl", "seen"))
WORDS = {None: "dose (x observed maximum)", "kl": "KL from the unsteered model (nats)",
         "effect": "change of log-probability (nats)", "seen": "change of log-probability (nats)"}


def figure(results, target):
    """Draw dose against effect and side effect, and effects against side effect; results: a list."""
    drawn, axes = grid(4, 2, (5, 3.4))
    for result, color in zip(results, COLORS * len(results)):
        for kind, found in result["summary"].items():
            for axis, (_, x, y) in zip(axes, PANELS):
                ys = [f[y] for f in found["doses"].values()]
                xs = [f[x]["mean"] if x else float(d) for d, f in found["doses"].items()]
                axis.errorbar(xs, [v["mean"] for v in ys], _bars(ys), fmt=LINES[kind], markersize=4,
                              color=GREY if kind == "random" and len(results) == 1 else color, linewidth=1.2,
                              capsize=2, label=f"{name(result)}, {kind}")
    for axis, (title, x, y) in zip(axes, PANELS):
        axis.set(title=title, xlabel=WORDS[x], ylabel=WORDS[y], xscale="log")
        if x is None:
            doses = [float(d) for d in found["doses"]]
            axis.set_xticks(doses, [f"{d:g}" for d in doses])
            axis.set_xticks([], minor=True)
        else:
            axis.axvline(AT_KL, color=GREY, linewidth=.8)
    axes[1].set_yscale("log")
    handles, labels = axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, frameon=False, loc="outside lower center", ncols=4, fontsize=8)
    return write(drawn, target)


def _bars(values):
    """Distances from the means to the ends of their intervals."""
    return [[abs(v["mean"] - v["ci95"][side]) for v in values] for side in (0, 1)]

"""beyond.json as a printed table and as a figure: coverage first, with its rotation control."""

from crate_mini.console.terminal import aligned
from crate_mini.plots.figure import AMBER, BLUE, GREEN, GREY, RED, grid, shared_legend, write

STYLES = {  # set: (name, colour, marker)
    "neurons": ("neurons", BLUE, "o"),
    "rotation": ("random rotation, equal density", RED, "s"),
    "pca": ("principal components, equal density", AMBER, "D"),
    "untrained": ("untrained model", GREY, "v"),
    "shuffled": ("other token of the same type", GREY, "x"),
    "token table": ("token table", GREY, "+"),
}
PROPERTIES = 24  # in the lower panel of the figure


def table(content):
    """The scores of beyond.json as text; says so if no property could be scored."""
    sites = content["sites"]
    if not sites:
        return "beyond the token: no property of the text holds on enough tokens to be scored."
    properties = content["properties"]
    tokens, documents = content["tokens"], content["documents"]
    lines = [
        f"beyond the token: {len(properties)} exact properties of the text so far (list "
        f"{content['properties_version']}), r after each token's mean is removed;",
        f"best feature of each chosen on {documents['fit']:,} documents ({tokens['fit']:,} "
        f"tokens), read on {documents['score']:,} others ({tokens['score']:,});",
        "[95 % interval, score documents redrawn; the choice of features stays]",
        "",
    ]
    for site, scores in sites.items():
        lines += [aligned_left(_site_rows(site, scores)), ""]
    lines.append(
        "coverage: mean over the properties, of the best feature of each. minus rotation: is the "
        "neurons' basis\nprivileged? neuron mean: a descriptor, each neuron's best property among "
        "the tokens it fires on.\nk = 1, k = 5: AUPRC of sparse probes on ambiguous words."
    )
    return "\n".join(lines)


def _site_rows(site, scores):
    """Rows of cells: one for each set of features of a site."""
    head = [site, "coverage", "neurons minus it", "neuron mean", "density", "k = 1", "k = 5"]
    rows = [head]
    for name, of_set in scores["sets"].items():
        minus = "" if name == "neurons" else _with_interval(of_set["neurons_minus"], "difference")
        mean = of_set["neuron_mean"]
        probes = [_auprc(of_set.get("probing", {}), k) for k in ("k = 1", "k = 5")]
        rows.append(
            [
                name,
                _with_interval(of_set, "coverage"),
                minus,
                "-" if mean is None else f"{mean:.3f}",
                f"{of_set['density']:.3f}",
                *probes,
            ]
        )
    probing = scores["probing"]
    if probing["properties"]:
        n = len(probing["properties"])
        table_text = f"{probing['table']['auprc']:.3f}"
        rows[-1][-2:] = [table_text, table_text]
        rows.append([f"chance, {n} probes", "", "", "", "", f"{probing['chance']:.3f}", ""])
    return rows


def _auprc(probing, k):
    return f"{probing[k]['auprc']:.3f}" if k in probing else ""


def _with_interval(entry, name):
    low, high = entry["ci95"]
    return f"{entry[name]:.3f} [{low:.3f}, {high:.3f}]"


def aligned_left(rows):
    """Rows as `aligned`, with the first column on the left."""
    width = max(len(row[0]) for row in rows)
    padded = [[row[0].ljust(width), *row[1:]] for row in rows]
    return "\n".join(line.rstrip() for line in aligned(padded).splitlines())


# ---- the figure ----------------------------------------------------------------------------------


def figure(content, target):
    """Draw coverage by site for each set, and the best neuron of each property; returns the path.

    The second panel is of the site whose coverage is largest: the neuron of each property, chosen
    on the fit documents, next to the best direction of a random rotation.
    """
    sites = content["sites"]
    drawn, panels = grid(2, 2, (6.4, 6.2))
    _draw_coverage(panels[0], sites)
    best = max(sites, key=lambda site: sites[site]["sets"]["neurons"]["coverage"])
    _draw_properties(panels[1], best, sites[best], content["properties"])
    shared_legend(drawn, panels[:1])
    drawn.suptitle(
        f"what neurons know beyond the token: {len(content['properties'])} exact properties of "
        "the text so far"
    )
    return write(drawn, target)


def _draw_coverage(axes, sites):
    names = list(dict.fromkeys(name for scores in sites.values() for name in scores["sets"]))
    for i, name in enumerate(names):
        label, color, marker = STYLES.get(name, (name, GREEN, "^"))
        shift = 0.06 * (i - (len(names) - 1) / 2)
        for place, scores in enumerate(sites.values()):
            if name not in scores["sets"]:
                continue
            entry = scores["sets"][name]
            low, high = entry["ci95"]
            x, y = place + shift, entry["coverage"]
            axes.plot([x, x], [low, high], color=color, linewidth=1.2)
            axes.plot([x], [y], marker, color=color, label=label, markersize=6, linestyle="none")
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_xticks(range(len(sites)), sites)
    axes.set_xlim(-0.5, len(sites) - 0.5)
    axes.set(xlabel="site", ylabel="coverage: mean r beyond the token")
    axes.set_title("best feature of each property, on other documents", fontsize=10)


def _draw_properties(axes, site, scores, properties):
    neurons, rotation = scores["sets"]["neurons"]["best"], scores["sets"]["rotation"]["best"]
    pairs = []
    for name, (neuron, _, r), (_, _, r_rotation) in zip(properties, neurons, rotation):
        pairs.append((r or 0, r_rotation or 0, f"{name}  ({neuron})"))
    pairs = sorted(pairs)[-PROPERTIES:]
    for y, (r, r_rotation, _) in enumerate(pairs):
        axes.plot([r_rotation, r], [y, y], color=GREY, linewidth=1)
        axes.plot([r_rotation], [y], "s", color=RED, markersize=5)
        axes.plot([r], [y], "o", color=BLUE, markersize=6)
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set_yticks(range(len(pairs)), [text for _, _, text in pairs], fontsize=7.5)
    axes.set(xlabel="r beyond the token")
    axes.set_title(f"{site}: the {len(pairs)} best covered properties (neuron)", fontsize=10)

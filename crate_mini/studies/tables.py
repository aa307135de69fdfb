"""The README's tables in Markdown, from the files in results/ alone: `python -m crate_mini.studies.tables`."""

import itertools
import re
import statistics
from pathlib import Path

from crate_mini import cli
from crate_mini.steering import figure as dose_views

RESULTS = Path(__file__).resolve().parents[2] / "results"
NAMES = {"crate": "CRATE (paper)", "crate+": "crate+", "gpt2": "GPT-2 twin"}


def default(found):
    """The default run: means over seeds; spread is the largest minus the smallest loss."""
    lines = [
        "| model | seeds | validation loss | spread | bits per byte | density | tokens/s | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind in NAMES:
        rows = [r for r in found["runs"] if r["model"] == kind]
        m = {
            k: statistics.mean(r[k] for r in rows)
            for k in ("val_loss", "bits_per_byte", "density", "tokens_per_s", "minutes")
        }
        spread = f"{max(r['val_loss'] for r in rows) - min(r['val_loss'] for r in rows):.3f}"
        spread = spread if len(rows) > 1 else "unknown"
        lines.append(
            f"| {NAMES[kind]} | {len(rows)} | {m['val_loss']:.3f} | {spread} | "
            f"{m['bits_per_byte']:.3f} | {m['density']:.2f} | {m['tokens_per_s']:,.0f} | "
            f"{m['minutes']:.1f} |"
        )
    for name, bits in found["baselines_bits_per_byte"].items():
        lines.append(f"| {name} | | | | {bits:.3f} | | | |")
    return "\n".join(lines)


def speed(found):
    """Thousand tokens a second of train.py."""
    lines = [
        "| ids | model | bf16 | bf16, compiled | fp32 | fp32, compiled |",
        "|---|---|---|---|---|---|",
    ]
    for ids in (50304, 8192):
        for kind in ("crate", "gpt2"):
            rate = {
                (r["dtype"], r["compile"]): r["tokens_per_s"] / 1e3
                for r in found["rows"]
                if (r["ids"], r["model"]) == (ids, kind)
            }
            order = itertools.product(("bfloat16", "float32"), ("off", "on"))
            cells = [f"{rate[key]:.1f} k" for key in order]
            lines.append(f"| {ids:,} | {NAMES[kind]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def bench(found):
    """Kernels, forward and backward: how many times as fast as PyTorch, and as its matrix products alone."""
    lines = [
        "| forward and backward | bf16 ms | eager | compiled | products | fp32 ms | eager | compiled | "
        "products |",
        "|---" * 9 + "|",
    ]
    shown = r"(ista|mssa) (8192x128|2048x768|3001x100) .* both|decode 1x768 .*|step 8x256 V=4096 .*"
    cells = {}
    for row in found["rows"]:
        if not re.fullmatch(shown, row["name"]):
            continue
        ms = {name: m["median"] for name, m in row["ms"].items()}
        op, shape, dtype = row["name"].removesuffix(" both").rsplit(" ", 2)
        density = re.search(r"density ([\d.]+)", row["note"])
        if density and not 5 < float(density[1]) < 20:
            continue
        name = f"{op} {shape}" + (f", density {float(density[1]):.0f} %" if density else "")
        times = [
            f"{ms[n] / ms['fused']:.2f}x" if n in ms else ""
            for n in ("eager", "compile", "products")
        ]
        cells.setdefault(name, {})[dtype] = [f"{ms['fused']:.3g}", *times]
    for name, sides in cells.items():
        lines.append(f"| {name} | {' | '.join(sides['bfloat16'] + sides['float32'])} |")
    return "\n".join(lines)


def ladder(found):
    """Versions of the product under `ista_step`, naive to fast: milliseconds (times as fast as eager)."""
    cells = {}
    for row in found["rows"]:
        dtype, version, _ = row["name"].split()[2:]
        ms = {name: m["median"] for name, m in row["ms"].items()}
        cells.setdefault(dtype, {})[version] = (
            f"{ms['fused']:.3g} ({ms['eager'] / ms['fused']:.2f}x)"
        )
    names = next(iter(cells.values()))
    return "\n".join(
        [
            f"| ms | {' | '.join(names)} |",
            "|---" * (len(names) + 1) + "|",
            *(f"| {dtype} | {' | '.join(row.values())} |" for dtype, row in cells.items()),
        ]
    )


def neurons(found):
    """Deepest models: scores x 100, means over layers and seeds; the whole is `study_neurons table`."""

    def mean(runs, scoring, metric):
        return f"{100 * statistics.mean(r[scoring]['overall'][metric]['mean'] for r in runs):.1f}"

    lines = [
        "| | validation loss | density, % | ngram_r | null_r | init_r | openai_random[ngram] | "
        f"ngram_r, density <= {found['match_density']:.0%} |",
        "|---" * 8 + "|",
    ]
    for preset, kind in itertools.product(found["presets"][-1:], NAMES):
        runs = [r for r in found["runs"] if (r["preset"], r["model"]) == (preset, kind)]
        density = [s["density"]["mean"] for r in runs for s in r["as it is"]["sites"].values()]
        plain = ("ngram_r", "null_r", "init_r", "openai_random[ngram]")
        cells = [
            f"{statistics.mean(r['val_loss'] for r in runs):.3f}",
            f"{100 * statistics.mean(density):.1f}",
            *(mean(runs, "as it is", m) for m in plain),
            mean(runs, "matched", "ngram_r"),
        ]
        lines.append(f"| {preset} {NAMES[kind]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def concepts(found, method="clvq", control="same class"):
    """One sentence: how far accuracy falls without a concept's code, and how often it is the code's doing."""
    by_form, passed = {}, []
    for seed in (seed for run in found["runs"] for seed in run["by_seed"].values()):
        for form, rows in seed["methods"][method]["survives"].items():
            by_form.setdefault(form, []).append(
                seed["methods"][method][form]["own"]["relative_drop"]
            )
            passed.append(rows[control]["passes"])
    drops = [100 * statistics.mean(rows) for rows in by_form.values()]
    return (
        f"accuracy falls by {min(drops):.0f} to {max(drops):.0f} %, by the form of the test, and in "
        f"{sum(passed)} of {len(passed)} cases by more than without the code of another text of the same "
        "class"
    )


if __name__ == "__main__":
    for file, show in (
        ("default", default),
        ("speed", speed),
        ("bench", bench),
        ("versions", ladder),
        ("neurons", neurons),
        ("steering", dose_views.readme),
        ("concepts", concepts),
    ):
        print(show(cli.read_json(RESULTS / f"{file}.json")), "\n")

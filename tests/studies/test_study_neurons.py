"""The study of neurons: its table and what it keeps, on made-up scores; with --slow all of it, tiny."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from crate_mini import UserError
from crate_mini.neurons import protocols as score
from crate_mini.neurons import summary
from crate_mini.studies import neurons as study_neurons
from crate_mini.studies.neurons import Study


def summary_of(seed, shift, layers):
    """summary.json of a made-up model whose every score lies about `shift`."""
    rng, rows = np.random.default_rng(seed), []
    for layer in range(layers):
        for j in range(20):
            stats = {"density": 0.25, "max": 1.0, "mean": 0.1}
            value = {m: (rng.normal(shift, 0.001), "") for m in study_neurons.SHOWN}
            uniform = {m: value.pop(m) for m in list(value) if "[" not in m}
            rows.append(score.row(f"L{layer}", layer, j, stats, {}, uniform, value))
    found = summary.summarise(rows, {"ngram": "two tokens"}, layers)
    return {"command": "python interpret.py neurons", **found}


def made_up(seeds=(1, 2)):
    """results/neurons.json without the runs behind it: CRATE's scores lie at 0.6, the twin's at 0.5."""
    runs = []
    for preset in ("1L", "3L"):
        for kind, shift in (("crate", 0.6), ("gpt2", 0.5)):
            for seed in seeds:
                kept = study_neurons.essence(
                    summary_of(seed, shift + 0.01 * (seed == 2), int(preset[0]))
                )
                runs.append(
                    {
                        "preset": preset,
                        "model": kind,
                        "seed": seed,
                        "val_loss": 4.0 + seed,
                        "as it is": kept,
                        "matched": kept,
                    }
                )
    sae = [
        {
            "model": "gpt2",
            "preset": "3L",
            "site": "L1.sae-x4",
            "ngram_r": {"mean": 0.3},
            "f1": {"mean": None},
        }
    ]
    return {
        "runs": runs,
        "presets": ["1L", "3L"],
        "seeds": seeds,
        "match_density": 0.01,
        "sae": sae,
    }


def test_table_shows_ours_by_seeds_and_says_whose_the_others_are():
    text = study_neurons.table(json.loads(json.dumps(made_up(), allow_nan=False)))
    head, _, *lines = text.splitlines()
    assert "score x 100, 2 seeds" in head and "not comparable): CRATE | GPT-2 |" in head
    assert "| 3L | openai_random[ngram] | 60.5 ± 0.5 | 50.5 ± 0.5 | 8.43 | 1.37 |" in lines
    assert "| 3L | openai_random[ngram], density <= 1% | 60.5 ± 0.5 | 50.5 ± 0.5 | | |" in lines
    both = "60 = 60+0+0+0, 60 = 60+0+0+0"
    assert f"| 3L | n of ngram_r, matched | {both} | {both} | | |" in lines
    assert "| 1L | validation loss | 5.500 | 5.500 | | |" in lines
    assert "| 1L | density, % | 25.0 | 25.0 | | |" in lines
    assert len({line.count("|") for line in text.split("\n\n")[0].splitlines()}) == 1
    assert lines[-1].startswith("| GPT-2 twin 3L, L1.sae-x4 | 30.0 | - |")
    assert "one seed" in study_neurons.table(made_up(seeds=(1,)))


def test_the_papers_numbers_are_what_its_layers_average_to():
    """Layer by layer as on the project page; the overall table there is printed to two digits."""
    layers = {
        ("2L", "openai_tar"): ((7.8, 8.3), (4.3, 4.1)),
        ("3L", "openai_tar"): ((9.6, 9.3, 8.4), (7.3, 0.8, 2.6)),
        ("2L", "openai_random"): ((8.0, 5.9), (2.3, 1.6)),
        ("3L", "openai_random"): ((9.0, 9.4, 6.9), (3.1, -0.3, 1.3)),
        ("2L", "anthropic_crate"): ((11.3, 11.4), (9.7, 10.7)),
        ("3L", "anthropic_crate"): ((12.6, 10.0, 11.1), (14.8, 4.1, 8.7)),
    }
    for (preset, metric), sides in layers.items():
        means = [np.mean(side) for side in sides]
        assert study_neurons.PAPER[metric][preset] == pytest.approx(means, abs=0.006)


def test_a_finished_part_is_kept_and_a_failed_one_is_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr(study_neurons, "ROOT", tmp_path)
    (tmp_path / "script.py").write_text(
        "import sys; print('went wrong'); open('count', 'a').write('x')\nsys.exit('2' in sys.argv)"
    )
    study, place = Study("text", "ranks"), tmp_path / "out" / "train"
    for word, runs in (("1", 1), ("1", 1), ("3", 2)):  # the same command runs once
        study.part(place, "script.py", word)
        assert len((tmp_path / "count").read_text()) == runs
    assert json.loads((tmp_path / "out" / "train.json").read_text())["command"] == [
        "script.py",
        "3",
        "--out",
        "out/train",
    ]  # names no folder of this machine
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"script.py 2 --out out/train` ended with code 1: went wrong"
        ):
            study.part(place, "script.py", "2")
    assert len((tmp_path / "count").read_text()) == 4


def test_names_of_files_survive_a_change_of_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("ranks").write_text("")
    assert study_neurons.absolute("ranks:511") == f"{tmp_path / 'ranks'}:511"
    assert study_neurons.absolute("pydocs:511") == "pydocs:511"


def test_bad_words_are_one_sentence(monkeypatch):
    for words in ([], ["text"], ["text", "ranks", "many"], ["text", "ranks", "0"]):
        monkeypatch.setattr(sys, "argv", ["study_neurons", *words])
        with pytest.raises(UserError, match="give a text and the ranks"):
            study_neurons.main()


@pytest.mark.slow
def test_the_whole_study_at_tiny_size(tmp_path):
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list("abcdefgh"), 4)) for _ in range(60)]
    text = "<|endoftext|>".join(" ".join(draw.choice(words, 120)) for _ in range(120))
    (tmp_path / "text.txt").write_text(text)
    code = """if True:
        import sys
        from pathlib import Path
        from crate_mini.study_neurons import Study
        t = Path(sys.argv[1])
        Study(str(t / "text.txt"), "pydocs:511", 3, 20000, presets=("1L",), seeds=(1, 2),
              models=("crate", "gpt2"), sae=("crate",), out=t / "out", results=t / "results",
              train_flags=("--n-embd=32", "--n-head=2", "--block-size=64", "--batch-size=4",
                           "--micro-batch=4", "--compile=off"),
              sae_flags=("--steps=5", "--batch=64", "--tokens=2000", "--expansion=2")).run()"""
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path],
            capture_output=True,
            text=True,
            cwd=study_neurons.ROOT,
        )
        assert done.returncode == 0, done.stderr
        assert "[4/4]" in done.stdout and "| 1L | ngram_r |" in done.stdout
    assert " min  python" not in done.stdout  # the second time all is kept
    found = json.loads((tmp_path / "results" / "neurons.json").read_text())
    assert len(found["runs"]) == 4 and {d["of"] for d in found["differences"]} == {"crate - gpt2"}
    assert len(found["sae"]) == 1 and (tmp_path / "results" / "neurons.png").stat().st_size > 10_000
    assert study_neurons.table(found) in done.stdout

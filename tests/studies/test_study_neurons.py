"""The study of neurons: its table and what it keeps; with --slow all of it, tiny."""

import json
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest

from crate_mini import UserError
from crate_mini.console import results
from crate_mini.neurons import protocols, summary
from crate_mini.studies import neurons

ROOT = results.ROOT


def made_up_summary(seed, shift, layers):
    """summary.json of a made-up model whose every score lies about `shift`."""
    rng = np.random.default_rng(seed)
    rows = []
    for layer in range(layers):
        for neuron in range(20):
            stats = {"density": 0.25, "max": 1.0, "mean": 0.1}
            scores = {metric: (rng.normal(shift, 0.001), "") for metric in neurons.SHOWN}
            uniform = {metric: score for metric, score in scores.items() if "[" not in metric}
            others = {metric: score for metric, score in scores.items() if "[" in metric}
            row = protocols.score_row(f"L{layer}", layer, neuron, stats, {}, uniform, others)
            rows.append(row)
    summarised = summary.summarise(rows, {"ngram": "two tokens"}, layers)
    return {"command": "python interpret.py neurons", **summarised}


def made_up_beyond(shift, layers):
    """Of beyond.json: neurons cover shift - 0.1 (layer + 1), rotations 0.05 less, probes .2, .3."""
    sites = {}
    for layer in range(layers):
        coverage = shift - 0.1 * (layer + 1)
        probing = {}
        for k, minus in (("k = 1", 0.2), ("k = 5", 0.3)):
            probing[k] = {"auprc": 0.5, "minus_table": {"difference": minus}}
        minus = {"difference": 0.05}
        sets = {
            "neurons": {"coverage": coverage, "probing": probing},
            "rotation": {"coverage": coverage - 0.05, "neurons_minus": minus},
        }
        sites[f"L{layer}"] = {"sets": sets}
    return {"sites": sites}


def made_up_study(seeds=(1, 2)):
    """results/neurons.json without runs: CRATE's scores lie at 0.6, the twin's at 0.5."""
    runs = []
    for preset, layers in (("1L", 1), ("3L", 3)):
        for kind, shift in (("crate", 0.6), ("gpt2", 0.5)):
            for seed in seeds:
                scores = made_up_summary(seed, shift + 0.01 * (seed == 2), layers)
                kept = neurons.essence(scores)
                run = {"preset": preset, "model": kind, "seed": seed, "val_loss": 4.0 + seed}
                known = made_up_beyond(shift, layers)
                runs.append({**run, "beyond": known, "as it is": kept, "matched": kept})
    sae = {"model": "gpt2", "preset": "3L", "site": "L1.sae-x4"}
    return {
        "runs": runs,
        "presets": ["1L", "3L"],
        "seeds": seeds,
        "match_density": 0.01,
        "sae": [{**sae, "ngram_r": {"mean": 0.3}, "f1": {"mean": None}}],
    }


def test_the_scores_of_the_deepest_models_can_be_drawn_again_from_the_file(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    results.write_json(tmp_path / "results" / "neurons.json", made_up_study())
    monkeypatch.setattr(results, "ROOT", tmp_path)
    drawn = mock.Mock()
    monkeypatch.setattr(neurons.figures, "scores_by_layer", drawn)
    neurons.run(neurons.Settings(table=True))
    (summaries, target), _ = drawn.call_args
    assert target == tmp_path / "results" / "neurons.png"
    deepest = made_up_study()["presets"][-1]
    assert summaries and all(name.endswith(f", {deepest}") for name in summaries)
    assert all(summary["sites"] for summary in summaries.values())
    content = made_up_study()
    content["runs"] = [r for r in content["runs"] if r["preset"] == "1L" or r["seed"] == 2]
    neurons.draw_scores(content, target)  # the deepest have the second seed alone
    assert list(drawn.call_args.args[0]) == list(summaries)


def test_the_table_shows_our_scores_by_seed_and_names_the_source_of_the_others():
    text = neurons.table(json.loads(json.dumps(made_up_study(), allow_nan=False)))
    head, _, *lines = text.splitlines()
    assert "score x 100" in head and "not comparable): CRATE | GPT-2 |" in head
    assert "| 3L | seeds | 2 | 2 | | |" in lines
    assert "| 3L | coverage beyond the token | 40.0 ± 0.0 | 30.0 ± 0.0 | | |" in lines
    assert "| 3L | neurons minus rotation | 5.0 ± 0.0 | 5.0 ± 0.0 | | |" in lines
    assert "| 3L | that of an untrained model | - | - | | |" in lines
    assert "| 3L | probe of 5 minus token table | 30.0 ± 0.0 | 30.0 ± 0.0 | | |" in lines
    assert "| 3L | openai_random[ngram] | 60.5 ± 0.5 | 50.5 ± 0.5 | 8.43 | 1.37 |" in lines
    assert "| 3L | openai_random[ngram], density <= 1% | 60.5 ± 0.5 | 50.5 ± 0.5 | | |" in lines
    both = "60 = 60+0+0+0, 60 = 60+0+0+0"
    assert f"| 3L | n of ngram_r, matched | {both} | {both} | | |" in lines
    assert "| 1L | validation loss | 5.500 | 5.500 | | |" in lines
    assert "| 1L | density, % | 25.0 | 25.0 | | |" in lines
    assert len({line.count("|") for line in text.split("\n\n")[0].splitlines()}) == 1
    assert lines[-1].startswith("| GPT-2 twin 3L, L1.sae-x4 | 30.0 | - |")
    assert "| 1L | seeds | 1 | 1 | | |" in neurons.table(made_up_study(seeds=(1,)))


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
    for (preset, metric), models in layers.items():
        means = [np.mean(by_layer) for by_layer in models]
        assert neurons.PAPER[metric][preset] == pytest.approx(means, abs=0.006)


def test_a_text_without_ambiguous_words_has_no_probes():
    study = made_up_study()
    for run in study["runs"]:
        for site in run["beyond"]["sites"].values():
            site["sets"]["neurons"]["probing"] = {}
    lines = neurons.table(study).splitlines()
    assert "| 3L | probe of 5 minus token table | - | - | | |" in lines
    assert "| 3L | coverage beyond the token | 40.0 ± 0.0 | 30.0 ± 0.0 | | |" in lines


def test_models_that_are_missing_are_named_with_the_command_that_trains_them(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    made = neurons.neurons_checkpoint("3L", "crate", 1337)
    assert made == tmp_path / "out" / "study" / "wiki" / "crate-1337" / "last"
    made.mkdir(parents=True)
    (made / "config.json").write_text(json.dumps({"training": {"val_loss": 4.0}}))
    cut_short = neurons.neurons_checkpoint("3L", "gpt2", 1337)
    cut_short.mkdir(parents=True)
    (cut_short / "config.json").write_text(json.dumps({"training": {"step": 400}}))
    missing = r"for crate\+, gpt2; train with .*--only crate\+,gpt2 --checkpoints"
    with pytest.raises(UserError, match=missing):
        neurons.run(neurons.Settings(presets=("3L",), seeds=(1337,)))
    with pytest.raises(UserError, match="for crate-1L, crate\\+-1L, gpt2-1L; "):
        neurons.run(neurons.Settings(presets=("1L",)))
    with pytest.raises(UserError, match="--presets 4L is unknown; choose some of 1L, 2L or 3L"):
        neurons.run(neurons.Settings(presets=("4L",)))


def test_what_the_file_holds_is_not_scored_again(tmp_path, monkeypatch):
    path = tmp_path / "neurons.json"
    study = neurons.Study(path, 99)
    runs = [{"preset": "1L", "seed": 1, "model": kind} for kind in neurons.NAMES]
    study.add("1L", 1, {"runs": runs[:2], "sae": []})
    assert not neurons.Study(path, 99).holds("1L", 1)
    study.add("1L", 1, {"runs": runs, "sae": []})
    study.add("3L", 2, {"runs": [{**run, "preset": "3L", "seed": 2} for run in runs], "sae": []})
    again = neurons.Study(path, 99)
    assert again.holds("1L", 1) and again.holds("3L", 2)
    assert not again.holds("1L", 2) and not again.holds("3L", 1)
    assert len(again.content["runs"]) == 6
    assert again.content["presets"] == ["1L", "3L"] and again.content["seeds"] == [1, 2]
    kept = path.read_bytes()
    with pytest.raises(UserError, match="--tokens 100, but the scores .* `--tokens 99`"):
        neurons.Study(path, 100)
    assert path.read_bytes() == kept
    results.write_json(path, {"schema": 1, "tokens": 100})
    assert not neurons.Study(path, 99).holds("1L", 1)  # of an older study: all is made again


def test_autoencoders_are_scored_once_each(tmp_path, monkeypatch):
    study = neurons.Study(tmp_path / "neurons.json", 99)
    everything = [(kind, layer, 7) for kind in ("crate", "gpt2") for layer in (0, 1, 2)]
    assert study.missing_autoencoders(7) == everything

    def scored(kind, layer, seed):
        if (kind, layer) == ("gpt2", 1):
            raise UserError("a full disk")
        return {"preset": "3L", "model": kind, "seed": seed, "layer": layer}

    monkeypatch.setattr(study, "autoencoder", scored)
    with pytest.raises(UserError, match="a full disk"):
        study.score([], everything)
    again = neurons.Study(tmp_path / "neurons.json", 99)
    assert len(again.content["sae"]) == 4
    assert again.missing_autoencoders(7) == [("gpt2", 1, 7), ("gpt2", 2, 7)]
    assert again.missing_autoencoders(8) == [(kind, layer, 8) for kind, layer, _ in everything]


@pytest.mark.slow
def test_the_whole_study_at_tiny_size(tmp_path):
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list("abcdefgh"), 4)) for _ in range(60)]
    documents = [" ".join(draw.choice(words, 120)) for _ in range(120)]
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(documents))
    for script in ("train.py", "interpret.py"):
        (tmp_path / script).symlink_to(ROOT / script)
    for kind in ("crate", "crate+", "gpt2"):
        flags = ["--preset=1L", f"--model={kind}", "--n-embd=32", "--n-head=2", "--block-size=64"]
        flags += ["--batch-size=4", "--micro-batch=4", "--compile=off", "--train-steps=3"]
        flags += [f"--data={tmp_path / 'text.txt'}", "--tokenizer=pydocs:511", "--seed=1"]
        out = tmp_path / "out" / "study" / "wiki" / f"{kind}-1L-1"
        subprocess.run([sys.executable, "train.py", *flags, f"--out={out}"], check=True, cwd=ROOT)
    code = """if True:
        import sys
        from pathlib import Path
        from crate_mini.console import results
        from crate_mini.studies import neurons
        place = results.ROOT = Path(sys.argv[1])
        neurons.DEEPEST, neurons.SEEDS, neurons.AUTOENCODERS_OF = "1L", (1,), ("crate",)
        neurons.run(neurons.Settings(presets=("1L",), seeds=(1,), tokens=20000))"""
    outputs = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        assert "| 1L | ngram_r |" in done.stdout
        outputs.append(done.stdout)
    assert "8/8" in outputs[0] and "python interpret.py" in outputs[0]
    assert "python interpret.py" not in outputs[1]  # the second time all is kept
    study = json.loads((tmp_path / "results" / "neurons.json").read_text())
    assert [run["model"] for run in study["runs"]] == ["crate", "crate+", "gpt2"]
    assert all(run["beyond"]["sites"] for run in study["runs"])
    assert {entry["of"] for entry in study["differences"]} == {"crate - gpt2", "crate+ - gpt2"}
    assert len(study["sae"]) == 1
    assert (tmp_path / "results" / "neurons.png").stat().st_size > 10_000
    assert neurons.table(study) in outputs[1]

"""The study of the model: its grid, what it keeps, what it runs again, its reports."""

import json
import shlex
import shutil
import threading
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from crate_mini import UserError
from crate_mini.console import results
from crate_mini.studies import grid, models, models_report
from crate_mini.studies.variants import VARIANTS
from crate_mini.training import settings

ROWS = [row for rows in grid.GRID.values() for row in rows]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_each_row_is_a_command_that_train_py_takes(row, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--tokenizer", "bytes", *shlex.split(f"{grid.SHARED} {row.flags}")]
    settings.parse(words)
    assert row.variant is None or row.variant in VARIANTS


def test_rows_have_different_names_and_different_models():
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert len({(row.flags, row.variant) for row in ROWS}) == len(ROWS)


# ---- runs ----------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A checkout in tmp_path whose train.py only writes what the study reads; [its words]."""
    calls = []

    def run_script(words, log, threads):
        calls.append(words)
        folder = Path(words[words.index("--out") + 1])
        (folder / "last").mkdir(parents=True, exist_ok=True)
        weights = {"tokens.weight": torch.zeros(10, 4), "positions.weight": torch.zeros(9, 4)}
        torch.save(weights, folder / "last" / "weights-1.pt")
        _, config, _ = settings.parse(["--tokenizer", "bytes", "--out", str(tmp_path / "none")])
        training = {
            "val_loss": float(words[words.index("--seed") + 1]),
            "bits_per_byte": 1.5,
            "density": 0.4,
            "settings": {"dtype": "float32", "out": str(folder), "lr": 0.1},
            "corpus": {"text_sha256": "abc"},
            "machine": {"device": "a machine", "commit": "123"},
        }
        meta = {
            "config": asdict(config),
            "training": training,
            "files": {"weights": {"name": "weights-1.pt"}},
        }
        (folder / "last" / "config.json").write_text(json.dumps(meta))
        (folder / "log.csv").write_text("step,tokens,loss,val_loss\n0,10,5,\n1,20,4,4.5\n")
        log.write_text("backend   fused (AVX2)\n\nsample    a\n b \nresult    files\n")
        return 90.0

    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(models, "run_script", run_script)
    monkeypatch.setattr(models, "baselines", lambda: {"gzip -9": 2.0})
    return calls


def study(tmp_path):
    return json.loads((tmp_path / "results" / "models.json").read_text())


def test_a_run_is_made_once_and_again_when_its_flags_change(trained, tmp_path, monkeypatch):
    models.run(models.Settings(only="crate,gpt2", seeds=2))
    assert len(trained) == 4
    models.run(models.Settings(only="crate,gpt2,crate+", seeds=2))
    assert len(trained) == 6
    runs = study(tmp_path)["runs"]
    expected = [(name, seed) for name in ("crate", "crate+", "gpt2") for seed in grid.SEEDS[:2]]
    assert [(run["name"], run["seed"]) for run in runs] == expected
    changed = [grid.Row("crate", "--lr 1e-3", 4.0, "", seeds=3), *grid.HEADLINE[1:]]
    monkeypatch.setattr(grid, "GRID", {"headline": changed})
    models.run(models.Settings(only="crate,gpt2", seeds=2))
    assert len(trained) == 8
    assert all("1e-3" in words for words in trained[-2:])
    assert len(study(tmp_path)["runs"]) == 6


def test_what_has_finished_is_kept_when_another_run_fails(trained, tmp_path, monkeypatch):
    run_script, second_done = models.run_script, threading.Event()

    def run_or_fail(words, log, threads):
        if "gpt2" not in words:
            second_done.wait(20)
            raise UserError("out of memory")
        try:
            return run_script(words, log, threads)
        finally:
            second_done.set()

    monkeypatch.setattr(models, "run_script", run_or_fail)
    with pytest.raises(UserError, match="out of memory"):
        models.run(models.Settings(only="crate,gpt2", seeds=1, jobs=2))
    assert [run["name"] for run in study(tmp_path)["runs"]] == ["gpt2"]


def test_nothing_is_begun_after_a_run_has_failed(trained, monkeypatch):
    begun = []

    def run_script(words, log, threads):
        begun.append(words)
        raise UserError("out of memory")

    class SlowToStop(models.ThreadPoolExecutor):
        def shutdown(self, wait=True, cancel_futures=False):
            super().shutdown(wait)  # as if the next run had begun before

    monkeypatch.setattr(models, "run_script", run_script)
    monkeypatch.setattr(models, "ThreadPoolExecutor", SlowToStop)
    with pytest.raises(UserError, match="out of memory"):
        models.run(models.Settings(only="crate,gpt2", seeds=3))
    assert len(begun) == 1


def test_a_checkpoint_that_is_gone_is_made_again_and_the_file_stays(trained, tmp_path, monkeypatch):
    models.run(models.Settings(only="crate,gpt2", seeds=1))
    before = study(tmp_path)["runs"]
    shutil.rmtree(tmp_path / "out" / "study" / "gpt2-1337")
    models.run(models.Settings(only="crate,gpt2", seeds=1))
    assert len(trained) == 2
    path = tmp_path / "results" / "models.json"
    content = json.loads(path.read_text())
    content["runs"][1]["minutes"] = 77
    results.write_json(path, content)
    before_bytes = path.read_bytes()
    monkeypatch.setattr(models, "baselines", lambda: {"gzip -9": 9.0})  # of another Python's text
    models.run(models.Settings(only="crate,gpt2", seeds=1, checkpoints=True))
    assert path.read_bytes() == before_bytes
    assert len(trained) == 3 and "out/study/gpt2-1337" in trained[-1][-1]
    assert study(tmp_path)["runs"] == [before[0], {**before[1], "minutes": 77}]


def test_a_training_that_was_cut_short_has_made_no_checkpoint(trained, tmp_path):
    models.run(models.Settings(only="gpt2", seeds=1))
    path = tmp_path / "out" / "study" / "gpt2-1337" / "last" / "config.json"
    meta = json.loads(path.read_text())
    del meta["training"]["val_loss"]  # as train.py leaves it before the last step
    path.write_text(json.dumps(meta))
    models.run(models.Settings(only="gpt2", seeds=1, checkpoints=True))
    assert len(trained) == 2
    models.run(models.Settings(only="gpt2", seeds=1, checkpoints=True))
    assert len(trained) == 2


def test_runs_that_another_process_adds_meanwhile_are_kept(trained, tmp_path, monkeypatch):
    """The baselines take a while, and are written last."""

    def baselines():
        other = models.Store(tmp_path / "results" / "models.json")
        other.add({**other.content["runs"][0], "seed": 1339})
        return {"gzip -9": 2.0}

    monkeypatch.setattr(models, "baselines", baselines)
    models.run(models.Settings(only="gpt2", seeds=1))
    assert [run["seed"] for run in study(tmp_path)["runs"]] == [1337, 1339]
    assert study(tmp_path)["baselines_bits_per_byte"] == {"gzip -9": 2.0}


def test_an_entry_says_what_was_run_and_what_it_cost(trained, tmp_path):
    models.run(models.Settings(only="crate+-gain", jobs=2))
    (run,) = study(tmp_path)["runs"]
    assert trained[0][:3] == ["-m", "crate_mini.studies.variants", "query-gain"]
    assert run["group"] == "levers" and run["variant"] == "query-gain"
    assert run["parameters"] == 40  # all but positions
    assert run["curve"] == [[20, 4.5]] and run["sample"] == "a\n b"
    assert run["minutes"] == 1.5 and run["tokens"] == 20 and run["density"] == 0.4
    assert str(tmp_path) not in json.dumps(run)


def test_the_trigram_of_the_figure_is_in_the_unit_of_its_curves():
    """1.8 bits per byte, where a loss of 5 nats per token is 2 of them."""
    others = {"text": "wiki", "val_loss": 9.0, "bits_per_byte": 1.0}
    run = {"text": "pydocs", "val_loss": 5.0, "bits_per_byte": 2.0}
    known = {"baselines_bits_per_byte": {models_report.TRIGRAM: 1.8}}
    assert models_report.trigram({"runs": [others, run], **known}) == pytest.approx(4.5)
    assert models_report.trigram({"runs": [others], **known}) is None
    assert models_report.trigram({"runs": [run]}) is None


def test_rows_of_the_second_text_alone_are_refused_without_it(trained):
    for chosen in ({"group": "depths"}, {"only": "crate-1L"}):
        with pytest.raises(UserError, match="need a second text; give --text wiki.txt.xz"):
            models.run(models.Settings(**chosen))


@pytest.mark.parametrize("cores, jobs, threads", [(1, 1, 1), (8, 2, 4), (8, 3, 2), (2, 4, 1)])
def test_runs_share_the_cores_that_the_study_may_use(
    trained, tmp_path, monkeypatch, cores, jobs, threads
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)  # fewer under taskset or OMP
    models.run(models.Settings(only="gpt2", jobs=jobs, seeds=1))
    (run,) = study(tmp_path)["runs"]
    assert run["machine"]["threads"] == threads


def test_the_second_text_runs_only_where_it_is_given(trained, tmp_path):
    models.run(models.Settings(only="crate", text="some.txt", ranks="ranks", seeds=1))
    assert [run["text"] for run in study(tmp_path)["runs"]] == ["pydocs", "wiki"]
    assert trained[1][trained[1].index("--data") + 1] == "some.txt"
    assert f"ranks:{grid.WIKI_IDS}" in trained[1]


def test_the_hash_of_a_run_is_that_of_its_settings_and_not_of_its_folder():
    one = models.fingerprint({"d": 1}, {"lr": 0.1, "out": "a"})
    assert one == models.fingerprint({"d": 1}, {"lr": 0.1, "out": "b"})
    assert one != models.fingerprint({"d": 2}, {"lr": 0.1, "out": "a"})
    assert one != models.fingerprint({"d": 1}, {"lr": 0.2, "out": "a"})


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(group="headlines"), "--group headlines is unknown; choose all, headline, "),
        (dict(only="crates"), "--only crates is no row of the grid; choose crate, "),
    ],
)
def test_unknown_rows_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        models.chosen(models.Settings(**change))


def test_all_leaves_out_what_needs_a_gpu():
    everything = models.Settings(group="all", text="some.txt")
    assert {run.group for run in models.chosen(everything)} == set(grid.GRID) - {"large"}


# ---- reports -------------------------------------------------------------------------------------


def test_reports_come_from_the_file_alone_and_are_the_same_each_time(trained, tmp_path):
    models.run(models.Settings(seeds=2))
    folder = tmp_path / "results"
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(first) == {"models.json", "models.png", "log.md"}
    n = len(trained)
    models.run(models.Settings(report=True))
    assert len(trained) == n
    assert first == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_tables_show_means_spreads_and_costs(trained, tmp_path):
    models.run(models.Settings(seeds=2))
    content = study(tmp_path)
    table = models_report.table(content)
    row = "| crate+ | 2 | 1337.500 | 1.000 | 1.500 | | 0.40 | 0.00 M | 1.00 |"
    assert row in table
    assert "| gzip -9 | | | | 2.000 | | | | |" in table
    assert "| crate+ | 1337.50 | 1.50 | 0.00 M | 1.00 |" in models_report.losses(content)


def test_the_log_sets_what_was_expected_next_to_what_came(trained, tmp_path):
    models.run(models.Settings(only="crate+-gain"))
    log = (tmp_path / "results" / "log.md").read_text()
    assert "| crate+-gain* | pydocs | `--model crate+` |" in log
    assert "| 4.24 | 1337.000 | | 0.400 | 123 |" in log
    assert "| crate+-S | long | `--model crate+ --preset S" in log and "not run" in log

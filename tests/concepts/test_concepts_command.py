"""`interpret.py concepts` from a classifier to its result, and what it runs again."""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import planted_reviews
import pytest
from forked import run_script, start_script

from crate_mini import UserError
from crate_mini.concepts import command, faithfulness, pipeline, report
from crate_mini.concepts.pipeline import Pipeline
from crate_mini.concepts.types import SPLITS, Codes
from crate_mini.console import results, terminal
from crate_mini.training.settings import flags


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(settings, checkpoint) of a finished run."""
    return planted_reviews.finished_run(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def result(run):
    return results.read_json(Path(run[0].out) / "concepts.json")


def start(settings, ckpt):
    """Run the command as interpret.py does."""
    values = {name: value for name, value in vars(settings).items() if value not in (None, "")}
    words = [str(ckpt), *flags(values)]
    terminal.run_command("interpret.py concepts", command.COMMAND, words)


def test_it_reports_all_it_found_and_what_it_did_not_run(result):
    assert result["judge"] == "not run" and result["people"].startswith("not run")
    assert result["not_run"]["ward"]
    assert set(result["methods"]) == {"clvq", "kmeans"}
    assert result["seeds"] == [0, 1] and result["layers"] == [1, 2]
    for method in result["methods"].values():
        assert set(method["health"]) == {"0", "1"} and len(method["codes"]) == 5
        assert -1 <= method["stability"]["mean"] <= 1
        assert set(method["faithfulness"]) == {*faithfulness.FORMS, "partners", "survives"}
    assert {"command", "machine", "checkpoint", "seed"} <= set(result)
    assert "kmeans" in report.table(result) and result["salience"]["gap_mean"] < 1


def test_stages_run_again_only_when_something_before_them_changed(run, capsys):
    settings, ckpt = run
    folder = Path(settings.out)
    watched = [*folder.glob("*.npz"), folder / "faithfulness.json"]
    before = {path: path.stat().st_mtime_ns for path in watched}
    start(settings, ckpt)
    assert {path: path.stat().st_mtime_ns for path in watched} == before
    assert "discover  " not in capsys.readouterr().out
    content = (folder / "faithfulness.json").read_bytes()
    start(replace(settings, from_="salience"), ckpt)
    changed = {path.name for path in watched if path.stat().st_mtime_ns != before[path]}
    assert changed == {"salience.npz", "faithfulness.json"}
    assert (folder / "faithfulness.json").read_bytes() == content


def test_a_damaged_file_is_made_again(run, result):
    settings, ckpt = run
    path = Path(settings.out) / "salience.npz"
    whole = path.read_bytes()
    for content in (b"", b"PK rubbish", whole[:-300]):
        path.write_bytes(content)
        stages = Pipeline(settings, ckpt)
        stages.extract_vectors(again=False)
        stages.find_salient_words(again=False)
        assert stages.salience.position.size == result["salience"]["texts"]
    assert list(result["salience"]["nodes"])[0] == str(settings.nodes) == "4"


def test_texts_that_training_read_are_not_looked_at(run):
    settings, ckpt = run
    stages = Pipeline(replace(settings, tests=0), ckpt)
    test, train = (np.flatnonzero(stages.labelled.split == value) for value in (2, 0))
    stages.text.ids[test[1]] = stages.text.ids[train[0]]
    assert stages.test_rows.tolist() == np.delete(test, 1).tolist()
    few = Pipeline(replace(settings, tests=40), ckpt)
    assert few.test_rows.tolist() == test[:40].tolist()


@pytest.mark.parametrize("file", ["vectors.npz", "codes-clvq-0.npz", "salience.npz"])
def test_a_run_that_is_killed_goes_on_to_the_same_result(file, run, result, tmp_path):
    """Killed as soon as a stage has written its file; what the next run reads is whole."""
    settings, ckpt = run
    values = {**vars(settings), "out": str(tmp_path / "out")}
    given = flags({name: value for name, value in values.items() if value not in (None, "")})
    child = start_script(["interpret.py", "concepts", ckpt, *given], cwd=tmp_path)
    while child.poll() is None and not (tmp_path / "out" / file).exists():
        time.sleep(0.005)
    child.kill()
    child.communicate()
    start(replace(settings, out=str(tmp_path / "out")), ckpt)
    again = results.read_json(tmp_path / "out" / "concepts.json")
    for name in ("methods", "by_seed", "salience", "controls"):
        assert again[name] == result[name], name


def test_controls_with_another_mask_are_other_controls(run, monkeypatch):
    settings, ckpt = run
    stamps = []

    def load_or_make(self, name, stamp, again, make):
        stamps.append(stamp)
        return {"explained": {}}

    monkeypatch.setattr(Pipeline, "load_or_make", load_or_make)
    for mask in ("causal", "none"):
        stages = Pipeline(replace(settings, mask=mask), ckpt)
        stages.extract_vectors(again=False)
        stages.train_controls(again=False)
    assert stamps[0] != stamps[1]


def test_the_sae_gets_its_budget_and_is_made_again_with_another(run, tmp_path, monkeypatch):
    settings, ckpt = run
    calls = []

    def discover(method, vectors, k, seed, **switches):
        calls.append((method, switches))
        words = np.zeros(len(vectors.word), np.int64)
        return Codes(method, seed, words, np.ones((k, vectors.lower.shape[1]), np.float32))

    monkeypatch.setattr(pipeline, "discover", discover)
    for active in (1, 1, 3):
        run_again = replace(settings, methods="sae", seeds="0", active=active, out=str(tmp_path))
        stages = Pipeline(run_again, ckpt)
        stages.extract_vectors(again=False)
        stages.discover_codes(again=False)
    assert calls == [("sae", {"active": 1}), ("sae", {"active": 3})]
    assert command.Settings().active == 1


@pytest.fixture
def no_work(monkeypatch):
    """No model runs on any text."""

    def run_model(*arguments):
        raise AssertionError("the model ran")

    monkeypatch.setattr(pipeline.word_vectors, "gather", run_model)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": 10**6}, "--k 1000000 codes cannot be made of"),
        ({"k": 12, "active": 13, "methods": "sae"}, "--active 13 is more than the 12 features"),
        ({"layers": "1,9"}, "layers 1,9 do not exist; .*--layers 0,2"),
        ({"nodes": 20, "max_nodes": 10}, "--max-nodes 10 is less than --nodes 20; give 20"),
        ({"gap": 0.0}, "--gap 0.0 must be above 0"),
        ({"tests": 39}, "--tests 39 are too few"),
        ({"least": 10**5}, "no word occurs 100000 times"),
    ],
)
def test_what_a_late_stage_would_refuse_is_refused_before_the_model_runs(
    run, tmp_path, no_work, change, message
):
    settings, ckpt = run
    with pytest.raises(UserError, match=message):
        start(replace(settings, out=str(tmp_path), **change), ckpt)


@pytest.mark.parametrize("method, controls", [("clvq", False), ("vq", False), ("kmeans", True)])
def test_a_width_that_no_decoder_fits_is_refused_at_the_start(
    run, tmp_path, no_work, monkeypatch, method, controls
):
    settings, ckpt = run
    five_heads = partial(pipeline.clvqvae.Settings, heads=5)
    monkeypatch.setattr(pipeline.clvqvae, "Settings", five_heads)
    asked = replace(settings, methods=method, controls=controls, out=str(tmp_path))
    with pytest.raises(UserError, match="have 5 heads, which do not divide the model's width 32;"):
        start(asked, ckpt)
    Pipeline(replace(asked, methods="kmeans,sae", controls=False), ckpt)


def test_a_class_with_a_single_usable_test_text_is_refused_at_the_start(run, tmp_path, no_work):
    settings, ckpt = run
    stages = Pipeline(replace(settings, out=str(tmp_path)), ckpt)
    test = stages.test_rows
    stages.labelled.label[test] = 1
    stages.labelled.label[test[3]] = 0
    with pytest.raises(UserError, match="class 'bad<b>' has 1 of the .* and each class needs 2;"):
        stages.extract_vectors(again=False)
    stages.labelled.label[test] = 1
    with pytest.raises(UserError, match="class 'bad<b>' has 0 of the"):
        stages.extract_vectors(again=False)


def test_words_that_only_training_has_cannot_stop_a_decoder(run, tmp_path, no_work):
    settings, ckpt = run
    stages = Pipeline(replace(settings, out=str(tmp_path)), ckpt)
    stages.labelled.split[stages.labelled.split == SPLITS["stop"]] = SPLITS["train"]
    with pytest.raises(UserError, match="in the texts that stop the training of clvq"):
        stages.extract_vectors(again=False)


def test_ward_without_its_package_is_refused_before_the_checkpoint_is_read(
    run, tmp_path, monkeypatch
):
    settings, _ = run
    monkeypatch.setattr(pipeline, "find_spec", {}.get)
    with pytest.raises(UserError, match="--methods ward needs scikit-learn"):
        start(replace(settings, methods="kmeans,ward", out=str(tmp_path)), "no such checkpoint")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": 10**6}, "--k 1000000 codes cannot be made of"),
        ({"tests": 10}, "--tests 10 are too few for the probes; give 40 or more"),
        ({"judges": "foo"}, "'foo' names no language model"),
        ({"judges": "http:m", "url": "nowhere"}, "--url 'nowhere' is not a base URL"),
        ({"judges": "http:m,http:m"}, "not all different"),
        ({"judges": "hf:m", "replay": "nowhere"}, "nowhere cannot be read as recorded answers"),
        ({"replay": "/dev/zero"}, "--replay /dev/zero is not a plain file"),
        ({"layers": "1"}, "must be two"),
        ({"layers": "1,9"}, "0 to 2"),
        ({"layers": "a,b"}, "not a list of numbers"),
        ({"methods": "kmean"}, "did you mean kmeans"),
        ({"from_": "vector"}, "did you mean vectors"),
        ({"seeds": "-1"}, "not a list"),
        ({"shown": 0}, "--shown 0"),
        ({"answers": "none.json"}, "cannot be read as answers"),
        ({"judges": "gpt"}, "names no language model"),
    ],
)
def test_bad_settings_are_one_sentence(run, tmp_path, change, message):
    settings, ckpt = run
    needs_files = {"answers", "judges"} & set(change)
    out = settings.out if needs_files else str(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        start(replace(settings, **{"out": out, **change}), ckpt)
    assert "\n" not in str(error.value)


def test_bad_input_at_the_command_line_ends_with_one_sentence_and_code_2(
    tmp_path_factory, tmp_path
):
    lm = planted_reviews.base(tmp_path_factory.getbasetemp())
    process = run_script(["interpret.py", "concepts", lm], cwd=tmp_path)
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert "is not a classifier" in process.stderr

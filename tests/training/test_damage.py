"""Damage to any file of a run: a resume ends right, to the bit, or in one sentence.

Bits flip and ends are lost at random places of config.json, the weights, the state, log.csv and the
cached tokens, and of a classifier's files.
"""

import os
import random
import shutil
from pathlib import Path

import planted_reviews
import pytest
import tiny_runs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import rows, run, tiny, weights

from crate_mini import UserError
from crate_mini.concepts import classifier

# Fixtures.
own_place = tiny_runs.own_place
text = tiny_runs.text

KINDS = ("config.json", "weights", "resume", "log.csv", "corpus.json", "train.bin", "val.bin")
N_FIRST, N_ALL = 3, 5  # steps of the run, and with its resume


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text):
    """(folder with a run and its token cache, what a resume of it ends with)."""
    folder = tmp_path_factory.mktemp("finished")
    before = os.environ.get("CRATE_CACHE")
    os.environ["CRATE_CACHE"] = str(folder / "cache")
    run(*tiny(text, folder / "run", N_FIRST))
    expected = folder / "expected"
    shutil.copytree(folder / "run", expected / "run")
    outcome = resumed(expected)
    os.environ.pop("CRATE_CACHE")
    if before:
        os.environ["CRATE_CACHE"] = before
    shutil.rmtree(expected)
    return folder, outcome


def resumed(folder):
    """(weights, rows of log.csv) of the run in `folder` after its last steps."""
    assert run("--resume", str(folder / "run"), "--train-steps", str(N_ALL)) == 0
    return weights(folder / "run"), rows(folder / "run")


def damage(file, seed, flips, cut):
    """Flip bits of a file and, if `cut`, remove its end."""
    draw = random.Random(seed)
    data = bytearray(file.read_bytes())
    for _ in range(flips):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data[: draw.randrange(len(data))] if cut else data)


@pytest.mark.fuzz
@settings(max_examples=100)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32),
    flips=st.integers(1, 3),
    cut=st.booleans(),
)
def test_a_resume_from_damaged_files_is_right_or_refused(finished, kind, seed, flips, cut):
    original, (expected_weights, expected_rows) = finished
    copy = original.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(original, copy)
    places = [copy / "run" / "last", copy / "run", *(copy / "cache").iterdir()]
    candidates = [path for place in places for path in place.iterdir() if kind in path.name]
    damage(candidates[0], seed, flips, cut)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRATE_CACHE", str(copy / "cache"))
        try:
            final_weights, log = resumed(copy)
        except UserError as error:
            assert "\n" not in str(error) and kind in KINDS[:3]
            return
    assert final_weights == expected_weights
    assert log[-2:] == expected_rows[-2:]
    if log != expected_rows:  # then it was said, and the damaged file is kept
        assert kind == "log.csv" and (copy / "run" / "log-damaged.csv").exists()


@pytest.mark.fuzz
@given(
    which=st.integers(0, 9), seed=st.integers(0, 2**32), flips=st.integers(1, 3), cut=st.booleans()
)
def test_a_damaged_classifier_is_refused_or_right(tmp_path_factory, which, seed, flips, cut):
    trained, _ = planted_reviews.trained(tmp_path_factory.getbasetemp())
    original = Path(trained.out, "last")
    copy = original.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(original, copy)
    files = sorted(copy.iterdir())
    damage(files[which % len(files)], seed, flips, cut)
    ids = torch.arange(8)[None]
    try:
        damaged, _ = classifier.load(copy)
    except UserError as error:
        assert "\n" not in str(error)
        return
    sound, _ = classifier.load(original)
    with torch.no_grad():
        assert torch.equal(damaged(ids, torch.tensor([8])), sound(ids, torch.tensor([8])))

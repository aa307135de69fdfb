"""Files of word vectors and codes give back what was saved, and what does not fit is refused."""

from dataclasses import fields, replace

import numpy as np
import pytest
from planted_vectors import planted

from crate_mini import UserError
from crate_mini.concepts.methods import discover
from crate_mini.concepts.types import Codes, Vectors


def test_files_give_back_what_was_saved(tmp_path):
    v, path = planted(), tmp_path / "v.npz"
    v.save(path)
    loaded = Vectors.load(path)
    for f in fields(Vectors):
        saved_value, value = getattr(v, f.name), getattr(loaded, f.name)
        assert np.array_equal(saved_value, value), f.name
        assert type(saved_value) is type(value)
    codes = discover("kmeans", v, 2)
    codes.save(path)
    loaded = Codes.load(path)
    assert np.array_equal(codes.assignment, loaded.assignment) and codes.health == loaded.health
    assert np.array_equal(codes.centroids, loaded.centroids) and codes.settings == loaded.settings


def remove(path):
    path.unlink()


def overwrite(path):
    path.write_bytes(b"PK rubbish")


def cut(path):
    path.write_bytes(path.read_bytes()[:-300])


def empty(path):
    path.write_bytes(b"")


def save_codes(path):
    Codes("kmeans", 0, [0], np.eye(1)).save(path)


def save_another_array(path):
    np.savez(path, a=np.ones(3))


@pytest.mark.parametrize(
    "harm, message",
    [
        (remove, "is missing"),
        (overwrite, "is damaged"),
        (cut, "is damaged"),
        (empty, "is damaged"),
        (save_codes, "holds codes of schema 1, expected vectors"),
        (save_another_array, "is damaged or holds no vectors"),
    ],
)
def test_a_file_without_vectors_is_one_sentence(harm, message, tmp_path):
    path = tmp_path / "v.npz"
    planted().save(path)
    harm(path)
    with pytest.raises(UserError, match=message) as error:
        Vectors.load(path)
    assert "\n" not in str(error.value) and "CKPT --from vectors`" in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"word": [9] * 3}, "do not exist"),
        ({"sentence": [0, 2, 1]}, "do not exist"),
        ({"sentence": [0, 1, 9]}, "do not exist"),
        ({"split": [0, 1, 3]}, "do not exist"),
        ({"position": [0]}, "do not fit"),
        ({"split": [0]}, "do not fit"),
        ({"upper": np.ones(3)}, "do not fit"),
        ({"lower": np.full((3, 2), np.nan)}, "not all finite"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(changes, message):
    good = Vectors(
        lower=np.ones((3, 2)),
        upper=np.ones((3, 4)),
        sentence=[0, 1, 1],
        word=[0, 0, 1],
        position=[0, 0, 1],
        label=[0, 1, 0],
        split=[0, 1, 2],
        vocabulary=["a", "b"],
    )
    assert good.rows("stop").tolist() == [False, True, True]
    with pytest.raises(UserError, match=message):
        replace(good, **changes)


def test_codes_beyond_the_codebook_are_refused():
    with pytest.raises(UserError, match="name more than the 2"):
        Codes("kmeans", 0, [0, 2], np.eye(2))

"""Result files with damaged bytes: what a later stage reads is right, or it refuses in a sentence.

Every kind of file that interpret.py and steer.py write and read again is damaged at random places:
bits are flipped, stretches are zeroed, ends are cut off.
"""

import json
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted_vectors import planted
from planted_workspace import planted_workspace
from tiny_saes import H, tiny_model

from crate_mini import UserError
from crate_mini.concepts import salience, survey
from crate_mini.concepts.methods import discover
from crate_mini.concepts.pipeline import load_salience
from crate_mini.concepts.types import Codes, Vectors
from crate_mini.console import results
from crate_mini.console.results import atomic_write
from crate_mini.judges import answer_cache
from crate_mini.judges.answer_cache import AnswerCache
from crate_mini.neurons import npz, pipeline, record_files, score_files, steering_section
from crate_mini.sae import autoencoder
from crate_mini.sae.autoencoder import SAE

FOLDERS = []  # temporary folders, kept until Python exits
INTERVAL = {"n": 3, "mean": 0.25, "ci95": [0.125, 0.375]}
STEERING = {
    "command": "python steer.py measure best",
    "checkpoint": {"sha256": "a" * 64, "config": {}},
    "summary": {
        "neuron": {
            "doses": {"2": dict.fromkeys(steering_section.METRICS, INTERVAL)},
            "at_kl": dict.fromkeys(("effect", "own", "seen"), INTERVAL),
        }
    },
    "inserted": [{"layer": 0, "kind": "neuron", "kl": 0.0, "loss": -0.03125}],
    "attribution": [{"layer": 0, "dose": 2, "correlation": 0.5, "null": None, "top10": 0.5}],
}
QUESTIONS = [
    {"method": m, "right": True, "given": ["fine"], "options": ["bad", "good"], "answer": i % 2}
    for i, m in enumerate("abab")
]


@cache
def folder():
    """A folder with one file of each kind, in `out` those of the stages of `neurons`.

    No fixture: --fuzz-minutes runs tests again and again without setting them up.
    """
    temporary = tempfile.TemporaryDirectory()
    FOLDERS.append(temporary)
    root = Path(temporary.name)
    pipeline.run(planted_workspace(root, trie=1, n=4))
    autoencoder.save(root, SAE(H, 140, 0, k=5), tiny_model(), {"held_out": {"L0": 5.0}})
    results.write_json(root / "steering.json", STEERING)
    vectors = planted()
    vectors.save(root / "vectors.npz")
    discover("kmeans", vectors, 2).save(root / "codes-kmeans-0.npz")
    found = salience.Salience(*[np.arange(4)] * 3, *[np.ones(4)] * 3)
    with atomic_write(root / "salience.npz") as file:
        np.savez(file, made="stamp", **vars(found))
    results.write_json(root / "faithfulness.json", {"made": "stamp", "seeds": {"0": [0.5, 1]}})
    page, _, key = survey.packet(QUESTIONS, "packet")
    (root / "packet-key.json").write_bytes(key)
    rows = [answer_cache.json_line(f"key {i}", {"text": f"words {i}"}) for i in range(9)]
    (root / "llm-cache.jsonl").write_text("".join(rows))
    return root


# ---- how each kind is read -----------------------------------------------------------------------


def work(path):
    """A Workspace on the files in `out`, by another object than the one that wrote them."""
    return planted_workspace(path.parent.parent, trie=1, n=4)


def read_record(path):
    record = record_files.load(path.parent)
    arrays = {}
    for name in ("shared", *record.sites):
        file = path.parent / f"record-{name}.npz"
        stamped = record.shared if name == "shared" else record.site(name)
        arrays[name] = {key: stamped[key] for key in npz.arrays(file, "again")}
    return {**record.header, **arrays}


def read_stage(path):
    workspace, stage = work(path), path.stem.split("-")[0]
    if stage == "explain":
        return workspace.explanations(workspace.sites[0])
    return vars(workspace.read(stage, workspace.sites[0]))


def read_scores(path):
    record, summary, neurons = score_files.read(path.parent)
    work(path).check_scores(neurons, summary)
    return [record, summary, *neurons]


def read_sae(path):
    sae, facts = autoencoder.load(path, tiny_model())
    return {**facts, **sae.state_dict()}


def read_salience(path):
    return vars(load_salience(path, "stamp") or UNREADABLE)  # then the stage runs again


def read_key(path):
    sheet = path.with_name("answers.csv")
    sheet.write_text("question,words,choice\n" + "".join(f"{i},fine,good\n" for i in range(1, 5)))
    return survey.score(path, sheet)


def read_cache(path):
    return AnswerCache(path).answers


class Unreadable:
    pass


UNREADABLE = Unreadable()
READERS = {
    "out/record.json": read_record,
    "out/record-shared.npz": read_record,
    "out/record-L0.npz": read_record,
    "out/select-L0.npz": read_stage,
    "out/explain-L0.jsonl": read_stage,
    "out/simulate-L0.npz": read_stage,
    "out/scores.jsonl": read_scores,
    "out/excerpts.jsonl": read_scores,
    "out/summary.json": read_scores,
    "sae-L0-x1.09375-k5.json": read_sae,
    "sae-L0-x1.09375-k5.pt": read_sae,
    "steering.json": steering_section.read,
    "vectors.npz": lambda path: vars(Vectors.load(path)),
    "codes-kmeans-0.npz": lambda path: vars(Codes.load(path)),
    "salience.npz": read_salience,
    "faithfulness.json": results.read_json,
    "packet-key.json": read_key,
    "llm-cache.jsonl": read_cache,
}


# ---- damage --------------------------------------------------------------------------------------


@cache
def intact(path):
    """(bytes, value) of a file before any damage."""
    return path.read_bytes(), READERS[name_of(path)](path)


def name_of(path):
    return next(name for name in READERS if path.match(f"*/{name}"))


def damaged(data, content):
    """The bytes with one stretch of damage, drawn by hypothesis."""
    place = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["flip", "flip", "flip", "cut", "zeros", "line"]))
    if kind == "flip":
        flipped = content[place] ^ (1 << data.draw(st.integers(0, 7)))
        return content[:place] + bytes([flipped]) + content[place + 1 :]
    if kind == "cut":
        return content[:place]
    if kind == "zeros":
        return content[:place] + bytes(16) + content[place + 16 :]
    ends = [i + 1 for i, byte in enumerate(content[:100_000]) if byte == ord("\n")]
    return content[: data.draw(st.sampled_from(ends or [place]))]  # a whole number of lines


def same(value, expected):
    """Whether everything expected is there and equal; a damaged name of the digest may be too."""
    if isinstance(expected, dict):
        return all(name in value and same(value[name], expected[name]) for name in expected)
    if isinstance(expected, (list, tuple)):
        return len(value) == len(expected) and all(map(same, value, expected))
    if hasattr(expected, "shape"):
        value, expected = np.asarray(value), np.asarray(expected)
        alike = (value.dtype, value.shape) == (expected.dtype, expected.shape)
        return alike and value.tobytes() == expected.tobytes()
    return value == expected


def outcome(path, content):
    """ "refused" or "right" for a file with this content; anything else fails."""
    original, expected = intact(path)
    path.write_bytes(content)
    try:
        value = READERS[name_of(path)](path)
        if path.name == "llm-cache.jsonl":  # what is missing is asked again
            assert same(expected, value)
        else:
            assert not value or same(value, expected)
    except UserError as error:
        assert "\n" not in str(error) and str(error).endswith(".")
        return "refused"
    finally:
        path.write_bytes(original)
    return "right"


@pytest.mark.fuzz
@given(data=st.data())
def test_a_damaged_file_is_refused_or_does_no_harm(data):
    for _ in range(6):
        path = folder() / data.draw(st.sampled_from(sorted(READERS)))
        outcome(path, damaged(data, intact(path)[0]))


@pytest.mark.parametrize("name", sorted(READERS))
def test_a_flipped_digit_is_found(name):
    """Unlike other bits, it leaves a file that can be parsed."""
    path = folder() / name
    content, _ = intact(path)
    if name.endswith((".npz", ".pt")):
        place = len(content) // 2
        flipped = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    else:
        digits = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
        place = digits[len(digits) // 2]
        flipped = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    expected = "right" if name == "salience.npz" else "refused"  # that stage runs again
    assert outcome(path, flipped) == expected


def header_claims(old, new):
    """Damage that leaves a .npz whose first array claims another shape, all else as it was."""

    def claim(path):
        content = path.read_bytes()
        assert old in content and len(old) == len(new)
        path.write_bytes(content.replace(old, new, 1))

    return claim


def hold_objects(path):
    np.savez(path, a=np.array([None, "x"]))


def say_encrypted(path):
    content = bytearray(path.read_bytes())
    content[6] |= 1
    content[content.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)


def name_another(path):
    np.savez(path, b=np.zeros((8, 9)))


@pytest.mark.parametrize(
    "harm",
    [
        hold_objects,
        say_encrypted,
        name_another,
        header_claims(b"(8000, 9)", b"(8000, 8)"),
        header_claims(b"(8000, 9)", b"(9000, 8)"),
        header_claims(b"(8000, 9)", b"(9000, 9)"),
        header_claims(b"(8000, 9)", b"(72000, )"),
        header_claims(b"(8000, 9)", b"(9999999,"[:8] + b")"),
        header_claims(b"(8000, 9), }     ", b"(99999999999,), }"),
        header_claims(b"(8000, 9)", b"(-8000,9)"),
        header_claims(b"<f8", b"<i8"),
        header_claims(b"<f8", b"|O8"),
        header_claims(b"False", b"True "),
    ],
)
def test_an_array_must_be_what_was_written(harm, tmp_path):
    path = tmp_path / "arrays.npz"
    np.savez(path, a=np.zeros((8000, 9)))
    assert npz.arrays(path, "again", ["a"])["a"].shape == (8000, 9)
    harm(path)
    with pytest.raises(UserError, match="arrays.npz is damaged; again"):
        npz.arrays(path, "again", ["a"])


def test_halves_keep_activations_of_any_scale(tmp_path):
    rng = np.random.default_rng(0)
    acts = np.maximum(rng.normal(size=(20, 64, 6)), 0).astype(np.float32)
    acts *= np.array([1e-30, 1e-6, 0, 1, 1e5, 1e30], np.float32)
    with open(tmp_path / "arrays.npz", "wb") as file:
        npz.write(
            file, {"acts": npz.Halves(acts, -1), "top": npz.Halves(acts.T, 0), "n": np.ones(3)}
        )
    read = npz.arrays(tmp_path / "arrays.npz", "again")
    assert set(read) == {"acts", "top", "n"}
    assert read["acts"].dtype == np.float32
    np.testing.assert_allclose(read["acts"], acts, rtol=2**-11, atol=0)
    np.testing.assert_array_equal(read["top"], read["acts"].T)
    half = acts[..., 3].astype(np.float16)  # a power of two changes no digit
    np.testing.assert_array_equal(read["acts"][..., 3], half.astype(np.float32))


def test_a_compressed_array_cannot_ask_for_more_than_its_bytes_can_hold(tmp_path):
    path = tmp_path / "arrays.npz"
    with open(path, "wb") as file:
        npz.write(file, {"a": np.zeros((8000, 9))})
    content = path.read_bytes()
    size = np.uint32(8000 * 9 * 8 + 128).tobytes()
    assert size in content  # in the directory, which the header must fit
    for harm in (content.replace(size, b"\xff\xff\xff\x7f"), content[:60] + content[80:]):
        path.write_bytes(harm)
        with pytest.raises(UserError, match="arrays.npz is damaged; again"):
            npz.arrays(path, "again", ["a"])


def test_files_of_older_versions_have_no_digest_and_are_read():
    path = folder() / "steering.json"
    content, expected = intact(path)
    old = json.loads(content)
    del old["digest"]
    assert outcome(path, json.dumps(old).encode()) == "right"
    assert Path(path).read_bytes() == content
    assert expected == STEERING
